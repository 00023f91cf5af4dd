"""Products of one to four tokens with a plain weight, near the memory wall; and gate·up with its activation in one go.

The tensor cores have nothing to win here: every program reads a few rows of the weight once, all of K, 16 bytes a
thread and several loads in flight, and keeps a float32 sum for each of a thread's columns until the end. K is not cut:
the order of summing depends on the weight's shape and the tile alone.

M: tokens, N: rows of the weight, K: what is summed over, I: rows of the gate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.backends.torch.kernels.activation import NAMES, activated
from headrace.core.errors import EngineError, shorten

MOST_TOKENS = 4


@dataclass(frozen=True, slots=True)
class GemvTile:
    """What a program computes. Bits depend on `width` and `warps`."""

    rows: int
    width: int
    """Columns of K at a time: 16 bytes for each thread."""
    warps: int = 4
    stages: int = 3
    """Tiles of the weight on their way: 1 reads them into registers, more copies them ahead through shared memory."""


def gemv_tile(tokens: int, columns: int, element_bytes: int, gated: bool) -> GemvTile:
    """At most four sums for each of a thread's columns: with more, registers would keep warps out that should read."""
    width = min(4 * 32 * 16 // element_bytes, triton.next_power_of_2(columns))
    sums = _padded(tokens) * (2 if gated else 1)
    return GemvTile(rows=max(1, 4 // sums), width=width)


@triton.jit(do_not_specialize=["M", "N"])
def _gemv_kernel(
    x: tl.tensor,
    w: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    stride_x: tl.tensor,
    stride_w: tl.tensor,
    stride_out: tl.tensor,
    K: tl.tensor,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """`x` (M, K), `w` (N, K), `out` (M, N). GATED: `w` is (2 N, K) and `bias` 2 N long: the gate's rows,
    then up's. EVEN: K is a multiple of WIDTH."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.arange(0, TOKENS)
    k = tl.arange(0, WIDTH)[None, None, :]
    # Rows past the end are read as the last one, and not written.
    x_rows = x + tl.minimum(m, M - 1).to(tl.int64)[:, None, None] * stride_x + k
    w_rows = w + tl.minimum(n, N - 1).to(tl.int64)[None, :, None] * stride_w + k
    up_rows = w_rows + N.to(tl.int64) * stride_w
    acc = tl.zeros((TOKENS, ROWS, WIDTH), dtype=tl.float32)
    up_acc = tl.zeros((TOKENS, ROWS, WIDTH), dtype=tl.float32)
    for start in tl.range(0, K, WIDTH, num_stages=STAGES):
        if EVEN:
            b = tl.load(x_rows + start).to(tl.float32)
            acc += tl.load(w_rows + start).to(tl.float32) * b
            if GATED:
                up_acc += tl.load(up_rows + start).to(tl.float32) * b
        else:
            inside = k < K - start
            b = tl.load(x_rows + start, mask=inside, other=0.0).to(tl.float32)
            acc += tl.load(w_rows + start, mask=inside, other=0.0).to(tl.float32) * b
            if GATED:
                up_acc += tl.load(up_rows + start, mask=inside, other=0.0).to(tl.float32) * b
    y = tl.sum(acc, axis=2)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    kind = out.dtype.element_ty
    if GATED:
        up = tl.sum(up_acc, axis=2)
        if HAS_BIAS:
            up += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        gate = activated(y.to(kind).to(tl.float32), ACTIVATION)
        y = gate.to(kind).to(tl.float32) * up.to(kind).to(tl.float32)
    where = out + m.to(tl.int64)[:, None] * stride_out + n[None, :]
    tl.store(where, y.to(kind), mask=(m < M)[:, None] & (n < N)[None, :])


def gemv(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, tile: GemvTile | None = None) -> Tensor:
    """x Wᵀ + bias -> (M, N) in x's type, float32 sums, rounded once. 1 ≤ M ≤ 4.

    Raises EngineError for shapes, types or strides that do not fit.
    """
    return _launch(x_MK, weight_NK, bias_N, weight_NK.shape[0], None, tile)


def gated_gemv(
    x_MK: Tensor, weight_2IK: Tensor, bias_2I: Tensor | None, activation: str, tile: GemvTile | None = None
) -> Tensor:
    """act(x Wgᵀ) × (x Wuᵀ) -> (M, I): `ops.gated` of the product, gate and up rounded to x's type as there. 1 ≤ M ≤ 4.

    Raises EngineError for shapes, types, strides or an activation that do not fit.
    """
    if activation not in NAMES:
        raise EngineError(f"gated_gemv: got {shorten(activation)}, allowed: {', '.join(NAMES)}")
    if weight_2IK.shape[0] % 2:
        raise EngineError(f"gated_gemv: {weight_2IK.shape[0]} rows have no two halves")
    return _launch(x_MK, weight_2IK, bias_2I, weight_2IK.shape[0] // 2, activation, tile)


def _padded(tokens: int) -> int:
    return 4 if tokens > 2 else tokens


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, activation: str | None, tile: GemvTile | None
) -> Tensor:
    tokens, columns = x.shape
    if not 1 <= tokens <= MOST_TOKENS or columns != weight.shape[1] or x.dtype != weight.dtype:
        raise EngineError(f"gemv: got x {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)} {weight.dtype}")
    if x.stride(1) != 1 or weight.stride(1) != 1 or (bias is not None and bias.shape != weight.shape[:1]):
        raise EngineError("gemv: rows side by side in memory and a bias of one number a row are needed")
    tile = tile or gemv_tile(tokens, columns, x.element_size(), activation is not None)
    out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    _gemv_kernel[(triton.cdiv(rows, tile.rows),)](
        x,
        weight,
        bias,
        out,
        tokens,
        rows,
        x.stride(0),
        weight.stride(0),
        out.stride(0),
        columns,
        TOKENS=_padded(tokens),
        ROWS=tile.rows,
        WIDTH=tile.width,
        EVEN=columns % tile.width == 0,
        HAS_BIAS=bias is not None,
        GATED=activation is not None,
        ACTIVATION=activation,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return out
