"""Tiny random checkpoints, written by transformers itself: what the parity tests load. Needs transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
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

MODEL_CLASSES: Mapping[str, tuple[str, str]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
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

    config_class, model_class = (getattr(transformers, name) for name in MODEL_CLASSES[architecture])
    transformers.set_seed(seed)
    model = model_class(config_class(**{**TINY, **config}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0.0, 0.3)
        elif "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    stored = {"float32": model.float, "bfloat16": model.bfloat16, "float16": model.half}[dtype]()
    stored.save_pretrained(path, max_shard_size=max_shard_size)
    if spelling == "old":
        _respell(path / "config.json")
    return path


def _respell(file: Path) -> None:
    """rope_parameters -> rope_theta and rope_scaling, dtype -> torch_dtype."""
    config = json.loads(file.read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")
