"""Mixture of experts: the chosen experts' MLPs of all tokens in two grouped products, and their sum.

A block of a product is up to `block_rows` rows of one expert; which expert and which rows it reads from a table that
`routing.group_by_expert` made, so the launch is the same whatever was chosen. Rows are numbered by pair (t K + k) in
between, so that nothing has to be put back in order.
T: tokens (rows of padding too), E: experts, K: experts a token, H: hidden size, I: intermediate size of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.backends.torch.kernels.activation import NAMES, activated
from headrace.backends.torch.kernels.routing import Groups, group_by_expert
from headrace.core.errors import EngineError, shorten

FEW = 8
"""Rows an expert has on average, up to which a block of 16 is taken: its weights are what the time goes into."""

SOME = 64
"""And up to which one of 64 is: still no more than the weights cost, on a card with 150 or more FLOP to a byte."""

SUM_BLOCK = 1024
"""Columns that a program of the last sum takes."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a grouped product is cut."""

    rows: int
    columns: int
    """Rows of weights that meet them. With a gate half of them are the gate's, and half as many columns come out."""
    depth: int
    """Columns of the weights read together."""
    warps: int
    stages: int


def block_rows(pairs: int, num_experts: int, dtype: torch.dtype, invariant: bool) -> int:
    """Rows of a block: enough for most experts to need one, at most what tensor cores are fed well with."""
    if invariant:
        return 64 if dtype != torch.float32 else 16
    if pairs <= FEW * num_experts:
        return 16
    return 64 if pairs <= SOME * num_experts or dtype == torch.float32 else 128


def tiles(rows: int, gated: bool, dtype: torch.dtype) -> Tiles:
    """The product's cut for blocks of so many rows: fixed, for a row's order of summing hangs on `depth`.

    16 rows: the weights stream through; many small programs balance best, and 256 bytes of a weight's row are read
    together. 64 and 128: accumulators are what registers hold. `stages` of operands stay below the 163 KB of shared
    memory of compute capability 8.0.
    """
    if dtype == torch.float32:  # without tensor cores
        return Tiles(rows, 64 if gated else 32, 32, 4, 3) if rows == 16 else Tiles(rows, 64, 32, 8, 3)
    if rows == 16:
        return Tiles(16, 64, 128, 4, 4) if gated else Tiles(16, 32, 128, 4, 6)
    return Tiles(64, 128, 64, 4, 4) if rows == 64 else Tiles(128, 256, 64, 8, 3)


def experts_mlp(
    x_TH: Tensor,
    weights_TK: Tensor,
    chosen_TK: Tensor,
    up_ENH: Tensor,
    down_EHI: Tensor,
    biases: tuple[Tensor, Tensor] | None,
    activation: str,
    gated: bool,
    invariant: bool = False,
) -> Tensor:
    """What the chosen experts answer, each answer × its weight, added in float32 and rounded once -> (T, H).

    `x_TH`: float32, float16 or bfloat16, rows may lie apart. `weights_TK` float32 and `chosen_TK` int32, as
    `routing.route` gives them; a choice outside [0, E) is not computed and adds nothing, so that a row of padding (all
    -1) gives zeros. `up_ENH`: N = 2 I with a gate (its rows, then those of up) or I; `down_EHI`; both in x's type,
    contiguous. `biases`: (E, N) and (E, H). `activation`: see `ops.ACTIVATIONS`.

    Rounding is that of `ops.gated` and `ops.linear`: gate, up, act(gate), their product and down's result are rounded
    to x's type, sums within are float32. A token's answers are added in the order of its choices. The cut of the
    products depends on T K ÷ E alone, so a token's bits depend on its company at most through T; with `invariant` not
    at all, for there is one cut. Memory beside the result: T K (I + H) elements.

    Raises EngineError for other shapes, types and activations.
    """
    tokens, hidden = x_TH.shape
    experts, up_rows, _ = up_ENH.shape
    inner = up_rows // 2 if gated else up_rows
    choices = chosen_TK.shape[1]
    _check(x_TH, weights_TK, chosen_TK, up_ENH, down_EHI, gated, activation)
    out_TH = torch.empty(tokens, hidden, dtype=x_TH.dtype, device=x_TH.device)
    if not tokens:
        return out_TH
    pairs = tokens * choices
    groups = group_by_expert(chosen_TK, experts, block_rows(pairs, experts, x_TH.dtype, invariant))
    inner_PI = torch.empty(pairs, inner, dtype=x_TH.dtype, device=x_TH.device)
    answers_PH = torch.empty(pairs, hidden, dtype=x_TH.dtype, device=x_TH.device)
    up_bias, down_bias = (None, None) if biases is None else biases
    _product(x_TH, choices, up_ENH, up_bias, groups, activation, gated, inner_PI)
    _product(inner_PI, 1, down_EHI, down_bias, groups, None, False, answers_PH)
    _sum_kernel[(tokens, triton.cdiv(hidden, SUM_BLOCK))](
        answers_PH,
        weights_TK,
        chosen_TK,
        out_TH,
        EXPERTS=experts,
        CHOICES=choices,
        WIDTH=hidden,
        BLOCK=SUM_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,  # an answer × its weight is rounded, then added
    )
    return out_TH


def _check(
    x_TH: Tensor,
    weights_TK: Tensor,
    chosen_TK: Tensor,
    up_ENH: Tensor,
    down_EHI: Tensor,
    gated: bool,
    activation: str,
) -> None:
    tokens, hidden = x_TH.shape
    experts, _, inner = down_EHI.shape
    if up_ENH.shape != (experts, inner * (2 if gated else 1), hidden) or down_EHI.shape[1] != hidden:
        raise EngineError(f"experts: up {tuple(up_ENH.shape)}, down {tuple(down_EHI.shape)}, x {tuple(x_TH.shape)}")
    if weights_TK.shape != chosen_TK.shape or len(chosen_TK) != tokens:
        raise EngineError(f"experts: {tuple(weights_TK.shape)} weights, {tuple(chosen_TK.shape)} chosen, {tokens} rows")
    if not x_TH.dtype == up_ENH.dtype == down_EHI.dtype or weights_TK.dtype != torch.float32:
        raise EngineError(f"experts: x {x_TH.dtype}, up {up_ENH.dtype}, down {down_EHI.dtype}, {weights_TK.dtype}")
    if x_TH.stride(1) != 1 or not all(tensor.is_contiguous() for tensor in (weights_TK, up_ENH, down_EHI)):
        raise EngineError("experts: what must lie together in memory does not")
    if activation not in NAMES:
        raise EngineError(f"experts: got {shorten(activation)}, allowed: {', '.join(NAMES)}")


def _product(
    x: Tensor,
    choices: int,
    weight_ENK: Tensor,
    bias_EN: Tensor | None,
    groups: Groups,
    activation: str | None,
    gated: bool,
    out_PN: Tensor,
) -> None:
    """`choices`: pairs that share a row of x."""
    if bias_EN is not None and (bias_EN.shape != weight_ENK.shape[:2] or not bias_EN.is_contiguous()):
        raise EngineError(f"experts: bias {tuple(bias_EN.shape)} does not fit {tuple(weight_ENK.shape)}")
    cut = tiles(groups.block_rows, gated, x.dtype)
    _product_kernel[(groups.most_blocks * triton.cdiv(weight_ENK.shape[1], cut.columns),)](
        x,
        weight_ENK,
        bias_EN,
        groups.pairs,
        groups.experts,
        out_PN,
        x.stride(0),
        CHOICES=choices,
        COLUMNS=out_PN.shape[1],
        WIDTH=weight_ENK.shape[2],
        ACTIVATION=activation,
        GATED=gated,
        BLOCK_M=cut.rows,
        BLOCK_N=cut.columns,
        BLOCK_K=cut.depth,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )


@triton.jit
def _product_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,  # or None
    pairs: tl.tensor,
    experts: tl.tensor,
    out: tl.tensor,
    stride_x: tl.tensor,
    CHOICES: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """A block's rows × BLOCK_N rows of its expert's weights: act(x upᵀ), or act(x gateᵀ) · (x upᵀ).

    With a gate the tile's even columns meet rows of the gate and its odd ones those of up, so a thread holds both that
    belong together.
    """
    ROWS: tl.constexpr = 2 * COLUMNS if GATED else COLUMNS
    TILES: tl.constexpr = (ROWS + BLOCK_N - 1) // BLOCK_N
    TOGETHER: tl.constexpr = 8  # blocks that pass over the weights side by side: those of one expert share them in L2
    program = tl.program_id(0)
    num_blocks = tl.load(experts)
    if program >= num_blocks * TILES:
        return
    first = program // (TOGETHER * TILES) * TOGETHER
    side_by_side = tl.minimum(num_blocks - first, TOGETHER)
    block = first + program % (TOGETHER * TILES) % side_by_side
    tile = program % (TOGETHER * TILES) // side_by_side
    expert = tl.load(experts + 1 + block).to(tl.int64)
    pair = tl.load(pairs + block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    exists = pair >= 0

    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if GATED:
        row = row // 2 + row % 2 * COLUMNS
    row = tl.where(row < ROWS, row, 0)  # a column that is not stored
    depth = tl.arange(0, BLOCK_K)
    x_tile = x + (pair // CHOICES * stride_x)[:, None] + depth[None, :]
    weight_tile = weight + expert * ROWS * WIDTH + (row * WIDTH)[None, :] + depth[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        # Weights first: they need not wait for the numbers of the pairs.
        if WIDTH % BLOCK_K == 0:
            w_KN = tl.load(weight_tile + start)
            x_MK = tl.load(x_tile + start, mask=exists[:, None], other=0.0)
        else:
            inside = start + depth < WIDTH
            w_KN = tl.load(weight_tile + start, mask=inside[:, None], other=0.0)
            x_MK = tl.load(x_tile + start, mask=exists[:, None] & inside[None, :], other=0.0)
        total = tl.dot(x_MK, w_KN, total, input_precision="ieee")

    TYPE: tl.constexpr = out.dtype.element_ty
    if bias is not None:
        total += tl.load(bias + expert * ROWS + row).to(tl.float32)[None, :]
    result = total.to(TYPE).to(tl.float32)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if GATED:
        gate, up = tl.split(tl.reshape(result, [BLOCK_M, BLOCK_N // 2, 2]))
        result = activated(gate, ACTIVATION).to(TYPE).to(tl.float32) * up
        column = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    elif ACTIVATION is not None:
        result = activated(result, ACTIVATION)
    place = out + (pair * COLUMNS)[:, None] + column[None, :]
    tl.store(place, result.to(TYPE), mask=exists[:, None] & (column < COLUMNS)[None, :])


@triton.jit
def _sum_kernel(
    answers: tl.tensor,
    weights: tl.tensor,
    chosen: tl.tensor,
    out: tl.tensor,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(CHOICES):
        pair = token * CHOICES + choice
        expert = tl.load(chosen + pair)
        computed = (expert >= 0) & (expert < EXPERTS)
        answer = tl.load(answers + pair * WIDTH + column, mask=inside & computed, other=0.0).to(tl.float32)
        total += answer * tl.load(weights + pair, mask=computed, other=0.0)
    tl.store(out + token * WIDTH + column, total.to(out.dtype.element_ty), mask=inside)
