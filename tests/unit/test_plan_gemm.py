"""The predictor of matrix products: its sweep, its split by shape, and that the forest has to beat the roofline."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from headrace.cli import plan_gemm
from headrace.core import sizing
from headrace.core.errors import BackendUnavailable, InvalidParameter
from headrace.plan.gemm import FOLDS, METHODS, Ceilings, Forest, HeldOut, Predictor, Score, hold_out, split
from headrace.plan.gemm_document import describe
from headrace.plan.gemm_sweep import SHAPES, Point, Product, Sweep, measure_sweep, read_sweep, sweep_text
from headrace.plan.probe_programs import BITS, Programs

SOME = [(n, k) for k in (256, 1024, 4096) for n in (64, 512, 1024, 3072)]
ROWS = (1, 4, 16, 64, 256)
PEAKS = {"float32": 100e9, "bfloat16": 100e9, "int8": 400e9, "int4": 400e9}
EMPTY = Sweep((), "a CPU", 2, 2, "avx2", "0.1.0", "2026-01-01T00:00:00+00:00", 0.1)


def made_up(product: Product, random: Random) -> float:
    """Seconds on a machine that is no plain roofline: a start-up time, kernels that want many rows, some noise."""
    memory = product.nbytes / 20e9
    compute = product.flops / PEAKS[product.precision] * (1 + 3 / product.m)
    return (2e-6 + math.hypot(memory, compute)) * math.exp(random.gauss(0, 0.03))


def sweep_of(
    shapes: Sequence[tuple[int, int]] = SOME, precisions: Sequence[str] = ("float32", "int8"), watts: bool = False
) -> Sweep:
    random = Random(3)
    points = []
    for n, k in shapes:
        for precision in precisions:
            for m in ROWS:
                product = Product(m, n, k, precision)
                power = 50 + 10 * math.log2(m) + 5 * (precision == "int8") if watts else None
                points.append(Point(product, made_up(product, random), 0.02, power))
    return replace(EMPTY, points=tuple(points), meter="rapl" if watts else None)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(sweep_of())


@pytest.fixture(scope="module")
def powered() -> Predictor:
    return Predictor(sweep_of(SOME[2:], ("float32", "int8"), watts=True))


# ---------------------------------------------------------------- the split


def test_no_shape_is_in_both_halves() -> None:
    shapes = [(n, k) for n, k in SOME for _ in range(7)]
    folds = split(shapes)
    assert set(folds) == set(SOME) and set(folds.values()) == set(range(FOLDS))
    sizes = [list(folds.values()).count(fold) for fold in range(FOLDS)]
    assert max(sizes) - min(sizes) <= 1
    assert split(list(reversed(shapes))) == folds


def test_a_held_out_prediction_knows_nothing_of_its_shape(predictor: Predictor) -> None:
    """Its measured times are changed, at all rows and precisions, and what is predicted of it is not: no leakage."""
    shape = SOME[5]
    sweep = predictor.sweep
    changed = [replace(one, seconds=one.seconds * 1000) if one.product.shape == shape else one for one in sweep.points]
    before, after = predictor.held_out, hold_out(changed)
    theirs = [index for index, one in enumerate(sweep.points) if one.product.shape == shape]
    assert theirs
    for method in before.seconds:
        assert [before.seconds[method][i] for i in theirs] == [after.seconds[method][i] for i in theirs]
    assert before.seconds["forest"] != after.seconds["forest"]


@pytest.mark.parametrize("sweep", [sweep_of(SOME[:9]), sweep_of(SOME[:10], ("int8",))], ids=["shapes", "points"])
def test_too_little_to_hold_anything_out(sweep: Sweep) -> None:
    points = sweep.points if len(sweep.points) > 50 else sweep.points[:49]
    with pytest.raises(InvalidParameter, match="at least 10 different weights and 50 points"):
        Predictor(replace(sweep, points=points))


# ---------------------------------------------------------------- scores and methods


def test_score_by_hand() -> None:
    e = math.e
    score = Score.of([1, e, e**2], [1, e, e**3])
    assert score.points == 3 and score.r2 == pytest.approx(1 - 1 / 2)
    assert score.median_error == pytest.approx(0) and score.high_error == pytest.approx(1)
    assert Score.of([1, 2], [2, 2]).median_error == pytest.approx(0.5)


def test_the_roofline_is_the_highest_rates() -> None:
    slow, fast = Product(1, 1024, 1024, "float32"), Product(256, 1024, 1024, "float32")
    ceilings = Ceilings.of([Point(slow, 1e-3, 0), Point(fast, 1e-2, 0)])
    assert ceilings.bandwidth == pytest.approx((4 * 1024 * 1024 + 4 * 2048) / 1e-3)
    assert ceilings.peaks == {"float32": pytest.approx(2 * 256 * 1024**2 / 1e-2)}
    assert ceilings.seconds(slow) == pytest.approx(1e-3) and ceilings.seconds(fast) == pytest.approx(1e-2)
    assert ceilings.scaled_seconds(fast) == pytest.approx(1e-2)


def test_the_forest_beats_the_roofline_where_it_is_used(predictor: Predictor) -> None:
    held_out = predictor.held_out
    assert held_out.score("forest").r2 >= 0.97
    for precision in predictor.precisions:
        assert held_out.best(precision) == "forest"
        errors = [
            held_out.score(method, precision).median_error for method in ("forest", "roofline", "scaled roofline")
        ]
        assert errors[0] == min(errors)


def test_a_roofline_that_is_as_good_is_not_replaced() -> None:
    points = sweep_of().points
    exact = [one.seconds for one in points]
    for good, used in (({"roofline"}, "roofline"), ({"scaled roofline", "forest"}, "scaled roofline")):
        seconds = {name: exact if name in good else [2 * one for one in exact] for name in METHODS}
        assert HeldOut(points, seconds, {}, [], [], []).best("int8") == used


def test_predictions(predictor: Predictor) -> None:
    product = Product(8, 1024, 1024, "int8")
    inside, outside = predictor.predict([product, Product(1, 49152, 576, "float32")])
    truth = made_up(product, Random(0))
    assert inside.method == "forest" and inside.inside and abs(inside.seconds / truth - 1) < 0.3
    assert inside.low is not None and inside.high is not None and inside.low < inside.seconds < inside.high
    assert inside.joules is None
    assert not outside.inside and outside.method == "scaled roofline"
    assert outside.low is outside.high is None
    # Neither n nor k is larger than in the sweep, but no weight there was so large.
    gap = Predictor(replace(EMPTY, points=[one for one in predictor.sweep.points if one.product.shape != (3072, 4096)]))
    assert not gap.predict([Product(8, 3072, 4096, "int8")])[0].inside
    with pytest.raises(InvalidParameter, match=r"product\.precision: got 'bfloat16', allowed: float32, int8"):
        predictor.predict([Product(1, 64, 64, "bfloat16")])


def test_the_same_points_give_the_same_forest(predictor: Predictor) -> None:
    points = predictor.sweep.points
    products = [one.product for one in points]
    assert Forest(points).seconds(products) == Forest(points).seconds(products)


def test_power_beside_a_constant(predictor: Predictor, powered: Predictor) -> None:
    score, constant = powered.held_out.power_score, powered.held_out.constant_power_score
    assert score is not None and constant is not None
    assert score.r2 > 0.95 and score.median_error < constant.median_error
    (found,) = powered.predict([Product(8, 1024, 1024, "int8")])
    assert found.joules is not None and found.joules / found.seconds == pytest.approx(85, rel=0.15)
    assert predictor.held_out.power_score is None
    named = {quantity.name: quantity for quantity in describe(powered, []).quantities}
    assert (
        isinstance(named["R² of log power, forest"].value, float) and "rapl" in named["R² of log power, forest"].source
    )


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'headrace\[plan\]'"):
        Predictor(sweep_of())


# ---------------------------------------------------------------- this machine


class Counter:
    """A meter of a machine that takes 70 W."""

    source = "rapl"
    last = 0.0

    def joules(self, now: float) -> float:
        spent, self.last = 70 * (now - self.last), now
        return spent


def test_sweep_of_this_machine() -> None:
    """R² of log time on held-out shapes is 0.9 or more (what GEMM prediction has to show), on the native kernels.
    Another load may spoil a sweep; it has three of them."""
    shapes = [(n, k) for k in (256, 1024) for n in (64, 256, 576, 1024, 1536)]
    scores = []
    for _ in range(3):
        sweep = measure_sweep(1, shapes, (1, 8, 64), ("float32", "int8"), rounds=3)
        assert len(sweep.points) == len(shapes) * 3 * 2 and {one.product.shape for one in sweep.points} == set(shapes)
        assert all(0 < one.seconds < 10 and one.spread >= 0 for one in sweep.points)
        scores.append(hold_out(sweep.points).score("forest").r2)
        if scores[-1] >= 0.9:
            break
    assert max(scores) >= 0.9, scores
    assert sweep.instruction_set and sweep.machine and sweep.threads == 1


def test_power_is_measured_where_there_is_a_meter() -> None:
    sweep = measure_sweep(1, [(64, 256), (128, 256)], (1, 3), ("int4",), rounds=1, meter=Counter())
    assert sweep.meter == "rapl"
    assert [one.watts for one in sweep.points if one.product.m == 1] == [pytest.approx(70)] * 2


@pytest.mark.parametrize("precision", BITS)
def test_bytes_are_those_of_the_native_backend(precision: str) -> None:
    pytest.importorskip("headrace.backends.native._kernels")
    (weight,) = Programs(1).pack(64, 256, precision)
    assert weight.nbytes == sizing.product_bytes(0, 64, 256, BITS[precision])
    assert sizing.product_flops(2, 3, 5) == 60 and sizing.product_bytes(2, 3, 5, 16) == 30 + 4 * 2 * 8


def test_shapes_that_no_kernel_takes() -> None:
    with pytest.raises(InvalidParameter, match="shape: got"):
        measure_sweep(1, [(64, 100)])
    with pytest.raises(InvalidParameter, match="at least one product"):
        measure_sweep(1, [])
    assert all(n % 16 == 0 and k % 32 == 0 for n, k in SHAPES)


# ---------------------------------------------------------------- files


def test_a_sweep_survives_its_file(tmp_path: Path) -> None:
    sweep = sweep_of(watts=True)
    (tmp_path / "sweep.json").write_text(sweep_text(sweep))
    assert read_sweep(tmp_path / "sweep.json") == sweep


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda data: data.update(format="headrace-gemm-sweep/2"), "sweep: got"),
        (lambda data: data.update(points=3), "sweep: got"),
        (lambda data: data.pop("threads"), r"sweep\.threads: got None"),
        (lambda data: data.update(threads=True), r"sweep\.threads: got True"),
        (lambda data: data.update(cores=0), r"sweep\.cores: got 0"),
        (lambda data: data.update(busy_cores=-1.0), r"sweep\.busy_cores: got -1\.0"),
        (lambda data: data["points"].append([1, 2]), r"sweep\.points\[120\]: got \[1, 2\]"),
        (lambda data: data["points"][0].__setitem__(0, 0), r"points\[0\].*product\.m: got 0"),
        (lambda data: data["points"][1].__setitem__(3, "int3"), r"points\[1\].*product\.precision: got 'int3'"),
        (lambda data: data["points"][1].__setitem__(3, []), r"points\[1\]: got \[\]"),
        (lambda data: data["points"][2].__setitem__(4, -1.0), r"points\[2\]\.seconds: got -1\.0"),
        (lambda data: data["points"][2].__setitem__(6, 0), r"points\[2\]\.watts: got 0"),
        (lambda data: data["points"].append(data["points"][0]), r"sweep\.points: got 121, allowed: each product once"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, change: object, named: str) -> None:
    data = json.loads(sweep_text(sweep_of()))
    assert callable(change)
    change(data)
    (tmp_path / "sweep.json").write_text(json.dumps(data))
    with pytest.raises(InvalidParameter, match=named) as caught:
        read_sweep(tmp_path / "sweep.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"format": NaN}', b"[" * 100_000])
def test_no_sweep_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "sweep.json").write_bytes(content)
    for name in ("sweep.json", "missing.json", "."):
        with pytest.raises(InvalidParameter, match="plan gemm --save"):
            read_sweep(tmp_path / name)


# ---------------------------------------------------------------- the command


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    plan_gemm.add_arguments(parser)
    return parser.parse_args(words)


def test_the_command_on_a_saved_sweep(tmp_path: Path) -> None:
    path, copy = tmp_path / "sweep.json", tmp_path / "copy.json"
    path.write_text(sweep_text(sweep_of()))
    words = (
        "--sweep",
        str(path),
        "--save",
        str(copy),
        "--product",
        "32x1024X1024:int8",
        "--product",
        "1x64x256:float32",
    )
    document = plan_gemm.document(parse(*words))
    assert read_sweep(copy) == read_sweep(path)
    predicted, errors = document.tables
    assert [row[:4] for row in predicted.rows] == [[32, 1024, 1024, "int8"], [1, 64, 256, "float32"]]
    used = [tuple(row[:2]) for row in errors.rows if row[-1] == "yes"]
    assert used == [("float32", "forest"), ("int8", "forest")] and len(errors.rows) == 2 * len(METHODS)
    named = {quantity.name: quantity for quantity in document.quantities}
    assert isinstance(r2 := named["R² of log time, forest"].value, float) and r2 > 0.95
    assert "R² of log time, roofline" in named and named["median error of power"].value is None
    assert "RAPL" in named["median error of power"].note
    assert all(quantity.formula and quantity.source and quantity.basis == "measured" for quantity in named.values())
    assert any("random split" in note for note in document.notes)
    json.dumps(document.data, allow_nan=False)
    predictions = document.data["predictions"]
    assert isinstance(predictions, list) and predictions[0]["seconds"] > 0


def test_a_busy_machine_and_an_outside_product_are_said(predictor: Predictor) -> None:
    busy = copy(predictor)
    busy.sweep = replace(predictor.sweep, busy_cores=1.2)
    notes = describe(busy, [Product(1, 49152, 576, "int8")]).notes
    assert any("busy during the sweep: other programs used 1.2 of 2 cores" in note for note in notes)
    assert any("Outside of what was swept" in note for note in notes)
    assert not any("busy" in note or "Outside" in note for note in describe(predictor, []).notes)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--product", "1x2"), "product: got '1x2', allowed: MxNxK"),
        (("--product", "1x2x3:"), "product.precision: got ''"),
        (("--product", "0x2x3"), "product.m: got 0"),
        (("--product=-1x2x3",), "product: got '-1x2x3'"),
        (("--product", "1x2x3:fp8"), "product.precision: got 'fp8'"),
        (("--threads", "0"), "threads: got 0"),
        (("--threads", "2", "--sweep", "f"), "threads: got 2, allowed: to leave it out"),
        (("--sweep", "/nowhere/f"), "sweep: got '/nowhere/f'"),
        (("--sweep", "f", "--save", "/nowhere/f"), "save: got '/nowhere/f'"),
    ],
)
def test_bad_flags(words: tuple[str, ...], named: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        plan_gemm.document(parse(*words))
    assert str(caught.value).startswith(named) and "\n" not in str(caught.value)
