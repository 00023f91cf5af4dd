"""InternViT, the vision tower of InternVL and NVLM: two forms (300M with LayerNorm, 6B with RMSNorm and a norm of q and
k), in the spelling it was published in and in transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from headrace.core.spec import EncoderSpec, NormKind, NormSpec, WeightRule
from headrace.models import mapping, names
from headrace.models.config import ACTIVATIONS, MAX_HEADS, MAX_LAYERS, ConfigReader

NORMS: Mapping[str, NormKind] = {"rms_norm": "rms", "layer_norm": "layer"}
CHANNELS = 3
MAX_TILE = 4096
"""Pixels on a side of a tile."""
HF_QK_EPS = 1e-6
"""Of q and k in transformers, whatever the config says of the other norms."""


def read_published(config: ConfigReader, tile: int | None, depth: int, qkv: tuple[int, ...] | None) -> EncoderSpec:
    """`vision_config` of InternVLChatModel and NVLM-D.

    `tile`: pixels on a side of a tile where the positions may be stored for another size; `depth`: blocks that are
    computed; `qkv`: shape of the first block's `attn.qkv.weight`, for no key announces NVLM's heads of zeros.
    Raises CheckpointError, UnsupportedModel.
    """
    eps = config.get_float("layer_norm_eps", 1e-6, high=1.0)
    spec = _read_tower(
        config,
        side=config.get_int("image_size", high=MAX_TILE),
        patch=config.get_int("patch_size", 14, high=MAX_TILE),
        norm="rms_norm",
        eps=eps,
        qkv_bias=config.get_bool("qkv_bias", False),
        qk_eps=eps if config.get_bool("qk_normalization", True) else None,
    )
    spec = replace(spec, layers=depth, dummy_heads=_dummy_heads(spec, qkv))
    if tile is None or tile // spec.patch_size == spec.grid:
        return replace(spec, tile_size=tile or spec.tile_size)
    return replace(spec, tile_size=tile, stored_grid=spec.grid)


def read_transformers(config: ConfigReader, depth: int) -> EncoderSpec:
    """`vision_config` of InternVLForConditionalGeneration. Raises CheckpointError, UnsupportedModel."""
    config.require("use_mask_token", False)
    config.require("use_absolute_position_embeddings", True)
    config.require("use_mean_pooling", True)  # else there is a norm after the last block
    spec = _read_tower(
        config,
        side=config.get_side("image_size", 448, high=MAX_TILE),
        patch=config.get_side("patch_size", 14, high=MAX_TILE),
        norm="layer_norm",
        eps=config.get_float("layer_norm_eps", 1e-6, high=1.0),
        qkv_bias=config.get_bool("attention_bias", False),
        qk_eps=HF_QK_EPS if config.get_bool("use_qk_norm", False) else None,
    )
    return replace(spec, layers=depth)


def check_tile(spec: EncoderSpec, config: ConfigReader, key: str) -> EncoderSpec:
    """The same spec. Raises CheckpointError unless a tile is a whole, even number of patches on a side: two by two of
    them become a row of the decoder."""
    if spec.tile_size % (2 * spec.patch_size):
        config.bad(key, f"a multiple of {2 * spec.patch_size}, two patches")
    return spec


def read_layers(config: ConfigReader) -> int:
    """Blocks that the checkpoint holds."""
    return config.get_int("num_hidden_layers", high=MAX_LAYERS)


def read_depth(config: ConfigReader, key: str, layers: int) -> int:
    """Blocks that are computed where the features are `hidden_states[value]` of a tower of `layers` blocks: with -1,
    the default, all of them. Raises CheckpointError for a value beyond the tower's depth."""
    value = config.find_int(key, low=-layers, high=layers)
    if value == 0:
        config.bad(key, f"an integer from {-layers} to {layers}, and not 0: what no block has computed")
    return layers if value is None else value if value > 0 else layers + 1 + value


def _read_tower(
    config: ConfigReader, side: int, patch: int, norm: str, eps: float, qkv_bias: bool, qk_eps: float | None
) -> EncoderSpec:
    """What both spellings have in common; all blocks, and tiles of the size that the positions are stored for."""
    config.require("num_channels", CHANNELS)
    hidden = config.get_int("hidden_size")
    heads = config.get_int("num_attention_heads", high=MAX_HEADS)
    if hidden % heads:
        config.bad("hidden_size", f"a multiple of num_attention_heads ({heads})")
    kind = config.get_choice("norm_type", NORMS, norm)
    return EncoderSpec(
        tile_size=side,
        patch_size=patch,
        hidden_size=hidden,
        layers=read_layers(config),
        heads=heads,
        head_dim=hidden // heads,
        intermediate=config.get_int("intermediate_size"),
        activation=config.get_choice("hidden_act", ACTIVATIONS, "gelu"),
        norm=NormSpec(kind, eps, hidden, bias=kind == "layer"),
        qkv_bias=qkv_bias,
        qk_norm=None if qk_eps is None else NormSpec("rms", qk_eps, hidden),
    )


def _dummy_heads(spec: EncoderSpec, qkv: tuple[int, ...] | None) -> int:
    """Heads past the real ones in a q|k|v of this shape; a shape that is no number of heads is the loader's to name."""
    each = spec.head_dim * 3
    if qkv is None or qkv[0] % each:
        return 0
    return max(0, qkv[0] // each - spec.heads)


# ---------------------------------------------------------------- weights


def published_rules(spec: EncoderSpec, source: str) -> Iterator[WeightRule]:
    """`source`: `vision_model`. q, k and v are one tensor there, each with its dummy heads behind the real ones."""
    yield from _embeddings(
        spec,
        f"{source}.embeddings.patch_embedding",
        f"{source}.embeddings.class_embedding",
        f"{source}.embeddings.position_embedding",
    )
    real = spec.heads * spec.head_dim
    stored = real + spec.dummy_heads * spec.head_dim
    for index in range(spec.layers):
        block, ours = f"{source}.encoder.layers.{index}", f"{names.VISION}.layers.{index}"
        yield from fused_qkv(f"{block}.attn.qkv", f"{ours}.attn", spec, stored)
        if spec.qk_norm is not None:
            for part in ("q_norm", "k_norm"):
                weight = WeightRule((f"{block}.attn.{part}.weight",), f"{ours}.attn.{part}.weight", (real,))
                yield weight if stored == real else replace(weight, op="split_rows", rows=(0, real))
        for rule in mapping.linear(f"{block}.attn.proj", f"{ours}.attn.o", spec.hidden_size, real, True, "cols"):
            cut = stored > real and len(rule.shape) == 2
            yield replace(rule, op="take_cols", rows=(0, real)) if cut else rule
        yield from mlp_and_norms(spec, block, ours, ("norm1", "norm2"))
        yield from _scales(spec, block, ours, ("ls1", "ls2"))


def transformers_rules(spec: EncoderSpec, source: str) -> Iterator[WeightRule]:
    """`source`: `vision_tower`, or where newer versions put it."""
    yield from _embeddings(
        spec,
        f"{source}.embeddings.patch_embeddings.projection",
        f"{source}.embeddings.cls_token",
        f"{source}.embeddings.position_embeddings",
    )
    width = spec.heads * spec.head_dim
    for index in range(spec.layers):
        block, ours = f"{source}.encoder.layer.{index}", f"{names.VISION}.layers.{index}"
        theirs = f"{block}.attention"
        for part in ("q", "k", "v"):
            target = f"{ours}.attn.{part}"
            yield from mapping.linear(f"{theirs}.{part}_proj", target, width, spec.hidden_size, spec.qkv_bias, "rows")
        yield from mapping.linear(f"{theirs}.projection_layer", f"{ours}.attn.o", spec.hidden_size, width, True, "cols")
        if spec.qk_norm is not None:
            yield from mapping.norm(f"{theirs}.q_norm", f"{ours}.attn.q_norm", spec.qk_norm)
            yield from mapping.norm(f"{theirs}.k_norm", f"{ours}.attn.k_norm", spec.qk_norm)
        yield from mlp_and_norms(spec, block, ours, ("layernorm_before", "layernorm_after"))
        yield from _scales(spec, block, ours, ("lambda_1", "lambda_2"))


def unused_blocks(spec: EncoderSpec, stored: int, source: str) -> tuple[str, ...]:
    """A pattern of the blocks behind the last one computed; `source`: before their numbers, as a regular expression."""
    unused = "|".join(map(str, range(spec.layers, stored)))
    return (rf"{source}\.({unused})\..+",) if unused else ()


def fused_qkv(source: str, target: str, spec: EncoderSpec, stored: int) -> Iterator[WeightRule]:
    """q, k and v one under the other, `stored` rows each, of which the first are the real heads'."""
    real = spec.heads * spec.head_dim
    for place, part in enumerate(("q", "k", "v")):
        span = (place * stored, place * stored + real)
        for rule in mapping.linear(source, f"{target}.{part}", real, spec.hidden_size, spec.qkv_bias, "rows"):
            yield replace(rule, op="split_rows", rows=span)


def mlp_and_norms(spec: EncoderSpec, block: str, ours: str, norms: tuple[str, str]) -> Iterator[WeightRule]:
    """`norms`: names of those before attention and before the MLP."""
    hidden, inner = spec.hidden_size, spec.intermediate
    yield from mapping.linear(f"{block}.mlp.fc1", f"{ours}.mlp.up", inner, hidden, True, "rows")
    yield from mapping.linear(f"{block}.mlp.fc2", f"{ours}.mlp.down", hidden, inner, True, "cols")
    for theirs, part in zip(norms, ("pre_attn", "pre_mlp"), strict=True):
        yield from mapping.norm(f"{block}.{theirs}", f"{ours}.norms.{part}", spec.norm)


def patches(spec: EncoderSpec, source: str) -> Iterator[WeightRule]:
    """A convolution whose step is its size: a linear layer over a patch's numbers."""
    numbers = CHANNELS * spec.patch_size**2
    for rule in mapping.linear(source, f"{names.VISION}.patch", spec.hidden_size, numbers, True, "none"):
        yield replace(rule, op="reshape") if len(rule.shape) == 2 else rule


def positions(spec: EncoderSpec, source: str) -> WeightRule:
    rows = (spec.stored_grid or spec.grid) ** 2 + (1 if spec.class_token else 0)
    return WeightRule((source,), f"{names.VISION}.positions", (rows, spec.hidden_size), "reshape")


def _embeddings(spec: EncoderSpec, patch: str, class_token: str, position: str) -> Iterator[WeightRule]:
    yield from patches(spec, patch)
    yield WeightRule((class_token,), f"{names.VISION}.class_token", (spec.hidden_size,), "reshape")
    yield positions(spec, position)


def _scales(spec: EncoderSpec, block: str, ours: str, scales: tuple[str, str]) -> Iterator[WeightRule]:
    for theirs, part in zip(scales, ("attn", "mlp"), strict=True):
        yield WeightRule((f"{block}.{theirs}",), f"{ours}.scales.{part}", (spec.hidden_size,))
