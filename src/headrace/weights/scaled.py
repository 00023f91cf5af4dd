"""Schemes of small numbers with a plane of scales: what GPTQ, AWQ, compressed-tensors and fp8 checkpoints become.

Planes, of a tensor (…, N, K) with groups of g weights along K:

    q      the numbers. int8: i1 (…, N, K). fp8: u1 (…, N, K), raw E4M3 (the finite kind: no infinity, 0x7F is NaN).
           int4: u1 (…, N, K / 2), 0 to 15, the even column in the low nibble.
    s      (…, N, K / g), float32, float16, or bf16 as raw uint16. One scale for a whole row or a whole matrix is the
           same plane with g = K; a block of several rows gives each of them its scale.
    z      of int4_asym and int8_asym, (…, N, K / g), u1 and i1: what stands for zero. (int4: 8; int8: 0.)
    order  (K,) int32, only where GPTQ sorted the columns by importance: column j is stored, column order[j] is meant.

A value is (q - z) · s rounded to the type of `s`: what the packages that define these formats compute (q, z and
q - z are exact in each of those types; the product of two 16-bit floats is exact in float32).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
Array = NDArray[np.generic]
Planes = Mapping[str, Array]

ORDER = "order"
_INT4_ZERO = np.float32(8)
_LEAST_NORMAL_F16, _MOST_F16 = 2.0**-14, 65504.0
_MOST_INT = 256.0
"""|q - z| never passes it."""


def _e4m3() -> F32:
    """All 256 values: sign, four bits of exponent (bias 7), three of fraction."""
    bits = np.arange(256)
    exponent, fraction = (bits >> 3) & 15, bits & 7
    size = np.where(exponent == 0, np.ldexp(fraction / 8, -6), np.ldexp(1 + fraction / 8, exponent - 7))
    values = np.where(bits >> 7, -size, size).astype(np.float32)
    values[[0x7F, 0xFF]] = np.nan
    values.flags.writeable = False
    return values


_E4M3 = _e4m3()


def unpack_nibbles(packed: Array) -> NDArray[np.uint8]:
    """(…, K / 2) bytes -> (…, K) numbers 0 to 15: the low nibble is the even column."""
    numbers = np.empty((*packed.shape, 2), np.uint8)
    _split(packed, numbers)
    return numbers.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def _split(packed: Array, out: NDArray[np.uint8] | F32) -> None:
    """The low nibbles to out[..., 0], the high ones to out[..., 1]."""
    bytes_ = packed.astype(np.uint8, copy=False)
    np.bitwise_and(bytes_, np.uint8(15), out=out[..., 0])
    np.right_shift(bytes_, np.uint8(4), out=out[..., 1])


def scale_values(scale: Array) -> F32:
    """A plane of scales as float32; uint16 is raw bf16."""
    if scale.dtype == np.uint16:
        return (scale.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return scale.astype(np.float32)


def _cut(values: F32, bits: int) -> F32:
    """Rounds to nearest, ties to even, in place, so that the last `bits` of each fraction are zero."""
    raw = values.view(np.uint32)
    up = raw >> np.uint32(bits)
    up &= np.uint32(1)
    up += np.uint32((1 << (bits - 1)) - 1)
    raw += up
    raw &= np.uint32(0xFFFFFFFF ^ ((1 << bits) - 1))
    return values


def _rounded(values: F32, scale: Array, integers: bool) -> F32:
    """What the type of the scale holds of the float32 products; may work in place."""
    if scale.dtype == np.float32:
        return values
    size = np.abs(scale_values(scale))
    if scale.dtype == np.uint16:
        # A NaN's fraction may be all ones: rounding up would carry into its sign.
        nan = None if integers and np.isfinite(size).all() else np.isnan(values)
        _cut(values, 16)
        if nan is not None:
            values[nan] = np.nan
        return values
    # Where no product can leave float16's normal numbers, the fast way; else numpy's own, which knows all of them.
    normal = (size == 0) | ((size >= _LEAST_NORMAL_F16) & (size <= _MOST_F16 / _MOST_INT))
    if integers and normal.all():
        return _cut(values, 13)
    return values.astype(np.float16).astype(np.float32)


def _int4(planes: Planes) -> F32:
    packed = planes["q"]
    numbers = np.empty((*packed.shape, 2), np.float32)
    _split(packed, numbers)
    return numbers.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def _int8(planes: Planes) -> F32:
    return planes["q"].astype(np.float32)


def _fp8(planes: Planes) -> F32:
    return np.take(_E4M3, planes["q"].astype(np.uint8, copy=False))


_NUMBERS: Mapping[str, Callable[[Planes], F32]] = MappingProxyType(
    {"int4": _int4, "int4_asym": _int4, "int8": _int8, "int8_asym": _int8, "fp8": _fp8}
)


def decode(scheme: str, planes: Planes) -> F32:
    """The float32 values, (…, N, K)."""
    scale = planes["s"]
    values = _NUMBERS[scheme](planes)
    grouped = values.reshape(*scale.shape, values.shape[-1] // max(1, scale.shape[-1]))
    if "z" in planes:
        grouped -= planes["z"].astype(np.float32)[..., None]
    elif scheme == "int4":
        grouped -= _INT4_ZERO
    grouped *= scale_values(scale)[..., None]
    stored = _rounded(grouped, scale, integers=scheme != "fp8").reshape(values.shape)
    if ORDER not in planes:
        return stored
    order = planes[ORDER].astype(np.intp)
    place = np.empty_like(order)
    place[order] = np.arange(order.size)
    return np.take(stored, place, axis=-1)


def columns(scheme: str, planes: Planes, start: int, stop: int, group: int) -> Planes:
    """Columns [start, stop), which fall between groups. Raises ValueError where columns are in another order."""
    if ORDER in planes:
        raise ValueError(f"the columns of this {scheme} tensor are sorted by importance and cannot be cut")
    width = 2 if scheme.startswith("int4") else 1
    if start % width or stop % width:
        raise ValueError(f"columns {start}:{stop} of {scheme} do not fall between bytes of {width}")
    cuts = {"q": slice(start // width, stop // width)}
    groups = slice(start // group, stop // group)
    return {name: plane[..., cuts.get(name, groups)] for name, plane in planes.items()}


def can_join(first: Planes, other: Planes) -> bool:
    """Whether two sets of planes of one scheme and one row length differ in their rows only."""
    return (
        first.keys() == other.keys()
        and all(first[name].dtype == other[name].dtype for name in first)
        and first["s"].shape[-1] == other["s"].shape[-1]
        and (ORDER not in first or np.array_equal(first[ORDER], other[ORDER]))
    )
