"""MistralForCausalLM: Llama without biases, with one window for all layers (v0.1) or none."""

from __future__ import annotations

from headrace.core.spec import (
    AttentionSpec,
    EmbeddingSpec,
    LayerNorms,
    LayerSpec,
    ModelSpec,
    NormSpec,
    WeightMap,
)
from headrace.models.config import ConfigReader, Sizes, read_gated_mlp, read_layer_windows, read_sizes, read_window
from headrace.models.mapping import llama_like_map
from headrace.models.rope import DEFAULT_BASE, read_rope


def describe(config: ConfigReader) -> tuple[ModelSpec, WeightMap]:
    """Raises CheckpointError, UnsupportedModel."""
    sizes = read_sizes(config, context=131_072, kv_heads=8)
    config.require("mlp_bias", False)
    attention = read_attention(config, sizes, window=read_window(config, default=4096))
    mlp = read_gated_mlp(config)
    norm = NormSpec("rms", config.get_float("rms_norm_eps", 1e-6, high=1.0), sizes.hidden)
    spec = ModelSpec(
        name="mistral",
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        context=sizes.context,
        embedding=EmbeddingSpec(tied=config.get_bool("tie_word_embeddings", False)),
        layers=(LayerSpec(attention, mlp, LayerNorms(pre_attn=norm, pre_mlp=norm)),) * sizes.layers,
        final_norm=norm,
    )
    return spec, llama_like_map(spec)


def read_attention(
    config: ConfigReader, sizes: Sizes, window: int | None, default_base: float = DEFAULT_BASE
) -> AttentionSpec:
    """The attention of every layer of Mistral and Mixtral, with `window` or without one."""
    config.require("attention_bias", False)
    # transformers runs such a model as if the key were not there; the other Mistral classes honour it.
    windows = read_layer_windows(config, sizes.layers, window, lambda _: window is not None)
    if any(found != window for found in windows):
        config.unsupported("layer_types", "absent, or every layer as sliding_window says")
    return AttentionSpec(
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        scale=sizes.head_dim**-0.5,
        rope=read_rope(config, sizes.head_dim, sizes.context, default_base=default_base),
        window=window,
    )
