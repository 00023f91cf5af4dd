"""Rotary position embedding in torch (arXiv 2104.09864); the angles are `backends/rope.py`'s.

T: tokens, H: heads, D: head dim. dim: the part of a head that turns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.backends.rope import rope_angles
from headrace.core.spec import RopeSpec


def rope_table(spec: RopeSpec, max_model_len: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, (max_model_len, dim) each; sin has the minus sign of a pair's first half."""
    cos, sin = (torch.from_numpy(one) for one in rope_angles(spec, max_model_len))
    if spec.interleaved:
        return cos.repeat_interleave(2, dim=-1).to(dtype), torch.stack((-sin, sin), dim=-1).flatten(-2).to(dtype)
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def apply_rope(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, interleaved: bool) -> Tensor:
    """Rotates the first dimensions of each head, as many as the table has; the others pass."""
    dim = cos_TD.shape[-1]
    turned = x_THD[..., :dim]
    if interleaved:
        swapped = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        swapped = torch.cat((turned[..., dim // 2 :], turned[..., : dim // 2]), dim=-1)
    rotated = turned * cos_TD[:, None] + swapped * sin_TD[:, None]
    return rotated if dim == x_THD.shape[-1] else torch.cat((rotated, x_THD[..., dim:]), dim=-1)
