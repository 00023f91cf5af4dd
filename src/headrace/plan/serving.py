"""The cheapest mix of GPU types that serves a workload within its latencies.

Source: Mélange, arXiv 2404.14527. A workload is a histogram of request sizes with a rate; the rate of each bucket is
cut into slices, each slice goes to one GPU type, and takes rate / throughput of a GPU there. Throughput is the most
requests per second of that size with which the GPU keeps the SLO.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context
from importlib import import_module
from typing import Any

from headrace.core.errors import BackendUnavailable, InvalidParameter
from headrace.plan.cost import TINY, check_number
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
    """A type that can be rented. Raises InvalidParameter for a price below a millionth of a dollar."""

    name: str
    per_hour: float
    """Dollars."""
    points: Sequence[Sequence[Point]]
    """By bucket; none: it cannot hold such a request, or was not measured with one."""
    source: str = "given"
    basis: Basis = "given"
    model: str = ""
    """What it was measured or predicted with; empty: not said."""

    def __post_init__(self) -> None:
        check_number(f"price of {self.name}", self.per_hour, 10.0**-MONEY_DIGITS)


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
        if sum(self.rates) < TINY:
            raise InvalidParameter(
                "rate", sum(self.rates), f"a workload with a request in it: {TINY:g}/s or more in all"
            )
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
    """$ an hour."""
    least: float
    """No mix costs less, $ an hour: `cost` itself where the search came to its end."""

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
            asked = (some for some, rate in zip(ways, demand.rates, strict=True) if rate)
            untold = any(some and all(getattr(one, name) is None for one in some) for some in asked)
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
            said = f"a GPU with a throughput for requests of {demand.buckets[bucket]}: none has one"
            return InvalidParameter("gpus", [gpu.name for gpu in gpus], said)
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
    return float(Context(prec=4, rounding=ROUND_CEILING).create_decimal(repr(seconds)))


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
    searched, bound = _milp([gpu.per_hour for gpu in gpus], loads, demand.slice_factor, time_limit_s)
    # A search that was stopped may know of none, or of one that is dearer than what needs no search.
    ways = [*([] if searched is None else [searched]), *_unsearched(gpus, loads, demand.slice_factor)]
    every = [(_busy(loads, way), way) for way in ways]
    busy, counted = min(every, key=lambda one: _cost(gpus, one[0]))
    cost = _cost(gpus, busy)
    slices = [[0] * len(gpus) for _ in demand.buckets]
    for place, bucket in enumerate(wanted):
        slices[bucket] = counted[place]
    return Mix([needed(load) for load in busy], busy, slices, cost, min(bound, cost))


def _busy(loads: Sequence[Sequence[float]], counted: Sequence[Sequence[int]]) -> list[float]:
    """GPUs of each type that are kept busy."""
    return [
        math.fsum(counted[place][gpu] * load for place, load in enumerate(row) if counted[place][gpu])
        for gpu, row in enumerate(loads)
    ]


def _cost(gpus: Sequence[Gpu], busy: Sequence[float]) -> float:
    return money(math.fsum(needed(load) * gpu.per_hour for load, gpu in zip(busy, gpus, strict=True)))


def _load(rate: float, per_s: float) -> float:
    """GPUs that a rate keeps busy; infinite: they cannot serve it."""
    load = rate / per_s if per_s else math.inf
    return load if load <= MOST_LOAD else math.inf


def money(usd: float) -> float:
    """As prices add up, without what floats leave behind the last digit."""
    return round(usd, MONEY_DIGITS)


def needed(load: float) -> int:
    """GPUs for a load: one for the least."""
    return max(math.ceil(load - FULL), 1 if load > 0 else 0)


def _milp(
    prices: Sequence[float], loads: Sequence[Sequence[float]], factor: int, time_limit_s: float
) -> tuple[list[list[int]] | None, float]:
    """([bucket][GPU type] slices, lower bound of the cost). `loads`: of one slice, [GPU type][bucket]. None: none was
    found in time."""
    np, optimize = _scipy()
    types, buckets = len(prices), len(loads[0])
    of_buckets = types * buckets
    cost = np.concatenate([np.zeros(of_buckets), prices])
    each = np.asarray(loads, dtype=float).T
    serves = np.isfinite(each)
    # n_bj at b · types + j, then B_j.
    one_of = np.zeros((buckets, of_buckets + types))
    room, used = np.zeros((types, of_buckets + types)), np.zeros((types, of_buckets + types))
    for bucket in range(buckets):
        one_of[bucket, bucket * types : (bucket + 1) * types] = 1
    for kind in range(types):
        room[kind, kind:of_buckets:types] = np.where(serves[:, kind], each[:, kind], 0)
        room[kind, of_buckets + kind] = -1
        # A load below the solver's tolerance takes a GPU too.
        used[kind, kind:of_buckets:types] = 1
        used[kind, of_buckets + kind] = -factor * buckets
    most = np.concatenate([np.where(serves, factor, 0).ravel(), np.full(types, np.inf)])
    with quiet():
        found = optimize.milp(
            cost,
            integrality=np.ones(of_buckets + types),
            bounds=optimize.Bounds(0, most),
            constraints=[
                optimize.LinearConstraint(one_of, factor, factor),
                optimize.LinearConstraint(np.concatenate([room, used]), -np.inf, 0),
            ],
            options={"mip_rel_gap": 0.0, "time_limit": time_limit_s},
        )
    if found.x is None:
        return None, 0.0
    counted = np.rint(found.x[:of_buckets]).astype(int).reshape(buckets, types)
    return counted.tolist(), float(found.mip_dual_bound)


def _unsearched(gpus: Sequence[Gpu], loads: Sequence[Sequence[float]], factor: int) -> list[list[list[int]]]:
    """Each bucket where it costs least by itself, and all of them on one type, for each that can."""
    buckets = range(len(loads[0]))
    least = [min(range(len(gpus)), key=lambda kind: gpus[kind].per_hour * loads[kind][bucket]) for bucket in buckets]
    alone = [[kind] * len(buckets) for kind, row in enumerate(loads) if all(map(math.isfinite, row))]
    return [[[factor if kind == best else 0 for kind in range(len(gpus))] for best in way] for way in (least, *alone)]


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
    """$ an hour; infinite where it cannot."""
    missing: str = ""


def alone(gpu: Gpu, served: Sequence[float], demand: Demand) -> Alone:
    """`served`: its requests/s by bucket."""
    loads = [_load(rate, most) if rate else 0.0 for rate, most in zip(demand.rates, served, strict=True)]
    load = math.fsum(loads)
    if math.isinf(load):
        return Alone(None, load, math.inf, demand.buckets[loads.index(math.inf)])
    return Alone(needed(load), load, money(needed(load) * gpu.per_hour))
