"""GGUF as another spelling of a Hugging Face config and of its tensor names.

Metadata keys: ggml's gguf.md and llama.cpp's loader of each architecture. Every key of the architecture's own is read,
checked or known to be inert; an unknown one is refused, since it may change the mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from headrace.core.spec import LayerSpec, ModelSpec, NormSpec, WeightMap
from headrace.models import gemma3, llama, mixtral, phi3, qwen2, qwen3, qwen3_moe
from headrace.models.config import MAX_CONTEXT, MAX_EXPERTS_IN_ALL, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, ConfigReader
from headrace.models.gguf_rope import LONG_AND_SHORT, ReadVector, RopeTensors, read_rope
from headrace.models.gguf_tensors import GEMMA3_NAMES, NAMES, PHI3_NAMES, ROTARY_TABLE, read_rule
from headrace.models.rope import DEFAULT_BASE

Shapes = Mapping[str, tuple[int, ...]]
HfConfig = dict[str, Any]

KNOWN_KEYS = frozenset(
    {
        "block_count",
        "embedding_length",
        "feed_forward_length",
        "context_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.causal",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.attn_factor",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.finetuned",
        "expert_count",
        "expert_used_count",
        "tensor_data_layout",
    }
)
EXPERT_KEYS = frozenset(
    {"expert_feed_forward_length", "expert_weights_norm", "expert_weights_scale", "expert_gating_func"}
)
WINDOW = "attention.sliding_window"
GEMMA3_KEYS = frozenset({WINDOW, f"{WINDOW}_pattern", "rope.freq_base_swa", "final_logit_softcapping"})

GATING_SOFTMAX = 1
GEMMA3_27B_LAYERS = 62
"""llama.cpp knows the 27B model, whose queries have a scale of their own, by its number of layers."""


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    describe: Callable[[ConfigReader], tuple[ModelSpec, WeightMap]]
    permuted: bool = False
    """The converter re-paired the rows of q and k, head by head, from halves to interleaved."""
    plain_norms: bool = False
    """The converter added 1 to the weights of norms that have an offset of 1."""
    names: Mapping[str, str] = field(default_factory=lambda: NAMES)
    keys: frozenset[str] = frozenset()
    """Beside KNOWN_KEYS."""
    rope_tensors: RopeTensors = ()
    """Tensors of frequency divisors that llama.cpp honours."""
    partial_rotary: bool = False
    extra: Callable[[ConfigReader, str, HfConfig], HfConfig] | None = None
    """(metadata, prefix, config so far) -> keys of the architecture's own."""


def describe(
    metadata: ConfigReader, architecture: str, shapes: Shapes, read_vector: ReadVector | None = None
) -> tuple[ModelSpec, WeightMap, WeightMap]:
    """The model, the file's tensors, and those of the Hugging Face checkpoint that it was made of.

    `shapes`: by GGUF tensor name, rows first (the reverse of the order in the file). `read_vector`: the values of a
    small float32 tensor; without it a file that keeps frequency divisors in one is refused.
    Raises CheckpointError, UnsupportedModel.
    """
    kind, prefix = ARCHITECTURES[architecture], f"{architecture}."
    metadata.refuse_unknown(KNOWN_KEYS | kind.keys, prefix)
    config = _config(metadata, prefix, kind, shapes)
    dim = config["head_dim"]
    if kind.partial_rotary:
        dim = metadata.get_int(f"{prefix}rope.dimension_count", dim, high=dim)
        # Half a unit more, so that rounding cannot lose one where it is multiplied by the head's size again.
        config["partial_rotary_factor"] = min(1.0, (dim + 0.5) / config["head_dim"])
    rope = read_rope(metadata, prefix, dim, config["max_position_embeddings"], shapes, kind.rope_tensors, read_vector)
    config["rope_parameters"] = rope
    if kind.extra is not None:
        config |= kind.extra(metadata, prefix, config)
    spec, weights = kind.describe(ConfigReader(config, metadata.where))
    rules = tuple(read_rule(rule, spec, kind.names, kind.permuted, shapes) for rule in weights.rules)
    # Divisors are part of the description: no rule of the weight map names them.
    ignorable = (ROTARY_TABLE, *(name.replace(".", r"\.") for name in kind.rope_tensors))
    return _without_offsets(spec) if kind.plain_norms else spec, WeightMap(rules, ignorable), weights


def _config(metadata: ConfigReader, prefix: str, kind: GgufArchitecture, shapes: Shapes) -> HfConfig:
    """What all architectures have, as a Hugging Face config."""
    hidden = metadata.get_int(f"{prefix}embedding_length")
    heads_key = f"{prefix}attention.head_count"
    heads = metadata.get_int(heads_key, high=MAX_HEADS)
    head_dim = metadata.find_int(f"{prefix}attention.key_length", high=MAX_HEADS)
    if head_dim is None:
        if hidden % heads:
            metadata.bad(heads_key, f"a divisor of {prefix}embedding_length ({hidden})")
        head_dim = hidden // heads
    metadata.require(f"{prefix}attention.value_length", head_dim)
    if not kind.partial_rotary:
        metadata.require(f"{prefix}rope.dimension_count", head_dim)
    metadata.require(f"{prefix}attention.causal", True)
    if kind.keys.isdisjoint(EXPERT_KEYS):
        metadata.require(f"{prefix}expert_count", 0)
    return {
        "vocab_size": _vocab_size(metadata, f"{prefix}vocab_size", shapes),
        "hidden_size": hidden,
        "intermediate_size": metadata.get_int(f"{prefix}feed_forward_length"),
        "num_hidden_layers": metadata.get_int(f"{prefix}block_count", high=MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get_int(f"{prefix}attention.head_count_kv", heads, high=MAX_HEADS),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.get_int(f"{prefix}context_length", high=MAX_CONTEXT),
        "rms_norm_eps": metadata.get_float(f"{prefix}attention.layer_norm_rms_epsilon", high=1.0),
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        "tie_word_embeddings": "output.weight" not in shapes,
    }


def _vocab_size(metadata: ConfigReader, key: str, shapes: Shapes) -> int:
    size = metadata.find_int(key, high=MAX_VOCAB)
    if size is not None:
        return size
    shape = shapes.get("token_embd.weight", ())
    return shape[0] if len(shape) == 2 and 1 <= shape[0] <= MAX_VOCAB else metadata.bad(key, "a vocabulary size")


# ---------------------------------------------------------------- what an architecture has beside that


def _experts(metadata: ConfigReader, prefix: str, config: HfConfig) -> HfConfig:
    """llama.cpp computes a softmax over all experts and lets the chosen weights sum to 1, whatever these keys say."""
    count = metadata.get_int(f"{prefix}expert_count", high=MAX_EXPERTS_IN_ALL)
    metadata.require(f"{prefix}expert_weights_norm", True)
    metadata.require(f"{prefix}expert_gating_func", GATING_SOFTMAX)
    if metadata.find_float(f"{prefix}expert_weights_scale", low=-1.0) not in (None, 0.0, 1.0):
        metadata.unsupported(f"{prefix}expert_weights_scale", "absent, 0 (off) or 1")
    used = metadata.get_int(f"{prefix}expert_used_count", high=count)
    inner = metadata.find_int(f"{prefix}expert_feed_forward_length")
    return {
        "num_local_experts": count,
        "num_experts_per_tok": used,
        "moe_intermediate_size": inner or config["intermediate_size"] // used,
        "norm_topk_prob": True,
    }


def _llama(metadata: ConfigReader, prefix: str, config: HfConfig) -> HfConfig:
    if metadata.get_int(f"{prefix}expert_count", 0, low=0, high=MAX_EXPERTS_IN_ALL) == 0:
        return {}
    # The experts of this architecture are as wide as feed_forward_length says.
    metadata.require(f"{prefix}expert_feed_forward_length", config["intermediate_size"])
    return _experts(metadata, prefix, config)


def _describe_llama(config: ConfigReader) -> tuple[ModelSpec, WeightMap]:
    """Mixtral has no name of its own in GGUF."""
    return mixtral.describe(config) if config.has("num_local_experts") else llama.describe(config)


def _phi3(metadata: ConfigReader, prefix: str, config: HfConfig) -> HfConfig:
    # The converter writes 0 for none. llama.cpp reads this key and runs without the window that the model has.
    return {"sliding_window": metadata.get_int(f"{prefix}{WINDOW}", 0, low=0) or None}


def _gemma3(metadata: ConfigReader, prefix: str, config: HfConfig) -> HfConfig:
    layers = config["num_hidden_layers"]
    window = metadata.get_int(f"{prefix}{WINDOW}", 0, low=0) or None
    period = metadata.get_int(f"{prefix}{WINDOW}_pattern", 6, high=MAX_LAYERS)
    is_27b = layers == GEMMA3_27B_LAYERS
    local = {"rope_theta": metadata.get_float(f"{prefix}rope.freq_base_swa", DEFAULT_BASE, low=1.0)}
    return {
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]
        if is_27b
        else config["head_dim"],
        "final_logit_softcapping": metadata.find_float(f"{prefix}final_logit_softcapping"),
        "sliding_window": window,
        "layer_types": [
            "full_attention" if window is None or (index + 1) % period == 0 else "sliding_attention"
            for index in range(layers)
        ],
        # A scaling of the frequencies is the full layers' alone.
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
    }


def _without_offsets(spec: ModelSpec) -> ModelSpec:
    """The same model with the offset of its norms inside their weights."""

    def plain(norm: NormSpec | None) -> NormSpec | None:
        return None if norm is None else replace(norm, unit_offset=False)

    def layer(old: LayerSpec) -> LayerSpec:
        norms = old.norms
        return replace(
            old,
            attention=replace(old.attention, q_norm=plain(old.attention.q_norm), k_norm=plain(old.attention.k_norm)),
            norms=replace(
                norms,
                pre_attn=plain(norms.pre_attn),
                post_attn=plain(norms.post_attn),
                pre_mlp=plain(norms.pre_mlp),
                post_mlp=plain(norms.post_mlp),
            ),
        )

    final = replace(spec.final_norm, unit_offset=False)
    return replace(spec, layers=tuple(map(layer, spec.layers)), final_norm=final)


_LLAMA = GgufArchitecture(
    _describe_llama,
    permuted=True,
    keys=EXPERT_KEYS,
    rope_tensors=("rope_freqs.weight", *LONG_AND_SHORT),
    extra=_llama,
)

ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "llama": _LLAMA,
    # The same graph; the keys that set it apart (a temperature, YaRN's multiplier) are refused as unknown.
    "mistral3": _LLAMA,
    "qwen2": GgufArchitecture(qwen2.describe),
    "qwen3": GgufArchitecture(qwen3.describe),
    "qwen3moe": GgufArchitecture(qwen3_moe.describe, keys=EXPERT_KEYS, extra=_experts),
    "gemma3": GgufArchitecture(gemma3.describe, plain_norms=True, names=GEMMA3_NAMES, keys=GEMMA3_KEYS, extra=_gemma3),
    "phi3": GgufArchitecture(
        phi3.describe,
        names=PHI3_NAMES,
        keys=frozenset({WINDOW}),
        rope_tensors=LONG_AND_SHORT,
        partial_rotary=True,
        extra=_phi3,
    ),
}
"""llama.cpp has a name for GPT-J too, but neither a converter nor a graph: there is nothing to agree with."""
