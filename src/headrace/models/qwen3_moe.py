"""Qwen3MoeForCausalLM: q and k norms, and a router with experts in most layers.

transformers keeps the experts of a layer in one tensor in memory; on disk each has its own names, which are used here.
"""

from __future__ import annotations

from headrace.core.spec import (
    AttentionSpec,
    EmbeddingSpec,
    LayerNorms,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    WeightMap,
)
from headrace.models.config import (
    ACTIVATIONS,
    MAX_EXPERTS_IN_ALL,
    MAX_LAYERS,
    ConfigReader,
    read_gated_mlp,
    read_sizes,
    read_window,
)
from headrace.models.mapping import llama_like_map
from headrace.models.rope import read_rope


def describe(config: ConfigReader) -> tuple[ModelSpec, WeightMap]:
    """Raises CheckpointError, UnsupportedModel."""
    sizes = read_sizes(config, context=32768)
    eps = config.get_float("rms_norm_eps", 1e-6, high=1.0)
    norm = NormSpec("rms", eps, sizes.hidden)
    head_norm = NormSpec("rms", eps, sizes.head_dim)
    bias = config.get_bool("attention_bias", False)
    window = read_window(config, default=4096) if config.get_bool("use_sliding_window", False) else None
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
        window=window,
    )
    norms = LayerNorms(pre_attn=norm, pre_mlp=norm)
    spec = ModelSpec(
        name="qwen3_moe",
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        context=sizes.context,
        embedding=EmbeddingSpec(tied=config.get_bool("tie_word_embeddings", False)),
        layers=tuple(LayerSpec(attention, mlp, norms) for mlp in _mlps(config, sizes.layers)),
        final_norm=norm,
    )
    return spec, llama_like_map(spec)


def _mlps(config: ConfigReader, layers: int) -> list[MlpSpec]:
    """The MLP of each layer: experts in each `decoder_sparse_step`-th, but for `mlp_only_layers`.

    Where there are experts, `intermediate` is one expert's, in the MlpSpec as in the MoeSpec.
    """
    dense_only = config.get_indices("mlp_only_layers")
    step = config.get_int("decoder_sparse_step", 1, high=MAX_LAYERS)
    sparse = [index not in dense_only and (index + 1) % step == 0 for index in range(layers)]
    count_key = config.first_of("num_experts", "num_local_experts")
    count = config.get_int(count_key, low=0, high=MAX_EXPERTS_IN_ALL)
    if count * sum(sparse) > MAX_EXPERTS_IN_ALL:
        config.bad(count_key, f"experts × layers up to {MAX_EXPERTS_IN_ALL}")
    if not count or not any(sparse):
        return [read_gated_mlp(config)] * layers
    inner = config.get_int("moe_intermediate_size")
    experts = MoeSpec(
        num_experts=count,
        experts_per_token=config.get_int("num_experts_per_tok", high=count),
        intermediate=inner,
        normalise_weights=config.get_bool("norm_topk_prob", False),
    )
    routed = MlpSpec(True, config.get_choice("hidden_act", ACTIVATIONS, "silu"), inner, experts=experts)
    if all(sparse):
        return [routed] * layers
    dense = read_gated_mlp(config)
    return [routed if is_sparse else dense for is_sparse in sparse]
