"""Runs works on engines: drivers in processes of their own, rounds interleaved, one engine at work at a time."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.machine_speed import Bandwidth, Reader, busy_seconds, canary, wait_for_quiet
from benchmarks.peer_work import Work, measure

from headrace.compare.peer_setup import PeerCache
from headrace.compare.peers import ENGINES, PeerProcess, PeerSpec, available_bytes, driver_command, driver_environment
from headrace.core.errors import HeadraceError

LOAD_S, RUN_S = 900.0, 600.0
QUIET_CORES = 0.15
"""Other load, in cores, up to which a run counts as undisturbed."""
FREE_SHARE = 0.25
"""With less of the memory than this available, engines that wait for their turn are ended and started again."""


@dataclass(slots=True)
class Row:
    """What one engine gave for one work."""

    spec: PeerSpec
    loaded: Mapping[str, Any] = field(default_factory=dict)
    """Its answer to `load`: versions, settings, weights_bytes …"""
    rounds: list[dict[str, float]] = field(default_factory=list)
    """Figures of each run, in order."""
    first_tokens: list[int] = field(default_factory=list)
    """The first request's answer in the first round, for a look at whether the engines compute the same."""
    error: str | None = None


@dataclass(slots=True)
class WorkResult:
    work: Work
    isa: str
    rows: list[Row]
    canary_s: list[float] = field(default_factory=list)
    """Before every run."""
    bandwidths: list[Bandwidth] = field(default_factory=list)
    """In every round, for each size of weights."""

    def gb_s(self, size: int) -> float | None:
        """Median bandwidth at this size of weights."""
        rates = sorted(one.gb_s for one in self.bandwidths if one.bytes == size)
        return rates[len(rates) // 2] if rates else None


class Fleet(Protocol):
    """Where engines come from."""

    def start(self, spec: PeerSpec) -> PeerProcess:
        """A new process of this row's driver."""

    def path(self, spec: PeerSpec) -> Path:
        """The model's file for it."""


class CachedFleet:
    """Drivers with what `headrace compare --setup` made; headrace itself with this interpreter."""

    def __init__(self, cache: PeerCache, model: str, threads: int) -> None:
        self._cache = cache
        self._model = model
        self._environment = driver_environment(os.environ, cache.isa, threads)

    def start(self, spec: PeerSpec) -> PeerProcess:
        python = Path(sys.executable) if spec.ours else self._cache.python(ENGINES[spec.engine].driver)
        return PeerProcess(spec.name, driver_command(spec, python), self._environment)

    def path(self, spec: PeerSpec) -> Path:
        return self._cache.peer_file(self._model, spec)


class Bench:
    """Runs works with the same settings. `say` hears what is being done; `patience_s`: how long the runs of one work
    may wait for a quiet machine, and be made again where it was not."""

    def __init__(
        self,
        fleet: Fleet,
        isa: str,
        threads: int,
        repeats: int,
        say: Callable[[str], None],
        patience_s: float = 0.0,
    ) -> None:
        self._fleet = fleet
        self._patience_s = patience_s
        self._patient_until_s = 0.0
        self._isa = isa
        self._threads = threads
        self._repeats = repeats
        self._say = say

    def run(self, work: Work, specs: Sequence[PeerSpec], reader: Reader) -> WorkResult:
        """A warm-up of each engine, then rounds of all, each round beginning with another one."""
        result = WorkResult(work, self._isa, [Row(spec) for spec in specs])
        processes: dict[str, PeerProcess] = {}
        try:
            if not work.fresh:
                for row in result.rows:
                    self._say(f"{work.name}: loading {row.spec.name}")
                    with self._guarded(row):
                        self._ready(row, work, processes)
            self._patient_until_s = time.monotonic() + self._patience_s
            for index in range(self._repeats):
                rows = result.rows[index % len(specs) :] + result.rows[: index % len(specs)]
                for row in (row for row in rows if row.error is None):
                    self._say(f"{work.name}: round {index + 1} of {self._repeats}: {row.spec.name}")
                    result.canary_s.append(canary())
                    with self._guarded(row):
                        self._undisturbed(row, work, processes)
                if work.bound_by_reading:
                    sizes = {int(row.loaded["weights_bytes"]) for row in rows if row.error is None}
                    result.bandwidths += [reader.measure(size) for size in sorted(sizes)]
        finally:
            for process in processes.values():
                process.close()
        return result

    @contextmanager
    def _guarded(self, row: Row) -> Iterator[None]:
        """An engine that fails drops out with its error; the others go on."""
        try:
            yield
        except (HeadraceError, ValueError, KeyError) as error:
            row.error = str(error) if isinstance(error, HeadraceError) else f"{type(error).__name__}: {error}"
            self._say(row.error)

    def _ready(self, row: Row, work: Work, processes: dict[str, PeerProcess]) -> PeerProcess:
        """The engine's process: loaded, and warmed up if it is new."""
        name = row.spec.name
        if name not in processes:
            self._make_room(processes)
            processes[name] = process = self._fleet.start(row.spec)
            row.loaded = process.ask(self._load_task(row.spec, work), LOAD_S)
            process.ask(work.warm_up_task(), RUN_S)
        else:
            processes[name] = processes.pop(name)  # the last one used stands last
        return processes[name]

    def _make_room(self, processes: dict[str, PeerProcess]) -> None:
        """Ends those that were used longest ago."""
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        while processes and (available_bytes() or total) < FREE_SHARE * total:
            oldest = next(iter(processes))
            processes.pop(oldest).close()

    def _undisturbed(self, row: Row, work: Work, processes: dict[str, PeerProcess]) -> None:
        """One run that counts. One that other load disturbed is made again while the work's patience lasts."""
        while True:
            wait_for_quiet(QUIET_CORES, self._patient_until_s)
            self._once(row, work, processes)
            if row.rounds[-1].get("other_cores", 0.0) <= QUIET_CORES or time.monotonic() >= self._patient_until_s:
                return
            self._say(f"{work.name}: {row.spec.name} was disturbed, once more")
            row.rounds.pop()

    def _once(self, row: Row, work: Work, processes: dict[str, PeerProcess]) -> None:
        start_s: float | None = None
        greedy: dict[str, Any] | None = None
        other: dict[str, float] = {}
        if work.fresh:
            began = time.monotonic()
            process = self._fleet.start(row.spec)
            try:
                row.loaded = process.ask(self._load_task(row.spec, work), LOAD_S)
                answer = process.ask(work.task(), RUN_S)
                start_s = time.monotonic() - began
            finally:
                process.close()
        else:
            process = self._ready(row, work, processes)
            greedy = process.ask(work.greedy_task(), RUN_S) if work.sampled else None
            before_s, began = busy_seconds(), time.monotonic()
            answer = process.ask(work.task(), RUN_S)
            after_s, lasted_s = busy_seconds(), time.monotonic() - began
            if before_s is not None and after_s is not None:
                other = {"other_cores": max(0.0, after_s - before_s - answer["cpu_s"]) / lasted_s}
        figures = measure(work, answer, start_s) | other
        if greedy is not None:
            figures["share_of_greedy"] = greedy["makespan_s"] / answer["makespan_s"]
        row.rounds.append(figures)
        row.first_tokens = row.first_tokens or answer["requests"][0]["token_ids"]

    def _load_task(self, spec: PeerSpec, work: Work) -> dict[str, Any]:
        return {
            "op": "load",
            "model": str(self._fleet.path(spec)),
            "precision": spec.precision,
            "threads": self._threads,
            "max_len": work.max_len,
            "padded_len": work.max_len,  # prompts are of one length, and so are answers
            "max_requests": len(work.prompts),
            "settings": dict(spec.settings),
        }
