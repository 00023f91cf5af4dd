"""Time: rounds in rotated order, paired ratios, and when a method may be called faster."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

from headrace.compare.methods import Method, Outcome
from headrace.compare.workloads import Workload
from headrace.core.errors import HeadraceError

WARM_UP_TOKENS = 8
"""Most tokens an answer has in the warm-up run, which is not counted."""
WARM_UP_REQUESTS = 4
"""Most requests of it."""
CHANCE = 0.05
"""How often two equally fast methods may at most be told apart by mistake."""


class Claim(StrEnum):
    BASE = "base"
    FASTER = "faster"
    SLOWER = "slower"
    SAME = "no significant difference"
    TOO_FEW = "too few repeats to tell"


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and range of one figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Timing:
    """One method's speed over all rounds."""

    seconds: tuple[float, ...]
    """Each round's, in order."""
    ratios: tuple[float, ...]
    """Base seconds / this method's seconds in the same round: above 1 is faster than the base."""
    output_tokens_per_s: float
    """Output tokens of a round / median seconds."""
    claim: Claim

    @property
    def spread(self) -> Spread:
        return Spread.of(self.seconds)

    @property
    def ratio(self) -> Spread:
        return Spread.of(self.ratios)


def run_rounds(
    methods: Sequence[Method],
    workload: Workload,
    repeats: int,
    progress: Callable[[str], None],
    fail: Callable[[str, HeadraceError], None],
) -> Mapping[str, tuple[Outcome, ...]]:
    """A warm-up of every method, then `repeats` rounds of all of them, each round beginning with another one.

    Slow drifts of the machine so fall on every method alike, and pairs within a round share them. A method that raises
    is told to `fail`, and is in no further round; only those that ran in all of them are in the result.
    """
    warm_up = workload.warm_up(WARM_UP_TOKENS, WARM_UP_REQUESTS)
    outcomes: dict[str, list[Outcome]] = {method.name: [] for method in methods}

    def run(method: Method, part: Workload) -> Outcome | None:
        if method.name not in outcomes:
            return None
        try:
            return method.run(part)
        except HeadraceError as error:
            fail(method.name, error)
            del outcomes[method.name]
            return None

    for method in methods:
        progress(f"warm-up: {method.name}")
        run(method, warm_up)
    for index in range(repeats):
        first = index % len(methods)
        for method in (*methods[first:], *methods[:first]):
            progress(f"round {index + 1} of {repeats}: {method.name}")
            if (outcome := run(method, workload)) is not None:
                outcomes[method.name].append(outcome)
    return {name: tuple(runs) for name, runs in outcomes.items()}


def paired_ratios(base: Sequence[float], other: Sequence[float]) -> tuple[float, ...]:
    """base / other, round by round. A clock that did not move counts as a nanosecond."""
    tick = 1e-9
    return tuple(max(b, tick) / max(o, tick) for b, o in zip(base, other, strict=True))


def judge(base: Sequence[float], other: Sequence[float]) -> Claim:
    """Whether `other` may be called faster or slower than `base`, from the seconds of the same rounds.

    Every round's pair must say so, and so clearly that two equal methods would look like this in at most 5 % of
    comparisons: R pairs all on one side have the chance 2^-R (sign test), two sets of R that do not overlap at all
    1 / C(2R, R) (rank test). So five rounds can do by pairs alone; three or four must not overlap; fewer say nothing.
    """
    rounds = len(base)
    apart = 1 / math.comb(2 * rounds, rounds)
    if min(2.0**-rounds, apart) > CHANCE:
        return Claim.TOO_FEW
    by_pairs = 2.0**-rounds <= CHANCE
    ratios = paired_ratios(base, other)
    if min(ratios) > 1 and (by_pairs or max(other) < min(base)):
        return Claim.FASTER
    if max(ratios) < 1 and (by_pairs or min(other) > max(base)):
        return Claim.SLOWER
    return Claim.SAME


def time_method(runs: Sequence[Outcome], base: Sequence[Outcome]) -> Timing:
    """Speed of a method from its rounds and the base's; `runs is base` for the base itself."""
    seconds = tuple(run.seconds for run in runs)
    base_seconds = tuple(run.seconds for run in base)
    output_tokens = median(run.output_tokens for run in runs)
    return Timing(
        seconds=seconds,
        ratios=paired_ratios(base_seconds, seconds),
        output_tokens_per_s=output_tokens / max(median(seconds), 1e-9),
        claim=Claim.BASE if runs is base else judge(base_seconds, seconds),
    )


def figure(seconds: float) -> str:
    """A time for a reader: two decimals, four below one second."""
    return f"{seconds:.2f}" if seconds >= 1 else f"{seconds:.4f}"


def ratio_figure(ratio: float) -> str:
    return f"{ratio:.2f}"


def batching_bound(lengths: Sequence[int]) -> float:
    """Σ lengths / max length: how much faster all answers in one batch can be than one by one, where a step takes as
    long for many rows as for one (a decode bound by memory traffic) and prompts cost nothing."""
    return sum(lengths) / max(lengths)
