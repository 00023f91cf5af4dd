"""Logits -> tokens: what sampling means on every backend (docs/CONTRACTS.md §2).

    order    min_tokens mask -> grammar mask -> temperature -> top-k -> top-p -> draw
    greedy   temperature below `GREEDY_BELOW`: the largest logit, lowest id on a tie
    draw     Gumbel-max: the largest logit / temperature + gumbel(seed, output position, token id), in float64.
             No state: the same draw on every backend, in any batch, after a preemption
    ties     always to the lowest id

Nothing here sorts a vocabulary: candidates are cut out by value first, so that the cut is exact, ties included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.core.errors import EngineError, HeadraceError, NonFiniteLogits
from headrace.core.types import RowError, SamplingParams, TokenLogprobs

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Ids = NDArray[np.int64]

GREEDY_BELOW = 1e-5
"""A temperature this low is greedy: dividing by it would leave nothing but the largest logit."""

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
"""Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), §4.3: Philox4x32."""

NOT_FINITE = "the model's logits are not finite (NaN or infinity)"

GUMBEL_SPREAD = 26.1
"""A little more than the largest gumbel of a 32-bit uniform (22.88) less the smallest (-3.14)."""

_WORD = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


@dataclass(frozen=True, slots=True, eq=False)
class Position:
    """One place at which a token is wanted."""

    sampling: SamplingParams
    output_position: int
    """How many tokens were generated before this one."""
    stop_ids: Ids
    """Masked while `output_position` is below `min_tokens`."""
    mask: bytes | None = None
    """A bit a token id, little-endian within a byte, ceil(vocabulary / 8) bytes: 1 is allowed. None: all are."""


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


def code_and_message(error: Exception) -> tuple[str, str]:
    """An exception as data: its code where it has one, its class and first line where not."""
    if isinstance(error, HeadraceError):
        return error.code, str(error)
    first_line = (str(error).splitlines() or [""])[0]
    return EngineError.code, f"{type(error).__name__}: {first_line}"[:200]


def _sample_row(logits_V: F32, position: Position, best: int) -> Sampled | RowError:
    sampling = position.sampling
    try:
        if math.isnan(logits_V[best]) or logits_V[best] == math.inf:
            raise NonFiniteLogits(NOT_FINITE)
        masked_V = _masked(logits_V, position)
        if masked_V is not logits_V:
            best = int(masked_V.argmax())
        if masked_V[best] == -math.inf:
            raise NonFiniteLogits("no token is allowed: every logit is masked or -infinity")
        token = best if sampling.temperature < GREEDY_BELOW else _draw(masked_V, position, float(masked_V[best]))
        logprobs = None if sampling.logprobs is None else _logprobs(logits_V, token, sampling.logprobs)
    except Exception as error:  # one row's fault is that row's error
        return RowError(*code_and_message(error))
    return Sampled(token, logprobs)


def _masked(logits_V: F32, position: Position) -> F32:
    """The logits with forbidden ids at -inf; the very same array where none is."""
    early = position.output_position < position.sampling.min_tokens and len(position.stop_ids) > 0
    if not early and position.mask is None:
        return logits_V
    masked_V = logits_V.copy()
    if early:
        masked_V[position.stop_ids[position.stop_ids < len(masked_V)]] = -np.inf
    if position.mask is not None:
        size = -(-len(masked_V) // 8)
        if len(position.mask) != size:
            raise EngineError(f"a grammar mask of {len(position.mask)} bytes, {size} needed")
        bits = np.unpackbits(np.frombuffer(position.mask, np.uint8), count=len(masked_V), bitorder="little")
        masked_V[bits == 0] = -np.inf
    return masked_V


def _draw(logits_V: F32, position: Position, peak: float) -> int:
    sampling = position.sampling
    if sampling.seed is None:
        raise EngineError("seed: None reached the backend; the engine draws one for every request that samples")
    kept = _kept(logits_V, sampling, peak)
    words = uniform_words(sampling.seed, position.output_position, kept)
    logits = logits_V[kept]
    # An id of less randomness than the likeliest one has less of both: it cannot win, and needs no logarithm.
    able = np.flatnonzero(words >= words[logits.argmax()])
    kept, words, logits = kept[able], words[able], logits[able]
    scores = logits.astype(np.float64) / sampling.temperature + _gumbel_of(words)
    return int(kept[scores.argmax()])


def _kept(logits_V: F32, sampling: SamplingParams, peak: float) -> Ids:
    """Ids that may be drawn, ascending, less those that no gumbel could lift to the top."""
    # In logits, rounded outwards: an id further below the peak loses whatever the draw.
    floor = peak - GUMBEL_SPREAD * sampling.temperature - abs(peak) * 1e-6
    top_k = sampling.top_k if 0 < sampling.top_k < len(logits_V) else None
    if top_k is None and sampling.top_p >= 1:
        return np.flatnonzero(logits_V >= floor)
    ids = np.flatnonzero(logits_V > -np.inf) if top_k is None else _top(logits_V, top_k)
    if sampling.top_p < 1:
        ids = _nucleus(logits_V[ids], ids, sampling, peak)
    return np.sort(ids[logits_V[ids] >= floor])


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


def philox4x32(
    counter: Sequence[NDArray[np.uint64] | NDArray[np.int64] | int], key: tuple[int, int]
) -> list[NDArray[np.uint64]]:
    """Ten rounds of Philox4x32 on four counter words (arrays broadcast): four 32-bit words, held in uint64."""
    words = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    c0, c1, c2, c3 = words
    for i in range(PHILOX_ROUNDS):
        k0, k1 = (np.uint64((word + i * weyl) & 0xFFFFFFFF) for word, weyl in zip(key, PHILOX_WEYL, strict=True))
        product0 = c0 * np.uint64(PHILOX_MULTIPLIERS[0])
        product1 = c2 * np.uint64(PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ k0,
            product1 & _WORD,
            (product0 >> _SHIFT) ^ c3 ^ k1,
            product0 & _WORD,
        )
    return [c0, c1, c2, c3]


def gumbel(seed: int, output_position: int, token_ids: Ids) -> F64:
    """Gumbel(0, 1) of each token id, from (seed, output position, id) alone."""
    return _gumbel_of(uniform_words(seed, output_position, token_ids))


def uniform_words(seed: int, output_position: int, token_ids: Ids) -> NDArray[np.uint64]:
    """The 32 random bits of each token id.

    Key: the seed's two's complement, low word first. Counter: (id // 4, position low, position high, 0); the word is
    number id % 4 of the output. Ids that fill most of their range cost least: four share a counter.
    """
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    first, last = int(token_ids.min()) // 4, int(token_ids.max()) // 4
    dense = last - first < len(token_ids)
    groups = np.arange(first, last + 1) if dense else token_ids // 4
    words = philox4x32((groups, output_position & 0xFFFFFFFF, output_position >> 32, 0), key)
    if dense:
        return np.stack(words, axis=1).ravel()[token_ids - 4 * first]
    return np.choose(token_ids % 4, words)


def _gumbel_of(words: NDArray[np.uint64]) -> F64:
    return -np.log(-np.log((words.astype(np.float64) + 0.5) / 2**32))
