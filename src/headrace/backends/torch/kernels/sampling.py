"""Logits -> tokens on the device: greedy, temperature, top-k, top-p, min-p (docs/CONTRACTS.md §2).

The meaning is that of `headrace.backends.sampling`, which has the rest as well (penalties, masks, typical, ...).

In the order of (likeliest first, lowest id on a tie) each filter keeps a prefix. So the kept set need not be known:
whoever wins the draw among all is the winner of the kept set too, if inside; and one outside takes all behind it out
of the race, which is run again among those ahead. The place of a winner is uniform in the probability, so few are
outside: for top-p, ln(1 / top_p) on average. To be inside is to have fewer than top_k ids ahead, less than top_p of the
whole in sum, and min_p times the peak's probability.

    survey  (row, tile)  peak, NaN, winner of the draw; where a row filters: its mass, and the peak of each 64 ids
    plan    (row)        greedy and unfiltered rows end here. Others get a floor in logits below which nothing is kept
                         or could win, and the list of the groups of 64 that reach it
    race    (row, tile)  where those are many: what is ahead of the winner, and who wins among that
    finish  (row)        the rest of what is described above, among the groups listed; as a rule few

Nothing is sorted, and no buffer is ever too small. Sums are float64, in a fixed order; float32 only excludes, by a
margin. The host learns nothing on the way, and grids depend on shapes alone, so a CUDA graph holds the four launches.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import triton
from torch import Tensor

from headrace.backends.sampling import GREEDY_BELOW
from headrace.backends.torch.kernels.sampling_kernels import (
    GREEDY,
    NO_TOKEN,
    NOT_FINITE,
    NOTHING,
    NOTHING_WANTED,
    RANDOM,
    finish_kernel,
    plan_kernel,
    race_kernel,
    survey_kernel,
)
from headrace.core.errors import EngineError
from headrace.core.types import SamplingParams

__all__ = [
    "GREEDY",
    "NOTHING",
    "NOTHING_WANTED",
    "NOT_FINITE",
    "NO_TOKEN",
    "RANDOM",
    "Draws",
    "Sizes",
    "Workspace",
    "make_workspace",
    "row_of",
    "sample",
]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Powers of two; 4 ≤ group ≤ tile and chunk."""

    tile: int = 2048
    """Ids that one program meets."""
    group: int = 64
    """Ids that are listed together as candidates."""
    chunk: int = 4096
    """Candidates that `finish` meets at a time."""
    few: int = 128
    """Up to so many groups need no race: two chunks, which `finish` meets itself."""


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """What is wanted of P rows of logits, on their device; a graph reads it again at each replay."""

    floats: Tensor
    """(P, 3) float64: temperature, top_p, min_p."""
    ints: Tensor
    """(P, 5) int64: top_k (≤ 0 or ≥ vocabulary: none), seed's low word, seed's high word (32 bits each, not negative),
    output position, mode (`NOTHING`, `GREEDY` or `RANDOM`)."""


@dataclass(frozen=True, slots=True, eq=False)
class Workspace:
    """Memory of `sample` between its kernels; may be used again by the next call on the same stream."""

    vocab: int
    sizes: Sizes
    peaks: Tensor
    """(P, tiles) float32: the largest logit."""
    tops: Tensor
    """(P, tiles) int32: its lowest id; `NOT_FINITE` where there is a NaN or +inf."""
    scores: Tensor
    """(P, tiles) float64: of the winner of the tile's draw; -inf: there is none."""
    winners: Tensor
    """(P, tiles) int32."""
    masses: Tensor
    """(P, tiles) float64: sum of exp((logit - the tile's peak) / temperature); after the race, of those ahead and
    relative to the row's peak."""
    counts: Tensor
    """(P, tiles) int32: how many are ahead."""
    maxima: Tensor
    """(P, groups) float32: the largest logit of a group."""
    live: Tensor
    """(P, groups) int32: the groups that hold candidates, ascending; the rest is stale."""
    found: Tensor
    """(P,) int32: how many those are; 0: the row is done."""
    bounds: Tensor
    """(P, 3) float64: the row's peak, the floor of the candidates, the mass of the whole row relative to the peak
    (where top-p is of the whole)."""

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        values = (getattr(self, one.name) for one in fields(self))
        return sum(value.nbytes for value in values if isinstance(value, Tensor))


def make_workspace(rows: int, vocab: int, device: torch.device | str, sizes: Sizes = Sizes()) -> Workspace:
    """For up to `rows` rows; 32 bytes a tile of 2048 ids and 8 a group of 64: some 18 KiB a row of 128k ids."""
    tiles, groups = -(-vocab // sizes.tile), -(-vocab // sizes.group)

    def empty(columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((rows, columns), dtype=dtype, device=device)

    return Workspace(
        vocab=vocab,
        sizes=sizes,
        peaks=empty(tiles, torch.float32),
        tops=empty(tiles, torch.int32),
        scores=empty(tiles, torch.float64),
        winners=empty(tiles, torch.int32),
        masses=empty(tiles, torch.float64),
        counts=empty(tiles, torch.int32),
        maxima=empty(groups, torch.float32),
        live=empty(groups, torch.int32),
        found=torch.empty(rows, dtype=torch.int32, device=device),
        bounds=empty(3, torch.float64),
    )


def row_of(sampling: SamplingParams, position: int) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """A row of `Draws.floats` and one of `Draws.ints`, of the token at output position `position`.

    Raises EngineError where a row that draws has no seed.
    """
    floats = (sampling.temperature, sampling.top_p, sampling.min_p)
    if sampling.temperature < GREEDY_BELOW:
        return floats, (0, 0, 0, position, GREEDY)
    if sampling.seed is None:
        raise EngineError("seed: None reached the backend; the engine draws one for every request that samples")
    low, high = sampling.seed & 0xFFFFFFFF, (sampling.seed >> 32) & 0xFFFFFFFF
    return floats, (sampling.top_k, low, high, position, RANDOM)


def sample(logits_PV: Tensor, draws: Draws, tokens_P: Tensor, workspace: Workspace) -> None:
    """tokens_P (int32) = the token of each row, or `NOTHING_WANTED`, `NOT_FINITE`, `NO_TOKEN`.

    `logits_PV`: float32, float16 or bfloat16, rows any stride apart. No allocation, no synchronisation.
    Raises EngineError on shapes that do not fit.
    """
    rows, vocab = logits_PV.shape
    small = vocab != workspace.vocab or rows > len(workspace.found)
    if small or draws.floats.shape != (rows, 3) or draws.ints.shape != (rows, 5) or tokens_P.shape != (rows,):
        raise EngineError(
            f"logits {tuple(logits_PV.shape)}: draws {tuple(draws.floats.shape)} and {tuple(draws.ints.shape)}, tokens "
            f"{tuple(tokens_P.shape)}, a workspace for {len(workspace.found)} × {workspace.vocab}"
        )
    if logits_PV.stride(1) != 1 or draws.ints.dtype != torch.int64 or draws.floats.dtype != torch.float64:
        raise EngineError("sample takes logits whose rows are contiguous, draws of int64 and float64")
    if not (draws.ints.is_contiguous() and draws.floats.is_contiguous() and tokens_P.is_contiguous()):
        raise EngineError("sample takes draws and tokens that are contiguous")
    if rows == 0:
        return
    work, sizes = workspace, workspace.sizes
    tiles, groups = work.peaks.shape[1], work.maxima.shape[1]
    all_tiles, all_groups = triton.next_power_of_2(tiles), triton.next_power_of_2(groups)
    asked = (logits_PV, logits_PV.stride(0), vocab, draws.floats, draws.ints)
    tile = (work.peaks, work.tops, work.scores, work.winners, work.masses)
    row = (work.found, work.bounds, tokens_P, tiles)
    raced = (work.counts, work.scores, work.winners, work.masses)
    survey_kernel[(rows, tiles)](*asked, *tile, work.maxima, tiles, groups, sizes.tile, sizes.group, num_warps=8)
    plan_kernel[(rows,)](*asked, *tile, work.maxima, *row, work.live, groups, all_tiles, all_groups, num_warps=8)
    race_kernel[(rows, tiles)](*asked, *raced, *row, sizes.tile, sizes.few, num_warps=8)
    finish_kernel[(rows,)](
        *asked, *raced, *row, work.live, groups, all_tiles, sizes.chunk, sizes.group, sizes.few, num_warps=16
    )
