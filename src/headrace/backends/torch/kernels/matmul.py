"""y = x Wᵀ + bias in one kernel: plain numbers, int8 and fp8 codes, few tokens and many, batch-invariant or not.

A program computes a tile of yᵀ: the weight's rows are the tensor core's tall side, so that 16 tokens waste nothing and
the weight streams through shared memory, several tiles in flight. Where that makes too few programs to keep every
multiprocessor reading, K is cut into parts: each program writes its part's sums, and whoever comes last adds them up in
order. Only the counter is atomic: the same inputs give the same bits.

M: tokens, N: rows of the weight, K: what is summed over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.core.errors import EngineError

FEW_TOKENS = 64
"""Up to here reading the weight is what takes the time."""

MOST_PARTS = 16
LEAST_STEPS = 4
"""A part is no shorter than so many tiles of K."""

MOST_ROUNDS = 4
"""Programs of parts are no more than so many times what runs at once: what their sums take is bounded."""

TOKEN_GROUP = 8
"""Tiles of tokens that share the rows of a weight in the second-level cache."""

IMPRECISE = 128
"""Products of fp8 that may be summed in the tensor core's own 14 bits before they join the float32 sum."""

SHARED_BYTES: Mapping[tuple[int, int], int] = MappingProxyType(
    {(8, 0): 164 << 10, (8, 7): 164 << 10, (9, 0): 228 << 10, (10, 0): 228 << 10, (10, 3): 228 << 10}
)
"""Shared memory of a multiprocessor by capability, where it is not 100 KiB (CUDA C++ Programming Guide, technical
specifications)."""


@dataclass(frozen=True, slots=True)
class Card:
    """What configurations depend on."""

    capability: tuple[int, int] = (9, 0)
    multiprocessors: int = 132

    @property
    def shared_bytes(self) -> int:
        """Of a multiprocessor."""
        return SHARED_BYTES.get(self.capability, 100 << 10)

    def slots(self, warps: int) -> int:
        """Programs that run at once: two of 4 warps on a multiprocessor, or one of 8."""
        return self.multiprocessors * 8 // warps


@dataclass(frozen=True, slots=True)
class Tile:
    """A configuration. A row's bits depend on the first four, and on nothing else."""

    rows: int
    tokens: int
    depth: int
    parts: int
    """K is cut into so many, each a multiple of `depth` long, summed on their own and then in order."""
    spread: bool
    """Parts are programs of their own; else a program computes one after the other, with the same bits."""
    warps: int
    stages: int


def tile_of(tokens: int, rows: int, columns: int, dtype: torch.dtype, card: Card) -> Tile:
    """The quickest, as far as can be told: few tokens read the weight, many keep the tensor cores busy."""
    if dtype == torch.float32:
        height, width, depth, warps = 64, 16 if tokens <= 16 else 32, 32, 4
    elif tokens <= FEW_TOKENS:
        height, width, depth, warps = 64, max(16, triton.next_power_of_2(tokens)), 128, 4
    else:
        height, width, depth, warps = 128, 128, 128 if dtype.itemsize == 1 else 64, 8
    slots = card.slots(warps)
    row_tiles = triton.cdiv(rows, height)
    # Twice the tokens fill the registers: only where nothing is left to cut.
    if dtype == torch.int8 and warps == 8 and card.capability >= (9, 0) and row_tiles * (tokens // 256) >= slots:
        width = 256
    tiles = row_tiles * triton.cdiv(tokens, width)
    # Many tokens have sums too large to be written without need.
    parts = parts_of(tiles, columns, depth, slots) if tokens <= FEW_TOKENS or tiles < slots else 1
    return _tile(height, width, depth, parts, parts > 1, warps, dtype, card)


def invariant_tile(tokens: int, rows: int, columns: int, dtype: torch.dtype, card: Card) -> Tile:
    """One shape and one order of summing whatever the number of tokens: a row's bits never depend on its company.

    The parts are those that one tile of tokens needs. They are spread while their sums take a few tens of MiB.
    """
    if dtype == torch.float32:
        height, width, depth = 64, 32, 32
    elif dtype.itemsize == 1:
        height, width, depth = 64, 64, 128
    else:
        height, width, depth = 128, 64, 64
    row_tiles = triton.cdiv(rows, height)
    parts = parts_of(row_tiles, columns, depth, card.slots(4))
    spread = parts > 1 and row_tiles * triton.cdiv(tokens, width) * parts <= MOST_ROUNDS * card.slots(4)
    return _tile(height, width, depth, parts, spread, 4, dtype, card)


def parts_of(tiles: int, columns: int, depth: int, slots: int) -> int:
    """The fewest parts with which no more than 15 % of the card waits in the last round of programs, or the best."""
    most = min(MOST_PARTS, columns // (LEAST_STEPS * depth), MOST_ROUNDS * slots // tiles)
    best, best_use = 1, 0.0
    for parts in range(1, most + 1):
        rounds = tiles * parts / slots
        use = rounds / math.ceil(rounds)
        if use > best_use:
            best, best_use = parts, use
        if use >= 0.85:
            break
    return best


def _tile(
    rows: int, tokens: int, depth: int, parts: int, spread: bool, warps: int, dtype: torch.dtype, card: Card
) -> Tile:
    """As many tiles on their way as half a multiprocessor's shared memory holds; all of it where there are 8 warps."""
    room, most = (card.shared_bytes, 4) if warps == 8 else (card.shared_bytes // 2, 8)
    stages = max(2, min(most, (room - 2048) // ((rows + tokens) * depth * dtype.itemsize)))
    return Tile(rows, tokens, depth, parts, spread, warps, stages)


@triton.jit
def _part(
    w_tile: tl.tensor,
    x_tile: tl.tensor,
    used: tl.tensor,
    begin: tl.tensor,
    steps: tl.tensor,
    K: tl.tensor,
    kind: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    IMPRECISE: tl.constexpr,
) -> tl.tensor:
    """The sums of `steps` tiles of K from `begin` on. `used`: which tokens there are."""
    k = tl.arange(0, DEPTH)
    acc = tl.zeros((ROWS, TOKENS), dtype=kind)
    for step in tl.range(0, steps):
        start = begin + step * DEPTH
        if EVEN:
            a = tl.load(w_tile + start)
            b = tl.load(x_tile + start, mask=used, other=0.0)
        else:
            a = tl.load(w_tile + start, mask=(k < K - start)[None, :], other=0.0)
            b = tl.load(x_tile + start, mask=used & (k < K - start)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=kind, max_num_imprecise_acc=IMPRECISE)
    return acc


@triton.jit(do_not_specialize=["M", "steps"])
def _matmul_kernel(
    x: tl.tensor,
    w: tl.tensor,
    x_scale: tl.tensor,
    w_scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    sums: tl.tensor,
    counters: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    stride_x: tl.tensor,
    stride_w: tl.tensor,
    stride_out: tl.tensor,
    K: tl.tensor,
    steps: tl.tensor,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    SPREAD: tl.constexpr,
    EVEN: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    IMPRECISE: tl.constexpr,
) -> None:
    """`out` (M, N); `x` (M, K) and `w` (N, K), rows apart by a stride; `sums`: a tile for each program; `counters`: a
    zero for each tile, and zeros again afterwards. A part is `steps` tiles of K long; EVEN: K is PARTS of them."""
    # Programs that run at once share rows of the weight and tokens: GROUP tiles of tokens, then the next rows.
    row_tiles = tl.cdiv(N, ROWS)
    token_tiles = tl.cdiv(M, TOKENS)
    tile = tl.program_id(0)
    part = tl.program_id(1)
    in_group = GROUP * row_tiles
    first = tile // in_group * GROUP
    group = tl.minimum(token_tiles - first, GROUP)
    token_tile = first + tile % in_group % group
    row_tile = tile % in_group // group

    n = row_tile * ROWS + tl.arange(0, ROWS)
    m = token_tile * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, DEPTH)
    # Rows past the weight's end are read as its last one, and not written; missing tokens are not read at all.
    w_tile = w + tl.minimum(n, N - 1).to(tl.int64)[:, None] * stride_w + k[None, :]
    x_tile = x + m.to(tl.int64)[None, :] * stride_x + k[:, None]
    used = m[None, :] < M
    kind: tl.constexpr = tl.int32 if w.dtype.element_ty == tl.int8 else tl.float32
    inner: tl.constexpr = 1 if SPREAD else PARTS
    total = tl.zeros((ROWS, TOKENS), dtype=kind)
    for index in range(inner):
        begin = (part if SPREAD else index) * (steps * DEPTH)
        acc = _part(w_tile, x_tile, used, begin, steps, K, kind, ROWS, TOKENS, DEPTH, EVEN, IMPRECISE)
        if inner == 1:
            total = acc
        else:
            total += acc

    last = True
    if SPREAD:
        at = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        mine = sums + tile.to(tl.int64) * (PARTS * ROWS * TOKENS)
        tl.store(mine + part * (ROWS * TOKENS) + at, total)
        tl.debug_barrier()
        last = tl.atomic_add(counters + tile, 1) == PARTS - 1
        if last:
            tl.store(counters + tile, 0)
            total = tl.zeros((ROWS, TOKENS), dtype=kind)
            for index in range(PARTS):
                total += tl.load(mine + index * (ROWS * TOKENS) + at, cache_modifier=".cg")
    if last:
        y = total.to(tl.float32)
        if SCALED:
            y = y * tl.load(x_scale + m, mask=m < M, other=0.0)[None, :]
            y = y * tl.load(w_scale + n, mask=n < N, other=0.0)[:, None]
        if HAS_BIAS:
            y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        where = out + m.to(tl.int64)[None, :] * stride_out + n[:, None]
        tl.store(where, y.to(out.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


def new_counters(card: Card, device: torch.device) -> Tensor:
    """Zeros for `matmul`, which leaves zeros: one for all products of a stream, never for two streams at once."""
    return torch.zeros(MOST_ROUNDS * card.slots(4), dtype=torch.int32, device=device)


def matmul(
    x_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    tile: Tile,
    counters: Tensor,
    dtype: torch.dtype | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """x Wᵀ × scales + bias -> (M, N) in `dtype` (that of x, if None), rounded once.

    Both operands float32 (computed as such), float16, bfloat16, float8_e4m3fn or int8 (exact integer sums, K at most
    131,071). `scales`: float32, of x's rows and of the weight's; sum × first × second + bias, rounded after each
    product (the last may join the addition). Raises EngineError for shapes, types or strides that do not fit.
    """
    tokens, columns = x_MK.shape
    rows = weight_NK.shape[0]
    if columns != weight_NK.shape[1] or x_MK.dtype != weight_NK.dtype:
        found = f"x {tuple(x_MK.shape)} {x_MK.dtype}, weight {tuple(weight_NK.shape)} {weight_NK.dtype}"
        raise EngineError(f"matmul: one type and as many columns needed, got {found}")
    if x_MK.stride(1) != 1 or weight_NK.stride(1) != 1 or (bias_N is not None and bias_N.shape != (rows,)):
        raise EngineError("matmul: rows side by side in memory and a bias of one number a row are needed")
    out = torch.empty(tokens, rows, dtype=dtype or x_MK.dtype, device=x_MK.device)
    if not tokens or not rows:
        return out
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(tokens, tile.tokens)
    steps = triton.cdiv(columns, tile.parts * tile.depth)
    parts = triton.cdiv(columns, steps * tile.depth)
    spread = tile.spread and parts > 1
    sums = None
    if spread:
        kind = torch.int32 if x_MK.dtype == torch.int8 else torch.float32
        sums = torch.empty(tiles * parts * tile.rows * tile.tokens, dtype=kind, device=x_MK.device)
        if tiles > counters.numel():
            raise EngineError(f"matmul: {tiles} tiles in parts, and {counters.numel()} counters")
    x_scale, w_scale = scales or (None, None)
    _matmul_kernel[(tiles, parts if spread else 1)](
        x_MK,
        weight_NK,
        x_scale,
        w_scale,
        bias_N,
        out,
        sums,
        counters,
        tokens,
        rows,
        x_MK.stride(0),
        weight_NK.stride(0),
        out.stride(0),
        columns,
        steps,
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        DEPTH=tile.depth,
        PARTS=parts,
        SPREAD=spread,
        EVEN=columns == parts * steps * tile.depth,
        SCALED=scales is not None,
        HAS_BIAS=bias_N is not None,
        GROUP=TOKEN_GROUP,
        IMPRECISE=min(IMPRECISE, tile.depth),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out
