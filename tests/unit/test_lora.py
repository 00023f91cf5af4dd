"""The reader of LoRA adapters: what it makes of a good one, and what it says of each kind of broken one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from headrace.core.errors import CheckpointError, HeadraceError, ModelNotFound, UnsupportedModel, WeightsMismatch
from headrace.models.registry import Description, describe
from headrace.weights.lora import MAX_PATTERNS, Adapter, read_adapter

SIZES = {
    "vocab_size": 19,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIG: Mapping[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
Arrays = dict[str, np.ndarray[Any, Any]]


def model(architecture: str = "LlamaForCausalLM", **changes: Any) -> Description:
    return describe({"architectures": [architecture], **SIZES, **changes}, "hf", {})


LLAMA = model()


def pair(module: str, rows: int, columns: int, rank: int = 2, seed: int = 0) -> Arrays:
    random = np.random.default_rng(seed)
    prefix = f"base_model.model.{module}"
    return {
        f"{prefix}.lora_A.weight": random.standard_normal((rank, columns)).astype(np.float32),
        f"{prefix}.lora_B.weight": random.standard_normal((rows, rank)).astype(np.float32),
    }


Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
GOOD = {**pair(Q0, 8, 8), **pair(DOWN1, 8, 12)}
A0 = f"base_model.model.{Q0}.lora_A.weight"
B0 = f"base_model.model.{Q0}.lora_B.weight"


def write(folder: Path, tensors: Arrays, config: Mapping[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(dict(config)))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def read(folder: Path, description: Description = LLAMA) -> Adapter:
    return read_adapter("a", folder, description.spec, description.adapter_map)


def made(folder: Path, tensors: Arrays | None = None, description: Description = LLAMA, **config: Any) -> Adapter:
    return read(write(folder, GOOD if tensors is None else tensors, {**CONFIG, **config}), description)


# ---------------------------------------------------------------- good ones


def test_names_values_and_scale(tmp_path: Path) -> None:
    adapter = made(tmp_path)
    assert adapter.name == "a" and set(adapter.weights) == {"layers.0.attn.q", "layers.1.mlp.down"}
    low = adapter.weights["layers.0.attn.q"]
    assert low.scale == 3.0 and low.a.shape == (2, 8) and low.b.shape == (8, 2)
    assert np.array_equal(low.a.dequantise(), GOOD[A0]) and np.array_equal(low.b.dequantise(), GOOD[B0])


def test_half_types_stay_as_they_are(tmp_path: Path) -> None:
    adapter = made(tmp_path, {name: tensor.astype(np.float16) for name, tensor in GOOD.items()})
    assert {low.a.scheme for low in adapter.weights.values()} == {"f16"}


def test_an_adapter_name_inside_the_tensors_names(tmp_path: Path) -> None:
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in GOOD.items()}
    assert set(made(tmp_path, named).weights) == {"layers.0.attn.q", "layers.1.mlp.down"}


@pytest.mark.parametrize(
    ("config", "q_scale", "down_scale"),
    [
        ({"use_rslora": True}, 6 / math.sqrt(2), 6 / math.sqrt(2)),
        ({"alpha_pattern": {"q_proj": 5}}, 2.5, 3.0),
        ({"alpha_pattern": {"layers.1.mlp.down_proj": 5.5}}, 3.0, 2.75),
        ({"alpha_pattern": {"proj": 5}}, 3.0, 3.0),
        ({"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 5}}, 2.5, 3.0),
        ({"alpha_pattern": {"^layers.0.self_attn.q_proj": 5}}, 3.0, 3.0),
        ({"alpha_pattern": {r".*\.(q_proj|down_proj)": 8, "q_proj": 1}}, 4.0, 4.0),
        ({"alpha_pattern": {r"layers\.\d+\.mlp\..*": 8, r"layers.[0-9]+.self_attn.(?:q|k)_proj$": 1}}, 0.5, 4.0),
        ({"alpha_pattern": {"q_proj|k_proj": -2}}, -1.0, 3.0),
        ({"lora_alpha": 0.5}, 0.25, 0.25),
    ],
)
def test_alphas_are_pefts(tmp_path: Path, config: dict[str, Any], q_scale: float, down_scale: float) -> None:
    weights = made(tmp_path, **config).weights
    scales = weights["layers.0.attn.q"].scale, weights["layers.1.mlp.down"].scale
    assert scales == pytest.approx((q_scale, down_scale))


def test_ranks_by_pattern(tmp_path: Path) -> None:
    tensors = {**pair(Q0, 8, 8, rank=5), **pair(DOWN1, 8, 12)}
    weights = made(tmp_path, tensors, rank_pattern={"self_attn.q_proj": 5}, use_rslora=True).weights
    assert weights["layers.0.attn.q"].scale == pytest.approx(6 / math.sqrt(5))
    assert weights["layers.1.mlp.down"].scale == pytest.approx(6 / math.sqrt(2))


def test_what_peft_writes_beside_is_no_obstacle(tmp_path: Path) -> None:
    inert = {
        "task_type": "CAUSAL_LM",
        "revision": "main",
        "inference_mode": True,
        "peft_version": "0.21.2",
        "base_model_name_or_path": "x",
        "auto_mapping": {"base_model_class": "x"},
        "lora_dropout": 0.1,
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "fan_in_fan_out": True,
        "bias": "none",
        "layers_to_transform": [0, 1],
        "layers_pattern": "layers",
        "exclude_modules": ["k_proj"],
        "loftq_config": {},
        "eva_config": {"rho": 2.0},
        "init_lora_weights": "gaussian",
        "modules_to_save": None,
        "use_dora": False,
        "trainable_token_indices": [],
        "a_key_of_tomorrow": None,
    }
    assert len(made(tmp_path, **inert).weights) == 2


@pytest.mark.parametrize("targets", ["all-linear", ".*_proj", None, ["self_attn.q_proj", DOWN1]])
def test_targets_may_be_told_in_any_way(tmp_path: Path, targets: object) -> None:
    assert len(made(tmp_path, target_modules=targets).weights) == 2


def test_fused_layers_share_a_and_split_b(tmp_path: Path) -> None:
    phi = model("Phi3ForCausalLM", pad_token_id=0)
    prefix = "model.layers.1"
    tensors = {**pair(f"{prefix}.self_attn.qkv_proj", 16, 8), **pair(f"{prefix}.mlp.gate_up_proj", 24, 8)}
    weights = made(tmp_path, tensors, phi, target_modules=["qkv_proj", "gate_up_proj"]).weights
    assert {name: low.b.shape for name, low in weights.items()} == {
        "layers.1.attn.q": (8, 2),
        "layers.1.attn.k": (4, 2),
        "layers.1.attn.v": (4, 2),
        "layers.1.mlp.gate": (12, 2),
        "layers.1.mlp.up": (12, 2),
    }
    whole = tensors[f"base_model.model.{prefix}.self_attn.qkv_proj.lora_B.weight"]
    assert np.array_equal(weights["layers.1.attn.v"].b.dequantise(), whole[12:])
    assert weights["layers.1.attn.q"].a is weights["layers.1.attn.v"].a


def test_experts_and_router(tmp_path: Path) -> None:
    moe = model("Qwen3MoeForCausalLM", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6, head_dim=2)
    tensors = {**pair("model.layers.0.mlp.experts.3.up_proj", 6, 8), **pair("model.layers.0.mlp.gate", 4, 8)}
    weights = made(tmp_path, tensors, moe, target_modules=["gate", "up_proj"]).weights
    assert set(weights) == {"layers.0.mlp.experts.3.up", "layers.0.mlp.router"}


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_and_the_copy_of_it(tmp_path: Path, tied: bool) -> None:
    copy = {"base_model.model.lm_head.base_layer.weight": np.zeros((19, 8), np.float32)}
    description = model(tie_word_embeddings=tied)
    weights = made(tmp_path, {**pair("lm_head", 19, 8), **copy}, description, target_modules=["lm_head"]).weights
    assert {name: low.b.shape for name, low in weights.items()} == {"head": (19, 2)}


def test_a_fingerprint_covers_values_and_config(tmp_path: Path) -> None:
    other = {**GOOD, B0: GOOD[B0] * 2}
    folders = [tmp_path / name for name in "abcd"]
    prints = [
        made(folders[0]).fingerprint,
        made(folders[1]).fingerprint,
        made(folders[2], other).fingerprint,
        made(folders[3], lora_alpha=8).fingerprint,
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 3


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rank=st.integers(1, 9),
    alpha=st.integers(-64, 64),
    stabilised=st.booleans(),
    chosen=st.sets(st.sampled_from([(i, part) for i in (0, 1) for part in ("q", "k", "v", "o", "gate", "up", "down")])),
)
def test_any_choice_of_layers(
    tmp_path: Path, rank: int, alpha: int, stabilised: bool, chosen: set[tuple[int, str]]
) -> None:
    shapes = {"q": (8, 8), "k": (4, 8), "v": (4, 8), "o": (8, 8), "gate": (12, 8), "up": (12, 8), "down": (8, 12)}
    tensors: Arrays = {}
    for i, part in chosen:
        block = "mlp" if part in ("gate", "up", "down") else "self_attn"
        tensors |= pair(f"model.layers.{i}.{block}.{part}_proj", *shapes[part], rank, seed=i)
    config = {"r": rank, "lora_alpha": alpha, "use_rslora": stabilised, "target_modules": "all-linear"}
    if not chosen:
        with pytest.raises(WeightsMismatch, match="holds no lora_A"):
            made(tmp_path, {}, **config)
        return
    weights = made(tmp_path, tensors, **config).weights
    blocks = dict.fromkeys("qkvo", "attn") | dict.fromkeys(("gate", "up", "down"), "mlp")
    assert set(weights) == {f"layers.{i}.{blocks[part]}.{part}" for i, part in chosen}
    for low in weights.values():
        assert low.scale == pytest.approx(alpha / (math.sqrt(rank) if stabilised else rank))
        assert low.a.shape[0] == low.b.shape[1] == rank


# ---------------------------------------------------------------- broken ones

BAD_CONFIGS: list[tuple[dict[str, Any], type[HeadraceError], str]] = [
    ({"peft_type": "IA3"}, UnsupportedModel, "peft_type is 'IA3', allowed: LORA"),
    ({"peft_type": None}, UnsupportedModel, "peft_type is None"),
    ({"bias": "lora_only"}, UnsupportedModel, "bias is 'lora_only', allowed: none"),
    ({"bias": "all"}, UnsupportedModel, "bias is 'all'"),
    ({"use_dora": True}, UnsupportedModel, "'use_dora' is True"),
    ({"lora_bias": True}, UnsupportedModel, "'lora_bias' is True"),
    ({"modules_to_save": ["lm_head"]}, UnsupportedModel, "'modules_to_save' is"),
    ({"trainable_token_indices": [3]}, UnsupportedModel, "'trainable_token_indices' is"),
    ({"alora_invocation_tokens": [3]}, UnsupportedModel, "'alora_invocation_tokens' is"),
    ({"layer_replication": [[0, 1]]}, UnsupportedModel, "'layer_replication' is"),
    ({"target_parameters": ["mlp.experts.up_proj"]}, UnsupportedModel, "'target_parameters' is"),
    ({"use_qalora": True}, UnsupportedModel, "'use_qalora' is True"),
    ({"a_key_of_tomorrow": 1}, UnsupportedModel, "'a_key_of_tomorrow' is 1"),
    ({"a_key_of_tomorrow": 0}, UnsupportedModel, "'a_key_of_tomorrow' is 0"),
    ({"init_lora_weights": "pissa"}, UnsupportedModel, "init_lora_weights is 'pissa'"),
    ({"init_lora_weights": "pissa_niter_4"}, UnsupportedModel, "init_lora_weights is"),
    ({"init_lora_weights": "olora"}, UnsupportedModel, "init_lora_weights is"),
    ({"init_lora_weights": "loftq"}, UnsupportedModel, "init_lora_weights is"),
    ({"init_lora_weights": 1}, UnsupportedModel, "init_lora_weights is 1"),
    ({"r": 0}, CheckpointError, "r is 0, allowed: an integer from 1 to"),
    ({"r": 10**9}, CheckpointError, "r is 1000000000"),
    ({"r": 2.0}, CheckpointError, "r is 2.0"),
    ({"r": True}, CheckpointError, "r is True"),
    ({"r": None}, CheckpointError, "r is None"),
    ({"r": 3}, WeightsMismatch, r"lora_A.weight' has shape \(2, 8\), needed \(3, 8\)"),
    ({"lora_alpha": "8"}, CheckpointError, "lora_alpha is '8', allowed: a number"),
    ({"lora_alpha": None}, CheckpointError, "lora_alpha is None"),
    ({"lora_alpha": 1e30}, CheckpointError, r"lora_alpha is 1e\+30"),
    ({"use_rslora": "yes"}, CheckpointError, "use_rslora is 'yes', allowed: true or false"),
    ({"target_modules": {"q": 1}}, CheckpointError, "target_modules is"),
    ({"target_modules": [1]}, CheckpointError, "target_modules is"),
    ({"target_modules": ["q_proj"]}, WeightsMismatch, "target_modules does not name: 'model.layers.1.mlp.down_proj'"),
    ({"rank_pattern": [1]}, CheckpointError, "rank_pattern is"),
    ({"rank_pattern": {"q_proj": 0}}, CheckpointError, r"rank_pattern\['q_proj'\] is 0"),
    ({"rank_pattern": {"q_proj": 4}}, WeightsMismatch, r"needed \(4, 8\)"),
    ({"alpha_pattern": {"q_proj": "x"}}, CheckpointError, r"alpha_pattern\['q_proj'\] is 'x'"),
    ({"alpha_pattern": {"(a+)+$": 1}}, UnsupportedModel, r"alpha_pattern is '\(a\+\)\+\$', allowed: module names"),
    ({"alpha_pattern": {"(": 1}}, UnsupportedModel, "allowed: module names"),
    ({"alpha_pattern": {".*.*.*.*x": 1}}, UnsupportedModel, "allowed: module names"),
    ({"alpha_pattern": {"q" * 300: 1}}, UnsupportedModel, "allowed: module names"),
    ({"alpha_pattern": {"": 1}}, UnsupportedModel, "allowed: module names"),
    ({"alpha_pattern": {f"q{i}": 1 for i in range(MAX_PATTERNS + 1)}}, CheckpointError, "an object with up to 4096"),
]


@pytest.mark.parametrize(("config", "kind", "message"), BAD_CONFIGS)
def test_a_config_it_does_not_take(
    tmp_path: Path, config: dict[str, Any], kind: type[HeadraceError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        made(tmp_path, **config)
    assert str(caught.value).startswith("adapter 'a': ") and "\n" not in str(caught.value)


def without(*names: str) -> Arrays:
    return {name: tensor for name, tensor in GOOD.items() if name not in names}


def changed(name: str, tensor: Any) -> Arrays:
    return {**GOOD, name: np.asarray(tensor)}


NAN = GOOD[B0].copy()
NAN[3, 1] = np.nan
INFINITE = GOOD[A0].copy()
INFINITE[0, 0] = -np.inf
COPY = "base_model.model.{}.base_layer.weight"

BAD_TENSORS: list[tuple[Arrays, type[HeadraceError], str]] = [
    (without(B0), WeightsMismatch, f"missing: '{Q0}.lora_B'"),
    (without(A0), WeightsMismatch, f"missing: '{Q0}.lora_A'"),
    ({}, WeightsMismatch, "holds no lora_A and lora_B"),
    (changed(A0.replace(".weight", ".default.weight"), GOOD[A0]), WeightsMismatch, "there twice"),
    (changed(A0, GOOD[A0][:, :7]), WeightsMismatch, r"has shape \(2, 7\), needed \(2, 8\)"),
    (changed(B0, GOOD[B0][:, :1]), WeightsMismatch, r"has shape \(8, 1\), needed \(8, 2\)"),
    (changed(B0, GOOD[B0][:7]), WeightsMismatch, r"has shape \(7, 2\), needed \(8, 2\)"),
    (changed(A0, GOOD[A0].T), WeightsMismatch, r"has shape \(8, 2\)"),
    (changed(A0, GOOD[A0][0]), WeightsMismatch, r"has shape \(8,\)"),
    (changed(A0, np.zeros((0, 8), np.float32)), WeightsMismatch, r"has shape \(0, 8\)"),
    (changed(B0, NAN), CheckpointError, "values that are not finite"),
    (changed(A0, INFINITE), CheckpointError, "values that are not finite"),
    (changed(A0, GOOD[A0].astype(np.float64)), UnsupportedModel, "is F64"),
    (changed(A0, GOOD[A0].astype(np.int8)), UnsupportedModel, "is I8"),
    (GOOD | pair("model.layers.2.self_attn.q_proj", 8, 8), WeightsMismatch, "no linear layer of this model has: 'base"),
    (GOOD | pair("model.layers.0.input_layernorm", 8, 1), WeightsMismatch, "no linear layer of this model has"),
    (GOOD | pair("model.embed_tokens", 19, 8), WeightsMismatch, "no linear layer of this model has"),
    (changed("base_model.model.model.embed_tokens.lora_embedding_A", [1.0]), UnsupportedModel, "adapts an embedding"),
    (changed(f"base_model.model.{Q0}.lora_B.bias", [1.0]), WeightsMismatch, "no linear layer of this model has"),
    (changed(f"base_model.model.{Q0}.lora_magnitude_vector", [1.0]), WeightsMismatch, "no linear layer"),
    (changed(A0.removeprefix("base_model."), GOOD[A0]), WeightsMismatch, "no linear layer of this model has: 'model.m"),
    (changed(COPY.format("lm_head"), np.zeros((19, 8), np.float32)), WeightsMismatch, "no linear layer"),
    (changed(COPY.format(Q0), np.zeros((9, 8), np.float32)), WeightsMismatch, r"needed \(8, 8\)"),
]


@pytest.mark.parametrize(("tensors", "kind", "message"), BAD_TENSORS)
def test_tensors_it_does_not_take(tmp_path: Path, tensors: Arrays, kind: type[HeadraceError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        made(tmp_path, {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
    assert str(caught.value).startswith("adapter 'a': ") and "\n" not in str(caught.value)


def test_many_strays_are_counted(tmp_path: Path) -> None:
    strays = GOOD | pair("model.layers.7.mlp.up_proj", 1, 1) | pair("x", 1, 1) | pair("y", 1, 1) | pair("z", 1, 1)
    with pytest.raises(WeightsMismatch, match="and 3 more"):
        made(tmp_path, strays)


def spoil_config(text: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "adapter_config.json").write_bytes(text)


def spoil_weights(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), ModelNotFound, "has no adapter_config.json"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), ModelNotFound, "has no adapter_model.safe"),
        (pickled, UnsupportedModel, "a pickle, which can run code; supported: adapter_model.safetensors"),
        (spoil_weights, CheckpointError, "adapter_model.safetensors"),
        (spoil_config(b"{"), CheckpointError, "not valid JSON"),
        (spoil_config(b"[1]"), CheckpointError, "allowed: an object"),
        (spoil_config(b'{"r": NaN}'), CheckpointError, "not finite"),
        (spoil_config(b"\xff"), CheckpointError, "not UTF-8"),
        (spoil_config(b"{}"), UnsupportedModel, "peft_type is None"),
        (spoil_config(b'{"a":' * 10_000), CheckpointError, "nested too deeply"),
    ],
)
def test_broken_files(tmp_path: Path, spoil: Callable[[Path], object], kind: type[HeadraceError], message: str) -> None:
    spoil(write(tmp_path, GOOD, CONFIG))
    with pytest.raises(kind, match=message) as caught:
        read(tmp_path)
    assert str(caught.value).startswith("adapter 'a': ")


@pytest.mark.parametrize("name", ["nowhere", "x" * 5000, "a\0b", "file"])
def test_no_such_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelNotFound, match="adapter 'a': ") as caught:
        read(tmp_path / name)
    assert len(str(caught.value)) < 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(
        ["peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "bias"]
    )
    | st.text(max_size=12),
    value=JSON | st.dictionaries(st.text("qv_.*+()|\\d[0-9]^$", max_size=12), st.integers(1, 4), max_size=3),
)
def test_any_value_at_any_key_is_taken_or_refused(tmp_path: Path, key: str, value: object) -> None:
    write(tmp_path, GOOD, {**CONFIG, key: value})
    try:
        adapter = read(tmp_path)
    except HeadraceError as error:
        assert str(error).startswith("adapter 'a': ") and len(str(error)) < 500
    else:
        assert all(math.isfinite(low.scale) for low in adapter.weights.values())
