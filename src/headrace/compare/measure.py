"""Rounds in rotated order, paired ratios, and when a method may be called faster."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from statistics import fmean, median, stdev

from headrace.compare.figures import TICK_S, Spread, run_joules
from headrace.compare.methods import Method, Outcome
from headrace.compare.resources import run_measured, settled_heap
from headrace.compare.statistics import (
    ENOUGH,
    LEVEL,
    Evidence,
    claim_level,
    few_agree,
    log_ratios,
    sign_flip_p,
    weigh,
)
from headrace.compare.workloads import Workload
from headrace.core.errors import HeadraceError
from headrace.engine.energy import Meter

WARM_UP_TOKENS = 8
"""Most tokens an answer has in the warm-up run, which is not counted."""
WARM_UP_REQUESTS = 4
"""Most requests of it."""
SHORT_S = 0.25
"""Where the quickest method's run is shorter, each round has several runs of every method."""
MOST_PASSES = 9


class Claim(StrEnum):
    BASE = "base"
    FASTER = "faster"
    SLOWER = "slower"
    SAME = "no significant difference"
    TOO_FEW = "too few repeats to tell"


@dataclass(frozen=True, slots=True)
class TypicalRun(Outcome):
    """Of several runs in one round, the one that stands for them."""

    all_s: tuple[float, ...] = ()
    """Seconds of each of them, in order."""


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
    evidence: Evidence | None = None
    """What the claim rests on; None for the base."""

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
    meters: Sequence[Meter] = (),
    whole_warm_up: bool = False,
) -> Mapping[str, tuple[Outcome, ...]]:
    """A warm-up of every method, then `repeats` rounds of all of them, each round beginning with another one.

    `whole_warm_up`: for methods of ours it is a run of the whole workload, as a GPU needs it: kernels are compiled when
    a step of a new shape first asks for them.

    Slow drifts of the machine so fall on every method alike, and pairs within a round share them. Where a run is short
    (SHORT_S), a round goes through the methods several times, there and back (A B, B A, A B), and a method's run of
    median length is its outcome of the round: one that something else disturbed does not count. A method that raises
    is told to `fail`, and is in no further round; only those that ran in all of them are in the result.
    """
    warm_up = workload.warm_up(WARM_UP_TOKENS, WARM_UP_REQUESTS)
    outcomes: dict[str, list[Outcome]] = {method.name: [] for method in methods}

    def run(method: Method, part: Workload) -> Outcome | None:
        if method.name not in outcomes:
            return None
        try:
            return run_measured(method, part, meters)
        except HeadraceError as error:
            fail(method.name, error)
            del outcomes[method.name]
            return None

    with settled_heap():
        for method in methods:
            progress(f"warm-up: {method.name}")
            run(method, workload if whole_warm_up and method.config is not None else warm_up)
        passes: int | None = None
        for index in range(repeats):
            first = index % len(methods)
            order = (*methods[first:], *methods[:first])
            runs: dict[str, list[Outcome]] = {name: [] for name in outcomes}
            done = 0
            while passes is None or done < passes:
                for method in order:
                    progress(f"round {index + 1} of {repeats}: {method.name}")
                    if (outcome := run(method, workload)) is not None:
                        runs[method.name].append(outcome)
                order, done = order[::-1], done + 1
                passes = passes or passes_for([runs[name][0].seconds for name in outcomes])
            for name, found in outcomes.items():
                found.append(typical(runs[name], found[0] if found else runs[name][0]))
    return {name: tuple(runs) for name, runs in outcomes.items()}


def passes_for(seconds: Sequence[float]) -> int:
    """Runs of each method in a round, from the methods' seconds: an odd number, 1 to MOST_PASSES."""
    wanted = math.ceil(SHORT_S / max(min(seconds, default=SHORT_S), TICK_S))
    return min(MOST_PASSES, wanted + (wanted + 1) % 2)


def typical(runs: Sequence[Outcome], expected: Outcome) -> Outcome:
    """The run of median length; but one with other tokens than `expected` comes before all that have them, so that no
    difference is dropped."""
    others = [one for one in runs if one.outputs != expected.outputs]
    ordered = sorted(runs, key=lambda one: one.seconds)
    chosen = others[0] if others else ordered[(len(ordered) - 1) // 2]
    if len(runs) == 1:
        return chosen
    told = {field.name: getattr(chosen, field.name) for field in fields(Outcome)}
    return TypicalRun(**told, all_s=tuple(one.seconds for one in runs))


def passes_of(rounds: Sequence[Outcome]) -> tuple[tuple[float, ...], ...]:
    """Seconds of all runs of each round; empty where the rounds have one run each."""
    found = tuple(one.all_s for one in rounds if isinstance(one, TypicalRun))
    return found if len(found) == len(rounds) else ()


def paired_ratios(base: Sequence[float], other: Sequence[float]) -> tuple[float, ...]:
    """base / other, round by round."""
    return tuple(max(b, TICK_S) / max(o, TICK_S) for b, o in zip(base, other, strict=True))


def judge(base: Sequence[float], other: Sequence[float], passes: Sequence[Sequence[float]] = ()) -> Claim:
    """Whether `other` may be called faster or slower than `base`, from the seconds of the same rounds. `passes`: of the
    base (`passes_of`), where its rounds have several runs.

    From ENOUGH rounds on: the sign-flip test gives p ≤ LEVEL, the 95 % interval of the ratio leaves out 1, and the
    ratio is beyond the noise floor, what the base against itself comes to. From 3 on: by the rule of `few_agree`, at a
    level of 5 %. Fewer say nothing. `statistics.claim_level` tells which level a claim holds at. Joules, costs or bytes
    are judged alike, where FASTER is: less.
    """
    level = claim_level(len(base))
    if level is None:
        return Claim.TOO_FEW
    d = log_ratios(base, other)
    if len(base) < ENOUGH:
        clear = few_agree(base, other)
    else:
        clear = sign_flip_p(d) <= LEVEL and weigh(base, other, passes).beyond_floor
    if not clear:
        return Claim.SAME
    return Claim.FASTER if median(d) > 0 else Claim.SLOWER


def time_method(runs: Sequence[Outcome], base: Sequence[Outcome]) -> Timing:
    """Speed of a method from its rounds and the base's; `runs is base` for the base itself."""
    seconds = tuple(run.seconds for run in runs)
    base_seconds = tuple(run.seconds for run in base)
    output_tokens = median(run.output_tokens for run in runs)
    return Timing(
        seconds=seconds,
        ratios=paired_ratios(base_seconds, seconds),
        output_tokens_per_s=output_tokens / max(median(seconds), TICK_S),
        claim=Claim.BASE if runs is base else judge(base_seconds, seconds, passes_of(base)),
        evidence=None if runs is base else weigh(base_seconds, seconds, passes_of(base)),
    )


@dataclass(frozen=True, slots=True)
class EnergyDifference:
    """Joules of a method's runs against the base's, round by round."""

    pairs: int
    mean: float
    """Joules, other − base."""
    deviation: float
    """Standard deviation of the pairs' differences in joules; 0 where there is one."""
    evidence: Evidence
    """Of the joules: a ratio above 1 says that the other took less."""
    claim: Claim

    def __str__(self) -> str:
        counted = f"n = {self.pairs}, mean difference {self.mean:+.3g} J, standard deviation {self.deviation:.2g} J"
        if self.claim is Claim.TOO_FEW:
            return f"too few rounds to tell ({counted})"
        if self.claim is Claim.SAME:
            return f"no measurable difference ({counted})"
        low, high = self.evidence.interval
        less = "less" if self.claim is Claim.FASTER else "more"
        held = f"{self.evidence.level:.0%} level"
        return f"{less} energy: base / this {self.evidence.ratio:.2f} ({low:.2f}–{high:.2f}; {counted}; {held})"


def energy_difference(base: Sequence[Outcome], other: Sequence[Outcome]) -> EnergyDifference | None:
    """None where a run's joules are not known, or it was too short for the meter."""
    ours, theirs = ([one for outcome in runs if (one := run_joules(outcome)) is not None] for runs in (base, other))
    if len(ours) < len(base) or len(theirs) < len(other):
        return None
    changes = [b - a for a, b in zip(ours, theirs, strict=True)]
    return EnergyDifference(
        pairs=len(changes),
        mean=fmean(changes),
        deviation=stdev(changes) if len(changes) > 1 else 0.0,
        evidence=weigh(ours, theirs),
        claim=judge(ours, theirs),
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
