"""What the bytes of ggml's block types mean: planes of whole blocks -> float32, (…, blocks) -> (…, blocks, weights).

Layouts: ggml's `block_q4_0` … `block_q6_K` (ggml-common.h). The order of the roundings is ggml's own, so that every
value is ggml's bit for bit: one rounding a multiplication, one a subtraction or addition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
Planes = Mapping[str, NDArray[np.generic]]

K_BLOCK = 256
LOW = np.uint8(0x0F)
_FOUR = np.uint8(4)


def _column(plane: NDArray[np.generic]) -> F32:
    """A scale a block, ready to meet the weights of its block."""
    return plane.astype(np.float32)[..., None]


def _nibbles(packed: NDArray[np.generic], run: int) -> U8:
    """(…, n) bytes -> (…, n / run, 2, run): of each run of bytes the low nibbles come first, then the high ones."""
    bytes_ = packed.reshape(*packed.shape[:-1], packed.shape[-1] // run, run).astype(np.uint8, copy=False)
    out = np.empty((*bytes_.shape[:-1], 2, run), dtype=np.uint8)
    np.bitwise_and(bytes_, LOW, out=out[..., 0, :])
    np.right_shift(bytes_, _FOUR, out=out[..., 1, :])
    return out


def _fields(packed: NDArray[np.generic], run: int, bits: int) -> U8:
    """(…, n) bytes -> (…, n / run, 8 / bits, run): of each run of bytes the lowest `bits` first, and so on upwards."""
    bytes_ = packed.reshape(*packed.shape[:-1], packed.shape[-1] // run, run).astype(np.uint8, copy=False)
    out = np.empty((*bytes_.shape[:-1], 8 // bits, run), dtype=np.uint8)
    for index in range(8 // bits):
        np.right_shift(bytes_, np.uint8(bits * index), out=out[..., index, :])
    out &= np.uint8((1 << bits) - 1)
    return out


def _flat(values: U8, planes: Planes) -> U8:
    """All weights of a block along the last axis."""
    shape = planes["d"].shape
    return values.reshape(*shape, math.prod(values.shape[len(shape) :]))


def q4_0(planes: Planes) -> F32:
    centred = _flat(_nibbles(planes["q"], 16), planes).view(np.int8) - np.int8(8)
    return centred.astype(np.float32) * _column(planes["d"])


def q4_1(planes: Planes) -> F32:
    values = _flat(_nibbles(planes["q"], 16), planes).astype(np.float32)
    values *= _column(planes["d"])
    values += _column(planes["m"])
    return values


def _five_bits(planes: Planes) -> U8:
    """The four low bits lie as in q4_0; bit i of `h` is the fifth of weight i."""
    values = np.unpackbits(planes["h"].astype(np.uint8, copy=False), axis=-1, bitorder="little")
    values <<= _FOUR
    values |= _flat(_nibbles(planes["q"], 16), planes)
    return values


def q5_0(planes: Planes) -> F32:
    centred = _five_bits(planes).view(np.int8) - np.int8(16)
    return centred.astype(np.float32) * _column(planes["d"])


def q5_1(planes: Planes) -> F32:
    values = _five_bits(planes).astype(np.float32)
    values *= _column(planes["d"])
    values += _column(planes["m"])
    return values


def q8_0(planes: Planes) -> F32:
    return planes["q"].astype(np.float32) * _column(planes["d"])


# ---------------------------------------------------------------- K: 256 weights, with scales of their sub-blocks


def _scaled(values: U8 | NDArray[np.int8], scale: F32, minimum: F32 | None = None) -> F32:
    """Sub-blocks of equal length along the last axis: each times its scale, less its minimum."""
    grouped = values.reshape(*scale.shape, K_BLOCK // scale.shape[-1]).astype(np.float32)
    grouped *= scale[..., None]
    if minimum is not None:
        grouped -= minimum[..., None]
    return grouped.reshape(*scale.shape[:-1], K_BLOCK)


def _scales_and_minima(planes: Planes) -> tuple[F32, F32]:
    """Of q4_K and q5_K, (…, 8) each: d and dmin times six-bit numbers, whose upper two bits of j ≥ 4 lie in those of
    j - 4."""
    packed = planes["s"].astype(np.uint8, copy=False)
    first, second, low = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    top = np.uint8(0x30)
    scale = np.concatenate((first & np.uint8(63), (low & LOW) | ((first >> np.uint8(2)) & top)), axis=-1)
    minimum = np.concatenate((second & np.uint8(63), (low >> _FOUR) | ((second >> np.uint8(2)) & top)), axis=-1)
    return scale.astype(np.float32) * _column(planes["d"]), minimum.astype(np.float32) * _column(planes["dmin"])


def q2_k(planes: Planes) -> F32:
    packed = planes["s"].astype(np.uint8, copy=False)
    scale = (packed & LOW).astype(np.float32) * _column(planes["d"])
    minimum = (packed >> _FOUR).astype(np.float32) * _column(planes["dmin"])
    return _scaled(_fields(planes["q"], 32, 2), scale, minimum)


def q3_k(planes: Planes) -> F32:
    packed = planes["s"].astype(np.uint8, copy=False)
    scale = _nibbles(packed[..., :8], 8).reshape(*packed.shape[:-1], 16)
    scale |= _fields(packed[..., 8:], 4, 2).reshape(scale.shape) << _FOUR
    centred = (scale.view(np.int8) - np.int8(32)).astype(np.float32) * _column(planes["d"])
    values = _flat(_fields(planes["q"], 32, 2), planes).view(np.int8)
    # A clear bit of the mask takes four away.
    clear = _flat(_fields(planes["h"], 32, 1), planes) ^ np.uint8(1)
    return _scaled(values - (clear << np.uint8(2)).view(np.int8), centred)


def q4_k(planes: Planes) -> F32:
    return _scaled(_nibbles(planes["q"], 32), *_scales_and_minima(planes))


def q5_k(planes: Planes) -> F32:
    values = _flat(_fields(planes["h"], 32, 1), planes)
    values <<= _FOUR
    values |= _flat(_nibbles(planes["q"], 32), planes)
    return _scaled(values, *_scales_and_minima(planes))


def q6_k(planes: Planes) -> F32:
    values = _flat(_fields(planes["h"], 32, 2), planes)
    values <<= _FOUR
    values |= _flat(_nibbles(planes["q"], 64), planes)
    scale = planes["s"].astype(np.float32) * _column(planes["d"])
    return _scaled(values.view(np.int8) - np.int8(32), scale)
