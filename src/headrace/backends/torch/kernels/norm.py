"""RMSNorm and LayerNorm of rows, alone or with the sum before them: what `ops.norm` means.

One program holds whole rows in registers, so that x is read once. How a row is summed depends on its width alone,
never on how many rows there are. T: rows, H: width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.core.errors import EngineError
from headrace.core.spec import NormSpec

WIDEST = 16384
"""Most columns that a program holds in registers; wider rows are read once more for each statistic."""

TILE = 1024
"""Fewest elements of a program: several narrow rows, or part of a wide one."""


@triton.jit
def _read(hidden: tl.tensor, branch: tl.tensor, place: tl.tensor, other: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """hidden, plus branch if there is one and rounded as it will be stored, in float32; zeros outside."""
    x = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
    if branch is not None:
        x += tl.load(branch + other, mask=inside, other=0.0).to(tl.float32)
        x = x.to(hidden.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _affine(
    normed: tl.tensor, weight: tl.tensor, bias: tl.tensor, dtype: tl.constexpr, ROUND_FIRST: tl.constexpr
) -> tl.tensor:
    """× weight + bias, to be rounded to the type; with `ROUND_FIRST` what it multiplies is rounded as well."""
    if ROUND_FIRST:
        normed = normed.to(dtype).to(tl.float32)
    normed = normed * weight
    if bias is not None:
        normed += bias
    return normed.to(dtype)


@triton.jit(do_not_specialize=["rows"])
def _norm_kernel(
    hidden: tl.tensor,
    branch: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    hidden_stride: tl.tensor,
    branch_stride: tl.tensor,
    out_stride: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LAYER: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    x = _read(hidden, branch, row * hidden_stride + column, row * branch_stride + column, inside)
    # Before the sums, so that the weights are on their way meanwhile.
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    b = None
    if bias is not None:
        b = tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if branch is not None:
        tl.store(hidden + row * hidden_stride + column, x.to(hidden.dtype.element_ty), mask=inside)
    if LAYER:
        mean = tl.sum(x, axis=1, keep_dims=True) / WIDTH
        x = tl.where(inside, x - mean, 0.0)
    deviation = tl.math.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / WIDTH + eps)
    y = _affine(x * deviation, w, b, out.dtype.element_ty, ROUND_FIRST)
    tl.store(out + row * out_stride + column, y, mask=inside)


@triton.jit
def _wide_norm_kernel(
    hidden: tl.tensor,
    branch: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    hidden_stride: tl.tensor,
    branch_stride: tl.tensor,
    out_stride: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LAYER: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
) -> None:
    """A row in several blocks. hidden is written in the last pass alone: each element after it was read."""
    row = tl.program_id(0).to(tl.int64)
    hidden += row * hidden_stride
    branch_row = row * branch_stride
    columns = tl.arange(0, BLOCK)
    mean = 0.0
    if LAYER:
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, WIDTH, BLOCK):
            column = start + columns
            sums += _read(hidden, branch, column, branch_row + column, column < WIDTH)
        mean = tl.sum(sums, axis=0) / WIDTH
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + columns
        x = _read(hidden, branch, column, branch_row + column, column < WIDTH)
        x = tl.where(column < WIDTH, x - mean, 0.0)
        squares += x * x
    deviation = tl.math.rsqrt(tl.sum(squares, axis=0) / WIDTH + eps)
    for start in range(0, WIDTH, BLOCK):
        column = start + columns
        inside = column < WIDTH
        x = _read(hidden, branch, column, branch_row + column, inside)
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        b = None
        if bias is not None:
            b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        if branch is not None:
            tl.store(hidden + column, x.to(hidden.dtype.element_ty), mask=inside)
        y = _affine((x - mean) * deviation, w, b, out.dtype.element_ty, ROUND_FIRST)
        tl.store(out + row * out_stride + column, y, mask=inside)


def norm(x_TH: Tensor, weight: Tensor, bias: Tensor | None, spec: NormSpec, out: Tensor | None = None) -> Tensor:
    """`ops.norm` of (T, H) rows, which may lie apart; `out`: where it goes, x itself allowed.

    weight (and bias, a LayerNorm's): (H,), of x's type, or float32 (it is where the spec has a unit offset; an
    RMSNorm without one takes x's type alone). Raises EngineError for another shape or type.
    """
    return _launch(x_TH, None, weight, bias, spec, torch.empty_like(x_TH) if out is None else out)


def add_norm(hidden_TH: Tensor, branch_TH: Tensor, weight: Tensor, bias: Tensor | None, spec: NormSpec) -> Tensor:
    """hidden += branch in place, then `norm` of hidden as it was rounded: one pass for the two.

    Both (T, H) of one type, their rows may lie apart. Raises EngineError as `norm` does.
    """
    if branch_TH.shape != hidden_TH.shape or branch_TH.dtype != hidden_TH.dtype or branch_TH.stride(1) != 1:
        raise EngineError(f"add_norm: branch {_described(branch_TH)} on hidden {_described(hidden_TH)}")
    return _launch(hidden_TH, branch_TH, weight, bias, spec, torch.empty_like(hidden_TH))


def _launch(
    hidden: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, spec: NormSpec, out: Tensor
) -> Tensor:
    width, layer = spec.width, spec.kind == "layer"
    if hidden.ndim != 2 or hidden.shape[1] != width or hidden.stride(1) != 1:
        raise EngineError(f"norm: rows of width {width}, side by side in memory, needed, got {_described(hidden)}")
    if out.shape != hidden.shape or out.dtype != hidden.dtype or out.stride(1) != 1:
        raise EngineError(f"norm: out {_described(out)} for {_described(hidden)}")
    round_first = not layer and not spec.unit_offset
    if weight.shape != (width,) or (round_first and weight.dtype != hidden.dtype):
        raise EngineError(f"norm: weight {_described(weight)} for {_described(hidden)}")
    rows = hidden.shape[0]
    if rows == 0:
        return out
    strides = (hidden.stride(0), 0 if branch is None else branch.stride(0), out.stride(0))
    scales = (weight, bias if layer else None)  # as in ops.norm, an RMSNorm has no bias
    if width > WIDEST:
        wide = (width, WIDEST // 2, layer, round_first)
        _wide_norm_kernel[(rows,)](hidden, branch, *scales, out, *strides, spec.eps, *wide, num_warps=16)
        return out
    block, tile, warps = blocks(width)
    grid = (triton.cdiv(rows, tile),)
    sizes = (width, block, tile, layer, round_first)
    _norm_kernel[grid](hidden, branch, *scales, out, rows, *strides, spec.eps, *sizes, num_warps=warps)
    return out


def blocks(width: int) -> tuple[int, int, int]:
    """Columns and rows of a program's tile, and its warps: 8 elements a thread, which are 16 bytes, while that is
    512 threads or fewer."""
    block = triton.next_power_of_2(width)
    rows = max(1, TILE // block)
    return block, rows, min(16, rows * block // 256)


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}"
