"""The seven experiments, whole, on methods of a virtual clock; how they are cut to size, and how they are shown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
from rich.console import Console

from headrace.compare.flover import published
from headrace.compare.flover.experiments import run_experiment
from headrace.compare.flover.plan import (
    Measured,
    Scale,
    cell_workload,
    choose_length,
    envelope,
    longest_of,
    methods_of,
    requests_of,
    shapes,
    window_methods,
)
from headrace.compare.flover.render import csv_files, document, section, show
from headrace.compare.flover.results import Result, at_most
from headrace.compare.methods import Method
from headrace.core.errors import EngineError, InvalidParameter
from headrace.pages.chart_axes import NARROW, WIDE
from tests.unit.compare_flover_cases import (
    ROW_S,
    STEP_S,
    AbsentMethod,
    ClockInstances,
    ClockMethod,
    DyingMethod,
)

PROMPTS = [tuple(range(100 + 8 * index, 108 + 8 * index)) for index in range(64)]
FLAT = Measured(0.01, 0.01, 32)


def make(name: str) -> Method:
    if name == "instances":
        return ClockInstances()
    if name == "absent":
        return AbsentMethod(name, "fused")
    if name == "dying":
        return DyingMethod(name, "fused")
    return ClockMethod(name, "serial" if name == "other" else name)


@cache
def result(number: int) -> Result:
    """With as few tokens as an experiment ever has."""
    outside = ("other", "absent", "dying")
    return run_experiment(number, make, PROMPTS, 2056, repeats=2, seed=1, budget_s=0.1, outside=outside)


@pytest.mark.parametrize("number", range(1, 8))
def test_every_identity_holds(number: int) -> None:
    found = result(number)
    assert [check for check in found.findings.checks if not check.holds] == []
    assert found.holds
    names = {check.name for check in found.findings.checks}
    assert {
        "every method of ours gives each request the same tokens",
        "overlap = Σ L / busy iterations / N",
        "a token an iteration, from joining to the end (finish = a + L)",
    } <= names
    assert found.published.number == number and len(found.cells) == len(shapes(number))
    assert found.measured.step_s == pytest.approx(STEP_S + ROW_S)
    assert found.measured.batch_step_s == pytest.approx(STEP_S + ROW_S * requests_of(number))
    assert found.scale.tokens(512) == 16 and any("Lengths are cut" in note for note in found.notes)
    assert found.scale.single_s == pytest.approx(16 * (STEP_S + ROW_S))


def test_every_rival_is_checked_at_every_point() -> None:
    checks = {check.name: check.detail for check in result(3).findings.checks}
    for rival in ("instances", "window of 0.35 T1", "window of 1.4 T1", "window of 2.8 T1"):
        assert checks[f"fused ≤ {rival}, in seconds"].startswith("at all 14 points")
    assert "simulated iterations are the reference's means within 1 %" in checks
    assert "published iterations lie within 2 sd of the simulation" in checks
    areas = [check.name for check in result(6).findings.checks if check.name.startswith("area")]
    assert len(areas) == 4


def test_an_engine_that_is_not_there_says_why_and_one_that_dies_loses_its_row() -> None:
    found = result(7)
    assert found.failures == {
        "absent": "absent is not set up: run the command that does it",
        "dying": "dying: its process <has> ended",
    }
    assert set(found.descriptions) == {"fused", "other"}
    assert all(set(cell.runs) == {"fused", "other"} for cell in found.cells)
    assert found.findings.grids[0].head[3:] == ("other / fused",)


def test_without_instances_the_rest_is_told() -> None:
    def some(name: str) -> Method:
        return AbsentMethod(name, "fused") if name == "instances" else make(name)

    for number in (2, 5):
        found = run_experiment(number, some, PROMPTS, 2056, repeats=1, budget_s=0.1)
        assert found.holds and "instances" in found.failures
        assert section(found) and document(found)


def test_fused_that_fails_ends_it_and_everything_is_closed() -> None:
    made: list[ClockMethod] = []

    def failing(name: str) -> Method:
        made.append(DyingMethod(name, "fused") if name == "fused" else ClockMethod(name, "fused"))
        return made[-1]

    with pytest.raises(EngineError, match="its process <has> ended"):
        run_experiment(6, failing, PROMPTS, 2056)
    assert [one.closed for one in made] == [True] * len(made)


def test_a_rival_that_is_faster_is_reported_so() -> None:
    def cheat(name: str) -> Method:
        return ClockMethod(name, "fused", 0.5) if name == "instances" else make(name)

    found = run_experiment(6, cheat, PROMPTS, 2056, repeats=2, budget_s=0.1)
    broken = [check.name for check in found.findings.checks if not check.holds]
    assert broken == ["area under progress: fused ≥ instances", "fused ≤ instances, in seconds"] and not found.holds
    cell = found.cells[0]
    slow = tuple(replace(one, seconds=seconds) for one, seconds in zip(cell.runs["fused"], (1.0, 1.2), strict=True))
    fast = tuple(replace(one, seconds=seconds) for one, seconds in zip(cell.runs["fused"], (0.9, 1.1), strict=True))
    overlapping = replace(cell, runs={"fused": slow, "instances": fast})
    assert at_most(overlapping, "fused", "instances") == (True, "1.100 s and 1.000 s, a tie: their ranges overlap")
    near = replace(cell, runs={"fused": slow[:1], "instances": (replace(slow[0], seconds=0.995),)})
    assert at_most(near, "fused", "instances") == (True, "1.000 s and 0.995 s, a tie: within 1 %")
    slower = replace(cell, runs={"fused": slow[:1], "instances": fast[:1]})
    assert at_most(slower, "fused", "instances") == (False, "1.000 s and 0.900 s")


# ------------------------------------------------------------ cut to size


def test_sizes() -> None:
    assert [len(shapes(number)) for number in range(1, 8)] == [6, 6, 14, 4, 1, 1, 12]
    assert [requests_of(number) for number in range(1, 8)] == [32] * 6 + [64]
    assert [longest_of(number) for number in (1, 4, 7)] == [520, 2056, 520]
    assert methods_of(7, Scale(1.0), ("a", "b")) == ("fused", "a", "b")
    assert methods_of(5, Scale(1.0), ("a",)) == ("fused", "instances")
    assert window_methods(Scale(1.0, 2.0)) == {"window:700.000": 0.35, "window:2800.000": 1.4, "window:5600.000": 2.8}


def test_arrivals_are_scaled_by_what_one_request_takes() -> None:
    scale = Scale(0.5, 2.9)
    found = cell_workload(1, shapes(1)[2], scale, PROMPTS, 0)
    assert [one.arrival_s for one in found.requests] == pytest.approx([0, 0.25, 0.5, 0.75])
    assert {one.max_tokens for one in found.requests} == {256} and found.ignore_eos
    drawn, again = (cell_workload(4, shapes(4)[3], Scale(0.25, 5.8), PROMPTS, 7) for _ in range(2))
    assert drawn == again and drawn.sha256 != cell_workload(4, shapes(4)[3], Scale(0.25, 5.8), PROMPTS, 8).sha256
    assert all(32 <= one.max_tokens <= 512 for one in drawn.requests)
    at_once = cell_workload(7, shapes(7)[0], scale, PROMPTS, 0)
    assert at_once.together and len(at_once.requests) == 32


def test_lengths_stay_where_there_is_time_and_room() -> None:
    found = choose_length(6, ("fused", "instances"), FLAT, 1, 1e6, 4096, 0)
    assert found.length == 1 and found.single_s == pytest.approx(5.12)
    assert found.notes == ("Lengths are the published ones (512 tokens where they are equal).",)


def test_lengths_are_cut_to_the_time() -> None:
    """Full length: fused 44·31 + 512 iterations of 10 ms and instances 32 · 512, so about 200 s a round."""
    found = choose_length(6, ("fused", "instances"), FLAT, 3, 200.0, 4096, 0)
    assert 0.30 < found.length < 0.36 and "about 9 minutes" in found.notes[0]
    assert f"published 512 tokens, ours {found.tokens(512)}" in found.notes[0]
    least = choose_length(6, ("fused", "instances"), FLAT, 3, 0.01, 4096, 0)
    assert least.tokens(512) == 16 and "shorter answers would show nothing" in least.notes[0]


def test_lengths_are_cut_to_the_context() -> None:
    found = choose_length(4, ("fused",), FLAT, 1, 1e6, 1032, 0)
    assert found.length == 0.5 and "room for 1032 tokens" in found.notes[0]
    assert "ours U(64, 256) … U(64, 1024)" in found.notes[0]
    assert max(map(len, envelope(4, PROMPTS, 1032).prompts)) == 8 and envelope(4, PROMPTS, 1032).longest == 1032


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda: run_experiment(8, make, PROMPTS, 2056), r"workload: got 'flover:8', allowed: flover:1 … flover:7"),
        (lambda: run_experiment(7, make, PROMPTS[:32], 2056), r"prompts: got 32, allowed: at least 64"),
        (lambda: run_experiment(1, make, PROMPTS, 64), r"max_model_len: got 64, allowed: at least 72"),
        (lambda: run_experiment(1, make, PROMPTS, 2056, repeats=0), r"repeats: got 0"),
        (lambda: run_experiment(1, make, PROMPTS, 2056, budget_s=0), r"budget_s: got 0"),
    ],
)
def test_bad_input(change: Callable[[], Result], complaint: str) -> None:
    with pytest.raises(InvalidParameter, match=complaint):
        change()


# ------------------------------------------------------------ shown


@pytest.mark.parametrize("number", range(1, 8))
@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal(number: int, width: int) -> None:
    out = Console(file=io.StringIO(), width=width, color_system=None)
    show(result(number), out)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert f"Experiment {number} of Flover" in text and "BROKEN" not in text and "Compare" in text
    assert max(map(len, text.splitlines())) <= width and "…" not in text.replace("U(128, 512) …", "").replace(
        "…", "", 2
    )


@pytest.mark.parametrize("number", range(1, 8))
def test_as_a_section_of_the_page(number: int) -> None:
    found = section(result(number))
    assert found.count("<table") == found.count("</table>") >= 2 and "NaN" not in found
    assert found.count("<svg") == 2 * len(result(number).findings.figures)
    assert "<has>" not in found and ("&lt;has&gt;" in found) == (number == 7)
    for remark in published.EXPERIMENTS[number].remarks:
        assert remark.replace("'", "&#x27;")[:40] in found
    for figure in result(number).findings.figures:
        assert all(figure.draw(width).startswith("<svg") for width in (WIDE, NARROW))


@pytest.mark.parametrize("number", range(1, 8))
def test_as_json(number: int) -> None:
    found = json.loads(json.dumps(document(result(number)), allow_nan=False))
    assert found["experiment"] == number and all(check["holds"] for check in found["checks"])
    assert {one["mark"] for one in found["published"]["series"]} <= {"read", "read ≈", "derived"}
    for cell, shape in zip(found["cells"], shapes(number), strict=True):
        assert len(cell["arrivals_s"]) == len(cell["lengths"]) == shape.requests
        assert all(len(rounds) == 2 for rounds in cell["methods"].values())
        fused = cell["methods"]["fused"][0]
        assert fused["output_tokens"] == sum(cell["lengths"])
        assert fused["overlap_percent"] == pytest.approx(
            100 * fused["output_tokens"] / fused["iterations"] / shape.requests
        )


@pytest.mark.parametrize("number", range(1, 8))
def test_as_csv(number: int) -> None:
    files = csv_files(result(number))
    more = {5: {"timeline.csv"}, 6: {"progress.csv", "completions.csv"}}
    assert files.keys() == {"rounds.csv"} | more.get(number, set())
    for text in files.values():
        rows = list(csv.reader(io.StringIO(text)))
        assert len(rows) > 2 and {len(row) for row in rows} == {len(rows[0])}


def test_the_clock_column_of_experiment_3_is_its_own_draw() -> None:
    grid = result(3).findings.grids[0]
    assert [row[0] for row in grid.rows] == [str(gap) for gap in published.LAMBDAS]
    assert [row[1] for row in grid.rows][:3] == ["557", "616", "748"]
    assert all(512 < int(row[4]) < 14_000 for row in grid.rows)


def test_experiment_4_beside_the_published_gains() -> None:
    slots, gains = result(4).findings.grids
    assert all(row[4] == "0" and row[7] == "0" and int(row[2]) > 0 for row in slots.rows)
    assert [row[2] for row in gains.rows] == ["1.15", "1.19", "1.21", "1.23"]
    assert all(float(row[1]) > 1 for row in gains.rows)
