"""Rotary position embedding (arXiv 2104.09864) and its ways past the trained context, one function a kind.

transformers recomputes `dynamic` and `longrope` as a sequence grows, so that what a token is depends on the tokens
computed with it. Here the frequencies are fixed when the model is loaded, for `max_model_len` tokens: they are
transformers' for every sequence if `max_model_len` is within the original context, else (dynamic) those of a sequence
of exactly `max_model_len`, or (longrope) those of any sequence past the original context.
dim: the part of a head that turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from headrace.core.spec import RopeScaling, RopeScalingKind, RopeSpec

F32 = NDArray[np.float32]


def rope_frequencies(spec: RopeSpec, max_model_len: int) -> F32:
    """Angle per position of each of the dim / 2 pairs, float32 (§3.4.2, scaled as `spec` says)."""
    if spec.scaling is None:
        return _plain(spec.base, spec.dim)
    return SCALINGS[spec.scaling.kind](spec, spec.scaling, max_model_len)


def rope_angles(spec: RopeSpec, max_model_len: int) -> tuple[F32, F32]:
    """cos and sin of each pair at every position, (max_model_len, dim / 2) each."""
    positions = np.arange(max_model_len, dtype=np.float32)
    angles = np.outer(positions, rope_frequencies(spec, max_model_len))
    magnitude = np.float32(1.0 if spec.scaling is None else spec.scaling.numbers.get("attention_factor", 1.0))
    return np.cos(angles) * magnitude, np.sin(angles) * magnitude


# ---------------------------------------------------------------- kinds


def _plain(base: float, dim: int) -> F32:
    exponents = np.arange(0, dim, 2).astype(np.float32) / np.float32(dim)
    return np.float32(1.0) / np.power(np.float32(base), exponents)


def _linear(spec: RopeSpec, scaling: RopeScaling, max_model_len: int) -> F32:
    return _plain(spec.base, spec.dim) / np.float32(scaling.numbers["factor"])


def _dynamic(spec: RopeSpec, scaling: RopeScaling, max_model_len: int) -> F32:
    """NTK-aware: the base grows with the length, so that the slowest wave still fits."""
    factor, original = scaling.numbers["factor"], scaling.numbers["original_context"]
    stretch = factor * max(max_model_len, original) / original - (factor - 1)
    return _plain(spec.base * stretch ** (spec.dim / (spec.dim - 2)), spec.dim)


def _llama3(spec: RopeSpec, scaling: RopeScaling, max_model_len: int) -> F32:
    """Long waves are stretched by `factor`, short ones stay, those between are mixed."""
    inverse = _plain(spec.base, spec.dim)
    factor, context = np.float32(scaling.numbers["factor"]), scaling.numbers["original_context"]
    low, high = scaling.numbers["low_freq_factor"], scaling.numbers["high_freq_factor"]
    if high == low:  # no waves between
        return np.where(np.float32(2 * math.pi) / inverse > context / low, inverse / factor, inverse)
    share = np.clip((np.float32(context) * inverse / np.float32(2 * math.pi) - np.float32(low)) / (high - low), 0, 1)
    share = share.astype(np.float32)
    return (1 - share) * inverse / factor + share * inverse


def _yarn(spec: RopeSpec, scaling: RopeScaling, max_model_len: int) -> F32:
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
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(last - first)
    stretched = np.clip(ramp, 0, 1)
    inverse = _plain(spec.base, dim)
    return inverse / np.float32(numbers["factor"]) * stretched + inverse * (1 - stretched)


def _longrope(spec: RopeSpec, scaling: RopeScaling, max_model_len: int) -> F32:
    """Each pair has a divisor of its own, one set within the original context and one beyond (arXiv 2402.13753)."""
    is_long = max_model_len > scaling.numbers["original_context"]
    factors = scaling.long_factors if is_long else scaling.short_factors
    return _plain(spec.base, spec.dim) / np.array(factors, np.float32)


SCALINGS: Mapping[RopeScalingKind, Callable[[RopeSpec, RopeScaling, int], F32]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
