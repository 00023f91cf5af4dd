"""Native attention, rotary embedding and KV store against float64, and batch invariance bit for bit.

Every instruction set that this machine can run is tested. T: tokens, H: query heads, G: KV heads, D: head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.backends.native import _kernels as kernels
from tests.unit.attention_oracle import (
    F32,
    F64,
    NO_ANGLES,
    Cache,
    KvType,
    Norm,
    attention,
    normed,
    rotated,
    same_bits,
    to_bf16,
    to_i8,
)

SETS: list[str] = kernels.instruction_sets()
every_set = pytest.mark.parametrize("isa", SETS)
seeds = st.integers(0, 2**32 - 1)


def normal(rng: np.random.Generator, *shape: int) -> F32:
    return rng.standard_normal(shape).astype(np.float32)


# ---------------------------------------------------------------- norms, rotation, storing


@dataclass(frozen=True)
class Turn:
    kv_type: KvType
    heads: int
    kv_heads: int
    head_dim: int
    pairs: int
    interleaved: bool
    q_norm: str
    k_norm: str
    block_size: int
    tokens: int
    gap: int
    """Columns of q, k and v that belong to nobody."""
    magnitude: float
    seed: int


@st.composite
def turns(draw: st.DrawFn) -> Turn:
    head_dim = draw(st.sampled_from([1, 2, 6, 16, 20, 33, 64, 80, 128]))
    norms = st.sampled_from(["none", "rms", "layer", "layer and bias"])
    return Turn(
        kv_type=draw(st.sampled_from(["f32", "bf16", "i8"])),
        heads=draw(st.integers(1, 5)),
        kv_heads=draw(st.integers(1, 3)),
        head_dim=head_dim,
        pairs=draw(st.sampled_from([0, head_dim // 4, head_dim // 2])),
        interleaved=draw(st.booleans()),
        q_norm=draw(norms),
        k_norm=draw(norms),
        block_size=draw(st.sampled_from([1, 3, 16, 20, 32])),
        tokens=draw(st.integers(1, 9)),
        gap=draw(st.sampled_from([0, 5])),
        magnitude=draw(st.sampled_from([1e-3, 1.0, 1e4])),
        seed=draw(seeds),
    )


def drawn_norm(rng: np.random.Generator, kind: str, dim: int) -> Norm | None:
    if kind == "none":
        return None
    bias = normal(rng, dim) if kind == "layer and bias" else None
    return Norm(1 + normal(rng, dim) / 4, bias, 1e-5, kind != "rms")


@every_set
@given(turn=turns())
@settings(deadline=None, max_examples=80)
def test_queries_and_keys_turn_and_keys_and_values_are_stored(isa: str, turn: Turn) -> None:
    rng = np.random.default_rng(turn.seed)
    tokens, dim = turn.tokens, turn.head_dim
    flat = [
        normal(rng, tokens, count * dim + turn.gap) * np.float32(turn.magnitude)
        for count in (turn.heads, turn.kv_heads, turn.kv_heads)
    ]
    before = [x.copy() for x in flat]
    q, k, v = (x[:, : x.shape[1] - turn.gap].reshape(tokens, -1, dim) for x in before)
    norms = [drawn_norm(rng, kind, dim) for kind in (turn.q_norm, turn.k_norm)]
    angles = rng.uniform(0, 6.3, (40, turn.pairs))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    positions = rng.integers(0, 40, tokens).astype(np.int32)
    cache = Cache(turn.kv_type, turn.kv_heads, dim, turn.block_size, -(-20 // turn.block_size))
    slots = rng.permutation(cache.num_blocks * turn.block_size)[:tokens]
    kernels.rotate_and_store(
        isa, cache.native, *flat, turn.heads, *(norm and norm.native for norm in norms), cos, sin, turn.interleaved,
        positions, slots,
    )  # fmt: skip

    for now, x, norm in ((flat[0], q, norms[0]), (flat[1], k, norms[1])):
        wanted = rotated(normed(x, norm), cos[positions], sin[positions], turn.interleaved)
        got = now[:, : now.shape[1] - turn.gap].reshape(x.shape)
        # A LayerNorm of one or two numbers that are nearly equal subtracts nearly all of them.
        tolerance = 1e-5 if norm is None or not norm.layer else 1e-5 * max(1.0, spread(x))
        assert np.abs(got - wanted).max() <= tolerance * np.abs(wanted).max()
    for now, x in zip(flat, before, strict=True):
        assert same_bits(now[:, x.shape[1] - turn.gap :], x[:, x.shape[1] - turn.gap :])
    assert same_bits(flat[2], before[2])
    assert_stored(cache, slots, flat[1][:, : k[0].size].reshape(k.shape), v)


def spread(x_THD: F32) -> float:
    """How many times larger than its deviation a head's mean is, at worst."""
    x = x_THD.astype(np.float64)
    return float((np.abs(x).max(-1) / (x.std(-1) + 1e-3)).max())


def assert_stored(cache: Cache, slots: NDArray[np.int64], k_TGD: F32, v_TGD: F32) -> None:
    dim = cache.head_dim
    for slot, k_GD, v_GD in zip(slots.tolist(), k_TGD, v_TGD, strict=True):
        keys, values, key_scales, value_scales = cache.stored(slot)
        assert not values[:, dim:].any()
        for stored, scales, x_GD in ((keys, key_scales, k_GD), (values[:, :dim], value_scales, v_GD)):
            if cache.type == "i8":
                codes, wanted_scales = to_i8(x_GD)
                assert (stored == codes).all() and same_bits(scales, wanted_scales)
            elif cache.type == "bf16":
                assert (stored == to_bf16(x_GD)).all()
            else:
                assert same_bits(stored, x_GD)


HARD_ROWS = [
    [0.0, 0.0, 0.0],
    [1e-45, -1e-44, 0.0],
    [2.0**-126 * 127, 1e-37, -1e-38],
    [2.0**-126 * 126, 1e-37, 0.0],
    [3.4e38, -3.4e38, 1e38],
    [127.0, 0.5, 1.5],
    [1.0, 1.00390625, 1.01171875],  # ties of bf16
    [np.nan, 1.0, 2.0],
    [np.inf, 1.0, 2.0],
    [1.0, -np.inf, np.nan],
    [np.finfo(np.float32).max, 1.0, 1.0],  # infinite as bf16
]


@every_set
@pytest.mark.parametrize("kv_type", ["f32", "bf16", "i8"])
def test_hard_numbers_are_stored_as_specified(isa: str, kv_type: KvType) -> None:
    rows = np.array(HARD_ROWS, np.float32)[:, None]
    cache = Cache(kv_type, 1, 3, 16, 1)
    slots = np.arange(len(rows))
    cache.write(isa, slots.tolist(), rows, rows[::-1])
    assert_stored(cache, slots, rows, rows[::-1])


# ---------------------------------------------------------------- attention: a step


@dataclass(frozen=True)
class Shape:
    """What a layer and its cache look like."""

    kv_type: KvType
    kv_heads: int
    per_head: int
    head_dim: int
    block_size: int
    window: int
    softcap: float

    @property
    def heads(self) -> int:
        return self.kv_heads * self.per_head


@dataclass(frozen=True, eq=False)
class Row:
    """A request: what its tokens ask (T, H, D), and what they offer (T, G, D)."""

    q: F32
    """(T, H, D)"""
    k: F32
    """(T, G, D)"""
    v: F32


shapes = st.builds(
    Shape,
    kv_type=st.sampled_from(["f32", "bf16", "i8"]),
    kv_heads=st.integers(1, 3),
    per_head=st.sampled_from([1, 2, 3, 4, 5, 7, 8]),
    head_dim=st.sampled_from([1, 3, 16, 24, 40, 64, 80]),
    block_size=st.sampled_from([1, 5, 16, 24, 32, 64, 100, 256]),
    window=st.sampled_from([0, 0, 1, 17, 64, 100]),
    softcap=st.sampled_from([0.0, 0.0, 5.0, 50.0]),
)
contexts = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 129, 200, 300]))
"""Mostly short; about the edges of chunks and segments; over several of these."""


def drawn_row(rng: np.random.Generator, shape: Shape, tokens: int) -> Row:
    kv = (tokens, shape.kv_heads, shape.head_dim)
    return Row(normal(rng, tokens, shape.heads, shape.head_dim), normal(rng, *kv), normal(rng, *kv))


def scale_of(shape: Shape) -> float:
    return float(np.float32(shape.head_dim**-0.5))


@dataclass
class Step:
    """Rows in one cache, and attention of some spans of them."""

    isa: str
    shape: Shape
    rows: Sequence[Row]
    rng: np.random.Generator

    def __post_init__(self) -> None:
        size = self.shape.block_size
        counts = [-(-len(row.q) // size) for row in self.rows]
        self.cache = Cache(self.shape.kv_type, self.shape.kv_heads, self.shape.head_dim, size, sum(counts) + 2)
        blocks = self.rng.permutation(sum(counts) + 2)
        self.tables = [blocks[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(len(counts))]
        for i, row in enumerate(self.rows):
            slots = [self.slot(i, position) for position in range(len(row.q))]
            self.cache.write(self.isa, slots, row.k, row.v)

    def slot(self, row: int, position: int) -> int:
        return int(self.tables[row][position // self.shape.block_size]) * self.shape.block_size + (
            position % self.shape.block_size
        )

    def attend(self, spans: Sequence[tuple[int, int, int]], threads: int = 1, seed: int = 0) -> list[F32]:
        """The answers (length, H, D) to each span: row, first position, length."""
        shape, width = self.shape, self.shape.heads * self.shape.head_dim
        order = self.rng.permutation(len(spans))  # of their places among the step's tokens
        starts = np.zeros(len(spans), np.int64)
        starts[order] = np.cumsum([0, *(spans[i][2] for i in order)])[:-1]
        q = np.full((sum(length for _, _, length in spans), width + 3), np.nan, np.float32)
        out = np.full((len(q), width + 1), 7.0, np.float32)
        tables = np.zeros((len(spans), max(len(table) for table in self.tables)), np.int32)
        for i, (row, first, length) in enumerate(spans):
            q[starts[i] : starts[i] + length, :width] = self.rows[row].q[first : first + length].reshape(length, -1)
            tables[i, : len(self.tables[row])] = self.tables[row]
        numbers = [(start, length, first + length) for start, (_, first, length) in zip(starts, spans, strict=True)]
        kernels.attend(
            self.isa, self.cache.native, q, out, shape.heads, scale_of(shape), shape.softcap, shape.window,
            np.array(numbers, np.int32), tables, threads, seed,
        )  # fmt: skip
        assert (out[:, width] == 7.0).all()
        parts = (out[start : start + length, :width] for start, length, _ in numbers)
        return [part.reshape(len(part), shape.heads, shape.head_dim) for part in parts]

    def wanted(self, row: int, position: int) -> tuple[F64, float]:
        """By the oracle, from what is stored; and how large a value is at most."""
        first = max(0, position - self.shape.window + 1) if self.shape.window else 0
        read = [self.cache.read(self.slot(row, i)) for i in range(first, position + 1)]
        keys, values = (np.stack(part) for part in zip(*read, strict=True))
        out = attention(self.rows[row].q[position], keys, values, scale_of(self.shape), self.shape.softcap)
        return out, float(np.abs(values).max())


@every_set
@given(shape=shapes, sizes=st.lists(contexts, min_size=1, max_size=3), seed=seeds)
@settings(deadline=None, max_examples=60)
def test_attention_agrees_with_float64(isa: str, shape: Shape, sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    step = Step(isa, shape, [drawn_row(rng, shape, size) for size in sizes], rng)
    spans = []
    for row, size in enumerate(sizes):
        length = int(rng.integers(1, size + 1))
        spans.append((row, size - length, length))
    for (row, first, length), answers in zip(spans, step.attend(spans), strict=True):
        for i in sorted({0, length // 2, length - 1}):
            wanted, largest = step.wanted(row, first + i)
            assert np.abs(answers[i] - wanted).max() <= 1e-5 * largest


@every_set
@pytest.mark.parametrize("kv_type", ["f32", "bf16", "i8"])
def test_scores_far_apart_leave_the_largest(isa: str, kv_type: KvType) -> None:
    """Weights too small for float32 must neither vanish into NaN nor count."""
    shape = Shape(kv_type, 1, 2, 16, 16, 0, 0.0)
    rng = np.random.default_rng(1)
    row = drawn_row(rng, shape, 150)
    row = replace(row, q=np.abs(row.q) + 1, k=row.k - 400)
    row.k[70] = 400.0
    step = Step(isa, shape, [row], rng)
    answer = step.attend([(0, 149, 1)])[0][0]
    wanted, largest = step.wanted(0, 149)
    assert np.abs(answer - wanted).max() <= 1e-5 * largest


# ---------------------------------------------------------------- attention: invariance


@every_set
@given(shape=shapes, size=contexts, other=contexts, cuts=st.lists(st.integers(1, 299), max_size=4), seed=seeds)
@settings(deadline=None, max_examples=60)
def test_a_token_has_the_same_bits_however_it_is_computed(
    isa: str, shape: Shape, size: int, other: int, cuts: list[int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = [drawn_row(rng, shape, size), drawn_row(rng, shape, other)]
    step = Step(isa, shape, rows, rng)
    whole = step.attend([(0, 0, size)])[0]

    edges = sorted({0, size, *(cut for cut in cuts if cut < size)})
    chunks = [(0, a, b - a) for a, b in itertools.pairwise(edges)]
    others = [(1, other - 1, 1), (1, 0, other)]
    for threads in (1, 2, 100):
        spans = [*others[: threads % 3], *chunks]
        answers = step.attend(spans, threads, seed=threads)
        assert same_bits(np.concatenate(answers[len(spans) - len(chunks) :]), whole)

    for position in {0, size // 2, size - 1}:
        for threads in (1, 3, 100):
            alone = step.attend([(0, position, 1)], threads, seed=threads - 1)[0]
            assert same_bits(alone[0], whole[position])

    # Blocks of another size, and other blocks.
    size_too = int(rng.choice([1, 7, 16, 48, 64, 200]))
    again = Step(isa, replace(shape, block_size=size_too), rows[:1], rng)
    assert same_bits(again.attend([(0, 0, size)], 2, seed=5)[0], whole)


@every_set
def test_a_value_that_vanishes_leaves_one_zero(isa: str) -> None:
    """-0 must not become +0 because a neighbour sees more segments."""
    shape = Shape("f32", 1, 1, 1, 16, 0, 0.0)
    k, v = np.full((300, 1, 1), -10, np.float32), np.zeros((300, 1, 1), np.float32)
    k[0], v[0], k[200] = 0.0, -1e-45, 2.0
    step = Step(isa, shape, [Row(np.ones((300, 1, 1), np.float32), k, v)], np.random.default_rng(0))
    assert same_bits(step.attend([(0, 255, 1)])[0], step.attend([(0, 250, 10)])[0][5:6])


@every_set
@pytest.mark.parametrize("kv_type", ["f32", "bf16", "i8"])
def test_a_long_context_is_split_among_threads(isa: str, kv_type: KvType) -> None:
    shape = Shape(kv_type, 1, 3, 64, 16, 0, 0.0)
    rng = np.random.default_rng(3)
    step = Step(isa, shape, [drawn_row(rng, shape, 3000)], rng)
    whole = step.attend([(0, 2960, 40)])[0]
    wanted, largest = step.wanted(0, 2999)
    assert np.abs(whole[39] - wanted).max() <= 1e-5 * largest
    for threads in (1, 2, 5, 64):
        assert same_bits(step.attend([(0, 2999, 1)], threads, seed=threads)[0][0], whole[39])
        assert same_bits(step.attend([(0, 2990, 10)], threads, seed=threads)[0], whole[30:])


@every_set
def test_more_queries_a_key_than_a_tile_holds(isa: str) -> None:
    shape = Shape("bf16", 1, 71, 64, 16, 0, 0.0)  # Falcon 7B
    rng = np.random.default_rng(4)
    step = Step(isa, shape, [drawn_row(rng, shape, 140)], rng)
    whole = step.attend([(0, 0, 140)])[0]
    wanted, largest = step.wanted(0, 139)
    assert np.abs(whole[139] - wanted).max() <= 1e-5 * largest
    assert same_bits(step.attend([(0, 139, 1)], 16)[0][0], whole[139])


# ---------------------------------------------------------------- attention: what is not finite


@every_set
@given(
    shape=shapes,
    size=contexts,
    part=st.sampled_from(["q", "k", "v"]),
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
    threads=st.sampled_from([1, 2, 100]),
    seed=seeds,
)
@settings(deadline=None, max_examples=80)
def test_what_is_not_finite_reaches_those_who_see_it_and_no_one_else(
    isa: str, shape: Shape, size: int, part: str, bad: float, threads: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    good = drawn_row(rng, shape, size)
    place = int(rng.integers(size))
    head = int(rng.integers(shape.heads if part == "q" else shape.kv_heads))
    ill = Row(good.q.copy(), good.k.copy(), good.v.copy())
    {"q": ill.q, "k": ill.k, "v": ill.v}[part][place, head, int(rng.integers(shape.head_dim))] = bad
    spans = [(0, 0, size), (1, 0, size)]
    answers, own = Step(isa, shape, [ill, good], rng).attend(spans, threads, seed=threads)
    wanted = Step(isa, shape, [good], rng).attend([(0, 0, size)])[0]
    assert same_bits(own, wanted)

    end = size if not shape.window else min(size, place + shape.window)
    sees = np.zeros((size, shape.heads), bool)
    if part == "q":
        sees[place, head] = True
    else:
        sees[place:end, head * shape.per_head : (head + 1) * shape.per_head] = True
    finite = np.isfinite(answers).all(-1)
    assert not finite[sees].any()
    assert same_bits(answers[~sees], wanted[~sees])


# ---------------------------------------------------------------- far places, misfits


@every_set
def test_places_past_two_thousand_million(isa: str) -> None:
    """Memory that nothing is written to is not taken up."""
    length, heads, dim, blocks = 256, 8, 128, 8300
    answers = []
    for block, count in ((0, 1), (blocks - 1, blocks)):
        cache = Cache("i8", heads, dim, length, 1)
        cache.num_blocks = count
        cache.keys, cache.values = (np.zeros(count * heads * dim * length, np.uint8) for _ in range(2))
        cache.key_scales, cache.value_scales = (np.zeros(count * heads * length, np.float32) for _ in range(2))
        row = drawn_row(np.random.default_rng(6), Shape("i8", heads, 1, dim, length, 0, 0.0), 20)
        cache.write(isa, [block * length + i for i in range(20)], row.k, row.v)
        out = np.zeros((1, heads * dim), np.float32)
        table = np.array([[block]], np.int32)
        q = row.q[19].reshape(1, -1)
        kernels.attend(isa, cache.native, q, out, heads, 0.1, 0.0, 0, np.array([[0, 1, 20]], np.int32), table)
        answers.append(out)
    assert same_bits(answers[0], answers[1]) and answers[0].any()


def arguments(**changes: Any) -> dict[str, Any]:
    cache = Cache("f32", 2, 4, 16, 3)
    return {
        "isa": "portable",
        "kv": cache.native,
        "q": np.zeros((2, 16), np.float32),
        "out": np.zeros((2, 16), np.float32),
        "heads": 4,
        "scale": 1.0,
        "softcap": 0.0,
        "window": 0,
        "spans": np.array([[0, 2, 20]], np.int32),
        "tables": np.array([[0, 1]], np.int32),
    } | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"isa": "mmx"}, "no kernels named mmx"),
        ({"heads": 3}, "heads"),
        ({"q": np.zeros((2, 15), np.float32)}, "q: wrong shape"),
        ({"out": np.zeros((3, 16), np.float32)}, "out: wrong number"),
        ({"spans": np.array([[1, 2, 20]], np.int32)}, "spans: outside"),
        ({"spans": np.array([[0, 2, 1]], np.int32)}, "context shorter"),
        ({"spans": np.array([[0, 2, 33]], np.int32)}, "too few blocks"),
        ({"tables": np.array([[0, 3]], np.int32)}, "tables: outside"),
        ({"tables": np.array([[0, -1]], np.int32)}, "tables: outside"),
        ({"window": -1}, "window"),
        ({"threads": 0}, "threads"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.attend(**arguments(**changes))


def test_a_cache_of_the_wrong_size_is_refused() -> None:
    cache = Cache("i8", 2, 4, 16, 3)
    cache.keys = cache.keys[:-1]
    with pytest.raises(ValueError, match="keys"):
        _ = cache.native
    with pytest.raises(ValueError, match="no KV type named f64"):
        empty, scales = np.zeros(0, np.uint8), np.zeros(0, np.float32)
        kernels.KvArrays("f64", 1, 1, 1, 1, empty, empty, scales, scales)


def test_places_outside_the_cache_are_refused() -> None:
    cache = Cache("f32", 1, 4, 16, 1)
    x = np.zeros((1, 1, 4), np.float32)
    with pytest.raises(ValueError, match="slots"):
        cache.write("portable", [16], x, x)
    flat, slots = x.reshape(1, 4), np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="positions"):
        positions = np.ones(1, np.int32)
        angles = (NO_ANGLES, NO_ANGLES, False)
        kernels.rotate_and_store(
            "portable", cache.native, flat, flat.copy(), flat.copy(), 1, None, None, *angles, positions, slots
        )
