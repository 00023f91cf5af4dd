"""Gemma3ForCausalLM, the text model: four norms a layer, q and k norms, windows with a rotary base of their own."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.core.spec import (
    AttentionSpec,
    EmbeddingSpec,
    HeadSpec,
    LayerNorms,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    NormSpec,
    RopeSpec,
    WeightMap,
)
from headrace.models.config import (
    ACTIVATIONS,
    MAX_LAYERS,
    ConfigReader,
    Sizes,
    read_layer_windows,
    read_sizes,
    read_window,
)
from headrace.models.mapping import llama_like_map
from headrace.models.rope import rope_from_table

NORMS: Mapping[str, str] = {
    "pre_attn": "input_layernorm",
    "post_attn": "post_attention_layernorm",
    "pre_mlp": "pre_feedforward_layernorm",
    "post_mlp": "post_feedforward_layernorm",
}


def describe(config: ConfigReader) -> tuple[ModelSpec, WeightMap]:
    """Raises CheckpointError, UnsupportedModel."""
    sizes = read_sizes(config, context=131_072)
    config.require("use_bidirectional_attention", False)
    eps = config.get_float("rms_norm_eps", 1e-6, high=1.0)
    norm = NormSpec("rms", eps, sizes.hidden, unit_offset=True)
    head_norm = NormSpec("rms", eps, sizes.head_dim, unit_offset=True)
    bias = config.get_bool("attention_bias", False)
    scale = config.get_float("query_pre_attn_scalar", 256.0) ** -0.5
    # transformers 5.23 reads this key and does not apply it; the released checkpoints leave it null.
    softcap = config.find_float("attn_logit_softcapping")
    local, full = _ropes(config, sizes)

    def attention(window: int | None) -> AttentionSpec:
        return AttentionSpec(
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            scale=scale,
            qkv_bias=bias,
            o_bias=bias,
            q_norm=head_norm,
            k_norm=head_norm,
            rope=full if window is None else local,
            window=window,
            softcap=softcap,
        )

    mlp = MlpSpec(
        gated=True,
        activation=config.get_choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        intermediate=config.get_int("intermediate_size"),
    )
    spec = ModelSpec(
        name="gemma3",
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        context=sizes.context,
        # Gemma rounds the scale to the weights' type before it multiplies.
        embedding=EmbeddingSpec(tied=config.get_bool("tie_word_embeddings", True), scale=sizes.hidden**0.5),
        layers=tuple(
            LayerSpec(attention(window), mlp, LayerNorms(norm, norm, norm, norm))
            for window in _windows(config, sizes.layers)
        ),
        final_norm=norm,
        head=HeadSpec(softcap=config.find_float("final_logit_softcapping")),
    )
    return spec, llama_like_map(spec, NORMS)


def _ropes(config: ConfigReader, sizes: Sizes) -> tuple[RopeSpec, RopeSpec]:
    """(windowed layers', full layers'). transformers 5 nests one table for each under `rope_parameters`; before it,
    `rope_scaling` was for the full layers alone."""
    tables = config.find_table("rope_parameters") or ConfigReader({}, f"{config.where}: rope_parameters")
    tables.refuse_unknown(("full_attention", "sliding_attention"))
    if config.has("rope_scaling") and tables.has("full_attention"):
        config.unsupported("rope_scaling", "absent where rope_parameters is given")
    empty = ConfigReader({}, config.where)
    local = tables.find_table("sliding_attention") or empty
    full = tables.find_table("full_attention") or config.find_table("rope_scaling") or empty
    head_dim, context = sizes.head_dim, sizes.context
    return (
        rope_from_table(config, local, head_dim, context, base_key="rope_local_base_freq"),
        rope_from_table(config, full, head_dim, context, default_base=1e6),
    )


def _windows(config: ConfigReader, layers: int) -> tuple[int | None, ...]:
    """The window of each layer: by `layer_types`, or all but each `sliding_window_pattern`-th."""
    window = read_window(config, default=4096)
    pattern = config.get_int("sliding_window_pattern", 6, high=MAX_LAYERS)
    return read_layer_windows(config, layers, window, lambda index: (index + 1) % pattern != 0)
