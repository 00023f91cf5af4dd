"""Every model family with what it can have: tiny configs that the parity tests hold against transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """An architecture, and the config values that are not `TINY`'s."""

    architecture: str
    config: Config = field(default_factory=dict)


def rope(kind: str, **numbers: Any) -> Config:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **numbers}}


def gemma_ropes(**full: Any) -> Config:
    local = {"rope_type": "default", "rope_theta": 500.0}
    return {
        "rope_parameters": {"sliding_attention": local, "full_attention": {"rope_type": "default"} | full},
    }


LLAMA3_ROPE = rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
LINEAR_ROPE = rope("linear", rope_theta=5000.0, factor=3.0)
DYNAMIC_ROPE = rope("dynamic", rope_theta=1000.0, factor=4.0)
"""Within the original context, the config's max_position_embeddings, it changes nothing."""
YARN_ROPE = rope("yarn", factor=4.0, original_max_position_embeddings=64)
YARN_ALL_KEYS = rope(
    "yarn",
    factor=8.0,
    original_max_position_embeddings=32,
    beta_fast=4.0,
    beta_slow=0.5,
    mscale=1.5,
    mscale_all_dim=0.4,
    truncate=False,
)
YARN_ATTENTION_FACTOR = rope("yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.7)
SLIDING = {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1, "num_hidden_layers": 3}
"""The first layer sees everything, the other two 19 tokens."""
MIXED_SPARSE = {"num_hidden_layers": 4, "mlp_only_layers": [1], "decoder_sparse_step": 2}
"""A layer of experts, the last, after three without."""


WIDER = {"hidden_size": 96, "initializer_range": 0.2}
"""Heads of 16, of which three quarters may turn."""
GEMMA_TIED_LINEAR = {
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
    **gemma_ropes(rope_type="linear", rope_theta=20000.0, factor=8.0),
}
"""With a wider embedding the last token's own logit would be the largest, whatever the layers do."""


def longrope(pairs: int, original: int, **numbers: Any) -> Config:
    """Within `original` tokens each pair is divided by its short factor, past it by its long one."""
    short, long = [1.0 + 0.3 * i for i in range(pairs)], [2.0 + 1.5 * i for i in range(pairs)]
    found = rope("longrope", short_factor=short, long_factor=long, **numbers)
    return {"max_position_embeddings": 1024, "original_max_position_embeddings": original, **found}


ODD = {
    "vocab_size": 131,
    "hidden_size": 45,
    "head_dim": 22,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 75,
}
LLAMA: Mapping[str, Case] = {
    "gqa": Case("llama"),
    "mha": Case("llama", {"num_key_value_heads": 6}),
    "one_kv_head": Case("llama", {"num_key_value_heads": 1}),
    "tied": Case("llama", {"tie_word_embeddings": True}),
    "biases": Case("llama", {"attention_bias": True, "mlp_bias": True}),
    "head_dim": Case("llama", {"head_dim": 20}),
    "odd_sizes": Case("llama", {"head_dim": 10, "intermediate_size": 77}),
    "odd_everywhere": Case("llama", ODD),
    "gelu": Case("llama", {"hidden_act": "gelu"}),
    "gelu_tanh": Case("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama3_rope": Case("llama", LLAMA3_ROPE),
    "linear_rope": Case("llama", LINEAR_ROPE),
    "dynamic_rope": Case("llama", DYNAMIC_ROPE),
    "yarn_rope": Case("llama", {"head_dim": 16, **YARN_ROPE}),
    "yarn_all_keys": Case("llama", {"seed": 1, "head_dim": 16, **YARN_ALL_KEYS}),
    "old_spelling": Case("llama", {**LLAMA3_ROPE, "spelling": "old"}),
    "sharded": Case("llama", {"max_shard_size": "40KB"}),
    "stored_bf16": Case("llama", {"dtype": "bfloat16"}),
}
MISTRAL: Mapping[str, Case] = {
    "mistral": Case("mistral", {"seed": 1, "head_dim": 12}),
    "mistral_sliding_tied": Case("mistral", {"sliding_window": 19, "tie_word_embeddings": True, **LINEAR_ROPE}),
    "mistral_yarn_old": Case("mistral", {"head_dim": 16, **YARN_ATTENTION_FACTOR, "spelling": "old"}),
}
QWEN: Mapping[str, Case] = {
    "qwen2": Case("qwen2", {"seed": 1}),
    "qwen2_tied_one_kv_head": Case("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2_sliding": Case("qwen2", SLIDING),
    "qwen2_yarn_old": Case("qwen2", {**YARN_ROPE, "spelling": "old"}),
    "qwen3": Case("qwen3"),
    "qwen3_sliding_tied_yarn": Case("qwen3", {**SLIDING, "tie_word_embeddings": True, **YARN_ROPE}),
    "qwen3_biases_linear_old": Case("qwen3", {"attention_bias": True, **LINEAR_ROPE, "spelling": "old"}),
}
GEMMA: Mapping[str, Case] = {
    "gemma3": Case("gemma3", gemma_ropes(rope_theta=20000.0)),
    "gemma3_tied_linear": Case("gemma3", GEMMA_TIED_LINEAR),
    "gemma3_softcap_biases": Case("gemma3", {"final_logit_softcapping": 4.0, "attention_bias": True}),
    "gemma3_old": Case("gemma3", {**GEMMA_TIED_LINEAR, "spelling": "old"}),
}
PHI: Mapping[str, Case] = {
    "phi3": Case("phi3"),
    "phi3_tied_partial_window": Case(
        "phi3",
        {
            "tie_word_embeddings": True,
            "sliding_window": 19,
            **WIDER,
            **rope("default", partial_rotary_factor=0.75),
        },
    ),
    "phi3_longrope_short": Case("phi3", longrope(4, 256)),
    "phi3_longrope_long": Case("phi3", longrope(4, 8)),
    "phi3_longrope_partial_old": Case(
        "phi3", {**WIDER, **longrope(6, 8, partial_rotary_factor=0.75, attention_factor=1.3), "spelling": "old"}
    ),
}
GPTJ: Mapping[str, Case] = {
    "gptj": Case("gptj"),
    "gptj_tied_whole_head": Case("gptj", {"tie_word_embeddings": True, "rotary_dim": 8}),
    "gptj_odd_sizes_old": Case("gptj", {"n_inner": 77, "activation_function": "gelu", "spelling": "old"}),
}
EXPERTS: Mapping[str, Case] = {
    "mixtral": Case("mixtral"),
    "mixtral_one_sliding_tied": Case(
        "mixtral", {"num_experts_per_tok": 1, "sliding_window": 19, "tie_word_embeddings": True}
    ),
    "mixtral_all_llama3_old": Case("mixtral", {"num_experts_per_tok": 5, **LLAMA3_ROPE, "spelling": "old"}),
    "qwen3_moe": Case("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_moe_mixed_yarn": Case(
        "qwen3_moe", {"norm_topk_prob": False, "attention_bias": True, **MIXED_SPARSE, **YARN_ATTENTION_FACTOR}
    ),
    "qwen3_moe_one_sliding_tied": Case(
        "qwen3_moe",
        {
            "num_experts_per_tok": 1,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 19,
            **DYNAMIC_ROPE,
        },
    ),
    "qwen3_moe_all_dense_first_old": Case(
        "qwen3_moe", {"num_experts_per_tok": 7, "norm_topk_prob": True, "mlp_only_layers": [0], "spelling": "old"}
    ),
}
CASES: Mapping[str, Case] = {**LLAMA, **MISTRAL, **QWEN, **GEMMA, **PHI, **GPTJ, **EXPERTS}

FAMILIES = ("gqa", "mistral", "qwen2_sliding", "qwen3", "gemma3", "phi3_longrope_long", "gptj", "mixtral", "qwen3_moe")
"""One of each family."""
