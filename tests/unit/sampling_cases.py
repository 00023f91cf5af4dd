"""Runs `headrace.backends.sampling` on the oracle's cases, and holds one against the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from headrace.backends.sampling import Position, RowSampling, Sampled, sample
from headrace.core.types import RowError, TokenLogprobs
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
