"""A profile of a few steps: the trace file, and how long the device works and idles in a step of replayed graphs."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from torch.profiler import ProfilerActivity, profile

DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
"""Categories of a trace's events that keep the device busy."""
LEAST_KERNELS = 8
"""That a launch of a graph leads to; a launch with fewer is no step."""

Event = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Medians over steps, seconds."""

    span_s: float
    """From a graph's first kernel to its last one's end."""
    idle_s: float
    """Between one replay and the next, in which nothing at all runs on the device."""
    period_s: float
    count: int


def traced(run: Callable[[], object], path: Path, dry: bool) -> list[Event]:
    """Runs under torch's profiler; leaves a Chrome trace at `path` (gzip) and gives its events."""
    activities = [ProfilerActivity.CPU] if dry else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        content = plain.read_bytes()
    path.write_bytes(gzip.compress(content, 6))
    return list(json.loads(content)["traceEvents"])


def step_times(events: Sequence[Event]) -> StepTimes | None:
    """None where the trace has no two replayed graphs. Everything that a launch of a graph led to carries its
    correlation id."""
    launches = {
        event["args"]["correlation"]
        for event in events
        if "GraphLaunch" in event.get("name", "") and "correlation" in event.get("args", {})
    }
    work = sorted((_interval(event), _correlation(event)) for event in events if event.get("cat") in DEVICE)
    replays: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for interval, correlation in work:
        if correlation in launches:
            replays[correlation].append(interval)
    spans = sorted(
        (min(begin for begin, _ in one), max(end for _, end in one))
        for one in replays.values()
        if len(one) >= LEAST_KERNELS
    )
    if len(spans) < 3:
        return None
    gaps = [(before[1], after[0]) for before, after in pairwise(spans)]
    idle = [max(0.0, end - begin) - _busy([one for one, _ in work], begin, end) for begin, end in gaps]
    periods = [after[0] - before[0] for before, after in pairwise(spans)]
    lengths = [end - begin for begin, end in spans]
    return StepTimes(1e-6 * median(lengths), 1e-6 * median(idle), 1e-6 * median(periods), len(spans))


def _interval(event: Event) -> tuple[float, float]:
    """Microseconds."""
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def _correlation(event: Event) -> int:
    return int(event.get("args", {}).get("correlation", -1))


def _busy(work: Sequence[tuple[float, float]], begin: float, end: float) -> float:
    """Of [begin, end): how long something ran. `work`: sorted."""
    busy, reached = 0.0, begin
    for first, last in work:
        first, last = max(first, reached), min(last, end)
        if last > first:
            busy += last - first
            reached = last
    return busy
