"""GGUF metadata and names as another spelling, against the demo file and against llama.cpp's converter rules."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader

from headrace.core.errors import CheckpointError, ModelError, UnsupportedModel
from headrace.core.spec import RopeScaling, RopeSpec
from headrace.models.registry import describe
from tests.unit.models_cases import Tensors, apply_map, build, save

Metadata = dict[str, Any]

LLAMA: Metadata = {
    "general.architecture": "llama",
    "general.file_type": 3,
    "llama.block_count": 3,
    "llama.embedding_length": 24,
    "llama.feed_forward_length": 20,
    "llama.context_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 37,
}
QWEN2: Metadata = {key.replace("llama", "qwen2"): value for key, value in LLAMA.items()} | {
    "general.architecture": "qwen2"
}
MIXTRAL = {"llama.expert_count": 4, "llama.expert_used_count": 2}
UNTIED = {"token_embd.weight": (37, 24), "output.weight": (37, 24)}

GGUF_NAMES = (
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("model.layers.", "blk."),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.", "attn_"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.", "ffn_"),
    ("_proj", ""),
)


def test_the_demo_file(demo_path: Path) -> None:
    reader = GGUFReader(demo_path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    description = describe(metadata, "gguf", shapes)
    rules = description.weight_map.rules
    assert sorted(source for rule in rules for source in rule.sources) == sorted(shapes)
    assert all(rule.shape == shapes[rule.sources[0]] for rule in rules)
    assert sum(math.prod(rule.shape) for rule in rules) == 134_515_008

    spec = description.spec
    assert (spec.vocab_size, spec.hidden_size, spec.context, len(spec.layers)) == (49_152, 576, 8192, 30)
    assert spec.embedding.tied and description.dtype is None
    attention, mlp = spec.layers[0].attention, spec.layers[0].mlp
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (9, 3, 64)
    assert attention.rope == RopeSpec(64, 1e5)
    assert (mlp.gated, mlp.activation, mlp.intermediate) == (True, "silu", 1536)
    assert spec.final_norm.eps == pytest.approx(1e-5)
    permuted = {(rule.target.split(".")[-2], rule.heads) for rule in rules if rule.op == "permute_rope"}
    assert permuted == {("q", 9), ("k", 3)}


def converted(tensors: Tensors, heads: Metadata) -> Tensors:
    """What llama.cpp's converter writes: its names, and the rows of q and k (of `heads`) from halves to interleaved."""
    result = {}
    for name, tensor in tensors.items():
        for theirs, ours in GGUF_NAMES:
            name = name.replace(theirs, ours)
        part = name.split(".")[-2]
        if part in heads:
            halves = tensor.reshape(heads[part], 2, -1, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        result[name] = tensor
    return result


@pytest.mark.parametrize(
    ("case", "metadata", "heads"),
    [
        ("llama", {**LLAMA, "llama.attention.layer_norm_rms_epsilon": 1e-6}, {"attn_q": 4, "attn_k": 2}),
        ("llama-biases", {**LLAMA, "llama.attention.layer_norm_rms_epsilon": 1e-6}, {"attn_q": 4, "attn_k": 2}),
        (
            "llama-mha-tied",
            {key: value for key, value in LLAMA.items() if not key.endswith("_kv")},
            {"attn_q": 4, "attn_k": 4},
        ),
        (
            "qwen2-tied",
            {**QWEN2, "qwen2.rope.freq_base": 1e6, "qwen2.attention.layer_norm_rms_epsilon": 1e-6},
            {},
        ),
    ],
)
def test_same_model_as_the_folder_it_came_from(case: str, metadata: Metadata, heads: Metadata, tmp_path: Path) -> None:
    config, tensors = save(build(case), tmp_path)
    if case == "llama-biases":
        config["hidden_act"] = "silu"  # GGUF has no word for another
    folder = describe(config, "hf", {})
    in_file = converted(tensors, heads)
    file = describe(metadata, "gguf", {name: tuple(tensor.shape) for name, tensor in in_file.items()})
    assert file.spec == folder.spec
    assert [(rule.target, rule.shape, rule.shard) for rule in file.weight_map.rules] == [
        (rule.target, rule.shape, rule.shard) for rule in folder.weight_map.rules
    ]
    wanted, got = apply_map(folder.weight_map, tensors), apply_map(file.weight_map, in_file)
    assert all(torch.equal(got[target], wanted[target]) for target in wanted)


def rope_of(**numbers: Any) -> RopeSpec | None:
    metadata = LLAMA | {f"llama.rope.{key.replace('__', '.')}": value for key, value in numbers.items()}
    return describe(metadata, "gguf", UNTIED).spec.layers[0].attention.rope


def test_rope_settings() -> None:
    assert rope_of() == RopeSpec(6, 1e4)
    assert rope_of(freq_base=5e5, dimension_count=6) == RopeSpec(6, 5e5)
    assert rope_of(scaling__type="none", scaling__factor=4.0) == RopeSpec(6, 1e4)
    linear = RopeSpec(6, 1e4, scaling=RopeScaling("linear", {"factor": 4.0}))
    assert rope_of(scaling__type="linear", scaling__factor=4.0) == linear
    assert rope_of(scaling__factor=4.0) == linear == rope_of(scale_linear=4.0)
    assert rope_of(scaling__type="linear", scaling__factor=1.0) == RopeSpec(6, 1e4)
    yarn = rope_of(scaling__type="yarn", scaling__factor=4.0, scaling__original_context_length=16)
    assert yarn is not None and yarn.scaling is not None
    assert yarn.scaling.kind == "yarn"
    assert (yarn.scaling.numbers["original_context"], yarn.scaling.numbers["beta_fast"]) == (16.0, 32.0)


def test_sizes_that_the_metadata_leaves_to_the_tensors() -> None:
    metadata = {key: value for key, value in LLAMA.items() if key != "llama.vocab_size"}
    assert describe(metadata, "gguf", UNTIED).spec.vocab_size == 37
    assert not describe(metadata, "gguf", UNTIED).spec.embedding.tied
    metadata["llama.attention.key_length"] = metadata["llama.attention.value_length"] = 10
    assert describe(metadata, "gguf", UNTIED).spec.layers[0].attention.head_dim == 10


def test_old_rotary_tables_may_be_left_over() -> None:
    ignorable = describe(LLAMA, "gguf", UNTIED).weight_map.ignorable
    assert any(re.fullmatch(pattern, "blk.12.attn_rot_embd") for pattern in ignorable)
    assert not any(re.fullmatch(pattern, "output.weight") for pattern in ignorable)


@pytest.mark.parametrize(
    ("change", "error", "key"),
    [
        ({"general.architecture": None}, CheckpointError, "general.architecture"),
        ({"general.architecture": 7}, CheckpointError, "general.architecture"),
        ({"general.architecture": "bert"}, UnsupportedModel, "'bert', allowed: llama, mistral3, qwen2"),
        ({"llama.embedding_length": None}, CheckpointError, "llama.embedding_length"),
        ({"llama.context_length": None}, CheckpointError, "llama.context_length"),
        ({"llama.block_count": 10_001}, CheckpointError, "llama.block_count"),
        ({"llama.block_count": 2**63}, CheckpointError, "llama.block_count"),
        ({"llama.attention.head_count": 5}, CheckpointError, "llama.attention.head_count"),
        ({"llama.attention.head_count_kv": 3}, CheckpointError, "num_key_value_heads"),
        ({"llama.attention.head_count_kv": [2, 2, 2]}, CheckpointError, "llama.attention.head_count_kv"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, CheckpointError, "layer_norm_rms_epsilon"),
        ({"llama.attention.value_length": 8}, UnsupportedModel, "llama.attention.value_length"),
        ({"llama.attention.causal": False}, UnsupportedModel, "llama.attention.causal"),
        ({"llama.attention.sliding_window": 4096}, UnsupportedModel, "llama.attention.sliding_window"),
        ({"llama.expert_count": 8}, CheckpointError, "llama.expert_used_count"),
        ({**MIXTRAL, "llama.expert_used_count": 9}, CheckpointError, "llama.expert_used_count"),
        ({**MIXTRAL, "llama.expert_count": 60_000}, CheckpointError, "num_local_experts"),
        ({**MIXTRAL, "llama.expert_count": -1}, CheckpointError, "llama.expert_count"),
        ({**MIXTRAL, "llama.expert_weights_norm": False}, UnsupportedModel, "llama.expert_weights_norm"),
        ({**MIXTRAL, "llama.expert_weights_scale": 2.5}, UnsupportedModel, "llama.expert_weights_scale"),
        ({**MIXTRAL, "llama.expert_gating_func": 2}, UnsupportedModel, "llama.expert_gating_func"),
        ({**MIXTRAL, "llama.expert_feed_forward_length": 7}, UnsupportedModel, "llama.expert_feed_forward_length"),
        ({**MIXTRAL, "llama.expert_shared_count": 1}, UnsupportedModel, "llama.expert_shared_count"),
        ({"llama.logit_scale": 0.5}, UnsupportedModel, "llama.logit_scale"),
        ({"llama.rope.dimension_count": 4}, UnsupportedModel, "llama.rope.dimension_count"),
        ({"llama.rope.scaling.type": "longrope"}, UnsupportedModel, "llama.rope.scaling.type"),
        ({"llama.rope.scaling.attn_factor": 1.2}, UnsupportedModel, "llama.rope.scaling.attn_factor"),
        ({"llama.rope.scaling.factor": 0.25}, CheckpointError, "llama.rope.scaling.factor"),
        ({"llama.rope.freq_base": 0.0}, CheckpointError, "llama.rope.freq_base"),
        ({"llama.vocab_size": -1}, CheckpointError, "llama.vocab_size"),
    ],
)
def test_refused(change: Metadata, error: type[ModelError], key: str) -> None:
    with pytest.raises(error) as caught:
        describe(LLAMA | change, "gguf", UNTIED)
    line = str(caught.value)
    assert key in line and "allowed: " in line and "\n" not in line and line.startswith("GGUF metadata: ")


@pytest.mark.parametrize("shapes", [{}, {"token_embd.weight": (37,)}, {"token_embd.weight": (10**8, 24)}])
def test_no_vocabulary_size_at_all(shapes: dict[str, tuple[int, ...]]) -> None:
    metadata = {key: value for key, value in LLAMA.items() if key != "llama.vocab_size"}
    with pytest.raises(CheckpointError, match=r"llama\.vocab_size"):
        describe(metadata, "gguf", shapes)


def test_inert_keys_are_ignored() -> None:
    inert = {"llama.rope.scaling.finetuned": True, "llama.expert_count": 0, "llama.expert_used_count": 0}
    others = {"tokenizer.ggml.model": "gpt2", "general.quantization_version": 2, "llama2.secret": 1}
    assert describe(LLAMA | inert | others, "gguf", UNTIED) == describe(LLAMA, "gguf", UNTIED)
