"""Sampling: the shares of what is drawn, a prompt's log-probabilities, and rows that cannot be sampled."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from headrace.backends.sampling import Position, RowSampling, Sampled, sample, score
from headrace.core.errors import EngineError, NonFiniteLogits
from headrace.core.types import RowError, SamplingParams
from tests.unit import sampling_oracle as oracle
from tests.unit.sampling_cases import INF, KINDS, check, draw, logits_of, position_of, row_of, same_logprobs
from tests.unit.sampling_oracle import Case

# ---------------------------------------------------------------- distributions

LOGITS = (0.3, 1.7, -0.5, 2.0, 0.0, 1.1, -1.2, 0.9, 1.6999, -3.0)

SETTINGS: dict[str, tuple[dict[str, object], tuple[dict[str, object], ...]]] = {
    # What is drawn with, and wrong meanings that must be told from it: another temperature, a cut one id off.
    "temperature": ({"temperature": 0.8}, ({"temperature": 0.85}, {"temperature": 0.75}, {"top_k": 9})),
    "top-k and top-p": ({"top_k": 6, "top_p": 0.87}, ({"top_k": 5}, {"top_p": 0.84}, {"top_p": 0.95})),
    "min_p": ({"min_p": 0.2}, ({"min_p": 0.15}, {"min_p": 0.35}, {"temperature": 1.06})),
    "typical": ({"typical_p": 0.6}, ({"typical_p": 0.75}, {"typical_p": 0.4}, {"top_p": 0.6, "typical_p": 1.0})),
    "penalties and bias": (
        {
            "repetition_penalty": 1.3,
            "presence_penalty": 0.4,
            "frequency_penalty": -0.2,
            "logit_bias": {6: 1.5, 3: -0.25},
            "temperature": 1.2,
        },
        ({"frequency_penalty": 0.0}, {"repetition_penalty": 1.0}, {"presence_penalty": 0.0}, {"logit_bias": ()}),
    ),
}

EACH = 100_000
"""Draws of each setting."""


@pytest.mark.parametrize("name", list(SETTINGS))
def test_chi_square(name: str) -> None:
    """Pearson's test of the draws against the exact shares, and of the same draws against wrong ones."""
    fields, wrongs = SETTINGS[name]
    params = {"temperature": 1.0, "seed": 11, **fields}
    sampling = SamplingParams(**params)  # type: ignore[arg-type]
    case = Case(tuple(oracle.f32(value) for value in LOGITS), sampling, prompt=(1, 1, 7), answer=(5, 3, 5, 1))
    if name == "penalties and bias":  # an answer that grows has other penalties at each place: here the seed counts up
        rows = [row_of(replace(case, sampling=replace(sampling, seed=seed))) for seed in range(EACH)]
        positions = [position_of(case, row) for row in rows]
    else:
        row, tokens = row_of(case), np.zeros(EACH + len(case.prompt), np.int64)
        positions = [Position(row, tokens[: len(case.prompt) + place]) for place in range(EACH)]
    outs = sample(np.broadcast_to(np.array(case.logits, np.float32), (EACH, len(LOGITS))), positions)
    counts = Counter(out.token for out in outs if isinstance(out, Sampled))
    assert counts.total() == EACH
    assert oracle.fit(counts, oracle.distribution(case)) > 1e-4
    for wrong in wrongs:
        other = replace(case, sampling=SamplingParams(**{**params, **wrong}))  # type: ignore[arg-type]
        assert oracle.fit(counts, oracle.distribution(other)) < 1e-4, wrong


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
