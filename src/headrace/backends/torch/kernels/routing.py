"""Which experts a token goes to, and which tokens an expert gets: all on the device, the host waits for nothing.

T: tokens (rows of padding too), E: experts, K: experts a token. A pair is a token and one of its choices; the pair of
token t and choice k has the number t K + k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.core.errors import EngineError

ROUTE_ELEMENTS = 512
"""Scores that a program of `route` looks at, about: a warp or so a token."""

ONE_LOOK = 1024
"""Up to so many pairs, each program of `group_by_expert` counts all experts by itself, which saves a launch."""

MANY_PAIRS = 2048
"""Pairs looked at together where there are more."""


def route(
    scores_TE: Tensor, experts_per_token: int, normalise: bool, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each token's likeliest experts, and what their answers are multiplied with: `ops.route` on the device.

    `scores_TE`: the router's, of any float type. `count`: int32 on the device, how many rows are tokens; None: all.
    -> (T, K) float32 weights, softmax over all E in float32, divided by their sum if `normalise`; (T, K) int32 experts,
    the likeliest first. Equal scores go to the lowest id (torch.topk promises no order there). Rows that are no tokens
    get weight 0 and expert -1. A row whose softmax is not finite gets weights NaN, so that the fault shows, and experts
    that exist, all different. Raises EngineError for other shapes.
    """
    tokens, experts = scores_TE.shape
    if not 1 <= experts_per_token <= experts or scores_TE.stride(1) != 1:
        raise EngineError(f"route: {experts_per_token} of {experts} experts, scores {scores_TE.stride()} apart")
    weights_TK = torch.empty(tokens, experts_per_token, dtype=torch.float32, device=scores_TE.device)
    chosen_TK = torch.empty(tokens, experts_per_token, dtype=torch.int32, device=scores_TE.device)
    width = triton.next_power_of_2(experts)
    together = max(1, ROUTE_ELEMENTS // width)
    if tokens:
        _route_kernel[(triton.cdiv(tokens, together),)](
            scores_TE,
            count,
            weights_TK,
            chosen_TK,
            tokens,
            scores_TE.stride(0),
            EXPERTS=experts,
            CHOICES=experts_per_token,
            NORMALISE=normalise,
            BLOCK_T=together,
            BLOCK_E=width,
            BLOCK_K=triton.next_power_of_2(experts_per_token),
            num_warps=4,
        )
    return weights_TK, chosen_TK


@triton.jit(do_not_specialize=["tokens"])
def _route_kernel(
    scores: tl.tensor,
    count: tl.tensor,  # or None
    weights: tl.tensor,
    chosen: tl.tensor,
    tokens: tl.tensor,
    stride_t: tl.tensor,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)[None, :]
    slot = tl.arange(0, BLOCK_K)[None, :]
    alive = token < tokens
    if count is not None:
        alive = alive & (token < tl.load(count))

    exists = (expert < EXPERTS) & (token >= 0)[:, None]
    places = token.to(tl.int64)[:, None] * stride_t + expert
    score = tl.load(scores + places, mask=exists & alive[:, None], other=0.0).to(tl.float32)
    top = tl.max(tl.where(exists, score, float("-inf")), axis=1)
    power = tl.where(exists, tl.exp(score - top[:, None]), 0.0)
    share = power / tl.sum(power, axis=1)[:, None]

    # The choice goes by the scores, not by their rounded powers, and NaN is no score.
    score = tl.where(score == score, score, float("-inf"))
    free = exists
    picked = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    picked_expert = tl.full([BLOCK_T, BLOCK_K], -1, tl.int32)
    for choice in tl.static_range(CHOICES):
        best = tl.max(tl.where(free, score, float("-inf")), axis=1)
        winner = tl.min(tl.where(free & (score == best[:, None]), expert, BLOCK_E), axis=1)
        won = expert == winner[:, None]
        free = free & (expert != winner[:, None])
        picked = tl.where(slot == choice, tl.sum(tl.where(won, share, 0.0), axis=1)[:, None], picked)
        picked_expert = tl.where(slot == choice, winner[:, None], picked_expert)
    if NORMALISE:
        picked = picked / tl.sum(picked, axis=1)[:, None]

    out = token.to(tl.int64)[:, None] * CHOICES + slot
    written = (token < tokens)[:, None] & (slot < CHOICES)
    tl.store(weights + out, tl.where(alive[:, None], picked, 0.0), mask=written)
    tl.store(chosen + out, tl.where(alive[:, None], picked_expert, -1), mask=written)


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """A step's pairs in blocks of one expert each."""

    pairs: Tensor
    """(most_blocks × block_rows,) int32: the pairs of each block, -1 where it has no more. Of the blocks there are."""
    experts: Tensor
    """(1 + most_blocks,) int32: how many blocks there are, then whose each is."""
    block_rows: int

    @property
    def most_blocks(self) -> int:
        """There can be no more, whatever is chosen."""
        return len(self.experts) - 1


def most_blocks(pairs: int, num_experts: int, block_rows: int) -> int:
    """Blocks that `pairs` pairs can need: an expert's n pairs take 1 + ⌊(n - 1) ÷ block_rows⌋ of them."""
    begun = min(pairs, num_experts)
    return begun + (pairs - begun) // block_rows


def group_by_expert(chosen_TK: Tensor, num_experts: int, block_rows: int) -> Groups:
    """A counting sort. `chosen_TK`: int32, contiguous; ids outside [0, num_experts) are in no block.

    Within an expert the pairs keep their order, so the same choices give the same blocks. Raises EngineError.
    """
    if chosen_TK.dtype != torch.int32 or not chosen_TK.is_contiguous():
        raise EngineError(f"experts: chosen ids are {chosen_TK.dtype}, {chosen_TK.stride()}; contiguous int32 needed")
    pairs = chosen_TK.numel()
    most = most_blocks(pairs, num_experts, block_rows)
    groups = Groups(chosen_TK.new_empty(most * block_rows), chosen_TK.new_empty(1 + most), block_rows)
    alone = pairs <= ONE_LOOK
    chunk = max(128, triton.next_power_of_2(pairs)) if alone else MANY_PAIRS
    warps = 4 if alone else 8
    sizes = None
    if not alone:
        sizes = chosen_TK.new_empty(num_experts)
        _count_kernel[(num_experts,)](chosen_TK, sizes, pairs, CHUNK=chunk, num_warps=warps)
    _place_kernel[(num_experts,)](
        chosen_TK,
        sizes,
        groups.pairs,
        groups.experts,
        pairs,
        EXPERTS=num_experts,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_ROWS=block_rows,
        CHUNK=chunk,
        num_warps=warps,
    )
    return groups


@triton.jit(do_not_specialize=["pairs"])
def _count_kernel(chosen: tl.tensor, sizes: tl.tensor, pairs: tl.tensor, CHUNK: tl.constexpr) -> None:
    """How many pairs each expert has; a program counts one."""
    expert = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    seen = tl.zeros([CHUNK], tl.int32)
    start = 0
    while start < pairs:
        ids = tl.load(chosen + start + lane, mask=start + lane < pairs, other=-1)
        seen += (ids == expert).to(tl.int32)
        start += CHUNK
    tl.store(sizes + expert, tl.sum(seen))


@triton.jit(do_not_specialize=["pairs"])
def _place_kernel(
    chosen: tl.tensor,
    sizes: tl.tensor,  # or None: there is one chunk, counted here
    block_pairs: tl.tensor,
    block_experts: tl.tensor,
    pairs: tl.tensor,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """A program writes one expert's blocks; the first also writes how many there are in all."""
    expert = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    every = tl.arange(0, BLOCK_E)
    if sizes is None:
        ids = tl.load(chosen + lane, mask=lane < pairs, other=-1)
        exists = (ids >= 0) & (ids < EXPERTS)
        size_E = tl.histogram(tl.where(exists, ids, 0), BLOCK_E, mask=exists)
    else:
        size_E = tl.load(sizes + every, mask=every < EXPERTS, other=0)
    blocks_E = (size_E + BLOCK_ROWS - 1) // BLOCK_ROWS
    if expert == 0:
        tl.store(block_experts, tl.sum(blocks_E))
    begin = BLOCK_ROWS * tl.sum(tl.where(every < expert, blocks_E, 0))
    end = begin + BLOCK_ROWS * tl.sum(tl.where(every == expert, blocks_E, 0))

    place = begin
    start = 0
    while start < pairs:
        ids = tl.load(chosen + start + lane, mask=start + lane < pairs, other=-1)
        mine = (ids == expert).to(tl.int32)
        places = place + tl.cumsum(mine, axis=0) - 1
        tl.store(block_pairs + places, start + lane, mask=mine != 0)
        tl.store(block_experts + 1 + places // BLOCK_ROWS, expert, mask=(mine != 0) & (places % BLOCK_ROWS == 0))
        place += tl.sum(mine)
        start += CHUNK
    rest = place + tl.arange(0, BLOCK_ROWS)
    tl.store(block_pairs + rest, -1, mask=rest < end)
