"""What must hold on a clock of iterations for a scheduler without a limit on who may join, and the same for its rivals.

Request i arrives at a_i and takes L_i iterations, one token each. Times are iterations from the start of a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from headrace.compare.arrivals import Poisson, generator


def fused_ends(arrivals: Sequence[float], lengths: Sequence[int]) -> tuple[float, ...]:
    """When each request ends where all join at once: a_i + L_i."""
    return tuple(arrival + length for arrival, length in zip(arrivals, lengths, strict=True))


def serial_ends(arrivals: Sequence[float], lengths: Sequence[float]) -> tuple[float, ...]:
    """When each ends where one runs after the other. Arrivals in order; lengths in the unit of the arrivals.

    The last of them is also the end of everything where requests share the machine evenly and none is gained by it: a
    server that never idles while there is work ends when its work ends, whatever the order."""
    ends: list[float] = []
    for arrival, length in zip(arrivals, lengths, strict=True):
        ends.append(max(arrival, ends[-1] if ends else 0.0) + length)
    return tuple(ends)


def window_ends(arrivals: Sequence[float], lengths: Sequence[float], window: float) -> tuple[float, ...]:
    """When each ends under dynamic batching: a batch starts once its first request has waited for `window`, with all
    that have come, and nobody joins it. Arrivals in order. An answer ends when it is complete, not with its batch."""
    ends: list[float] = []
    free = 0.0
    while len(ends) < len(arrivals):
        first = len(ends)
        start = max(free, arrivals[first] + window)
        stop = next((i for i in range(first, len(arrivals)) if arrivals[i] > start), len(arrivals))
        ends += [start + length for length in lengths[first:stop]]
        free = max(ends[first:])
    return tuple(ends)


def end_order(ends: Sequence[float]) -> tuple[int, ...]:
    """Requests as they end; ties by number."""
    return tuple(sorted(range(len(ends)), key=lambda index: (ends[index], index)))


def busy_iterations(arrivals: Sequence[float], lengths: Sequence[int]) -> float:
    """Length of the union of [a_i, a_i + L_i): iterations in which at least one request is in flight."""
    busy = 0.0
    covered = -math.inf
    for arrival, end in sorted(zip(arrivals, fused_ends(arrivals, lengths), strict=True)):
        busy += max(0.0, end - max(arrival, covered))
        covered = max(covered, end)
    return busy


def peak_in_flight(arrivals: Sequence[float], lengths: Sequence[int]) -> int:
    """Most requests in flight at once; one that ends at a moment does not meet one that arrives then."""
    changes = [(arrival, 1) for arrival in arrivals]
    changes += [(end, -1) for end in fused_ends(arrivals, lengths)]
    level = peak = 0
    for _, change in sorted(changes):
        level += change
        peak = max(peak, level)
    return peak


def mean_overlap(lengths: Sequence[int], busy: float) -> float:
    """Requests in flight in an iteration, on average: Σ L_i / busy iterations."""
    return sum(lengths) / busy


def overlap_percent(mean_in_flight: float, requests: int) -> float:
    """Mean in flight / number of requests, in percent."""
    return 100 * mean_in_flight / requests


def on_the_clock(arrivals: Sequence[float]) -> tuple[int, ...]:
    """The iterations that the requests join: of all that begin after they have come, the first."""
    return tuple(math.ceil(arrival) for arrival in arrivals)


@dataclass(frozen=True, slots=True)
class Simulated:
    """Busy iterations over many draws."""

    mean: float
    sd: float
    draws: int

    def deviations(self, found: float) -> float:
        """How many standard deviations `found` lies from the mean."""
        return (found - self.mean) / self.sd


def simulate_busy(count: int, length: int, mean_gap: float, draws: int, seed: int) -> Simulated:
    """Poisson arrivals, `draws` ≥ 2 times: iterations in which `count` requests of `length` keep the engine busy."""
    rng = generator(seed, "busy iterations")
    lengths = (length,) * count
    arrivals = Poisson(mean_gap)
    found = [busy_iterations(on_the_clock(arrivals.times(count, rng)), lengths) for _ in range(draws)]
    return Simulated(fmean(found), stdev(found), draws)


def expected_busy(count: int, length: int, mean_gap: float) -> float:
    """The mean of `simulate_busy`, exactly but for rounding to whole iterations: each gap keeps the engine busy for
    min(gap, length), whose mean is g (1 - e^(-L/g))."""
    return length + (count - 1) * mean_gap * -math.expm1(-length / mean_gap)
