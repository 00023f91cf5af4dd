"""A stage's rows: what is to be measured, what came out, and the file that has all of it after every row."""

from __future__ import annotations

import json
import math
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

DRY = "dry run: no figure"
WAITING = "not run"
NO_TIME = "not run: time"
ENDED = "not run: the process ended in it"


NUMBERS = frozenset({"median", "low", "high", "bound", "ratio", "samples"})
"""Fields of a row that may be infinite or NaN."""


READING_S = 3.0
"""For a row that only reads what others gave, when the time is up."""


class OutOfTime(BaseException):
    """A stage's time is up. No Exception: an engine takes those for faults of a request and goes on."""


class DeviceLost(Exception):
    """The device answers nothing any more in this process; another process may go on."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a row's ratio must be."""

    value: float
    most: bool = False
    """At most this; else at least."""

    def met(self, ratio: float) -> bool:
        if not math.isfinite(ratio):
            return False
        return ratio <= self.value if self.most else ratio >= self.value

    def __str__(self) -> str:
        return f"{'≤' if self.most else '≥'} {self.value:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """What one measurement gave."""

    samples: Sequence[float]
    unit: str
    bound: float | None = None
    """What the hardware, the format or a published table sets, in the same unit."""
    ratio: float | None = None
    """What a target is held against; the note says of what."""
    note: str = ""
    more: Mapping[str, object] = field(default_factory=dict)
    """Whatever else is worth keeping."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row to be: `run` measures it."""

    name: str
    what: str
    run: Callable[[], Figure]
    target: Target | None = None
    needs_s: float = 5.0
    """About how long it takes: it does not begin with less left. 0: it only reads what other rows gave."""
    judged_dry: bool = False
    """Right or wrong also in a dry run."""


@dataclass(slots=True)
class Row:
    """One measurement as the file has it."""

    name: str
    what: str
    status: str
    """ok, failed, or why it was not run."""
    n: int = 0
    unit: str = ""
    median: float | None = None
    low: float | None = None
    high: float | None = None
    bound: float | None = None
    ratio: float | None = None
    target: str = ""
    met: bool | None = None
    """None: no target, or a dry run."""
    note: str = ""
    error: str = ""
    seconds: float = 0.0
    """The row took, all in all."""
    samples: list[float] = field(default_factory=list)
    more: dict[str, object] = field(default_factory=dict)


class Report:
    """One stage's rows and the file they are in, written whole after each of them."""

    def __init__(self, path: Path, stage: str, facts: Mapping[str, object], dry: bool, end_s: float) -> None:
        """`facts`: card, versions … `end_s`: on `time.time`, when the stage must be over."""
        self.path = path
        self.stage = stage
        self.facts = facts
        self.dry = dry
        self.end_s = end_s
        self.rows: dict[str, Row] = {}

    def left_s(self) -> float:
        return self.end_s - time.time()

    def load(self) -> None:
        """Takes over the rows of a process that ended before it was through. The one it ended in has failed."""
        if not self.path.exists():
            return
        for one in json.loads(self.path.read_text(encoding="utf-8"))["rows"]:
            row = Row(**{key: _number(value) if key in NUMBERS else value for key, value in one.items()})
            if row.status == "running":
                row.status, row.error = "failed", row.error or ENDED
            self.rows[row.name] = row

    def write(self) -> None:
        """The whole file in one move: whoever reads it finds the old or the new one."""
        content = {"stage": self.stage, **self.facts, "rows": [asdict(row) for row in self.rows.values()]}
        text = json.dumps(_finite(content), indent=1, ensure_ascii=False)
        part = self.path.with_suffix(".part")
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(self.path)

    def samples(self, name: str) -> list[float]:
        """Of the rows with this name or whose name ends in ": name" (rounds); [] where none was measured."""
        rows = (row for row in self.rows.values() if row.name == name or row.name.endswith(f": {name}"))
        return [sample for row in rows if row.status == "ok" for sample in row.samples]

    def run(self, cases: Sequence[Case], after: Callable[[], None] = lambda: None) -> None:
        """Every case that has no row yet. `after` follows each that failed: it raises DeviceLost if none can succeed
        any more. A failure, or the end of time, is its row's; the others run all the same."""
        waiting = [case for case in cases if case.name not in self.rows or self.rows[case.name].status == WAITING]
        for case in waiting:
            self.put(case, WAITING)
        for case in waiting:
            if case.needs_s and self.left_s() < case.needs_s:
                self.put(case, NO_TIME)
                continue
            self.put(case, "running")
            self._run_one(case, after)

    def _run_one(self, case: Case, after: Callable[[], None]) -> None:
        began = time.monotonic()
        row = self.rows[case.name]
        try:
            with _alarm(self.left_s() if case.needs_s else max(self.left_s(), READING_S)):
                figure = case.run()
        except OutOfTime:
            row.status = NO_TIME
        except Exception as error:  # one row's fault is its own
            row.status, row.error = "failed", told(error)
        else:
            self._take(row, figure, case)
        row.seconds = round(time.monotonic() - began, 3)
        self.write()
        if row.status == "failed":
            after()

    def put(self, case: Case, status: str) -> None:
        target = "" if case.target is None else str(case.target)
        self.rows[case.name] = Row(case.name, case.what, status, target=target)
        self.write()

    def _take(self, row: Row, figure: Figure, case: Case) -> None:
        samples = [float(one) for one in figure.samples]
        row.status, row.n, row.unit = "ok", len(samples), figure.unit
        row.samples, row.more = samples, dict(figure.more)
        if samples:
            row.median, row.low, row.high = median(samples), min(samples), max(samples)
        row.bound, row.ratio, row.note = figure.bound, figure.ratio, figure.note
        if self.dry:
            row.note = f"{DRY}; {figure.note}" if figure.note else DRY
        if case.target is not None and figure.ratio is not None and (case.judged_dry or not self.dry):
            row.met = case.target.met(figure.ratio)


def _number(value: Any) -> Any:
    """What `_finite` made a text of, as it was."""
    if isinstance(value, list):
        return [float(one) for one in value]
    return float(value) if isinstance(value, str) else value


def told(error: BaseException) -> str:
    """The error and where it came from, a few lines at most."""
    where = traceback.extract_tb(error.__traceback__)[-3:]
    places = " < ".join(f"{Path(one.filename).name}:{one.lineno} {one.name}" for one in reversed(where))
    return f"{type(error).__name__}: {str(error)[:600]} [{places}]"


def _finite(value: object) -> object:
    """JSON has no NaN and no infinity: they become texts."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the main thread once the seconds are over."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def table(rows: Sequence[Row], width: int = 150) -> str:
    """The rows for a terminal: figure, spread, bound, ratio, verdict."""
    lines = [f"{'row':<62} {'median':>11} {'min – max':>19} {'bound':>10} {'ratio':>7}  {'target':<8} verdict"]
    for row in rows:
        figure = "" if row.median is None else f"{row.median:.4g} {row.unit}"
        spread = "" if row.low is None or row.high is None else f"{row.low:.4g} – {row.high:.4g}"
        bound = "" if row.bound is None else f"{row.bound:.4g}"
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        lines.append(
            f"{row.name[:62]:<62} {figure:>11} {spread:>19} {bound:>10} {ratio:>7}  {row.target:<8} {verdict(row)}"
        )
        if row.error:
            lines.append(f"    {row.error}"[:width])
    return "\n".join(line.rstrip() for line in lines)


def verdict(row: Row) -> str:
    if row.status != "ok":
        return row.status
    if row.met is not None:
        return "met" if row.met else "MISSED"
    return "dry run" if row.note.startswith(DRY) else ""


def summary(rows: Sequence[Row]) -> str:
    """`12 rows: 9 met, 1 missed, 1 failed, 1 not run`"""
    counts = {
        "met": sum(row.met is True for row in rows),
        "missed": sum(row.met is False for row in rows),
        "without a verdict": sum(row.status == "ok" and row.met is None for row in rows),
        "failed": sum(row.status == "failed" for row in rows),
        "not run": sum(row.status not in ("ok", "failed") for row in rows),
    }
    return f"{len(rows)} rows: " + ", ".join(f"{count} {name}" for name, count in counts.items() if count)
