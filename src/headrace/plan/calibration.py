"""Past predictions with what was measured: how far to correct the next one, and how far to trust it.

A SQLite file in the state folder holds a row for each pair of numbers. What a formula says is corrected by a factor
fitted on the past of the same quantity on the same machine, in the space of logarithms and drawn towards 1 (ridge).
The interval is split-conformal: half of the past fits the factor, and of the other half's |ln(measured / corrected)|
the quantile is taken that covers LEVEL of what comes next, if it is like what came before (Lei et al.,
Distribution-free predictive inference for regression, 2018, algorithm 2). With fewer than ENOUGH pairs it is ×/÷ 2, and
says so.

A row keeps what the formula said, what was made of it out of the rows before, and the interval then: coverage is that
of intervals that knew nothing of their outcome.
"""

from __future__ import annotations

import fcntl
import math
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from time import monotonic, sleep
from typing import Literal, TypeGuard

from headrace import __version__
from headrace.core.errors import ConfigError, InvalidParameter
from headrace.plan.document import Quantity

Label = Literal["calibrated", "uncalibrated", "unmeasured"]
"""Of an interval: conformal; ×/÷ 2 with a few pairs; ×/÷ 2 with none."""
LEVEL = 0.8
ENOUGH = 20
"""Pairs for a conformal interval."""
WIDE = 2.0
"""Factor of an interval without enough past."""
RIDGE = 4.0
"""Pairs of which it is assumed that they found no error."""
WINDOW = 200
"""The newest pairs count: code and machine change."""
SPLIT_SEED = 0
LONGEST_NAME = 512
FILE = "calibration.sqlite3"
APPLICATION_ID = 0x48524341
SCHEMA_VERSION = 1
TIMEOUT_S = 30.0
"""How long another process may hold the file."""
LEAST, MOST = 1e-30, 1e30
"""Of a number that is stored."""
DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
SCHEMA = """
CREATE TABLE run (
  id INTEGER PRIMARY KEY,
  machine TEXT NOT NULL, model TEXT NOT NULL, version TEXT NOT NULL, measured_at TEXT NOT NULL, origin TEXT NOT NULL
);
CREATE TABLE pair (
  id INTEGER PRIMARY KEY,
  run INTEGER NOT NULL REFERENCES run (id),
  quantity TEXT NOT NULL,
  predicted REAL NOT NULL, corrected REAL NOT NULL, low REAL NOT NULL, high REAL NOT NULL, label TEXT NOT NULL,
  measured REAL NOT NULL
);
CREATE INDEX pair_by_quantity ON pair (quantity, run);
"""


@dataclass(frozen=True, slots=True)
class Context:
    """Of one run that was predicted and measured."""

    machine: str
    """What it ran on: `machine_key`."""
    model: str
    """Its name, and whatever else changes its weights."""
    origin: str
    """compare, benchmark …"""
    version: str = __version__
    """Of headrace."""
    measured_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """Date and time, UTC."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One number, predicted and measured."""

    quantity: str
    machine: str
    model: str
    version: str
    measured_at: str
    predicted: float
    """By the formula alone."""
    corrected: float
    """With the factor of that time."""
    low: float
    high: float
    label: Label
    measured: float

    @property
    def error(self) -> float:
        """|corrected - measured| / measured"""
        return abs(self.corrected - self.measured) / self.measured

    @property
    def raw_error(self) -> float:
        return abs(self.predicted - self.measured) / self.measured

    @property
    def covered(self) -> bool:
        return self.low <= self.measured <= self.high


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the past of one quantity on one machine says about the next prediction of it."""

    factor: float
    """By which a formula's value is multiplied."""
    spread: float
    """The interval is value ÷ spread to value × spread."""
    label: Label
    pairs: int
    """That it rests on."""
    models: frozenset[str] = frozenset()
    """That they are of."""

    @classmethod
    def of(cls, past: Sequence[tuple[float, str]]) -> Calibration:
        """`past`: (ln(measured / predicted), model) of each pair, in any order that does not hang on the numbers."""
        models = frozenset(model for _, model in past)
        logs = [log for log, _ in past]
        if not logs:
            return cls(1.0, WIDE, "unmeasured", 0)
        if len(logs) < ENOUGH:
            return cls(math.exp(ridge(logs)), WIDE, "uncalibrated", len(logs), models)
        Random(SPLIT_SEED).shuffle(logs)
        half = len(logs) // 2
        factor = ridge(logs[:half])
        spread = conformal_quantile([abs(log - factor) for log in logs[half:]], LEVEL)
        return cls(math.exp(factor), math.exp(spread), "calibrated", len(logs), models)


def ridge(logs: Sequence[float], strength: float = RIDGE) -> float:
    """The b that makes Σ (log - b)² + strength · b² least: between their mean and 0."""
    return math.fsum(logs) / (len(logs) + strength)


def conformal_quantile(errors: Sequence[float], level: float) -> float:
    """The ⌈(n + 1) · level⌉-th smallest of n errors: the next one of their kind is no larger with a probability of at
    least `level`. Raises ValueError where n is too small for that."""
    rank = math.ceil((len(errors) + 1) * level)
    if not 1 <= rank <= len(errors):
        raise ValueError(f"{len(errors)} errors do not tell the quantile {level}")
    return sorted(errors)[rank - 1]


def machine_key(device: str, threads: int | None = None) -> str:
    """One machine's name in the store: what computes, and with how many threads (None: a GPU)."""
    return device if threads is None else f"{device}, {threads} threads"


def default_path(state: Path) -> Path:
    """`state`: headrace's own folder below the user's state folder."""
    return state / FILE


class Store:
    """The file. It is opened anew for every call, under a lock that all processes heed: none sees half of a run, and
    none moves aside a file that another has just put right.

    A file that is damaged is kept under another name, `notes` says which, and an empty one takes its place.
    """

    def __init__(self, path: Path) -> None:
        """Touches nothing yet."""
        self.path = path
        self.notes: list[str] = []

    def record(self, predicted: Mapping[str, float], measured: Mapping[str, float], context: Context) -> int:
        """Stores each quantity that is in both, all of them or none; -> how many. What the past makes of a prediction
        is worked out first, so it does not know its own outcome.

        Raises InvalidParameter for a number that is not above 0 and finite, ConfigError where the file cannot be
        written or is of another program or version.
        """
        names = [name for name in predicted if name in measured]
        _check_text(context, names)
        for name in names:
            for what, value in (("predicted", predicted[name]), ("measured", measured[name])):
                if not _is_positive(value):
                    raise InvalidParameter(f"{what}.{name}", value, f"a number from {LEAST:g} to {MOST:g}")
        if not names:
            return 0
        with self._opened(write=True) as connection:
            assert connection is not None
            past = {name: _calibration(connection, name, context.machine) for name in names}
            told = (context.machine, context.model, context.version, context.measured_at, context.origin)
            run = connection.execute(
                "INSERT INTO run (machine, model, version, measured_at, origin) VALUES (?, ?, ?, ?, ?)", told
            ).lastrowid
            for name in names:
                found, raw = past[name], float(predicted[name])
                value = raw * found.factor
                connection.execute(
                    "INSERT INTO pair (run, quantity, predicted, corrected, low, high, label, measured) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (run, name, raw, value, value / found.spread, value * found.spread, found.label,
                     float(measured[name])),
                )  # fmt: skip
        return len(names)

    def pairs(self) -> list[Pair]:
        """Everything that is stored, oldest first. Raises ConfigError as `record`."""
        with self._opened(write=False) as connection:
            if connection is None:
                return []
            rows = connection.execute(
                "SELECT quantity, machine, model, version, measured_at, predicted, corrected, low, high, label, "
                "measured FROM pair JOIN run ON run.id = pair.run ORDER BY pair.id"
            )
            return [Pair(*row) for row in rows]

    def calibration(self, quantity: str, machine: str) -> Calibration:
        """Raises ConfigError as `record`."""
        with self._opened(write=False) as connection:
            return Calibration.of(()) if connection is None else _calibration(connection, quantity, machine)

    # ------------------------------------------------------------ the file

    @contextmanager
    def _opened(self, write: bool) -> Iterator[sqlite3.Connection | None]:
        """In one transaction. None: there is no file, and nothing is to be written."""
        try:
            if not write and not (self.path.exists() and self.path.stat().st_size):
                yield None
                return
            with self._lock(write), closing(self._connect()) as connection:
                if not write:
                    yield connection
                    return
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise ConfigError(f"{self.path}: cannot be {'written' if write else 'read'}: {error}") from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"{self.path}: cannot be {'written' if write else 'read'}: {reason}") from error

    @contextmanager
    def _lock(self, write: bool) -> Iterator[None]:
        if write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(self.path.with_name(f"{self.path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:
            if write:
                raise
            # A folder that may only be read: nobody of ours writes there either.
            yield
            return
        try:
            end = monotonic() + TIMEOUT_S
            while not _locked(descriptor):
                if monotonic() > end:
                    raise ConfigError(f"{self.path}: another process has held it for {TIMEOUT_S:g} s")
                sleep(0.02)
            yield
        finally:
            os.close(descriptor)

    def _connect(self) -> sqlite3.Connection:
        try:
            return self._open_checked()
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
        if (moved := self._move_aside()) is None:
            raise ConfigError(f"{self.path}: is damaged, and cannot be moved aside: the folder may only be read")
        self.notes.append(f"{self.path} was damaged; it is kept as {moved}, and calibration begins anew")
        return self._open_checked()

    def _open_checked(self) -> sqlite3.Connection:
        """Raises sqlite3.DatabaseError, ConfigError."""
        fresh = not self.path.exists()
        connection = sqlite3.connect(self.path, timeout=TIMEOUT_S, isolation_level=None)
        try:
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise Damaged(str(found))
            application = connection.execute("PRAGMA application_id").fetchone()[0]
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if not tables and not application:
                _create(connection)
            elif application != APPLICATION_ID:
                raise ConfigError(f"{self.path}: is a database of another program")
            elif version != SCHEMA_VERSION:
                raise ConfigError(f"{self.path}: has version {version}, this headrace knows {SCHEMA_VERSION}")
            if fresh:
                self.path.chmod(0o600)
        except BaseException:
            connection.close()
            raise
        return connection

    def _move_aside(self) -> Path | None:
        """With what SQLite keeps beside it. None: the folder does not allow it."""
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        names = (f"{self.path.name}.damaged-{stamp}{f'-{n}' if n else ''}" for n in range(1000))
        moved = next(path for name in names if not (path := self.path.with_name(name)).exists())
        try:
            self.path.rename(moved)
            for suffix in ("-journal", "-wal", "-shm"):
                beside = self.path.with_name(self.path.name + suffix)
                if beside.exists():
                    beside.rename(moved.with_name(moved.name + suffix))
        except OSError:
            return None
        return moved


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Damaged(sqlite3.DatabaseError):
    """SQLite's own check found the file inconsistent."""


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    # Extended codes have the plain one in their lowest byte.
    return isinstance(error, Damaged) or (getattr(error, "sqlite_errorcode", 0) & 0xFF) in DAMAGE


def _create(connection: sqlite3.Connection) -> None:
    connection.executescript(
        f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA application_id = {APPLICATION_ID}; "
        f"PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
    )


def _calibration(connection: sqlite3.Connection, quantity: str, machine: str) -> Calibration:
    rows = connection.execute(
        "SELECT predicted, measured, model FROM pair JOIN run ON run.id = pair.run "
        "WHERE quantity = ? AND machine = ? ORDER BY pair.id DESC LIMIT ?",
        (quantity, machine, WINDOW),
    ).fetchall()
    return Calibration.of(
        [(math.log(measured) - math.log(predicted), model) for predicted, measured, model in reversed(rows)]
    )


def _is_positive(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and LEAST <= value <= MOST


def _check_text(context: Context, quantities: Sequence[str]) -> None:
    told = {name: getattr(context, name) for name in ("machine", "model", "version", "measured_at", "origin")}
    for name, value in (*told.items(), *(("quantity", one) for one in quantities)):
        if not isinstance(value, str) or not 0 < len(value) <= LONGEST_NAME or not value.isprintable():
            raise InvalidParameter(name, value, f"1 to {LONGEST_NAME} printable characters")


def record_run(store: Store, predicted: Mapping[str, float], measured: Mapping[str, float], context: Context) -> int:
    """What compare and the benchmarks call with a run's numbers: `Store.record`, of what is in both. A measurement that
    is not there or is 0 (no meter, nothing waited for) is left out by the caller."""
    return store.record(predicted, measured, context)


def calibrate(quantity: Quantity, past: Calibration, model: str) -> Quantity:
    """A prediction with its factor and interval, and in its note what they rest on. A value that is no number above 0
    is left as it is. `model`: as in `Context`."""
    value = quantity.value
    if not _is_positive(value):
        return quantity
    corrected = value * past.factor
    low, high = corrected / past.spread, corrected * past.spread
    if past.label == "unmeasured":
        origin = "from the probe" if quantity.basis == "measured" else "from data sheet"
        told = f"{origin}, never measured here: ×/÷ {WIDE:g}"
        return replace(quantity, low=low, high=high, note=_joined(quantity.note, told))
    runs = f"{past.pairs} past runs on this machine"
    if past.label == "uncalibrated":
        told = f"uncalibrated ({runs}, {ENOUGH} are needed): ×/÷ {WIDE:g}; × {past.factor:.3g} of the formula"
    else:
        told = f"{LEVEL:.0%} of {runs} of {len(past.models)} models; × {past.factor:.3g} of the formula"
    if model not in past.models:
        told += "; none of them of this model"
    basis = "calibrated" if past.label == "calibrated" else quantity.basis
    return replace(quantity, value=corrected, low=low, high=high, basis=basis, note=_joined(quantity.note, told))


def _joined(first: str, second: str) -> str:
    return f"{first}; {second}" if first else second
