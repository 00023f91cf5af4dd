"""Norms in Triton against `ops.norm`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.backends.torch import ops
from headrace.backends.torch.kernels import norm as kernel
from headrace.core.errors import EngineError
from headrace.core.spec import NormSpec

SPECS = {
    "rms": NormSpec("rms", 1e-5, 0),
    "gemma": NormSpec("rms", 1e-6, 0, unit_offset=True),
    "layer": NormSpec("layer", 1e-5, 0, bias=True),
    "layer without bias": NormSpec("layer", 1e-5, 0),
}
TYPES = (torch.float32, torch.float16)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}
"""Relative and absolute: float16 within one rounding, for sums are added in another order."""
DIFFERENT = 0.02
"""Most elements of float16 that are another number: the same numbers are rounded at the same places."""


def case(name: str, width: int, dtype: torch.dtype) -> tuple[NormSpec, Tensor, Tensor | None]:
    spec = replace(SPECS[name], width=width)
    weight = torch.rand(width) + 0.5
    bias = torch.randn(width).to(dtype) if spec.bias else None
    return spec, weight if spec.unit_offset else weight.to(dtype), bias


def rows_apart(rows: int, width: int, dtype: torch.dtype, fill: float = torch.nan) -> Tensor:
    """A view with unused columns on both sides."""
    return torch.full((rows, width + 7), fill, dtype=dtype)[:, 3 : 3 + width]


def close(got: Tensor, wanted: Tensor) -> None:
    tolerance = TOLERANCE[wanted.dtype]
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    if wanted.dtype == torch.float16:
        assert (got != wanted).float().mean() <= DIFFERENT


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("width", [5, 130, 1500])
def test_a_norm_is_the_reference_s_and_touches_no_other_memory(name: str, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    spec, weight, bias = case(name, width, dtype)
    x, out = rows_apart(5, width, dtype), rows_apart(5, width, dtype)
    x.copy_(torch.randn(5, width) * 3 + 1)
    wanted = ops.norm(x, weight, bias, spec)
    assert kernel.norm(x, weight, bias, spec, out=out) is out
    close(out, wanted)
    assert out._base is not None and int(out._base.isnan().sum()) == 5 * 7
    close(kernel.norm(x, weight, bias, spec), wanted)
    assert kernel.norm(x, weight, bias, spec, out=x) is x
    close(x, wanted)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("wide", [False, True])
def test_the_sum_before_a_norm_is_rounded_and_kept(
    name: str, wide: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = 70
    if wide:
        monkeypatch.setattr(kernel, "WIDEST", 64)  # three blocks
    torch.manual_seed(1)
    spec, weight, bias = case(name, width, dtype)
    hidden, branch = rows_apart(3, width, dtype), rows_apart(3, width, dtype)
    hidden.copy_(torch.randn(3, width) * 100)
    branch.copy_(torch.randn(3, width))
    total = hidden + branch
    wanted = ops.norm(total, weight, bias, spec)
    got = kernel.add_norm(hidden, branch, weight, bias, spec)
    assert torch.equal(hidden, total)
    close(got, wanted)
    assert hidden._base is not None and int(hidden._base.isnan().sum()) == 3 * 7
    close(kernel.norm(hidden, weight, bias, spec, out=hidden), wanted)  # in place, of several blocks too


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's numpy, at inf × 0
@pytest.mark.parametrize("width", [96, 600])
def test_a_row_s_bits_depend_on_it_alone(width: int) -> None:
    torch.manual_seed(2)
    spec, weight, bias = case("rms", width, torch.float32)
    x = torch.randn(12, width)
    x[3] = torch.nan
    x[4, 5] = torch.inf
    together = kernel.norm(x, weight, bias, spec)
    for row in (0, 2, 5, 11):
        assert torch.equal(together[row], kernel.norm(x[row : row + 1], weight, bias, spec)[0])
    assert together[3].isnan().all() and together[4, 5].isnan()
    assert together[[0, 1, 2, 5, 6, 7, 8, 9, 10, 11]].isfinite().all()


def test_rows_of_bfloat16_are_read_and_written_as_such() -> None:
    x = torch.tensor([[3.0, -3.0, 3.0, -3.0]], dtype=torch.bfloat16)
    spec = NormSpec("rms", 1e-9, 4, unit_offset=True)
    assert kernel.norm(x, torch.full((4,), 2.0), None, spec).tolist() == [[2.0, -2.0, 2.0, -2.0]]


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 300), st.integers(1, 9), st.sampled_from(sorted(SPECS)))
def test_any_width_and_number_of_rows(width: int, rows: int, name: str) -> None:
    torch.manual_seed(width)
    spec, weight, bias = case(name, width, torch.float32)
    x = torch.randn(rows, width) + 2
    close(kernel.norm(x, weight, bias, spec), ops.norm(x, weight, bias, spec))


def test_blocks_of_a_width_hold_it_with_a_load_of_16_bytes_a_thread() -> None:
    assert kernel.blocks(4096) == (4096, 1, 16)
    assert kernel.blocks(128) == (128, 8, 4)
    for width in range(1, kernel.WIDEST, 97):
        block, rows, warps = kernel.blocks(width)
        assert block >= width and block * rows >= kernel.TILE
        assert warps in (4, 8, 16)


def test_no_rows_give_no_rows() -> None:
    spec, weight, bias = case("rms", 8, torch.float32)
    assert kernel.norm(torch.zeros(0, 8), weight, bias, spec).shape == (0, 8)


def test_what_does_not_fit_is_refused() -> None:
    spec, weight, bias = case("rms", 8, torch.float32)
    x = torch.zeros(2, 8)
    with pytest.raises(EngineError, match=r"rows of width 8.*\(2, 9\)"):
        kernel.norm(torch.zeros(2, 9), weight, bias, spec)
    with pytest.raises(EngineError, match="side by side"):
        kernel.norm(torch.zeros(8, 2).T, weight, bias, spec)
    with pytest.raises(EngineError, match="weight"):
        kernel.norm(x.half(), weight, bias, spec)
    with pytest.raises(EngineError, match="out"):
        kernel.norm(x, weight, bias, spec, out=torch.zeros(3, 8))
    with pytest.raises(EngineError, match="branch"):
        kernel.add_norm(x, x.half(), weight, bias, spec)
