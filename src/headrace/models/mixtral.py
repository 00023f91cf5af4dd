"""MixtralForCausalLM: Mistral's attention, and a router with experts in every layer.

The router's softmax runs over all experts; the weights of the chosen ones are made to sum to 1.
"""

from __future__ import annotations

from headrace.core.spec import (
    EmbeddingSpec,
    LayerNorms,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    WeightMap,
)
from headrace.models.config import ACTIVATIONS, MAX_EXPERTS_IN_ALL, ConfigReader, read_sizes, read_window
from headrace.models.mapping import ExpertNames, llama_like_map
from headrace.models.mistral import read_attention

EXPERTS = ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")


def describe(config: ConfigReader) -> tuple[ModelSpec, WeightMap]:
    """Raises CheckpointError, UnsupportedModel."""
    sizes = read_sizes(config, context=131_072, kv_heads=8)
    config.require("norm_topk_prob", True)
    norm = NormSpec("rms", config.get_float("rms_norm_eps", 1e-5, high=1.0), sizes.hidden)
    attention = read_attention(config, sizes, window=read_window(config, default=None), default_base=1e6)
    layer = LayerSpec(attention, _mlp(config, sizes.layers), LayerNorms(pre_attn=norm, pre_mlp=norm))
    spec = ModelSpec(
        name="mixtral",
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        context=sizes.context,
        embedding=EmbeddingSpec(tied=config.get_bool("tie_word_embeddings", False)),
        layers=(layer,) * sizes.layers,
        final_norm=norm,
    )
    return spec, llama_like_map(spec, spelled_experts=EXPERTS)


def _mlp(config: ConfigReader, layers: int) -> MlpSpec:
    """`intermediate` is one expert's, in the MlpSpec as in the MoeSpec."""
    inner = config.get_int("intermediate_size")
    count_key = config.first_of("num_local_experts", "num_experts")
    count = config.get_int(count_key, 8, high=MAX_EXPERTS_IN_ALL)
    if count * layers > MAX_EXPERTS_IN_ALL:
        config.bad(count_key, f"experts × layers up to {MAX_EXPERTS_IN_ALL}")
    experts = MoeSpec(
        num_experts=count,
        experts_per_token=config.get_int("num_experts_per_tok", 2, high=count),
        intermediate=inner,
        normalise_weights=True,
    )
    return MlpSpec(True, config.get_choice("hidden_act", ACTIVATIONS, "silu"), inner, experts=experts)
