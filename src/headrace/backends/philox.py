"""Random numbers without state: Philox4x32-10 by (seed, output position, token id) (docs/CONTRACTS.md §2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
Ids = NDArray[np.int64]

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
"""Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), §4.3: Philox4x32."""

GUMBEL_SPREAD = 26.1
"""A little more than the largest gumbel of a 32-bit uniform (22.88) less the smallest (-3.14)."""

_WORD = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(
    counter: Sequence[NDArray[np.uint64] | NDArray[np.int64] | int], key: tuple[int, int]
) -> list[NDArray[np.uint64]]:
    """Ten rounds of Philox4x32 on four counter words (arrays broadcast): four 32-bit words, held in uint64."""
    words = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    c0, c1, c2, c3 = words
    for i in range(ROUNDS):
        k0, k1 = (np.uint64((word + i * weyl) & 0xFFFFFFFF) for word, weyl in zip(key, WEYL, strict=True))
        product0 = c0 * np.uint64(MULTIPLIERS[0])
        product1 = c2 * np.uint64(MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ k0,
            product1 & _WORD,
            (product0 >> _SHIFT) ^ c3 ^ k1,
            product0 & _WORD,
        )
    return [c0, c1, c2, c3]


def gumbel(seed: int, output_position: int, token_ids: Ids) -> F64:
    """Gumbel(0, 1) of each token id, from (seed, output position, id) alone."""
    return gumbel_of(uniform_words(seed, output_position, token_ids))


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


def gumbel_of(words: NDArray[np.uint64]) -> F64:
    """-ln(-ln((word + ½) / 2³²)) of each word."""
    return -np.log(-np.log((words.astype(np.float64) + 0.5) / 2**32))
