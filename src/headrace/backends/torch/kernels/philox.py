"""Philox4x32-10 and the gumbels made of it, inside kernels: the same numbers as `headrace.backends.philox`."""

from __future__ import annotations

import triton
import triton.language as tl

MULTIPLIER_0 = tl.constexpr(0xD2511F53)
MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
WEYL_0 = tl.constexpr(0x9E3779B9)
WEYL_1 = tl.constexpr(0xBB67AE85)
LOW_WORD = tl.constexpr(0xFFFFFFFF)
"""Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), §4.3: Philox4x32."""

ROUGH = tl.constexpr(1e-3)
"""More than `rough_gumbel` may be off: a thousandth of -ln u at most, through the series below."""


@triton.jit
def philox_words(
    quads: tl.tensor, seed_low: tl.tensor, seed_high: tl.tensor, position: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Four 32-bit words for each counter (quad, position low, position high, 0); word i is that of id 4 · quad + i.

    `quads`: integers, a block or one; `seed_low`, `seed_high`: 32 bits each, as int64; `position`: int64, ≥ 0.
    """
    c0 = quads.to(tl.uint32)
    c1 = (position & LOW_WORD).to(tl.uint32)
    c2 = (position >> 32).to(tl.uint32)
    c3 = c2 ^ c2
    for i in tl.static_range(10):
        k0 = ((seed_low + i * WEYL_0) & LOW_WORD).to(tl.uint32)
        k1 = ((seed_high + i * WEYL_1) & LOW_WORD).to(tl.uint32)
        product0 = c0.to(tl.uint64) * MULTIPLIER_0
        product1 = c2.to(tl.uint64) * MULTIPLIER_1
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = (product1 & LOW_WORD).to(tl.uint32)
        c3 = (product0 & LOW_WORD).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def philox_block(quads: tl.tensor, seed_low: tl.tensor, seed_high: tl.tensor, position: tl.tensor) -> tl.tensor:
    """The word of each id: (4 · quads,), where ids come in whole, aligned fours."""
    w0, w1, w2, w3 = philox_words(quads, seed_low, seed_high, position)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def gumbel(word: tl.tensor) -> tl.tensor:
    """-ln(-ln((word + ½) / 2³²)) in float64."""
    uniform = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    return -tl.log(-tl.log(uniform))


@triton.jit
def rough_gumbel(words: tl.tensor) -> tl.tensor:
    """The same in float32, at most `ROUGH` off."""
    below = (words.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    # float32 holds no number close below 1: -ln(1 - x) is a series in what is missing to it.
    missing = ((words ^ LOW_WORD).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = missing * (1.0 + missing * (0.5 + missing * 0.33333334))
    exponential = tl.where(missing < 0.1, series, -tl.log(tl.minimum(below, 0.9)))
    return -tl.log(exponential)
