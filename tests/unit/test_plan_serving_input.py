"""`plan serving`: throughputs that are predicted, measured by compare or given in a file; files that are no good."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from headrace.compare.advice import advise
from headrace.compare.document import document as compare_document
from headrace.core.errors import InputFileError, InvalidParameter, RequestError, UnknownParameter
from headrace.plan.devices import find_device
from headrace.plan.serving_input import Size, parse_type, predict
from headrace.plan.speed import Precision
from headrace.plan.subject import read_subject
from tests.unit.compare_cases import comparison, outcome
from tests.unit.plan_serving_cases import quantity, run, table, written

LLAMA = read_subject("llama-2-7b").spec


# ---------------------------------------------------------------- predicted


def test_a_prediction_obeys_its_own_laws() -> None:
    """c requests are in flight: each takes a prompt's step and output − 1 gaps, so X (T_p + (o − 1) ITL) counts them
    with at most one prompt at a time."""
    size = Size(500, 200)
    found = predict(LLAMA, find_device("A100-80GB"), size, 1, Precision())
    rows = [1, 2, 3, 4, 6, 8, 12, 16]
    assert len(found) > len(rows)
    for count, point in zip(rows, found, strict=False):
        assert point.itl_s is not None and point.ttft_s is not None
        assert point.per_s * (size.output - 1) * point.itl_s == pytest.approx(count)
    rates = [point.per_s for point in found]
    latencies = [point.itl_s or 0 for point in found]
    assert rates == sorted(rates) and latencies == sorted(latencies)
    assert rates[-1] < 1 / (2 * 6.6e9 * 500 / 312e12)  # prompts alone


def test_predicted_for_a_model(tmp_path: Path) -> None:
    found = run(written(tmp_path), "--model", "llama-2-7b", "--gpus", "L4,A10G,A100-80GB,H100", "--itl-s", "0.12")
    assert quantity(found, "cost").basis == "data sheet"
    assert "A10 data sheet" in quantity(found, "cost").source
    assert any("of llama-2-7b" in note and "data-sheet speed" in note for note in found.notes)
    assert any("sum to 10" in note for note in found.notes)
    tight = run(written(tmp_path), "--model", "llama-2-7b", "--gpus", "L4,A10G,A100-80GB,H100", "--itl-s", "0.02")
    assert float(quantity(tight, "cost").value or 0) > float(quantity(found, "cost").value or 0)
    # 13.5 GB of weights at 300 GB/s take 45 ms.
    assert any("L4 alone: no throughput" in note for note in table(tight, "GPU types").notes)


def test_an_slo_below_a_step_names_size_latency_and_gpu(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match=r"itl_s: got 0.001, allowed: 0.0\d+ s or more: ≤ .*needs it on H100"):
        run(written(tmp_path), "--model", "llama-2-7b", "--gpus", "L4,H100", "--itl-s", "0.001")


def test_several_gpus_as_one_type() -> None:
    assert parse_type("4xL4") == (4, find_device("L4"))
    assert parse_type("L4") == (1, find_device("L4"))
    large = read_subject("llama-2-70b").spec
    device = find_device("H100")
    assert predict(large, device, Size(100, 100), 1, Precision()) == []
    assert predict(large, device, Size(100, 100), 4, Precision())
    assert predict(large, device, Size(100, 100), 1, Precision(quant="int4"))


def test_more_gpus_than_a_node_has_are_not_predicted(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match=r"gpus: got '16xL4', allowed: up to 8"):
        run(written(tmp_path), "--model", "llama-2-7b", "--gpus", "16xL4")


def test_a_larger_context_than_the_models(tmp_path: Path) -> None:
    where = written(tmp_path, input_tokens=[100, 4000])
    with pytest.raises(InvalidParameter, match=r"4096 with output_tokens: llama-2-7b's context"):
        run(where, "--model", "llama-2-7b", "--gpus", "H100")


# ---------------------------------------------------------------- measured


def report(path: Path, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Of `headrace compare --json`: prompts of 3 tokens, answers of these lengths."""
    answers = tuple(tuple(range(5, 5 + length)) for length in lengths)
    made = comparison(
        {
            "serial": tuple(outcome(answers, seconds, together=False) for seconds in (8.0, 8.2, 8.4)),
            "fused": tuple(outcome(answers, seconds) for seconds in (2.0, 2.1, 2.2)),
        }
    )
    found: dict[str, Any] = json.loads(json.dumps(compare_document(made, advise(made.methods, made.bound))))
    path.write_text(json.dumps(found))
    return found


def measured(tmp_path: Path, **changes: object) -> str:
    info = {"box": {"cost": 0.5, "reports": ["one.json", "two.json"]}}
    settings: dict[str, object] = {
        "input_tokens": [8],
        "output_tokens": [4, 9],
        "workload_distribution": [[3, 1]],
        "gpu_info": info,
    }
    return written(tmp_path, **{**settings, **changes})


def test_measured_by_compare(tmp_path: Path) -> None:
    report(tmp_path / "one.json", (4, 3))
    report(tmp_path / "two.json", (6, 7))
    found = run(measured(tmp_path, total_request_rate=4), "--slice-factor", "2")
    # fused: two requests in 2.1 s. A load of 4 / (2 / 2.1) = 4.2.
    assert found.data["mix"] == {"box": 5, "cost": 2.5}
    assert quantity(found, "cost").basis == "measured"
    assert "headrace compare of planted.gguf (abababababab) on a CPU" in quantity(found, "cost").source
    # Its first tokens come after 0.525 s; one after the other the second waits 4.92 s.
    assert run(measured(tmp_path), "--ttft-s", "0.6").data["mix"] == {"box": 21, "cost": 10.5}
    with pytest.raises(InvalidParameter, match=r"ttft_s: got 0.5, allowed: 0.5\d+ s or more: .* needs it on box"):
        run(measured(tmp_path), "--ttft-s", "0.5")


def test_reports_of_a_type_are_of_one_model_and_machine(tmp_path: Path) -> None:
    report(tmp_path / "one.json", (4, 3))
    other = report(tmp_path / "two.json", (6, 7))
    for change in (
        {"model": {"name": "other", "fingerprint": "cd" * 32}},
        {"machine": {"cpu": "another", "gpu": None}},
    ):
        (tmp_path / "two.json").write_text(json.dumps(other | change))
        (what,) = change
        with pytest.raises(InvalidParameter, match=f"reports.*reports of one {what}"):
            run(measured(tmp_path))


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_is_the_cpus(tmp_path: Path) -> None:
    for name, lengths in (("one.json", (4, 3)), ("two.json", (6, 7))):
        made = report(tmp_path / name, lengths)
        (tmp_path / name).write_text(json.dumps(made | {"machine": made["machine"] | {"gpu": "H100"}}))
    assert "on a CPU" in quantity(run(measured(tmp_path)), "cost").source


def test_an_answer_of_one_token_has_no_gap_to_be_late(tmp_path: Path) -> None:
    report(tmp_path / "one.json", (1, 1))
    sizes = {"output_tokens": [1], "workload_distribution": [[1]]}
    where = measured(tmp_path, **sizes, gpu_info={"box": {"cost": 0.5, "reports": ["one.json"]}})
    assert run(where, "--itl-s", "0.001").data["mix"]


def test_throughputs_of_different_models_are_said_to_be(tmp_path: Path) -> None:
    report(tmp_path / "one.json", (4, 3))
    report(tmp_path / "two.json", (6, 7))
    box = {"cost": 0.5, "reports": ["one.json", "two.json"]}
    found = run(measured(tmp_path, gpu_info={"box": box, "L4": {}}), "--model", "llama-2-7b")
    assert any("different models" in note and "planted.gguf" in note and "llama-2-7b" in note for note in found.notes)


def test_a_report_is_of_one_size(tmp_path: Path) -> None:
    report(tmp_path / "one.json", (4, 7))
    report(tmp_path / "two.json", (6, 7))
    with pytest.raises(InvalidParameter, match="requests of one bucket"):
        run(measured(tmp_path))
    report(tmp_path / "one.json", (4, 4))
    with pytest.raises(InvalidParameter, match="requests of one bucket"):
        run(measured(tmp_path, output_tokens=[4, 6]))  # seven tokens are more than all


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 1},
        {"methods": {}},
        {"methods": {"fused": {"verdict": "identical"}}},
        {"workload": {}},
        {"machine": 3},
    ],
)
def test_a_file_that_is_no_report(tmp_path: Path, change: Mapping[str, object]) -> None:
    found = report(tmp_path / "one.json", (4, 3))
    (tmp_path / "one.json").write_text(json.dumps({**found, **change}))
    with pytest.raises(InputFileError, match=r"one\.json") as raised:
        run(measured(tmp_path))
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"workload_distribution": None}, "workload_distribution"),
        ({"workload_distribution": []}, "workload_distribution"),
        ({"workload_distribution": [[]]}, "workload_distribution"),
        ({"workload_distribution": [[0, 0], [0, 0]]}, "with a request in it"),
        ({"workload_distribution": [[1, 1], [1]]}, "equal length"),
        ({"workload_distribution": [[1, -1], [1, 1]]}, r"workload_distribution\[0\]\[1\]"),
        ({"workload_distribution": [[1, True], [1, 1]]}, r"workload_distribution\[0\]\[1\]"),
        ({"workload_distribution": [[1e308, 1e308], [1e308, 1]]}, "finite"),
        ({"workload_distribution": [[1] * 40] * 40}, "1000"),
        ({"total_request_rate": None}, "rate"),
        ({"total_request_rate": -3}, "rate: got -3"),
        ({"total_request_rate": 0}, "rate: got 0"),
        ({"total_request_rate": 10**400}, "rate"),
        ({"total_request_rate": 1e-300}, "rate: got 1e-300"),
        ({"total_request_rate": 1e300}, "1,000,000 GPUs can serve"),
        ({"total_request_rate": 1e7}, "1,000,000 GPUs can serve"),
        ({"gpu_info": {"own": {"cost": 1, "tputs": [[1e-300, 1], [1, 1]]}}}, "1,000,000 GPUs can serve"),
        ({"slice_factor": 0}, "slice_factor"),
        ({"slice_factor": 1.5}, "slice_factor"),
        ({"input_tokens": [100]}, "input_tokens"),
        ({"input_tokens": [1000, 100]}, "rising"),
        ({"input_tokens": None}, "input_tokens"),
        ({"gpu_info": []}, "gpu_info"),
        ({"gpu_info": {}}, "gpus"),
        ({"gpu_info": {"L4": {}}}, "--model"),
        ({"gpu_info": {"B300": {"tputs": [[1, 1], [1, 1]]}}}, "A100-80GB"),
        ({"gpu_info": {"T4": {"tputs": [[1, 1], [1, 1]]}}}, "one with a price"),
        ({"gpu_info": {"own": {"cost": -1, "tputs": [[1, 1], [1, 1]]}}}, "cost"),
        ({"gpu_info": {"own": {"cost": 0, "tputs": [[1, 1], [1, 1]]}}}, "cost"),
        ({"gpu_info": {"own": {"cost": 1e-9, "tputs": [[1, 1], [1, 1]]}}}, "price of own"),
        ({"gpu_info": {"own": {"cost": 1, "tputs": [[1, 1]]}}}, "2 rows of 2"),
        ({"gpu_info": {"own": {"cost": 1, "tputs": [[1, 1], [1, -2]]}}}, r"tputs\[1\]\[1\]: got -2"),
        ({"gpu_info": {"own": {"cost": 1, "tputs": [[1, 1], [1, 1]], "reports": []}}}, "one of tputs"),
        ({"gpu_info": {"own": {"cost": 1, "points": [[1, 1], [1, 1]]}}}, "requests_per_s"),
        ({"gpu_info": {"own": {"cost": 1, "reports": "one.json"}}}, "a list of files"),
        ({"gpu_info": {"own": {"cost": 1, "speed": 3}}}, "unknown field"),
        ({"rate": 3}, "unknown field"),
    ],
)
def test_bad_files(tmp_path: Path, change: Mapping[str, object], said: str) -> None:
    with pytest.raises(RequestError, match=said) as raised:
        run(written(tmp_path, **{"gpu_info": {"own": {"cost": 1, "tputs": [[1, 1], [1, 1]]}}, **change}))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000])
def test_files_that_are_no_json_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "w.json"
    path.write_text(text)
    with pytest.raises(InputFileError, match=r"w\.json"):
        run(str(path))
    with pytest.raises(InputFileError, match="No such file"):
        run(str(tmp_path / "absent.json"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "melange-example"),
        (("--preset", "melange-example", "--rate", "-1"), "rate"),
        (("--preset", "melange-example", "--rate", "nan"), "rate"),
        (("--preset", "melange-example", "--slice-factor", "0"), "slice_factor"),
        (("--preset", "melange-example", "--ttft-s", "-1"), "ttft_s"),
        (("--preset", "melange-example", "--itl-s", "inf"), "itl_s"),
        (("--preset", "melange-example", "--gpus", "A10G,A10G"), "different"),
        (("--preset", "melange-example", "--gpus", "B300"), "H100"),
        (("--preset", "melange-example", "--quant", "int8"), "--model"),
        (("--preset", "melange-example", "--model", "llama-2-7b"), "none where every GPU has its throughputs"),
        (("--preset", "melange-example", "--model", "llama-2-7b", "--gpus", "H100"), "input_tokens"),
    ],
)
def test_bad_flags(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(InvalidParameter, match=said):
        run(*words)


def test_points_of_a_file(tmp_path: Path) -> None:
    def cell(per_s: float) -> list[dict[str, float]]:
        return [
            {"requests_per_s": per_s, "ttft_s": 0.1, "itl_s": 0.01},
            {"requests_per_s": 4 * per_s, "ttft_s": 0.3, "itl_s": 0.03},
        ]

    info = {"own": {"cost": 1, "points": [[cell(10), cell(5)], [cell(5), cell(1)]]}}
    # 12/10 + 4/5 + 2/5 + 2/1 = 4.4 GPUs, a quarter of that where the limit is loose.
    assert run(written(tmp_path, gpu_info=info), "--itl-s", "0.02").data["mix"] == {"own": 5, "cost": 5.0}
    assert run(written(tmp_path, gpu_info=info), "--itl-s", "0.04").data["mix"] == {"own": 2, "cost": 2.0}


def test_unknown_fields_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnknownParameter, match=r"speed.*known: cost, points, reports, tputs"):
        run(written(tmp_path, gpu_info={"own": {"speed": 1}}))
