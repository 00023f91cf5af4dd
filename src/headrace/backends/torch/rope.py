"""Rotary position embedding (arXiv 2104.09864) and its ways past the trained context, one function a kind.

transformers recomputes `dynamic` and `longrope` as a sequence grows, so that what a token is depends on the tokens
computed with it. Here the frequencies are fixed when the model is loaded, for `max_model_len` tokens: they are
transformers' for every sequence if `max_model_len` is within the original context, else (dynamic) those of a sequence
of exactly `max_model_len`, or (longrope) those of any sequence past the original context.
T: tokens, H: heads, D: head dim. dim: the part of a head that turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from headrace.core.spec import RopeScaling, RopeScalingKind, RopeSpec


def rope_frequencies(spec: RopeSpec, max_model_len: int) -> Tensor:
    """Angle per position of each of the dim / 2 pairs, float32 (§3.4.2, scaled as `spec` says)."""
    if spec.scaling is None:
        return _plain(spec.base, spec.dim)
    return SCALINGS[spec.scaling.kind](spec, spec.scaling, max_model_len)


def rope_table(spec: RopeSpec, max_model_len: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, (max_model_len, dim) each; sin has the minus sign of a pair's first half."""
    positions = torch.arange(max_model_len, dtype=torch.float32)
    angles = torch.outer(positions, rope_frequencies(spec, max_model_len))
    magnitude = 1.0 if spec.scaling is None else spec.scaling.numbers.get("attention_factor", 1.0)
    cos, sin = angles.cos().mul_(magnitude), angles.sin().mul_(magnitude)
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


# ---------------------------------------------------------------- kinds


def _plain(base: float, dim: int) -> Tensor:
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)


def _linear(spec: RopeSpec, scaling: RopeScaling, max_model_len: int) -> Tensor:
    return _plain(spec.base, spec.dim) / scaling.numbers["factor"]


def _dynamic(spec: RopeSpec, scaling: RopeScaling, max_model_len: int) -> Tensor:
    """NTK-aware: the base grows with the length, so that the slowest wave still fits."""
    factor, original = scaling.numbers["factor"], scaling.numbers["original_context"]
    stretch = factor * max(max_model_len, original) / original - (factor - 1)
    return _plain(spec.base * stretch ** (spec.dim / (spec.dim - 2)), spec.dim)


def _llama3(spec: RopeSpec, scaling: RopeScaling, max_model_len: int) -> Tensor:
    """Long waves are stretched by `factor`, short ones stay, those between are mixed."""
    inverse = _plain(spec.base, spec.dim)
    factor, context = scaling.numbers["factor"], scaling.numbers["original_context"]
    low, high = scaling.numbers["low_freq_factor"], scaling.numbers["high_freq_factor"]
    if high == low:  # no waves between
        return torch.where(2 * math.pi / inverse > context / low, inverse / factor, inverse)
    share = ((context * inverse / (2 * math.pi) - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - share) * inverse / factor + share * inverse


def _yarn(spec: RopeSpec, scaling: RopeScaling, max_model_len: int) -> Tensor:
    """Pairs that turn more than `beta_fast` times within the original context stay, those below `beta_slow` are
    stretched, a ramp lies between (arXiv 2309.00071, §3.2)."""
    numbers, dim = scaling.numbers, spec.dim

    def pair_that_turns(times: float) -> float:
        return dim * math.log(numbers["original_context"] / (times * 2 * math.pi)) / (2 * math.log(spec.base))

    first, last = pair_that_turns(numbers["beta_fast"]), pair_that_turns(numbers["beta_slow"])
    if numbers["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001  # the ramp is a step
    stretched = ((torch.arange(dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0.0, 1.0)
    inverse = _plain(spec.base, dim)
    return inverse / numbers["factor"] * stretched + inverse * (1 - stretched)


def _longrope(spec: RopeSpec, scaling: RopeScaling, max_model_len: int) -> Tensor:
    """Each pair has a divisor of its own, one set within the original context and one beyond (arXiv 2402.13753)."""
    is_long = max_model_len > scaling.numbers["original_context"]
    factors = scaling.long_factors if is_long else scaling.short_factors
    return _plain(spec.base, spec.dim) / torch.tensor(factors, dtype=torch.float32)


SCALINGS: Mapping[RopeScalingKind, Callable[[RopeSpec, RopeScaling, int], Tensor]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
