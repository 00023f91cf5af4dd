"""What a method's rounds come to: times, rates, memory, energy, cost.

Every figure is taken of each round alone, over all its requests; what is shown is the median over the rounds with its
range. Definitions:

- TTFT (time to first token): first token − arrival, queueing included. An answer without tokens counts up to its end.
- ITL (inter-token latency): gaps between consecutive token events of one request. Tokens that were in our hands at the
  same instant came in one event.
- TPOT (time per output token): (last token − first) / (tokens − 1), of requests whose tokens came in more than one
  event: an answer handed over in one piece says nothing about the time that its tokens took.
- E2E: last token − arrival.
- Requests per minute and goodput: per time from the first arrival to the last completion.
- Percentiles: linear between the two nearest ranks; of n sorted values, p lies at rank p × (n − 1), counted from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from headrace.compare.methods import Outcome, RequestRun
from headrace.core.errors import InvalidParameter
from headrace.engine.energy import JOULES_PER_KWH

TICK_S = 1e-9
"""What a time counts as in which the clock did not move."""
TOO_SHORT = ": run too short to measure"
"""Follows the name of an energy source whose meter is too slow for a run (`resources.SHORTEST_S`)."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and range of one figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """`values`: at least one."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds: mean and percentiles of each round, as median over the rounds with range."""

    mean: Spread
    p50: Spread
    p95: Spread
    p99: Spread

    @classmethod
    def of(cls, rounds: Sequence[Sequence[float]]) -> Latency | None:
        """`rounds`: the seconds of each; None where one has none."""
        if not all(rounds):
            return None
        ordered = [sorted(values) for values in rounds]
        return cls(
            Spread.of([fmean(values) for values in ordered]),
            *(Spread.of([percentile(values, share) for values in ordered]) for share in (0.5, 0.95, 0.99)),
        )


def _check(one: Any, allowed: Callable[[float], bool], said: str) -> None:
    for field in fields(one):
        value = getattr(one, field.name)
        if value is not None and not (math.isfinite(value) and allowed(value)):
            raise InvalidParameter(field.name, value, said)


@dataclass(frozen=True, slots=True)
class Slo:
    """What a user wants of a request; None: no limit. Raises InvalidParameter unless limits are > 0."""

    ttft_s: float | None = None
    """Most seconds to the first token."""
    itl_s: float | None = None
    """Most seconds between two tokens, as a request's mean (its TPOT)."""

    def __post_init__(self) -> None:
        _check(self, lambda value: value > 0, "seconds > 0")

    def met_by(self, request: RequestRun) -> bool:
        """An answer in one piece has no gap that could be too long: its TTFT is all that there is to wait for."""
        tpot_s = time_per_token(request)
        late = self.ttft_s is not None and request.ttft_s > self.ttft_s
        slow = self.itl_s is not None and tpot_s is not None and tpot_s > self.itl_s
        return not (late or slow)

    @property
    def asked(self) -> bool:
        return self.ttft_s is not None or self.itl_s is not None


@dataclass(frozen=True, slots=True)
class Prices:
    """Of the machine and of its energy, in any one currency; None: not given, and no cost is shown that would need it.
    Raises InvalidParameter for a negative one."""

    per_hour: float | None = None
    """Of the machine, for each hour of a run, busy or not."""
    per_kwh: float | None = None
    """Of energy; on top of `per_hour` if both are given."""
    gco2_per_kwh: float | None = None
    """Grams of CO2 (or its equivalents) that the grid gives off."""

    def __post_init__(self) -> None:
        _check(self, lambda value: value >= 0, "a number ≥ 0")

    def cost(self, seconds: float, joules: float | None) -> float | None:
        """Of a run that took `seconds` and `joules`; None without a price, or without the joules that one is for."""
        if self.per_hour is None and self.per_kwh is None:
            return None
        cost = (self.per_hour or 0.0) * seconds / 3600
        if self.per_kwh is None:
            return cost
        return None if joules is None else cost + self.per_kwh * joules / JOULES_PER_KWH

    def gco2(self, joules: float | None) -> float | None:
        """Grams, of a run that took `joules`."""
        return None if joules is None or self.gco2_per_kwh is None else self.gco2_per_kwh * joules / JOULES_PER_KWH


@dataclass(frozen=True, slots=True)
class Figures:
    """A method's figures; None: its runs do not tell."""

    seconds: Spread
    """Of a run, to the end of its last request. Loading is not in it."""
    output_tokens_per_s: Spread
    requests_per_min: Spread
    ttft: Latency
    itl: Latency | None
    """None where no answer came in more than one event."""
    tpot: Latency | None
    e2e: Latency
    goodput_per_s: Spread | None
    """Requests a second that meet the SLO; None: none was given."""
    iterations: Spread | None
    mean_in_flight: Spread | None
    """Mean over the iterations of the requests that were in the batch."""
    overlap: Spread | None
    """Mean in flight / number of requests, 0 to 1."""
    peak_rss_bytes: int | None
    """Of the largest round."""
    cpu_s: Spread | None
    joules: Spread | None
    """Of the machine in a run, all sources together, idle power included."""
    energy_source: str
    """nvml, rapl, estimated, joined by +; empty where there is none. With TOO_SHORT behind it: no joules are given."""
    cost_per_request: float | None
    """Median over the rounds; in the currency of the prices."""
    cost_per_million_tokens: float | None
    """Of output tokens."""
    gco2: float | None
    """Grams, of a run."""


def figures_of(rounds: Sequence[Outcome], slo: Slo | None, prices: Prices) -> Figures:
    """`rounds`: at least one, all of the same workload."""
    ttft = Latency.of([[one.ttft_s for one in outcome.requests] for outcome in rounds])
    e2e = Latency.of([[last_token_s(one) - one.arrival_s for one in outcome.requests] for outcome in rounds])
    assert ttft is not None and e2e is not None, "a workload has at least one request"
    told = all(outcome.iterations for outcome in rounds)
    in_flight = [fmean(one.in_flight for one in outcome.iterations) for outcome in rounds] if told else []
    joules = [run_joules(outcome) for outcome in rounds]
    costs = [prices.cost(outcome.seconds, used) for outcome, used in zip(rounds, joules, strict=True)]
    per_token = [
        None if cost is None or not outcome.output_tokens else cost / outcome.output_tokens
        for outcome, cost in zip(rounds, costs, strict=True)
    ]
    counts = [len(outcome.requests) for outcome in rounds]
    gco2 = [prices.gco2(used) for used in joules]
    peaks = [outcome.peak_rss_bytes for outcome in rounds]
    known_peaks = [peak for peak in peaks if peak is not None]
    return Figures(
        seconds=Spread.of([outcome.seconds for outcome in rounds]),
        output_tokens_per_s=Spread.of([outcome.output_tokens / max(outcome.seconds, TICK_S) for outcome in rounds]),
        requests_per_min=Spread.of([60 * len(outcome.requests) / _served_s(outcome) for outcome in rounds]),
        ttft=ttft,
        itl=Latency.of([[gap for one in outcome.requests for gap in token_gaps(one)] for outcome in rounds]),
        tpot=Latency.of([_known(time_per_token(one) for one in outcome.requests) for outcome in rounds]),
        e2e=e2e,
        goodput_per_s=_goodput(rounds, slo),
        iterations=Spread.of([len(outcome.iterations) for outcome in rounds]) if told else None,
        mean_in_flight=Spread.of(in_flight) if told else None,
        overlap=Spread.of([mean / count for mean, count in zip(in_flight, counts, strict=True)]) if told else None,
        peak_rss_bytes=max(known_peaks) if len(known_peaks) == len(rounds) else None,
        cpu_s=_spread([outcome.cpu_s for outcome in rounds]),
        joules=_spread(joules),
        energy_source=_energy_source(rounds),
        cost_per_request=_median([None if c is None else c / n for c, n in zip(costs, counts, strict=True)]),
        cost_per_million_tokens=_median([None if cost is None else cost * 1e6 for cost in per_token]),
        gco2=_median(gco2),
    )


def run_joules(outcome: Outcome) -> float | None:
    """Of all sources together; None where there is none, or a run was too short for its meter."""
    if not outcome.joules or any(source.endswith(TOO_SHORT) for source in outcome.joules):
        return None
    return math.fsum(outcome.joules.values())


def _energy_source(rounds: Sequence[Outcome]) -> str:
    sources = list(dict.fromkeys(source for outcome in rounds for source in outcome.joules))
    return "+".join([source for source in sources if source.endswith(TOO_SHORT)] or sources)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of at least one value, sorted; `share` 0 to 1. Linear between the two nearest ranks."""
    rank = share * (len(ordered) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def token_gaps(request: RequestRun) -> list[float]:
    """Seconds between its consecutive token events."""
    events = list(dict.fromkeys(request.token_s))
    return [later - earlier for earlier, later in pairwise(events)]


def time_per_token(request: RequestRun) -> float | None:
    """Its TPOT in seconds; None where its tokens came in one event, or it has fewer than two."""
    times = request.token_s
    if not times or times[0] == times[-1]:
        return None
    return (times[-1] - times[0]) / (len(times) - 1)


def last_token_s(request: RequestRun) -> float:
    """Seconds from the start of the run; an answer without tokens: its end."""
    return request.token_s[-1] if request.token_s else request.end_s


def _served_s(outcome: Outcome) -> float:
    """From the first arrival to the last completion."""
    first = min(one.arrival_s for one in outcome.requests)
    return max(max(one.end_s for one in outcome.requests) - first, TICK_S)


def _goodput(rounds: Sequence[Outcome], slo: Slo | None) -> Spread | None:
    if slo is None or not slo.asked:
        return None
    return Spread.of([sum(map(slo.met_by, outcome.requests)) / _served_s(outcome) for outcome in rounds])


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _spread(values: Sequence[float | None]) -> Spread | None:
    """None where one is not known."""
    known = _known(values)
    return Spread.of(known) if len(known) == len(values) else None


def _median(values: Sequence[float | None]) -> float | None:
    spread = _spread(values)
    return None if spread is None else spread.median
