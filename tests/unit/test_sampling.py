"""Sampling against published vectors, a slow implementation, and statistics."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.backends.sampling import Position, Sampled, gumbel, philox4x32, sample
from headrace.core.types import RowError, SamplingParams

NO_STOP = np.empty(0, np.int64)


def position(
    output_position: int = 0, stop_ids: object = NO_STOP, mask: bytes | None = None, **params: object
) -> Position:
    return Position(SamplingParams(**params), output_position, np.asarray(stop_ids, np.int64), mask)  # type: ignore[arg-type]


def tokens(logits: object, *positions: Position) -> list[int]:
    out = sample(np.asarray(logits, np.float32), positions)
    assert all(isinstance(one, Sampled) for one in out), out
    return [one.token for one in out if isinstance(one, Sampled)]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    """Random123's `kat_vectors`, philox4x32-10."""
    assert tuple(int(word) for word in philox4x32(counter, key)) == words


# ---------------------------------------------------------------- the slow implementation


def slow_philox(counter: list[int], key: list[int]) -> list[int]:
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        high, low = divmod(first, 1 << 32), divmod(second, 1 << 32)
        counter = [low[0] ^ counter[1] ^ key[0], low[1], high[0] ^ counter[3] ^ key[1], high[1]]
        key = [(key[0] + 0x9E3779B9) % (1 << 32), (key[1] + 0xBB67AE85) % (1 << 32)]
    return counter


def slow_gumbel(seed: int, place: int, token: int) -> float:
    seed %= 1 << 64
    words = slow_philox([token // 4, place % (1 << 32), place >> 32, 0], [seed % (1 << 32), seed >> 32])
    return -math.log(-math.log((words[token % 4] + 0.5) / 2**32))


def slow_token(logits: np.ndarray, at: Position) -> int | None:
    """docs/CONTRACTS.md §2, word by word. None: nothing is allowed."""
    values = [float(value) for value in logits]
    params = at.sampling
    allowed = set(range(len(values)))
    if at.output_position < params.min_tokens:
        allowed -= {int(token) for token in at.stop_ids}
    if at.mask is not None:
        allowed = {token for token in allowed if at.mask[token // 8] >> (token % 8) & 1}
    order = sorted((t for t in allowed if values[t] > -math.inf), key=lambda t: (-values[t], t))
    if not order:
        return None
    if params.temperature < 1e-5:
        return order[0]
    if params.top_k > 0:
        order = order[: params.top_k]
    weights = [math.exp((values[t] - values[order[0]]) / params.temperature) for t in order]
    total, running, kept = math.fsum(weights), 0.0, []
    for token, weight in zip(order, weights, strict=True):
        if params.top_p < 1 and kept and running >= params.top_p * total:
            break
        kept.append(token)
        running += weight
    scores = {t: values[t] / params.temperature + slow_gumbel(params.seed or 0, at.output_position, t) for t in kept}
    return min(kept, key=lambda t: (-scores[t], t))


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, Position]:
    size = draw(st.integers(1, 40) | st.integers(300, 700))
    # Few distinct values: ties at every cut.
    spread = draw(st.sampled_from([0.0, 0.5, 3.0, 40.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = np.round(rng.standard_normal(size) * spread, draw(st.integers(0, 4))).astype(np.float32)
    logits[rng.random(size) < draw(st.sampled_from([0.0, 0.3]))] = -np.inf
    mask = draw(st.none() | st.binary(min_size=-(-size // 8), max_size=-(-size // 8)))
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 5e-6, 0.01, 0.7, 1.0, 2.0])),
        top_k=draw(st.sampled_from([-1, 0, 1, 2, 7, 100, 10_000])),
        # Away from sums of ties, where the last bit of a float would decide.
        top_p=draw(st.sampled_from([1.0, 0.987654, 0.7123456, 0.3141592, 1e-9])),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        min_tokens=draw(st.sampled_from([0, 5])),
    )
    place = draw(st.sampled_from([0, 3, 5, 2**32 + 7]))
    return logits, Position(params, place, np.array(sorted({0, size // 2, size + 3}), np.int64), mask)


@given(st.lists(cases(), min_size=1, max_size=3))
def test_equal_to_the_slow_implementation(batch: list[tuple[np.ndarray, Position]]) -> None:
    size = len(batch[0][0])
    batch = [case for case in batch if len(case[0]) == size]
    out = sample(np.stack([logits for logits, _ in batch]), [at for _, at in batch])
    for one, (logits, at) in zip(out, batch, strict=True):
        assert (one.token if isinstance(one, Sampled) else None) == slow_token(logits, at)
        assert isinstance(one, Sampled) or one.code == "nan_logits"


def test_a_large_vocabulary_and_every_cut() -> None:
    rng = np.random.default_rng(5)
    logits = (rng.standard_normal((6, 30_000)) * 2).astype(np.float32)
    params = [(1.0, 0, 1.0), (1.0, 0, 0.9), (2.0, 0, 0.99), (0.7, 50, 0.9), (1.0, 1000, 1.0), (0.2, 0, 0.5)]
    positions = [position(i, temperature=t, top_k=k, top_p=p, seed=i) for i, (t, k, p) in enumerate(params)]
    expected = [slow_token(row, at) for row, at in zip(logits, positions, strict=True)]
    assert tokens(logits, *positions) == expected


# ---------------------------------------------------------------- properties by name


def test_greedy_takes_the_lowest_id_on_a_tie() -> None:
    logits = [[0, 2, 1, 2], [5, 5, 5, 5], [-math.inf, -3, -3, -math.inf]]
    assert tokens(logits, *[position()] * 3) == [1, 0, 1]
    assert tokens(logits, *[position(temperature=9e-6)] * 3) == [1, 0, 1]


def test_top_k_and_top_p_keep_the_lowest_ids_of_a_tie() -> None:
    drawn = {tokens([[1, 1, 1, 1]], position(i, temperature=1.0, seed=3, top_k=2))[0] for i in range(60)}
    assert drawn == {0, 1}
    drawn = {tokens([[1, 1, 1, 1]], position(i, temperature=1.0, seed=3, top_p=0.6))[0] for i in range(90)}
    assert drawn == {0, 1, 2}
    drawn = {tokens([[0, 3, 0, 0]], position(i, temperature=2.0, seed=3, top_p=1e-9))[0] for i in range(30)}
    assert drawn == {1}, "top_p keeps at least one"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 1}])
def test_rows_that_are_not_finite_fail_alone(bad: float, params: dict[str, float]) -> None:
    logits = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    expected = tokens(logits, *[position(**params)] * 3)
    logits[1, 20] = bad
    out = sample(logits, [position(**params)] * 3)
    assert isinstance(out[1], RowError) and out[1].code == "nan_logits"
    assert [one.token for one in (out[0], out[2]) if isinstance(one, Sampled)] == [expected[0], expected[2]]


def test_a_nan_under_a_mask_is_still_an_error() -> None:
    out = sample(np.array([[1, math.nan]], np.float32), [position(mask=b"\x01")])
    assert isinstance(out[0], RowError) and out[0].code == "nan_logits"


def test_nothing_allowed_is_an_error() -> None:
    (out,) = sample(np.zeros((1, 3), np.float32), [position(mask=b"\xf8")])
    assert isinstance(out, RowError) and out.code == "nan_logits" and "no token is allowed" in out.message


@pytest.mark.parametrize(
    ("at", "words"),
    [(position(mask=b"\xff\xff"), "2 bytes, 1 needed"), (position(temperature=0.5), "seed: None")],
)
def test_faults_of_the_engine_are_the_rows(at: Position, words: str) -> None:
    (out,) = sample(np.zeros((1, 3), np.float32), [at])
    assert isinstance(out, RowError) and out.code == "engine_fault" and words in out.message


def test_min_tokens_masks_stop_ids_only_while_early() -> None:
    at = position(1, [2], min_tokens=2)
    assert tokens([[0, 1, 9]], at) == [1]
    assert tokens([[0, 1, 9]], replace(at, output_position=2)) == [2]


def test_logits_are_left_as_they_were() -> None:
    logits = np.random.default_rng(1).standard_normal((2, 20)).astype(np.float32)
    before = logits.copy()
    sample(logits, [position(0, [1], b"\x0f\xff\x03", min_tokens=3, logprobs=3), position(temperature=1.0, seed=1)])
    assert np.array_equal(logits, before)


def test_the_draw_does_not_depend_on_its_batch() -> None:
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((20, 300)).astype(np.float32)
    positions = [position(i, temperature=1.0, seed=9, top_p=0.8 if i % 2 else 1.0) for i in range(20)]
    together = tokens(logits, *positions)
    alone = [tokens(logits[i : i + 1], positions[i])[0] for i in range(20)]
    assert together == alone
    assert tokens(logits[::-1], *positions[::-1]) == alone[::-1]


def test_seeds_and_positions_matter() -> None:
    flat = np.zeros((1, 1000), np.float32)
    drawn = {
        tokens(flat, position(place, temperature=1.0, seed=seed))[0] for seed in (0, 1, -1, 2**40) for place in range(5)
    }
    assert len(drawn) > 15


def test_gumbel_of_some_ids_is_that_of_all() -> None:
    every = gumbel(-7, 12, np.arange(1000))
    some = np.array([0, 3, 4, 5, 11, 500, 998, 999])
    assert np.array_equal(gumbel(-7, 12, some), every[some])
    assert abs(every.mean() - 0.5772) < 0.15 and abs(every.var() - math.pi**2 / 6) < 0.3


@pytest.mark.parametrize(
    ("params", "kept"),
    [({}, 8), ({"temperature": 0.6}, 8), ({"top_k": 3}, 3), ({"top_p": 0.8}, None), ({"top_k": 6, "top_p": 0.7}, None)],
)
def test_chi_square(params: dict[str, float], kept: int | None) -> None:
    """20,000 draws have the distribution they should: p > 0.001 by the Wilson-Hilferty bound."""
    logits = np.array([0.3, 1.7, -0.5, 2.0, 0.0, 1.1, -1.2, 0.9])
    full = {"temperature": 1.0, **params}
    order = np.argsort(-logits)[: int(full.get("top_k", 8))]
    weights = np.exp(logits[order] / full["temperature"])
    shares = weights / weights.sum()
    count = int(np.searchsorted(np.cumsum(shares), full.get("top_p", 1.0) - 1e-12)) + 1
    assert kept is None or count == kept
    shares = shares[:count] / shares[:count].sum()
    draws = 20_000
    rows = np.broadcast_to(logits.astype(np.float32), (draws, 8))
    found = np.bincount(tokens(rows, *(position(i, seed=42, **full) for i in range(draws))), minlength=8)
    assert found.sum() == found[order[:count]].sum(), "nothing outside the cut"
    statistic = float(((found[order[:count]] - draws * shares) ** 2 / (draws * shares)).sum())
    freedom = count - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < bound


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = np.random.default_rng(3).standard_normal((1, 50)).astype(np.float32) * 5
    logits[0, [7, 3]] = logits.max() + 1
    exact = logits[0].astype(np.float64) - np.log(np.exp(logits[0].astype(np.float64)).sum())
    (out,) = sample(logits, [position(0, [3], min_tokens=1, logprobs=4)])
    assert isinstance(out, Sampled) and out.token == 7 and out.logprobs is not None
    assert out.logprobs.logprob == pytest.approx(exact[7], abs=1e-12)
    best = sorted(range(50), key=lambda i: (-exact[i], i))[:4]
    assert best[:2] == [3, 7] and [i for i, _ in out.logprobs.top] == best
    assert [value for _, value in out.logprobs.top] == pytest.approx([exact[i] for i in best], abs=1e-12)
    (none,) = sample(logits, [position(logprobs=0)])
    assert isinstance(none, Sampled) and none.logprobs is not None and none.logprobs.top == ()
    huge = np.array([[3e38, -3e38, 0]], np.float32)
    (far,) = sample(huge, [position(logprobs=3)])
    assert isinstance(far, Sampled) and far.logprobs is not None and far.logprobs.logprob == 0.0


def test_no_rows() -> None:
    assert sample(np.zeros((0, 5), np.float32), []) == []
