"""Attention over the paged KV cache, in one launch for rows that prefill and rows that decode.

It means what `ops.attention` means: softmax(q kᵀ scale) v, in float32 where it counts, with weights in the compute type
where they meet v. Two ways to cut a row's keys (`Splits`) decide whether a row's bits depend on the batch.

Batch invariance (`Splits.chunk`): the keys are cut at multiples of `chunk`; each chunk is walked from its start and the
chunks are merged in order, whoever does it. All launches for some heads have the same tile, and the compiler may not
fuse a multiplication into an addition, so that there is one binary, and nothing that differs between two launches
enters a row's arithmetic but how many chunks and tiles it meets; those it does not see add exact zeros.
What this rests on: a tensor core gives a row the same bits wherever in the tile it lies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.backends.torch.kernels.attention_kernels import attention_kernel, combine_kernel
from headrace.core.errors import EngineError, shorten

MIN_SPLIT = 256
"""Fewest keys worth a program of their own: below, writing and reading its part costs more than a few percent."""
MAX_SPLITS = 64
"""Their parts are put together in one program's registers."""
FILL = 4
"""Programs for each multiprocessor that a decode step should have: two run at a time, and the last ones end alone."""
MAX_ROWS = 128
"""Rows of the largest tile, where query heads of a KV head are no more: two groups of four warps, 64 rows each."""
INVARIANT_ROWS = 32
"""Rows of a tile where bits may not depend on the batch: decode, of one query, then takes no more tensor core time than
memory time, and prefill reads the keys once for so many."""


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """A step's spans as the kernels read them; int32 on the device, contiguous."""

    starts: Tensor
    """[R] first place of each span in the flat arrays"""
    lengths: Tensor
    """[R] its tokens; 0: a row of padding (a graph's bucket is larger than the batch), of which nothing is read or
    written"""
    contexts: Tensor
    """[R] tokens that its last token sees, itself included"""
    rows: Tensor
    """[R] its row in the block tables"""
    tiles: Tensor
    """[tiles, 2] (span, first query of the span), as `span_tiles` cuts them. Decode: (i, 0)"""
    queries: int
    """Most queries of a span in one tile: 1 where all spans are of one token"""


@dataclass(frozen=True, slots=True)
class Splits:
    """How many programs share the keys of a span of one token (longer spans are never shared), and how.

    `chunk` 0: equal shares of the row's keys. Else a row's bits depend on its own tokens alone: not on `count`, nor on
    the batch, nor on whether it came as prefill or decode.
    """

    count: int = 1
    chunk: int = 0
    """Keys; a multiple of 64"""

    def __post_init__(self) -> None:
        if self.count < 1 or (not self.chunk and self.count > MAX_SPLITS):
            raise EngineError(f"splits.count is {shorten(self.count)}; allowed: 1 … {MAX_SPLITS}")
        if self.chunk < 0 or self.chunk % 64:
            raise EngineError(f"splits.chunk is {shorten(self.chunk)}; allowed: 0 or a multiple of 64")


@dataclass(frozen=True, slots=True, eq=False)
class Workspace:
    """Where shares of a row's keys leave their results. Nothing in it lasts beyond a launch: one serves all layers."""

    partials: Tensor
    """float32: (rows × heads × slots × head dim) in whatever shape a launch needs"""
    stats: Tensor
    """float32: (rows × heads × slots × 2) largest score (of base 2) and sum of weights"""


def workspace_slots(splits: Splits, max_context: int) -> int:
    """Results that a row and head may leave: a share each, or a chunk each. None where nothing is shared."""
    if splits.count == 1:
        return 0
    return -(-max_context // splits.chunk) if splits.chunk else splits.count


def workspace_bytes(rows: int, heads: int, head_dim: int, slots: int) -> int:
    """What `make_workspace` takes."""
    return rows * heads * slots * (head_dim + 2) * 4


def make_workspace(rows: int, heads: int, head_dim: int, slots: int, device: torch.device | str) -> Workspace:
    """For spans of at most so many rows. Layers may differ: `heads` × `head_dim` and `heads` of the largest."""
    sizes = rows * heads * slots * head_dim, rows * heads * slots * 2
    return Workspace(*(torch.empty(size, dtype=torch.float32, device=device) for size in sizes))


def choose_splits(num_rows: int, kv_heads: int, max_context: int, multiprocessors: int) -> int:
    """Programs that should share the keys of each of so many decoding rows.

    Enough that the card has FILL programs a multiprocessor, each with MIN_SPLIT keys at least; 1 where the rows alone
    are enough.
    """
    programs = max(1, num_rows * kv_heads)
    wanted = -(-FILL * multiprocessors // programs)
    return max(1, min(wanted, max_context // MIN_SPLIT, MAX_SPLITS))


def query_tile(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, longest: int = MAX_ROWS, chunk: int = 0
) -> int:
    """Queries a tile for a step whose longest span has `longest` tokens.

    Their rows (times the query heads of a KV head) fill a tile of 128 rows, of 64 where the head is wide, of 32 in
    float32, which has no tensor cores; less if no span has so many. With chunks, always the one tile of that mode.
    """
    group = heads // kv_heads
    if chunk:
        return _invariant_rows(group) // group
    rows = INVARIANT_ROWS if dtype == torch.float32 else MAX_ROWS if head_dim <= 128 else MAX_ROWS // 2
    return max(1, min(rows // group, longest))


def span_tiles(lengths: NDArray[np.int64], queries: int) -> NDArray[np.int32]:
    """(tiles, 2) int32: each span's queries in tiles of at most `queries`, those furthest into a span first.

    They see the most keys: a long program that starts last is waited for. Spans of one token keep their order.
    """
    counts = -(-lengths // queries)
    span = np.repeat(np.arange(len(lengths)), counts)
    first = (np.arange(len(span)) - np.repeat(np.cumsum(counts) - counts, counts)) * queries
    order = np.argsort(-first, kind="stable")
    return np.stack([span[order], first[order]], axis=1).astype(np.int32)


@dataclass(frozen=True, slots=True)
class Launch:
    """Constants of `attention_kernel`."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def choose_launch(rows: int, head_dim: int, dtype: torch.dtype, fp8: bool, capability: int) -> Launch:
    """For tiles of `rows` rows; `capability`: 80 for 8.0, 90 for 9.0.

    Small tiles wait for memory: what is on its way must cover its latency, from two or three programs a multiprocessor.
    Large ones have it to themselves, and as many keys at once as fit into the registers. A key's block is looked up
    before the key: Triton gives each of the two half of the stages, so that `num_stages` is 1 + 2 × the tiles of keys
    and values in shared memory.
    """
    block_m = max(16, _power_of_two(rows))
    block_d = max(16, _power_of_two(head_dim))
    if dtype == torch.float32:
        return Launch(block_m, 16, 4 if block_m == 16 else 8, 3)
    small = block_m <= 32
    by_hand = fp8 and capability < 89  # codes pass through many registers
    block_n = 64
    if block_d > 128 or (by_hand and not small):
        block_n = 32
    elif fp8 and not by_hand and block_m == 16:
        block_n = 128
    shared = (160 if capability < 90 else 224) * 1024
    budget = shared // (2 if capability < 90 else 3) if small else shared - 2 * block_m * block_d
    pair = 2 * block_n * block_d * (1 if fp8 else 2)
    stages = 1 + 2 * max(1, min(budget // pair, 3 if small else 2))
    wide = (fp8 and block_n < 128) or block_m * block_d > 32 * 128
    return Launch(block_m, block_n, 8 if wide else 4, stages)


def paged_attention(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out_THD: Tensor,
    spans: Spans,
    block_tables: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    splits: Splits,
    workspace: Workspace,
    capability: int = 80,
) -> None:
    """Writes the attention of the spans' tokens into their places of `out_THD`.

    `q_THD`, `out_THD`: (tokens, heads, head dim), the row stride is free. `k_cache`, `v_cache`: (blocks, KV heads,
    block size, head dim) contiguous, of q's type, or E4M3 with scales (blocks, KV heads, block size) float32: a number
    is code × scale. `block_tables`: (max rows, most blocks) int32.

    Query i of a span is at position contexts - lengths + i, and sees keys up to it, the last `window` of them if there
    is one; nothing else is read. `softcap`: c × tanh(s / c) of the scaled scores. `capability`: of the device, 10 ×
    major + minor. Nothing waits for the device, and a captured graph may be replayed with other numbers in the tensors.
    EngineError where shapes or types do not fit together.
    """
    _, heads, head_dim = q_THD.shape
    _, kv_heads, block_size, _ = k_cache.shape
    group = heads // kv_heads
    fp8 = k_scales is not None
    _check(q_THD, k_cache, v_cache, out_THD, k_scales, v_scales, block_tables)
    rows = _invariant_rows(group) if splits.chunk else spans.queries * group
    if spans.queries * group > rows:
        raise EngineError(f"spans.queries is {spans.queries}; allowed with chunks: 1 … {rows // group}")
    most = block_tables.shape[1] * block_size
    slots = workspace_slots(splits, most)
    num_spans = spans.lengths.shape[0]
    if (
        workspace.partials.numel() < num_spans * heads * slots * head_dim
        or workspace.stats.numel() < num_spans * heads * slots * 2
    ):
        raise EngineError(
            f"the workspace is too small for {num_spans} spans of {heads} heads with {slots} results each"
        )

    launch = choose_launch(rows, head_dim, q_THD.dtype, fp8, capability)
    block_d = max(16, _power_of_two(head_dim))
    # 2 × log2 e × s/c: the exponent of e²ˣ that tanh is made of; its cap is in base 2 as well.
    factor = scale * math.log2(math.e) if softcap is None else 2 * scale * math.log2(math.e) / softcap
    codes = 0 if not fp8 else 1 if capability >= 89 else 2
    keys, values = (k_cache, v_cache) if codes < 2 else (k_cache.view(torch.uint8), v_cache.view(torch.uint8))
    attention_kernel[(kv_heads, spans.tiles.shape[0], splits.count)](
        q_THD, keys, values, out_THD,
        k_scales, v_scales, workspace.partials, workspace.stats,
        spans.starts, spans.lengths, spans.contexts, spans.rows, spans.tiles, block_tables,
        q_THD.stride(0), out_THD.stride(0), block_tables.stride(0),
        spans.queries, splits.count, slots, window or 0, factor, (softcap or 0.0) * math.log2(math.e),
        KV_HEADS=kv_heads, GROUP=group, D=head_dim, BLOCK_SIZE=block_size,
        WINDOW=window is not None, CAP=softcap is not None, FP8=codes, CHUNK=splits.chunk, BODY=launch.block_m >= 64,
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_D=block_d,
        num_warps=launch.num_warps, num_stages=launch.num_stages, enable_fp_fusion=not splits.chunk,
    )  # fmt: skip
    if splits.count > 1:
        combine_kernel[(heads, num_spans)](
            workspace.partials, workspace.stats, out_THD, spans.starts, spans.lengths, spans.contexts,
            out_THD.stride(0), splits.count, slots, window or 0,
            HEADS=heads, D=head_dim, WINDOW=window is not None, CHUNK=splits.chunk,
            BLOCK_S=_power_of_two(splits.count), BLOCK_D=block_d,
            num_warps=4, num_stages=4, enable_fp_fusion=not splits.chunk,
        )  # fmt: skip


def _invariant_rows(group: int) -> int:
    return max(INVARIANT_ROWS, _power_of_two(group))


def _power_of_two(number: int) -> int:
    """The next one up."""
    return 1 << (number - 1).bit_length()


def _check(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out_THD: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    block_tables: Tensor,
) -> None:
    _, heads, head_dim = q_THD.shape
    if k_cache.shape != v_cache.shape or k_cache.shape[3] != head_dim or heads % k_cache.shape[1]:
        raise EngineError(
            f"a cache of {shorten(tuple(k_cache.shape))} and {shorten(tuple(v_cache.shape))} is not for queries of "
            f"{shorten(tuple(q_THD.shape))}"
        )
    for x in (q_THD, out_THD):
        if x.shape != q_THD.shape or x.stride(2) != 1 or (heads > 1 and x.stride(1) != head_dim):
            raise EngineError(f"a token's heads must lie together: {shorten(tuple(x.shape))}, {shorten(x.stride())}")
    if not 1 <= head_dim <= 256 or not 1 <= k_cache.shape[2] <= 256:
        raise EngineError(f"head dim {head_dim}, block size {k_cache.shape[2]}; allowed: 1 … 256 each")
    if (k_scales is None) != (v_scales is None):
        raise EngineError("scales of k or of v alone; needed: both or none")
    for cache, scales in ((k_cache, k_scales), (v_cache, v_scales)):
        wanted = q_THD.dtype if scales is None else torch.float8_e4m3fn
        if cache.dtype != wanted or not cache.is_contiguous():
            raise EngineError(f"a cache of {cache.dtype}; needed: {wanted}, contiguous")
        if scales is not None and (scales.shape != cache.shape[:3] or not scales.is_contiguous()):
            raise EngineError(f"scales of {shorten(tuple(scales.shape))} for a cache of {shorten(tuple(cache.shape))}")
    if block_tables.dtype != torch.int32 or block_tables.stride(1) != 1:
        raise EngineError(f"block tables of {block_tables.dtype}; needed: torch.int32, rows contiguous")
