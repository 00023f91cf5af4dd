"""The same model with its channels moved by half a group, so that no group of a weight is a group of its file.

Weights that were dequantised from a file lie on the file's grid: numbers rounded to the same groups find it again, and
rounding seems to cost nothing. Channels may be renamed without changing what a model computes; moved by half a group,
every group is made of halves of two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

HALF_GROUP = 16
ROWS = frozenset(("o", "down", "gate", "up", "final_norm", "pre_attn", "post_attn", "pre_mlp", "post_mlp"))
"""Layers whose outputs are channels that move together: of the residual stream, or between the MLP's halves."""


def shifted(name: str, array: NDArray[Any], head_dim: int) -> NDArray[Any]:
    """`array` is the tensor of headrace's own name `name`: a matrix (out, in) or a vector.

    The channels of values move within each head; those of queries and keys stay, for RoPE pairs them.
    """
    part = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    if part in ROWS:
        array = np.roll(array, HALF_GROUP, axis=0)
    elif part == "v":
        array = _roll_within(array, head_dim)
    if array.ndim == 2:
        array = _roll_within(array.T, head_dim).T if part == "o" else np.roll(array, HALF_GROUP, axis=1)
    return np.ascontiguousarray(array)


def _roll_within(array: NDArray[Any], period: int) -> NDArray[Any]:
    """Rolls the first axis within runs of `period`."""
    parts = array.reshape(-1, period, *array.shape[1:])
    return np.roll(parts, HALF_GROUP, axis=1).reshape(array.shape)
