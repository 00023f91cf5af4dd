"""From which arrival rate on one method is better than another: the crossing of two curves, with its interval.

Both methods are measured at rates spread evenly on a logarithmic scale, in pairs, first one and then the other first.
ln(second / first) over ln(rate) is fitted by the nearest curve that only rises or only falls (isotonic regression,
straight between the points); the first is better where it is above 0. Then the rate at which the fit is 0 is measured
again and again, each time closer, until the crossing's 90 % interval is within ±15 % of it, or the time is over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from headrace.compare.figures import TICK_S
from headrace.compare.statistics import LEVEL
from headrace.core.errors import InvalidParameter

POINTS = (5, 7)
"""Fewest and most rates of the first sweep."""
CLOSE = 0.15
"""The interval's ends are at most so far from the crossing, as a share of it."""
CONFIDENCE = 0.9
NOMINAL = 0.95
"""Of the bootstrap, for an interval that covers CONFIDENCE: straight lines between the rates and stopping once it looks
narrow take a few points (on simulated servers 90 % covered 0.87, 95 % about 0.93)."""
RESAMPLES = 1000
SEED = 20241203

Measure = Callable[[str, float], float]
"""(method, arrival rate in requests/s) -> seconds, such as the mean latency; less is better, > 0."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Where two methods change places between the rates `low` and `high`, in requests/s."""

    methods: tuple[str, str]
    low: float
    high: float
    measured: Mapping[float, tuple[float, ...]]
    """Rate -> ratio of each pair: second method's seconds / first's; above 1 the first is better."""
    crossing: float | None
    """None: there is none in the range, or none that could be told from noise."""
    interval: tuple[float, float] | None
    """90 % bootstrap interval of the crossing, cut to the range."""
    winner: str | None
    """Better above the crossing, or, without one, everywhere in the range; None: no measurable difference."""
    finished: bool
    """Whether the interval is as narrow as was wanted, or one method wins everywhere; False: time or pairs ran out."""

    def __str__(self) -> str:
        span = f"{self.low:g}–{self.high:g} requests/s"
        cut = "" if self.finished else " (measuring ended before this was settled)"
        if self.winner is None:
            return f"{self.methods[0]} and {self.methods[1]}: no measurable difference in {span}"
        if self.crossing is None or self.interval is None:
            return f"{self.winner} wins everywhere in {span}{cut}"
        below = self.methods[1 - self.methods.index(self.winner)]
        low, high = self.interval
        return (
            f"{self.winner} is better from {self.crossing:.3g} requests/s on (90 % interval {low:.3g}–{high:.3g}), "
            f"{below} below{cut}"
        )


@dataclass(slots=True)
class _Curve:
    """What was measured so far, and what it says."""

    methods: tuple[str, str]
    measure: Measure
    pairs: dict[float, list[float]] = field(default_factory=dict)
    """ln(rate) -> ln(second / first) of every pair."""
    count: int = 0
    """Pairs."""

    def add(self, x: float) -> None:
        """One pair at this rate; every other one begins with the second method."""
        rate = math.exp(x)
        order = self.methods if self.count % 2 == 0 else self.methods[::-1]
        seconds = {method: max(self.measure(method, rate), TICK_S) for method in order}
        self.count += 1
        self.pairs.setdefault(x, []).append(math.log(seconds[self.methods[1]] / seconds[self.methods[0]]))

    def arrays(self) -> tuple[Floats, Floats, Floats]:
        """ln(rates), mean ln(ratio) at each, number of pairs of each."""
        xs = sorted(self.pairs)
        means = [math.fsum(self.pairs[x]) / len(self.pairs[x]) for x in xs]
        return np.array(xs), np.array(means), np.array([float(len(self.pairs[x])) for x in xs])

    def noise(self) -> float:
        """Standard deviation of one pair: pooled over the rates, that of pairs about their own rate's mean."""
        squares = math.fsum(
            (one - math.fsum(found) / len(found)) ** 2 for found in self.pairs.values() for one in found
        )
        freedom = sum(map(len, self.pairs.values())) - len(self.pairs)
        return math.sqrt(squares / freedom)


@dataclass(frozen=True, slots=True)
class _Found:
    """What the bootstrap says. `x`, `low`, `high`: ln of the crossing and of its interval's ends, in the range."""

    x: float
    low: float
    high: float
    rises: bool
    """Whether the first method gains as the rate rises."""
    winner: int | None
    """The method that is better in the whole range, 0 or 1, in at least CONFIDENCE of the resamples."""
    bracket: tuple[float, float]
    """ln of the rates measured next to `x`, below it and above."""

    @property
    def settled(self) -> bool:
        ends = (self.low, self.high, *self.bracket)
        close = all(abs(end - self.x) <= math.log1p(CLOSE) for end in ends)
        return self.winner is not None or close


def break_even(
    measure: Measure,
    methods: tuple[str, str],
    low: float,
    high: float,
    points: int = 6,
    repeats: int = 3,
    most_pairs: int = 60,
    go_on: Callable[[], bool] = lambda: True,
) -> BreakEven:
    """Finds where `methods` change places between the rates `low` and `high`.

    First `points` rates (5 to 7), `repeats` pairs at each (2 or more), round by round; then pairs where the crossing
    seems to be, up to `most_pairs` in all. `go_on` is asked before each step that can be left out (the first two rounds
    cannot: they tell the noise); where it says no, what was measured has to do. One crossing at most is looked for: the
    advantage is taken to rise or to fall with the rate. Raises InvalidParameter, and what `measure` raises.
    """
    _check(methods, low, high, points, repeats, most_pairs)
    curve = _Curve(methods, measure)
    sweep = [float(x) for x in np.linspace(math.log(low), math.log(high), points)]
    for index in range(repeats):
        for x in sweep:
            if index < 2 or go_on():
                curve.add(x)
    found, differs = _look(curve), False
    while True:
        differs = differs or _differs(curve)
        if differs and found.settled:
            break
        # Without a difference there is nothing to close in on: it is looked for again only after a whole sweep more.
        wanted = [_next_rate(curve, found)] if differs else sweep
        if curve.count + len(wanted) > most_pairs or not go_on():
            break
        for x in wanted:
            curve.add(x)
        found = _look(curve)
    return _result(curve, low, high, found, differs)


def _check(methods: tuple[str, str], low: float, high: float, points: int, repeats: int, most_pairs: int) -> None:
    if methods[0] == methods[1]:
        raise InvalidParameter("methods", methods, "two different ones")
    if not (math.isfinite(low) and low > 0):
        raise InvalidParameter("low", low, "requests/s > 0")
    if not (math.isfinite(high) and high > low):
        raise InvalidParameter("high", high, f"requests/s > {low:g}")
    if not POINTS[0] <= points <= POINTS[1]:
        raise InvalidParameter("points", points, f"an integer from {POINTS[0]} to {POINTS[1]}")
    if repeats < 2:
        raise InvalidParameter("repeats", repeats, "an integer ≥ 2")
    if most_pairs < points * repeats:
        raise InvalidParameter("most_pairs", most_pairs, f"an integer ≥ points × repeats, {points * repeats}")


def _next_rate(curve: _Curve, found: _Found) -> float:
    """ln of the rate to measure next.

    While the rates on both sides of the crossing are far from it, the middle between them: the straight line there is
    a guess. Then the crossing and its interval's ends in turn, but a rate that was measured already where the new one
    would be nearer to it than a quarter of what is wanted: pairs at the same rate say how large the noise is.
    """
    below, above = found.bracket
    if above - below > 2 * math.log1p(CLOSE):
        return (below + above) / 2
    wanted = (found.x, found.low, found.high)[curve.count % 3]
    nearest = min(curve.pairs, key=lambda x: abs(x - wanted))
    return nearest if abs(nearest - wanted) < math.log1p(CLOSE) / 4 else wanted


def _look(curve: _Curve) -> _Found:
    """The fit, and a parametric bootstrap of it: each rate's mean with the noise that its number of pairs leaves."""
    xs, means, weights = curve.arrays()
    rises = _misfit(means[None, :], weights)[0] <= _misfit(-means[None, :], weights)[0]
    sign = 1.0 if rises else -1.0
    fits = isotonic(sign * (means + _noise(curve, weights)), weights)
    # A resample that begins above 0 crosses below the range, one that ends below 0 above it.
    crossings = np.clip(_crossings(xs, fits), xs[0], xs[-1])
    tail = (1 - NOMINAL) / 2
    low, high = np.quantile(crossings, (tail, 1 - tail), method="nearest")
    best = np.clip(_crossings(xs, isotonic(sign * means[None, :], weights))[0], xs[0], xs[-1])
    ahead = (np.mean(fits[:, 0] > 0), np.mean(fits[:, -1] < 0))
    sure = [index for index, share in enumerate(ahead) if share >= CONFIDENCE]
    winner = None if not sure else sure[0] if rises else 1 - sure[0]
    below, above = float(xs[xs <= best].max()), float(xs[xs >= best].min())
    return _Found(float(best), float(low), float(high), bool(rises), winner, (below, above))


def _noise(curve: _Curve, weights: Floats) -> Floats:
    """[RESAMPLES, rates], what chance adds to the mean at each rate.

    Its size is only estimated, from few pairs; so each resample has one drawn from what is known of it (scaled inverse
    chi-square), which gives the tails of a t distribution.
    """
    rng = np.random.default_rng(SEED)
    freedom = float(weights.sum() - len(weights))
    sizes = curve.noise() * np.sqrt(freedom / rng.chisquare(freedom, (RESAMPLES, 1)))
    drawn: Floats = sizes * rng.standard_normal((RESAMPLES, len(weights))) / np.sqrt(weights)
    return drawn


def _differs(curve: _Curve) -> bool:
    """Whether the best curve explains more than it does of noise about 0 in all but LEVEL of comparisons."""
    _, means, weights = curve.arrays()
    found, chance = (
        np.sum(weights * values**2, axis=1) - np.minimum(_misfit(values, weights), _misfit(-values, weights))
        for values in (means[None, :], _noise(curve, weights))
    )
    return bool(found[0] > np.quantile(chance, 1 - LEVEL))


def _misfit(values: Floats, weights: Floats) -> Floats:
    """[rows, n] -> [rows]: squares left by the nearest rising curve."""
    left: Floats = np.sum(weights * (values - isotonic(values, weights)) ** 2, axis=1)
    return left


def isotonic(values: Floats, weights: Floats) -> Floats:
    """[rows, n] -> [rows, n]: of each row the rising curve that is nearest in least squares, `weights` [n].

    Fit i is the largest, over all beginnings j ≤ i, of the smallest mean of j … k over all ends k ≥ i.
    """
    n = len(weights)
    sums = np.concatenate((np.zeros((len(values), 1)), np.cumsum(values * weights, axis=1)), axis=1)
    totals = np.concatenate((np.zeros(1), np.cumsum(weights)))
    fitted = np.full_like(values, -np.inf)
    for first in range(n):
        means = (sums[:, first + 1 :] - sums[:, first : first + 1]) / (totals[first + 1 :] - totals[first])
        smallest = np.minimum.accumulate(means[:, ::-1], axis=1)[:, ::-1]
        fitted[:, first:] = np.maximum(fitted[:, first:], smallest)
    return fitted


def _crossings(xs: Floats, fits: Floats) -> Floats:
    """Where each rising row is 0; -inf where it begins above 0, inf where it ends below."""
    rows = np.arange(len(fits))
    after = np.argmax(fits >= 0, axis=1)
    ends_below = fits[:, -1] < 0
    before = np.maximum(after - 1, 0)
    left, right = fits[rows, before], fits[rows, after]
    share = np.divide(-left, right - left, out=np.zeros_like(left), where=right > left)
    inside: Floats = xs[before] + share * (xs[after] - xs[before])
    inside[(after == 0) & (fits[:, 0] > 0)] = -np.inf
    inside[ends_below] = np.inf
    return inside


def _result(curve: _Curve, low: float, high: float, found: _Found, differs: bool) -> BreakEven:
    crossing = interval = winner = None
    if differs and found.winner is not None:
        winner = curve.methods[found.winner]
    elif differs:
        winner = curve.methods[0 if found.rises else 1]
        crossing = min(max(math.exp(found.x), low), high)
        interval = (max(math.exp(found.low), low), min(math.exp(found.high), high))
    measured = {math.exp(x): tuple(map(math.exp, pairs)) for x, pairs in sorted(curve.pairs.items())}
    return BreakEven(curve.methods, low, high, measured, crossing, interval, winner, differs and found.settled)
