"""A decoder model as typed data (docs/CONTRACTS.md §3): what the blocks are, not how they run.

Every backend reads the same `ModelSpec`; a backend that cannot honour a field refuses the model by name.
All sizes are counts of elements, not bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
RopeScalingKind = Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
MapOp = Literal["same", "cat_rows", "split_rows", "permute_rope", "transpose", "take"]
Shard = Literal["rows", "cols", "none"]


@dataclass(frozen=True, slots=True)
class NormSpec:
    kind: NormKind
    eps: float
    width: int
    bias: bool = False
    unit_offset: bool = False
    """Scale by (1 + weight), as Gemma does."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    kind: RopeScalingKind
    numbers: Mapping[str, float] = field(default_factory=dict)
    """factor, original_context, low_freq_factor, high_freq_factor, beta_fast, beta_slow, attention_factor …"""
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding on the first `dim` of each head."""

    dim: int
    base: float
    interleaved: bool = False
    """Pairs are (0, 1), (2, 3) … (GPT-J) and not (i, i + dim/2) (Llama)."""
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    """Multiplies q·k."""
    qkv_bias: bool = False
    o_bias: bool = False
    q_norm: NormSpec | None = None
    k_norm: NormSpec | None = None
    rope: RopeSpec | None = None
    window: int | None = None
    """Position i sees positions > i - window."""
    softcap: float | None = None
    alibi: bool = False


@dataclass(frozen=True, slots=True)
class MoeSpec:
    num_experts: int
    experts_per_token: int
    intermediate: int
    normalise_weights: bool
    shared_intermediate: int | None = None


@dataclass(frozen=True, slots=True)
class MlpSpec:
    gated: bool
    activation: Activation
    intermediate: int
    bias: bool = False
    experts: MoeSpec | None = None


@dataclass(frozen=True, slots=True)
class LayerNorms:
    pre_attn: NormSpec | None = None
    post_attn: NormSpec | None = None
    pre_mlp: NormSpec | None = None
    post_mlp: NormSpec | None = None


@dataclass(frozen=True, slots=True)
class LayerSpec:
    attention: AttentionSpec
    mlp: MlpSpec
    norms: LayerNorms
    parallel: bool = False
    """Attention and MLP read the same normalised input and are added together (GPT-J)."""
    residual_scale: float = 1.0
    """Multiplies what attention and MLP add to the residual stream."""


@dataclass(frozen=True, slots=True)
class EmbeddingSpec:
    tied: bool
    scale: float = 1.0
    """Rounded to the type that is computed in, then multiplied with what the table gives (Gemma)."""
    learned_positions: tuple[int, int] | None = None
    """(offset, count) of a learned position table, or None."""


@dataclass(frozen=True, slots=True)
class HeadSpec:
    bias: bool = False
    softcap: float | None = None
    """cap × tanh(x / cap), of the logits and, in AttentionSpec, of the scaled scores."""
    scale: float = 1.0
    """Multiplies the logits, before the cap."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    name: str
    vocab_size: int
    hidden_size: int
    context: int
    embedding: EmbeddingSpec
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    head: HeadSpec = field(default_factory=HeadSpec)
    vision: None = None


@dataclass(frozen=True, slots=True)
class WeightRule:
    """How one tensor of the model comes out of a checkpoint's."""

    sources: tuple[str, ...]
    target: str
    """Dotted name in headrace's own naming, the same for every architecture (see `models/names.py`)."""
    shape: tuple[int, ...]
    """Shape of the target."""
    op: MapOp = "same"
    shard: Shard = "none"
    rows: tuple[int, int] | None = None
    """For split_rows and take: (start, stop) of the rows; None in take: all of them."""
    heads: int = 0
    """For permute_rope: number of heads whose rows are re-paired from interleaved to halves."""
    index: int = 0
    """For take: which (N, K) of an (E, N, K) source."""


@dataclass(frozen=True, slots=True)
class WeightMap:
    rules: tuple[WeightRule, ...]
    ignorable: tuple[str, ...] = ()
    """Regular expressions (full match) of source names that may be left over."""
