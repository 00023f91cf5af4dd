"""What the native kernels do to one row at a time, against float64; and half-precision numbers, every one of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from tests.unit.native_reference import quantise_rows, same_bits

kernels = pytest.importorskip("headrace.backends.native._kernels")

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

SETS: list[str] = kernels.instruction_sets()
WIDTHS = (*range(1, 101), 576, 4096)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
LARGE = np.array([0, 1e-45, 1e-38, 1e-3, 20, 87, 88, 89, 100, 1e4, 1e13, 1e20, 3.4e38], np.float32)

pytestmark = pytest.mark.parametrize("isa", SETS)


# ---------------------------------------------------------------- rows as int8


def check_rows(isa: str, x_TK: F32) -> None:
    codes, *found = kernels.quantise_rows(isa, x_TK)
    expected = quantise_rows(x_TK)
    assert np.array_equal(codes, expected.codes)
    for one, other in zip(found, (expected.scales, expected.sums, expected.counts, expected.halves), strict=True):
        assert same_bits(one, other)


@given(x_TK=arrays.arrays(np.float32, (2, 64), elements=st.floats(width=32)))
def test_any_row_is_the_references(isa: str, x_TK: F32) -> None:
    check_rows(isa, x_TK)


def test_usual_rows_are_the_references(isa: str) -> None:
    rng = np.random.default_rng(0)
    sizes = np.exp2(rng.integers(-120, 120, (300, 1))).astype(np.float32)
    x_TK = rng.standard_normal((300, 96)).astype(np.float32) * sizes
    check_rows(isa, x_TK)
    codes, scales, sums, counts, halves = kernels.quantise_rows(isa, x_TK)
    error = np.abs(codes.reshape(300, 3, 32) * scales[..., None].astype(np.float64) - x_TK.reshape(300, 3, 32))
    assert (error <= scales[..., None] * 0.5001 + 2.0**-100).all() and np.abs(codes).max() == 127
    assert np.array_equal(counts, codes.reshape(300, 3, 32).sum(-1)) and np.array_equal(sums, scales * counts)
    assert np.array_equal(halves, codes.reshape(300, 3, 32)[..., :16].sum(-1))


def test_borders_of_rows(isa: str) -> None:
    """Ties, the least group that counts, the largest and what is not finite at each place."""
    ties = np.arange(-63.5, 64, 4, dtype=np.float32)
    ties[5] = 127
    rows = [ties, -ties, *(np.full(32, value, np.float32) for value in (*LARGE, *-LARGE))]
    least = np.float32(2.0**-100)
    rows += [np.full(32, value) for value in (least, np.nextafter(least, np.float32(0)), least * 2)]
    for place in range(32):
        for value in (np.nan, np.inf, -np.inf):
            rows.append(np.ones(32, np.float32))
            rows[-1][place] = value
    check_rows(isa, np.array(rows, np.float32))


def test_only_whole_groups(isa: str) -> None:
    with pytest.raises(ValueError, match="whole groups"):
        kernels.quantise_rows(isa, np.zeros((1, 33), np.float32))
    assert kernels.quantise_rows(isa, np.zeros((3, 0), np.float32))[0].shape == (3, 0)


# ---------------------------------------------------------------- norms


def norm(kind: str, x: F32, weight: F32, bias: F32 | None, eps: float) -> F64:
    wide = x.astype(np.float64)
    if kind == "layer":
        wide = wide - wide.mean(-1, keepdims=True)
    scaled = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * weight.astype(np.float64)
    return np.asarray(scaled if bias is None else scaled + bias.astype(np.float64))


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_norms(isa: str, kind: str, with_bias: bool) -> None:
    for width in WIDTHS:
        rng = np.random.default_rng(width)
        x_TD = rng.standard_normal((4, width)).astype(np.float32) + np.float32(0.3)
        x_TD[1] *= 1e-6
        x_TD[2] *= 1e6
        weight = rng.standard_normal(width).astype(np.float32)
        bias = rng.standard_normal(width).astype(np.float32) if with_bias else None
        found = kernels.norm_rows(isa, kind, x_TD, weight, bias, 1e-5)
        expected = norm(kind, x_TD, weight, bias, 1e-5)
        # Taking the mean away leaves its rounding: a share of |x|, not of the difference.
        size = np.abs(norm("rms", x_TD, weight, None, 1e-5)) + np.abs(expected)
        if kind == "layer":
            spread = np.sqrt(x_TD.astype(np.float64).var(-1, keepdims=True) + 1e-5)
            size += np.abs(x_TD).max(-1, keepdims=True) / spread * np.abs(weight)
        assert (np.abs(found - expected) <= 2e-6 * size).all(), width
        for row in range(4):  # alone it has the same bits
            alone = kernels.norm_rows(isa, kind, x_TD[row : row + 1], weight, bias, 1e-5)
            assert alone.tobytes() == found[row : row + 1].tobytes()


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_of_strange_rows(isa: str, kind: str) -> None:
    x_TD = np.random.default_rng(0).standard_normal((5, 37)).astype(np.float32)
    weight, bias = np.ones(37, np.float32), np.full(37, np.float32(0.5))
    usual = kernels.norm_rows(isa, kind, x_TD, weight, bias, 1e-6)
    x_TD[1, 36], x_TD[3, 5], x_TD[4] = np.nan, np.inf, 0
    found = kernels.norm_rows(isa, kind, x_TD, weight, bias, 1e-6)
    assert found[[0, 2]].tobytes() == usual[[0, 2]].tobytes() and (found[4] == 0.5).all()
    assert np.isnan(found[1]).all() and np.isnan(found[3, 5])


def test_what_no_norm_is_refused(isa: str) -> None:
    x, one = np.ones((1, 4), np.float32), np.ones(4, np.float32)
    for kind, weight, bias in (("batch", one, None), ("rms", one[:3], None), ("rms", one, one[:3])):
        with pytest.raises(ValueError, match=r"no norm named batch|widths differ"):
            kernels.norm_rows(isa, kind, x, weight, bias, 1e-5)


# ---------------------------------------------------------------- activations


def activation(name: str, x: float) -> float:
    if math.isinf(x):  # what the function tends to
        return max(x, 0.0)
    if name == "relu":
        return max(x, 0.0)
    if name == "silu":
        return x / (1 + math.exp(-x)) if x > -700 else 0.0
    if name == "gelu":
        return 0.5 * x * math.erfc(-x / math.sqrt(2))
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sample(width: int, seed: int) -> F32:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, width)).astype(np.float32) * rng.choice(np.array([0.01, 1, 5, 40], np.float32), width)
    x[1, : len(LARGE)] = LARGE[:width]
    x[0, : len(LARGE)] = -LARGE[:width]
    return np.asarray(x)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_activations(isa: str, name: str, gated: bool) -> None:
    for width in (*range(1, 50), 576):
        gate = sample(width, width)
        up = np.random.default_rng(1).uniform(-1, 1, gate.shape).astype(np.float32) if gated else None
        found = kernels.activate_rows(isa, name, gate, up)
        expected = np.vectorize(lambda x: activation(name, x), otypes=[float])(gate.astype(np.float64))
        factor = 1.0 if up is None else up.astype(np.float64)
        # 1 + erf and 1 + tanh lose digits where they are near zero: an error of the size of x × 2^-24.
        slack = 3e-7 * (
            np.abs(expected) if name in ("silu", "relu") else np.minimum(np.abs(gate), 10) + np.abs(expected)
        )
        assert (np.abs(found - expected * factor) <= (slack + 1e-35) * np.abs(factor)).all(), width


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_activations_of_strange_numbers(isa: str, name: str, gated: bool) -> None:
    gate = np.zeros((3, 21), np.float32)
    gate[1, [0, 7, 20]] = np.nan
    gate[2, 3], gate[2, 20] = np.inf, -np.inf
    found = kernels.activate_rows(isa, name, gate, np.ones_like(gate) if gated else None)
    assert np.isnan(found[1, [0, 7, 20]]).all() and np.isnan(found[1]).sum() == 3 and (found[0] == 0).all()
    # At minus infinity 0 is the limit; a NaN, ∞ × 0, is as good.
    assert found[2, 3] == np.inf and not abs(found[2, 20]) > 1e-30
    assert (np.delete(found[2], [3, 20]) == 0).all()


def test_activations_that_do_not_exist_are_refused(isa: str) -> None:
    x = np.zeros((1, 4), np.float32)
    for name, up in (("swish", None), ("silu", x[:, :3])):
        with pytest.raises(ValueError, match=r"no activation named swish|shapes differ"):
            kernels.activate_rows(isa, name, x, up)


# ---------------------------------------------------------------- sums, scales, caps


def test_rows_are_added(isa: str) -> None:
    for width in WIDTHS:
        rng = np.random.default_rng(width)
        x, y = rng.standard_normal((2, 3, width)).astype(np.float32)
        found = kernels.add_rows(isa, x, 0.3, y)
        product = np.float64(np.float32(0.3)) * x
        assert (np.abs(found - (y + product)) <= 1e-7 * (np.abs(y) + np.abs(product))).all()
    with pytest.raises(ValueError, match="shapes differ"):
        kernels.add_rows(isa, x, 0.3, y[:, 1:])


@pytest.mark.parametrize("cap", [0.0, 30.0, 0.5])
def test_rows_are_scaled_and_capped(isa: str, cap: float) -> None:
    for width in (*range(1, 40), 576):
        x = sample(width, width)
        found = kernels.scale_rows(isa, 0.25, cap, x)
        scaled = x.astype(np.float64) * 0.25
        expected = scaled if cap == 0 else cap * np.tanh(scaled / cap)
        assert (np.abs(found - expected) <= 4e-7 * np.abs(expected) + 1e-43).all()
    strange = np.array([[np.nan, np.inf, -np.inf, 0.0]], np.float32)
    found = kernels.scale_rows(isa, 0.25, cap, strange)
    limit = np.inf if cap == 0 else np.nan  # capped, an infinite number would look like a usual one
    assert same_bits(found, np.array([[np.nan, limit, -limit, 0]], np.float32))


# ---------------------------------------------------------------- half-precision numbers


@pytest.mark.parametrize("source", ["f16", "bf16"])
def test_every_16_bit_number_is_read_exactly(isa: str, source: str) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    array: NDArray[Any] = bits.view(np.float16) if source == "f16" else bits
    values = array.astype(np.float32) if source == "f16" else (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    weight = kernels.pack_numbers(kernels.Packer(1), array[:, None], source, source)
    found = kernels.linear(isa, weight, np.ones((1, 1), np.float32))
    assert same_bits(found[0], values)


def test_every_half_is_read_exactly_as_a_scale(isa: str) -> None:
    d = np.arange(2**16, dtype=np.uint16).view(np.float16)[:, None]
    q = np.zeros((2**16, 1, 32), np.int8)
    q[:, 0, 3] = 1
    weight = kernels.pack_blocks(kernels.Packer(1), "q8_0", [d, q], 2**16, 32)
    x = np.zeros((1, 32), np.float32)
    x[0, 3] = 127  # code 127, scale 1
    found = kernels.linear(isa, weight, x)[0]
    with np.errstate(invalid="ignore"):
        assert same_bits(found, d[:, 0].astype(np.float32) * np.float32(127))
