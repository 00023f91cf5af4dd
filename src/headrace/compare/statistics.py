"""What paired rounds say: a ratio with its interval, how likely chance alone does as much, and the noise floor.

The figure of interest is the paired log ratio of each round, d = ln(base / other): rounds share the machine's slow
drifts, so a pair does not see them. The ratio is exp(median d); its interval is a bootstrap over rounds; the p-value
is that of a sign-flip test, in which equal methods give d and -d equally often. Nothing is assumed of the noise but
that symmetry. Random draws have a fixed seed, so the same seconds always say the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from headrace.compare.figures import TICK_S

SEED = 20241203
RESAMPLES = 10_000
"""Of the bootstrap."""
ITSELF = 1000
"""Comparisons of the base with itself that are drawn, where rounds have several runs."""
EXACT_ROUNDS = 14
"""Up to so many rounds all 2^R patterns of signs are counted; beyond, DRAWS of them are drawn."""
DRAWS = 20_000
LEVEL = 0.01
"""How often two equal methods may at most be told apart by mistake, where there are ENOUGH rounds."""
ENOUGH = 8
"""Fewest rounds whose best p-value, 2 / 2^R, is ≤ LEVEL."""
FEW_LEVEL = 0.05
"""The same where there are fewer rounds (`few_agree`)."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the pairs of two methods' rounds say. Ratios are base / other: above 1 the other needs less."""

    pairs: int
    ratio: float
    """exp(median of the log ratios)."""
    interval: tuple[float, float]
    """95 % bootstrap interval of the ratio."""
    interval_99: tuple[float, float]
    p_value: float
    """Two-sided, of the sign-flip test."""
    floor: float
    """≥ 1: how far from 1 the base against itself comes by noise alone (`noise_floor`)."""

    @property
    def beyond_floor(self) -> bool:
        """Whether the interval leaves out 1, and the ratio is farther from 1 than noise alone brings it."""
        low, high = self.interval
        return (low > 1 and self.ratio > self.floor) or (high < 1 and self.ratio < 1 / self.floor)

    @property
    def level(self) -> float | None:
        """At which a claim of so many pairs holds; None: they are too few for one."""
        return claim_level(self.pairs)


def claim_level(rounds: int) -> float | None:
    """How often a claim from so many rounds may be a mistake; None: so few rounds cannot support one."""
    if rounds >= ENOUGH:
        return LEVEL
    return FEW_LEVEL if 1 / math.comb(2 * rounds, rounds) <= FEW_LEVEL else None


def log_ratios(base: Sequence[float], other: Sequence[float]) -> Floats:
    """ln(base / other), round by round. What did not move counts as TICK_S."""
    pair = np.maximum(np.array([base, other], np.float64), TICK_S)
    ratios: Floats = np.log(pair[0]) - np.log(pair[1])
    return ratios


def weigh(base: Sequence[float], other: Sequence[float], passes: Sequence[Sequence[float]] = ()) -> Evidence:
    """All that the pairs say. `base`, `other`: the same figure (seconds, joules) of the same rounds, at least one;
    `passes`: of the base, for `noise_floor`."""
    d = log_ratios(base, other)
    drawn = np.median(_resampled(d, len(d)), axis=1)
    low99, low, high, high99 = (float(value) for value in np.exp(np.quantile(drawn, (0.005, 0.025, 0.975, 0.995))))
    return Evidence(
        pairs=len(d),
        ratio=float(np.exp(np.median(d))),
        interval=(low, high),
        interval_99=(low99, high99),
        p_value=sign_flip_p(d),
        floor=noise_floor(base, passes),
    )


def sign_flip_p(d: Floats) -> float:
    """Two-sided p-value of the sign-flip permutation test on the signed ranks of `d`.

    Ranks instead of the values: one round that something else disturbed cannot outweigh all others. Zeros count for
    neither side, equal sizes share their ranks.
    """
    ranks = _ranks(np.abs(d)) * (d != 0)
    found = abs(float(np.sum(ranks * np.sign(d))))
    signs = _all_signs(len(d)) if len(d) <= EXACT_ROUNDS else _drawn_signs(len(d))
    as_large = int(np.count_nonzero(np.abs(signs @ ranks) >= found - 1e-9))
    if len(d) <= EXACT_ROUNDS:
        return as_large / len(signs)
    return (as_large + 1) / (len(signs) + 1)


def noise_floor(base: Sequence[float], passes: Sequence[Sequence[float]] = ()) -> float:
    """exp of the 95 % point of |median d| that as many pairs of the base against itself would give.

    A hidden comparison of the base with itself, out of runs that are there anyway. Where a round has several runs of
    the base (`passes`, the seconds of each round's), what they differ by within their round is drawn again for both
    sides of each pair, and each side's median taken. Else each round is held against the mean of the two beside it.
    What the machine drifts by within three rounds, which the pairs of a round do not have, is then left in, so that
    floor is rather too high. Not the halves of the rounds: they differ by all of the drift. 1 where there are fewer
    than three rounds of one run each.
    """
    if passes and all(len(one) > 1 for one in passes):
        d = _pairs_of_itself(passes)
    elif len(base) >= 3:
        logs = np.log(np.maximum(np.array(base, np.float64), TICK_S))
        # Of noise with variance v this difference has 1.5 v, a pair 2 v.
        steps = (logs[1:-1] - (logs[:-2] + logs[2:]) / 2) * math.sqrt(2 / 1.5)
        d = _resampled(np.concatenate((steps, -steps)), len(base))
    else:
        return 1.0
    return float(np.exp(np.quantile(np.abs(np.median(d, axis=1)), 0.95)))


def _pairs_of_itself(passes: Sequence[Sequence[float]]) -> Floats:
    """[ITSELF, rounds], log ratios of the base's round to itself, each side the median of as many runs as it has."""
    residuals = []
    for one in passes:
        logs = np.log(np.maximum(np.array(one, np.float64), TICK_S))
        # A median of n runs lies nearer to them than the truth does.
        residuals.append((logs - np.median(logs)) * math.sqrt(len(one) / (len(one) - 1)))
    pool = np.concatenate(residuals)
    runs = len(passes[0])
    drawn = pool[np.random.default_rng(SEED).integers(0, len(pool), (ITSELF, len(passes), 2, runs))]
    sides: Floats = np.median(drawn, axis=3)
    return sides[:, :, 0] - sides[:, :, 1]


def few_agree(base: Sequence[float], other: Sequence[float]) -> bool:
    """The rule for 3 to 7 rounds, where the test above cannot reach LEVEL: whether all pairs are on one side, and so
    clearly that two equal methods look like this in at most 5 % of comparisons, either way counted alone.

    R pairs all on one side have the chance 2^-R (sign test), two sets of R that do not overlap at all 1 / C(2R, R)
    (rank test): five rounds can do by pairs alone, three or four must not overlap.
    """
    d = log_ratios(base, other)
    if not (np.all(d > 0) or np.all(d < 0)):
        return False
    return bool(2.0 ** -len(d) <= FEW_LEVEL or max(other) < min(base) or max(base) < min(other))


def _resampled(values: Floats, size: int) -> Floats:
    """RESAMPLES rows of `size` values, drawn with replacement."""
    return values[np.random.default_rng(SEED).integers(0, len(values), (RESAMPLES, size))]


def _ranks(sizes: Floats) -> Floats:
    """1 for the smallest; equal sizes share the mean of theirs. Differences below 1e-12 are rounding."""
    rounded = np.round(sizes, 12)
    _, inverse, counts = np.unique(rounded, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: Floats = ((ends - counts + 1 + ends) / 2)[inverse]
    return means


@cache
def _all_signs(rounds: int) -> Floats:
    """[2^rounds, rounds], every pattern of -1 and 1."""
    bits = np.arange(2**rounds)[:, None] >> np.arange(rounds)[None, :] & 1
    return bits.astype(np.float64) * 2 - 1


@cache
def _drawn_signs(rounds: int) -> Floats:
    """[DRAWS, rounds]"""
    return np.random.default_rng(SEED).integers(0, 2, (DRAWS, rounds)).astype(np.float64) * 2 - 1
