"""Runs `headrace.backends.sampling` on the oracle's cases, and holds one against the other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from headrace.backends.sampling import Position, RowSampling, Sampled, sample
from headrace.core.types import RowError, SamplingParams, TokenLogprobs
from tests.unit import sampling_oracle as oracle
from tests.unit.sampling_oracle import Case

INF = math.inf


def ids(tokens: Sequence[int]) -> NDArray[np.int64]:
    return np.array(tokens, np.int64)


def row_of(case: Case) -> RowSampling:
    return RowSampling(case.sampling, len(case.prompt), case.stop_ids, len(case.logits))


def position_of(case: Case, row: RowSampling | None = None) -> Position:
    return Position(row or row_of(case), ids(case.prompt + case.answer), case.mask)


def draw(cases: Sequence[Case]) -> list[Sampled | RowError]:
    return sample(np.array([case.logits for case in cases], np.float32), [position_of(case) for case in cases])


def same_logprobs(one: TokenLogprobs, other: TokenLogprobs) -> bool:
    return (
        one.logprob == pytest.approx(other.logprob, abs=1e-9, rel=1e-12)
        and [token for token, _ in one.top] == [token for token, _ in other.top]
        and [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-9, rel=1e-12)
    )


def check(case: Case, out: Sampled | RowError) -> bool:
    """Fails where `out` is not the oracle's answer. False: the last bits of a sum decide, so nothing was compared."""
    wanted = oracle.choose(case)
    if wanted.token is None:
        assert isinstance(out, RowError) and out.code == "no_token_allowed", (out, case)
        return True
    assert isinstance(out, Sampled), (out, case)
    if not wanted.sure:
        return False
    assert out.token == wanted.token, case
    if case.sampling.logprobs is None:
        assert out.logprobs is None
    else:
        assert out.logprobs is not None
        right = oracle.logprobs(case.logits, out.token, case.sampling.logprobs)
        assert same_logprobs(out.logprobs, right), (out, right)
    return True


def check_all(cases: Sequence[Case], unsure: float = 0.0) -> None:
    """All of one vocabulary. At most a share of `unsure` may go uncompared."""
    compared = [check(case, out) for case, out in zip(cases, draw(cases), strict=True)]
    assert compared.count(False) <= unsure * len(cases), compared.count(False)


# ---------------------------------------------------------------- logits

KINDS = ("plain", "ties", "holes", "close", "flat", "steep", "mixed signs of zero", "subnormal")


def logits_of(kind: str, size: int, rng: np.random.Generator) -> tuple[float, ...]:
    values: NDArray[Any] = rng.standard_normal(size) * 2
    if kind == "ties":
        values = np.round(values)
    elif kind == "holes":
        values[rng.random(size) < 0.4] = -INF
        values[rng.integers(size)] = 1.0
    elif kind == "close":
        values = 3 + rng.integers(0, 5, size) * 2.0**-22  # a few float32 steps apart
    elif kind == "flat":
        values = np.full(size, -1.25)
    elif kind == "steep":
        values *= 40
    elif kind == "mixed signs of zero":
        values = np.where(rng.random(size) < 0.5, 0.0, -0.0)
        values[rng.random(size) < 0.2] = -2.0
    elif kind == "subnormal":
        values *= 1e-40
    return tuple(values.astype(np.float32).tolist())


# ---------------------------------------------------------------- shares of many draws

SHARE_LOGITS = (0.3, 1.7, -0.5, 2.0, 0.0, 1.1, -1.2, 0.9, 1.6999, -3.0)

SHARED: Mapping[str, tuple[dict[str, object], tuple[dict[str, object], ...]]] = {
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

DOUBT = 1e-4
"""Draws as far from shares as one sample in so many of those shares are not theirs."""


def shares_cases(name: str) -> tuple[Case, tuple[Case, ...]]:
    """What is drawn with, and its wrong meanings."""
    fields, wrongs = SHARED[name]
    params = {"temperature": 1.0, "seed": 11, **fields}
    logits = tuple(oracle.f32(value) for value in SHARE_LOGITS)

    def case_of(more: dict[str, object]) -> Case:
        sampling = SamplingParams(**{**params, **more})  # type: ignore[arg-type]
        return Case(logits, sampling, prompt=(1, 1, 7), answer=(5, 3, 5, 1))

    return case_of({}), tuple(case_of(wrong) for wrong in wrongs)


def drawn_counts(name: str, draws: int) -> Counter[int]:
    """How often each id comes in so many draws, no two of the same numbers."""
    case, _ = shares_cases(name)
    if name == "penalties and bias":  # an answer that grows has other penalties at each place: here the seed counts up
        rows = [row_of(replace(case, sampling=replace(case.sampling, seed=seed))) for seed in range(draws)]
        positions = [position_of(case, row) for row in rows]
    else:
        row, tokens = row_of(case), np.zeros(draws + len(case.prompt), np.int64)
        positions = [Position(row, tokens[: len(case.prompt) + place]) for place in range(draws)]
    outs = sample(np.broadcast_to(np.array(case.logits, np.float32), (draws, len(case.logits))), positions)
    return Counter(out.token for out in outs if isinstance(out, Sampled))
