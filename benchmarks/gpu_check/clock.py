"""Times of device work, and the two ceilings that everything is held against: read bandwidth and matmul rate.

A call's time is that of one node of a CUDA graph that makes several calls in turn, each on buffers of its own, so that
the L2 cache holds nothing of the next one's: launch overhead, Python's share and warm caches stay out of it. On a CPU
(dry run) the same calls are timed by the wall clock, once, and the numbers mean nothing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median

import torch
import triton
import triton.language as tl

Run = Callable[[], object]

CALLS = 24
"""In a graph, about: short kernels are timed together."""
MOST_SETS = 32
"""Buffers that calls rotate through, at most."""
COLD = 4
"""Times the L2 cache that all sets of buffers together are to pass."""
LONG_S = 2e-3
"""A call this long is alone in its graph."""


class Clock:
    """Of one device; `dry`: a CPU in its place. `once`: everything is run once, to be compiled, and not timed."""

    def __init__(self, dry: bool, once: bool = False) -> None:
        self.dry = dry
        self.once = dry or once
        self.device = torch.device("cpu" if dry else "cuda")
        self.l2_bytes = 1 << 16 if dry else int(torch.cuda.get_device_properties(0).L2_cache_size)

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if not self.dry:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Gives memory that nothing holds any more back to the device."""
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()

    def sets(self, nbytes: int) -> int:
        """How many buffers of this size a measurement rotates through, so that each is cold when it is met."""
        return 1 if self.once else max(2, min(MOST_SETS, -(-COLD * self.l2_bytes // max(1, nbytes))))

    def seconds(self, runs: Sequence[Run], repeats: int = 15) -> list[float]:
        """Seconds of a call, once for each of `repeats` rounds over `runs`, which do the same on different buffers.

        Raises what a call raises, and RuntimeError where one cannot be captured in a CUDA graph.
        """
        if self.once:
            return [self._wall(runs[0])]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for run in (*runs, *runs):  # compiles, makes handles, takes memory
                run()
            one_s = median(self._events(runs))
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        times = 1 if one_s > LONG_S else max(1, CALLS // len(runs))
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(times):
                for run in runs:
                    run()
        graph.replay()
        found = self._events([graph.replay] * repeats)
        return [one / (times * len(runs)) for one in found]

    def _events(self, runs: Sequence[Run]) -> list[float]:
        """Seconds of each call, by events around it, one wait for all."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]
        marks[0].record()
        for run, mark in zip(runs, marks[1:], strict=True):
            run()
            mark.record()
        torch.cuda.synchronize()
        return [1e-3 * before.elapsed_time(after) for before, after in pairwise(marks)]

    def _wall(self, run: Run) -> float:
        began = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - began


# ---------------------------------------------------------------- ceilings


@triton.jit
def _read_kernel(
    x: tl.tensor,
    sums: tl.tensor,
    count: tl.tensor,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ROUNDS: tl.constexpr,
) -> None:
    """Each program adds up every PROGRAMS-th block of x: all bytes are read once, next to nothing is written."""
    program = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(ROUNDS):
        places = (step * PROGRAMS + program) * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(x + places, mask=places < count, other=0.0)
    tl.store(sums + program, tl.sum(total))


def read_bandwidth(clock: Clock, repeats: int = 9) -> list[float]:
    """Bytes a second that the device reads: the best of torch's own sum and of ours at several sizes of grid, over
    2 GiB of float32."""
    count = 1 << (12 if clock.dry else 29)
    x = torch.rand(count, device=clock.device)
    total = float(x.sum(dtype=torch.float64))
    best: list[float] = []
    for block, each in ((1024, 8), (2048, 8), (4096, 4)):
        programs = 2 if clock.dry else each * torch.cuda.get_device_properties(0).multi_processor_count
        sums = torch.empty(programs, device=clock.device)

        rounds = -(-count // (programs * block))

        def ours(sums: torch.Tensor = sums, grid: int = programs, block: int = block, rounds: int = rounds) -> None:
            _read_kernel[(grid,)](x, sums, count, BLOCK=block, PROGRAMS=grid, ROUNDS=rounds, num_warps=8)

        best = _faster(best, clock.seconds([ours], repeats))
        if not abs(float(sums.sum()) - total) < 1e-3 * total:
            raise RuntimeError(f"the reading kernel adds up to {float(sums.sum())}, torch to {total}")
    best = _faster(best, clock.seconds([lambda: torch.sum(x)], repeats))
    return [4 * count / one for one in best]


def copy_bandwidth(clock: Clock, repeats: int = 9) -> list[float]:
    """Bytes read and written a second of a copy of 2 GiB on the device."""
    count = 1 << (12 if clock.dry else 29)
    source, target = (torch.ones(count, device=clock.device) for _ in range(2))
    return [8 * count / one for one in clock.seconds([lambda: target.copy_(source)], repeats)]


def matmul_rate(clock: Clock, dtype: torch.dtype, repeats: int = 9) -> list[float]:
    """Floating-point operations a second of the library's own n × n × n product on random numbers; n = 8192."""
    n = 64 if clock.dry else 8192
    a, b = (torch.randn(n, n, device=clock.device).to(dtype) for _ in range(2))
    return [2 * n**3 / one for one in clock.seconds([lambda: a @ b.T], repeats)]


def fp8_matmul_rate(clock: Clock, repeats: int = 9) -> list[float]:
    """The same of torch._scaled_mm, one scale a row."""
    n = 64 if clock.dry else 8192
    a, b = (torch.randn(n, n, device=clock.device).to(torch.float8_e4m3fn) for _ in range(2))
    scale_a, scale_b = torch.ones(n, 1, device=clock.device), torch.ones(1, n, device=clock.device)

    def run() -> torch.Tensor:
        return torch._scaled_mm(a, b.T, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16)

    return [2 * n**3 / one for one in clock.seconds([run], repeats)]


def _faster(before: list[float], now: list[float]) -> list[float]:
    return now if not before or median(now) < median(before) else before
