"""Projector: a tile's features -> rows of the decoder: merge, norm, linear, activation, linear.

G: patches on a side of a tile, C: the encoder's hidden size, H: the decoder's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from headrace.backends.torch import ops
from headrace.backends.torch.parameters import Slots
from headrace.core.spec import Merge, ProjectorSpec
from headrace.models.names import PROJECTOR


class Projector:
    """From (G × G, C) to (tokens, H)."""

    def __init__(self, spec: ProjectorSpec, hidden_size: int, slots: Slots) -> None:
        """The weights come through `slots`."""
        self._merge = merging(spec.merge, math.isqrt(spec.tokens))
        self._norm = None if spec.norm is None else slots.norm(f"{PROJECTOR}.norm", spec.norm)
        self._up = slots.linear({f"{PROJECTOR}.up": spec.intermediate}, spec.width, spec.bias)
        self._activation = spec.activation
        self._down = slots.linear({f"{PROJECTOR}.down": hidden_size}, spec.intermediate, spec.bias)

    def __call__(self, features_PC: Tensor) -> Tensor:
        merged = self._merge(features_PC)
        if self._norm is not None:
            merged = self._norm(merged)
        return self._down(ops.activate(self._up(merged), self._activation))


def merging(merge: Merge, side: int) -> Callable[[Tensor], Tensor]:
    """How features become side × side rows."""
    if merge == "average_pool":
        return lambda x: average_pool(x, side)
    return shuffle_v1 if merge == "shuffle_v1" else shuffle_v2


def shuffle_v2(features_PC: Tensor) -> Tensor:
    """Pixel shuffle by ½: (G × G, C) -> (G/2 × G/2, 4C), out[i, j] = x[2i, 2j], x[2i, 2j + 1], x[2i + 1, 2j],
    x[2i + 1, 2j + 1] side by side."""
    return _quads(features_PC).permute(0, 2, 1, 3, 4).reshape(len(features_PC) // 4, -1)


def shuffle_v1(features_PC: Tensor) -> Tensor:
    """`shuffle_v2` with the two axes of the grid exchanged in what comes out: what the first InternVLs learned with."""
    return _quads(features_PC).permute(2, 0, 1, 3, 4).reshape(len(features_PC) // 4, -1)


def _quads(features_PC: Tensor) -> Tensor:
    """(G/2, 2, G/2, 2, C)"""
    half = math.isqrt(len(features_PC)) // 2
    return features_PC.reshape(half, 2, half, 2, -1)


def average_pool(features_PC: Tensor, side: int) -> Tensor:
    """(G × G, C) -> (side × side, C): row i, column j is the mean over rows ⌊i G ÷ side⌋ to ⌈(i + 1) G ÷ side⌉ and the
    same of columns. Where side does not divide G these windows overlap, so it is no strided pool."""
    grid = math.isqrt(len(features_PC))
    if side == grid:
        return features_PC
    image = features_PC.T.reshape(1, -1, grid, grid)
    return functional.adaptive_avg_pool2d(image, side)[0].flatten(1).T.contiguous()
