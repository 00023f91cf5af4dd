"""The only formulas for bytes and tokens. The runtime and the planner both use them."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.core.spec import ModelSpec

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
SCALE_BYTES = 4
NATIVE_BITS: Mapping[str, float] = {
    "f16": 16, "bf16": 16, "q4_0": 4.5, "q4_1": 5, "q5_0": 8.5, "q5_1": 9, "q8_0": 8.5,
    "q3_K": 8.5625, "q4_K": 4.625, "q5_K": 8.625, "q6_K": 6.5625,
}  # fmt: skip
"""Scheme -> bits a number takes as the native backend keeps it, scales included; what is not here becomes float32."""


def kv_values_per_token(spec: ModelSpec) -> int:
    """Numbers the KV cache holds for one token: a key and a value per layer, KV head and head dimension."""
    return sum(2 * layer.attention.kv_heads * layer.attention.head_dim for layer in spec.layers)


def kv_bytes_per_token(spec: ModelSpec, dtype: str) -> int:
    """int8 has a scale for each key and each value of a head."""
    scales = sum(2 * layer.attention.kv_heads for layer in spec.layers) if dtype == "int8" else 0
    return kv_values_per_token(spec) * DTYPE_BYTES[dtype] + SCALE_BYTES * scales


def kv_bytes_per_block(spec: ModelSpec, dtype: str, block_size: int, lanes: int = 1) -> int:
    """`lanes`: a backend pads the tokens of a block, and the dimensions of a value, to a multiple of it."""
    tokens = _up(block_size, lanes)
    scale = 2 * SCALE_BYTES if dtype == "int8" else 0
    heads = ((layer.attention.kv_heads, layer.attention.head_dim) for layer in spec.layers)
    each = (count * (DTYPE_BYTES[dtype] * (dim + _up(dim, lanes)) + scale) for count, dim in heads)
    return tokens * sum(each)


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def stored_bytes(numbers: Mapping[str, int]) -> int:
    """Bytes of weights that the native backend keeps as stored; scheme -> how many numbers there are."""
    return round(sum(count * NATIVE_BITS.get(scheme, 32) / 8 for scheme, count in numbers.items()))


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)
