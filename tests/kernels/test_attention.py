"""Paged attention against softmax(q kᵀ scale) v in float64 over gathered keys and values.

Whatever no query may see is NaN: stale slots, foreign blocks, unused entries of block tables, tokens between spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.backends.torch.kernels import attention
from headrace.backends.torch.kernels.attention import Spans, Splits, paged_attention
from headrace.core.errors import EngineError

NAN = float("nan")
E4M3 = torch.float8_e4m3fn
ONE = Splits()


@dataclass(frozen=True, slots=True)
class Shape:
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    fp8: bool = False
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """All tokens of a sequence."""

    q: Tensor
    k: Tensor
    v: Tensor


def sequence(shape: Shape, length: int, seed: int = 0) -> Row:
    generator = torch.Generator().manual_seed(seed)

    def random(heads: int) -> Tensor:
        return torch.randn(length, heads, shape.head_dim, generator=generator).to(shape.dtype)

    # A few keys and values stand out, so that the running maximum moves.
    row = Row(random(shape.heads) * 2, random(shape.kv_heads), random(shape.kv_heads))
    row.k[:: max(1, length // 3)] *= 3
    return row


def coded(x_THD: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes, a scale for each token and head."""
    scales = x_THD.float().abs().amax(-1, keepdim=True) / 448
    return (x_THD.float() / scales).to(E4M3), scales[..., 0]


def expected(shape: Shape, row: Row) -> Tensor:
    """(T, heads, D) float64, of every token of the sequence."""
    q, k, v = row.q.double(), row.k.double(), row.v.double()
    if shape.fp8:
        k, v = (codes.double() * scales.double()[..., None] for codes, scales in (coded(row.k), coded(row.v)))
    k, v = (x.repeat_interleave(shape.heads // shape.kv_heads, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * shape.head_dim**-0.5
    if shape.softcap is not None:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    i = torch.arange(len(q))
    hidden = i[None, :] > i[:, None]
    if shape.window is not None:
        hidden |= i[None, :] <= i[:, None] - shape.window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """A cache in which some rows' keys and values lie, all else NaN."""

    k: Tensor
    v: Tensor
    k_scales: Tensor | None
    v_scales: Tensor | None
    tables: Tensor


def pool(shape: Shape, rows: Sequence[Row], contexts: Sequence[int], seed: int = 0) -> Pool:
    """The first `contexts` tokens of each row."""
    rng = np.random.default_rng(seed)
    size = shape.block_size
    counts = [-(-context // size) for context in contexts]
    blocks = sum(counts) + 2
    caches = [torch.full((blocks, shape.kv_heads, size, shape.head_dim), NAN).to(shape.dtype) for _ in "kv"]
    scales = [torch.full((blocks, shape.kv_heads, size), NAN) for _ in "kv"]
    if shape.fp8:
        caches = [cache.to(E4M3) for cache in caches]
    ids = rng.permutation(blocks - 1)
    # Unused entries name a block that is NaN; the stride of a row is not its width.
    tables = torch.full((len(rows) + 1, max(counts) + 3), blocks - 1, dtype=torch.int32)[:, :-1]
    for index, (row, context, count) in enumerate(zip(rows, contexts, counts, strict=True)):
        own, ids = ids[:count], ids[count:]
        tables[index, :count] = torch.from_numpy(own)
        at = torch.arange(context)
        block, slot = torch.from_numpy(own)[at // size], at % size
        for cache, scale, x in zip(caches, scales, (row.k, row.v), strict=True):
            if shape.fp8:
                codes, scale[block, :, slot] = coded(x[:context])
                cache.view(torch.uint8)[block, :, slot] = codes.view(torch.uint8)
            else:
                cache[block, :, slot] = x[:context]
    return Pool(caches[0], caches[1], *(scales if shape.fp8 else (None, None)), tables)


def attend(
    shape: Shape,
    rows: Sequence[Row],
    cuts: Sequence[tuple[int, int]],
    splits: Splits = ONE,
    padding: int = 0,
    capability: int = 80,
) -> list[Tensor]:
    """The attention of span i: tokens [first, stop) = cuts[i] of rows[i]. Spans lie apart, in NaN that must stay."""
    known = pool(shape, rows, [stop for _, stop in cuts])
    lengths = np.array([stop - first for first, stop in cuts] + [0] * padding)
    starts = np.cumsum(lengths + 1) - lengths
    width = shape.heads * shape.head_dim
    fused = torch.full((int(lengths.sum()) + len(lengths) + 1, width + 5 * shape.head_dim), NAN).to(shape.dtype)
    q = fused[:, :width].view(-1, shape.heads, shape.head_dim)
    for row, (first, stop), start in zip(rows, cuts, starts, strict=False):
        q[start : start + stop - first] = row.q[first:stop]
    out = torch.full((len(q), shape.heads + 1, shape.head_dim), NAN).to(shape.dtype)
    queries = attention.query_tile(
        shape.heads, shape.kv_heads, shape.head_dim, shape.dtype, int(lengths.max()), splits.chunk
    )
    contexts = [stop for _, stop in cuts] + [0] * padding
    tiles = attention.span_tiles(lengths, queries)
    # As in a graph: tiles of the padding too.
    tiles = np.concatenate([tiles, [(len(cuts) + i, 0) for i in range(padding)]]) if padding else tiles
    spans = Spans(
        *(torch.tensor(np.array(x), dtype=torch.int32) for x in (starts, lengths, contexts)),
        rows=torch.tensor([*range(len(rows)), *[len(rows)] * padding], dtype=torch.int32),
        tiles=torch.from_numpy(tiles.astype(np.int32)),
        queries=queries,
    )
    slots = attention.workspace_slots(splits, known.tables.shape[1] * shape.block_size)
    workspace = attention.make_workspace(len(lengths), shape.heads, shape.head_dim, slots, "cpu")
    workspace.partials.fill_(NAN)
    workspace.stats.fill_(NAN)
    paged_attention(
        q, known.k, known.v, out[:, :-1], spans, known.tables,
        scale=shape.head_dim**-0.5, window=shape.window, softcap=shape.softcap,
        k_scales=known.k_scales, v_scales=known.v_scales, splits=splits, workspace=workspace, capability=capability,
    )  # fmt: skip
    found = [out[start : start + length, :-1].clone() for start, length in zip(starts, lengths, strict=True)]
    for start, length in zip(starts, lengths, strict=True):
        out[start : start + length, :-1] = NAN
    assert bool(out.isnan().all()), "written beyond the spans"
    return found[: len(cuts)]


def one_span(context: int) -> Spans:
    """Of one token."""
    starts, lengths, contexts, rows = (torch.tensor([x], dtype=torch.int32) for x in (0, 1, context, 0))
    return Spans(starts, lengths, contexts, rows, torch.zeros(1, 2, dtype=torch.int32), 1)


def check(shape: Shape, cuts: Sequence[tuple[int, int]], splits: Splits = ONE, **how: int) -> None:
    rows = [sequence(shape, stop, seed) for seed, (_, stop) in enumerate(cuts)]
    # The largest value is 12 at most; weights and values in the compute type, each rounded once.
    bound = 2e-5 if shape.dtype == torch.float32 else 12 * 2**-10
    for found, row, (first, stop) in zip(attend(shape, rows, cuts, splits, **how), rows, cuts, strict=True):
        torch.testing.assert_close(found.double(), expected(shape, row)[first:stop], rtol=0, atol=bound)


DECODE = [(0, 1), (40, 41), (15, 16)]
MIXED = [(0, 40), (33, 34), (50, 58), (0, 1), (75, 77)]


@pytest.mark.parametrize(
    ("shape", "cuts"),
    [
        (Shape(), DECODE),
        (Shape(), MIXED),
        (Shape(4, 4, 10, 5), MIXED[1:]),
        (Shape(3, 1, 6, 8), MIXED[1:]),
        (Shape(8, 1, 80, 16), [(60, 65), (8, 9)]),
        (Shape(4, 2, 1, 1), [(2, 8), (8, 9)]),
        (Shape(6, 2, 64, 48, torch.float16), [(0, 75), (66, 67)]),
        (Shape(8, 1, 16, 16, torch.float16), [(100, 133), (66, 67)]),
        (Shape(4, 2, 16, 16, window=20), MIXED),
        (Shape(4, 1, 16, 16, torch.float16, window=70), [(140, 205), (90, 91), (0, 80)]),
        (Shape(2, 2, 8, 5, torch.float16, window=1), [(0, 70), (66, 67)]),
        (Shape(4, 2, 16, 16, softcap=3.0), MIXED[1:]),
        (Shape(4, 2, 24, 16, torch.float16, window=30, softcap=5.0), [(60, 140), (66, 67)]),
        (Shape(1, 1, 160, 16, torch.float16), [(60, 70)]),
    ],
)
def test_equals_the_reference(shape: Shape, cuts: list[tuple[int, int]]) -> None:
    check(shape, cuts)


@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_shares_of_the_keys(count: int, window: int | None) -> None:
    """More shares than keys, shares without a key, and longer spans beside them, which are not shared."""
    check(Shape(window=window), [(100, 101), (0, 1), (44, 49), (63, 64)], Splits(count))


def test_shares_in_16_bits() -> None:
    check(Shape(8, 1, 32, 16, torch.float16), [(199, 200), (63, 64)], Splits(3))


def test_padding_is_neither_read_nor_written() -> None:
    check(Shape(), DECODE, padding=3)
    check(Shape(), DECODE, Splits(2), padding=2)
    check(Shape(), DECODE, Splits(2, 64), padding=2)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_cache_of_8_bits(dtype: torch.dtype, capability: int) -> None:
    check(Shape(4, 2, 16, 16, dtype, fp8=True), [(80, 99), (0, 1), (66, 67)], Splits(2), capability=capability)


@pytest.mark.parametrize("capability", [80, 90])
def test_every_code(capability: int) -> None:
    """One key a row: its value comes out as it is, NaN too."""
    numbers = torch.arange(256, dtype=torch.uint8).view(E4M3)
    spans = Spans(
        *(torch.tensor([x], dtype=torch.int32) for x in (0, 1, 1, 0)), torch.zeros(1, 2, dtype=torch.int32), 1
    )
    out = torch.full((1, 1, 256), NAN)
    paged_attention(
        torch.ones(1, 1, 256), torch.zeros(1, 1, 1, 256).to(E4M3), numbers.view(1, 1, 1, 256), out, spans,
        torch.zeros(1, 1, dtype=torch.int32), scale=1.0,
        k_scales=torch.ones(1, 1, 1), v_scales=torch.full((1, 1, 1), 2.0),
        splits=ONE, workspace=attention.make_workspace(1, 1, 256, 0, "cpu"), capability=capability,
    )  # fmt: skip
    # The interpreter takes the type's own NaN for 480.
    told = numbers.float().isfinite() | (capability < 89)
    torch.testing.assert_close(out[0, 0][told], numbers.float()[told] * 2, rtol=0, atol=0, equal_nan=True)


def test_a_value_that_is_no_number_shows() -> None:
    rows = [sequence(Shape(), 40, seed) for seed in range(2)]
    rows[0].v[30] = NAN
    found = attend(Shape(), rows, [(39, 40)] * 2)
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1].double(), expected(Shape(), rows[1])[39:], rtol=0, atol=2e-5)


# ---------------------------------------------------------------- batch invariance


@pytest.mark.parametrize(
    "shape",
    [
        Shape(2, 1),
        Shape(4, 1, 10, 5, torch.float16, window=60),
        Shape(1, 1, 16, 16, torch.float16, fp8=True, softcap=4.0),
    ],
)
def test_bits_do_not_depend_on_the_batch(shape: Shape, ordered: None) -> None:
    """With chunks, a query has one answer: as prefill, in any cut of it, decoded, shared by any number, in company."""
    length = 133
    row, other = sequence(shape, length), sequence(shape, 90, 1)
    whole = attend(shape, [row], [(0, length)], Splits(1, 64))[0]
    torch.testing.assert_close(whole.double(), expected(shape, row), rtol=0, atol=12 * 2**-10)
    cuts = [(0, 70), (70, 71), (71, length)]
    assert torch.equal(torch.cat(attend(shape, [row] * 3, cuts, Splits(1, 64))), whole)
    singles = [(0, 1), (63, 64), (70, 71), (128, 129), (132, 133)]
    for count in (1, 3):
        for found, (first, stop) in zip(attend(shape, [row] * 5, singles, Splits(count, 64)), singles, strict=True):
            assert torch.equal(found, whole[first:stop]), (count, first)
    company = attend(shape, [other, row, other], [(85, 90), (130, 131), (3, 4)], Splits(2, 64))
    assert torch.equal(company[1], whole[130:131])


# ---------------------------------------------------------------- any mix of spans


@settings(max_examples=6, deadline=None)
@given(
    cuts=st.lists(
        st.tuples(st.integers(0, 70), st.sampled_from([1, 1, 1, 2, 7, 20])).map(lambda x: (x[0], x[0] + x[1])),
        min_size=1,
        max_size=3,
    ),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)]),
    head_dim=st.sampled_from([6, 16, 20]),
    block_size=st.sampled_from([5, 8, 16, 33]),
    window=st.sampled_from([None, 1, 9, 64]),
    splits=st.sampled_from([Splits(), Splits(2), Splits(3), Splits(1, 64), Splits(2, 64)]),
)
def test_any_mix(
    cuts: list[tuple[int, int]],
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    window: int | None,
    splits: Splits,
) -> None:
    check(Shape(*heads, head_dim, block_size, window=window), cuts, splits)


# ---------------------------------------------------------------- what the host chooses


@settings(max_examples=50)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 1), st.integers(0, 300)), min_size=1, max_size=8),
    queries=st.integers(1, 128),
)
def test_tiles_cover_each_query_once(lengths: list[int], queries: int) -> None:
    tiles = attention.span_tiles(np.array(lengths), queries)
    assert tiles.dtype == np.int32
    found = sorted((span, i) for span, first in tiles for i in range(first, min(first + queries, lengths[span])))
    assert found == [(span, i) for span, length in enumerate(lengths) for i in range(length)]
    assert len(tiles) == sum(-(-length // queries) for length in lengths)
    assert (np.diff(tiles[:, 1]) <= 0).all()


def test_tiles_of_decode_are_in_order() -> None:
    assert attention.span_tiles(np.ones(5, np.int64), 1).tolist() == [[i, 0] for i in range(5)]


@pytest.mark.parametrize(
    ("rows", "kv_heads", "context", "expected_count"),
    [(1, 32, 200, 1), (1, 32, 4096, 16), (1, 8, 1 << 17, 64), (4, 32, 4096, 5), (16, 32, 4096, 2), (17, 32, 4096, 1)],
)
def test_shares_fill_the_card(rows: int, kv_heads: int, context: int, expected_count: int) -> None:
    assert attention.choose_splits(rows, kv_heads, context, 132) == expected_count


@given(rows=st.integers(1, 512), kv_heads=st.integers(1, 64), context=st.integers(1, 1 << 20), card=st.integers(1, 200))
def test_shares_are_worth_it(rows: int, kv_heads: int, context: int, card: int) -> None:
    count = attention.choose_splits(rows, kv_heads, context, card)
    assert 1 <= count <= attention.MAX_SPLITS
    assert count == 1 or context >= count * attention.MIN_SPLIT
    assert count == 1 or (count - 1) * rows * kv_heads < attention.FILL * card


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_fit_into_shared_memory(dtype: torch.dtype, fp8: bool, capability: int) -> None:
    for heads, kv_heads, dim in [(32, 32, 128), (32, 8, 128), (64, 8, 128), (71, 1, 64), (8, 4, 256), (28, 4, 80)]:
        tile = attention.query_tile(heads, kv_heads, dim, dtype)
        assert attention.query_tile(heads, kv_heads, dim, dtype, 5) == min(5, tile)
        for queries in (1, 5, tile):
            if queries > tile:
                continue
            launch = attention.choose_launch(queries * heads // kv_heads, dim, dtype, fp8, capability)
            assert queries * heads // kv_heads <= launch.block_m <= 128
            padded = 1 << (dim - 1).bit_length()
            kept = 2 * launch.block_n * padded * (1 if fp8 else dtype.itemsize) * (launch.num_stages // 2)
            assert kept + launch.block_m * padded * dtype.itemsize <= (163 if capability == 80 else 227) * 1024
        assert attention.query_tile(heads, kv_heads, dim, dtype, 7, 512) == max(1, 32 * kv_heads // heads)


def test_workspace_sizes() -> None:
    assert attention.workspace_slots(Splits(1, 512), 5000) == 0
    assert attention.workspace_slots(Splits(7), 5000) == 7
    assert attention.workspace_slots(Splits(3, 512), 5000) == 10
    made = attention.make_workspace(3, 4, 16, 5, "cpu")
    assert made.partials.nbytes + made.stats.nbytes == attention.workspace_bytes(3, 4, 16, 5)


# ---------------------------------------------------------------- what is refused


def refused(shape: Shape = Shape(), **other: object) -> str:
    known = pool(shape, [sequence(shape, 4)], [4])
    given = {
        "q_THD": torch.zeros(1, shape.heads, shape.head_dim, dtype=shape.dtype),
        "out_THD": torch.zeros(1, shape.heads, shape.head_dim, dtype=shape.dtype),
        "k_cache": known.k,
        "v_cache": known.v,
        "spans": one_span(4),
        "block_tables": known.tables,
        "splits": ONE,
        "workspace": attention.make_workspace(1, 0, 0, 0, "cpu"),
    } | other
    with pytest.raises(EngineError) as error:
        paged_attention(**given, scale=1.0)  # type: ignore[arg-type]
    return str(error.value)


def test_refuses_what_does_not_fit() -> None:
    assert "workspace" in refused(splits=Splits(2))
    assert "not for queries" in refused(q_THD=torch.zeros(1, 4, 8))
    assert "not for queries" in refused(q_THD=torch.zeros(1, 3, 16))
    assert "lie together" in refused(out_THD=torch.zeros(1, 4, 32)[..., ::2])
    assert "lie together" in refused(out_THD=torch.zeros(2, 4, 16))
    assert "head dim 300" in refused(Shape(head_dim=300))
    assert "float16" in refused(k_cache=torch.zeros(3, 2, 16, 16, dtype=torch.float16))
    assert "contiguous" in refused(k_cache=torch.zeros(3, 2, 16, 32)[..., :16])
    assert "float8" in refused(k_scales=torch.zeros(3, 2, 16), v_scales=torch.zeros(3, 2, 16))
    coded_shape = Shape(fp8=True)
    known = pool(coded_shape, [sequence(coded_shape, 4)], [4])
    assert "both or none" in refused(coded_shape, k_scales=known.k_scales)
    assert "scales of" in refused(coded_shape, k_scales=torch.zeros(1), v_scales=known.v_scales)
    assert "int64" in refused(block_tables=torch.zeros(1, 1, dtype=torch.int64))
    assert "1 … 16" in refused(spans=replace(one_span(4), queries=17), splits=Splits(1, 64))
    for bad in ((0, 0), (65, 0), (1, 63), (1, -64)):
        with pytest.raises(EngineError, match="allowed"):
            replace(ONE, count=bad[0], chunk=bad[1])
