"""The native sampler against its specification, `headrace.backends.sampling`: the same tokens, errors and
log-probabilities, whatever is asked, on every instruction set of this machine.

Where the last bits of a float64 sum decide which ids are kept, the two may differ: the oracle tells.
"""

from __future__ import annotations

import math
import random
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.backends.philox import uniform_words
from headrace.backends.sampling import Position, RowSampling, Sampled, sample, score
from headrace.core.errors import EngineError
from headrace.core.types import MAX_LOGPROBS, RowError, SamplingParams, TokenLogprobs
from tests.unit import sampling_oracle as oracle
from tests.unit.sampling_cases import INF, KINDS, logits_of
from tests.unit.sampling_oracle import Case

kernels = pytest.importorskip("headrace.backends.native._kernels")

F32 = NDArray[np.float32]
Out = Sampled | RowError

SETS: list[str] = kernels.instruction_sets()


# ---------------------------------------------------------------- one against the other


def position(
    vocab: int,
    output: Sequence[int] = (),
    prompt: Sequence[int] = (0,),
    stop_ids: Iterable[int] = (),
    mask: bytes | None = None,
    **params: Any,
) -> Position:
    row = RowSampling(SamplingParams(**params), len(prompt), stop_ids, vocab)
    return Position(row, np.array([*prompt, *output], np.int64), mask)


def native_row(one: Position, vocab: int) -> Any:
    return kernels.RowSampling(one.row.sampling, one.row.num_prompt, one.row.stop_ids.tolist(), vocab)


def native(scratch: Any, logits_PV: F32, positions: Sequence[Position]) -> list[Out]:
    rows = [native_row(one, logits_PV.shape[1]) for one in positions]
    token_ids = [one.token_ids.astype(np.int32) for one in positions]
    return [out_of(one) for one in scratch.sample(logits_PV, rows, token_ids, [one.mask for one in positions])]


def out_of(found: tuple[str, str, int, tuple[float, tuple[tuple[int, float], ...]] | None]) -> Out:
    code, message, token, logprobs = found
    if code:
        assert token == -1 and logprobs is None
        return RowError(code, message)
    return Sampled(token, None if logprobs is None else TokenLogprobs(*logprobs))


def same_logprobs(one: TokenLogprobs | None, other: TokenLogprobs | None, logits_V: F32) -> bool:
    if one is None or other is None:
        return one is other
    slack = 1e-12 * (1 + abs(float(logits_V.max())))
    pairs = [(one.logprob, other.logprob), *zip((x for _, x in one.top), (x for _, x in other.top), strict=False)]
    same_ids = [token for token, _ in one.top] == [token for token, _ in other.top]
    return same_ids and all(math.isclose(a, b, rel_tol=1e-12, abs_tol=slack) for a, b in pairs)


def sure(logits_V: F32, one: Position) -> bool:
    """False: which ids are kept hangs on the last bits of a sum."""
    stop_ids = tuple(one.row.stop_ids.tolist())
    prompt, answer = np.split(one.token_ids, [one.row.num_prompt])
    case = Case(tuple(logits_V.tolist()), one.row.sampling, tuple(prompt), tuple(answer), stop_ids, one.mask)
    return oracle.choose(case).sure


def check(scratch: Any, logits_PV: F32, positions: Sequence[Position]) -> Counter[str]:
    """Fails where the two differ; counts what came out."""
    with np.errstate(over="ignore"):  # the specification's floor below a peak of -3.4e38
        wanted = sample(logits_PV, positions)
    found = native(scratch, logits_PV, positions)
    kinds: Counter[str] = Counter()
    for logits_V, one, left, right in zip(logits_PV, positions, found, wanted, strict=True):
        kind = right.code if isinstance(right, RowError) else "token"
        if isinstance(left, Sampled) and isinstance(right, Sampled) and left.token == right.token:
            assert same_logprobs(left.logprobs, right.logprobs, logits_V), (left, right)
        elif left != right:
            assert isinstance(left, Sampled) and isinstance(right, Sampled), (left, right)
            assert not sure(logits_V, one), (left, right, one.row.sampling)
            kind = "unsure"
        kinds[kind] += 1
    return kinds


# ---------------------------------------------------------------- random rows


def random_params(rng: random.Random, size: int) -> dict[str, Any]:
    """Each field on about as often as not, and at its ends."""

    def tokens(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(size) for _ in range(rng.randint(least, most)))

    off = rng.random()  # few rows have all fields on

    def some(plain: Any, *values: Any) -> Any:
        return plain if rng.random() < off else rng.choice(values)

    small = tuple(rng.randrange(min(size, 4)) for _ in range(5))
    return {
        "temperature": rng.choice([0.0, 9.9e-6, 1e-5, 1e-4, 0.01, 0.3, 0.7, 1.0, 1.0, 1.37, 2.0, rng.uniform(0, 2)]),
        "top_k": some(0, -1, 1, 2, 5, 20, 50, size // 3, size - 1, size, size + 5, 2**63 - 1),
        "top_p": some(1.0, 0.99, 0.9, rng.uniform(0.01, 1), 1e-7, 5e-324, 0.9999999),
        "typical_p": some(1.0, 0.97123, rng.uniform(0.01, 1), 1e-7, 5e-324, 0.9999999),
        "min_p": some(0.0, 1e-6, 0.05, rng.uniform(0, 1), 1.0, 5e-324),
        "repetition_penalty": some(1.0, 1.1, 1.7, 0.1, 5e-324, 1e-40, 1e38, 1e300, 1 + 1e-12),
        "presence_penalty": some(0.0, -2, 2, 1e-320, rng.uniform(-2, 2)),
        "frequency_penalty": some(0.0, -2, 2, 1e-40, rng.uniform(-2, 2)),
        "logit_bias": some((), {t: rng.uniform(-100, 100) for t in tokens(1, 3)}, dict.fromkeys(tokens(1, 9), 0.1)),
        "allowed_token_ids": some(None, tokens(1, 3), tokens(size // 2, size)),
        "bad_words_ids": some((), (tokens(1, 1), small[:2], small[2:]), tuple((t,) for t in tokens(1, 4))),
        "min_tokens": some(0, 3, 20, 10**30),
        "max_tokens": None,
        "seed": rng.choice([0, -1, 2**63 - 1, -(2**63), rng.randrange(-(2**63), 2**63)]),
        "logprobs": some(None, 0, 1, 5, MAX_LOGPROBS),
    }


def random_row(rng: random.Random, arrays: np.random.Generator, size: int) -> tuple[F32, Position]:
    logits_V = np.array(logits_of(rng.choice(KINDS), size, arrays), np.float32)
    if rng.random() < 0.1:
        bad = rng.choice([math.nan, INF, -INF, 3.4e38, -3.4e38])
        logits_V[rng.randrange(size) if rng.random() < 0.8 else slice(None)] = bad
    prompt = arrays.integers(0, size, rng.randint(1, 12))
    answer = arrays.integers(0, min(size, 4) if rng.random() < 0.5 else size, rng.choice([0, 1, 2, 5, 40]))
    if rng.random() < 0.02:
        answer = np.resize(answer, 5000) if len(answer) else answer
    mask = rng.randbytes(-(-size // 8)) if rng.random() < 0.2 else None
    stop_ids = rng.choice([(), (size - 1,), (0, 2, size + 2)])
    params = random_params(rng, size)
    return logits_V, position(size, answer.tolist(), prompt.tolist(), stop_ids, mask, **params)


SIZES = ((5, 1150), (8, 1150), (17, 1150), (97, 800), (255, 500), (1000, 300), (5003, 60), (49_152, 24), (60_000, 8))
"""Vocabulary and rows, of one instruction set: 5,142 of them."""


@pytest.mark.parametrize("isa", SETS)
def test_random_rows(isa: str) -> None:
    found: Counter[str] = Counter()
    for size, count in SIZES:
        rng = random.Random(f"{isa} {size}")
        arrays = np.random.default_rng(rng.randrange(2**32))
        scratch = kernels.SampleScratch(isa, size)
        for start in range(0, count, 50):
            pairs = [random_row(rng, arrays, size) for _ in range(min(50, count - start))]
            found += check(scratch, np.stack([logits_V for logits_V, _ in pairs]), [one for _, one in pairs])
    assert found["nan_logits"] > 100 and found["no_token_allowed"] > 100 and found["token"] > 3000, found
    assert found["unsure"] <= 5 and sum(found.values()) == sum(count for _, count in SIZES), found


FILTERS: tuple[dict[str, float], ...] = (
    {},
    {"top_k": 50},
    {"top_k": 30_000},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_p": 0.9, "top_k": 50},
    {"typical_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 40_000, "typical_p": 0.95, "top_p": 0.95, "min_p": 1e-3},
)


@pytest.mark.parametrize("isa", SETS)
def test_large_vocabularies(isa: str) -> None:
    """Peaked as models are, and all but flat; each filter, cool and hot."""
    rng = np.random.default_rng(7)
    size = 49_152
    scratch = kernels.SampleScratch(isa, size)
    peaked = rng.gumbel(0, 2.5, (len(FILTERS), size)).clip(None, 13).astype(np.float32)
    peaked[:, rng.integers(0, size, 12)] = rng.uniform(10, 19, (len(FILTERS), 12))
    for logits_PV in (peaked, peaked / np.float32(12), np.round(peaked)):
        for temperature in (0.7, 2.0):
            rows = [
                position(size, [0] * i, temperature=temperature, seed=i, logprobs=i, **params)  # type: ignore[arg-type]
                for i, params in enumerate(FILTERS)
            ]
            assert check(scratch, logits_PV, rows)["unsure"] == 0


@st.composite
def requests(draw: st.DrawFn) -> tuple[F32, Position]:
    size = draw(st.integers(1, 70))
    token = st.integers(0, size - 1)
    finite = st.floats(-80, 80, width=32) | st.sampled_from([0.0, -0.0, 1.0, 1.0000001192092896, -INF])
    logits = draw(st.lists(finite | st.floats(width=32), min_size=size, max_size=size))
    one = position(
        size,
        draw(st.lists(token, max_size=8)),
        draw(st.lists(token, min_size=1, max_size=6)),
        draw(st.lists(st.integers(0, size + 3), max_size=3)),
        draw(st.none() | st.binary(min_size=-(-size // 8), max_size=-(-size // 8))),
        temperature=draw(st.sampled_from([0.0, 1e-5, 0.5, 1.0, 2.0]) | st.floats(0, 2)),
        top_k=draw(st.integers(-1, size + 2)),
        top_p=draw(st.just(1.0) | st.floats(0, 1, exclude_min=True)),
        typical_p=draw(st.just(1.0) | st.floats(0, 1, exclude_min=True)),
        min_p=draw(st.just(0.0) | st.floats(0, 1)),
        repetition_penalty=draw(st.just(1.0) | st.floats(0, exclude_min=True, allow_infinity=False)),
        presence_penalty=draw(st.just(0.0) | st.floats(-2, 2)),
        frequency_penalty=draw(st.just(0.0) | st.floats(-2, 2)),
        logit_bias=draw(st.dictionaries(token, st.floats(-100, 100), max_size=4)),
        allowed_token_ids=draw(st.none() | st.lists(token, min_size=1)),
        bad_words_ids=draw(st.lists(st.lists(token, min_size=1, max_size=3), max_size=4)),
        min_tokens=draw(st.integers(0, 6)),
        seed=draw(st.none() | st.integers(-(2**63), 2**63 - 1)),
        logprobs=draw(st.none() | st.integers(0, MAX_LOGPROBS)),
    )
    return np.array(logits, np.float32), one


@settings(max_examples=250)
@given(requests(), st.sampled_from(SETS))
def test_any_request(request_: tuple[F32, Position], isa: str) -> None:
    logits_V, one = request_
    check(kernels.SampleScratch(isa, len(logits_V)), logits_V[None], [one])


# ---------------------------------------------------------------- by name


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
@pytest.mark.parametrize("place", [0, 1, 2**32 - 1, 2**32, 2**40 + 5, 2**63 - 1])
def test_noise(isa: str, seed: int, place: int) -> None:
    for first in (0, 4, 49_152, 2**31 - 256):
        wanted = uniform_words(seed, place, np.arange(first, first + 256))
        assert kernels.noise_words(isa, seed, place, first) == wanted.tolist()


@pytest.mark.parametrize("isa", SETS)
def test_noise_of_single_ids(isa: str) -> None:
    rng = np.random.default_rng(6)
    for count in (1, 2, 7, 8, 9, 40, 255, 256):
        ids = rng.integers(0, 2**31, count, dtype=np.int32)
        for seed, place in ((0, 0), (-5, 3), (2**63 - 1, 2**40 + 5)):
            wanted = uniform_words(seed, place, ids.astype(np.int64))
            assert kernels.noise_words_of(isa, seed, place, ids) == wanted.tolist()


@pytest.mark.parametrize("isa", SETS)
def test_rough_sums(isa: str) -> None:
    """Within the bound that the draw from a nucleus is built on, 2e-4."""
    rng = np.random.default_rng(8)
    for size in (1, 15, 16, 17, 1000, 1024, 1025, 70_001):
        for temperature in (1e-5, 0.01, 0.5, 1.0, 2.0):
            for scale in (0.0, 1e-3, 1.0, 4.0, 80.0, 1e30):
                values = (rng.standard_normal(size) * scale * temperature + rng.uniform(-50, 50)).astype(np.float32)
                values[rng.random(size) < 0.1] = -INF
                values[rng.integers(size)] = peak = np.float32(max(float(values.max()), 0.0))
                weights = np.exp((values.astype(np.float64) - peak) / temperature)
                for floor in (-INF, float(peak), float(peak) - temperature):
                    wanted = weights[values >= floor].sum()
                    found = kernels.sum_roughly(isa, values, floor, float(peak), temperature)
                    assert abs(found - wanted) <= 2e-4 * wanted, (size, temperature, scale, floor)


@pytest.mark.parametrize("isa", SETS)
def test_nuclei_that_end_exactly_where_a_sum_does(isa: str) -> None:
    """Of equal logits, top_p = i / n keeps the first i ids: rough sums cannot tell whether the one at the end is in."""
    tokens: Counter[int] = Counter()
    for size, kept in ((2, 1), (4, 1), (8, 6), (64, 16), (1024, 3), (65_536, 2), (65_536, 40_000)):
        logits_PV = np.zeros((40, size), np.float32)
        rows = [position(size, temperature=1.0, seed=i, top_p=kept / size) for i in range(40)]
        assert check(kernels.SampleScratch(isa, size), logits_PV, rows) == {"token": 40}
        found = [one.token for one in native(kernels.SampleScratch(isa, size), logits_PV, rows)]  # type: ignore[union-attr]
        assert max(found) < kept
        tokens.update({kept: sum(token == kept - 1 for token in found)})
    assert tokens[1] == 80 and tokens[6] > 0 and tokens[3] > 0 and tokens[2] > 0, tokens


FAULTS: tuple[tuple[list[float], dict[str, Any], str], ...] = (
    ([0, math.nan, 0], {}, "nan_logits"),
    ([0, INF, 0], {"temperature": 1.0, "seed": 1}, "nan_logits"),
    ([math.nan, 0, INF], {"mask": b"\xf8"}, "nan_logits"),
    ([0, math.nan, 0], {"mask": b""}, "nan_logits"),
    ([0, 0, 0], {"mask": b"\xf8"}, "no_token_allowed"),
    ([-INF, -INF, -INF], {}, "no_token_allowed"),
    ([-INF, -INF, 0], {"allowed_token_ids": [0, 1], "logit_bias": {0: 100}}, "no_token_allowed"),
    ([0, 0, 0], {"bad_words_ids": [[0], [1], [2]], "temperature": 1.0}, "no_token_allowed"),
    ([-INF, -INF, 0], {"stop_ids": [2, 9], "min_tokens": 1, "repetition_penalty": 0.1}, "no_token_allowed"),
    ([0, 0, 0], {"mask": b""}, "engine_fault"),
    ([0, 0, 0], {"mask": b"\xff\xff"}, "engine_fault"),
    ([-INF, -INF, -INF], {"mask": b"\xff\xff", "temperature": 1.0}, "engine_fault"),
    ([0, 0, 0], {"temperature": 0.5}, "engine_fault"),
)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize(("logits", "params", "code"), FAULTS)
def test_faults(isa: str, logits: list[float], params: dict[str, Any], code: str) -> None:
    """The code and the message; of two faults the same one."""
    logits_PV = np.array([logits], np.float32)
    one = position(3, **params)
    found = native(kernels.SampleScratch(isa, 3), logits_PV, [one])
    assert found == sample(logits_PV, [one])
    assert isinstance(found[0], RowError) and found[0].code == code


def test_a_token_outside_the_vocabulary_is_the_rows_fault() -> None:
    scratch = kernels.SampleScratch(SETS[-1], 3)
    logits_PV = np.zeros((2, 3), np.float32)
    for token in (3, -4, 2**31 - 1):
        for params in ({"repetition_penalty": 2.0}, {"presence_penalty": 1.0}):
            rows = [position(3, [token], **params), position(3, [1], **params)]  # type: ignore[arg-type]
            bad, good = native(scratch, logits_PV, rows)
            assert isinstance(bad, RowError) and bad.code == "engine_fault" and f"token id {token} " in bad.message
            assert [good] == sample(logits_PV[1:], rows[1:])


@pytest.mark.parametrize(
    "params",
    [
        {"allowed_token_ids": [1, 5]},
        {"logit_bias": {2**63 - 1: 1.0}},
        {"bad_words_ids": [[1, 5]], "allowed_token_ids": [1, 9, 2], "logit_bias": {6: 1.0}},
        {"bad_words_ids": [[7], [5, 1]]},
    ],
)
def test_the_ids_of_a_row_are_inside_the_vocabulary(params: dict[str, Any]) -> None:
    sampling = SamplingParams(**params)
    with pytest.raises(EngineError) as wanted:
        RowSampling(sampling, 1, (), 5)
    with pytest.raises(EngineError) as found:
        kernels.RowSampling(sampling, 1, (), 5)
    assert str(found.value) == str(wanted.value)


@pytest.mark.parametrize("isa", SETS)
def test_ties_go_to_the_lowest_id(isa: str) -> None:
    rng = np.random.default_rng(5)
    for size in (4, 33, 700, 20_000):
        logits_PV = rng.integers(-1, 2, (12, size)).astype(np.float32) * rng.choice([0.0, -0.0, 3e-39, 1.0], (12, 1))
        logits_PV[:, size // 2 :: 3] *= np.float32(-1)  # zeros of both signs
        for params in ({}, {"top_k": size // 3}, {"top_p": 0.4}, {"typical_p": 0.4}, {"temperature": 0.0}):
            full = {"temperature": 1.0, "logprobs": MAX_LOGPROBS, **params}
            rows = [position(size, seed=i, **full) for i in range(12)]  # type: ignore[arg-type]
            check(kernels.SampleScratch(isa, size), logits_PV, rows)


@pytest.mark.parametrize("isa", SETS)
def test_scores(isa: str) -> None:
    rng = np.random.default_rng(4)
    for size in (1, 5, 40, 3001):
        logits_PV = (rng.standard_normal((6, size)) * 9).astype(np.float32)
        logits_PV[1] = np.round(logits_PV[1] / 9)
        logits_PV[2, : size // 2] = -INF
        tokens = rng.integers(0, size, 6).tolist()
        scratch = kernels.SampleScratch(isa, size)
        for count in (0, 1, 5, MAX_LOGPROBS):
            wanted = score(logits_PV, tokens, count)
            found = [out_of(one) for one in scratch.score(logits_PV, tokens, count)]
            for i, one in enumerate(found):
                assert isinstance(one, Sampled) and one.token == tokens[i]
                assert same_logprobs(one.logprobs, wanted[i], logits_PV[i])
        for bad in (math.nan, INF):
            logits_PV[3, size - 1] = bad
            assert [bool(code) for code, *_ in scratch.score(logits_PV, tokens, 2)] == [i == 3 for i in range(6)]
            assert scratch.score(logits_PV, tokens, 2)[3][0] == "nan_logits"


@pytest.mark.parametrize("isa", SETS)
def test_a_row_depends_on_nothing_else(isa: str) -> None:
    """Alone, backwards, from another scratch, on two threads at once: the same tokens and the same bytes of
    log-probabilities; and the logits are left as they were."""
    size = 8_000
    rng, arrays = random.Random(3), np.random.default_rng(3)
    pairs = [random_row(rng, arrays, size) for _ in range(60)]
    logits_PV, positions = np.stack([logits_V for logits_V, _ in pairs]), [one for _, one in pairs]
    before = logits_PV.copy()
    scratch = kernels.SampleScratch(isa, size)
    wanted = native(scratch, logits_PV, positions)
    assert native(scratch, logits_PV[::-1].copy(), positions[::-1])[::-1] == wanted
    alone = [native(kernels.SampleScratch(isa, size), logits_PV[i : i + 1], positions[i : i + 1]) for i in range(60)]
    assert [out for (out,) in alone] == wanted

    found: dict[int, list[list[Out]]] = {0: [], 1: []}

    def work(thread: int) -> None:
        own = kernels.SampleScratch(isa, size)
        found[thread] = [native(own, logits_PV, positions) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(i,)) for i in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(runs) == 4 and all(run == wanted for run in runs) for runs in found.values())
    assert np.array_equal(logits_PV, before, equal_nan=True)


def test_calls_that_do_not_fit_are_refused() -> None:
    scratch = kernels.SampleScratch(SETS[0], 4)
    logits_PV, token_ids = np.zeros((1, 4), np.float32), [np.zeros(2, np.int32)]
    row, other = (kernels.RowSampling(SamplingParams(), 2, (), size) for size in (4, 5))
    for rows, tokens, masks in (
        ([], token_ids, [None]),
        ([row], [], [None]),
        ([row], token_ids, []),
        ([other], token_ids, [None]),
        ([row], [np.zeros(1, np.int32)], [None]),
    ):
        with pytest.raises(ValueError, match=r"rows|token_ids"):
            scratch.sample(logits_PV, rows, tokens, masks)
    with pytest.raises(ValueError, match="vocabulary"):
        scratch.sample(np.zeros((1, 5), np.float32), [row], token_ids, [None])
    for scored, count in (([4], 1), ([-1], 1), ([0, 0], 1), ([0], MAX_LOGPROBS + 1)):
        with pytest.raises(ValueError, match=r"token_ids|count"):
            scratch.score(logits_PV, scored, count)
