"""A random forest that predicts how long a matrix product takes, beside the roofline it has to beat.

After GPPerf (planning by random forest: 100 trees of depth 6, features m, n, k, precision, intensity, bytes, FLOPs),
with two changes. Its split was random, so that the same shapes were in both halves; here the weights of a held-out
shape (n, k) are in no training folds, whatever their rows or precision. And the forest learns the logarithm of measured
time over the roofline's, so that size itself, which trees cannot continue beyond what they saw, is left to the formula.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from random import Random
from typing import Any, Literal

from headrace.core.errors import BackendUnavailable, InvalidParameter
from headrace.plan.gemm_sweep import Point, Product, Sweep
from headrace.plan.probe_programs import BITS

TREES, DEPTH, SEED = 100, 6, 42
FOLDS = 5
"""Every shape is held out once, with a fifth of the others."""
FEWEST_SHAPES, FEWEST_POINTS = 10, 50
"""Of a sweep that is learnt from: different weights, points in all."""
FEWEST_WATTS = 20
"""Points with a measured power, for power to be predicted."""
LEVEL = 0.8
"""Of intervals."""
Method = Literal["forest", "roofline", "scaled roofline"]
METHODS: tuple[Method, ...] = ("roofline", "scaled roofline", "forest")
"""The simplest first: of two that are equally good it is taken."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The roofline of some points: the highest rates seen among them."""

    bandwidth: float
    """Bytes/s."""
    peaks: Mapping[str, float]
    """Precision -> FLOP/s."""
    scales: Mapping[str, float]
    """Precision -> median of measured time / roofline's."""

    @classmethod
    def of(cls, points: Sequence[Point]) -> Ceilings:
        bandwidth = max(one.product.nbytes / one.seconds for one in points)
        peaks: dict[str, float] = defaultdict(float)
        for one in points:
            precision = one.product.precision
            peaks[precision] = max(peaks[precision], one.product.flops / one.seconds)
        plain = cls(bandwidth, dict(peaks), dict.fromkeys(peaks, 1.0))
        over: dict[str, list[float]] = defaultdict(list)
        for one in points:
            over[one.product.precision].append(one.seconds / plain.seconds(one.product))
        return cls(bandwidth, plain.peaks, {name: statistics.median(all_) for name, all_ in over.items()})

    def seconds(self, product: Product) -> float:
        """max(bytes / bandwidth, FLOPs / peak); a precision that was not seen has the peak of the slowest."""
        peak = self.peaks.get(product.precision) or min(self.peaks.values())
        return max(product.nbytes / self.bandwidth, product.flops / peak)

    def scaled_seconds(self, product: Product) -> float:
        return self.seconds(product) * self.scales.get(product.precision, 1.0)


class Forest:
    """Trained on points; the same points always give the same forest."""

    def __init__(self, points: Sequence[Point]) -> None:
        """Raises BackendUnavailable without scikit-learn."""
        self.ceilings = Ceilings.of(points)
        self._watts: Any = None
        self.watts: float | None = None
        """Median power of the points; None: too few have one."""
        products = [one.product for one in points]
        over = [math.log(one.seconds / self.ceilings.seconds(one.product)) for one in points]
        self._seconds = _regressor().fit(self._features(products), over)
        known = [(one.product, one.watts) for one in points if one.watts is not None]
        if len(known) >= FEWEST_WATTS:
            self.watts = statistics.median(watts for _, watts in known)
            logs = [math.log(watts) for _, watts in known]
            self._watts = _regressor().fit(self._features([product for product, _ in known]), logs)

    def seconds(self, products: Sequence[Product]) -> list[float]:
        found = self._seconds.predict(self._features(products)).tolist()
        return [self.ceilings.seconds(one) * math.exp(over) for one, over in zip(products, found, strict=True)]

    def power(self, products: Sequence[Product]) -> list[float] | None:
        """Watts; None where too few points have one."""
        if self._watts is None:
            return None
        return [math.exp(log) for log in self._watts.predict(self._features(products)).tolist()]

    def _features(self, products: Sequence[Product]) -> list[list[float]]:
        codes = list(BITS)
        return [
            [
                *map(math.log, (one.m, one.n, one.k, one.flops, one.nbytes, one.flops / one.nbytes)),
                math.log(self.ceilings.seconds(one)),
                codes.index(one.precision),
            ]
            for one in products
        ]


def require_forest() -> Any:
    """scikit-learn's module of forests. Raises BackendUnavailable without it."""
    try:
        return import_module("sklearn.ensemble")
    except ImportError as error:
        raise BackendUnavailable("the GEMM predictor needs scikit-learn: pip install 'headrace[plan]'") from error


def _regressor() -> Any:
    return require_forest().RandomForestRegressor(TREES, max_depth=DEPTH, random_state=SEED)


@dataclass(frozen=True, slots=True)
class Score:
    """Of predictions of points that were held out."""

    points: int
    r2: float
    """Of the logarithm."""
    median_error: float
    """Median of |predicted - measured| / measured."""
    high_error: float
    """LEVEL of the points have a smaller |ln(predicted / measured)|."""

    @classmethod
    def of(cls, measured: Sequence[float], predicted: Sequence[float]) -> Score:
        logs = [math.log(one) for one in measured]
        errors = [math.log(guess) - log for guess, log in zip(predicted, logs, strict=True)]
        mean = statistics.fmean(logs)
        total = math.fsum((log - mean) ** 2 for log in logs)
        left = math.fsum(error**2 for error in errors)
        ordered = sorted(map(abs, errors))
        rank = min(len(ordered), math.ceil((len(ordered) + 1) * LEVEL))
        return cls(
            points=len(ordered),
            r2=1 - left / total if total else -math.inf,
            median_error=statistics.median(abs(math.expm1(error)) for error in errors),
            high_error=ordered[rank - 1],
        )


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What each method says of every point, none of whose shape it had seen."""

    points: Sequence[Point]
    seconds: Mapping[Method, Sequence[float]]
    folds: Mapping[tuple[int, int], int]
    """Shape -> the fold that held it out."""
    powered: Sequence[Point]
    """Points with a measured power."""
    watts: Sequence[float]
    """Of `powered`, by the forest; empty where no power is predicted."""
    constant_watts: Sequence[float]
    """Of `powered`, by the median of the training folds: the forest's baseline."""

    def score(self, method: Method, precision: str | None = None) -> Score:
        """`precision`: of its points alone."""
        chosen = [
            (one.seconds, guess)
            for one, guess in zip(self.points, self.seconds[method], strict=True)
            if precision in (None, one.product.precision)
        ]
        return Score.of([one for one, _ in chosen], [guess for _, guess in chosen])

    def best(self, precision: str) -> Method:
        """The method of the smallest median error. The forest only where it beats both rooflines."""
        return min(METHODS, key=lambda method: self.score(method, precision).median_error)

    @property
    def power_score(self) -> Score | None:
        return Score.of([one.watts or 0.0 for one in self.powered], self.watts) if self.watts else None

    @property
    def constant_power_score(self) -> Score | None:
        return Score.of([one.watts or 0.0 for one in self.powered], self.constant_watts) if self.watts else None


def split(shapes: Sequence[tuple[int, int]], folds: int = FOLDS, seed: int = SEED) -> dict[tuple[int, int], int]:
    """Shape -> its fold. All points of a shape, of any rows and precision, are in one fold."""
    ordered = sorted(set(shapes))
    Random(seed).shuffle(ordered)
    return {shape: index % folds for index, shape in enumerate(ordered)}


def hold_out(points: Sequence[Point]) -> HeldOut:
    """Trains FOLDS forests, each without a fifth of the shapes. Raises BackendUnavailable, InvalidParameter."""
    folds = split([one.product.shape for one in points])
    if len(folds) < FEWEST_SHAPES or len(points) < FEWEST_POINTS:
        allowed = f"at least {FEWEST_SHAPES} different weights and {FEWEST_POINTS} points, to hold some out"
        raise InvalidParameter("sweep.points", f"{len(folds)} weights, {len(points)} points", allowed)
    seconds: dict[Product, dict[Method, float]] = {}
    watts: dict[Product, tuple[float, float]] = {}
    for fold in range(FOLDS):
        inside = [one for one in points if folds[one.product.shape] != fold]
        outside = [one.product for one in points if folds[one.product.shape] == fold]
        forest = Forest(inside)
        ceilings = forest.ceilings
        for product, guess in zip(outside, forest.seconds(outside), strict=True):
            seconds[product] = {
                "forest": guess,
                "roofline": ceilings.seconds(product),
                "scaled roofline": ceilings.scaled_seconds(product),
            }
        if (power := forest.power(outside)) is not None and forest.watts is not None:
            watts |= {product: (guess, forest.watts) for product, guess in zip(outside, power, strict=True)}
    powered = [one for one in points if one.watts is not None and one.product in watts]
    return HeldOut(
        points=points,
        seconds={method: [seconds[one.product][method] for one in points] for method in METHODS},
        folds=folds,
        powered=powered,
        watts=[watts[one.product][0] for one in powered],
        constant_watts=[watts[one.product][1] for one in powered],
    )


@dataclass(frozen=True, slots=True)
class Prediction:
    product: Product
    seconds: float
    low: float | None
    high: float | None
    """Of seconds: LEVEL of the held-out errors of this method and precision are inside. None outside of the sweep,
    where no error was ever measured."""
    method: Method
    joules: float | None
    """None: no power was measured."""
    inside: bool
    """Whether m, n, k and the weight's size are within what was swept."""


class Predictor:
    """A forest trained on a whole sweep, and what its shape-split error is."""

    def __init__(self, sweep: Sweep) -> None:
        """Raises BackendUnavailable, InvalidParameter."""
        self.sweep = sweep
        self.held_out = hold_out(sweep.points)
        self._forest = Forest(sweep.points)
        products = [one.product for one in sweep.points]
        self.precisions = tuple(name for name in BITS if any(one.precision == name for one in products))
        self._bounds = tuple(
            (min(values), max(values)) for values in zip(*(self._sizes(one) for one in products), strict=True)
        )

    @property
    def ceilings(self) -> Ceilings:
        """Of the whole sweep."""
        return self._forest.ceilings

    def method(self, product: Product) -> Method:
        """The best one on held-out shapes of its precision. Outside of the sweep, which trees cannot continue, a
        roofline."""
        best = self.held_out.best(product.precision)
        return best if best != "forest" or self._is_inside(product) else "scaled roofline"

    def predict(self, products: Sequence[Product]) -> list[Prediction]:
        """Raises InvalidParameter for a precision that was not swept."""
        for product in products:
            if product.precision not in self.precisions:
                raise InvalidParameter("product.precision", product.precision, ", ".join(self.precisions))
        guesses = self._forest.seconds(products)
        power: Sequence[float | None] = self._forest.power(products) or [None] * len(products)
        found = []
        for product, guess, watts in zip(products, guesses, power, strict=True):
            method = self.method(product)
            if method != "forest":
                ceilings = self.ceilings
                guess = ceilings.seconds(product) if method == "roofline" else ceilings.scaled_seconds(product)
            joules = None if watts is None else watts * guess
            inside = self._is_inside(product)
            low, high = None, None
            if inside:
                wide = math.exp(self.held_out.score(method, product.precision).high_error)
                low, high = guess / wide, guess * wide
            found.append(Prediction(product, guess, low, high, method, joules, inside))
        return found

    @staticmethod
    def _sizes(product: Product) -> tuple[int, int, int, int]:
        return product.m, product.n, product.k, product.n * product.k

    def _is_inside(self, product: Product) -> bool:
        sizes = self._sizes(product)
        return all(low <= size <= high for size, (low, high) in zip(sizes, self._bounds, strict=True))
