"""What the probes share: threads that begin together, passes in a given time, sizes that no cache holds."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Protocol

from headrace.core.errors import InvalidParameter
from headrace.engine.hardware import ROOT, as_int, read_text
from headrace.plan.profile import Detail

Pass = Callable[[], object]
FEWEST_PASSES, MOST_PASSES = 3, 60
LARGE = 4
"""Times the last cache: an array of STREAM, and of all weights or keys that a pass reads."""
MOST_THREADS = 1024
DEFAULT_CACHE = 32 * 2**20
"""Of the last level, where the system does not say."""
FIRST_CACHE = 32 * 2**10
CACHE_KINDS = ("Data", "Unified")


@dataclass(frozen=True, slots=True)
class What:
    """What a figure says, without its value."""

    name: str
    of: Mapping[str, Detail]
    unit: str
    note: str = ""

    def key(self) -> tuple[object, ...]:
        return self.name, *self.of.items()


class Probe(Protocol):
    """Measures a few figures, once a round."""

    def round(self) -> Iterator[tuple[What, float]]:
        """The median of some passes, for each figure."""


@dataclass(slots=True)
class Bench:
    """Sizes and times that all probes keep to."""

    threads: int
    cache_bytes: int
    """Of all caches of the last level."""
    memory_bytes: int
    """Most that one array may take."""
    seconds: float
    """How long passes of one figure are repeated in a round."""
    first_cache: int = FIRST_CACHE
    """Bytes of one core's first-level cache."""
    skipped: list[What] = field(default_factory=list)
    """What cannot be measured here; `note` says why."""

    @property
    def large(self) -> int:
        """Bytes of an array that the caches hold no part of worth speaking of: STREAM asks for four times the last
        level."""
        return min(LARGE * self.cache_bytes, self.memory_bytes)

    @property
    def note(self) -> str:
        """Of figures of memory where free memory did not allow arrays of the size that they need."""
        if self.large == LARGE * self.cache_bytes:
            return ""
        wanted, had = LARGE * self.cache_bytes >> 20, self.large >> 20
        return f"not of memory alone: arrays of {had} MiB instead of {wanted} MiB, for want of free memory"

    def repeat(self, work: Pass) -> float:
        """Median seconds of a pass; the first, which finds cold memory, is not counted."""
        work()
        seconds: list[float] = []
        end = time.perf_counter() + self.seconds
        while len(seconds) < FEWEST_PASSES or (len(seconds) < MOST_PASSES and time.perf_counter() < end):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        return median(seconds)

    def together(self, make: Callable[[int], Pass]) -> float:
        """Median seconds of a pass of all threads at once, from the first one's beginning to the last one's end.
        `make(thread)` prepares a thread's part, in that thread; what it calls must give the interpreter's lock free."""
        if self.threads == 1:
            return self.repeat(make(0))
        return median(_team(self.threads, make, self.seconds)[1:])


def _team(threads: int, make: Callable[[int], Pass], seconds: float) -> list[float]:
    gate = threading.Barrier(threads)
    spans: list[list[tuple[float, float]]] = [[] for _ in range(threads)]
    going = [True]

    def passes(thread: int) -> None:
        work = make(thread)
        end = time.perf_counter() + seconds
        while True:
            if gate.wait() == 0:
                count = len(spans[thread])
                going[0] = count <= FEWEST_PASSES or (count <= MOST_PASSES and time.perf_counter() < end)
            gate.wait()
            if not going[0]:
                return
            began = time.perf_counter()
            work()
            spans[thread].append((began, time.perf_counter()))

    def run(thread: int) -> None:
        through = False
        try:
            passes(thread)
            through = True
        finally:
            if not through:
                gate.abort()  # nobody is to wait for this thread

    with ThreadPoolExecutor(threads) as pool:
        errors = [one.exception() for one in [pool.submit(run, thread) for thread in range(threads)]]
    for error in errors:
        if error is not None and not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [max(end for _, end in one) - min(begin for begin, _ in one) for one in zip(*spans, strict=True)]


def share(count: int, thread: int, threads: int) -> slice:
    """This thread's part of `count` things."""
    return slice(count * thread // threads, count * (thread + 1) // threads)


def check_threads(threads: int | None, cores: int) -> int:
    """As many as asked for; None: one a core, as an engine takes. Raises InvalidParameter."""
    if threads is None:
        return cores
    if not 1 <= threads <= MOST_THREADS:
        raise InvalidParameter("threads", threads, f"a whole number from 1 to {MOST_THREADS}")
    return threads


# ---------------------------------------------------------------- what the system says


def find_caches(cpus: Iterable[int], root: Path = ROOT) -> dict[str, tuple[int, int]]:
    """L1, L2, L3 … -> (bytes of one such cache, how many `cpus` have); nothing where the system does not say."""
    sizes: dict[str, int] = {}
    shared: dict[str, set[str]] = {}
    for cpu in sorted(cpus):
        for folder in (root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index[0-9]*"):
            size, level = read_text(folder / "size") or "", as_int(read_text(folder / "level"))
            number = as_int(size.rstrip("KMG"))
            if number is None or level is None or read_text(folder / "type") not in CACHE_KINDS:
                continue
            sizes[f"L{level}"] = number * {"K": 2**10, "M": 2**20, "G": 2**30}.get(size[-1:], 1)
            shared.setdefault(f"L{level}", set()).add(read_text(folder / "shared_cpu_list") or str(cpu))
    return {level: (size, len(shared[level])) for level, size in sorted(sizes.items())}


def usable_cpus() -> frozenset[int]:
    """Those this process may run on."""
    if sys.platform == "linux":
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def last_cache(caches: Mapping[str, tuple[int, int]]) -> int:
    """Bytes of all caches of the last level together."""
    return math.prod(caches[max(caches)]) if caches else DEFAULT_CACHE


class Watch:
    """What everything but this process takes of the processors that it may use, from now on. Linux; elsewhere
    unknown."""

    def __init__(self, cpus: Collection[int], root: Path = ROOT) -> None:
        self._names = frozenset(f"cpu{cpu}" for cpu in cpus)
        self._root = root
        self._began = self._now()

    def _now(self) -> tuple[float, float, float] | None:
        """(wall, processor time of all, of this process), seconds."""
        own = os.times()
        used, found = 0, 0
        with suppress(ValueError, IndexError):
            for line in (read_text(self._root / "proc/stat") or "").splitlines():
                name, *ticks = line.split() or [""]
                if name in self._names:
                    # user, nice, system, idle, iowait, irq, softirq, steal: what is stolen is as lost as what is used
                    used += sum(int(ticks[index]) for index in (0, 1, 2, 5, 6, 7))
                    found += 1
            if found == len(self._names):
                return time.monotonic(), used / os.sysconf("SC_CLK_TCK"), own.user + own.system
        return None

    def busy_cores(self) -> float | None:
        """Cores' worth of time that others took, on the average; None where the system does not say."""
        now = self._now()
        if self._began is None or now is None:
            return None
        wall, busy, own = (after - before for after, before in zip(now, self._began, strict=True))
        return max(0.0, (busy - own) / wall) if wall > 0 else None
