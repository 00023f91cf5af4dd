"""Activations in Triton against float64 and `ops`."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from headrace.backends.torch import ops
from headrace.backends.torch.kernels.activation import NAMES, activate, gated
from headrace.core.errors import EngineError

TRUE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: 0.5 * x * torch.special.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
    "relu": functional.relu,
}
WIDTHS = (3, 64, 1100)

# The interpreter's numpy, where exp becomes infinite and at NaN.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")


def spread(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """A view with NaN beside it; from tiny to so large that exp overflows."""
    x = torch.full((rows, width + 5), torch.nan, dtype=dtype)[:, 2 : 2 + width]
    return x.copy_(torch.randn(rows, width, dtype=torch.float64) * torch.logspace(-3, 2.2, width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_an_activation_is_right_to_its_last_digits(name: str, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    x = spread(3, width, dtype)
    got = activate(x, name)
    wanted = TRUE[name](x.double())
    assert got.dtype == dtype and got.is_contiguous()
    relative = 2e-6 if dtype == torch.float32 else 6e-4
    # gelu's 1 + erf loses digits below zero, in torch as well.
    torch.testing.assert_close(got.double(), wanted, rtol=relative, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_gate_is_rounded_before_it_is_multiplied(name: str, width: int) -> None:
    torch.manual_seed(width)
    x = spread(3, 2 * width, torch.float16)
    gate, up = x.chunk(2, dim=-1)
    assert torch.equal(gated(x, name), activate(gate, name) * up)  # up begins at any column


@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_with_torch(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 96)
    torch.testing.assert_close(gated(x, name), ops.gated(x, name), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_fault_shows_and_stays_in_its_place(name: str) -> None:
    x = torch.ones(2, 6)
    x[0, 1] = torch.nan
    x[1, 2] = torch.inf
    got = activate(x, name)
    assert got[0, 1].isnan() and got[1, 2] == torch.inf
    x[0, 1], x[1, 2] = 1.0, 1.0
    others = torch.ones(2, 6, dtype=torch.bool)
    others[0, 1] = others[1, 2] = False
    assert torch.equal(got[others], activate(x, name)[others])


def test_no_rows_give_no_rows() -> None:
    assert gated(torch.zeros(0, 8), "silu").shape == (0, 4)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(EngineError, match=r"got 'tanh', allowed: silu, gelu"):
        activate(torch.zeros(2, 4), "tanh")
    with pytest.raises(EngineError, match="two halves"):
        gated(torch.zeros(2, 5), "silu")
    with pytest.raises(EngineError, match="side by side"):
        activate(torch.zeros(4, 2).T, "relu")
