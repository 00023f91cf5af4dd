"""Sampling kernels against the specification, `headrace.backends.sampling`: the very same tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.backends import philox
from headrace.backends import sampling as specification
from headrace.backends.sampling import Position, RowSampling
from headrace.backends.torch.kernels import sampling
from headrace.backends.torch.kernels.philox import ROUGH, gumbel, philox_block, rough_gumbel
from headrace.core.errors import EngineError
from headrace.core.types import RowError, SamplingParams

F32 = NDArray[np.float32]
Wanted = tuple[SamplingParams | None, int]
"""Parameters (None: a row of padding) and output position."""

ERRORS = {"nan_logits": sampling.NOT_FINITE, "no_token_allowed": sampling.NO_TOKEN}


def draws_of(wanted: Sequence[Wanted]) -> sampling.Draws:
    floats = torch.full((len(wanted), 3), float("nan"), dtype=torch.float64)
    ints = torch.zeros((len(wanted), 5), dtype=torch.int64)
    for i, (one, position) in enumerate(wanted):
        if one is not None:
            row = sampling.row_of(one, position)
            floats[i], ints[i] = torch.tensor(row[0], dtype=torch.float64), torch.tensor(row[1])
    return sampling.Draws(floats, ints)


SIZES = sampling.Sizes()
SMALL = sampling.Sizes(tile=128, group=16, chunk=64, few=2)
"""With these a few hundred ids are many tiles, and many candidates."""


def poisoned(rows: int, vocab: int, sizes: sampling.Sizes = SIZES) -> sampling.Workspace:
    workspace = sampling.make_workspace(rows, vocab, "cpu", sizes)
    for name in sampling.Workspace.__slots__:
        memory = getattr(workspace, name)
        if isinstance(memory, torch.Tensor):
            memory.fill_(float("nan") if memory.is_floating_point() else 2**30)
    return workspace


def on_device(logits_PV: torch.Tensor, wanted: Sequence[Wanted], sizes: sampling.Sizes) -> list[int]:
    """The tokens, from logits that lie between poison."""
    rows, vocab = logits_PV.shape
    wide = torch.full((rows, vocab + 3), float("nan"), dtype=logits_PV.dtype)
    wide[:, :vocab] = logits_PV
    tokens = torch.full((rows + 2,), -77, dtype=torch.int32)
    sampling.sample(wide[:, :vocab], draws_of(wanted), tokens[1:-1], poisoned(rows, vocab, sizes))
    assert (tokens[0], tokens[-1]) == (-77, -77)
    return [int(token) for token in tokens[1:-1]]


def specified(logits_PV: torch.Tensor, wanted: Sequence[Wanted]) -> list[int]:
    tokens = []
    for logits_V, (one, position) in zip(logits_PV.float().numpy(), wanted, strict=True):
        if one is None:
            tokens.append(sampling.NOTHING_WANTED)
            continue
        # A prompt of fewer than no tokens: so an output position of billions needs no such list.
        row = RowSampling(one, -position, (), len(logits_V))
        (outcome,) = specification.sample(logits_V[None], [Position(row, np.empty(0, np.int64))])
        tokens.append(ERRORS[outcome.code] if isinstance(outcome, RowError) else outcome.token)
    return tokens


def check(logits_PV: torch.Tensor | F32, wanted: Sequence[Wanted], sizes: sampling.Sizes = SIZES) -> list[int]:
    logits_PV = torch.as_tensor(logits_PV)
    tokens = on_device(logits_PV, wanted, sizes)
    assert tokens == specified(logits_PV, wanted)
    return tokens


def random_logits(generator: np.random.Generator, kind: str, vocab: int) -> F32:
    logits = generator.normal(size=vocab) * {"flat": 0.1, "peaky": 8.0}.get(kind, 2.0)
    if kind == "ties":
        logits = np.round(logits)
    if kind == "masked":
        logits[generator.random(vocab) < 0.97] = -np.inf
        logits[generator.integers(vocab)] = 1.0
    return logits.astype(np.float32)


KINDS = ("flat", "peaky", "ties", "masked")
FILTERS = tuple(itertools.product((0, 7), (1.0, 0.8), (0.0, 0.05)))
SEEDS = (0, -1, -(2**63), 2**63 - 1, 1 << 32, 12345678901)
POSITIONS = (0, 1, 2**32 - 1, 2**32, 2**33)


def drawing(temperature: float = 1.0, seed: int = 1, **filters: float) -> SamplingParams:
    return SamplingParams(temperature=temperature, seed=seed, **filters)  # type: ignore[arg-type]


@triton.jit
def _numbers_kernel(words_ptr, exact_ptr, rough_ptr, given_ptr, key_ptr, B: tl.constexpr):
    low, high, position = tl.load(key_ptr), tl.load(key_ptr + 1), tl.load(key_ptr + 2)
    words = philox_block(tl.arange(0, B // 4) + 12345, low, high, position)
    tl.store(words_ptr + tl.arange(0, B), words.to(tl.int64))
    given = tl.load(given_ptr + tl.arange(0, B)).to(tl.uint32)
    tl.store(exact_ptr + tl.arange(0, B), gumbel(given))
    tl.store(rough_ptr + tl.arange(0, B), rough_gumbel(given))


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (-5, 2**33 + 7), (2**63 - 1, 2**32 - 1)])
def test_random_words_and_gumbels_are_those_of_the_specification(seed: int, position: int) -> None:
    count = 512
    # Around the ends, and where the rough one goes over from a logarithm to a series.
    edges = np.array([0, 1, 2**24, 2**31, 2**32 - 1, 2**32 - 2, 2**32 - 2**8], np.int64)
    near = int(0.9 * 2**32) + np.arange(-100, 100)
    rest = np.random.default_rng(1).integers(0, 2**32, count - len(edges) - len(near))
    given_words = torch.from_numpy(np.concatenate([edges, near, rest]))
    words, exact = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.float64)
    rough = torch.empty(count, dtype=torch.float32)
    key = torch.tensor([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, position])
    _numbers_kernel[(1,)](words, exact, rough, given_words, key, count)
    ids = np.arange(4 * 12345, 4 * 12345 + count)
    assert words.tolist() == philox.uniform_words(seed, position, ids).tolist()
    expected = philox.gumbel_of(given_words.numpy().astype(np.uint64))
    assert np.allclose(exact.numpy(), expected, rtol=1e-14, atol=1e-15)
    assert np.abs(rough.numpy() - expected).max() < ROUGH.value
    assert expected.max() - expected.min() < philox.GUMBEL_SPREAD


@pytest.mark.parametrize("kind", KINDS)
def test_every_combination_of_filters(kind: str) -> None:
    generator = np.random.default_rng(KINDS.index(kind))
    vocab = (61, 131, 2049, 77)[KINDS.index(kind)]
    wanted = [
        (
            SamplingParams(
                temperature=float(generator.choice([0.02, 0.7, 1.0, 2.0])),
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                seed=SEEDS[int(generator.integers(len(SEEDS)))],
            ),
            POSITIONS[int(generator.integers(len(POSITIONS)))],
        )
        for top_k, top_p, min_p in FILTERS
    ]
    check(np.stack([random_logits(generator, kind, vocab) for _ in wanted]), wanted)


def test_greedy_ties_and_rows_that_have_no_token() -> None:
    vocab = 4100
    logits_PV = np.random.default_rng(5).normal(size=(9, vocab)).astype(np.float32)
    logits_PV[0, [3000, 4099]] = 9.0
    logits_PV[1] = -np.inf
    logits_PV[2, 4000] = np.nan
    logits_PV[3, 17] = np.inf
    logits_PV[4, :4090] = -np.inf
    logits_PV[5] = np.nan
    logits_PV[6, 7] = np.inf
    logits_PV[6, 4000] = np.nan
    logits_PV[7] = -np.inf
    greedy, random = SamplingParams(), drawing(top_k=20, top_p=0.9)
    kinds = (greedy, greedy, greedy, random, random, random, greedy, random, None)
    tokens = check(logits_PV, [(one, i) for i, one in enumerate(kinds)])
    finite, nothing = sampling.NOT_FINITE, sampling.NO_TOKEN
    assert tokens[:4] == [3000, nothing, finite, finite]
    assert tokens[5:] == [finite, finite, nothing, sampling.NOTHING_WANTED]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_float32(dtype: torch.dtype) -> None:
    logits_PV = torch.from_numpy(np.random.default_rng(6).normal(size=(3, 500)).astype(np.float32) * 3).to(dtype)
    check(logits_PV, [(SamplingParams(), 0), (drawing(), 5), (drawing(0.7, top_p=0.5), 6)])


def test_bounds_of_each_filter() -> None:
    """All alike: the cut is at a known id, and only the sum, exact here, tells where."""
    equal = np.zeros((6, 1000), np.float32)
    wanted = [
        drawing(top_p=0.004, seed=3),
        drawing(top_k=3, seed=4),
        drawing(top_k=10, top_p=0.3, seed=5),
        drawing(top_p=1e-9),
        drawing(min_p=1.0, seed=6),
        drawing(top_k=1, temperature=2.0),
    ]
    tokens = check(equal, [(one, 9) for one in wanted])
    assert [token < most for token, most in zip(tokens, (4, 3, 3, 1, 1000, 1), strict=True)] == [True] * 6


def test_many_candidates_race_tile_by_tile() -> None:
    """The winner among all is far outside, again and again; few are inside, or many."""
    logits_PV = np.random.default_rng(8).normal(size=(6, 200)).astype(np.float32)
    filters = (
        drawing(2.0, top_p=0.02), drawing(2.0, top_k=120), drawing(top_k=100, top_p=0.1), drawing(top_p=0.99),
        drawing(2.0, min_p=0.2), drawing(2.0, top_k=2),
    )  # fmt: skip
    check(logits_PV, [(one, 3 + i) for i, one in enumerate(filters)], SMALL)


def test_a_large_vocabulary() -> None:
    logits_PV = np.random.default_rng(8).normal(size=(2, 8500)).astype(np.float32) * 1.3
    check(logits_PV, [(drawing(0.6, top_p=0.5), 3), (drawing(top_k=4000, top_p=0.3), 4)])


def test_coarse_scores_tie() -> None:
    """Where logits are so large that float64 loses the gumbels, the lowest id wins."""
    logits_PV = np.full((2, 40), 1e25, np.float32)
    logits_PV[1, :20] = 0
    assert check(logits_PV, [(drawing(), 0), (drawing(top_p=0.9), 0)]) == [0, 20]


def test_a_row_does_not_depend_on_its_company_or_on_what_was_there() -> None:
    vocab = 200
    logits_PV = torch.from_numpy(np.random.default_rng(9).normal(size=(3, vocab)).astype(np.float32))
    workspace, tokens = poisoned(8, vocab), torch.empty(3, dtype=torch.int32)
    asked: list[Wanted] = [(drawing(top_p=0.6), 4), (drawing(1.5, seed=-9), 5), (drawing(top_k=9, min_p=0.1), 6)]
    sampling.sample(logits_PV, draws_of(asked), tokens, workspace)
    first = tokens.tolist()
    for i in (2, 0, 1):
        one = tokens[:1]
        sampling.sample(logits_PV[i : i + 1], draws_of(asked[i : i + 1]), one, workspace)
        assert one.tolist() == first[i : i + 1]


def test_shapes_are_checked() -> None:
    tokens, workspace = torch.empty(2, dtype=torch.int32), sampling.make_workspace(2, 8, "cpu")
    draws = draws_of([(SamplingParams(), 0)] * 2)
    for logits_PV in (torch.zeros(2, 9), torch.zeros(1, 8), torch.zeros(3, 8)):
        with pytest.raises(EngineError, match="a workspace for 2 × 8"):
            sampling.sample(logits_PV, draws, tokens, workspace)
    with pytest.raises(EngineError, match="contiguous"):
        sampling.sample(torch.zeros(8, 2).T, draws, tokens, workspace)
    none = torch.empty(0, dtype=torch.int32)
    sampling.sample(torch.zeros(0, 8), draws_of([]), none, workspace)


def test_a_draw_needs_a_seed() -> None:
    with pytest.raises(EngineError, match="seed"):
        sampling.row_of(SamplingParams(temperature=1.0), 0)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_any_row(data: st.DataObject) -> None:
    numbers = st.one_of(st.sampled_from([-np.inf, 0.0, -0.0, 1.0, 2.5]), st.floats(-30, 30, width=32))
    logits_V = data.draw(st.lists(numbers, min_size=1, max_size=90))
    one = SamplingParams(
        temperature=data.draw(st.floats(0.01, 2)),
        top_k=data.draw(st.integers(-1, 95)),
        top_p=data.draw(st.floats(1e-6, 1)),
        min_p=data.draw(st.floats(0, 1)),
        seed=data.draw(st.integers(-(2**63), 2**63 - 1)),
    )
    sizes = data.draw(st.sampled_from([SIZES, SMALL]))
    check(np.array([logits_V], np.float32), [(one, data.draw(st.integers(0, 2**33)))], sizes)
