"""Checks of the identities on what a run told, in whatever unit its times are: on our own traces they are exact."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from headrace.compare.flover.identities import busy_iterations, mean_overlap, overlap_percent
from headrace.compare.methods import Outcome

POINT = 0.1
"""How far the two ways to an overlap may lie apart, in percentage points."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold, and what was found."""

    name: str
    holds: bool
    detail: str


def token_iterations(outcome: Outcome) -> tuple[tuple[int, ...], ...]:
    """Of each request, the iterations (from 0) that its tokens came from. Needs a run that tells its iterations."""
    ends = [one.end_s for one in outcome.iterations]
    return tuple(tuple(bisect_left(ends, at) for at in request.token_s) for request in outcome.requests)


def mean_in_flight(outcome: Outcome) -> float:
    """As the engine counted it, over its iterations."""
    return sum(one.in_flight for one in outcome.iterations) / len(outcome.iterations)


def check_ends(outcome: Outcome) -> Check:
    """A request that joined before iteration a has a token in each of a, a + 1 … and ends after a + L."""
    broken = [
        number
        for number, found in enumerate(token_iterations(outcome))
        if any(later != earlier + 1 for earlier, later in pairwise(found))
    ]
    told = f"requests: {len(outcome.requests)}" if not broken else f"not so: requests {_some(broken)}"
    return Check("a token an iteration, from joining to the end (finish = a + L)", not broken, told)


def check_busy(outcome: Outcome) -> Check:
    """Iterations = length of the union of the requests' own intervals."""
    found = token_iterations(outcome)
    union = busy_iterations([one[0] for one in found], [len(one) for one in found])
    counted = len(outcome.iterations)
    return Check("busy iterations = union of the requests' intervals", union == counted, f"{union:.0f} and {counted}")


def check_overlap(outcome: Outcome) -> Check:
    """Mean in flight, as the engine counted it, against Σ L / busy iterations."""
    requests = len(outcome.requests)
    lengths = [len(request.token_ids) for request in outcome.requests]
    counted = overlap_percent(mean_in_flight(outcome), requests)
    worked_out = overlap_percent(mean_overlap(lengths, len(outcome.iterations)), requests)
    told = f"{counted:.2f} % and {worked_out:.2f} %"
    return Check("overlap = Σ L / busy iterations / N", abs(counted - worked_out) <= POINT, told)


def check_admission(outcome: Outcome) -> Check:
    """Under fusion a request that comes while an iteration runs has its first token at the end of the next."""
    ends = [one.end_s for one in outcome.iterations]
    waits = [
        first[0] - bisect_left(ends, request.arrival_s)
        for request, first in zip(outcome.requests, token_iterations(outcome), strict=True)
    ]
    return Check("joining waits for one iteration at most", max(waits) <= 1, f"most waited for: {max(waits)}")


def check_window(outcome: Outcome, window: float) -> Check:
    """No request of a batch has a token before the batch's first request has waited for the window."""
    batches: dict[int, list[int]] = {}
    for index, found in enumerate(token_iterations(outcome)):
        batches.setdefault(found[0], []).append(index)
    early = []
    for members in batches.values():
        closes = min(outcome.requests[index].arrival_s for index in members) + window
        early += [index for index in members if outcome.requests[index].first_token_s < closes]
    told = f"batches: {len(batches)}" if not early else f"not so: requests {_some(early)}"
    return Check("no first token before its window closes", not early, told)


def check_one_token_each(outcome: Outcome) -> Check:
    """Every iteration gives one token to every request in flight."""
    given = [0] * len(outcome.iterations)
    for found in token_iterations(outcome):
        for iteration in found:
            given[iteration] += 1
    short = [number for number, one in enumerate(outcome.iterations) if given[number] != one.in_flight]
    told = f"{len(given)} iterations" if not short else f"not so: iterations {_some(short)}"
    return Check("every iteration: one token for each request in flight", not short, told)


def fused_checks(outcome: Outcome) -> tuple[Check, ...]:
    """All that must hold of a fused run that tells its iterations, with prompts that a step has room for."""
    return (
        check_ends(outcome),
        check_busy(outcome),
        check_overlap(outcome),
        check_admission(outcome),
        check_one_token_each(outcome),
    )


def _some(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return shown if len(numbers) <= 5 else f"{shown} and {len(numbers) - 5} more"


# ------------------------------------------------------------ progress over time


def progress(outcome: Outcome) -> tuple[tuple[float, float], ...]:
    """(time, share of all tokens that are out), at each time at which it grows."""
    times = sorted(at for request in outcome.requests for at in request.token_s)
    points: dict[float, float] = {}
    for count, at in enumerate(times, 1):
        points[at] = count / len(times)
    return tuple(points.items())


def area(outcome: Outcome, until: float) -> float:
    """The area under `progress`: the mean share that was out, from 0 to `until`, which is not before the last token."""
    times = [at for request in outcome.requests for at in request.token_s]
    return sum(until - at for at in times) / (len(times) * until)


def progress_csv(outcomes: Mapping[str, Outcome]) -> str:
    """method,t,fraction: a line each time that tokens came out."""
    lines = [f"{name},{at:.6f},{share:.6f}" for name, one in outcomes.items() for at, share in progress(one)]
    return "\n".join(["method,t,fraction", *lines]) + "\n"


def completions_csv(outcomes: Mapping[str, Outcome]) -> str:
    """method,request,arrival,first_token,end,tokens: a line a request, in order of their ends."""
    lines = []
    for name, outcome in outcomes.items():
        for index, one in sorted(enumerate(outcome.requests), key=lambda pair: (pair[1].end_s, pair[0])):
            times = f"{one.arrival_s:.6f},{one.first_token_s:.6f},{one.end_s:.6f}"
            lines.append(f"{name},{index},{times},{len(one.token_ids)}")
    return "\n".join(["method,request,arrival,first_token,end,tokens", *lines]) + "\n"
