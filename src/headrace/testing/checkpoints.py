"""Tiny random checkpoints, written by transformers itself: what the parity tests load. Needs transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

TINY: Mapping[str, object] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
"""Weights wide enough that no two logits of a position are nearly tied."""


@dataclass(frozen=True, slots=True)
class Family:
    """How transformers calls an architecture, and the config values that are its own."""

    config_class: str
    model_class: str
    config: Mapping[str, object] = field(default_factory=dict)


FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaConfig", "LlamaForCausalLM"),
    "mistral": Family("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "qwen2": Family("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 12}),
    "gemma3": Family(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "num_hidden_layers": 3,
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 19,
            "sliding_window_pattern": 3,
        },
    ),
    "phi3": Family("Phi3Config", "Phi3ForCausalLM", {"pad_token_id": 0}),
    "gptj": Family("GPTJConfig", "GPTJForCausalLM", {"n_inner": 112, "rotary_dim": 4}),
    "mixtral": Family("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"head_dim": 12, "moe_intermediate_size": 40, "num_experts": 7, "num_experts_per_tok": 3},
    ),
    # Not described by headrace: what they have and no other family has is tested with specs made by hand.
    "gemma2": Family(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 19,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 5.0,
        },
    ),
    "granite": Family(
        "GraniteConfig",
        "GraniteForCausalLM",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 1.6,
            "pad_token_id": 0,
        },
    ),
}


def tiny_checkpoint(
    path: Path,
    architecture: str = "llama",
    *,
    seed: int = 0,
    spelling: Literal["new", "old"] = "new",
    dtype: str = "float32",
    max_shard_size: str = "1GB",
    **config: Any,
) -> Path:
    """Writes config.json and safetensors of a random model. `config` overrides `TINY`, in transformers' names.

    `spelling`: "old" is how transformers 4 wrote config.json. `dtype`: what the weights are stored in.
    Biases and norms are random as well, so that none of them can be forgotten unseen.
    """
    import transformers

    family = FAMILIES[architecture]
    config_class, model_class = getattr(transformers, family.config_class), getattr(transformers, family.model_class)
    transformers.set_seed(seed)
    own = copy.deepcopy(config)  # transformers writes into what it is given
    model = model_class(config_class(**{**TINY, **family.config, **own}))
    centre = 0.0 if architecture in ("gemma2", "gemma3") else 1.0  # Gemma adds the 1 itself
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0.0, 0.3)
        elif "norm" in name or ".ln_" in name:
            parameter.data.uniform_(centre - 0.5, centre + 0.5)
    stored = {"float32": model.float, "bfloat16": model.bfloat16, "float16": model.half}[dtype]()
    stored.save_pretrained(path, max_shard_size=max_shard_size)
    if spelling == "old":
        _respell(path / "config.json")
    return path


def _respell(file: Path) -> None:
    """rope_parameters -> rope_theta and rope_scaling (and their kin), dtype -> torch_dtype."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters", None)
    if rope is not None and "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config.pop("layer_types")
        rope = rope["full_attention"]
    if rope is not None:
        config["rope_theta"] = rope.pop("rope_theta")
        for key in ("partial_rotary_factor", "original_max_position_embeddings"):
            # Phi-3 kept them outside.
            if key in rope and config["model_type"] == "phi3":
                config[key] = rope.pop(key)
        kind = rope.pop("rope_type")
        rope["rope_type" if config["model_type"] == "gemma3_text" else "type"] = kind
        config["rope_scaling"] = None if kind == "default" else rope
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")
