"""Qwen3ForCausalLM: the dense Qwen3. Qwen2's windows; norms of q and k; biases only where the config says so."""

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
from headrace.models.config import ConfigReader, read_gated_mlp, read_sizes
from headrace.models.mapping import llama_like_map
from headrace.models.qwen2 import read_windows
from headrace.models.rope import read_rope


def describe(config: ConfigReader) -> tuple[ModelSpec, WeightMap]:
    """Raises CheckpointError, UnsupportedModel."""
    sizes = read_sizes(config, context=32768, kv_heads=32, head_dim=128)
    eps = config.get_float("rms_norm_eps", 1e-6, high=1.0)
    norm = NormSpec("rms", eps, sizes.hidden)
    head_norm = NormSpec("rms", eps, sizes.head_dim)
    bias = config.get_bool("attention_bias", False)
    attention = AttentionSpec(
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        scale=sizes.head_dim**-0.5,
        qkv_bias=bias,
        o_bias=bias,
        q_norm=head_norm,
        k_norm=head_norm,
        rope=read_rope(config, sizes.head_dim, sizes.context),
    )
    mlp = read_gated_mlp(config)
    norms = LayerNorms(pre_attn=norm, pre_mlp=norm)
    spec = ModelSpec(
        name="qwen3",
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
