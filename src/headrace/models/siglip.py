"""SigLIP's vision transformer, in timm's names: no class token, no layer scale, and here features of an inner block."""

from __future__ import annotations

from collections.abc import Iterator

from headrace.core.spec import EncoderSpec, NormSpec, WeightRule
from headrace.models import intern_vit, mapping, names
from headrace.models.config import ACTIVATIONS, MAX_HEADS, ConfigReader


def read(config: ConfigReader, depth: int) -> EncoderSpec:
    """`depth`: blocks that are computed. Patches that do not fit whole into a tile are left out (384 pixels are 27
    patches of 14). Raises CheckpointError, UnsupportedModel."""
    config.require("num_channels", intern_vit.CHANNELS)
    hidden = config.get_int("hidden_size")
    heads = config.get_int("num_attention_heads", high=MAX_HEADS)
    if hidden % heads:
        config.bad("hidden_size", f"a multiple of num_attention_heads ({heads})")
    tile = config.get_int("image_size", high=intern_vit.MAX_TILE)
    return EncoderSpec(
        tile_size=tile,
        patch_size=config.get_int("patch_size", high=tile),
        hidden_size=hidden,
        layers=depth,
        heads=heads,
        head_dim=hidden // heads,
        intermediate=config.get_int("intermediate_size"),
        activation=config.get_choice("hidden_act", ACTIVATIONS, "gelu"),
        norm=NormSpec("layer", config.get_float("layer_norm_eps", 1e-6, high=1.0), hidden, bias=True),
        qkv_bias=True,
        class_token=False,
        layer_scale=False,
    )


def rules(spec: EncoderSpec, source: str) -> Iterator[WeightRule]:
    """`source`: before timm's names."""
    yield from intern_vit.patches(spec, f"{source}.patch_embed.proj")
    yield intern_vit.positions(spec, f"{source}.pos_embed")
    width = spec.heads * spec.head_dim
    for index in range(spec.layers):
        block, ours = f"{source}.blocks.{index}", f"{names.VISION}.layers.{index}"
        yield from intern_vit.fused_qkv(f"{block}.attn.qkv", f"{ours}.attn", spec, width)
        yield from mapping.linear(f"{block}.attn.proj", f"{ours}.attn.o", spec.hidden_size, width, True, "cols")
        yield from intern_vit.mlp_and_norms(spec, block, ours, ("norm1", "norm2"))


def ignorable(spec: EncoderSpec, stored: int, source: str) -> tuple[str, ...]:
    """Blocks behind the features, the last norm and the pooling head; `source` as a regular expression."""
    return (*intern_vit.unused_blocks(spec, stored, rf"{source}\.blocks"), rf"{source}\.(norm|attn_pool)\..+")
