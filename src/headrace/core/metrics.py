"""Counters and histograms as plain data: the engine keeps them, the server shows them. One thread writes; no locks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise, repeat, zip_longest
from operator import mul

STEP_SECONDS: tuple[float, ...] = tuple(accumulate(repeat(1.5, 34), mul, initial=0.0001 * 1.5))
"""Bounds for durations of steps: 0.0001 · 1.5ᵏ s, k = 1 … 35, multiplied one after the other (those of TGI)."""

STEP_TOKENS: tuple[float, ...] = (1, *(2**k for k in range(3, 15)))
"""Bounds for tokens computed in a step: 1, 8, 16 … 16384 (those of vLLM's iteration_tokens_total)."""

STEP_ADMITTED: tuple[float, ...] = tuple(2**k for k in range(11))
"""Bounds for requests that join the batch in one step: 1, 2, 4 … 1024."""


@dataclass(frozen=True, slots=True)
class HistogramState:
    """What a histogram holds."""

    counts: tuple[int, ...] = ()
    """How many values fell in (bound before, bound], one a bound, then those above the last; empty: none yet."""
    sum: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)

    def __add__(self, other: HistogramState) -> HistogramState:
        """Both together; the bounds must be the same."""
        counts = tuple(a + b for a, b in zip_longest(self.counts, other.counts, fillvalue=0))
        return HistogramState(counts, self.sum + other.sum)

    def __sub__(self, part: HistogramState) -> HistogramState:
        """Without a part of the values; never below nothing."""
        counts = tuple(max(0, a - b) for a, b in zip_longest(self.counts, part.counts, fillvalue=0))
        return HistogramState(counts, max(0.0, self.sum - part.sum))


class Histogram:
    """Counts values by size. `bounds` rise; a value equal to a bound belongs to it (Prometheus's `le`)."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        if not bounds or any(a >= b for a, b in pairwise(bounds)):
            raise ValueError(f"bounds must rise: {bounds}")
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def state(self) -> HistogramState:
        return HistogramState(tuple(self.counts), self.sum)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What only the engine knows. Totals count from its start."""

    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    """KV blocks that running requests hold; blocks kept only for their prefix are free."""
    blocks_total: int = 0
    block_size: int = 0
    """Tokens a block."""
    iterations: int = 0
    """Steps that computed at least one token."""
    computed_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    queried_tokens: int = 0
    """Prompt tokens looked up there."""
    preemptions: int = 0
    faults: int = 0
    """Steps that raised."""
    leaks: int = 0
    """Times that blocks were missing when nobody held any."""
    step_seconds: HistogramState = field(default_factory=HistogramState)
    """Bounds: STEP_SECONDS."""
    prefill_step_seconds: HistogramState = field(default_factory=HistogramState)
    """Of these steps, those that computed tokens of a prompt. Bounds: STEP_SECONDS."""
    tokens_per_step: HistogramState = field(default_factory=HistogramState)
    """Bounds: STEP_TOKENS."""
    admitted_per_step: HistogramState = field(default_factory=HistogramState)
    """Requests that joined, of steps in which one did. Bounds: STEP_ADMITTED."""

    def after(self, past: EngineStats) -> EngineStats:
        """The same engine's present with the totals of those before it, so that no counter falls at a restart."""
        return replace(
            self,
            iterations=self.iterations + past.iterations,
            computed_tokens=self.computed_tokens + past.computed_tokens,
            cached_tokens=self.cached_tokens + past.cached_tokens,
            queried_tokens=self.queried_tokens + past.queried_tokens,
            preemptions=self.preemptions + past.preemptions,
            faults=self.faults + past.faults,
            leaks=self.leaks + past.leaks,
            step_seconds=self.step_seconds + past.step_seconds,
            prefill_step_seconds=self.prefill_step_seconds + past.prefill_step_seconds,
            tokens_per_step=self.tokens_per_step + past.tokens_per_step,
            admitted_per_step=self.admitted_per_step + past.admitted_per_step,
        )
