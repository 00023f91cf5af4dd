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
MapOp = Literal["same", "cat_rows", "split_rows", "permute_rope", "transpose", "take", "reshape", "take_cols"]
Shard = Literal["rows", "cols", "none"]
Merge = Literal["shuffle_v1", "shuffle_v2", "average_pool"]


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
class EncoderSpec:
    """A vision transformer over one square tile: patches, a learned position each, blocks of full attention and MLP."""

    tile_size: int
    """Pixels on a side of a tile."""
    patch_size: int
    hidden_size: int
    layers: int
    """Blocks that are computed: what the last of them gives, without a norm, is the tile's features."""
    heads: int
    head_dim: int
    intermediate: int
    activation: Activation
    norm: NormSpec
    """Before attention and before the MLP of each block."""
    qkv_bias: bool
    qk_norm: NormSpec | None = None
    """Of q and of k over all heads together, before they are cut into heads (InternViT-6B)."""
    class_token: bool = True
    """A learned row before the patches, left out of the features (InternViT); SigLIP has none."""
    layer_scale: bool = True
    """A learned factor for each channel that attention and MLP add to the residual stream (InternViT)."""
    dummy_heads: int = 0
    """Heads of zeros that the checkpoint holds behind the real ones of q, k and v, so that eight GPUs can share them
    (NVLM-D). Nothing computes them, and they are not loaded."""
    stored_grid: int | None = None
    """Patches on a side that the stored positions are for, where those of a tile are others: they are interpolated
    (bicubic, all but the class token's). None: those of a tile."""

    @property
    def grid(self) -> int:
        """Patches on a side of a tile."""
        return self.tile_size // self.patch_size


@dataclass(frozen=True, slots=True)
class ProjectorSpec:
    """From a tile's grid × grid features to `tokens` rows of the decoder: merge, norm, linear, activation, linear."""

    merge: Merge
    """shuffle: 2 × 2 neighbours side by side in one row (pixel shuffle by ½); v2: out[i, j] = x[2i, 2j], x[2i, 2j + 1],
    x[2i + 1, 2j], x[2i + 1, 2j + 1]; v1: v2 with the two axes of the grid exchanged in what comes out. average_pool:
    mean over windows from ⌊i g ÷ s⌋ to ⌈(i + 1) g ÷ s⌉, s² = `tokens`."""
    tokens: int
    """Rows that a tile becomes; a square number."""
    width: int
    """Of what the merge gives: 4 × or 1 × the encoder's hidden size."""
    intermediate: int
    bias: bool
    activation: Activation = "gelu"
    norm: NormSpec | None = None


@dataclass(frozen=True, slots=True)
class TilingSpec:
    """How a picture becomes tiles."""

    tile_size: int
    min_tiles: int = 1
    max_tiles: int = 1
    """1: the whole picture is made one tile, whatever its shape. More: the grid of tiles whose shape is nearest
    (`media/tiling.py`)."""
    thumbnail: bool = False
    """The whole picture as one more, last tile, where there are several."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Of red, green, blue in 0 … 1; the backend computes (x ÷ 255 − mean) ÷ std."""


@dataclass(frozen=True, slots=True)
class ImagePromptSpec:
    """What stands in the prompt's text for an image."""

    pad: str
    """The text of the placeholder token, as often as the image has rows."""
    before: str = ""
    after: str = ""
    tile_tags: bool = False
    """NVLM: `<tile_1>`, `<tile_2>` … before each tile, `<tile_global_thumbnail>` before the last one."""


@dataclass(frozen=True, slots=True)
class VisionSpec:
    """The vision side of a model: what a picture's tiles become, and where that goes in the prompt."""

    encoder: EncoderSpec
    projector: ProjectorSpec
    tiling: TilingSpec
    prompt: ImagePromptSpec
    image_token_id: int
    """Id of the placeholder token."""


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
    vision: VisionSpec | None = None


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
    """For split_rows and take: (start, stop) of the rows; None in take: all of them. For take_cols: of the columns."""
    heads: int = 0
    """For permute_rope: number of heads whose rows are re-paired from interleaved to halves."""
    index: int = 0
    """For take: which (N, K) of an (E, N, K) source."""


@dataclass(frozen=True, slots=True)
class WeightMap:
    rules: tuple[WeightRule, ...]
    ignorable: tuple[str, ...] = ()
    """Regular expressions (full match) of source names that may be left over."""
