"""The cheapest mix of GPU types that serves a workload within its latencies.

Source: Mélange, arXiv 2404.14527. A workload is a histogram of request sizes with a rate; the rate of each bucket is
cut into slices, each slice goes to one GPU type, and takes rate / throughput of a GPU there. Throughput is the most
requests per second of that size with which the GPU keeps the SLO.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from headrace.core.errors import BackendUnavailable, InvalidParameter
from headrace.plan.document import Basis
from headrace.plan.quiet import quiet

PAPER = "Mélange, arXiv 2404.14527"
SLICE_FACTOR = 8
"""The paper's; its repository recommends 4."""
MOST_SLICES = 10_000
"""Of a bucket."""
MOST_LOAD = 1e8
"""A type that would need more of itself for one slice counts as one that cannot serve it."""
FULL = 1e-6
"""Of a GPU: what is over by less counts as full. No rate is known that well, and solvers do not compute better."""
MONEY_DIGITS = 6
TIME_LIMIT_S = 30.0
LATENCIES = ("ttft_s", "itl_s")
"""Fields of an SLO and of a point."""


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in seconds; None: none. Raises InvalidParameter unless they are > 0."""

    ttft_s: float | None = None
    """To the first token."""
    itl_s: float | None = None
    """Between tokens, as a mean over an answer."""

    def __post_init__(self) -> None:
        for name in LATENCIES:
            limit = getattr(self, name)
            if limit is not None and not (math.isfinite(limit) and limit > 0):
                raise InvalidParameter(name, limit, "seconds > 0")


@dataclass(frozen=True, slots=True)
class Point:
    """One way in which a GPU may serve requests of one size (how many at once). Raises InvalidParameter."""

    per_s: float
    """Requests/s; 0: it cannot."""
    ttft_s: float | None = None
    itl_s: float | None = None
    """Latencies there, in seconds; None: not known."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.per_s) and self.per_s >= 0):
            raise InvalidParameter("requests_per_s", self.per_s, "a number ≥ 0")
        for name in LATENCIES:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InvalidParameter(name, value, "seconds ≥ 0")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A type that can be rented. Raises InvalidParameter unless it has a price > 0."""

    name: str
    per_hour: float
    """USD."""
    points: Sequence[Sequence[Point]]
    """By bucket; none: it cannot hold such a request."""
    source: str = "given"
    basis: Basis = "given"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.per_hour) and self.per_hour > 0):
            raise InvalidParameter(f"price of {self.name}", self.per_hour, "USD per hour, > 0")


@dataclass(frozen=True, slots=True)
class Demand:
    """How many requests of which size come. Raises InvalidParameter."""

    buckets: Sequence[str]
    """Names of sizes."""
    rates: Sequence[float]
    """Requests/s of each."""
    slice_factor: int = SLICE_FACTOR
    """Slices that each bucket's rate is cut into."""

    def __post_init__(self) -> None:
        for name, rate in zip(self.buckets, self.rates, strict=True):
            if not (math.isfinite(rate) and rate >= 0):
                raise InvalidParameter(f"rate of {name}", rate, "requests/s ≥ 0")
        if not any(self.rates):
            raise InvalidParameter("rate", sum(self.rates), "a workload with a request in it: more than 0 in all")
        if not 1 <= self.slice_factor <= MOST_SLICES:
            raise InvalidParameter("slice_factor", self.slice_factor, f"an integer from 1 to {MOST_SLICES}")

    @property
    def rate(self) -> float:
        """Requests/s in all."""
        return math.fsum(self.rates)


@dataclass(frozen=True, slots=True)
class Mix:
    """How many of each GPU type, and what each serves."""

    counts: Sequence[int]
    """By GPU type."""
    loads: Sequence[float]
    """GPUs of each type that are kept busy."""
    slices: Sequence[Sequence[int]]
    """[bucket][GPU type]"""
    cost: float
    """USD an hour."""
    least: float
    """No mix costs less, USD an hour: `cost` itself where the search came to its end."""

    @property
    def proven(self) -> bool:
        return self.cost - self.least <= FULL * self.cost


# ---------------------------------------------------------------- throughput within the SLO


def throughput(points: Sequence[Point], slo: Slo) -> float:
    """Most requests/s within the SLO; 0: none."""
    return max((point.per_s for point in points if all(_meets(point, slo, name) for name in LATENCIES)), default=0.0)


def _meets(point: Point, slo: Slo, name: str) -> bool:
    limit, value = getattr(slo, name), getattr(point, name)
    return limit is None or (value is not None and value <= limit)


def throughputs(gpus: Sequence[Gpu], demand: Demand, slo: Slo) -> list[list[float]]:
    """[GPU type][bucket] requests/s. Raises InvalidParameter where a limit is given and a table has no latencies, and
    where no GPU serves a bucket: then it says which limit is in the way, and what would be possible."""
    if not gpus:
        raise InvalidParameter("gpus", [], "at least one GPU type")
    for gpu in gpus:
        if len(gpu.points) != len(demand.buckets):
            raise InvalidParameter(f"buckets of {gpu.name}", len(gpu.points), f"{len(demand.buckets)}, as the workload")
        for name in LATENCIES:
            limit = getattr(slo, name)
            ways = ([point for point in points if point.per_s] for points in gpu.points)
            untold = any(some and all(getattr(one, name) is None for one in some) for some in ways)
            if limit is not None and untold:
                raise InvalidParameter(
                    name,
                    limit,
                    f"no limit: the table of {gpu.name} has throughputs without {name}, so none can be kept",
                )
    found = [[throughput(points, slo) for points in gpu.points] for gpu in gpus]
    unserved = [index for index, rate in enumerate(demand.rates) if rate and not any(served[index] for served in found)]
    if unserved:
        raise _binding(gpus, demand, slo, unserved)
    return found


def _binding(gpus: Sequence[Gpu], demand: Demand, slo: Slo, unserved: Sequence[int]) -> InvalidParameter:
    """Why nobody serves these buckets."""
    for bucket in unserved:
        if not any(point.per_s for gpu in gpus for point in gpu.points[bucket]):
            return InvalidParameter(
                "gpus", [gpu.name for gpu in gpus], f"a GPU that holds requests of {demand.buckets[bucket]}: none does"
            )
    binding: list[tuple[str, str]] = []
    for name in LATENCIES:
        limit = getattr(slo, name)
        # Of each bucket the GPU that is fastest, of those the bucket that takes longest.
        ways = [(_quickest(gpus, bucket, name), bucket) for bucket in unserved if limit is not None]
        late = [((seconds, gpu), bucket) for (seconds, gpu), bucket in ways if seconds > limit]
        if late:
            (seconds, gpu), bucket = max(late)
            more = f" (and {len(late) - 1} other{'s' if len(late) > 2 else ''})" if len(late) > 1 else ""
            binding.append((name, f"{_up(seconds):g} s or more: {demand.buckets[bucket]}{more} needs it on {gpu}"))
    if binding:
        (name, said), *others = binding
        also = "".join(f"; {other} is in the way too: {text}" for other, text in others)
        return InvalidParameter(name, getattr(slo, name), f"{said}, the fastest there is{also}")
    where = demand.buckets[unserved[0]]
    said = f"more, or more than itl_s {slo.itl_s}: {where} meets each of the two on some GPU, both on none"
    return InvalidParameter("ttft_s", slo.ttft_s, said)


def _up(seconds: float) -> float:
    """To four digits, and no less: who asks for it gets it."""
    unit = 10.0 ** (math.floor(math.log10(seconds)) - 3)
    return math.ceil(seconds / unit - FULL) * unit


def _quickest(gpus: Sequence[Gpu], bucket: int, name: str) -> tuple[float, str]:
    """(seconds, GPU) of the least latency."""
    every = ((getattr(point, name), gpu.name) for gpu in gpus for point in gpu.points[bucket] if point.per_s)
    return min((seconds, gpu) for seconds, gpu in every if seconds is not None)


# ---------------------------------------------------------------- the mix


def solve(gpus: Sequence[Gpu], demand: Demand, slo: Slo | None = None, time_limit_s: float = TIME_LIMIT_S) -> Mix:
    """The mix of least cost, by scipy's `milp`: minimise Σ c_j B_j with Σ_j n_bj = slices of bucket b and
    Σ_b n_bj · load_bj ≤ B_j, all integers. (Slices of one bucket are alike, so they are counted, not told apart.)

    Raises InvalidParameter (see `throughputs`), BackendUnavailable without scipy.
    """
    served = throughputs(gpus, demand, slo or Slo())
    wanted = [index for index, rate in enumerate(demand.rates) if rate]
    loads = [[_load(demand.rates[bucket] / demand.slice_factor, row[bucket]) for bucket in wanted] for row in served]
    counted, bound = _milp([gpu.per_hour for gpu in gpus], loads, demand.slice_factor, time_limit_s)
    slices = [[0] * len(gpus) for _ in demand.buckets]
    for place, bucket in enumerate(wanted):
        slices[bucket] = counted[place]
    busy = [
        math.fsum(counted[place][gpu] * load for place, load in enumerate(row) if counted[place][gpu])
        for gpu, row in enumerate(loads)
    ]
    counts = [needed(load) for load in busy]
    cost = money(math.fsum(count * gpu.per_hour for count, gpu in zip(counts, gpus, strict=True)))
    return Mix(counts, busy, slices, cost, min(bound, cost))


def _load(rate: float, per_s: float) -> float:
    """GPUs that a rate keeps busy; infinite: they cannot serve it."""
    load = rate / per_s if per_s else math.inf
    return load if load <= MOST_LOAD else math.inf


def money(usd: float) -> float:
    """As prices add up, without what floats leave behind the last digit."""
    return round(usd, MONEY_DIGITS)


def needed(load: float) -> int:
    """GPUs for a load."""
    return max(0, math.ceil(load - FULL))


def _milp(
    prices: Sequence[float], loads: Sequence[Sequence[float]], factor: int, time_limit_s: float
) -> tuple[list[list[int]], float]:
    """([bucket][GPU type] slices, lower bound of the cost). `loads`: of one slice, [GPU type][bucket]."""
    np, optimize = _scipy()
    types, buckets = len(prices), len(loads[0])
    of_buckets = types * buckets
    cost = np.concatenate([np.zeros(of_buckets), prices])
    each = np.asarray(loads, dtype=float).T
    serves = np.isfinite(each)
    # n_bj at b · types + j, then B_j.
    one_of = np.zeros((buckets, of_buckets + types))
    room = np.zeros((types, of_buckets + types))
    for bucket in range(buckets):
        one_of[bucket, bucket * types : (bucket + 1) * types] = 1
    for kind in range(types):
        room[kind, kind:of_buckets:types] = np.where(serves[:, kind], each[:, kind], 0)
        room[kind, of_buckets + kind] = -1
    most = np.concatenate([np.where(serves, factor, 0).ravel(), np.full(types, np.inf)])
    with quiet():
        found = optimize.milp(
            cost,
            integrality=np.ones(of_buckets + types),
            bounds=optimize.Bounds(0, most),
            constraints=[
                optimize.LinearConstraint(one_of, factor, factor),
                optimize.LinearConstraint(room, -np.inf, 0),
            ],
            options={"mip_rel_gap": 0.0, "time_limit": time_limit_s},
        )
    if found.x is None:
        return _cheapest_each(prices, loads, factor), 0.0
    counted = np.rint(found.x[:of_buckets]).astype(int).reshape(buckets, types)
    return counted.tolist(), float(found.mip_dual_bound)


def _cheapest_each(prices: Sequence[float], loads: Sequence[Sequence[float]], factor: int) -> list[list[int]]:
    """Each bucket where it costs least by itself: a mix, where the search found none in its time."""
    counted = []
    for bucket in range(len(loads[0])):
        costs = [price * row[bucket] for price, row in zip(prices, loads, strict=True)]
        best = costs.index(min(costs))
        counted.append([factor if kind == best else 0 for kind in range(len(prices))])
    return counted


def _scipy() -> tuple[Any, Any]:
    """numpy and scipy.optimize; neither is imported before it is used."""
    try:
        return import_module("numpy"), import_module("scipy.optimize")
    except ImportError as error:
        raise BackendUnavailable("plan serving needs scipy: pip install 'headrace[plan]'") from error


@dataclass(frozen=True, slots=True)
class Alone:
    """One GPU type for everything."""

    count: int | None
    """None: it cannot serve `missing`."""
    load: float
    cost: float
    """USD an hour; infinite where it cannot."""
    missing: str = ""


def alone(gpu: Gpu, served: Sequence[float], demand: Demand) -> Alone:
    """`served`: its requests/s by bucket."""
    loads = [_load(rate, most) if rate else 0.0 for rate, most in zip(demand.rates, served, strict=True)]
    load = math.fsum(loads)
    if math.isinf(load):
        return Alone(None, load, math.inf, demand.buckets[loads.index(math.inf)])
    return Alone(needed(load), load, money(needed(load) * gpu.per_hour))
