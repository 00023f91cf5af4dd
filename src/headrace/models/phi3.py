"""Phi3ForCausalLM: Phi-3 and Phi-4-mini. Llama with q, k, v in one weight, gate and up in another."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.core.spec import (
    AttentionSpec,
    EmbeddingSpec,
    LayerNorms,
    LayerSpec,
    ModelSpec,
    NormSpec,
    WeightMap,
    WeightRule,
)
from headrace.models import mapping, names
from headrace.models.config import ConfigReader, read_gated_mlp, read_sizes
from headrace.models.rope import read_rope

ROPE_KINDS: Mapping[str, str] = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}
"""Phi-3's words, of which two are old (transformers, `configuration_phi3.py`)."""


def describe(config: ConfigReader) -> tuple[ModelSpec, WeightMap]:
    """Raises CheckpointError, UnsupportedModel."""
    sizes = read_sizes(config, context=4096)
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        config.require(key, False)
    attention = AttentionSpec(
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        scale=sizes.head_dim**-0.5,
        rope=read_rope(config, sizes.head_dim, sizes.context, partial=True, kinds=ROPE_KINDS),
        window=config.find_int("sliding_window"),
    )
    mlp = read_gated_mlp(config)
    norm = NormSpec("rms", config.get_float("rms_norm_eps", 1e-5, high=1.0), sizes.hidden)
    spec = ModelSpec(
        name="phi3",
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        context=sizes.context,
        embedding=EmbeddingSpec(tied=config.get_bool("tie_word_embeddings", False)),
        layers=(LayerSpec(attention, mlp, LayerNorms(pre_attn=norm, pre_mlp=norm)),) * sizes.layers,
        final_norm=norm,
    )
    return spec, _weight_map(spec)


def _weight_map(spec: ModelSpec) -> WeightMap:
    hidden = spec.hidden_size
    rules: list[WeightRule] = [*mapping.ends(spec, "model.embed_tokens", "model.norm", "lm_head")]
    for index, layer in enumerate(spec.layers):
        source, attn, mlp = f"model.layers.{index}", names.layer(index, "attn"), names.layer(index, "mlp")
        q_rows = layer.attention.heads * layer.attention.head_dim
        kv_rows = layer.attention.kv_heads * layer.attention.head_dim
        inner = layer.mlp.intermediate
        qkv = {f"{attn}.q": q_rows, f"{attn}.k": kv_rows, f"{attn}.v": kv_rows}
        rules += mapping.split_linear(f"{source}.self_attn.qkv_proj", qkv, hidden)
        rules += mapping.attention_output(f"{source}.self_attn.o_proj", attn, layer.attention, hidden)
        rules += mapping.split_linear(f"{source}.mlp.gate_up_proj", {f"{mlp}.gate": inner, f"{mlp}.up": inner}, hidden)
        rules += mapping.linear(f"{source}.mlp.down_proj", f"{mlp}.down", hidden, inner, False, "cols")
        rules += mapping.norms(source, names.layer(index, "norms"), layer.norms, mapping.LLAMA_NORMS)
    return WeightMap(tuple(rules), (mapping.INV_FREQ, *mapping.tied_head(spec)))
