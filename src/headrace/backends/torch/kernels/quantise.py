"""Rows of numbers to 8-bit codes with a float32 scale each, in one pass: what the inputs of W8A8 products become.

M: rows, K: columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.core.errors import EngineError

MOST_INT8 = 127.0
MOST_FP8 = 448.0
"""The largest E4M3."""

CHUNK = 16384
"""Columns in registers at once; longer rows are read twice."""

SCALE_MULTIPLE = 256
"""torch's row-wise product on sm_90 has read scales past the end unless rows were a multiple of this (its issue
133334): so many are always there."""


@triton.jit
def _nearest_e4m3(x: tl.tensor) -> tl.tensor:
    """float32, at most 448 in size, to the nearest E4M3, ties to even; the type stays. Then any conversion is exact."""
    bits = x.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    # Below 2⁻⁶ the step is 2⁻⁹: that of float32 from 2¹⁴ to 2¹⁵.
    small = (x + 24576.0) - 24576.0
    return tl.where(tl.abs(x) < 0.015625, small, normal.to(tl.float32, bitcast=True))


@triton.jit
def _nearest_integer(x: tl.tensor) -> tl.tensor:
    """Ties to even, for sizes up to 2²²."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _quantise_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    stride_x: tl.tensor,
    K: tl.tensor,
    width: tl.tensor,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
) -> None:
    """A program a row. `codes` (M, width): zeros from K on."""
    row = tl.program_id(0).to(tl.int64)
    x += row * stride_x
    codes += row * width
    k = tl.arange(0, BLOCK)
    kind = codes.dtype.element_ty
    value = tl.zeros((BLOCK,), dtype=tl.float32)
    size = tl.zeros((BLOCK,), dtype=tl.float32)
    finite = k >= 0
    for start in tl.range(0, K, BLOCK):
        value = tl.load(x + start + k, mask=k < K - start, other=0.0).to(tl.float32)
        size = tl.maximum(size, tl.abs(value))
        # A maximum may pass over NaN: what is no number is looked for by itself.
        finite &= tl.abs(value) < float("inf")
    most = tl.max(size, axis=0)
    good = tl.min(finite.to(tl.int32), axis=0) == 1
    scale = tl.div_rn(most, MOST)
    scale = tl.where(scale > 0.0, scale, 1.0)
    for start in tl.range(0, width, BLOCK):
        if not ONE_BLOCK:
            value = tl.load(x + start + k, mask=k < K - start, other=0.0).to(tl.float32)
        scaled = tl.where(good, tl.div_rn(tl.where(good, value, 0.0), scale), 0.0)
        scaled = tl.minimum(tl.maximum(scaled, -MOST), MOST)
        code = _nearest_integer(scaled).to(tl.int8) if kind == tl.int8 else _nearest_e4m3(scaled).to(kind)
        tl.store(codes + start + k, code, mask=k < width - start)
    tl.store(scales + row, tl.where(good, scale, float("nan")))


def quantise_fp8(x_MK: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """-> codes (M, width) float8_e4m3fn, scales (M, 1) float32: x ≈ code × scale, scale = max|x| ÷ 448.

    The code is x ÷ scale, rounded to float32 and then to the nearest E4M3, ties to even. A row of zeros has scale 1. A
    row with NaN or an infinity has scale NaN and codes 0: all it leads to is NaN. `width`: K (if None) or more, filled
    with zeros. Raises EngineError for rows that do not lie side by side in memory, or a width below K.
    """
    return _quantise(x_MK, width, torch.float8_e4m3fn, MOST_FP8)


def quantise_int8(x_MK: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """-> codes (M, width) int8, scales (M, 1) float32: as `quantise_fp8`, with scale = max|x| ÷ 127 and codes rounded
    to the nearest integer, ties to even."""
    return _quantise(x_MK, width, torch.int8, MOST_INT8)


def _quantise(x: Tensor, width: int | None, dtype: torch.dtype, most: float) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    width = columns if width is None else width
    if x.stride(1) != 1 or width < columns:
        raise EngineError(f"quantise: got {tuple(x.shape)}, {x.stride()} for rows of {width}")
    codes = torch.empty(rows, width, dtype=dtype, device=x.device)
    room = triton.cdiv(rows, SCALE_MULTIPLE) * SCALE_MULTIPLE
    scales = torch.empty(room, 1, dtype=torch.float32, device=x.device)[:rows]
    if rows:
        block = min(CHUNK, max(128, triton.next_power_of_2(width)))
        warps = min(16, max(1, block // 512))
        _quantise_kernel[(rows,)](
            x, codes, scales, x.stride(0), columns, width, most, block, width <= block, num_warps=warps
        )
    return codes, scales
