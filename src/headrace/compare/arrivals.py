"""When requests arrive: every process is a few numbers, and gives the same times everywhere for the same seed.

All draws are `random.Random.random` (Mersenne Twister; Python promises its sequence for an integer seed), turned into
other distributions here: what the other methods of `random.Random` return may change between versions of Python.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from headrace.compare.workloads import Workload
from headrace.core.errors import InvalidParameter

RECORDED = "recorded"
"""The file's own times; no process: who reads the file knows them."""
ALLOWED = (
    "at-once, gap:SECONDS, poisson:MEAN_GAP_SECONDS, rate:PER_SECOND (the numbers above 0), "
    f"bursts:SIZE:GAP_SECONDS (SIZE ≥ 1) or {RECORDED}"
)
ARRIVE = "Requests arrive "
"""How a note of a workload begins that tells when they do."""
MAX_REQUESTS = 100_000
"""Most requests of a workload."""
MAX_SECONDS = 86_400.0
"""Latest arrival of a run, and longest gap: a day."""
MAX_SEED = 2**63 - 1
_DIGITS = 9
"""Decimals that times keep: a nanosecond. The last bits of a logarithm may differ between machines, these do not."""


def generator(seed: int, purpose: str) -> random.Random:
    """A generator for one purpose: what is drawn for another does not change what this one gives.

    Seeded with the first 8 bytes of SHA-256("SEED/PURPOSE"), big-endian. Raises InvalidParameter.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise InvalidParameter("seed", seed, f"an integer from 0 to {MAX_SEED}")
    return random.Random(int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "big"))


class Arrivals(Protocol):
    """An arrival process. The first request arrives at 0: it starts the clock of a run."""

    @property
    def description(self) -> str:
        """How requests arrive, to go on from ARRIVE."""

    def times(self, count: int, rng: random.Random) -> tuple[float, ...]:
        """Seconds of `count` arrivals, ascending, the first 0; fewer are a prefix of more. Raises InvalidParameter."""


@dataclass(frozen=True, slots=True)
class AtOnce:
    """All requests at the start."""

    @property
    def description(self) -> str:
        return "all at once"

    def times(self, count: int, rng: random.Random) -> tuple[float, ...]:
        _check_count(count)
        return (0.0,) * count


@dataclass(frozen=True, slots=True)
class ConstantGap:
    """A request every `gap_s` seconds."""

    gap_s: float

    def __post_init__(self) -> None:
        _check_positive("gap_s", self.gap_s)

    @property
    def description(self) -> str:
        return f"{self.gap_s:g} s apart"

    def times(self, count: int, rng: random.Random) -> tuple[float, ...]:
        _check_count(count)
        return tuple(round(float(index * self.gap_s), _DIGITS) for index in range(count))


@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent exponential gaps with mean `mean_gap_s` seconds: −mean·ln(1 − u), u uniform in [0, 1)."""

    mean_gap_s: float

    def __post_init__(self) -> None:
        _check_positive("mean_gap_s", self.mean_gap_s)

    @classmethod
    def of_rate(cls, per_second: float) -> Poisson:
        """Of so many requests per second on average. Raises InvalidParameter."""
        _check_positive("per_second", per_second, low=1 / MAX_SECONDS)
        return cls(1 / per_second)

    @property
    def description(self) -> str:
        return f"at random, {self.mean_gap_s:g} s apart on average (Poisson)"

    def times(self, count: int, rng: random.Random) -> tuple[float, ...]:
        _check_count(count)
        found = [0.0]
        while len(found) < count:
            found.append(found[-1] - self.mean_gap_s * math.log1p(-rng.random()))
        return tuple(round(time_s, _DIGITS) for time_s in found)


@dataclass(frozen=True, slots=True)
class Bursts:
    """`size` requests at once, every `gap_s` seconds."""

    size: int
    gap_s: float

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or not 1 <= self.size <= MAX_REQUESTS:
            raise InvalidParameter("size", self.size, f"an integer from 1 to {MAX_REQUESTS}")
        _check_positive("gap_s", self.gap_s)

    @property
    def description(self) -> str:
        return f"{self.size} at once, every {self.gap_s:g} s"

    def times(self, count: int, rng: random.Random) -> tuple[float, ...]:
        _check_count(count)
        return tuple(round(float(index // self.size * self.gap_s), _DIGITS) for index in range(count))


_KINDS: Mapping[str, Callable[[float], Arrivals]] = {
    "gap": ConstantGap,
    "poisson": Poisson,
    "rate": Poisson.of_rate,
}
"""Kinds of one number."""


def parse_arrivals(text: str) -> Arrivals | None:
    """A process as a user writes it (ALLOWED); None: recorded. Raises InvalidParameter, naming `arrivals`."""
    kind, *numbers = text.split(":") if isinstance(text, str) else ("",)
    try:
        if kind == RECORDED and not numbers:
            return None
        if kind == "at-once" and not numbers:
            return AtOnce()
        if kind in _KINDS and len(numbers) == 1:
            return _KINDS[kind](float(numbers[0]))
        if kind == "bursts" and len(numbers) == 2:
            return Bursts(int(numbers[0]), float(numbers[1]))
    except InvalidParameter as error:
        allowed = str(error).partition("allowed: ")[2]
        raise InvalidParameter("arrivals", text, f"for {error.field} {allowed}") from error
    except ValueError:
        pass  # not a number
    raise InvalidParameter("arrivals", text, ALLOWED)


def arrive(workload: Workload, process: Arrivals, seed: int) -> Workload:
    """The same requests, in the same order, at other times. Raises InvalidParameter where the last comes too late."""
    times = process.times(len(workload.requests), generator(seed, "arrivals"))
    if times[-1] > MAX_SECONDS:
        allowed = f"so many that the last arrives within {MAX_SECONDS:g} s; they arrive {process.description}"
        raise InvalidParameter("num_requests", len(times), allowed)
    requests = tuple(replace(one, arrival_s=time_s) for one, time_s in zip(workload.requests, times, strict=True))
    drawn = seed if isinstance(process, Poisson) else workload.seed
    notes = [note for note in workload.notes if not note.startswith(ARRIVE)]
    if not isinstance(process, AtOnce):
        notes.append(f"{ARRIVE}{process.description}.")
    return replace(workload, requests=requests, seed=drawn, notes=tuple(notes))


def _check_count(count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_REQUESTS:
        raise InvalidParameter("count", count, f"an integer from 1 to {MAX_REQUESTS}")


def _check_positive(field: str, value: object, low: float = 0.0) -> None:
    """Above `low`, or from it on where it is not 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= MAX_SECONDS or value < low:  # type: ignore[operator]
        span = f"from {low:g}" if low else "above 0,"
        raise InvalidParameter(field, value, f"a number {span} up to {MAX_SECONDS:g}")
