"""Sampling: the shares of what is drawn, a prompt's log-probabilities, and rows that cannot be sampled."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from headrace.backends.sampling import RowSampling, Sampled, score
from headrace.core.errors import EngineError, NonFiniteLogits
from headrace.core.types import RowError, SamplingParams
from tests.unit import sampling_oracle as oracle
from tests.unit.sampling_cases import (
    DOUBT,
    INF,
    KINDS,
    SHARED,
    check,
    draw,
    drawn_counts,
    logits_of,
    same_logprobs,
    shares_cases,
)
from tests.unit.sampling_oracle import Case

# ---------------------------------------------------------------- distributions

DRAWS = dict.fromkeys(SHARED, 10_000) | {"temperature": 40_000}
"""As many as it takes for each wrong meaning to be told from the right one: `test_power`. Those of the temperature are
the nearest ones. `python -m tests.robustness.sampling_shares` draws more."""


@pytest.mark.parametrize("name", list(SHARED))
def test_chi_square(name: str) -> None:
    """Pearson's test of the draws against the exact shares, and of the same draws against wrong ones."""
    case, wrongs = shares_cases(name)
    counts = drawn_counts(name, DRAWS[name])
    assert counts.total() == DRAWS[name]
    assert oracle.fit(counts, oracle.distribution(case)) > DOUBT
    for wrong in wrongs:
        assert oracle.fit(counts, oracle.distribution(wrong)) < DOUBT, wrong.sampling


@pytest.mark.parametrize("name", list(SHARED))
def test_power(name: str) -> None:
    """Samples of so many draws, by numpy and other numbers each: the wrong meanings are noticed in all but a few."""
    case, wrongs = shares_cases(name)
    shares = oracle.distribution(case)
    rng = np.random.default_rng(1)
    samples = [
        dict(zip(shares, found.tolist(), strict=True))
        for found in rng.multinomial(DRAWS[name], list(shares.values()), 500)
    ]
    for wrong in wrongs:
        others = oracle.distribution(wrong)
        missed = sum(oracle.fit({i: n for i, n in one.items() if n}, others) >= DOUBT for one in samples)
        assert missed <= 2, (wrong.sampling, missed)
    assert sum(oracle.fit(one, shares) <= 0.01 for one in samples) <= 15, "what is right passes"


# ---------------------------------------------------------------- log-probabilities of a prompt, and errors


@pytest.mark.parametrize("size", [1, 7, 97, 1000])
@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_score(size: int, count: int) -> None:
    rng = np.random.default_rng(size)
    rows = [logits_of(kind, size, rng) for kind in KINDS]
    tokens = rng.integers(0, size, len(rows)).tolist()
    outs = score(np.array(rows, np.float32), tokens, count)
    for row, token, out in zip(rows, tokens, outs, strict=True):
        assert same_logprobs(out, oracle.logprobs(row, token, count))


def test_score_of_a_large_vocabulary() -> None:
    rows = [logits_of(kind, 49_152, np.random.default_rng(1)) for kind in ("plain", "ties")]
    tokens = (3, 49_151)
    for row, token, out in zip(rows, tokens, score(np.array(rows, np.float32), tokens, 20), strict=True):
        assert same_logprobs(out, oracle.logprobs(row, token, 20))


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_score_of_what_is_not_finite(bad: float) -> None:
    logits = np.zeros((3, 9), np.float32)
    logits[1, 4] = bad
    with pytest.raises(NonFiniteLogits):
        score(logits, [0, 0, 0], 2)


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("where", [0, 3, 6])
def test_what_is_not_finite_fails_its_row_alone(bad: float, temperature: float, where: int) -> None:
    """Masked or not: the model is what is wrong."""
    logits = (0.0, 1.0, 2.0, 3.0, 2.5, 1.0, 0.0)
    for params in ({}, {"allowed_token_ids": (1, 2)}, {"logit_bias": {where: -100}}, {"top_k": 1, "logprobs": 2}):
        good = Case(logits, SamplingParams(temperature=temperature, seed=3, **params))
        broken = replace(good, logits=(*logits[:where], bad, *logits[where + 1 :]))
        first, out, last = draw([good, broken, good])
        assert isinstance(out, RowError) and out.code == "nan_logits"
        assert first == last and check(good, first)


@pytest.mark.parametrize(
    "case",
    [
        Case((-INF, -INF), SamplingParams()),
        Case((-INF, 5.0), SamplingParams(allowed_token_ids=(0,))),
        Case((-INF, 5.0), SamplingParams(logit_bias={0: 100}, bad_words_ids=((1,),))),  # type: ignore[arg-type]
        Case((1.0, 5.0), SamplingParams(min_tokens=1), stop_ids=(0, 1)),
        Case((1.0, 5.0), SamplingParams(), mask=b"\xfc"),
        Case((1.0, 5.0), SamplingParams(allowed_token_ids=(1,), repetition_penalty=0.1), prompt=(1,), mask=b"\x01"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_allowed(case: Case, temperature: float) -> None:
    case = replace(case, sampling=replace(case.sampling, temperature=temperature, seed=2, logprobs=1))
    good = Case((0.0, 1.0), replace(case.sampling, allowed_token_ids=None, bad_words_ids=(), min_tokens=0))
    out, beside = draw([case, good])
    assert isinstance(out, RowError) and out.code == "no_token_allowed" and "\n" not in out.message
    assert check(good, beside) and isinstance(beside, Sampled)


@pytest.mark.parametrize("params", [{"allowed_token_ids": (2, 7)}, {"logit_bias": {7: 1}}, {"bad_words_ids": ((7,),)}])
def test_ids_outside_the_vocabulary_are_refused(params: dict[str, object]) -> None:
    with pytest.raises(EngineError, match="7"):
        RowSampling(SamplingParams(**params), 1, (), 7)  # type: ignore[arg-type]
