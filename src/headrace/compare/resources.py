"""What a run takes of the machine: processor time, peak memory, energy.

A method that knows better has filled these in itself (an outside engine in processes of its own); only what it left
open is measured here.
"""

from __future__ import annotations

import gc
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread

from headrace.compare.figures import TOO_SHORT, run_joules
from headrace.compare.methods import Method, Outcome
from headrace.compare.methods.registry import URL
from headrace.compare.workloads import Workload
from headrace.core.errors import EngineError, InvalidParameter
from headrace.engine.energy import Meter, NvmlMeter
from headrace.engine.hardware import peak_rss_bytes

SHORTEST_S: Mapping[str, float] = {"nvml": 2.0, "rapl": 0.1, "estimated": 0.5}
"""Source -> the shortest run it can measure. GPUs average their power over up to a second; RAPL counts about once a
millisecond; the load is told in hundredths of a second for each CPU."""
POWER_POLL_S = 0.05
"""How often a meter is read that knows power alone: 20 Hz; energy is the trapezoids' sum."""
COUNTER_POLL_S = 60.0
"""How often one that counts energy is: before its counter can have gone round."""
IDLE_S = 10.0
"""How long an idle floor should be measured, at least."""


@contextmanager
def settled_heap() -> Iterator[None]:
    """While it lasts, the search for garbage before each run looks only at what has come since: in a large program it
    would take longer than a short run. A program that has frozen its heap itself is left as it is."""
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def run_measured(method: Method, workload: Workload, meters: Sequence[Meter] = ()) -> Outcome:
    """One run of a started method, with what it did not measure itself. Raises EngineError if the run fails.

    Processor time and memory are this process's, so they are not filled in for an outside engine (`config` None), nor
    is energy for a server at an address: it may be another machine's. Peak memory is None where the system does not
    let it be reset before a run.
    """
    gc.collect()
    fresh_peak = reset_peak_rss()
    cpu_s = cpu_seconds()
    with counting(() if method.name.startswith(URL) else meters) as joules:
        outcome = method.run(workload)
    used_s = cpu_seconds() - cpu_s
    if method.config is not None:
        outcome = replace(outcome, cpu_s=used_s if outcome.cpu_s is None else outcome.cpu_s)
        if outcome.peak_rss_bytes is None and fresh_peak:
            outcome = replace(outcome, peak_rss_bytes=peak_rss_bytes())
    # A meter that stood still has measured nothing; a run that cost nothing does not exist.
    told = {_labelled(source, outcome.seconds): value for source, value in joules.items() if value > 0}
    return replace(outcome, joules=outcome.joules or told)


def _labelled(source: str, seconds: float) -> str:
    return source + TOO_SHORT if seconds < SHORTEST_S.get(source, 0.0) else source


@contextmanager
def counting(meters: Sequence[Meter]) -> Iterator[dict[str, float]]:
    """Source -> joules of the machine while the block runs; complete once it has ended."""
    found = {meter.source: 0.0 for meter in meters}
    ended = Event()

    def read() -> None:
        now = time.monotonic()
        for meter in meters:
            found[meter.source] += meter.joules(now)

    def poll(period_s: float) -> None:
        while not ended.wait(period_s):
            read()

    for meter in meters:
        meter.joules(time.monotonic())
    by_power = any(isinstance(meter, NvmlMeter) and meter.by_power for meter in meters)
    thread = Thread(target=poll, args=(POWER_POLL_S if by_power else COUNTER_POLL_S,), name="meters", daemon=True)
    if meters:
        thread.start()
    try:
        yield found
    finally:
        ended.set()
        if meters:
            thread.join()
            read()


def cpu_seconds() -> float:
    """Processor time of this process, user's and system's, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def reset_peak_rss(root: Path = Path("/")) -> bool:
    """From here on the peak is what comes next (proc(5), clear_refs). False where the system does not allow it."""
    try:
        (root / "proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class IdleFloor:
    """Power of the machine with the model loaded and no request."""

    watts: float
    seconds: float
    """How long it was measured."""
    source: str

    def __str__(self) -> str:
        return f"idle floor {self.watts:.1f} W ({self.source}, measured for {self.seconds:.0f} s)"

    def above(self, outcome: Outcome) -> float | None:
        """Joules of a run above the floor, ≥ 0; None where its joules are not known, or of another source."""
        joules = run_joules(outcome)
        if joules is None or "+".join(outcome.joules) != self.source:
            return None
        return max(0.0, joules - self.watts * outcome.seconds)


def idle_floor(
    meters: Sequence[Meter], seconds: float = IDLE_S, sleep: Callable[[float], None] = time.sleep
) -> IdleFloor:
    """Measures for that long. Whatever else the machine does meanwhile is in it. Raises InvalidParameter for a time
    that is too short for the meters, and EngineError where there is none, or none that moves."""
    shortest = max((SHORTEST_S.get(meter.source, 0.0) for meter in meters), default=0.0)
    if not (math.isfinite(seconds) and seconds > 0 and seconds >= shortest):
        raise InvalidParameter("idle", seconds, f"seconds > 0, at least {shortest:g} for these meters")
    began = time.monotonic()
    with counting(meters) as joules:
        sleep(seconds)
    passed_s = time.monotonic() - began
    if not math.fsum(joules.values()):
        raise EngineError("idle: no meter of this machine tells its energy")
    return IdleFloor(math.fsum(joules.values()) / passed_s, passed_s, "+".join(joules))
