"""GPTJForCausalLM: attention and MLP side by side behind one norm, interleaved rotary pairs, a head with a bias."""

from __future__ import annotations

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
    WeightRule,
)
from headrace.models import mapping, names
from headrace.models.config import ACTIVATIONS, MAX_CONTEXT, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, ConfigReader
from headrace.models.rope import DEFAULT_BASE

MASKS = r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"
"""The causal mask, which older versions saved in each layer."""


def describe(config: ConfigReader) -> tuple[ModelSpec, WeightMap]:
    """Raises CheckpointError, UnsupportedModel."""
    hidden_key = config.first_of("n_embd", "hidden_size")
    hidden = config.get_int(hidden_key)
    heads = config.get_int(config.first_of("n_head", "num_attention_heads"), high=MAX_HEADS)
    if hidden % heads:
        config.bad(hidden_key, f"a multiple of the number of heads ({heads})")
    head_dim = hidden // heads
    rotary = config.get_int("rotary_dim", 64, high=head_dim)
    if rotary % 2:
        config.bad("rotary_dim", f"an even number up to the head's {head_dim}")
    for key in ("rope_parameters", "rope_scaling"):
        config.require(key, None)
    attention = AttentionSpec(
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=RopeSpec(rotary, DEFAULT_BASE, interleaved=True),
    )
    mlp = MlpSpec(
        gated=False,
        activation=config.get_choice("activation_function", ACTIVATIONS, "gelu_new"),
        intermediate=config.get_int("n_inner", 4 * hidden),
        bias=True,
    )
    norm = NormSpec("layer", config.get_float("layer_norm_epsilon", 1e-5, high=1.0), hidden, bias=True)
    layers = config.get_int(config.first_of("n_layer", "num_hidden_layers"), high=MAX_LAYERS)
    spec = ModelSpec(
        name="gptj",
        vocab_size=config.get_int("vocab_size", high=MAX_VOCAB),
        hidden_size=hidden,
        context=config.get_int(config.first_of("n_positions", "max_position_embeddings"), 2048, high=MAX_CONTEXT),
        embedding=EmbeddingSpec(tied=config.get_bool("tie_word_embeddings", False)),
        layers=(LayerSpec(attention, mlp, LayerNorms(pre_attn=norm), parallel=True),) * layers,
        final_norm=norm,
        head=HeadSpec(bias=True),
    )
    return spec, _weight_map(spec)


def _weight_map(spec: ModelSpec) -> WeightMap:
    hidden = spec.hidden_size
    rules: list[WeightRule] = [*mapping.ends(spec, "transformer.wte", "transformer.ln_f", "lm_head")]
    for index, layer in enumerate(spec.layers):
        source, attn, mlp = f"transformer.h.{index}", names.layer(index, "attn"), names.layer(index, "mlp")
        for part in ("q", "k", "v"):
            rules += mapping.linear(f"{source}.attn.{part}_proj", f"{attn}.{part}", hidden, hidden, False, "rows")
        rules += mapping.attention_output(f"{source}.attn.out_proj", attn, layer.attention, hidden)
        inner = layer.mlp.intermediate
        rules += mapping.linear(f"{source}.mlp.fc_in", f"{mlp}.up", inner, hidden, layer.mlp.bias, "rows")
        rules += mapping.linear(f"{source}.mlp.fc_out", f"{mlp}.down", hidden, inner, layer.mlp.bias, "cols")
        rules += mapping.norms(source, names.layer(index, "norms"), layer.norms, {"pre_attn": "ln_1"})
    return WeightMap(tuple(rules), (MASKS, *mapping.tied_head(spec)))
