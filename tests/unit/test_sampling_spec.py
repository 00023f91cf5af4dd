"""`headrace.backends.sampling` held against `sampling_oracle`, a slow sampler that was written apart from it."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.backends.philox import gumbel, philox4x32, uniform_words
from headrace.backends.sampling import Position, RowSampling, Sampled, sample
from headrace.core.types import RowError, SamplingParams
from tests.unit import sampling_oracle as oracle
from tests.unit.sampling_cases import INF, KINDS, check, check_all, draw, ids, logits_of, position_of, row_of
from tests.unit.sampling_oracle import Case

KNOWN = (
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
"""Random123's `kat_vectors`, philox4x32-10: counter, key, words."""


# ---------------------------------------------------------------- the oracle against figures from elsewhere


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    assert oracle.philox(counter, key) == words
    assert tuple(int(word) for word in philox4x32(counter, (key[0], key[1]))) == words


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**32, -(2**32), 0x123456789ABCDEF])
@pytest.mark.parametrize("place", [0, 1, 2**32 - 1, 2**32, 2**40 + 5])
def test_gumbels(seed: int, place: int) -> None:
    for tokens in (range(21), [0], [3, 4, 5], [1, 1000, 49_151], [6, 2**31, 2**31 + 7]):
        slow = oracle.gumbels(seed, place, tokens)
        assert gumbel(seed, place, ids(list(tokens))).tolist() == pytest.approx(list(slow.values()), rel=1e-14)
        uniform = [math.exp(-math.exp(-noise)) for noise in slow.values()]
        fast = (uniform_words(seed, place, ids(list(tokens))).astype(np.float64) + 0.5) / 2**32
        assert fast.tolist() == pytest.approx(uniform, rel=1e-9)


def test_float32_rounding() -> None:
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal(2000) * 10.0 ** rng.integers(-20, 20, 2000) for _ in range(2))
    left, right = left.astype(np.float32), right.astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        for fast, slow in ((left + right, "__add__"), (left * right, "__mul__"), (left / right, "__truediv__")):
            pairs = zip(left.tolist(), right.tolist(), strict=True)
            assert fast.tolist() == [oracle.f32(getattr(one, slow)(other)) for one, other in pairs]


@pytest.mark.parametrize(
    ("statistic", "freedom", "tail"),
    [  # tables of the 5 %, 1 % and 0.1 % points; of two degrees the tail is exp(-x / 2)
        (3.841458820694124, 1, 0.05),
        (5.991464547107979, 2, 0.05),
        (18.307038053275146, 10, 0.05),
        (23.209251158954356, 10, 0.01),
        (29.58829844507442, 10, 0.001),
        (124.34211340400407, 100, 0.05),
        (60.0, 2, math.exp(-30)),
        (0.2, 2, math.exp(-0.1)),
        (0.0, 3, 1.0),
    ],
)
def test_chi_square_tail(statistic: float, freedom: int, tail: float) -> None:
    assert oracle.chi_square_tail(statistic, freedom) == pytest.approx(tail, rel=1e-9)


LN = math.log
HALVES = (LN(8), LN(4), LN(2), LN(1), LN(1))
"""Probabilities 1/2, 1/4, 1/8, 1/16, 1/16: surprises of 1, 2, 3, 4, 4 bits, 1.875 expected."""


@pytest.mark.parametrize(
    ("params", "left"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 4}, [0, 1, 2, 3]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.5001}, [0, 1]),
        ({"top_p": 0.4999}, [0]),
        ({"top_p": 0.9}, [0, 1, 2, 3]),
        ({"top_p": 1e-300}, [0]),
        ({"min_p": 0.26}, [0, 1]),
        ({"min_p": 0.24}, [0, 1, 2]),
        ({"min_p": 1.0}, [0]),
        # Distances from 1.875 bits: 0.875, 0.125, 1.125, 2.125, 2.125. The likeliest is second.
        ({"typical_p": 0.2}, [1]),
        ({"typical_p": 0.3}, [0, 1]),
        ({"typical_p": 0.8}, [0, 1, 2]),
        ({"typical_p": 0.9}, [0, 1, 2, 3]),
        # Of the first three, renormalised: 4/7, 2/7, 1/7.
        ({"top_k": 3, "top_p": 0.56}, [0]),
        ({"top_k": 3, "top_p": 0.58}, [0, 1]),
        # Typical leaves the second alone: a min_p of what is left keeps it.
        ({"typical_p": 0.2, "min_p": 1.0}, [1]),
        ({"typical_p": 0.3, "top_p": 0.66}, [0]),
        ({"typical_p": 0.3, "top_p": 0.67}, [0, 1]),
        ({"temperature": 2.0, "min_p": 0.51}, [0, 1]),
        ({"temperature": 0.5, "min_p": 0.26}, [0]),
    ],
)
def test_filters_by_hand(params: dict[str, float], left: list[int]) -> None:
    sampling = SamplingParams(**{"temperature": 1.0, "seed": 0, **params})  # type: ignore[arg-type]
    logits = tuple(oracle.f32(value) for value in HALVES)
    assert list(oracle.kept(logits, sampling).weights) == left
    cases = [Case(logits, replace(sampling, seed=seed)) for seed in range(400)]
    drawn = {out.token for out in draw(cases) if isinstance(out, Sampled)}
    assert drawn == set(left), "400 draws find every id of 1/16, and none that is cut"


def rounded(number: float) -> float:
    return float(np.float32(number))


def test_masks_and_penalties_by_hand() -> None:
    logits = (1.0, -1.0, 2.0, 4.0, 0.0)
    sampling = SamplingParams(repetition_penalty=2, frequency_penalty=0.5, presence_penalty=0.25)
    case = Case(logits, sampling, prompt=(0, 1, 1, 4), answer=(2, 2, 1))
    # 0: 1 / 2. 1: -1 × 2 - 0.5 - 0.25. 2: 2 / 2 - 2 × 0.5 - 0.25. 3: untouched. 4: 0 × 2.
    assert oracle.adjusted(case) == [0.5, -2.75, -0.25, 4.0, 0.0]
    sampling = SamplingParams(
        logit_bias=((0, 100), (1, 0.1), (3, -100)),
        allowed_token_ids=(0, 1, 2, 3),
        bad_words_ids=((2, 1, 2), (1, 0, 3), (9, 2, 2, 1, 0)),
        min_tokens=4,
        repetition_penalty=1.5,
    )
    case = Case(logits, sampling, prompt=(3, 9), answer=(2, 2, 1), stop_ids=(1, 77), mask=b"\xfd")
    # 1: a stop id, 2: the end of a bad word, 4: not allowed. 0 is in neither prompt nor answer; 3 is in the prompt.
    assert oracle.adjusted(case) == [101.0, -INF, -INF, -144.0, -INF]
    # The fifth token: nothing stops, no bad word matches; a bias in float32.
    case = replace(case, answer=(2, 2, 1, 2), mask=None)
    wanted = rounded(rounded(-1.0 + rounded(0.1)) * 1.5)
    assert oracle.adjusted(case) == [101.0, wanted, rounded(2 / 1.5), -144.0, -INF]
    assert oracle.adjusted(replace(case, mask=b"\xfe"))[0] == -INF


# ---------------------------------------------------------------- each field alone

PROMPT = (1, 2, 2, 6, 0)
ANSWER = (3, 5, 3, 3, 5, 2, 5)


def alone() -> Iterator[tuple[str, dict[str, object]]]:
    for top_k in (-1, 0, 1, 2, 3, "V - 1", "V", "V + 5"):
        yield "top_k", {"top_k": top_k}
    for top_p in (5e-324, 1e-9, 0.1234567, 0.5123456, 0.9123456, 0.9999, 1.0):
        yield "top_p", {"top_p": top_p}
    for min_p in (0.0, 1e-300, 1e-9, 0.0512345, 0.5123456, 0.9999999, 1.0):
        yield "min_p", {"min_p": min_p}
    for typical_p in (5e-324, 1e-9, 0.1234567, 0.5123456, 0.9123456, 0.9999, 1.0):
        yield "typical_p", {"typical_p": typical_p}
    for repetition in (5e-324, 1e-40, 0.1, 0.7, 1.0, 1 + 1e-9, 1.1, 5.0, 1e38, 1e300):
        yield "repetition_penalty", {"repetition_penalty": repetition}
    for name in ("presence_penalty", "frequency_penalty"):
        for value in (-2.0, -0.1, 0.0, 0.1, 0.7, 2.0):
            yield name, {name: value}
    for bias in ({0: 100.0}, {0: -100.0}, {3: 0.1, 5: -0.1}, {2: 1.7, 6: 1e-30}, dict.fromkeys(range(7), -100.0)):
        yield "logit_bias", {"logit_bias": bias}
    for allowed in ((0,), (6, 3), (5, 5, 1), tuple(range(7))):
        yield "allowed_token_ids", {"allowed_token_ids": allowed}
    for bad in (((4,), (1,)), ((5, 0),), ((2, 5, 1), (5, 2, 3)), ((5, *ANSWER),), (tuple(range(7)),)):
        yield "bad_words_ids", {"bad_words_ids": bad}
    for least in (0, 1, len(ANSWER), len(ANSWER) + 1, 100):
        yield "min_tokens", {"min_tokens": least}


@pytest.mark.parametrize(("name", "params"), list(alone()))
@pytest.mark.parametrize("size", [7, 97, 1000])
def test_each_field_alone(name: str, params: dict[str, object], size: int) -> None:
    sizes = {"V - 1": size - 1, "V": size, "V + 5": size + 5}
    params = {key: sizes.get(value, value) if isinstance(value, str) else value for key, value in params.items()}
    rng = np.random.default_rng(size)
    cases = []
    for place, kind in enumerate(KINDS):
        logits = logits_of(kind, size, rng)
        for temperature in (0.0, 1e-4, 0.7, 2.0) if size < 1000 else (0.0, 0.7):
            answer = ANSWER[: len(ANSWER) - place % 3]
            sampling = SamplingParams(temperature=temperature, seed=size, logprobs=place, **params)  # type: ignore[arg-type]
            cases.append(Case(logits, sampling, PROMPT, answer, stop_ids=(0, 3, size + 3)))
    check_all(cases, unsure=0.1)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"top_k": 50, "top_p": 0.91234},
        {"typical_p": 0.8123456},
        {"min_p": 0.0512345, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
        {"top_p": 0.9871234, "temperature": 2.0},
        {"top_k": 20_000, "temperature": 0.01},
    ],
)
def test_a_large_vocabulary(params: dict[str, float]) -> None:
    size = 49_152
    rng = np.random.default_rng(len(params))
    logits = logits_of("plain", size, rng)
    sampling = SamplingParams(**{"temperature": 0.8, "seed": 5, "logprobs": 20, **params})  # type: ignore[arg-type]
    history = tuple(rng.integers(0, size, 300).tolist())
    mask = rng.integers(0, 256, size // 8, np.uint8).tobytes()
    check_all([Case(logits, sampling, history[:200], history[200:], mask=mask)])


BAD_ENDINGS = [
    (((4,),), True),
    (((3, 4),), True),
    (((5, 3, 4),), True),
    (((2, 5, 3, 4),), True),
    (((4, 4), (6,), (3, 4)), True),
    (((5, 4),), False),
    (((2, 3, 4),), False),
    (((2, 5, 4),), False),
    (((3, 5, 4),), False),
    (((1, 2, 5, 3, 4),), False),  # the prompt's last id, then the whole answer
    (((3, 4, 1),), False),
    (((3, 4, 0),), False),
]


@pytest.mark.parametrize(("bad", "banned"), BAD_ENDINGS)
@pytest.mark.parametrize("temperature", [0.0, 1e-3])
def test_bad_words(bad: tuple[tuple[int, ...], ...], banned: bool, temperature: float) -> None:
    logits = (0.0, 1.0, 2.0, 3.0, 9.0, 8.0, 4.0)
    sampling = SamplingParams(temperature=temperature, seed=1, bad_words_ids=bad)
    case = Case(logits, sampling, prompt=(0, 1), answer=(2, 5, 3))
    (out,) = draw([case])
    assert isinstance(out, Sampled) and out.token == (5 if banned else 4)
    check(case, out)
    # With nothing answered yet only words of one id hold, whatever the prompt ends in.
    one = any(sequence == (4,) for sequence in bad)
    case = replace(case, prompt=(0, 1, 2, 5, 3), answer=())
    (out,) = draw([case])
    assert isinstance(out, Sampled) and out.token == (5 if one else 4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_round_to_float32(temperature: float) -> None:
    """Where one rounding fewer gives another value: id 0, which nothing touches, ties with the right value of id 1 and
    wins, and loses if it is one step of float32 lower."""
    rng = random.Random(8)
    found: Counter[str] = Counter()
    cases: list[Case] = []
    while len(cases) < 300:
        value, count = oracle.f32(rng.uniform(0.5, 30)), rng.randrange(1, 8)
        repetition, frequency = rng.choice([1.0, 1.1, 1.3, 0.7]), rng.choice([0.1, 0.3, 0.7])
        presence, bias = rng.choice([0.1, 0.9, -0.3]), rng.choice([0.1, 0.0, 1.7])
        sampling = SamplingParams(
            temperature=temperature,
            seed=len(cases),
            top_k=1,
            repetition_penalty=repetition,
            frequency_penalty=frequency,
            presence_penalty=presence,
            logit_bias={1: bias},  # type: ignore[arg-type]
        )
        case = Case((0.0, value, -INF), sampling, prompt=(2,), answer=(1,) * count)
        after = oracle.adjusted(case)[1]
        once = oracle.f32((value + bias) / repetition - frequency * count - presence)
        if once == after or value + bias < 0:
            continue
        found["up" if after > once else "down"] += 1
        lower = float(np.nextafter(np.float32(after), np.float32(-INF)))
        cases += [replace(case, logits=(rival, value, -INF)) for rival in (after, lower)]
    assert [out.token for out in draw(cases) if isinstance(out, Sampled)] == [0, 1] * 150
    assert min(found["up"], found["down"]) > 30


# ---------------------------------------------------------------- everything at once


def random_case(rng: random.Random, size: int) -> Case:
    """A request with each field on as often as not; its logits and answer are filled in as it is drawn."""

    def some(*values: object) -> object:
        return rng.choice(values)

    def tokens(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(size) for _ in range(rng.randint(least, most)))

    small = tuple(rng.randrange(min(size, 6)) for _ in range(8))
    params: dict[str, object] = {
        "temperature": some(0.0, 1e-4, 0.01, 0.3, 0.7, 1.0, 1.37, 2.0, 9.9e-6, 1.1e-5),
        "top_k": some(0, -1, 1, 2, 3, 5, 20, size - 1, size, size + 5),
        "top_p": some(1.0, 1.0, 1.0, 0.99123, 0.912345, rng.uniform(0.01, 1), 1e-7),
        "typical_p": some(1.0, 1.0, 1.0, 0.97123, rng.uniform(0.01, 1), 1e-7),
        "min_p": some(0.0, 0.0, 0.0, 1e-6, rng.uniform(0, 0.3), rng.uniform(0, 1), 1.0),
        "repetition_penalty": some(1.0, 1.0, 1.1, 1.7, 0.1, 5.0, rng.uniform(0.5, 2)),
        "presence_penalty": some(0.0, 0.0, -2, 2, rng.uniform(-2, 2)),
        "frequency_penalty": some(0.0, 0.0, -2, 2, rng.uniform(-2, 2)),
        "logit_bias": some((), (), {t: rng.uniform(-100, 100) for t in tokens(1, 3)}, dict.fromkeys(tokens(1, 9), 0.1)),
        "allowed_token_ids": some(None, None, tokens(1, 3), tokens(size // 2, size)),
        "bad_words_ids": some((), (), (tokens(1, 1), small[:2], small[2:5]), tuple((t,) for t in tokens(1, 4))),
        "min_tokens": some(0, 0, 3, 20, 100),
        "seed": rng.randrange(-(2**63), 2**63),
        "logprobs": some(None, None, 0, 1, 5, 20),
    }
    sampling = SamplingParams(**params)  # type: ignore[arg-type]
    stop_ids = some((), (size - 1,), (0, 2, size + 2))
    return Case((), sampling, tokens(1, 12), (), stop_ids)  # type: ignore[arg-type]


def random_mask(rng: random.Random, size: int) -> bytes | None:
    return None if rng.random() < 0.7 else rng.randbytes(-(-size // 8))


REQUESTS, DRAWS = 500, 30


@pytest.mark.parametrize("size", [7, 13, 64, 97])
def test_500_requests_of_any_fields(size: int) -> None:
    """Each is drawn 30 times, its answer growing, 25 side by side; then all at once and backwards, from rows made anew:
    what a row remembers of one draw must not show in another."""
    rng = random.Random(size)
    arrays = np.random.default_rng(size)
    unsure = compared = 0
    for _ in range(REQUESTS // 4 // 25):
        cases = [random_case(rng, size) for _ in range(25)]
        rows = [RowSampling(case.sampling, len(case.prompt), case.stop_ids, size) for case in cases]
        # One buffer a row, as an engine has it: the positions are views of what is filled so far.
        buffers = [np.zeros(len(case.prompt) + DRAWS, np.int64) for case in cases]
        for buffer, case in zip(buffers, cases, strict=True):
            buffer[: len(case.prompt)] = case.prompt
        seen: list[list[tuple[Case, Sampled | RowError]]] = [[] for _ in cases]
        for step in range(DRAWS):
            for i, case in enumerate(cases):
                logits = logits_of(rng.choice(KINDS[:6]), size, arrays)
                cases[i] = replace(case, logits=logits, mask=random_mask(rng, size))
            positions = [
                Position(row, buffer[: len(case.prompt) + step], case.mask)
                for row, buffer, case in zip(rows, buffers, cases, strict=True)
            ]
            outs = sample(np.array([case.logits for case in cases], np.float32), positions)
            for i, (case, out) in enumerate(zip(cases, outs, strict=True)):
                compared += 1
                unsure += not check(case, out)
                seen[i].append((case, out))
                # Where all is masked the answer goes on with any id. Small ids repeat, and end bad words.
                token = out.token if isinstance(out, Sampled) and rng.random() < 0.6 else rng.randrange(min(size, 6))
                buffers[i][len(case.prompt) + step] = token
                cases[i] = replace(case, answer=(*case.answer, token))
        for history in seen[::5]:
            row = row_of(history[0][0])
            backwards = history[::-1]
            logits_PV = np.array([case.logits for case, _ in backwards], np.float32)
            again = sample(logits_PV, [position_of(case, row) for case, _ in backwards])
            assert again == [out for _, out in backwards]
    assert compared == REQUESTS // 4 * DRAWS and unsure < 0.02 * compared, (unsure, compared)


@st.composite
def hypothetical_cases(draw: st.DrawFn) -> Case:
    size = draw(st.integers(1, 40))
    token = st.integers(0, size - 1)
    finite = st.floats(-80, 80, width=32) | st.sampled_from([0.0, -0.0, 1.0, 1.0000001192092896, -INF])
    sampling = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1e-4, 0.5, 1.0, 2.0]) | st.floats(0.01, 2)),
        top_k=draw(st.integers(-1, size + 2)),
        top_p=draw(st.just(1.0) | st.floats(0.001, 1)),
        typical_p=draw(st.just(1.0) | st.floats(0.001, 1)),
        min_p=draw(st.just(0.0) | st.floats(0, 1)),
        repetition_penalty=draw(st.just(1.0) | st.floats(0.05, 20)),
        presence_penalty=draw(st.just(0.0) | st.floats(-2, 2)),
        frequency_penalty=draw(st.just(0.0) | st.floats(-2, 2)),
        logit_bias=draw(st.dictionaries(token, st.floats(-100, 100), max_size=4)),  # type: ignore[arg-type]
        allowed_token_ids=draw(st.none() | st.lists(token, min_size=1).map(tuple)),
        bad_words_ids=draw(st.lists(st.lists(token, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple)),
        min_tokens=draw(st.integers(0, 6)),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        logprobs=draw(st.none() | st.integers(0, 20)),
    )
    return Case(
        logits=tuple(draw(st.lists(finite, min_size=size, max_size=size))),
        sampling=sampling,
        prompt=tuple(draw(st.lists(token, min_size=1, max_size=6))),
        answer=tuple(draw(st.lists(token, max_size=8))),
        stop_ids=tuple(draw(st.lists(st.integers(0, size + 3), max_size=3))),
        mask=draw(st.none() | st.binary(min_size=-(-size // 8), max_size=-(-size // 8))),
    )


@settings(max_examples=200)
@given(hypothetical_cases())
def test_any_request(case: Case) -> None:
    (out,) = draw([case])
    check(case, out)


def test_a_refused_draft_leaves_no_trace() -> None:
    sampling = SamplingParams(
        frequency_penalty=2, presence_penalty=1, repetition_penalty=1.5, bad_words_ids=((4, 0),), min_tokens=3
    )
    row = RowSampling(sampling, 2, (5,), 6)
    logits = (3.0, 2.9, 2.5, 2.0, 1.0, 4.0)
    buffer = ids([0, 1, 4, 4, 4, 0, 0])
    for answer in ((4, 4, 4), (4, 4), (4, 0), (1,), (), (0, 1, 2, 3, 4), (2,), (0, 4), (4,)):
        buffer[2 : 2 + len(answer)] = answer
        case = Case(logits, sampling, (0, 1), answer, (5,))
        (out,) = sample(np.array([logits], np.float32), [Position(row, buffer[: 2 + len(answer)])])
        assert check(case, out)
