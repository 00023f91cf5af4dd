"""What a comparison leaves for `headrace plan --accuracy`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from headrace.cli.remember import measured_runs, remember, waits_alone
from headrace.compare.methods import Iteration, Outcome, RequestRun
from headrace.compare.runner import Comparison
from headrace.plan import calibration, profile
from headrace.plan.profile import Figure, Machine, Profile
from tests.unit import compare_cases

THREADS = 2
PROFILE = Profile(
    Machine("a CPU", 2, THREADS, "avx2", 2**33, {}, "Linux", "3.11", {}, "2026-01-01T00:00:00+00:00", 0.0, 0.0),
    (
        Figure("gemm", {"weights": "float32", "rows": 1, "n": 1024, "k": 1024, "set_bytes": 2**27}, "FLOP/s", [2e10]),
        Figure("gemm", {"weights": "float32", "rows": 256, "n": 1024, "k": 1024, "set_bytes": 2**27}, "FLOP/s", [1e11]),
        Figure("read", {"bytes": 2**30}, "B/s", [2e10]),
        Figure("attention", {"phase": "prefill", "dtype": "float32"}, "FLOP/s", [1e10]),
        Figure("attention", {"phase": "decode", "dtype": "float32"}, "FLOP/s", [1e10]),
        Figure("attend", {"dtype": "float32"}, "B/s", [1e10]),
        Figure("rows", {}, "s", [1e-9]),
        Figure("operation", {}, "s", [1e-6]),
        Figure("step", {"rows": 1}, "s", [1e-4]),
        Figure("step", {"rows": 32}, "s", [2e-4]),
    ),
    1.0,
)


def request(arrival_s: float, first_s: float, gap_s: float, tokens: int) -> RequestRun:
    times = tuple(first_s + gap_s * index for index in range(tokens))
    return RequestRun(tuple(range(5, 5 + tokens)), "length", arrival_s, times, times[-1])


SERIAL = Outcome((request(0, 0.5, 0.1, 11), request(0, 2.0, 0.1, 11)), 3.0)
FUSED = Outcome(
    (request(0, 0.6, 0.15, 11), request(0, 0.8, 0.15, 11)), 2.5, tuple(Iteration(i / 8, 2, 2) for i in range(1, 9))
)


@pytest.fixture
def comparison() -> Comparison:
    made = compare_cases.comparison({"serial": (SERIAL,), "fused": (FUSED,)})
    config = replace(made.config, backend="native", dtype="float32", quant="none", kv_dtype="float32", threads=THREADS)
    methods = tuple(replace(one, config=config) for one in made.methods)
    return replace(made, config=config, methods=methods)


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """With a probe of the machine."""
    folder = tmp_path / "headrace"
    folder.mkdir()
    profile.write_profile(PROFILE, profile.default_path(folder))
    return {"XDG_STATE_HOME": str(tmp_path)}


def stored(environ: dict[str, str]) -> list[calibration.Pair]:
    return calibration.Store(calibration.default_path(Path(environ["XDG_STATE_HOME"]) / "headrace")).pairs()


def test_waits_leave_out_the_requests_before() -> None:
    assert waits_alone(SERIAL) == pytest.approx([0.5, 0.5])
    late = replace(SERIAL, requests=(SERIAL.requests[0], request(1.8, 2.0, 0.1, 3)))
    assert waits_alone(late) == pytest.approx([0.5, 0.2])


def test_what_was_measured(comparison: Comparison) -> None:
    (one, length, alone), (two, other_length, together) = measured_runs(comparison)
    assert (one, length, two, other_length) == (1, 11, 2, 11)
    assert alone == pytest.approx({"ttft_s": 0.5, "itl_s": 0.1, "tokens_per_s": 22 / 3})
    assert together == pytest.approx({"itl_s": 0.15, "tokens_per_s": 22 / 2.5})


def test_a_comparison_is_remembered(comparison: Comparison, environ: dict[str, str]) -> None:
    assert remember(comparison, "smollm2-135m", environ).startswith("5 numbers stored")
    pairs = stored(environ)
    assert [pair.quantity for pair in pairs] == ["ttft_s", "itl_s", "tokens_per_s", "itl_s", "tokens_per_s"]
    assert {(pair.machine, pair.model, pair.measured_at) for pair in pairs} == {
        ("a CPU, 2 threads", "smollm2-135m", comparison.measured_at)
    }
    assert pairs[1].measured == pytest.approx(0.1)
    # At 2e10 FLOP/s, the probe's rate of float32 products of one row, 134.5M weights take 269 MFLOP / 20 GFLOP/s.
    assert 0.0134 < pairs[1].predicted < 0.0150


def test_what_plan_has_no_formula_for_is_left_out(comparison: Comparison, environ: dict[str, str]) -> None:
    others = {
        "torch": replace(comparison, config=replace(comparison.config, backend="torch")),
        "threads": replace(comparison, config=replace(comparison.config, threads=7)),
        "machine": replace(comparison, machine=replace(comparison.machine, cpu="another")),
    }
    assert {name: remember(other, "smollm2-135m", environ) for name, other in others.items()} == dict.fromkeys(
        others, ""
    )
    assert remember(comparison, "smollm2-135m", {"XDG_STATE_HOME": environ["XDG_STATE_HOME"] + "/none"}) == ""
    assert stored(environ) == []


def test_a_batch_that_was_not_together_is_left_out(comparison: Comparison) -> None:
    base, fused = comparison.methods
    assert fused.figures.overlap is not None
    figures = replace(fused.figures, overlap=replace(fused.figures.overlap, median=0.5))
    apart = replace(comparison, methods=(base, replace(fused, figures=figures)))
    assert [requests for requests, _, _ in measured_runs(apart)] == [1]


def test_what_goes_wrong_is_said_and_nothing_more(comparison: Comparison, environ: dict[str, str]) -> None:
    told = remember(comparison, "no such model", environ)
    assert told.startswith("not stored for headrace plan --accuracy: ") and "\n" not in told
    folder = Path(environ["XDG_STATE_HOME"]) / "headrace"
    calibration.default_path(folder).mkdir()
    assert "cannot be written" in remember(comparison, "smollm2-135m", environ)
    profile.default_path(folder).write_text("{}")
    assert remember(comparison, "smollm2-135m", environ).startswith("not stored for")
