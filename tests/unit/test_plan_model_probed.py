"""plan model on a probed machine, the models it can be asked of, and what is refused: all by round figures."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from headrace.cli import plan_model
from headrace.cli.plan_arguments import device_named
from headrace.core import flops
from headrace.core.errors import CheckpointError, ConfigError, HeadraceError, InvalidParameter, ModelNotFound
from headrace.core.sizing import parameters
from headrace.core.spec import ModelSpec
from headrace.models.registry import describe
from headrace.plan.devices import find_device
from headrace.plan.document import Document, Quantity
from headrace.plan.model import Question
from headrace.plan.probed import probed_document
from headrace.plan.profile import Figure, Machine, Profile, write_profile
from headrace.plan.room import native_peak
from headrace.plan.speed import (
    COLD,
    ProbedSpeed,
    decode_work,
    native_weights,
    operations,
    padding,
    prefill_work,
)
from headrace.plan.subject import KNOWN, Subject, hub_config, read_subject
from headrace.weights.hub import HubId
from tests.unit.hub_server import HubServer


def named(answer: Document, name: str) -> Quantity:
    return next(one for one in answer.quantities if one.name.startswith(name))


def value(answer: Document, name: str) -> float:
    found = named(answer, name).value
    assert isinstance(found, int | float)
    return found


def described(config: dict[str, object]) -> ModelSpec:
    return describe(config, "hf", {}).spec


# ---------------------------------------------------------------- a probed machine


def profile() -> Profile:
    """Round figures, so that predictions can be done by hand."""
    figures = [
        Figure("gemm", {"weights": kind, "rows": rows, "n": 2048, "k": 2048, "set_bytes": 2**27}, "FLOP/s", (rate,))
        for kind, few, many in (
            ("int4", 1e11, 1e12),
            ("int8", 1e11, 1e12),
            ("bfloat16", 2e10, 1e11),
            ("float32", 1e10, 1e11),
        )
        for rows, rate in ((1, few), (100, many))
    ]
    for dtype in ("bfloat16", "float32"):
        figures.append(Figure("attend", {"dtype": dtype}, "bytes/s", (1e10,)))
        figures.append(Figure("attention", {"phase": "prefill", "dtype": dtype}, "FLOP/s", (1e11,)))
    figures += [
        Figure("read", {"bytes": 1e6}, "bytes/s", (1e12,)),
        Figure("read", {"bytes": 1e8}, "bytes/s", (4e10,)),
        Figure("operation", {}, "s", (1e-6,)),
        Figure("rows", {}, "s", (1e-10,)),
        Figure("step", {"rows": 1}, "s", (2e-5,)),
        Figure("step", {"rows": 32}, "s", (1e-4,)),
    ]
    machine = Machine("test", 2, 2, "avx2", 8 * 2**30, {}, "Linux", "3.11", {}, "2026-01-01T00:00:00Z", 0.0, 0.0)
    return Profile(machine, tuple(figures), 1.0)


def demo_like() -> Subject:
    known = read_subject("smollm2-135m")
    return replace(known, layers={"q4_1": 106_168_320}, head="q8_0", table="q8_0")


def test_weights_as_the_native_backend_keeps_them() -> None:
    stored = native_weights(demo_like())
    assert stored.codes and [part.kind for part in stored.layers] == ["int4"] and stored.head.kind == "int8"
    # 5 bits a number of q4_1, 8.5 of q8_0, 61 norms of 576 float32.
    norms = 4 * 61 * 576
    assert stored.nbytes == 106_168_320 * 5 // 8 + 49_152 * 576 * 17 // 16 + norms
    plain = native_weights(read_subject("smollm2-135m"), "stored")
    assert not plain.codes and plain.nbytes == 2 * (134_515_008 - 61 * 576) + norms
    assert native_weights(demo_like(), "none").nbytes == 4 * 134_515_008
    # Rounded at load; what is packed already stays.
    assert native_weights(read_subject("smollm2-135m"), "int4").head.kind == "int8"
    assert native_weights(demo_like(), "int8").nbytes == stored.nbytes
    with pytest.raises(InvalidParameter, match="stored, none, int8, int4 on a probed machine"):
        native_weights(demo_like(), "fp8")


def test_a_step_by_its_parts() -> None:
    subject = demo_like()
    spec, weights = subject.spec, native_weights(subject)
    speed = ProbedSpeed(spec, weights, profile(), "bfloat16")
    parts = speed.parts_s(decode_work(spec, 1, 100, "bfloat16"))
    # One row: products at 1e11.
    assert parts["layers"] == pytest.approx(2 * 106_168_320 / 1e11)
    assert parts["head"] == pytest.approx(2 * 49_152 * 576 / 1e11)
    assert parts["attention"] == pytest.approx(100 * 23_040 / 1e10)
    assert parts["operations"] == pytest.approx(operations(spec) * 1e-6 + COLD * 2e-5)
    # A layer: two norms of 576, 9 + 3 heads of 64 rotated and rounded, 1536 activated.
    assert parts["rows"] == pytest.approx(30 * (2 * 576 + 2 * 12 * 64 + 1536) * 1e-10)
    many = speed.parts_s(prefill_work(spec, 1, 1024, "bfloat16"))
    assert many["layers"] == pytest.approx(1024 * 2 * 106_168_320 / 1e12)
    scores = flops.causal_flops(spec, 1024)
    assert many["attention"] == pytest.approx(scores / 1e11 * padding(1024) / padding(512))
    assert many["operations"] == pytest.approx(2 * (operations(spec) * 1e-6 + COLD * 2e-5))


def test_weights_of_16_bits_are_computed_at_their_own_rate() -> None:
    subject = read_subject("smollm2-135m")
    for weights, rate in ((native_weights(subject), 2e10), (native_weights(subject, "none", "float32"), 1e10)):
        speed = ProbedSpeed(subject.spec, weights, profile(), "float32")
        parts = speed.parts_s(decode_work(subject.spec, 1, 100, "float32"))
        assert parts["layers"] == pytest.approx(2 * 106_168_320 / rate)
        assert parts["head"] == pytest.approx(2 * 49_152 * 576 / rate)


def test_an_expert_meets_the_tokens_that_chose_it() -> None:
    config = {**KNOWN["smollm2-135m"], "architectures": ["MixtralForCausalLM"]}
    spec = described({**config, "num_local_experts": 8, "num_experts_per_tok": 2})
    weights = native_weights(Subject("moe", spec, "config.json", "float32"), "int8")
    part = weights.layers[0]
    assert part.share == pytest.approx(flops.layer_flops(spec) / 2 / (part.nbytes * 8 / 8.5))
    speed = ProbedSpeed(spec, weights, profile(), "bfloat16")
    rate = profile().gemm_rate("int8", 100 * part.share, 576)
    found = speed.parts_s(decode_work(spec, 100, 10, "bfloat16"))["layers"]
    assert found == pytest.approx(100 * flops.layer_flops(spec) / rate)


def test_peak_memory_is_a_sum() -> None:
    subject = demo_like()
    weights = native_weights(subject)
    alone = native_peak(subject.spec, weights, "bfloat16", 1, 64, 48, True)
    many = native_peak(subject.spec, weights, "bfloat16", 32, 64, 48, True)
    assert alone["weights"] == weights.nbytes and many["kv_cache"] == 32 * 112 * 23_040
    assert alone["kv_cache"] == 112 * 23_040 and alone["step"] < many["step"]
    assert "tokenizer" not in native_peak(subject.spec, weights, "bfloat16", 1, 64, 48, False)


def test_on_a_probed_machine() -> None:
    subject = demo_like()
    answer = probed_document(subject, profile(), native_weights(subject), "bfloat16", Question(64, 48, 32))
    assert named(answer, "ITL").basis == "measured" and "test, 2 threads" in named(answer, "ITL").source
    assert value(answer, "peak memory") > native_weights(subject).nbytes
    assert answer.plots[0].series[0].points[-1][0] == 32
    parts = answer.tables[0].rows
    assert sum(float(row[1]) for row in parts) == pytest.approx(1000 * value(answer, "TTFT"))  # type: ignore[arg-type]
    assert sum(float(row[2]) for row in parts) == pytest.approx(1000 * value(answer, "ITL"))  # type: ignore[arg-type]
    crowd = probed_document(subject, profile(), native_weights(subject), "bfloat16", Question(64, 48, 100))
    assert value(crowd, "throughput, 32") == value(answer, "throughput, 32") and "32 run at a time" in crowd.notes[-1]
    with pytest.raises(InvalidParameter, match="kv_dtype: got 'fp8', allowed: float32, bfloat16, int8"):
        probed_document(subject, profile(), native_weights(subject), "fp8", Question())
    with pytest.raises(InvalidParameter, match="1 on a probed machine"):
        probed_document(subject, profile(), native_weights(subject), "bfloat16", Question(tp=2))
    with pytest.raises(ConfigError, match="reads images"):
        probed_document(read_subject("nvlm-d-72b"), profile(), native_weights(subject), "bfloat16", Question())


@pytest.mark.demo
def test_the_demo_model_takes_what_is_foretold() -> None:
    subject = read_subject("demo")
    assert parameters(subject.spec) == 134_515_008
    assert subject.has_text and subject.layers == {"q4_1": 106_168_320} and subject.head == "q8_0"
    # Bytes that NativeBackend.memory() tells of it.
    assert native_weights(subject).nbytes == 96_576_768


# ---------------------------------------------------------------- what can be asked


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    plan_model.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def test_the_command_answers_from_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KNOWN["llama-2-7b"]), encoding="utf-8")
    for model in (str(tmp_path), str(tmp_path / "config.json")):
        answer = plan_model.document(arguments(model, "--device", "a100", "--tp", "2", "--concurrency", "8"))
        assert value(answer, "parameters") == 6_738_415_616 and "2 × A100-80GB" in answer.title
    known = plan_model.document(arguments("Llama-2-7B", "--device", "T4", "--quant", "int4", "--long-context"))
    assert "float16" in named(known, "KV cache per token").name and "published example" in known.tables[-1].title


def test_the_command_answers_for_a_probed_machine(tmp_path: Path) -> None:
    path = tmp_path / "state" / "headrace" / "probe.json"
    with pytest.raises(ConfigError, match="headrace plan probe"):
        plan_model.document(arguments("smollm2-135m"))
    write_profile(profile(), path)
    answer = plan_model.document(arguments("smollm2-135m", "--quant", "int8"))
    assert answer.title == "smollm2-135m on test" and "bfloat16" in named(answer, "KV cache per token").name
    answer = plan_model.document(arguments("smollm2-135m", "--profile", str(path), "--dtype", "float32"))
    assert "float32" in named(answer, "KV cache per token").name
    assert "never measured here" in named(answer, "ITL").note


def test_a_probed_gpu_overrides_its_data_sheet(tmp_path: Path) -> None:
    whose = {"card": "NVIDIA A100-SXM4-80GB", "memory_bytes": 85_000_000_000}
    card = (
        Figure("card", {"kind": "read", **whose}, "bytes/s", (1.7e12,)),
        Figure("card", {"kind": "product", "dtype": "bfloat16", **whose}, "FLOP/s", (250e12,)),
    )
    path = tmp_path / "state" / "headrace" / "probe.json"
    write_profile(replace(profile(), figures=card), path)
    device = device_named("a100")
    sheet = find_device("a100")
    assert (device.bandwidth, device.memory_bytes, device.basis) == (1.7e12, 85_000_000_000, "measured")
    assert device.flops == {**sheet.flops, "bfloat16": 250e12}
    assert (device.name, device.watts, device.peer_link) == (sheet.name, sheet.watts, sheet.peer_link)
    assert sheet.source in device.source and device.source.startswith("headrace plan probe")
    answer = plan_model.document(arguments("llama-2-7b", "--device", "A100-80GB"))
    assert named(answer, "ITL").basis == "measured" and "The probe's rates" in answer.notes[0]
    # Another card of the catalogue, and a file that is none, leave the data sheet.
    assert device_named("A100-40GB") is find_device("A100-40GB") and device_named("H100") is find_device("H100")
    path.write_text("{", encoding="utf-8")
    assert device_named("a100") is sheet


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device", "H1000"), "device: got 'H1000', allowed: A100-40GB"),
        (("--device", "H100", "--tp", "3"), "tp: got 3, allowed: what divides the model's heads"),
        (("--device", "H100", "--pp", "33"), "pp: got 33, allowed: up to the model's 32 layers"),
        (("--device", "H100", "--concurrency", "0"), "concurrency: got 0, allowed: an integer from 1"),
        (("--device", "H100", "--replicas", "-2"), "replicas: got -2"),
        (
            ("--device", "H100", "--prompt", "4096"),
            r"prompt \+ output: got 4224, allowed: up to the model's context, 4096",
        ),
        (("--device", "H100", "--quant", "stored"), "quant: got 'stored', allowed: none, fp8"),
        (("--device", "EPYC-7763", "--tp", "2"), "tp: got 2, allowed: 1 on EPYC-7763"),
        (("--device", "H100", "--profile", "x"), "allowed: one of them"),
        (("--long-context",), "with --device NAME"),
        (("--profile", "/nowhere/probe.json"), "headrace plan probe"),
    ],
)
def test_bad_questions_are_refused_in_a_line(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(HeadraceError, match=said) as caught:
        plan_model.document(arguments("llama-2-7b", *words))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"]
)
def test_a_config_without_a_key_is_refused_by_its_name(tmp_path: Path, key: str) -> None:
    config = {name: one for name, one in KNOWN["llama-2-7b"].items() if name != key}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        read_subject(str(path))


def test_of_a_hub_id_the_config_alone_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with HubServer() as hub:
        files = {"config.json": json.dumps(KNOWN["llama-2-7b"]).encode(), "model.safetensors": b"weights"}
        hub.repository("some/llama").push(files)
        found = hub_config(HubId("some/llama", "main"), endpoint=hub.url, cache_dir=tmp_path)
        assert json.loads(found.read_bytes()) == KNOWN["llama-2-7b"] and hub.fetched() == ["config.json"]
        with pytest.raises(ModelNotFound, match=r"model some/other: its config\.json cannot be fetched"):
            hub_config(HubId("some/other", "main"), endpoint=hub.url, cache_dir=tmp_path)


def test_unknown_models_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="llama-3-8b"):
        read_subject("no such model")
    path = tmp_path / "config.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_subject(str(path))
    assert find_device("h100").name == "H100"
