"""Qwen2ForCausalLM: Qwen2 and Qwen2.5. Llama with biases on q, k and v, and windows on some layers."""

from __future__ import annotations

from dataclasses import replace

from headrace.core.spec import (
    AttentionSpec,
    EmbeddingSpec,
    LayerNorms,
    LayerSpec,
    ModelSpec,
    NormSpec,
    WeightMap,
)
from headrace.models.config import ConfigReader, read_gated_mlp, read_layer_windows, read_sizes, read_window
from headrace.models.mapping import llama_like_map
from headrace.models.rope import read_rope


def describe(config: ConfigReader) -> tuple[ModelSpec, WeightMap]:
    """Raises CheckpointError, UnsupportedModel."""
    sizes = read_sizes(config, context=32768)
    config.require("use_mrope", False)
    attention = AttentionSpec(
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        scale=sizes.head_dim**-0.5,
        qkv_bias=True,
        rope=read_rope(config, sizes.head_dim, sizes.context),
    )
    mlp = read_gated_mlp(config)
    norm = NormSpec("rms", config.get_float("rms_norm_eps", 1e-6, high=1.0), sizes.hidden)
    norms = LayerNorms(pre_attn=norm, pre_mlp=norm)
    spec = ModelSpec(
        name="qwen2",
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        context=sizes.context,
        embedding=EmbeddingSpec(tied=config.get_bool("tie_word_embeddings", False)),
        layers=tuple(
            LayerSpec(replace(attention, window=window), mlp, norms) for window in read_windows(config, sizes.layers)
        ),
        final_norm=norm,
    )
    return spec, llama_like_map(spec)


def read_windows(config: ConfigReader, layers: int) -> tuple[int | None, ...]:
    """The window of each layer: by `layer_types`, or of the layers from `max_window_layers` on."""
    window = read_window(config, default=4096) if config.get_bool("use_sliding_window", False) else None
    full = config.get_int("max_window_layers", 28, low=0) if window is not None else layers
    return read_layer_windows(config, layers, window, lambda index: index >= full)
