"""The choices where a GPU is there: types by its capability, memory by a budget that adds up, refusals that say what
would fit. Without a GPU nothing changes."""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cli import doctor, doctor_report
from headrace.core.config import EngineConfig, Gpu, Hardware, ResolvedConfig
from headrace.core.errors import BackendUnavailable, ConfigError, HeadraceError, InvalidParameter, OutOfMemory
from headrace.core.resolve import choose_backend, resolve
from headrace.core.resolve_cuda import card_use, usable_bytes
from headrace.core.sizing import (
    GRAPH_BYTES,
    CardBudget,
    CardUse,
    Stored,
    card_budget,
    card_weight_bytes,
    kv_bytes_per_block,
    stays_packed,
    stored_sizes,
    weight_bytes,
)
from headrace.core.spec import (
    AttentionSpec,
    EmbeddingSpec,
    LayerNorms,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    RopeSpec,
)
from headrace.engine.model import OpenModel
from headrace.models.registry import describe
from headrace.testing.checkpoints import tiny_checkpoint
from tests.unit.vision_cases import NVLM_D, nvlm_shapes

GIB = 2**30
BF16 = Stored(dtype="bfloat16")


def make_spec(
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    inner: int,
    vocab: int,
    context: int,
    moe: MoeSpec | None = None,
) -> ModelSpec:
    norm = NormSpec("rms", 1e-5, hidden)
    attention = AttentionSpec(heads, kv_heads, 128, 128**-0.5, rope=RopeSpec(128, 10000.0))
    layer = LayerSpec(attention, MlpSpec(True, "silu", inner, experts=moe), LayerNorms(norm, None, norm, None))
    return ModelSpec("m", vocab, hidden, context, EmbeddingSpec(False), (layer,) * layers, norm)


LLAMA_7B = make_spec(4096, 32, 32, 32, 11008, 32000, 4096)
LLAMA_8B = make_spec(4096, 32, 32, 8, 14336, 128256, 8192)
QWEN_72B = make_spec(8192, 80, 64, 8, 29568, 152064, 32768)
MIXTRAL = make_spec(4096, 32, 32, 8, 14336, 32000, 32768, MoeSpec(8, 2, 14336, True))


def make_gpu(name: str, total: float, capability: tuple[int, int], multiprocessors: int | None) -> Gpu:
    return Gpu(name, int(total * GIB), int((total - 0.6) * GIB), capability, multiprocessors)


H200 = make_gpu("NVIDIA H200", 139.8, (9, 0), 132)
RTX = make_gpu("NVIDIA GeForce RTX 4090", 23.5, (8, 9), 128)
A100 = make_gpu("NVIDIA A100-SXM4-40GB", 39.4, (8, 0), None)
T4 = make_gpu("Tesla T4", 14.6, (7, 5), 40)
P100 = make_gpu("Tesla P100", 15.9, (6, 0), 56)


def with_gpu(gpu: Gpu, backends: tuple[str, ...] = ("native", "torch")) -> Hardware:
    return Hardware(8, 64 * GIB, backends, gpu, "")


def run(gpu: Gpu, spec: ModelSpec = LLAMA_7B, stored: Stored = BF16, **chosen: Any) -> ResolvedConfig:
    return resolve(EngineConfig("m", **chosen), spec, with_gpu(gpu), stored)


def test_defaults_on_a_gpu_have_reasons() -> None:
    found = run(H200)
    assert (found.backend, found.device, found.dtype, found.quant, found.kv_dtype) == (
        *("torch", "cuda", "bfloat16", "none", "bfloat16"),
    )
    assert (found.max_num_seqs, found.max_num_batched_tokens, found.block_size) == (256, 8192, 16)
    assert found.max_model_len == 4096 and not found.batch_invariant
    assert found.reasons["device"] == "cuda: NVIDIA H200 (compute capability 9.0)"
    automatic = ("backend", "dtype", "quant", "kv_dtype", "batch_invariant", "num_blocks", "max_num_seqs")
    for name in automatic:
        assert found.reasons[name].startswith(f"{getattr(found, name)}: ") and "CPU" not in found.reasons[name]


def test_a_cpu_chooses_as_ever() -> None:
    without = Hardware(8, 64 * GIB, ("native", "torch"), None, "no driver")
    plain = resolve(EngineConfig("m"), LLAMA_7B, without)
    assert (plain.backend, plain.device, plain.dtype, plain.batch_invariant) == ("native", "cpu", "float32", True)
    assert plain.reasons["device"] == "cpu: no driver"
    for gpu in (None, H200):
        hardware = replace(without, gpu=gpu)
        found = asdict(resolve(EngineConfig("m", device="cpu"), LLAMA_7B, hardware))
        other = asdict(plain)
        assert found.pop("reasons").pop("device") == "as set" and other.pop("reasons") and found == other
    native = run(H200, backend="native")
    assert (native.device, native.reasons["device"]) == ("cpu", "cpu: where the native backend runs")


@pytest.mark.parametrize(
    ("gpu", "stored", "chosen", "expected"),
    [
        (H200, BF16, {}, ("bfloat16", "none", "bfloat16")),
        (H200, Stored(dtype="float16"), {}, ("float16", "none", "float16")),
        (H200, Stored(dtype="float32"), {}, ("bfloat16", "none", "bfloat16")),
        (H200, Stored(), {}, ("bfloat16", "none", "bfloat16")),
        (H200, BF16, {"dtype": "float32"}, ("float32", "none", "float32")),
        (H200, Stored(True, "float16", 4 * GIB), {}, ("float16", "stored", "float16")),
        (H200, Stored(True, None, 4 * GIB), {"dtype": "float16"}, ("float16", "stored", "float16")),
        (H200, Stored(True, None, 4 * GIB), {"quant": "none"}, ("bfloat16", "none", "bfloat16")),
        (H200, BF16, {"quant": "fp8", "kv_dtype": "fp8"}, ("bfloat16", "fp8", "fp8")),
        (RTX, BF16, {"quant": "fp8", "kv_dtype": "fp8"}, ("bfloat16", "fp8", "fp8")),
        (A100, BF16, {"quant": "int8"}, ("bfloat16", "int8", "bfloat16")),
        (A100, BF16, {"quant": "stored"}, ("bfloat16", "stored", "bfloat16")),
        (T4, BF16, {"quant": "int4"}, ("float16", "int4", "float16")),
    ],
)
def test_types(gpu: Gpu, stored: Stored, chosen: dict[str, str], expected: tuple[str, ...]) -> None:
    found = run(gpu, stored=stored, **chosen)
    assert (found.dtype, found.quant, found.kv_dtype) == expected
    for name in ("dtype", "quant", "kv_dtype"):
        wanted = "as set" if name in chosen else f"{getattr(found, name)}: "
        assert found.reasons[name].startswith(wanted)


def test_reasons_of_the_type() -> None:
    assert run(H200).reasons["dtype"] == "bfloat16: the checkpoint's own type"
    assert "half the bytes of the checkpoint's float32" in run(H200, stored=Stored(dtype="float32")).reasons["dtype"]
    assert "Tesla T4 (compute capability 7.5) does not" in run(T4, quant="int4").reasons["dtype"]
    assert run(H200, batch_invariant=True).batch_invariant
    assert run(H200, batch_invariant=True).reasons["batch_invariant"] == "as set"


@pytest.mark.parametrize(
    ("hardware", "chosen", "error", "words"),
    [
        (with_gpu(H200), {"device": "gpu"}, InvalidParameter, "device: got 'gpu', allowed: auto, cpu, cuda"),
        (with_gpu(H200), {"batch_invariant": 1}, InvalidParameter, "batch_invariant: got 1, allowed: true or false"),
        (with_gpu(H200), {"device": "cuda", "backend": "native"}, ConfigError, "allowed with the native backend: auto"),
        (with_gpu(H200, ("native",)), {"device": "cuda"}, BackendUnavailable, "pip install 'headrace[torch]'"),
        (Hardware(8, GIB, ("torch",), None, "no driver"), {"device": "cuda"}, BackendUnavailable, "used: no driver"),
        (with_gpu(P100), {"device": "cuda"}, BackendUnavailable, "Tesla P100 (compute capability 6.0) is too old: 7.5"),
        (with_gpu(A100), {"quant": "fp8"}, InvalidParameter, "allowed: auto, none, stored, int8, int4 on NVIDIA A100"),
        (with_gpu(A100), {"quant": "fp8"}, InvalidParameter, "(compute capability 8.0): fp8 needs 8.9"),
        (with_gpu(A100), {"kv_dtype": "fp8"}, InvalidParameter, "auto, bfloat16 on NVIDIA A100"),
        (with_gpu(H200), {"kv_dtype": "int8"}, InvalidParameter, "allowed: auto, bfloat16, fp8 on CUDA"),
        (with_gpu(H200), {"kv_dtype": "float16"}, InvalidParameter, "allowed: auto, bfloat16, fp8 on CUDA"),
        (
            with_gpu(T4),
            {"dtype": "bfloat16"},
            InvalidParameter,
            "dtype: got 'bfloat16', allowed: auto, float16, float32",
        ),
        (with_gpu(H200), {"device": "cpu", "quant": "fp8"}, InvalidParameter, "int8, int4 on the native backend"),
        (
            with_gpu(H200),
            {"device": "cpu", "kv_dtype": "fp8"},
            InvalidParameter,
            "float32, bfloat16, int8 on the native",
        ),
        (with_gpu(H200), {"device": "cpu", "backend": "torch", "quant": "fp8"}, InvalidParameter, "none on the torch"),
        (with_gpu(H200), {"policy": "static:300", "max_num_seqs": 299}, ConfigError, "needs max_num_seqs ≥ 300"),
        (with_gpu(H200), {"max_num_batched_tokens": 255}, ConfigError, "allowed: ≥ max_num_seqs (256)"),
        (with_gpu(H200), {"max_model_len": 4097}, ConfigError, "up to the model's 4096"),
    ],
)
def test_refusals(hardware: Hardware, chosen: dict[str, Any], error: type[HeadraceError], words: str) -> None:
    with pytest.raises(error) as caught:
        resolve(EngineConfig("m", **chosen), LLAMA_7B, hardware, BF16)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_cards_that_auto_leaves_alone() -> None:
    old = resolve(EngineConfig("m"), LLAMA_7B, with_gpu(P100))
    assert (old.backend, old.device) == ("native", "cpu") and "too old" in old.reasons["device"]
    bare = resolve(EngineConfig("m"), LLAMA_7B, with_gpu(H200, ("native",)))
    assert bare.device == "cpu" and "torch is not installed" in bare.reasons["device"]
    assert choose_backend(EngineConfig("m"), with_gpu(H200)) == ("torch", "the one that runs on a GPU")


def test_experts_stay_plain() -> None:
    with pytest.raises(InvalidParameter, match="auto, none, stored for a mixture of experts on CUDA"):
        run(H200, MIXTRAL, quant="int4")
    packed = Stored(True, None, 25 * GIB)
    use = card_use(run(H200, MIXTRAL, packed))
    assert card_weight_bytes(MIXTRAL, use, packed) == card_weight_bytes(MIXTRAL, replace(use, quant="none"), BF16)
    with pytest.raises(OutOfMemory, match="What would fit: no setting"):
        run(RTX, MIXTRAL, packed)


def use_of(**chosen: Any) -> CardUse:
    base = {"dtype": "bfloat16", "quant": "none", "kv_dtype": "bfloat16", "block_size": 16, "max_num_seqs": 256}
    return CardUse(**{**base, "max_num_batched_tokens": 8192, "max_model_len": 4096, **chosen})


def test_bytes_of_weights_are_exact() -> None:
    tables = 2 * 4 * 4096 * 64
    assert card_weight_bytes(LLAMA_7B, use_of(), BF16) == weight_bytes(LLAMA_7B) + tables == 2 * 6_738_415_616 + tables
    linear, rows = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32 * (5 * 4096 + 2 * 11008)
    plain = 2 * (6_738_415_616 - linear) + tables
    for quant in ("fp8", "int8"):
        assert card_weight_bytes(LLAMA_7B, use_of(quant=quant), BF16) == plain + linear + 4 * rows
    assert card_weight_bytes(LLAMA_7B, use_of(quant="int4"), BF16) == plain + linear * 20 // 32
    assert card_weight_bytes(LLAMA_7B, use_of(dtype="float32"), BF16) == 4 * 6_738_415_616 + tables
    packed = Stored(True, None, 1000, 10)
    assert card_weight_bytes(LLAMA_7B, use_of(quant="stored"), packed) == 1000 + 20 + tables
    assert card_weight_bytes(LLAMA_7B, use_of(), packed) == 2 * 6_738_415_616 + tables
    odd = replace(LLAMA_7B, layers=(replace(LLAMA_7B.layers[0], mlp=MlpSpec(True, "silu", 11)),))
    found = card_weight_bytes(odd, use_of(quant="int8"), BF16) - card_weight_bytes(odd, use_of(), BF16)
    products = 4 * (4096**2 - 4096 * 4) + 2 * (4096 * 22 - (16 * 4096 + 4 * 11)) + (4096 * 22 - (16 * 4096 + 4 * 4096))
    assert found == -products


def test_a_step_is_its_largest_results() -> None:
    wide, narrow = card_budget(LLAMA_7B, use_of(), BF16, 132), card_budget(LLAMA_7B, use_of(max_num_seqs=1), BF16, 132)
    per_token = 2 * (4 * 4096 + 4 * 4096 + 3 * 11008)
    parts = 2 * 4 * 132 * 4 * 130
    assert wide.step == 8192 * per_token + 256 * 32000 * 10 + parts
    assert narrow.step == 4096 * per_token + 64 * 32000 * 10 + parts, "one request of 4096 tokens, 64 scored rows"
    invariant = card_budget(LLAMA_7B, use_of(batch_invariant=True), BF16, 132)
    assert invariant.step - wide.step == 7 * parts
    eight = card_budget(LLAMA_7B, use_of(quant="fp8"), BF16, 132)
    assert eight.step - wide.step == 8192 * (11008 + 4)
    assert wide.graphs == GRAPH_BYTES and wide.images == 0 and wide.total == wide.weights + wide.step + wide.graphs
    unknown = card_budget(LLAMA_7B, use_of(), BF16, None)
    assert unknown.step > wide.step


def test_a_model_that_sees_needs_room_for_images(nvlm_spec: ModelSpec) -> None:
    found = card_budget(nvlm_spec, use_of(quant="fp8"), BF16, 132)
    assert 256 * 2**20 + 7 * 3 * 448**2 < found.images < 2 * GIB
    assert 72 * GIB < found.weights < 90 * GIB
    assert run(H200, nvlm_spec, quant="fp8").reasons["backend"] == "torch: the one that runs on a GPU"


@pytest.fixture(scope="module")
def nvlm_spec() -> ModelSpec:
    return describe(NVLM_D, "hf", nvlm_shapes(), None, lambda text: 151648).spec


def test_the_pool_is_what_is_left() -> None:
    found = run(H200)
    budget = card_budget(LLAMA_7B, card_use(found), BF16, 132)
    block = kv_bytes_per_block(LLAMA_7B, "bfloat16", 16)
    left = usable_bytes(H200) - budget.total
    assert found.num_blocks == left // block and "what is left of 90% of NVIDIA H200" in found.reasons["num_blocks"]
    assert usable_bytes(H200) == int(0.9 * H200.total_bytes) - (H200.total_bytes - H200.free_bytes)
    assert usable_bytes(replace(H200, free_bytes=0)) == 0
    halved = run(H200, kv_dtype="fp8")
    assert halved.num_blocks == left // (block // 2 + 16 * 2 * 32 * 32 * 4)
    small = run(H200, max_model_len=64, max_num_seqs=4)
    assert small.num_blocks == 16 and "enough for 4 requests of 64 tokens" in small.reasons["num_blocks"]
    given_mib = run(H200, kv_cache_mib=1024)
    assert given_mib.num_blocks == GIB // block and given_mib.reasons["num_blocks"].endswith("what kv_cache_mib holds")
    assert given_mib.max_model_len == given_mib.num_blocks * 16 == 2048


SIZE = r"([\d.]+) GiB"


@pytest.mark.parametrize(
    ("gpu", "spec", "stored", "chosen", "ways"),
    [
        (H200, QWEN_72B, BF16, {}, ["quant fp8 (73.3", "quant int4 (48.5"]),
        (H200, QWEN_72B, Stored(True, None, 40 * GIB), {"quant": "none"}, ["quant stored"]),
        (T4, LLAMA_7B, BF16, {}, ["quant int8", "quant int4"]),
        (A100, QWEN_72B, BF16, {"quant": "int4"}, ["no setting: it takes a card with more memory"]),
        (RTX, LLAMA_8B, BF16, {"kv_cache_mib": 8192}, ["kv_cache_mib up to 3807", "quant fp8", "quant int4"]),
        (replace(RTX, free_bytes=int(19.15 * GIB)), LLAMA_8B, BF16, {"max_model_len": 8192},
         ["max_num_seqs 32 with max_num_batched_tokens 1024", "quant fp8", "quant int4"]),
        (replace(RTX, free_bytes=19 * GIB), LLAMA_8B, BF16, {"max_model_len": 8192}, ["quant fp8", "quant int4"]),
        (replace(RTX, free_bytes=20 * GIB), LLAMA_8B, BF16, {"max_model_len": 8192},
         ["max_model_len up to", "max_num_seqs 32", "kv_dtype fp8", "quant fp8", "quant int4"]),
        (make_gpu("X", 8.0, (8, 6), 30), LLAMA_7B, BF16, {"quant": "int8", "max_model_len": 4096},
         ["max_num_seqs 32 with max_num_batched_tokens 1024, quant int4, max_model_len up to"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_explained(
    gpu: Gpu, spec: ModelSpec, stored: Stored, chosen: dict[str, Any], ways: list[str]
) -> None:
    with pytest.raises(OutOfMemory) as caught:
        run(gpu, spec, stored, **chosen)
    text = str(caught.value)
    assert "\n" not in text and gpu.name in text
    parts, _, rest = text.partition("; together ")
    together = float(re.match(SIZE, rest)[1])  # type: ignore[index]
    assert sum(map(float, re.findall(SIZE, parts))) == pytest.approx(together, abs=0.3)
    assert f"there are {usable_bytes(gpu) / GIB:.1f} GiB (90% of {gpu.total_bytes / GIB:.1f} GiB" in text
    offered = text.partition("What would fit: ")[2].split("; or ")
    assert len(offered) == len(ways), offered
    assert all(said.startswith(way) for said, way in zip(offered, ways, strict=True)), offered


OFFER = re.compile(r"(max_num_seqs|max_num_batched_tokens|kv_dtype|quant|max_model_len|kv_cache_mib) (?:up to )?(\w+)")


@settings(max_examples=60, deadline=None)
@given(
    spec=st.sampled_from([LLAMA_7B, LLAMA_8B, QWEN_72B, MIXTRAL]),
    gpu=st.sampled_from([H200, A100, RTX, T4]),
    free=st.floats(0.2, 1),
    quant=st.sampled_from(["auto", "int8", "int4", "stored"]),
    length=st.sampled_from([None, 600, 4096]),
    mib=st.sampled_from([None, None, 4096]),
    stored=st.sampled_from([BF16, Stored(True, None, 4 * GIB, 10**8)]),
)
def test_what_is_offered_fits(
    spec: ModelSpec, gpu: Gpu, free: float, quant: str, length: int | None, mib: int | None, stored: Stored
) -> None:
    """What fits stays within the card; what does not names settings with which it does."""
    gpu = replace(gpu, free_bytes=int(gpu.total_bytes * free))
    config = EngineConfig("m", quant=quant, max_model_len=length, kv_cache_mib=mib)
    if quant.startswith("int") and spec is MIXTRAL:
        return
    try:
        found = resolve(config, spec, with_gpu(gpu), stored)
    except OutOfMemory as error:
        assert str(error).startswith("the model does not fit")
        for way in str(error).partition("What would fit: ")[2].split("; or "):
            changes = {name: int(value) if value.isdecimal() else value for name, value in OFFER.findall(way)}
            assert changes or way.startswith("no setting")
            if changes:
                again: Any = replace(config, **changes)
                assert resolve(again, spec, with_gpu(gpu), stored).num_blocks > 0
        return
    budget: CardBudget = card_budget(spec, card_use(found), stored, gpu.multiprocessors)
    taken = budget.total + found.num_blocks * kv_bytes_per_block(spec, found.kv_dtype, found.block_size)
    assert taken <= usable_bytes(gpu) <= gpu.free_bytes
    assert found.max_model_len <= found.num_blocks * found.block_size


def test_what_a_gpu_keeps_packed() -> None:
    numbers = {"blk.0.attn_q.weight": 800, "blk.0.ffn_down.weight": 400, "token_embd.weight": 100, "blk.0.n.weight": 8}
    schemes = dict(zip(numbers, ("q4_K", "q6_K", "q4_K", "f32"), strict=True))
    assert stored_sizes(numbers, schemes) == (500, 508)
    for config, kept in (
        (None, False),
        ({"quant_method": "fp8"}, True),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, False),
        ({"quant_method": "gptq", "bits": 4}, True),
        ({"quant_method": "gptq", "bits": 8}, False),
        ({"quant_method": "awq"}, True),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4}}}}, True),
        ({"config_groups": {"g": {"weights": {"num_bits": 8, "strategy": "channel"}}}}, True),
        ({"config_groups": {"g": {"weights": {"num_bits": 8, "strategy": "group"}}}}, False),
    ):
        assert stays_packed(config) == kept, config


@pytest.fixture
def on_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that looks as if it had a GPU; nothing runs there."""
    for name in ("headrace.engine.model", "headrace.engine.hardware"):
        monkeypatch.setattr(f"{name}.probe_hardware", lambda: with_gpu(H200))


@pytest.mark.usefixtures("on_h200")
def test_an_open_model_tells_its_backend(tmp_path: Path) -> None:
    path = str(tiny_checkpoint(tmp_path / "model"))
    with closing(OpenModel(EngineConfig(path, kv_dtype="fp8", batch_invariant=True))) as opened:
        assert opened.stored == Stored(
            False, opened.stored.dtype, 0, sum(map(prod, opened.checkpoint.shapes().values()))
        )
        options = opened.options()
        assert (options.device, options.kv_dtype, options.batch_invariant) == ("cuda", "fp8", True)
        assert options.dtype == ("float16" if opened.stored.dtype == "float16" else "bfloat16")
        model = doctor.describe_model(opened)
        assert model["fits"] and model["free_bytes"] == H200.free_bytes
        assert sum(model["card_bytes"].values()) + model["kv_cache_bytes"] == model["needed_bytes"]
        fits = next(row for row in doctor_report.model_rows(model) if row.label == "fits")
        assert fits.text.endswith("for CUDA graphs, 139.2 GiB free on the GPU")
    with closing(OpenModel(EngineConfig(path, device="cpu"))) as opened:
        assert opened.options().device == "cpu" and doctor.describe_model(opened)["card_bytes"] is None


def test_the_demo_model_stays_packed_on_a_gpu(demo_path: Path, on_h200: None) -> None:
    with closing(OpenModel(EngineConfig(str(demo_path)))) as opened:
        assert opened.stored.packed and opened.stored.packed_bytes > 50e6 and opened.stored.plain_numbers > 28e6
        found = opened.config
        assert (found.device, found.dtype, found.quant, found.max_model_len) == ("cuda", "bfloat16", "stored", 8192)
        assert found.reasons["num_blocks"] == f"{found.num_blocks}: enough for 256 requests of 8192 tokens"
