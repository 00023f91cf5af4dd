"""Rows of paged attention: right in every mix of spans, bits that do not depend on the batch, and its speed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.clock import Run
from benchmarks.gpu_check.rows import Case
from benchmarks.gpu_check.tools import EXACT, TOLERANCES, Pair, elements, fast, few, ints, poisoned, randn, right
from torch import Tensor
from torch.nn import functional

CHUNK = 256
"""Keys, where bits may not depend on the batch."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Spans as (tokens, tokens that the last one sees), and heads."""

    label: str
    spans: Sequence[tuple[int, int]]
    heads: int
    kv_heads: int
    dim: int
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    splits: int = 1
    fp8: bool = False


SMALL = (
    Shape("mixed, GQA, D 20", [(1, 9), (5, 7), (1, 1)], 4, 2, 20, 4),
    Shape("window, cap, splits", [(1, 21), (1, 11)], 2, 1, 16, 5, window=7, softcap=5.0, splits=3),
)
TRUE = (
    Shape("decode 8×1000, MHA", [(1, 1000 + i) for i in range(8)], 32, 32, 128, splits=3),
    Shape("decode 1×8191, GQA 4", [(1, 8191)], 32, 8, 128, splits=16),
    Shape("prefill 2×700, GQA 4", [(700, 700), (513, 1400)], 32, 8, 128),
    Shape("mixed, GQA 8, D 128", [(1, 4000), (257, 300), (1, 17), (64, 2000)], 64, 8, 128),
    Shape("window, softcap, D 256", [(1, 900), (130, 500)], 8, 4, 256, window=200, softcap=50.0),
    Shape("MQA, D 80, blocks of 5", [(3, 77), (1, 301), (40, 40)], 12, 1, 80, 5),
    Shape("D 64, blocks of 8", [(1, 65), (100, 100)], 14, 2, 64, 8, splits=2),
)


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """Tensors of a shape. What no span sees is NaN."""

    q: Tensor
    caches: tuple[Tensor, Tensor]
    keys: list[tuple[Tensor, Tensor]]
    """Of each span, (context, KV heads, D) float64."""
    tables: Tensor
    scales: tuple[Tensor, Tensor] | None


def cases(bench: Bench) -> list[Case]:
    shapes = SMALL if bench.dry else TRUE
    return [
        right(bench, "attention", "decode, prefill, mixed; stale slots NaN", partial(_right, bench, shapes)),
        right(
            bench,
            "attention, fp8 cache",
            "codes and scales",
            partial(_right, bench, [_fp8(one) for one in shapes[1:4]]),
        ),
        right(
            bench,
            "attention, batch-invariant",
            "a row's bits alone, in company, as prefill",
            partial(_bits, bench),
        ),
        *_fast(bench),
    ]


def _fp8(shape: Shape) -> Shape:
    return Shape(shape.label, shape.spans, shape.heads, shape.kv_heads, shape.dim, shape.block_size, fp8=True)


# ---------------------------------------------------------------- right


def scene(bench: Bench, shape: Shape, dtype: torch.dtype) -> Scene:
    counts = [-(-context // shape.block_size) for _, context in shape.spans]
    blocks = sum(counts) + 2
    size = (blocks, shape.kv_heads, shape.block_size, shape.dim)
    order = torch.randperm(blocks).tolist()
    tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    caches = [poisoned(bench, *size, dtype=dtype) for _ in range(2)]
    scales = [poisoned(bench, *size[:3], dtype=torch.float32) for _ in range(2)] if shape.fp8 else None
    if scales is not None:
        caches = [one.to(torch.float8_e4m3fn) for one in caches]
    keys = []
    for row, (count, (_, context)) in enumerate(zip(counts, shape.spans, strict=True)):
        mine = [order.pop() for _ in range(count)]
        tables[row, :count] = torch.tensor(mine, dtype=torch.int32)
        place = torch.arange(context)
        block, offset = torch.tensor(mine)[place // shape.block_size], place % shape.block_size
        known = []
        for index, cache in enumerate(caches):
            values = randn(bench, context, shape.kv_heads, shape.dim, dtype=dtype)
            if scales is not None:
                scale = values.float().abs().amax(-1) / 448
                codes = (values.float() / scale[..., None]).to(torch.float8_e4m3fn)
                scales[index][block, :, offset] = scale
                cache.view(torch.uint8)[block, :, offset] = codes.view(torch.uint8)
                known.append(codes.double() * scale.double()[..., None])
            else:
                cache[block, :, offset] = values
                known.append(values.double())
        keys.append((known[0], known[1]))
    tokens = sum(length for length, _ in shape.spans)
    q = randn(bench, tokens, (shape.heads + 3) * shape.dim, dtype=dtype)[:, : shape.heads * shape.dim]
    pair = None if scales is None else (scales[0], scales[1])
    q = q.unflatten(-1, (shape.heads, shape.dim))
    return Scene(q, (caches[0], caches[1]), keys, tables.to(bench.clock.device), pair)


def _attend(bench: Bench, shape: Shape, given: Scene, chunk: int = 0) -> Tensor:
    """Into a poisoned output."""
    from headrace.backends.torch.kernels import attention as kernels

    lengths = np.array([length for length, _ in shape.spans])
    single = int(lengths.max()) == 1
    queries = 1
    if not single:
        longest = int(lengths.max())
        queries = kernels.query_tile(shape.heads, shape.kv_heads, shape.dim, given.q.dtype, longest, chunk)
    spans = kernels.Spans(
        starts=ints(bench, [int(one) for one in np.cumsum(lengths) - lengths]),
        lengths=ints(bench, [int(one) for one in lengths]),
        contexts=ints(bench, [context for _, context in shape.spans]),
        rows=ints(bench, list(range(len(lengths)))),
        tiles=torch.from_numpy(kernels.span_tiles(lengths, queries)).to(bench.clock.device),
        queries=queries,
    )
    splits = kernels.Splits(shape.splits, chunk)
    slots = kernels.workspace_slots(splits, given.tables.shape[1] * shape.block_size)
    workspace = kernels.make_workspace(len(lengths), shape.heads, shape.dim, slots, bench.clock.device)
    out = poisoned(bench, *given.q.shape, dtype=given.q.dtype)
    k_scales, v_scales = given.scales or (None, None)
    kernels.paged_attention(
        given.q,
        *given.caches,
        out,
        spans,
        given.tables,
        scale=shape.dim**-0.5,
        window=shape.window,
        softcap=shape.softcap,
        k_scales=k_scales,
        v_scales=v_scales,
        splits=splits,
        workspace=workspace,
        capability=capability(bench),
    )
    return out


def capability(bench: Bench) -> int:
    """10 × major + minor."""
    if bench.dry:
        return 90
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _right(bench: Bench, shapes: Sequence[Shape], dtype: torch.dtype) -> Iterator[Pair]:
    for shape in shapes[-2:] if few(bench, dtype) else shapes:
        given = scene(bench, shape, dtype)
        wanted = torch.cat(
            [
                attention_reference(q, keys, values, shape)
                for q, (keys, values) in zip(
                    given.q.double().split([length for length, _ in shape.spans]), given.keys, strict=True
                )
            ]
        )
        yield Pair(shape.label, _attend(bench, shape, given), wanted, 2 * TOLERANCES[dtype])


def attention_reference(q_nHD: Tensor, k_LGD: Tensor, v_LGD: Tensor, shape: Shape) -> Tensor:
    """softmax(q kᵀ ÷ √D) v in float64; the last query sees all keys."""
    count, length = len(q_nHD), len(k_LGD)
    per_head = shape.heads // shape.kv_heads
    k, v = (x.repeat_interleave(per_head, dim=1) for x in (k_LGD, v_LGD))
    scores = torch.einsum("nhd,lhd->hnl", q_nHD, k) * shape.dim**-0.5
    if shape.softcap is not None:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    seen_from = torch.arange(length - count, length, device=q_nHD.device)[:, None]
    places = torch.arange(length, device=q_nHD.device)[None]
    hidden = places > seen_from
    if shape.window is not None:
        hidden |= places <= seen_from - shape.window
    return torch.einsum("hnl,lhd->nhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def _bits(bench: Bench, dtype: torch.dtype) -> Iterator[Pair]:
    """The last query of a prefill and the same one as a decode row, alone and among others: the same bits."""
    length = 70 if bench.dry else 1500
    sizes = (4, 2, 20, 4) if bench.dry else (32, 8, 128, 16)
    chunk = 64 if bench.dry else CHUNK
    others = [(1, 5), (9, 12)] if bench.dry else [(1, 40), (200, 900), (1, 3000)]
    company = Shape("company", [*others, (3, length)], *sizes)
    given = scene(bench, company, dtype)
    together = _attend(bench, company, given, chunk)[-1]
    for label, queries, splits in (("decode, alone", 1, 1), ("decode, split", 1, 4), ("prefill, alone", 3, 1)):
        alone = Shape(label, [(queries, length)], *sizes, splits=splits)
        part = Scene(given.q[-queries:], given.caches, given.keys[-1:], given.tables[-1:], None)
        yield Pair(label, _attend(bench, alone, part, chunk)[-1], together, EXACT)


# ---------------------------------------------------------------- fast


def _fast(bench: Bench) -> list[Case]:
    if bench.dry:
        return [_decode(bench, 2, 20, 4, 2, 16), _prefill(bench, 1, 12, 4, 2, 16)]
    return [
        _decode(bench, 1, 4096, 32, 32),
        _decode(bench, 64, 1024, 32, 32),
        _decode(bench, 1, 32768, 32, 8),
        _decode(bench, 64, 2048, 32, 8),
        _prefill(bench, 8, 2048, 32, 32),
        _prefill(bench, 1, 8192, 32, 8),
    ]


def _decode(bench: Bench, rows: int, context: int, heads: int, kv_heads: int, dim: int = 128) -> Case:
    dtype = torch.float32 if bench.dry else torch.bfloat16
    nbytes = elements(dtype, 2 * rows * context * kv_heads * dim)

    def make() -> Run:
        from headrace.backends.torch.kernels.attention import choose_splits

        units = 1 if bench.dry else torch.cuda.get_device_properties(0).multi_processor_count
        splits = choose_splits(rows, kv_heads, context, units)
        shape = Shape("", [(1, context)] * rows, heads, kv_heads, dim, splits=splits)
        return _launcher(bench, shape, dtype)

    return fast(
        bench,
        f"attention, decode {rows} × {context}, {heads}/{kv_heads} heads",
        "keys and values once",
        make,
        nbytes=nbytes,
        share=0.85,
        others=_libraries(bench, rows, 1, context, heads, kv_heads, dim, dtype),
    )


def _prefill(bench: Bench, rows: int, length: int, heads: int, kv_heads: int, dim: int = 128) -> Case:
    dtype = torch.float32 if bench.dry else torch.bfloat16
    return fast(
        bench,
        f"attention, prefill {rows} × {length}, {heads}/{kv_heads} heads",
        "causal; half of all scores",
        lambda: _launcher(bench, Shape("", [(length, length)] * rows, heads, kv_heads, dim), dtype),
        nbytes=elements(dtype, 2 * rows * length * (heads + kv_heads) * dim),
        flops=2.0 * rows * length * (length + 1) * heads * dim,
        others=_libraries(bench, rows, length, length, heads, kv_heads, dim, dtype),
    )


def _launcher(bench: Bench, shape: Shape, dtype: torch.dtype) -> Run:
    """A call whose tensors are there already, on a full cache of random numbers."""
    from headrace.backends.torch.kernels import attention as kernels

    device, rows = bench.clock.device, len(shape.spans)
    lengths = np.array([length for length, _ in shape.spans])
    context = shape.spans[0][1]
    each = -(-context // shape.block_size)
    q = randn(bench, int(lengths.sum()), shape.heads, shape.dim, dtype=dtype)
    k, v = (randn(bench, rows * each, shape.kv_heads, shape.block_size, shape.dim, dtype=dtype) for _ in range(2))
    tables = torch.randperm(rows * each, device=device).to(torch.int32).view(rows, each)
    single = int(lengths.max()) == 1
    longest = int(lengths.max())
    queries = 1 if single else kernels.query_tile(shape.heads, shape.kv_heads, shape.dim, dtype, longest)
    spans = kernels.Spans(
        starts=ints(bench, [int(one) for one in np.cumsum(lengths) - lengths]),
        lengths=ints(bench, [int(one) for one in lengths]),
        contexts=ints(bench, [context] * rows),
        rows=ints(bench, list(range(rows))),
        tiles=torch.from_numpy(kernels.span_tiles(lengths, queries)).to(device),
        queries=queries,
    )
    splits = kernels.Splits(shape.splits)
    slots = kernels.workspace_slots(splits, each * shape.block_size)
    workspace = kernels.make_workspace(rows, shape.heads, shape.dim, slots, device)
    out, known, scale = torch.empty_like(q), capability(bench), shape.dim**-0.5

    def run() -> None:
        kernels.paged_attention(
            q, k, v, out, spans, tables, scale=scale, splits=splits, workspace=workspace, capability=known
        )

    return run


def _libraries(
    bench: Bench, rows: int, queries: int, context: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> Mapping[str, Callable[[], Run]]:
    """On contiguous keys and values, which is less work than a paged cache."""

    def tensors() -> tuple[Tensor, Tensor, Tensor]:
        """(rows, tokens, heads, D)"""
        q = randn(bench, rows, queries, heads, dim, dtype=dtype)
        k, v = (randn(bench, rows, context, kv_heads, dim, dtype=dtype) for _ in range(2))
        return q, k, v

    def sdpa() -> Run:
        q, k, v = (x.transpose(1, 2).contiguous() for x in tensors())
        causal = queries > 1
        return lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=heads != kv_heads)

    def flash() -> Run:
        from flash_attn import flash_attn_func, flash_attn_with_kvcache

        q, k, v = tensors()
        if queries == 1:
            return lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=context, causal=True)
        return lambda: flash_attn_func(q, k, v, causal=True)

    def flashinfer() -> Run:
        import flashinfer

        q, k, v = (x[0] for x in tensors())
        if queries == 1:
            return lambda: flashinfer.single_decode_with_kv_cache(q[0], k, v)
        return lambda: flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True)

    found: dict[str, Callable[[], Run]] = {"SDPA": sdpa}
    if importlib.util.find_spec("flash_attn") is not None:
        found["flash_attn"] = flash
    if rows == 1 and importlib.util.find_spec("flashinfer") is not None:
        found["FlashInfer"] = flashinfer
    return found
