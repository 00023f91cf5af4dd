"""`plan probe`: what this machine does in under a minute. Every figure is measured in rounds that go through all of
them, so that its rounds lie seconds apart and a passing disturbance cannot touch all of one figure's."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from headrace import __version__
from headrace.core.errors import BackendUnavailable, InvalidParameter, OutOfMemory
from headrace.engine.hardware import ROOT, probe_hardware, processor_name, read_text
from headrace.plan.probe_card import Card
from headrace.plan.probe_disk import Disk
from headrace.plan.probe_link import HostLink
from headrace.plan.probe_tools import FIRST_CACHE, Bench, Probe, What, find_caches, last_cache, usable_cpus
from headrace.plan.profile import Figure, Machine, Profile

ROUNDS = 3
MOST_ROUNDS = 9
LIMIT_S = 50.0
"""When rounds begin to be cut short: the whole is to stay below a minute."""
PASSES_S = 0.1
FEWEST_S = 0.01
MEMORY_SHARE = 12
"""A probe's largest array takes no more than this part of the free memory; it has about six such."""
MOST_THREADS = 1024
LIBRARIES = ("numpy", "scipy")
OnProgress = Callable[[str], None]


def run_probe(
    threads: int | None,
    folder: Path,
    *,
    rounds: int = ROUNDS,
    on_progress: OnProgress = lambda text: None,
    pass_seconds: float = PASSES_S,
    cache_bytes: int | None = None,
) -> Profile:
    """`threads`: None: as many as the engine takes. `folder`: whose disk is read. `cache_bytes`: of the last cache;
    None: as the system says. Raises InvalidParameter, OutOfMemory."""
    hardware = probe_hardware()
    threads = hardware.cores if threads is None else threads
    for name, value, most in (("threads", threads, MOST_THREADS), ("rounds", rounds, MOST_ROUNDS)):
        if not 1 <= value <= most:
            raise InvalidParameter(name, value, f"a whole number from 1 to {most}")
    began = time.monotonic()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    cpus = usable_cpus()
    caches = find_caches(cpus)
    bench = Bench(
        threads,
        cache_bytes=cache_bytes or last_cache(caches),
        memory_bytes=hardware.free_memory_bytes // MEMORY_SHARE,
        first_cache=caches.get("L1", (FIRST_CACHE, 1))[0],
        seconds=pass_seconds,
    )
    watch = Watch(cpus)
    no_gpu = "" if hardware.gpu is not None else hardware.no_gpu or "no GPU"
    try:
        figures, instruction_set = _measure(bench, folder, no_gpu, rounds, on_progress, began)
    except MemoryError as error:
        raise OutOfMemory(f"probe: {hardware.free_memory_bytes >> 20} MiB of free memory are too little") from error
    busy = watch.busy_cores()
    machine = Machine(
        cpu=processor_name(),
        cores=hardware.cores,
        threads=threads,
        instruction_set=instruction_set,
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        caches={level: size for level, (size, _) in caches.items()},
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        libraries={"headrace": __version__, **{name: one for name in LIBRARIES if (one := _version(name))}},
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        load_average=load,
        # The load average knows no processes: a probe just before this one is in it.
        busy_cores=load if busy is None else busy,
    )
    return Profile(machine, tuple(figures), time.monotonic() - began)


def _measure(
    bench: Bench, folder: Path, no_gpu: str, rounds: int, on_progress: OnProgress, began: float
) -> tuple[list[Figure], str | None]:
    """(figures, the native kernels' instruction set). `no_gpu`: why there is none."""
    made: list[Probe] = []
    results = _Results()
    try:
        on_progress("preparing")
        instruction_set = _prepare(bench, folder, no_gpu, made)
        for number in range(rounds):
            round_began = time.monotonic()
            for one in made:
                on_progress(f"round {number + 1} of {rounds}: {type(one).__name__}")
                for what, value in one.round():
                    results.add(what, value)
            now = time.monotonic()
            left = LIMIT_S - (now - began)
            if (rounds - number - 1) * (now - round_began) > left:
                bench.seconds = max(FEWEST_S, bench.seconds / 2)
    finally:
        for one in made:
            if isinstance(one, Disk | HostLink):
                one.close()
    return results.figures(bench.skipped), instruction_set


def _prepare(bench: Bench, folder: Path, no_gpu: str, made: list[Probe]) -> str | None:
    from headrace.plan.probe_applications import Applications
    from headrace.plan.probe_memory import Gather, Read, Stream

    made.append(Disk(bench, folder))
    made.append(HostLink(bench))
    made.append(Card(bench, no_gpu))
    made += [Stream(bench), Read(bench), Gather(bench), Applications(bench)]
    try:
        from headrace.plan.probe_native import Attention, Operations, Products, Steps

        products = Products(bench)
        made += [products, Attention(bench), Operations(bench), Steps(bench)]
        return products.instruction_set
    except BackendUnavailable as error:
        note = " ".join(str(error).split())
        bench.skipped += [What(name, {}, "", note) for name in ("gemm", "attend", "attention", "operation", "step")]
        return None


@dataclass(slots=True)
class _Results:
    whats: dict[tuple[object, ...], What] = field(default_factory=dict)
    rounds: dict[tuple[object, ...], list[float]] = field(default_factory=dict)

    def add(self, what: What, value: float) -> None:
        self.whats[what.key()] = what
        self.rounds.setdefault(what.key(), []).append(value)

    def figures(self, skipped: Sequence[What]) -> list[Figure]:
        whats = [(one, tuple(self.rounds[key])) for key, one in self.whats.items()] + [(one, ()) for one in skipped]
        return [Figure(one.name, one.of, one.unit, rounds, one.note) for one, rounds in whats]


# ---------------------------------------------------------------- the machine


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


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
