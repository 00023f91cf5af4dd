"""CUDA graphs of decode steps: one a bucket of rows, their memory shared.

A step of n rows runs in the smallest bucket that holds it; rows past n are padding. Graphs are captured at load, the
largest first, so that the smaller ones find its memory. Only one runs at a time, and what it leaves (the logits) is
read before the next one runs: all of them may share one pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

SMALL = (1, 2, 4, 8)
REPLAYS = 7
WARM_UPS = 2
"""Kernels are compiled, and libraries take their workspaces, before anything is captured."""


def buckets(max_rows: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then steps of a half: 12, 16, 24, 32, 48 … up to `max_rows`, which is one of them."""
    found = [size for size in SMALL if size < max_rows]
    size = 16
    while size * 3 // 4 < max_rows:
        found += [one for one in (size * 3 // 4, size) if one < max_rows]
        size *= 2
    return (*found, max_rows)


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    replay: Callable[[], None]
    logits: Tensor
    """What each replay leaves in place."""


class Graphs:
    """`run(bucket)` launches a step of a bucket's layout and gives its logits."""

    def __init__(
        self,
        run: Callable[[int], Tensor],
        sizes: Sequence[int],
        device: torch.device,
        prepare: Callable[[int], None],
    ) -> None:
        """Captures them all, on CUDA; elsewhere steps are launched anew each time. `prepare`: puts a step of nothing
        where a bucket's kernels read."""
        self.sizes = tuple(sizes)
        self._run = run
        self._captured: dict[int, Captured] = {}
        if device.type == "cuda":
            self._capture(device, prepare)

    def size_for(self, rows: int) -> int | None:
        """The smallest bucket that holds so many rows."""
        return next((size for size in self.sizes if size >= rows), None)

    def launch(self, size: int) -> Tensor:
        """Runs the step whose arrays are in place, and gives its logits: of every row, padding included."""
        captured = self._captured.get(size)
        if captured is None:
            return self._run(size)
        captured.replay()
        return captured.logits

    def _capture(self, device: torch.device, prepare: Callable[[int], None]) -> None:
        with side_stream(device):
            for size in self.sizes:
                prepare(size)
                for _ in range(WARM_UPS):
                    self._run(size)
                torch.cuda.current_stream(device).synchronize()  # the next one is sent from the same memory
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self.sizes):
            graph, logits = captured(partial(self._run, size), pool)
            self._captured[size] = Captured(graph.replay, logits)


@contextmanager
def side_stream(device: torch.device | None = None) -> Iterator[None]:
    """A capture, and what goes before it, is done on a stream of its own, as CUDA asks for."""
    side, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield
    main.wait_stream(side)


def captured(run: Callable[[], Result], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of what `run` launches, and what it gave. Every kernel has run before. `torch.cuda.graph` would do the
    same, but it empties torch's caches each time, and a load makes more than a hundred graphs."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with side_stream():
        graph.capture_begin(pool)
        try:
            result = run()
        finally:
            graph.capture_end()
    return graph, result


def replay_seconds(run: Callable[[], object]) -> float:
    """What one call takes on the device: the median of several replays, so that no launch is counted."""
    with side_stream():
        for _ in range(WARM_UPS):
            run()
    graph, _ = captured(run)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    graph.replay()
    for event in events:
        event.record()
        graph.replay()
    torch.cuda.synchronize()
    return float(median(before.elapsed_time(after) for before, after in pairwise(events))) / 1e3
