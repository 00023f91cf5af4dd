"""Weights of 4 bits: what they mean on the device, and products with them, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.backends.torch.kernels.int4 import (
    UNIT,
    Int4Config,
    _exact_ptx,
    _float_ptx,
    _numbers_ptx,
    _offset,
    int4_config,
    int4_linear,
)
from headrace.backends.torch.kernels.matmul import Card, new_counters
from headrace.backends.torch.packed.int4 import Int4Weight, int4_form
from headrace.core.errors import WeightsMismatch
from headrace.weights.qtensor import SCHEMES, QTensor
from headrace.weights.scaled import ORDER

CPU = torch.device("cpu")
BLOCKS = ("q4_0", "q4_1", "q4_K")
PLAIN = ("f32", "f16", "bf16")
EPSILON = {torch.float32: 2.0**-24, torch.float16: 2.0**-11}


def as_raw(values: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f16":
        return values.astype(np.float16)
    return (
        values.astype(np.float32) if kind == "f32" else (values.astype(np.float32).view(np.uint32) >> 16).astype("u2")
    )


def scaled(scheme: str, rows: int, cols: int, group: int, kind: str = "f16", seed: int = 0) -> QTensor:
    rng = np.random.default_rng(seed)
    planes: dict[str, Any] = {
        "q": rng.integers(0, 256, (rows, cols // 2), dtype=np.uint8),
        "s": as_raw(rng.uniform(-0.2, 0.2, (rows, cols // group)), kind),
    }
    if scheme == "int4_asym":
        planes["z"] = rng.integers(0, 16, (rows, cols // group), dtype=np.uint8)
    return QTensor(scheme, (rows, cols), planes)


def blocks(scheme: str, rows: int, cols: int, seed: int = 0) -> QTensor:
    rng = np.random.default_rng(seed)
    kind = SCHEMES[scheme]
    records = np.zeros((rows, cols // kind.group), kind.dtype)
    for name, code, shape in kind.record:
        full = (*records.shape, *shape)
        wide = rng.uniform(-0.2, 0.2, full) / (16 if scheme == "q4_K" else 1)
        records[name] = rng.integers(0, 256, full) if code == "u1" else wide
    return QTensor.from_bytes(scheme, (rows, cols), records.view(np.uint8).reshape(-1))


def plain(kind: str, rows: int, cols: int, seed: int = 0) -> QTensor:
    return QTensor.from_array(as_raw(np.random.default_rng(seed).standard_normal((rows, cols)), kind))


def tensor_of(scheme: str, rows: int, cols: int, seed: int = 0) -> QTensor:
    if scheme in PLAIN:
        return plain(scheme, rows, cols, seed)
    return blocks(scheme, rows, cols, seed) if scheme in BLOCKS else scaled(scheme, rows, cols, 32, seed=seed)


def weight_of(
    *tensors: QTensor, dtype: torch.dtype = torch.float32, invariant: bool = False, card: Card | None = None
) -> Int4Weight:
    """The tensors one under the other; the last one comes first."""
    cols = tensors[0].shape[1]
    group = tensors[0].group if tensors[0].scheme.startswith("int4") else 32
    form = int4_form([tensor.scheme for tensor in tensors], cols, group)
    assert form is not None
    weight = Int4Weight(
        sum(tensor.shape[0] for tensor in tensors), cols, dtype, CPU, group, form, batch_invariant=invariant
    )
    for index in reversed(range(len(tensors))):
        weight.put(sum(tensor.shape[0] for tensor in tensors[:index]), tensors[index])
    weight.finish()
    return weight


def meant(*tensors: QTensor) -> Tensor:
    return torch.from_numpy(np.concatenate([tensor.dequantise() for tensor in tensors]))


def rows_of_x(count: int, cols: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """A view: NaN lies around it."""
    around = torch.full((count + 2, cols + 16), torch.nan, dtype=dtype)
    x = around[1 : 1 + count, :cols]
    return x.copy_(torch.randn(count, cols, generator=torch.Generator().manual_seed(seed)))


def check(weight: Int4Weight, x: Tensor, y: Tensor, bias: Tensor | None = None) -> None:
    """Each weight and each result is rounded once to x's type, and sums are those of float32."""
    values = weight.dequantise().double()
    expected = x.double() @ values.T + (0 if bias is None else bias.double())
    size = x.double().abs() @ values.abs().T + (0 if bias is None else bias.double().abs())
    epsilon = EPSILON[x.dtype]
    bound = size * (epsilon + 1e-6) + epsilon * expected.abs()
    assert y.dtype == x.dtype and y.shape == expected.shape
    assert bool(((y.double() - expected).abs() <= bound).all())


# ---------------------------------------------------------------- what weights mean


@pytest.mark.parametrize("scheme", [*BLOCKS, "int4", "int4_asym"])
@pytest.mark.parametrize("shape", [(1, 256), (67, 512)])
def test_stored_weights_keep_their_values(scheme: str, shape: tuple[int, int]) -> None:
    tensor = tensor_of(scheme, *shape)
    weight = weight_of(tensor)
    assert torch.equal(weight.dequantise(), meant(tensor)) and weight.shape == shape
    bits = {"q4_K": 4.625}.get(scheme, 5)
    assert weight.nbytes * 8 == shape[0] * shape[1] * bits


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_scaled_weights_of_any_group(data: st.DataObject) -> None:
    group = data.draw(st.sampled_from([32, 64, 96, 128, 160, 256]))
    cols = group * data.draw(st.integers(1, 3))
    if data.draw(st.booleans()):
        group = cols = 2 * data.draw(st.integers(1, 150))  # one for the whole row
    kind, scheme = data.draw(st.sampled_from(PLAIN)), data.draw(st.sampled_from(["int4", "int4_asym"]))
    tensor = scaled(scheme, data.draw(st.integers(1, 5)), cols, group, kind, data.draw(st.integers(0, 99)))
    weight = weight_of(tensor)
    assert torch.equal(weight.dequantise(), meant(tensor))
    x = rows_of_x(2, cols, torch.float32)
    check(weight, x, weight(x))


def test_forms() -> None:
    assert int4_form(["int4", "int4_asym"], 256, 64) == "zero" == int4_form(["int4"], 100, 100)
    assert int4_form(["int4"], 256, 16) is None is int4_form(["int4"], 96, 64)
    assert int4_form(["q4_K", "q4_K"], 512) == "super"
    assert int4_form(["q4_K", "q4_1", "f16"], 512) == "minimum" == int4_form(["q4_0"], 96)
    assert int4_form(["bf16"], 100) is None is int4_form(["q4_0", "int4"], 256)
    assert int4_form(["q4_K", "q6_K"], 512) is None is int4_form(["int8"], 512) is int4_form([], 512)


@pytest.mark.parametrize("schemes", [("q4_0", "q4_1", "f16"), ("q4_1", "q4_K", "q4_0"), ("int4", "int4_asym")])
def test_tensors_of_several_schemes_in_one_weight(schemes: tuple[str, ...]) -> None:
    tensors = [tensor_of(scheme, 5 + index, 256, index) for index, scheme in enumerate(schemes)]
    weight = weight_of(*tensors)
    found, expected = weight.dequantise(), meant(*tensors)
    if "f16" in schemes:
        assert torch.equal(found[:11], expected[:11])
        assert torch.equal(found[11:], weight_of(tensors[2]).dequantise())
    else:
        assert torch.equal(found, expected)
    x = rows_of_x(3, 256, torch.float32)
    check(weight, x, weight(x))


def test_many_rows_are_repacked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {scheme: weight_of(tensor_of(scheme, 23, 256)).dequantise() for scheme in ("int4_asym", "q4_K", "f32")}
    monkeypatch.setattr("headrace.backends.torch.packed.int4.UPLOAD_WEIGHTS", 1000)
    for scheme, values in whole.items():
        assert torch.equal(weight_of(tensor_of(scheme, 23, 256)).dequantise(), values)
    moved = tensor_of("q4_0", 23, 64).take_rows(np.arange(23)[::-1].copy())
    assert torch.equal(weight_of(moved).dequantise(), meant(moved))


def test_what_does_not_fit_is_refused() -> None:
    weight = Int4Weight(8, 256, torch.float32, CPU, 64, "zero")
    weight.put(0, scaled("int4", 4, 256, 64))
    for start, tensor, words in (
        (0, scaled("int4", 4, 128, 64), "not fit"),
        (5, scaled("int4", 4, 256, 64), "does not fit"),
        (4, scaled("int4", 4, 256, 32), "8 groups"),
        (4, scaled("int4", 4, 256, 64, "bf16"), "scales of uint16"),
        (4, with_order(scaled("int4", 4, 256, 64)), "different orders"),
        (4, tensor_of("q4_0", 4, 256), "no place"),
    ):
        with pytest.raises(WeightsMismatch, match=words):
            weight.put(start, tensor)
    with pytest.raises(WeightsMismatch, match="4 rows came"):
        weight.finish()
    with pytest.raises(WeightsMismatch, match="no place"):
        Int4Weight(8, 256, torch.float32, CPU, 32, "super").put(0, tensor_of("q4_1", 8, 256))
    fits = weight_of(scaled("int4", 4, 256, 64))
    with pytest.raises(ValueError, match="does not fit"):
        fits(torch.zeros(2, 128))


def with_order(tensor: QTensor) -> QTensor:
    order = np.random.default_rng(5).permutation(tensor.shape[1]).astype(np.int32)
    return QTensor(tensor.scheme, tensor.shape, {**tensor.planes, ORDER: order})


def test_columns_sorted_by_importance() -> None:
    parts = [with_order(scaled("int4_asym", rows, 256, 64, seed=rows)) for rows in (3, 6)]
    weight = weight_of(*parts)
    assert torch.equal(weight.dequantise(), meant(*parts))
    x = rows_of_x(4, 256, torch.float32)
    check(weight, x, weight(x))


# ---------------------------------------------------------------- rounding at load


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("size", [1.0, 2.0**-13, 2.0**-20, 1e5, 1e38, 1e-38])
def test_rounded_as_the_native_backend_rounds(kind: str, size: float) -> None:
    kernels = pytest.importorskip("headrace.backends.native._kernels")
    values = np.random.default_rng(3).standard_normal((19, 96)).astype(np.float32)
    values[0], values[1], values[2, :32] = 0, 3, np.abs(values[2, :32])
    values *= np.float32(min(size, 100.0) if kind == "f16" else size)
    values[3, 40] = np.nan
    values[4, 70] = -np.inf
    tensor = QTensor.from_array(as_raw(values, kind))
    expected = kernels.quantise_numbers(kernels.Packer(1), 4, np.asarray(tensor.planes["data"]), kind).unpack()
    found = weight_of(tensor).dequantise().numpy()
    np.testing.assert_array_equal(found, expected)


# ---------------------------------------------------------------- products


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scheme", [*BLOCKS, "int4", "int4_asym", "f32"])
def test_products(scheme: str, dtype: torch.dtype) -> None:
    cols = 512 if scheme == "q4_K" else 416
    tensors = [tensor_of(scheme, rows, cols, rows) for rows in (50, 7)]
    weight = weight_of(*tensors, dtype=dtype)
    bias = torch.randn(57, generator=torch.Generator().manual_seed(2)).to(dtype)
    for count in (1, 3, 17) if dtype == torch.float16 else (16, 70):
        x = rows_of_x(count, cols, dtype)
        check(weight, x, weight(x))
        check(weight, x, weight(x, bias), bias)
    assert weight(x[:0]).shape == (0, 57)
    columns = rows_of_x(cols, 3, dtype).T
    check(weight, columns, weight(columns))


def test_parts_of_a_product_add_up_and_can_be_met_again() -> None:
    """K in parts that do not divide it, over several tiles; the counters are zero again."""
    weight = weight_of(scaled("int4", 70, 7 * UNIT + 32, 32), dtype=torch.float16)
    x = rows_of_x(18, 7 * UNIT + 32, torch.float16)
    planes = weight._planes
    assert planes is not None
    for splits in (3, 4, 3):
        y = int4_linear(x, planes, None, Card(), config=Int4Config(16, 64, splits, 4, 3))
        check(weight, x, y)
        assert not planes.tickets.any()


@pytest.mark.parametrize("scheme", ["int4_asym", "q4_K"])
def test_a_rows_bits_do_not_depend_on_the_others(scheme: str) -> None:
    """Few rows: the parts of K are spread. Many: they are not. (Rows at one place of a tile: numpy's own product, which
    stands for the tensor cores here, depends on it.)"""
    few = Card(multiprocessors=1)
    weight = weight_of(tensor_of(scheme, 65, 1024), dtype=torch.float16, invariant=True, card=few)
    assert int4_config(1, 65, 1024, few, True) == replace(int4_config(70, 65, 1024, few, True), spread=True)
    assert int4_config(1, 65, 1024, few, True).splits > 1
    x = rows_of_x(130, 1024, torch.float16)
    x[20] = torch.nan
    together = weight(x)
    assert together[20].isnan().all() and together.isnan().any(1).sum() == 1
    for row in (0, 64, 128):
        alone = weight(x[row : row + 1])
        assert torch.equal(alone[0], together[row])
    check(weight, x[:1], weight(x[:1]))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_scales_that_are_not_finite_stay_in_their_rows() -> None:
    tensor = scaled("int4", 6, 160, 32, "f32")
    tensor.planes["s"][1, 4], tensor.planes["s"][4, 0] = np.nan, np.inf
    found = weight_of(tensor)(rows_of_x(2, 160, torch.float32))
    assert (~found.isfinite()).all(0).tolist() == [row in (1, 4) for row in range(6)]


@given(count=st.integers(1, 20000), rows=st.integers(1, 200_000), cols=st.integers(1, 60_000), invariant=st.booleans())
def test_configurations(count: int, rows: int, cols: int, invariant: bool) -> None:
    for card in (Card((8, 0), 108), Card(), Card((8, 9), 24)):
        cut = int4_config(count, rows, cols, card, invariant)
        tiles = -(-rows // cut.block_n) * -(-count // cut.block_m)
        assert not cut.spread or cut.splits == 1 or tiles <= new_counters(card, CPU).numel()
        assert cut.splits == 1 or cut.splits * UNIT <= cols
        if invariant:
            assert replace(cut, spread=True) == int4_config(1, rows, cols, card, True)


# ---------------------------------------------------------------- what only a GPU runs


def run_ptx(asm: str, dtype: torch.dtype, registers: dict[str, np.ndarray]) -> np.ndarray:
    """$0, by the few instructions that the kernels' texts are made of; registers are uint32."""
    halves = torch.float16 if dtype == torch.float16 else torch.bfloat16

    def value(word: str) -> np.ndarray:
        return registers[word] if word in registers else np.uint32(int(word, 0))

    def pair(word: str) -> Tensor:
        packed = np.broadcast_to(value(word), registers["$1"].shape).copy()
        return torch.from_numpy(packed.view(np.int16)).view(halves).double()

    def packed(values: Tensor) -> np.ndarray:
        return values.to(halves).view(torch.int16).numpy().view(np.uint32)

    for line in asm.strip("{} ").split(";"):
        name, *words = line.replace(",", " ").split() or [".reg"]
        if name == "lop3.b32" and words[4] == "0xEA":
            found = (value(words[1]) & value(words[2])) | value(words[3])
        elif name in ("shr.u32", "shl.b32"):
            found = (np.right_shift if name == "shr.u32" else np.left_shift)(value(words[1]), value(words[2]))
        elif name == "mov.b32":
            found = value(words[1])
        elif name == "fma.rn.f32":
            a, b, c = (value(word).view(np.float32).astype(np.float64) for word in words[1:])
            found = (a * b + c).astype(np.float32).view(np.uint32)
        elif name.startswith("fma.rn."):
            a, b, c = (pair(word) for word in words[1:])
            found = packed(a * b + c)
        elif name.startswith("cvt.rn."):
            high, low = (torch.from_numpy(value(word).view(np.float32)) for word in words[1:])
            found = packed(torch.stack((low, high), -1))[:, 0]
        else:
            assert name == ".reg", line
            continue
        registers[words[0]] = found
    return registers["$0"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("part", range(4))
def test_the_texts_for_the_gpu_mean_the_same(dtype: torch.dtype, part: int) -> None:
    rng = np.random.default_rng(part)
    codes = rng.integers(0, 2**32, 500, dtype=np.uint32)
    q = torch.from_numpy(np.stack(((codes >> 4 * part) & 15, (codes >> 4 * part + 16) & 15), -1).astype(np.float64))
    d, m = (torch.from_numpy(rng.uniform(-1, 1, (500, 2))).to(torch.float16) for _ in range(2))
    z = torch.from_numpy(rng.integers(0, 16, (500, 2)))
    kind = tl.float16 if dtype == torch.float16 else tl.bfloat16

    def words(values: Tensor) -> np.ndarray:
        return values.view(torch.int16).numpy().view(np.uint32)[:, 0]

    def found(asm: str, **more: np.ndarray) -> Tensor:
        result = run_ptx(asm, dtype, {"$1": codes, **{f"${name[1:]}": bits for name, bits in more.items()}})
        return torch.from_numpy(result.view(np.int16)).view(dtype).reshape(500, 2)

    assert torch.equal(found(_numbers_ptx(part, kind)), q.to(dtype))
    zero, s = (z + int(_offset(kind))).to(dtype), d.to(dtype)
    asm = _exact_ptx("zero", part, kind)
    assert torch.equal(found(asm, r2=words(s), r3=words(zero)), ((q - z) * s.double()).to(dtype))
    if dtype == torch.float16:
        asm = _exact_ptx("minimum", part, kind)
        assert torch.equal(found(asm, r2=words(d), r3=words(m)), (q * d.double() + m.double()).to(dtype))
    wide = d.float() * 16
    singles = [one[:, side].contiguous().numpy().view(np.uint32) for one in (wide, m.float() - wide) for side in (0, 1)]
    floats = found(_float_ptx(part, kind), **{f"r{2 + index}": bits for index, bits in enumerate(singles)})
    assert torch.equal(floats, (q * d.double() + m.double()).to(torch.float32).to(dtype))
