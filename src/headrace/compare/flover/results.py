"""What an experiment found: runs, tables, figures, checks and sentences, for a terminal, a page and JSON alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from headrace.compare.figures import Spread
from headrace.compare.flover.plan import INSTANCES_METHOD, Measured, Scale, Shape
from headrace.compare.flover.published import Published
from headrace.compare.flover.trace import Check
from headrace.compare.methods import Outcome
from headrace.compare.workloads import Workload

NONE = "–"
"""Of a figure that was not published, or not measured."""
TIE = 0.01
"""What two medians may differ by without a word of which is less."""


@dataclass(frozen=True, slots=True)
class CellRun:
    """One point of an experiment: every method's rounds."""

    shape: Shape
    workload: Workload
    runs: Mapping[str, tuple[Outcome, ...]]
    """Method -> its rounds; a method that failed is not in it."""
    exact: frozenset[str] = frozenset()
    """Those that promise the same tokens."""
    free_order: bool = False
    """Whether they promise them but for near-ties: on a GPU whose order of summation follows the batch."""

    def seconds(self, name: str) -> Spread | None:
        """Of a method's rounds; None: it did not run."""
        return Spread.of([one.seconds for one in self.runs[name]]) if name in self.runs else None

    def ratio(self, name: str, over: str) -> Spread | None:
        """Seconds of `name` / seconds of `over`, round by round: how much faster `over` is."""
        if name not in self.runs or over not in self.runs:
            return None
        pairs = zip(self.runs[name], self.runs[over], strict=True)
        return Spread.of([one.seconds / max(other.seconds, 1e-9) for one, other in pairs])

    def latency(self, name: str) -> Spread | None:
        """Mean seconds from arrival to end of the requests."""
        if name not in self.runs:
            return None
        return Spread.of([fmean(request.latency_s for request in one.requests) for one in self.runs[name]])

    def round(self, name: str) -> Outcome:
        """The one whose time is nearest to the median."""
        rounds = self.runs[name]
        middle = Spread.of([one.seconds for one in rounds]).median
        return min(rounds, key=lambda one: abs(one.seconds - middle))


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of texts. The first column names its rows."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing for a width in user units, and what is said below it."""

    draw: Callable[[float], str]
    caption: str


@dataclass(frozen=True, slots=True)
class Findings:
    """What the runs of one experiment come to."""

    grids: tuple[Grid, ...]
    checks: tuple[Check, ...]
    sentences: tuple[str, ...]
    figures: tuple[Figure, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    """Name of a CSV file -> its text."""


@dataclass(frozen=True, slots=True)
class Result:
    """One experiment, done."""

    published: Published
    scale: Scale
    measured: Measured
    repeats: int
    seed: int
    cells: tuple[CellRun, ...]
    descriptions: Mapping[str, str]
    """Of the methods that ran."""
    failures: Mapping[str, str]
    """Method -> why it could not run here, or where it broke off."""
    findings: Findings

    @property
    def holds(self) -> bool:
        """Whether every check does."""
        return all(check.holds for check in self.findings.checks)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader has to know before the figures."""
        scale, measured = self.scale, self.measured
        return (
            *scale.notes,
            f"One request alone took {scale.single_s:.3f} s here, 5.8 s there: gaps and windows are {scale.time:.3g} "
            "times the published ones. Compare ratios, never seconds.",
            f"An iteration took {1000 * measured.step_s:.2f} ms with one request and {1000 * measured.batch_step_s:.2f}"
            f" ms with {measured.rows}: a batch gains at most {measured.batch_gain:.1f} times here.",
        )


def spread_text(spread: Spread | None, digits: int = 2) -> str:
    """Median, and the range in brackets where there is one."""
    if spread is None:
        return NONE
    told = f"{spread.median:.{digits}f}"
    low, high = f"{spread.low:.{digits}f}", f"{spread.high:.{digits}f}"
    return told if low == high else f"{told} ({low}–{high})"


def number_text(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def window_label(service_times: float) -> str:
    return f"window of {service_times:.2g} T1"


def label_of(name: str, windows: Mapping[str, float]) -> str:
    """A method for a reader; `windows`: names of window methods -> service times they wait."""
    if name in windows:
        return window_label(windows[name])
    return "instances" if name == INSTANCES_METHOD else name


def at_most(cell: CellRun, name: str, other: str) -> tuple[bool, str]:
    """Whether `name` takes no longer than `other`, and in words. Ranges that overlap, and medians that differ by less
    than TIE, say nothing against it."""
    one, two = cell.seconds(name), cell.seconds(other)
    assert one is not None and two is not None
    told = f"{one.median:.3f} s and {two.median:.3f} s"
    if one.median <= two.median:
        return True, told
    if one.low <= two.high:
        return True, f"{told}, a tie: their ranges overlap"
    if one.median <= two.median * (1 + TIE):
        return True, f"{told}, a tie: within {100 * TIE:.0f} %"
    return False, told


def never_slower(cells: Sequence[CellRun], name: str, other: str, label: str) -> Check:
    """`name` takes no longer than `other` at any of the points where both ran."""
    compared = [(cell, *at_most(cell, name, other)) for cell in cells if name in cell.runs and other in cell.runs]
    slower = [f"{cell.shape.label}: {told}" for cell, holds, told in compared if not holds]
    ties = sum("tie" in told for _, _, told in compared)
    told = f"at all {len(compared)} points" + (f", {ties} of them ties" if ties else "")
    if len(compared) == 1:
        told = compared[0][2]
    return Check(f"{name} ≤ {label}, in seconds", not slower and bool(compared), "; ".join(slower) or told)


def same_tokens(cells: Sequence[CellRun], base: str) -> Check:
    """Every round of every method that promises it has the tokens of `base`'s first round. Of near-ties it knows
    nothing, so that on a GPU it says what may be behind a difference."""
    broken = []
    answers = 0
    for cell in cells:
        expected = cell.runs[base][0].outputs
        for name in sorted(cell.exact & cell.runs.keys()):
            answers += len(expected) * len(cell.runs[name])
            if any(one.outputs != expected for one in cell.runs[name]):
                broken.append(f"{name}, {cell.shape.label}")
    told = f"{answers} answers" if not broken else f"not so: {'; '.join(broken)}"
    if broken and any(cell.free_order for cell in cells):
        told += ". On this GPU near-ties may fall otherwise in another batch: --batch-invariant leaves none"
    return Check("every method of ours gives each request the same tokens", not broken, told)


def together(checks: Sequence[tuple[str, Check]]) -> Check:
    """The same check of several runs (label, check) as one."""
    broken = [f"{label}: {one.detail}" for label, one in checks if not one.holds]
    told = checks[0][1].detail if len(checks) == 1 else f"in all {len(checks)} runs"
    return Check(checks[0][1].name, not broken, "; ".join(broken) or told)
