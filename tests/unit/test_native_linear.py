"""Products of the native kernels against their arithmetic in numpy: every packing, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.weights.qtensor import SCHEMES, QTensor
from tests.unit import native_reference as reference
from tests.unit.native_reference import Coded, same_bits
from tests.unit.test_qtensor import packed

kernels = pytest.importorskip("headrace.backends.native._kernels")
weights = pytest.importorskip("headrace.backends.native.weights")

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

SETS: list[str] = kernels.instruction_sets()
PLAIN = ("f32", "f16", "bf16")
BLOCKS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q3_K", "q4_K", "q5_K", "q6_K")
SCALED = ("int4", "int4_asym", "int8", "int8_asym")
KINDS = (*PLAIN, *BLOCKS, *SCALED)
PACKER = kernels.Packer(1)
# Borders of tiles (4, 6, 12 tokens), of blocks of 120, and what lies beside them.
TOKENS = (*range(1, 14), 16, 23, 25, 37, 119, 120, 121, 128, 140)


def columns_of(kind: str) -> int:
    return 256 if kind.endswith("_K") else 32


def tensor_of(kind: str, rows: int, columns: int, seed: int, group: int = 32) -> QTensor:
    """Random codes and moderate scales."""
    if kind in SCHEMES:
        return QTensor.from_bytes(kind, (rows, columns), packed(kind, (rows, columns), seed))
    rng = np.random.default_rng(seed)
    groups = columns // group
    four = kind.startswith("int4")
    numbers = rng.integers(0, 256, (rows, columns // (2 if four else 1)), dtype=np.uint8)
    planes: dict[str, Any] = {
        "q": numbers if four else numbers.view(np.int8),
        "s": rng.uniform(-0.1, 0.1, (rows, groups)).astype(np.float32),
    }
    if kind.endswith("_asym"):
        zeros = rng.integers(0, 16 if four else 256, (rows, groups), dtype=np.uint8)
        planes["z"] = zeros if four else zeros.view(np.int8)
    return QTensor(kind, (rows, columns), planes)


def pack(tensor: QTensor) -> Any:
    if tensor.scheme in PLAIN:
        return kernels.pack_numbers(PACKER, tensor.planes["data"], tensor.scheme, tensor.scheme)
    return weights._stored(PACKER, tensor)


def rows_of(tokens: int, columns: int, seed: int) -> F32:
    """Activations: rows of quite different sizes."""
    rng = np.random.default_rng(seed)
    sizes = np.exp2(rng.integers(-6, 7, (tokens, 1))).astype(np.float32)
    return rng.standard_normal((tokens, columns)).astype(np.float32) * sizes


def expected(isa: str, tensor: QTensor, x_TK: F32) -> F32:
    fused = isa != "portable"
    if tensor.scheme in PLAIN:
        return reference.linear_numbers(x_TK, tensor.dequantise(), fused)
    return reference.linear(reference.quantise_rows(x_TK), reference.coded(tensor), fused)


def step_of(tensor: QTensor, x_TK: F32) -> tuple[F64, F64]:
    """The product in float64 and the sum of its terms' sizes."""
    if tensor.scheme not in PLAIN:
        return reference.linear_exact(reference.quantise_rows(x_TK), reference.coded(tensor))
    x, w = x_TK.astype(np.float64), tensor.dequantise().astype(np.float64)
    return x @ w.T, np.abs(x) @ np.abs(w).T


# ---------------------------------------------------------------- the reference


def test_fma_rounds_once() -> None:
    rng = np.random.default_rng(0)
    numbers = (rng.standard_normal((3, 300)) * np.exp2(rng.integers(-30, 30, (3, 300)))).astype(np.float32)
    numbers[2, ::2] = -(numbers[0] * numbers[1])[::2]  # only what the product's rounding lost is left
    found = reference.fma(*numbers)
    beside = np.stack([np.nextafter(found, np.float32(side)) for side in (-np.inf, np.inf)])
    for index, (a, b, c) in enumerate(numbers.T.tolist()):
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        distance = abs(Fraction(found[index].item()) - exact)
        assert all(distance <= abs(Fraction(one) - exact) for one in beside[:, index].tolist())
    # Just above the middle of two floats, by less than a float64 can tell: up, and not to the even one.
    one = np.float32(1)
    assert reference.fma(np.float32(2.0**-24), one, one) == 1
    assert reference.fma(np.float32(2.0**-24 + 2.0**-47), np.float32(1 + 2.0**-23), one) > 1
    assert reference.fma(np.float32(1e38), np.float32(1e38), one) == np.inf
    assert np.isnan(reference.fma(np.float32(np.inf), one, np.float32(-np.inf)))


@pytest.mark.parametrize("kind", (*BLOCKS, *SCALED))
def test_the_references_codes_mean_what_the_scheme_says(kind: str) -> None:
    tensor = tensor_of(kind, 3, 512, 1)
    weight = reference.coded(tensor)
    most = 15 if kind.startswith(("q4", "int4")) else 255
    assert weight.codes.min() >= 0 and weight.codes.max() <= most
    found, values = reference.values_of(weight), tensor.dequantise()
    if kind.endswith("_asym"):  # scale × code - scale × zero: one rounding more
        assert np.allclose(found, values, rtol=0, atol=255 * 0.1 * 2.0**-22)
    else:
        assert np.array_equal(found, values)


# ---------------------------------------------------------------- products


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(data=st.data())
def test_products_are_the_references(isa: str, kind: str, data: st.DataObject) -> None:
    tokens = data.draw(st.sampled_from(TOKENS[:-5]))
    rows = data.draw(st.sampled_from((1, 2, 7, 15, 16, 17, 31, 32, 33, 48)))
    columns = columns_of(kind) * data.draw(
        st.sampled_from((1, 2, 3, 5) if kind.endswith("_K") else (1, 2, 3, 5, 48, 63))
    )
    if kind in PLAIN:
        columns = data.draw(st.sampled_from((1, 2, 31, 96, 255, 256, 257, 577)))
    groups = [g for g in (32, 64, 96, columns) if columns % g == 0] if kind in SCALED else [32]
    seed = data.draw(st.integers(0, 999))
    tensor = tensor_of(kind, rows, columns, seed, data.draw(st.sampled_from(groups)))
    weight, x_TK = pack(tensor), rows_of(tokens, columns, seed)
    rng = np.random.default_rng(seed)
    bias = rng.standard_normal(rows).astype(np.float32) if data.draw(st.booleans()) else None
    y_TN = rng.standard_normal((tokens, rows)).astype(np.float32) if data.draw(st.booleans()) else None
    scale = data.draw(st.sampled_from((1.0, 0.0, -0.37, 3.5)))

    found = kernels.linear(isa, weight, x_TK, bias, y_TN, scale)
    product = expected(isa, tensor, x_TK)
    assert same_bits(found, reference.finish(product, bias, y_TN, scale, isa != "portable"))
    exact, size = step_of(tensor, x_TK)
    assert (np.abs(kernels.linear(isa, weight, x_TK) - exact) <= 1e-5 * size + 1e-37).all()


@pytest.mark.parametrize("kind", KINDS)
def test_avx2_and_avx512_agree_bit_for_bit(kind: str) -> None:
    if not {"avx2", "avx512"} <= set(SETS):
        pytest.skip("this machine has only one of them")
    weight, x_TK = pack(tensor_of(kind, 50, 768, 3)), rows_of(131, 768, 3)
    assert same_bits(kernels.linear("avx2", weight, x_TK), kernels.linear("avx512", weight, x_TK))


@pytest.mark.parametrize("kind", (*BLOCKS, *SCALED))
def test_rounding_the_activations_is_all_that_separates_it_from_the_weights_values(kind: str) -> None:
    tensor, x_TK = tensor_of(kind, 20, 512, 5), rows_of(9, 512, 5)
    values = tensor.dequantise().astype(np.float64)
    half_steps = reference.quantise_rows(x_TK).scales.astype(np.float64) / 2
    bound = half_steps @ np.abs(values).reshape(20, -1, 32).sum(-1).T + 1e-5 * (np.abs(x_TK) @ np.abs(values).T)
    assert (np.abs(kernels.linear(SETS[-1], pack(tensor), x_TK) - x_TK @ values.T) <= bound).all()


# ---------------------------------------------------------------- invariance


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_no_other(isa: str, kind: str) -> None:
    """Alone, at each place of a tile, on both sides of a block's border: the same bits."""
    columns = 256 + columns_of(kind)
    weight, x_TK = pack(tensor_of(kind, 33, columns, 7)), rows_of(140, columns, 7)
    whole = kernels.linear(isa, weight, x_TK)
    for tokens in TOKENS:
        assert kernels.linear(isa, weight, x_TK[:tokens]).tobytes() == whole[:tokens].tobytes()
    order = np.random.default_rng(7).permutation(140)
    assert kernels.linear(isa, weight, x_TK[order]).tobytes() == whole[order].tobytes()
    for start in range(1, 14):
        assert kernels.linear(isa, weight, x_TK[start : start + 14]).tobytes() == whole[start : start + 14].tobytes()


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_panels_computed_apart_are_the_whole(isa: str, kind: str) -> None:
    columns = columns_of(kind)
    for rows in (1, 16, 17, 33, 64):
        weight = pack(tensor_of(kind, rows, columns, rows))
        x_TK, bias = rows_of(5, columns, rows), np.arange(rows, dtype=np.float32)
        y_TN = np.full((5, rows), 7, np.float32)
        whole = kernels.linear(isa, weight, x_TK, bias, y_TN, 0.5)
        panels = (rows + 15) // 16
        for begin in range(panels + 1):
            for end in range(begin, panels + 1):
                part = kernels.linear(isa, weight, x_TK, bias, y_TN, 0.5, begin, end)
                mine = np.zeros(rows, bool)
                mine[16 * begin : 16 * end] = True
                assert part[:, mine].tobytes() == whole[:, mine].tobytes()
                assert (part[:, ~mine] == 7).all()
        assert same_bits(kernels.linear(isa, weight, x_TK, None, None, 1.0, 0, 0), np.zeros((5, rows), np.float32))


# ---------------------------------------------------------------- extremes


def powers(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float16]:
    sizes: F64 = np.ldexp(rng.choice([1.0, -1.0], shape), rng.integers(-1, 2, shape))
    return sizes.astype(np.float16)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_whole_numbers_are_exact(isa: str, kind: str) -> None:
    """Scales that are powers of two and activations that are codes: nothing is rounded, on any instruction set."""
    rng = np.random.default_rng(11)
    records = packed(kind, (19, 256), 11).view(SCHEMES[kind].dtype).copy()
    for name in ("d", "m", "dmin"):
        if name in (records.dtype.names or ()):
            records[name] = powers(rng, records.shape)
    tensor = QTensor.from_bytes(kind, (19, 256), records.view(np.uint8))
    codes = rng.integers(-15, 16, (13, 256))  # small ones: no sum passes 2^24
    codes[:, ::32] = 127  # the peak of each group: its scale is then a power of two
    x_TK = (codes * np.exp2(rng.integers(-4, 5, (13, 1)))).astype(np.float32)
    exact = x_TK.astype(np.float64) @ tensor.dequantise().astype(np.float64).T
    assert (kernels.linear(isa, pack(tensor), x_TK) == exact).all()


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("kind", (*BLOCKS, *SCALED))
@pytest.mark.parametrize("activation", [127.0, -127.0, "alternating", "by fours"])
def test_no_sum_overflows(isa: str, kind: str, activation: float | str) -> None:
    """The largest codes everywhere against the largest activations: sums stay what they are in 64 bits."""
    signs = np.ones(512)
    if isinstance(activation, str):
        signs = np.where(np.arange(512) // (1 if activation == "alternating" else 4) % 2, -1, 1)
    else:
        signs *= np.sign(activation)
    x_TK = np.tile((127 * signs).astype(np.float32), (13, 1))
    for fill in (0, 15, 255):
        if kind in SCHEMES:
            records = np.full(17 * 512 // SCHEMES[kind].group * SCHEMES[kind].group_bytes, fill, np.uint8)
            blocks: NDArray[Any] = records.view(SCHEMES[kind].dtype)
            for name in ("d", "m", "dmin"):
                if name in (blocks.dtype.names or ()):
                    blocks[name] = 1
            tensor = QTensor.from_bytes(kind, (17, 512), records)
        else:
            tensor = tensor_of(kind, 17, 512, 0)
            byte = np.full(tensor.planes["q"].shape, fill if kind.startswith("int4") else fill ^ 128, np.uint8)
            ones = {"q": byte.view(tensor.planes["q"].dtype), "s": np.ones_like(tensor.planes["s"])}
            tensor = QTensor(kind, tensor.shape, {**tensor.planes, **ones})
        exact = x_TK.astype(np.float64) @ tensor.dequantise().astype(np.float64).T
        assert np.abs(exact).max() < 2**30
        assert np.allclose(kernels.linear(isa, pack(tensor), x_TK), exact, rtol=3e-7, atol=2.0**-24 * 512 * 127 * 4096)
        assert same_bits(kernels.linear(isa, pack(tensor), x_TK), expected(isa, tensor, x_TK))


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_extreme_scales(isa: str, kind: str) -> None:
    """Subnormal, largest, zero, negative, infinite and NaN scales: each row of the weight for itself."""
    extremes = np.array([0, 1, 0x3FF, 0x400, 0x7BFF, 0x8001, 0xFBFF, 0x7C00, 0xFC00, 0x7E01, 0x3C00], np.uint16)
    columns = 512
    records = packed(kind, (len(extremes), columns), 2).view(SCHEMES[kind].dtype).copy()
    records = records.reshape(len(extremes), -1)
    records["d"] = extremes.view(np.float16)[:, None]
    tensor = QTensor.from_bytes(kind, (len(extremes), columns), records.reshape(-1).view(np.uint8))
    x_TK = rows_of(7, columns, 2)
    found = kernels.linear(isa, pack(tensor), x_TK)
    assert same_bits(found, expected(isa, tensor, x_TK))
    finite = np.isfinite(extremes.view(np.float16))
    assert np.isfinite(found[:, finite]).all() and not np.isfinite(found[:, ~finite]).any()


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_strange_activations_stay_in_their_row(isa: str, kind: str) -> None:
    columns = 256
    tensor = tensor_of(kind, 18, columns, 4)
    weight, x_TK = pack(tensor), rows_of(15, columns, 4)
    usual = kernels.linear(isa, weight, x_TK)
    strange = {1: np.nan, 4: np.inf, 5: -np.inf, 9: 0.0, 11: 1e-42, 13: 3e38}
    for row, value in strange.items():
        x_TK[row] = 0 if row in (1, 4, 5) else value
        x_TK[row, 40] = value  # one number of the row is enough
    found = kernels.linear(isa, weight, x_TK)
    others = np.array([row for row in range(15) if row not in strange])
    assert found[others].tobytes() == usual[others].tobytes()
    assert np.isnan(found[1]).all() and not np.isfinite(found[[4, 5]]).any()
    assert (found[9] == 0).all() and (np.abs(found[11]) < 1e-35).all()
    assert same_bits(found, expected(isa, tensor, x_TK))


@pytest.mark.parametrize("isa", SETS)
def test_a_weight_that_is_not_a_number_stays_in_its_column(isa: str) -> None:
    w_NK = np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32)
    w_NK[3, 5], w_NK[17, 63] = np.nan, np.inf
    x_TK = rows_of(6, 64, 0)
    for weight in (
        kernels.pack_numbers(PACKER, w_NK, "f32", "f32"),
        kernels.quantise_numbers(PACKER, 8, w_NK, "f32"),
        kernels.quantise_numbers(PACKER, 4, w_NK, "f32"),
    ):
        strange = ~np.isfinite(kernels.linear(isa, weight, x_TK))
        assert (strange == np.isin(np.arange(20), (3, 17))).all()


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_a_product_of_nothing(isa: str, kind: str) -> None:
    columns = columns_of(kind)
    weight = pack(tensor_of(kind, 5, columns, 0))
    assert kernels.linear(isa, weight, np.zeros((0, columns), np.float32)).shape == (0, 5)
    assert kernels.linear(isa, pack(tensor_of(kind, 0, columns, 0)), rows_of(3, columns, 0)).shape == (3, 0)


def test_what_does_not_fit_is_refused() -> None:
    weight, x_TK = pack(tensor_of("q8_0", 4, 64, 0)), rows_of(2, 64, 0)
    zeros = np.zeros
    calls: tuple[Callable[[], object], ...] = (
        lambda: kernels.linear(SETS[0], weight, x_TK[:, :32]),
        lambda: kernels.linear(SETS[0], weight, x_TK, zeros(3, np.float32)),
        lambda: kernels.linear(SETS[0], weight, x_TK, None, zeros((1, 4), np.float32)),
        lambda: kernels.linear(SETS[0], weight, x_TK, None, None, 1.0, 1, 0),
        lambda: kernels.linear("mmx", weight, x_TK),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"fit the weight|no kernels named mmx"):
            call()


def test_a_coded_weight_without_scales_of_halves_has_one_a_group() -> None:
    assert not Coded(np.zeros((1, 64), np.int64), np.ones((1, 2), np.float32), None, 8).halves
    assert Coded(np.zeros((1, 64), np.int64), np.ones((1, 4), np.float32), None, 8).halves
