"""`plan probe`: what this machine does in under a minute. Every figure is measured in rounds that go through all of
them, so that its rounds lie seconds apart and a passing disturbance cannot touch all of one figure's."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from headrace import __version__
from headrace.core.errors import BackendUnavailable, OutOfMemory
from headrace.engine.hardware import memory_limit, probe_hardware, processor_name
from headrace.plan.probe_card import Card
from headrace.plan.probe_disk import Disk
from headrace.plan.probe_link import HostLink
from headrace.plan.probe_tools import (
    FIRST_CACHE,
    Bench,
    Probe,
    Watch,
    What,
    check_threads,
    find_caches,
    last_cache,
    usable_cpus,
)
from headrace.plan.profile import Figure, Machine, Profile

ROUNDS = 5
LIMIT_S = 50.0
"""What the rounds are cut to, and after which none begins: the whole is to stay below a minute."""
PASSES_S = 0.06
FEWEST_S = 0.01
MEMORY_SHARE = 24
"""A probe's largest array takes no more than this part of the free memory: it has nine such arrays, and eleven sets of
weights, keys and values that may be as large."""
OF_MEMORY = ("stream", "gather", "attend", "gemm", "application")
"""Figures that need more than what caches hold."""
LIBRARIES = ("numpy", "scipy")
OnProgress = Callable[[str], None]


def run_probe(
    threads: int | None,
    folder: Path,
    *,
    on_progress: OnProgress = lambda text: None,
    pass_seconds: float = PASSES_S,
    cache_bytes: int | None = None,
) -> Profile:
    """`threads`: None: as many as the engine takes. `folder`: whose disk is read. `cache_bytes`: of the last cache;
    None: as the system says. Raises InvalidParameter, OutOfMemory."""
    hardware = probe_hardware()
    threads = check_threads(threads, hardware.cores)
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
        figures, instruction_set = _measure(bench, folder, no_gpu, on_progress, began)
    except MemoryError as error:
        raise OutOfMemory(f"probe: {hardware.free_memory_bytes >> 20} MiB of free memory are too little") from error
    busy = watch.busy_cores()
    machine = Machine(
        cpu=processor_name(),
        cores=hardware.cores,
        threads=threads,
        instruction_set=instruction_set,
        memory_bytes=_memory_bytes(),
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
    bench: Bench, folder: Path, no_gpu: str, on_progress: OnProgress, began: float
) -> tuple[list[Figure], str | None]:
    """(figures, the native kernels' instruction set). `no_gpu`: why there is none."""
    made: list[Probe] = []
    results = _Results()
    try:
        on_progress("preparing")
        instruction_set = _prepare(bench, folder, no_gpu, made)
        for number in range(1, ROUNDS + 1):
            round_began = time.monotonic()
            for one in made:
                on_progress(f"round {number} of {ROUNDS}: {type(one).__name__}")
                for what, value in one.round():
                    results.add(what, value)
            now = time.monotonic()
            left, needed = LIMIT_S - (now - began), (ROUNDS - number) * (now - round_began)
            if left <= 0:
                break
            if needed > left:
                bench.seconds = max(FEWEST_S, bench.seconds * left / needed)
    finally:
        for one in made:
            if isinstance(one, Disk | HostLink):
                one.close()
    return results.figures(bench), instruction_set


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

    def figures(self, bench: Bench) -> list[Figure]:
        found = []
        for key, one in self.whats.items():
            note = "; ".join(filter(None, (one.note, bench.note if one.name in OF_MEMORY else "")))
            found.append(Figure(one.name, one.of, one.unit, tuple(self.rounds[key]), note))
        return [*found, *(Figure(one.name, one.of, one.unit, (), one.note) for one in bench.skipped)]


def _memory_bytes() -> int:
    limit, _ = memory_limit()
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return installed if limit is None else min(limit, installed)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
