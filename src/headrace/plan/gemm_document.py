"""What `headrace plan gemm` answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headrace.plan.document import Column, Document, Plot, Quantity, Series, Table, Value
from headrace.plan.gemm import DEPTH, FOLDS, LEVEL, METHODS, SEED, TREES, Method, Prediction, Predictor, Score
from headrace.plan.gemm_sweep import ROUNDS, Product

R2 = "1 - Σ(y - ŷ)² / Σ(y - mean y)², y = ln seconds, of points whose weight's shape was held out"
MEDIAN = "median of |predicted - measured| / measured, of points whose weight's shape was held out"
ROOFLINE = "max(bytes / bandwidth, FLOPs / peak): the highest rates of the training folds"
SCALED = "roofline × the median of measured / roofline in the training folds, by precision"
FOREST = f"roofline × exp(forest), {TREES} trees of depth {DEPTH}, seed {SEED}"
FORMULAS: Mapping[Method, str] = {"forest": FOREST, "roofline": ROOFLINE, "scaled roofline": SCALED}
QUICKEST = f"of the quickest of {ROUNDS} rounds, as the sweep keeps it"
ASKED = "as asked"
GPPERF = "GPPerf, random-forest predictor of GEMM time and power"
LEAKAGE = (
    f"Errors are of shapes that were held out: {FOLDS} folds, and all points of a weight's shape are in one of them. "
    f"GPPerf's R² of 0.98 (time) and 0.78 (power) come from a random split, with the same shapes in both halves."
)


def describe(predictor: Predictor, asked: Sequence[Product]) -> Document:
    """Raises InvalidParameter for a precision that was not swept."""
    predictions = predictor.predict(asked) if asked else []
    tables = [_errors(predictor)]
    if predictions:
        tables.insert(0, _predictions(predictor, predictions))
    return Document(
        title="Matrix products",
        quantities=[*_scores(predictor), *_power(predictor), *_ceilings(predictor)],
        tables=tables,
        plots=[_plot(predictor)],
        notes=_notes(predictor, predictions),
        data={
            "predictions": [_as_data(one) for one in predictions],
            "held_out": {method: _score_data(predictor.held_out.score(method)) for method in METHODS},
            "folds": [[n, k, fold] for (n, k), fold in sorted(predictor.held_out.folds.items())],
        },
    )


def _source(predictor: Predictor) -> str:
    sweep = predictor.sweep
    return (
        f"sweep of {sweep.machine}, {sweep.threads} threads, {sweep.instruction_set}, headrace {sweep.version}, "
        f"{sweep.measured_at}"
    )


def _scores(predictor: Predictor) -> list[Quantity]:
    found = []
    source = f"{_source(predictor)}; split by shape, method after {GPPERF}"
    for method in METHODS:
        score = predictor.held_out.score(method)
        formula = FORMULAS[method]
        found += [
            Quantity(f"R² of log time, {method}", round(score.r2, 4), "", f"{R2}; {formula}", source, "measured"),
            Quantity(
                f"median error, {method}", _percent(score.median_error), "%", f"{MEDIAN}; {formula}", source, "measured"
            ),
        ]
    return found


def _power(predictor: Predictor) -> list[Quantity]:
    score, constant = predictor.held_out.power_score, predictor.held_out.constant_power_score
    formula = "median of |predicted - measured| / measured watts, of points whose weight's shape was held out"
    if score is None or constant is None:
        note = "not predicted: no meter that this process may read (RAPL); an estimate from the load is no measurement"
        return [Quantity("median error of power", None, "%", formula, _source(predictor), "measured", note=note)]
    source = f"{_source(predictor)}; meter: {predictor.sweep.meter}"
    return [
        Quantity("R² of log power, forest", round(score.r2, 4), "", R2.replace("seconds", "watts"), source, "measured"),
        Quantity("median error of power, forest", _percent(score.median_error), "%", formula, source, "measured"),
        Quantity(
            "median error of power, constant",
            _percent(constant.median_error),
            "%",
            f"{formula}; the median power of the training folds",
            source,
            "measured",
        ),
    ]


def _ceilings(predictor: Predictor) -> list[Quantity]:
    ceilings, source = predictor.ceilings, _source(predictor)
    best = "the highest of all products"
    return [
        Quantity(
            "bandwidth", round(ceilings.bandwidth / 1e9, 2), "GB/s", f"bytes / seconds, {best}", source, "measured"
        ),
        *(
            Quantity(
                f"peak, {name}",
                round(ceilings.peaks[name] / 1e9, 1),
                "GFLOP/s",
                f"2mnk / seconds, {best}",
                source,
                "measured",
            )
            for name in predictor.precisions
        ),
    ]


def _errors(predictor: Predictor) -> Table:
    source = _source(predictor)
    columns = [
        Column("precision"),
        Column("method", "", _methods()),
        Column("points", "", "of the sweep, held out", source),
        Column("R² of log time", "", R2, source),
        Column("median error", "%", MEDIAN, source),
        Column("used", "", "the method with the smallest median error"),
    ]
    rows: list[list[Value]] = []
    for precision in predictor.precisions:
        best = predictor.held_out.best(precision)
        for method in METHODS:
            score = predictor.held_out.score(method, precision)
            used = "yes" if method == best else "no"
            rows.append([precision, method, score.points, round(score.r2, 3), _percent(score.median_error), used])
    return Table("Held-out error", columns, rows, named_by=2)


def _methods() -> str:
    return "; ".join(f"{name}: {formula}" for name, formula in FORMULAS.items())


def _predictions(predictor: Predictor, predictions: Sequence[Prediction]) -> Table:
    source = _source(predictor)
    interval = f"{LEVEL:.0%} of the held-out errors of this method and precision are inside; none outside of the sweep"
    columns = [
        Column("m", "", ASKED),
        Column("n", "", ASKED),
        Column("k", "", ASKED),
        Column("precision"),
        Column("time", "µs", f"by the method named in the row; {QUICKEST}", source),
        Column("low", "µs", interval, source),
        Column("high", "µs", interval, source),
        Column("rate", "GFLOP/s", "2mnk / time", source),
        Column("energy", "J", "time × predicted power", source),
        Column("method", "", _methods()),
    ]
    rows = [
        [
            one.product.m,
            one.product.n,
            one.product.k,
            one.product.precision,
            *(None if value is None else _figures(value * 1e6) for value in (one.seconds, one.low, one.high)),
            _figures(one.product.flops / one.seconds / 1e9),
            None if one.joules is None else _figures(one.joules),
            one.method,
        ]
        for one in predictions
    ]
    return Table("Predicted", columns, rows, named_by=4)


def _plot(predictor: Predictor) -> Plot:
    held_out = predictor.held_out
    measured = [one.seconds * 1e6 for one in held_out.points]

    def dots(method: Method) -> Series:
        guesses = [seconds * 1e6 for seconds in held_out.seconds[method]]
        return Series(method, list(zip(measured, guesses, strict=True)), "dots")

    ends = (min(measured), max(measured))
    series = [dots("roofline"), dots("forest"), Series("equal", [(end, end) for end in ends], "dashed")]
    return Plot("Held-out shapes", "measured, µs", "predicted, µs", series, log_x=True, log_y=True)


def _notes(predictor: Predictor, predictions: Sequence[Prediction]) -> list[str]:
    sweep = predictor.sweep
    notes = [
        f"{len(sweep.points)} products of {len(predictor.held_out.folds)} weights; {_source(predictor)}.",
        LEAKAGE,
        "A product is one operation of an engine's step: weights from memory, activations there and, for int8 and "
        "int4, already quantised.",
    ]
    if sweep.busy:
        notes.append(
            f"The machine was busy during the sweep: other programs used {sweep.busy_cores:.1f} of {sweep.cores} "
            f"cores, and a product's times were {sweep.spread:.0%} apart. Measure again when it is quiet."
        )
    if any(not one.inside for one in predictions):
        notes.append("Outside of what was swept no error is known: a roofline answers there, without an interval.")
    return notes


def _as_data(one: Prediction) -> dict[str, object]:
    product = one.product
    return {
        "m": product.m,
        "n": product.n,
        "k": product.k,
        "precision": product.precision,
        "seconds": one.seconds,
        "low_seconds": one.low,
        "high_seconds": one.high,
        "joules": one.joules,
        "method": one.method,
        "inside": one.inside,
    }


def _score_data(score: Score) -> dict[str, float]:
    return {"points": score.points, "r2": score.r2, "median_error": score.median_error}


def _percent(share: float) -> float:
    return round(100 * share, 1)


def _figures(value: float) -> float:
    """Four significant figures."""
    return float(f"{value:.4g}")
