"""GGUF as another spelling of a Hugging Face config and of its tensor names.

Metadata keys: ggml's gguf.md and llama.cpp's `llama-model.cpp`. Every key of the architecture's own is read, checked or
known to be inert; an unknown one is refused, since it may change the mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from headrace.core.errors import UnsupportedModel
from headrace.core.spec import ModelSpec, WeightMap, WeightRule
from headrace.models import llama, qwen2
from headrace.models.config import MAX_CONTEXT, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, ConfigReader
from headrace.models.rope import DEFAULT_BASE, MAX_FACTOR


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    describe: Callable[[ConfigReader], tuple[ModelSpec, WeightMap]]
    permuted: bool
    """The converter re-paired the rows of q and k, head by head, from halves to interleaved."""


ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "llama": GgufArchitecture(llama.describe, permuted=True),
    "qwen2": GgufArchitecture(qwen2.describe, permuted=False),
}

TENSOR_NAMES: Mapping[str, str] = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""Hugging Face's name, less `model.layers.N.` and `.weight`, -> GGUF's, less `blk.N.`."""

ROTARY_TABLE = r"blk\.\d+\.attn_rot_embd(\.weight)?"
"""Inverse frequencies, which old converters stored."""

FREQUENCY_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

KNOWN_KEYS = frozenset(
    {
        "block_count",
        "embedding_length",
        "feed_forward_length",
        "context_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.causal",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.attn_factor",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.finetuned",
        "expert_count",
        "expert_used_count",
        "tensor_data_layout",
    }
)


def describe(
    metadata: ConfigReader, architecture: str, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[ModelSpec, WeightMap]:
    """`shapes`: by GGUF tensor name, rows first (the reverse of the order in the file).

    Raises CheckpointError, UnsupportedModel.
    """
    for name in FREQUENCY_TENSORS:
        if name in shapes:
            raise UnsupportedModel(f"{metadata.where}: tensor {name} is present, allowed: files without it")
    kind = ARCHITECTURES[architecture]
    config = ConfigReader(_config(metadata, f"{architecture}.", shapes), metadata.where)
    spec, weights = kind.describe(config)
    rules = tuple(_rule(rule, spec, kind.permuted) for rule in weights.rules)
    return spec, WeightMap(rules, (ROTARY_TABLE,))


def _config(metadata: ConfigReader, prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
    """The metadata as a Hugging Face config."""
    metadata.refuse_unknown(KNOWN_KEYS, prefix)
    hidden = metadata.get_int(f"{prefix}embedding_length")
    heads_key = f"{prefix}attention.head_count"
    heads = metadata.get_int(heads_key, high=MAX_HEADS)
    head_dim = metadata.find_int(f"{prefix}attention.key_length", high=MAX_HEADS)
    if head_dim is None:
        if hidden % heads:
            metadata.bad(heads_key, f"a divisor of {prefix}embedding_length ({hidden})")
        head_dim = hidden // heads
    metadata.require(f"{prefix}attention.value_length", head_dim)
    metadata.require(f"{prefix}rope.dimension_count", head_dim)
    metadata.require(f"{prefix}attention.causal", True)
    metadata.require(f"{prefix}expert_count", 0)
    return {
        "vocab_size": _vocab_size(metadata, f"{prefix}vocab_size", shapes),
        "hidden_size": hidden,
        "intermediate_size": metadata.get_int(f"{prefix}feed_forward_length"),
        "num_hidden_layers": metadata.get_int(f"{prefix}block_count", high=MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get_int(f"{prefix}attention.head_count_kv", heads, high=MAX_HEADS),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.get_int(f"{prefix}context_length", high=MAX_CONTEXT),
        "rms_norm_eps": metadata.get_float(f"{prefix}attention.layer_norm_rms_epsilon", high=1.0),
        "rope_parameters": _rope(metadata, f"{prefix}rope."),
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        "tie_word_embeddings": "output.weight" not in shapes,
    }


def _vocab_size(metadata: ConfigReader, key: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    size = metadata.find_int(key, high=MAX_VOCAB)
    if size is not None:
        return size
    shape = shapes.get("token_embd.weight", ())
    return shape[0] if len(shape) == 2 and 1 <= shape[0] <= MAX_VOCAB else metadata.bad(key, "a vocabulary size")


def _rope(metadata: ConfigReader, prefix: str) -> dict[str, object]:
    """`rope.*` as transformers' rope_parameters; a factor without a type means linear, as in llama.cpp."""
    base = metadata.get_float(f"{prefix}freq_base", DEFAULT_BASE, low=1.0)
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        metadata.require(f"{prefix}scaling.{key}", 1.0)
    kinds = {"none": "default", "linear": "linear", "yarn": "yarn"}
    kind = metadata.get_choice(f"{prefix}scaling.type", kinds, "linear")
    factor_key = metadata.first_of(f"{prefix}scaling.factor", f"{prefix}scale_linear")
    factor = metadata.get_float(factor_key, 1.0, high=MAX_FACTOR)
    if factor < 1.0:
        metadata.bad(factor_key, f"a number from 1 to {MAX_FACTOR:g}")
    if kind == "default" or (kind == "linear" and factor == 1.0):
        return {"rope_type": "default", "rope_theta": base}
    return {
        "rope_type": kind,
        "rope_theta": base,
        "factor": factor,
        "original_max_position_embeddings": metadata.find_int(
            f"{prefix}scaling.original_context_length", high=MAX_CONTEXT
        ),
        "beta_fast": metadata.find_float(f"{prefix}scaling.yarn_beta_fast", high=MAX_FACTOR),
        "beta_slow": metadata.find_float(f"{prefix}scaling.yarn_beta_slow", high=MAX_FACTOR),
    }


def _rule(rule: WeightRule, spec: ModelSpec, permuted: bool) -> WeightRule:
    renamed = replace(rule, sources=tuple(_tensor_name(source) for source in rule.sources))
    part = rule.target.split(".")[2:4]
    if not permuted or part not in (["attn", "q"], ["attn", "k"]):
        return renamed
    attention = spec.layers[0].attention
    heads = attention.heads if part[1] == "q" else attention.kv_heads
    return replace(renamed, op="permute_rope", heads=heads)


def _tensor_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`"""
    stem, _, suffix = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{TENSOR_NAMES[stem]}.{suffix}"
    index, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{index}.{TENSOR_NAMES[part]}.{suffix}"
