"""LlamaForCausalLM: Llama 1 to 3, SmolLM2 and whoever else took the name."""

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
from headrace.models.config import ConfigReader, read_gated_mlp, read_sizes
from headrace.models.mapping import llama_like_map
from headrace.models.rope import read_rope


def describe(config: ConfigReader) -> tuple[ModelSpec, WeightMap]:
    """Raises CheckpointError, UnsupportedModel."""
    sizes = read_sizes(config, context=2048)
    # Keys that other programs write beside Llama's own and that would be another model if they were honoured.
    config.require("rope_interleaved", False)
    config.require("sliding_window", None)
    bias = config.get_bool("attention_bias", False)
    attention = AttentionSpec(
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        scale=sizes.head_dim**-0.5,
        qkv_bias=bias,
        o_bias=bias,
        rope=read_rope(config, sizes.head_dim, sizes.context),
    )
    mlp = read_gated_mlp(config, bias=config.get_bool("mlp_bias", False))
    norm = NormSpec("rms", config.get_float("rms_norm_eps", 1e-6, high=1.0), sizes.hidden)
    spec = ModelSpec(
        name="llama",
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        context=sizes.context,
        embedding=EmbeddingSpec(tied=config.get_bool("tie_word_embeddings", False)),
        layers=(LayerSpec(attention, mlp, LayerNorms(pre_attn=norm, pre_mlp=norm)),) * sizes.layers,
        final_norm=norm,
    )
    return spec, llama_like_map(spec)
