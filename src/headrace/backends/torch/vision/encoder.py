"""Encoder: a vision transformer over one tile, in both forms of InternViT and in SigLIP's.

One tile at a time: every product then has the same shape, so a tile's bits cannot depend on what is encoded beside it,
and memory does not grow with the number of tiles. A tile of a real model is about 1000 rows: products want no more.
S: rows of a tile (patches, after the class token where there is one), C: hidden size, H: heads, D: head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from headrace.backends.torch import ops
from headrace.backends.torch.layers import as_is
from headrace.backends.torch.parameters import Linear, Norm, Slots
from headrace.core.spec import EncoderSpec, NormSpec
from headrace.models.names import VISION, vision_layer

CHANNELS = 3


@dataclass(slots=True)
class Block:
    """Attention, then an MLP, each beside its residual."""

    heads: int
    pre_attn: Norm
    qkv: Linear
    """One product for three."""
    q_norm: Callable[[Tensor], Tensor]
    """Over all heads together, as `k_norm`."""
    k_norm: Callable[[Tensor], Tensor]
    o: Linear
    attn_scale: Tensor | None
    """(C,) Multiplies what attention adds; None: nothing does."""
    pre_mlp: Norm
    up: Linear
    activation: str
    down: Linear
    mlp_scale: Tensor | None

    def __call__(self, hidden_SC: Tensor) -> Tensor:
        q, k, v = self.qkv(self.pre_attn(hidden_SC)).chunk(3, dim=1)
        heads = (x.reshape(len(x), self.heads, -1) for x in (self.q_norm(q), self.k_norm(k), v))
        mixed = self.o(ops.full_attention(*heads).flatten(1))
        hidden_SC = hidden_SC + _scaled(mixed, self.attn_scale)
        inner = ops.activate(self.up(self.pre_mlp(hidden_SC)), self.activation)
        return hidden_SC + _scaled(self.down(inner), self.mlp_scale)


def _scaled(x_SC: Tensor, scale_C: Tensor | None) -> Tensor:
    return x_SC if scale_C is None else x_SC * scale_C


class Encoder:
    """From a tile's pixels to a row of features for each patch."""

    def __init__(self, spec: EncoderSpec, slots: Slots) -> None:
        """The weights come through `slots`, and then `finish` is called."""
        self.spec = spec
        width, rows = spec.hidden_size, (spec.stored_grid or spec.grid) ** 2 + spec.class_token
        self._patch = slots.linear({f"{VISION}.patch": width}, CHANNELS * spec.patch_size**2, bias=True)
        self._class_token = slots.tensor(f"{VISION}.class_token", width) if spec.class_token else None
        self._positions = slots.tensor(f"{VISION}.positions", rows, width)
        self._blocks = [_block(index, spec, slots) for index in range(spec.layers)]

    def finish(self) -> None:
        """Once all weights are there: the stored positions become those of a tile."""
        if self.spec.stored_grid is not None:
            kept = int(self.spec.class_token)
            grid = resized(self._positions[kept:], self.spec.stored_grid, self.spec.grid)
            self._positions = torch.cat((self._positions[:kept], grid))

    def __call__(self, pixels_3WW: Tensor) -> Tensor:
        """A normalised tile (3, side, side), rows from the top -> (grid × grid, C), patches row by row."""
        hidden = self._patch(patches(pixels_3WW, self.spec.patch_size).to(self._positions.dtype))
        if self._class_token is not None:
            hidden = torch.cat((self._class_token[None], hidden))
        hidden = hidden + self._positions
        for block in self._blocks:
            hidden = block(hidden)
        return hidden[int(self.spec.class_token) :]


def patches(pixels_3WW: Tensor, size: int) -> Tensor:
    """(3, side, side) -> (patches, 3 × size × size), row by row; what is left over on the right and below is not seen,
    as with a convolution whose kernel is its stride."""
    channels, side, _ = pixels_3WW.shape
    grid = side // size
    cut = pixels_3WW[:, : grid * size, : grid * size].reshape(channels, grid, size, grid, size)
    return cut.permute(1, 3, 0, 2, 4).reshape(grid * grid, channels * size * size)


def resized(positions_PC: Tensor, stored: int, grid: int) -> Tensor:
    """Positions of a stored × stored grid for a grid × grid one: bicubic, in float32, as InternViT does."""
    image = positions_PC.float().T.reshape(1, -1, stored, stored)
    made = functional.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    return made[0].flatten(1).T.contiguous().to(positions_PC.dtype)


def _block(index: int, spec: EncoderSpec, slots: Slots) -> Block:
    width, all_heads = spec.hidden_size, spec.heads * spec.head_dim

    def name(part: str) -> str:
        return vision_layer(index, part)

    def head_norm(part: str, norm: NormSpec | None) -> Callable[[Tensor], Tensor]:
        return as_is if norm is None else slots.norm(name(part), norm)

    def scale(part: str) -> Tensor | None:
        return slots.tensor(name(f"scales.{part}"), width) if spec.layer_scale else None

    return Block(
        heads=spec.heads,
        pre_attn=slots.norm(name("norms.pre_attn"), spec.norm),
        qkv=slots.linear({name(f"attn.{part}"): all_heads for part in "qkv"}, width, spec.qkv_bias),
        q_norm=head_norm("attn.q_norm", spec.qk_norm),
        k_norm=head_norm("attn.k_norm", spec.qk_norm),
        o=slots.linear({name("attn.o"): width}, all_heads, bias=True),
        attn_scale=scale("attn"),
        pre_mlp=slots.norm(name("norms.pre_mlp"), spec.norm),
        up=slots.linear({name("mlp.up"): spec.intermediate}, width, bias=True),
        activation=spec.activation,
        down=slots.linear({name("mlp.down"): width}, spec.intermediate, bias=True),
        mlp_scale=scale("mlp"),
    )
