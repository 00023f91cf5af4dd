"""From logits on the host to a row's answer: numpy's specification of sampling, drafts and scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from headrace.backends.rows import IntArray, RequestTable
from headrace.backends.sampling import F32, NOT_FINITE, Position, Sampled, score
from headrace.core.errors import NonFiniteLogits
from headrace.core.types import RowError, RowOut, RowStep, TokenLogprobs

SCORED_ROWS = 64
"""Prompt tokens whose logits are there at one time."""


def positions(table: RequestTable, step: RowStep) -> list[Position]:
    """Where the row wants tokens. A mask holds one vocabulary's bits for each: after the known tokens, then after each
    draft."""
    row = table.row(step.row).sampling
    known = table.token_ids(step.row, step.start + step.length)
    tokens = np.concatenate((known, np.array(step.drafts, np.int64))) if step.drafts else known
    return [Position(row, tokens[: len(known) + i], mask) for i, mask in enumerate(masks(step))]


def masks(step: RowStep) -> Sequence[bytes | None]:
    """One for each token that the row wants."""
    wanted = 1 + len(step.drafts)
    if step.mask is None:
        return [None] * wanted
    packed = step.mask if isinstance(step.mask, bytes) else b""
    size = math.ceil(len(packed) / wanted)
    return [packed[i * size : (i + 1) * size] for i in range(wanted)]


def row_out(step: RowStep, sampled: Sequence[Sampled | RowError], raw: F32 | None) -> RowOut:
    """Drafts are kept while each is the token that was sampled before it. `raw`: logits that were asked for."""
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    accepted = 0
    for i, one in enumerate(sampled):
        if isinstance(one, RowError):
            return RowOut(step.row, error=one)
        tokens.append(one.token)
        if one.logprobs is not None:
            logprobs.append(one.logprobs)
        if i == len(step.drafts) or one.token != step.drafts[i]:
            break
        accepted += 1
    if raw is not None and not step.sample and not np.isfinite(raw).all():
        return RowOut(step.row, error=RowError(NonFiniteLogits.code, NOT_FINITE))
    return RowOut(step.row, tuple(tokens), accepted, tuple(logprobs), None, raw)


Scores = tuple[TokenLogprobs, ...] | NonFiniteLogits


def scores(table: RequestTable, step: RowStep, first: int, logits: Callable[[IntArray], F32]) -> Scores:
    """Log-probabilities of the prompt tokens that follow those of the span, whose first has the place `first`; `logits`
    of places. A few rows of logits at a time: a whole prompt's may be larger than the model."""
    if not step.score_prompt:
        return ()
    row = table.row(step.row).sampling
    stop = min(step.start + step.length, row.num_prompt - 1)
    tokens = table.token_ids(step.row, stop + 1)[step.start + 1 :].tolist()
    try:
        return tuple(_scores(tokens, row.sampling.prompt_logprobs or 0, first, logits))
    except NonFiniteLogits as error:
        return error


def _scores(
    tokens: Sequence[int], count: int, first: int, logits: Callable[[IntArray], F32]
) -> Iterator[TokenLogprobs]:
    for start in range(0, len(tokens), SCORED_ROWS):
        part = tokens[start : start + SCORED_ROWS]
        yield from score(logits(first + start + np.arange(len(part))), part, count)


def with_scores(out: RowOut, found: Scores) -> RowOut:
    """The answer with its prompt's scores, or with the error that they met."""
    if out.error is not None or found == ():
        return out
    if isinstance(found, NonFiniteLogits):
        return RowOut(out.row, error=RowError(found.code, str(found)))
    return replace(out, prompt_logprobs=found)
