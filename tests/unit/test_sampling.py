"""Sampling by name: published vectors, ties, faults, and what must not matter. `test_sampling_spec.py` holds it against
a slow implementation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pytest

from headrace.backends.philox import gumbel, philox4x32
from headrace.backends.sampling import Position, RowSampling, Sampled, sample, score
from headrace.core.errors import EngineError, NonFiniteLogits
from headrace.core.types import RowError, SamplingParams


def position(
    output: Sequence[int] = (),
    stop_ids: Iterable[int] = (),
    mask: bytes | None = None,
    vocab: int = 1000,
    prompt: Sequence[int] = (0,),
    **params: object,
) -> Position:
    """The place after `prompt` and `output`."""
    row = RowSampling(SamplingParams(**params), len(prompt), stop_ids, vocab)  # type: ignore[arg-type]
    return Position(row, np.array([*prompt, *output], np.int64), mask)


def at_place(place: int, **params: object) -> Position:
    """The place after `place` tokens of an answer."""
    return position([0] * place, **params)  # type: ignore[arg-type]


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


# ---------------------------------------------------------------- properties by name


def test_greedy_takes_the_lowest_id_on_a_tie() -> None:
    logits = [[0, 2, 1, 2], [5, 5, 5, 5], [-math.inf, -3, -3, -math.inf]]
    assert tokens(logits, *[position()] * 3) == [1, 0, 1]
    assert tokens(logits, *[position(temperature=9e-6)] * 3) == [1, 0, 1]


def test_top_k_and_top_p_keep_the_lowest_ids_of_a_tie() -> None:
    drawn = {tokens([[1, 1, 1, 1]], at_place(i, temperature=1.0, seed=3, top_k=2))[0] for i in range(60)}
    assert drawn == {0, 1}
    drawn = {tokens([[1, 1, 1, 1]], at_place(i, temperature=1.0, seed=3, top_p=0.6))[0] for i in range(90)}
    assert drawn == {0, 1, 2}
    drawn = {tokens([[0, 3, 0, 0]], at_place(i, temperature=2.0, seed=3, top_p=1e-9))[0] for i in range(30)}
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
    out = sample(np.array([[1, math.nan]], np.float32), [position(mask=b"\x01", vocab=2)])
    assert isinstance(out[0], RowError) and out[0].code == "nan_logits"


def test_nothing_allowed_is_an_error() -> None:
    (out,) = sample(np.zeros((1, 3), np.float32), [position(mask=b"\xf8")])
    assert isinstance(out, RowError) and out.code == "no_token_allowed" and "no token is allowed" in out.message


@pytest.mark.parametrize(
    ("at", "words"),
    [(position(mask=b"\xff\xff"), "2 bytes, 1 needed"), (position(temperature=0.5), "seed: None")],
)
def test_faults_of_the_engine_are_the_rows(at: Position, words: str) -> None:
    (out,) = sample(np.zeros((1, 3), np.float32), [at])
    assert isinstance(out, RowError) and out.code == "engine_fault" and words in out.message


def test_min_tokens_masks_stop_ids_only_while_early() -> None:
    assert tokens([[0, 1, 9]], position([0], [2], min_tokens=2)) == [1]
    assert tokens([[0, 1, 9]], position([0, 0], [2], min_tokens=2)) == [2]


def test_bad_words_look_at_the_answer_alone() -> None:
    bad = {"bad_words_ids": [[1, 2], [3]], "vocab": 4}
    assert tokens([[0, 1, 9, 10]], position([], prompt=[1], **bad)) == [2], "the prompt's end begins no bad word"
    assert tokens([[0, 1, 9, 10]], position([0, 1], **bad)) == [1]
    assert tokens([[0, 1, 9, 10]], position([1, 0], **bad)) == [2]


def test_penalties_know_prompt_from_answer() -> None:
    logits = [[1.0, 2.0, 2.5, -1.0]]
    at = {"prompt": [2, 2], "vocab": 4}
    assert tokens(logits, position([1], presence_penalty=2.0, **at)) == [2]
    assert tokens(logits, position([2], presence_penalty=2.0, **at)) == [1]
    assert tokens(logits, position([2], frequency_penalty=0.4, **at)) == [2]
    assert tokens(logits, position([2, 2], frequency_penalty=0.4, **at)) == [1]
    assert tokens(logits, position([], repetition_penalty=2.0, **at)) == [1], "the prompt counts"
    assert tokens(logits, position([0, 1], repetition_penalty=1e-300, **at)) == [2], "held within float32"
    negative = [[-1.0, -2.0, -3.0, -1.5]]
    assert tokens(negative, position([0], repetition_penalty=2.0, prompt=[1], vocab=4)) == [3]


def test_a_bias_does_not_lift_what_is_masked() -> None:
    params = {"logit_bias": {2: 100}, "allowed_token_ids": [0, 1], "vocab": 3}
    assert tokens([[0, 1, 9]], position(**params)) == [1]
    assert tokens([[0, 1, 9]], position(logit_bias={0: 8.5, 2: -1}, vocab=3)) == [0]


def test_the_ids_of_a_row_are_inside_the_vocabulary() -> None:
    for params in ({"allowed_token_ids": [5]}, {"logit_bias": {5: 1.0}}, {"bad_words_ids": [[1, 5]]}):
        with pytest.raises(EngineError, match="token id 5"):
            position(vocab=5, **params)
    assert tokens([[0, 1, 2]], position([], [7], vocab=3, min_tokens=1)) == [2], "the model may have no such stop id"


def test_logits_are_left_as_they_were() -> None:
    logits = np.random.default_rng(1).standard_normal((2, 20)).astype(np.float32)
    before = logits.copy()
    changes = {"logit_bias": {3: 2.0}, "repetition_penalty": 1.3, "allowed_token_ids": [0, 1, 2], "vocab": 20}
    early = position([], [1], b"\x0f\xff\x03", min_tokens=3, logprobs=3)
    sample(logits, [early, position(temperature=1.0, seed=1, **changes)])
    assert np.array_equal(logits, before)


def test_the_draw_does_not_depend_on_its_batch() -> None:
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((20, 300)).astype(np.float32)
    positions = [at_place(i, temperature=1.0, seed=9, top_p=0.8 if i % 2 else 1.0) for i in range(20)]
    together = tokens(logits, *positions)
    alone = [tokens(logits[i : i + 1], positions[i])[0] for i in range(20)]
    assert together == alone
    assert tokens(logits[::-1], *positions[::-1]) == alone[::-1]


def test_seeds_and_positions_matter() -> None:
    flat = np.zeros((1, 1000), np.float32)
    drawn = {
        tokens(flat, at_place(place, temperature=1.0, seed=seed))[0] for seed in (0, 1, -1, 2**40) for place in range(5)
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
    found = np.bincount(tokens(rows, *(position(seed=i, **full) for i in range(draws))), minlength=8)
    assert found.sum() == found[order[:count]].sum(), "nothing outside the cut"
    statistic = float(((found[order[:count]] - draws * shares) ** 2 / (draws * shares)).sum())
    freedom = count - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < bound


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = np.random.default_rng(3).standard_normal((1, 50)).astype(np.float32) * 5
    logits[0, [7, 3]] = logits.max() + 1
    exact = logits[0].astype(np.float64) - np.log(np.exp(logits[0].astype(np.float64)).sum())
    (out,) = sample(logits, [position([], [3], min_tokens=1, logprobs=4)])
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


def test_scores_are_logprobs_of_given_tokens() -> None:
    logits = np.random.default_rng(4).standard_normal((3, 40)).astype(np.float32)
    ids = [int(row.argmax()) for row in logits]
    sampled = [one.logprobs for one in sample(logits, [position(logprobs=2)] * 3) if isinstance(one, Sampled)]
    assert score(logits, ids, 2) == sampled
    for bad in (math.nan, math.inf):
        logits[1, 3] = bad
        with pytest.raises(NonFiniteLogits):
            score(logits, ids, 2)


def test_no_rows() -> None:
    assert sample(np.zeros((0, 5), np.float32), []) == []
