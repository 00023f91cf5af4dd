"""Activations, alone or times the up projection: what `ops.activate` and `ops.gated` mean.

Elementwise in float32, so an element's bits depend on it alone. T: rows, N: width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.core.errors import EngineError, shorten

BLOCK = 1024
WARPS = 4
"""8 elements a thread: a load of 16 bytes where they have two each."""

NAMES = ("silu", "gelu", "gelu_tanh", "relu")


@triton.jit
def activated(x: tl.tensor, NAME: tl.constexpr) -> tl.tensor:
    """The activation of float32 elements, for kernels. NaN stays NaN."""
    if NAME == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif NAME == "gelu":
        x = x * 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        # ½ (1 + tanh u) = 1 ÷ (1 + exp(−2 u)), u = √(2/π) (x + 0.044715 x³); no digits are lost where x < 0.
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(NAME == "relu")
        x = tl.where(x < 0.0, 0.0, x)
    return x


@triton.jit
def _activation_kernel(
    x: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    WIDTH: tl.constexpr,
    NAME: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    x += row * x_stride
    y = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(x + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        y = activated(y, NAME).to(out.dtype.element_ty).to(tl.float32) * up
    else:
        y = activated(y, NAME)
    tl.store(out + row * WIDTH + column, y.to(out.dtype.element_ty), mask=inside)


def gated(gate_up_T2N: Tensor, activation: str) -> Tensor:
    """act(gate) × up -> (T, N): rows hold the gate and then the up projection, and may lie apart.

    act(gate) is rounded to the type before it is multiplied. Raises EngineError for another shape or activation.
    """
    if gate_up_T2N.shape[-1] % 2:
        raise EngineError(f"gated: rows of {gate_up_T2N.shape[-1]} elements have no two halves")
    return _launch(gate_up_T2N, activation, gate_up_T2N.shape[-1] // 2, True)


def activate(x_TN: Tensor, activation: str) -> Tensor:
    """act(x) -> (T, N), rounded once; rows may lie apart. Raises EngineError for another shape or activation."""
    return _launch(x_TN, activation, x_TN.shape[-1], False)


def _launch(x: Tensor, activation: str, width: int, is_gated: bool) -> Tensor:
    if x.ndim != 2 or x.stride(1) != 1:
        raise EngineError(f"activation: rows side by side in memory needed, got {tuple(x.shape)}, {x.stride()}")
    if activation not in NAMES:
        raise EngineError(f"activation: got {shorten(activation)}, allowed: {', '.join(NAMES)}")
    out = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
    if out.numel():
        grid = (x.shape[0], triton.cdiv(width, BLOCK))
        _activation_kernel[grid](x, out, x.stride(0), width, activation, is_gated, BLOCK, num_warps=WARPS)
    return out
