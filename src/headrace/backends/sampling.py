"""Logits -> tokens: what sampling means on every backend (docs/CONTRACTS.md §2).

    order    masks (allowed ids, bad words, min_tokens, grammar) and biases -> repetition, frequency, presence penalties
             -> temperature -> top-k -> typical -> top-p -> min-p -> draw
    greedy   temperature below `GREEDY_BELOW`: the largest logit, lowest id on a tie
    draw     Gumbel-max: the largest logit / temperature + gumbel(seed, output position, token id), in float64.
             No state: the same draw on every backend, in any batch, after a preemption
    ties     always to the lowest id

Logits are changed in float32, one rounding an operation; probabilities are float64. Only typical sampling sorts a
vocabulary: elsewhere candidates are cut out by value first, so that the cut is exact, ties included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.backends.philox import GUMBEL_SPREAD, gumbel_of, uniform_words
from headrace.core.errors import EngineError, HeadraceError, NonFiniteLogits, NoTokenAllowed
from headrace.core.types import RowError, SamplingParams, TokenLogprobs

F32 = NDArray[np.float32]
Ids = NDArray[np.int64]

GREEDY_BELOW = 1e-5
"""A temperature this low is greedy: dividing by it would leave nothing but the largest logit."""

LIMITS = np.finfo(np.float32)

NOT_FINITE = "the model's logits are not finite (NaN or infinity)"


class RowSampling:
    """What a request asks of every draw, as arrays: made once, when it enters its row."""

    __slots__ = ("bad_sequences", "bias_ids", "biases", "forbidden", "num_prompt", "penalises", "sampling", "stop_ids")

    def __init__(self, sampling: SamplingParams, num_prompt: int, stop_ids: Iterable[int], vocab_size: int) -> None:
        """`stop_ids`: masked while fewer than `min_tokens` are out; those outside the vocabulary are never met.

        Raises EngineError on any other id outside the vocabulary: requests are checked before they are planned.
        """
        allowed, bad = sampling.allowed_token_ids, sampling.bad_words_ids
        named = [*(allowed or ()), *(i for one in bad for i in one), *(i for i, _ in sampling.logit_bias)]
        if max(named, default=0) >= vocab_size:
            raise EngineError(f"token id {max(named)} reached the backend; the vocabulary has {vocab_size}")
        self.sampling = sampling
        self.num_prompt = num_prompt
        self.stop_ids: Ids = np.array(sorted(i for i in stop_ids if i < vocab_size), np.int64)
        self.bias_ids: Ids = np.array([i for i, _ in sampling.logit_bias], np.int64)
        self.biases: F32 = np.array([value for _, value in sampling.logit_bias], np.float32)
        self.bad_sequences = tuple((np.array(one[:-1], np.int64), one[-1]) for one in bad if len(one) > 1)
        """(ids, id): the id is masked where the answer ends in the ids."""
        single = [one[0] for one in bad if len(one) == 1]
        self.forbidden: NDArray[np.bool_] | None = None
        """(vocabulary,) ids never to be chosen."""
        if allowed is not None or single:
            self.forbidden = np.full(vocab_size, allowed is not None)
            self.forbidden[list(allowed or ())] = False
            self.forbidden[single] = True
        penalties = (sampling.repetition_penalty - 1, sampling.frequency_penalty, sampling.presence_penalty)
        self.penalises = any(penalties)


@dataclass(frozen=True, slots=True, eq=False)
class Position:
    """One place at which a token is wanted."""

    row: RowSampling
    token_ids: Ids
    """Prompt and answer so far, accepted drafts included."""
    mask: bytes | None = None
    """A bit a token id, little-endian within a byte, ceil(vocabulary / 8) bytes: 1 is allowed. None: all are."""

    @property
    def output(self) -> Ids:
        """The answer so far."""
        return self.token_ids[self.row.num_prompt :]

    @property
    def output_position(self) -> int:
        """How many tokens were generated before this one."""
        return len(self.token_ids) - self.row.num_prompt


@dataclass(frozen=True, slots=True)
class Sampled:
    token: int
    logprobs: TokenLogprobs | None = None


def sample(logits_PV: F32, positions: Sequence[Position]) -> list[Sampled | RowError]:
    """A token for each row of raw logits. A row that cannot be sampled is a RowError, and no other row's concern."""
    if not positions:
        return []
    best = logits_PV.argmax(axis=1)  # numpy's argmax stops at a NaN, so this finds those as well
    return [
        _sample_row(logits_V, position, int(top))
        for logits_V, position, top in zip(logits_PV, positions, best, strict=True)
    ]


def score(logits_PV: F32, token_ids: Sequence[int], count: int) -> list[TokenLogprobs]:
    """The log-probability of each token in its row of raw logits, and of the `count` likeliest.

    Raises NonFiniteLogits.
    """
    if np.isnan(logits_PV).any() or (logits_PV == np.inf).any():
        raise NonFiniteLogits(NOT_FINITE)
    return [_logprobs(logits_V, token, count) for logits_V, token in zip(logits_PV, token_ids, strict=True)]


def code_and_message(error: Exception) -> tuple[str, str]:
    """An exception as data: its code where it has one, its class and first line where not."""
    if isinstance(error, HeadraceError):
        return error.code, str(error)
    first_line = (str(error).splitlines() or [""])[0]
    return EngineError.code, f"{type(error).__name__}: {first_line}"[:200]


def _sample_row(logits_V: F32, position: Position, best: int) -> Sampled | RowError:
    sampling = position.row.sampling
    try:
        if math.isnan(logits_V[best]) or logits_V[best] == math.inf:
            raise NonFiniteLogits(NOT_FINITE)
        changed_V = _changed(logits_V, position)
        if changed_V is not logits_V:
            best = int(changed_V.argmax())
        if changed_V[best] == -math.inf:
            raise NoTokenAllowed("no token is allowed here: every one is masked, or has no probability")
        token = best if sampling.temperature < GREEDY_BELOW else _draw(changed_V, position, float(changed_V[best]))
        logprobs = None if sampling.logprobs is None else _logprobs(logits_V, token, sampling.logprobs)
    except Exception as error:  # one row's fault is that row's error
        return RowError(*code_and_message(error))
    return Sampled(token, logprobs)


def _changed(logits_V: F32, position: Position) -> F32:
    """The logits after masks, biases and penalties; the very same array where there are none."""
    row = position.row
    early = position.output_position < row.sampling.min_tokens and len(row.stop_ids) > 0
    bad = [last for ids, last in row.bad_sequences if _ends_in(position.output, ids)]
    plain = row.forbidden is None and not bad and not len(row.bias_ids) and not row.penalises
    if plain and not early and position.mask is None:
        return logits_V
    changed_V = logits_V.copy()
    changed_V[row.bias_ids] += row.biases
    if row.forbidden is not None:
        changed_V[row.forbidden] = -np.inf
    changed_V[bad] = -np.inf
    if early:
        changed_V[row.stop_ids] = -np.inf
    if position.mask is not None:
        changed_V[~_bits(position.mask, len(changed_V))] = -np.inf
    if row.penalises:
        _penalise(changed_V, position)
    return changed_V


def _ends_in(output: Ids, ids: Ids) -> bool:
    return len(output) >= len(ids) and bool((output[len(output) - len(ids) :] == ids).all())


def _bits(mask: bytes, count: int) -> NDArray[np.bool_]:
    size = -(-count // 8)
    if len(mask) != size:
        raise EngineError(f"a grammar mask of {len(mask)} bytes, {size} needed")
    return np.unpackbits(np.frombuffer(mask, np.uint8), count=count, bitorder="little").view(np.bool_)


def _penalise(logits_V: F32, position: Position) -> None:
    """In place. Repetition: of ids in prompt or answer; frequency and presence: of ids in the answer.

    The repetition penalty and what it makes of a logit are held within the finite float32.
    """
    sampling = position.row.sampling
    if sampling.repetition_penalty != 1:
        penalty = np.float32(min(max(sampling.repetition_penalty, float(LIMITS.tiny)), float(LIMITS.max)))
        seen = np.unique(position.token_ids)
        seen = seen[logits_V[seen] > -np.inf]
        logits = logits_V[seen]
        with np.errstate(over="ignore"):
            turned = np.where(logits > 0, logits / penalty, logits * penalty)
        logits_V[seen] = turned.clip(LIMITS.min, LIMITS.max)
    if sampling.frequency_penalty or sampling.presence_penalty:
        ids, counts = np.unique(position.output, return_counts=True)
        logits_V[ids] -= np.float32(sampling.frequency_penalty) * counts.astype(np.float32)
        logits_V[ids] -= np.float32(sampling.presence_penalty)


def _draw(logits_V: F32, position: Position, peak: float) -> int:
    sampling = position.row.sampling
    if sampling.seed is None:
        raise EngineError("seed: None reached the backend; the engine draws one for every request that samples")
    kept = _kept(logits_V, sampling, peak)
    words = uniform_words(sampling.seed, position.output_position, kept)
    logits = logits_V[kept]
    # An id of less randomness than the likeliest one has less of both: it cannot win, and needs no logarithm.
    able = np.flatnonzero(words >= words[logits.argmax()])
    kept, words, logits = kept[able], words[able], logits[able]
    scores = logits.astype(np.float64) / sampling.temperature + gumbel_of(words)
    return int(kept[scores.argmax()])


def _kept(logits_V: F32, sampling: SamplingParams, peak: float) -> Ids:
    """Ids that may be drawn, ascending, less those that no gumbel could lift to the top."""
    top_k = sampling.top_k if 0 < sampling.top_k < len(logits_V) else None
    if top_k is None and sampling.top_p >= 1 and sampling.typical_p >= 1:
        ids = np.flatnonzero(logits_V >= _floor(peak, sampling))
        return _at_least(logits_V, ids, sampling, peak)
    ids = np.flatnonzero(logits_V > -np.inf) if top_k is None else np.sort(_top(logits_V, top_k))
    ids = ids[logits_V[ids] > -np.inf]
    if sampling.typical_p < 1:
        ids = _typical(logits_V[ids], ids, sampling, peak)
        peak = float(logits_V[ids].max())
    if sampling.top_p < 1:
        ids = _nucleus(logits_V[ids], ids, sampling, peak)
    ids = ids[logits_V[ids] >= _floor(peak, sampling)]
    return _at_least(logits_V, np.sort(ids), sampling, peak)


def _floor(peak: float, sampling: SamplingParams) -> float:
    """In logits, rounded outwards: an id further below the peak loses whatever the draw."""
    return peak - GUMBEL_SPREAD * sampling.temperature - abs(peak) * 1e-6


def _at_least(logits_V: F32, ids: Ids, sampling: SamplingParams, peak: float) -> Ids:
    """The ids that are at least min_p times as likely as the likeliest."""
    if sampling.min_p == 0:
        return ids
    return ids[np.exp((logits_V[ids].astype(np.float64) - peak) / sampling.temperature) >= sampling.min_p]


def _typical(values: F32, ids: Ids, sampling: SamplingParams, peak: float) -> Ids:
    """Locally typical sampling (arXiv 2202.00666, eq. 8): the shortest prefix of (surprise closest to the entropy
    first, lowest id first) whose share is at least typical_p. `ids` ascend."""
    scaled = (values.astype(np.float64) - peak) / sampling.temperature
    weights = np.exp(scaled)
    total = weights.sum()
    logprobs = scaled - math.log(total)
    shares = weights / total
    entropy = -(shares * logprobs).sum()
    order = np.argsort(np.abs(-logprobs - entropy), kind="stable")
    return np.sort(ids[order[: int(np.searchsorted(np.cumsum(shares[order]), sampling.typical_p)) + 1]])


def _top(values: F32, count: int) -> Ids:
    """Indices of the `count` largest, best first, ties by lowest index. `count` may exceed what there is."""
    if count < len(values):
        threshold = np.partition(values, len(values) - count)[len(values) - count]
        candidates = np.flatnonzero(values >= threshold)
    else:
        candidates = np.arange(len(values))
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


def _nucleus(values: F32, ids: Ids, sampling: SamplingParams, peak: float) -> Ids:
    """The shortest prefix of (likeliest first, lowest id first) whose share of the whole is at least top_p."""
    weights = np.exp((values.astype(np.float64) - peak) / sampling.temperature)
    goal = sampling.top_p * weights.sum()
    # `ids` is either ascending, or what _top gave: both break ties by lowest id.
    count = 64
    while True:
        order = _top(values, count)
        sums = np.cumsum(weights[order])
        if sums[-1] >= goal or len(order) == len(values):
            return ids[order[: int(np.searchsorted(sums, goal)) + 1]]
        count *= 8


def _logprobs(logits_V: F32, token: int, count: int) -> TokenLogprobs:
    """Log-softmax of the raw logits, in float64."""
    logits = logits_V.astype(np.float64)
    peak = logits.max()
    total = peak + math.log(np.exp(logits - peak).sum())
    top = _top(logits_V, count) if count else np.empty(0, np.int64)
    return TokenLogprobs(float(logits[token] - total), tuple((int(i), float(logits[i] - total)) for i in top))
