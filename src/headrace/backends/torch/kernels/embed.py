"""Rows moved from here to there: embedding, gathering of rows, block tables.

Everything that a step decides is read from int32 tensors on the device, so that a captured graph stays right.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.core.errors import EngineError

BLOCK = 1024
WARPS = 4
"""8 elements a thread: a load of 16 bytes where they have two each."""

PAIRS = 256
"""Entries that one program puts into block tables."""


@triton.jit(do_not_specialize=["rows"])
def _embed_kernel(
    token_ids: tl.tensor,
    last: tl.tensor,
    rows_of: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    weight_stride: tl.tensor,
    factor: tl.tensor,
    VOCABULARY: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    token = tl.load(token_ids + place)
    row = tl.load(rows_of + place, mask=token == -1, other=-1)
    token = tl.where(token == -1, tl.load(last + row, mask=(row >= 0) & (row < rows), other=0), token)
    token = tl.where((token < 0) | (token >= VOCABULARY), 0, token)
    x = tl.load(weight + token.to(tl.int64) * weight_stride + column, mask=inside, other=0.0)
    if SCALED:
        x = (x.to(tl.float32) * factor).to(out.dtype.element_ty)
    tl.store(out + place * WIDTH + column, x, mask=inside)


@triton.jit
def _take_rows_kernel(
    x: tl.tensor,
    places: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    target = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(places + target).to(tl.int64)
    row = tl.load(x + source * x_stride + column, mask=(source >= 0) & (column < WIDTH), other=0.0)
    tl.store(out + target * WIDTH + column, row, mask=column < WIDTH)


@triton.jit(do_not_specialize=["count"])
def _put_blocks_kernel(
    tables: tl.tensor,
    rows: tl.tensor,
    places: tl.tensor,
    blocks: tl.tensor,
    count: tl.tensor,
    tables_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = index < count
    row = tl.load(rows + index, mask=known, other=-1).to(tl.int64)
    place = tl.load(places + index, mask=known, other=0)
    block = tl.load(blocks + index, mask=known, other=0)
    tl.store(tables + row * tables_stride + place, block, mask=row >= 0)


def embed(token_ids_T: Tensor, last_R: Tensor, rows_T: Tensor, weight_VH: Tensor, scale: float = 1.0) -> Tensor:
    """Rows of the embedding -> (T, H), times `scale` as `ops.scale` means it.

    Token id -1 stands for last_R[rows_T[t]], the token that the step before sampled for that row and that the host
    may not know yet. An id that the vocabulary does not have, there or in token_ids_T, takes row 0: a row that failed
    has a negative code there, and its answer is thrown away. rows_T is read only where it is asked for. int32, all
    contiguous but weight_VH, whose rows may lie apart. Raises EngineError for another shape.
    """
    (tokens,), (vocabulary, width) = token_ids_T.shape, weight_VH.shape
    if rows_T.shape != (tokens,) or last_R.ndim != 1 or weight_VH.stride(1) != 1:
        raise EngineError(f"embed: {tokens} tokens, {tuple(rows_T.shape)} rows, weight strides {weight_VH.stride()}")
    out = torch.empty(tokens, width, dtype=weight_VH.dtype, device=weight_VH.device)
    if tokens:
        scaled = scale != 1.0
        factor = torch.tensor(scale, dtype=weight_VH.dtype).item() if scaled else 1.0
        sizes = (vocabulary, width, scaled, BLOCK)
        rows, stride = last_R.shape[0], weight_VH.stride(0)
        grid = (tokens, triton.cdiv(width, BLOCK))
        _embed_kernel[grid](token_ids_T, last_R, rows_T, weight_VH, out, rows, stride, factor, *sizes, num_warps=WARPS)
    return out


def take_rows(x_TH: Tensor, places_P: Tensor) -> Tensor:
    """x_TH[places_P] -> (P, H), and zeros where the place is -1. places_P: int32; x's rows may lie apart.

    Raises EngineError for another shape.
    """
    (count,), (_, width) = places_P.shape, x_TH.shape
    if x_TH.stride(1) != 1:
        raise EngineError(f"take_rows: rows side by side in memory needed, got strides {x_TH.stride()}")
    out = torch.empty(count, width, dtype=x_TH.dtype, device=x_TH.device)
    if count:
        grid = (count, triton.cdiv(width, BLOCK))
        _take_rows_kernel[grid](x_TH, places_P, out, x_TH.stride(0), width, BLOCK, num_warps=WARPS)
    return out


def put_blocks(block_tables: Tensor, rows_n: Tensor, places_n: Tensor, blocks_n: Tensor) -> None:
    """block_tables[rows[i], places[i]] = blocks[i]; a row of -1 is padding. Each place at most once. All int32.

    Raises EngineError for another shape.
    """
    (count,) = rows_n.shape
    if places_n.shape != (count,) or blocks_n.shape != (count,) or block_tables.stride(1) != 1:
        raise EngineError(f"put_blocks: {count} rows, {tuple(places_n.shape)} places, {tuple(blocks_n.shape)} blocks")
    if count:
        grid = (triton.cdiv(count, PAIRS),)
        _put_blocks_kernel[grid](
            block_tables, rows_n, places_n, blocks_n, count, block_tables.stride(0), PAIRS, num_warps=4
        )
