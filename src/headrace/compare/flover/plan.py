"""Flover's experiments as workloads for the model at hand: lengths cut where the full ones take too long, arrivals in
proportion to what one request alone takes here, so that ratios compare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from headrace.compare.arrivals import Arrivals, AtOnce, ConstantGap, Poisson, generator
from headrace.compare.flover import published
from headrace.compare.flover.identities import serial_ends
from headrace.compare.flover.published import EXPERIMENTS, GAP_S, LENGTH, REQUESTS, SINGLE_S, Published
from headrace.compare.measure import WARM_UP_REQUESTS, WARM_UP_TOKENS, passes_for
from headrace.compare.synthetic import Uniform
from headrace.compare.workloads import Workload, WorkloadRequest
from headrace.core.errors import InvalidParameter

FUSED = "fused"
INSTANCES_METHOD = "instances"
SHORTEST_LENGTH = 16
"""Least tokens that 512 are cut to."""
BUDGET_S = 450.0
"""About as long may all rounds of an experiment take. The rest of ten minutes is for what the estimate leaves out:
loading, and that long answers and processes that share a memory are slower than the short ones that were measured."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One point of a published experiment, in its own seconds and iterations."""

    key: float
    """Value of the experiment's variable."""
    label: str
    requests: int
    arrivals: Arrivals
    shortest: int = LENGTH
    longest: int = LENGTH

    def drawn(self, seed: int) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """Arrivals and lengths, as published: in order, the first arrival 0."""
        times = self.arrivals.times(self.requests, generator(seed, f"arrivals {self.label}"))
        lengths = Uniform(self.shortest, self.longest).draw(self.requests, generator(seed, f"lengths {self.label}"))
        return times, lengths


@dataclass(frozen=True, slots=True)
class Measured:
    """Times of the fused method on this machine, and of engines from outside."""

    step_s: float
    """A token of a request that is alone."""
    batch_step_s: float
    """An iteration with all requests of the experiment in flight."""
    rows: int
    """How many those were."""
    outside_s: Mapping[str, float] = field(default_factory=dict)
    """Of each engine from outside: a token of all these requests at once, with what stands before the first."""

    def iteration_s(self, rows: int) -> float:
        """An iteration of so many rows: between the two that were measured, in proportion. An estimate."""
        if self.rows == 1:
            return self.step_s
        return self.step_s + (self.batch_step_s - self.step_s) * (rows - 1) / (self.rows - 1)

    @property
    def batch_gain(self) -> float:
        """Tokens of a full iteration for the time of an iteration that gives one: the most that a batch can gain."""
        return self.rows * self.step_s / self.batch_step_s


@dataclass(frozen=True, slots=True)
class Scale:
    """How published lengths and seconds become ours."""

    length: float
    """Our tokens / published iterations, ≤ 1."""
    single_s: float = SINGLE_S
    """What a request of `tokens(512)` takes alone here."""
    notes: tuple[str, ...] = field(default=())

    @property
    def time(self) -> float:
        """Our seconds / published seconds."""
        return self.single_s / SINGLE_S

    def tokens(self, iterations: int) -> int:
        """Of an answer that has so many iterations in the experiment; at least one."""
        return max(1, round(iterations * self.length))


def published_of(number: int) -> Published:
    """Raises InvalidParameter."""
    if number not in EXPERIMENTS:
        raise InvalidParameter("workload", f"flover:{number}", f"flover:1 … flover:{max(EXPERIMENTS)}")
    return EXPERIMENTS[number]


def shapes(number: int) -> tuple[Shape, ...]:
    """The points of an experiment. Raises InvalidParameter."""
    published_of(number)
    constant = ConstantGap(GAP_S)
    if number in (1, 2):
        return tuple(
            Shape(count, f"{count} request" + "s" * (count > 1), count, constant) for count in published.COUNTS
        )
    if number == 3:
        return tuple(Shape(gap, f"λ {gap} ms", REQUESTS, Poisson(gap / 1000)) for gap in published.LAMBDAS)
    if number == 4:
        low = published.SHORTEST
        return tuple(Shape(high, f"U({low}, {high})", REQUESTS, constant, low, high) for high in published.LONGEST)
    if number == 7:
        return tuple(
            Shape(gap, f"{count} requests, {kind}, {gap} ms", count, _sleeps(gap), low, LENGTH)
            for count in (REQUESTS, 2 * REQUESTS)
            for kind, low in (("512", LENGTH), ("random", published.SHORTEST))
            for gap in published.GAPS_MS
        )
    return (Shape(REQUESTS, f"{REQUESTS} requests", REQUESTS, constant),)


def _sleeps(gap_ms: int) -> Arrivals:
    return ConstantGap(gap_ms / 1000) if gap_ms else AtOnce()


def requests_of(number: int) -> int:
    """Most requests at once: the engine's `max_num_seqs` has to be as many. Raises InvalidParameter."""
    return max(shape.requests for shape in shapes(number))


def longest_of(number: int) -> int:
    """Tokens of the longest prompt and answer, uncut. Raises InvalidParameter."""
    return published.PROMPT + max(shape.longest for shape in shapes(number))


def window_methods(scale: Scale) -> Mapping[str, float]:
    """Names of the window methods -> service times (of one request) that they wait."""
    return {f"window:{1000 * times * scale.single_s:.3f}": times for times in published.WINDOWS.values()}


def methods_of(number: int, scale: Scale, outside: Sequence[str]) -> tuple[str, ...]:
    """Names of the methods to run; `outside`: the engines of experiment 7."""
    if number == 7:
        return (FUSED, *outside)
    windows = window_methods(scale) if number in (3, 6) else ()
    return (FUSED, *windows, INSTANCES_METHOD)


def envelope(number: int, prompts: Sequence[tuple[int, ...]], longest: int) -> Workload:
    """What every cell's workload is a piece of: what methods get ready for. `longest`: most tokens of prompt and answer
    that the model's context has room for. Raises InvalidParameter where there are too few prompts."""
    count = requests_of(number)
    if len(prompts) < count:
        raise InvalidParameter("prompts", len(prompts), f"at least {count}")
    tokens = min(longest, longest_of(number)) - published.PROMPT
    return _workload(f"flover:{number}", prompts, (0.0,) * count, (max(1, tokens),) * count)


def cell_workload(number: int, shape: Shape, scale: Scale, prompts: Sequence[tuple[int, ...]], seed: int) -> Workload:
    """A point of the experiment at our scale."""
    times, lengths = shape.drawn(seed)
    ours = [scale.tokens(length) for length in lengths]
    return _workload(f"flover:{number}, {shape.label}", prompts, [at * scale.time for at in times], ours, seed)


def _workload(
    name: str,
    prompts: Sequence[tuple[int, ...]],
    arrivals: Sequence[float],
    lengths: Sequence[int],
    seed: int | None = None,
) -> Workload:
    asked = zip(prompts, lengths, arrivals, strict=False)
    requests = tuple(WorkloadRequest(tuple(prompt), length, arrival) for prompt, length, arrival in asked)
    return Workload(name, requests, ignore_eos=True, seed=seed)


def choose_length(
    number: int, methods: Sequence[str], measured: Measured, repeats: int, budget_s: float, longest: int, seed: int
) -> Scale:
    """How long answers may be so that all rounds take about `budget_s` and fit `longest` tokens; its `single_s` is what
    the measured step says. The note says what was cut, from what and why."""
    times = [_estimates_s(shape, methods, measured, seed) for shape in shapes(number)]
    full_s = _total_s(times, 1.0, repeats, measured)
    room = min(1.0, (longest - published.PROMPT) / (longest_of(number) - published.PROMPT))
    cuts = (room, *(cut for cut in _CUTS if cut < room))
    length = next((cut for cut in cuts if _total_s(times, cut, repeats, measured) <= budget_s), cuts[-1])
    single_s = measured.step_s * LENGTH * length
    if length == 1:
        return Scale(1.0, single_s, (f"Lengths are the published ones ({LENGTH} tokens where they are equal).",))
    why = (
        f"the model's context has room for {longest} tokens"
        if length == room
        else f"at full length it would take about {full_s / 60:.0f} minutes here (an estimate)"
    )
    if length == _CUTS[-1]:
        why += ", and shorter answers would show nothing"
    cut = Scale(length)
    told = f"published {LENGTH} tokens, ours {cut.tokens(LENGTH)}"
    if number == 4:
        told = f"published U(128, 512) … U(128, 2048), ours U({cut.tokens(128)}, {cut.tokens(512)}) … "
        told += f"U({cut.tokens(128)}, {cut.tokens(2048)})"
    return Scale(length, single_s, (f"Lengths are cut ({told}), and arrivals in proportion: {why}.",))


_CUTS: Sequence[float] = tuple(max(SHORTEST_LENGTH / LENGTH, 0.95**step) for step in range(69))
"""Parts of the published lengths that are tried, from the whole down to the least."""


def _total_s(times: Sequence[Sequence[float]], cut: float, repeats: int, measured: Measured) -> float:
    """All rounds of all points. `times`: of each point, a run of each method at full length."""
    warm_up_s = WARM_UP_REQUESTS * WARM_UP_TOKENS * measured.step_s
    total_s = 0.0
    for one in times:
        runs = [seconds * cut for seconds in one]
        total_s += repeats * passes_for(runs) * sum(runs) + len(runs) * warm_up_s
    return total_s


def _estimates_s(shape: Shape, methods: Sequence[str], measured: Measured, seed: int) -> list[float]:
    """Of one run of each method at full length; none is quicker than thought here but by luck."""
    times, lengths = shape.drawn(seed)
    scale = measured.step_s * LENGTH / SINGLE_S
    arrivals = [at * scale for at in times]
    iteration_s = measured.iteration_s(min(shape.requests, measured.rows))
    found = []
    for name in methods:
        if name == INSTANCES_METHOD:
            found.append(serial_ends(arrivals, [length * measured.step_s for length in lengths])[-1])
        elif name == FUSED:
            found.append(arrivals[-1] + max(lengths) * iteration_s)
        else:  # a batch that runs already, and one's own
            found.append(arrivals[-1] + 2 * max(lengths) * measured.outside_s.get(name, iteration_s))
    return found


def clock_arrivals(shape: Shape, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A point's arrivals, in iterations of the published single request, and its lengths: nothing is cut here."""
    times, lengths = shape.drawn(seed)
    return tuple(math.ceil(at * LENGTH / SINGLE_S - 1e-6) for at in times), lengths
