"""Weights on the device: what comes in, what they hold, what they answer (`packed/{plain,fp8,int8,choices}.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from headrace.backends.torch import ops
from headrace.backends.torch.kernels.matmul import Card, new_counters
from headrace.backends.torch.kernels.quantise import quantise_fp8, quantise_int8
from headrace.backends.torch.packed import choices, upload
from headrace.backends.torch.packed.choices import BUCKETS, LIBRARY, UNMEASURED, Choices, by_size, measure
from headrace.backends.torch.packed.fp8 import Fp8Weight, fp8_form
from headrace.backends.torch.packed.int8 import MOST_COLUMNS, Int8Weight, int8_form
from headrace.backends.torch.packed.plain import PlainWeight
from headrace.core.errors import ConfigError, WeightsMismatch
from headrace.weights.qtensor import QTensor

CPU = torch.device("cpu")
CARD = Card((9, 0), 132)
F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
EightBits = type[Fp8Weight] | type[Int8Weight]
W = TypeVar("W", PlainWeight, Fp8Weight, Int8Weight)
EIGHT_BITS: tuple[EightBits, ...] = (Fp8Weight, Int8Weight)
SHAPES = ((1, 37, 100), (3, 20, 130), (17, 33, 64), (70, 45, 90))


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Memory that was not written is NaN, or the largest integer."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def readonly(values: NDArray[np.generic]) -> NDArray[np.generic]:
    values.flags.writeable = False
    return values


def stored(scheme: str, rows: int, cols: int, seed: int = 0) -> QTensor:
    """Random, as a checkpoint holds it: read-only."""
    draw = np.random.default_rng(seed)
    values = draw.standard_normal((rows, cols)).astype(np.float32)
    if scheme in ("fp8", "int8"):
        codes = draw.integers(0, 127, (rows, cols), dtype=np.uint8)  # no NaN among them
        scales = draw.random((rows, 1), np.float32) / 100
        return QTensor(scheme, (rows, cols), {"q": codes.view("i1" if scheme == "int8" else "u1"), "s": scales})
    if scheme == "q8_0":
        raw = draw.integers(0, 60, rows * cols // 32 * 34, dtype=np.uint8)
        return QTensor.from_bytes(scheme, (rows, cols), readonly(raw))
    if scheme == "bf16":
        return QTensor.from_array(readonly((values.view(np.uint32) >> 16).astype(np.uint16)))
    return QTensor.from_array(readonly(values.astype({"f32": np.float32, "f16": np.float16}[scheme])))


def filled(weight: W, *parts: QTensor) -> W:
    start = 0
    for part in parts:
        weight.put(start, part)
        start += part.shape[0]
    weight.finish()
    return weight


def value(tensor: QTensor) -> Tensor:
    return torch.from_numpy(np.array(tensor.dequantise()))


def off_by(y: Tensor, expected: Tensor) -> float:
    return float(((y.double() - expected).abs() / expected.abs().amax(1, keepdim=True)).max())


# ---------------------------------------------------------------- what comes in


@pytest.mark.parametrize("scheme", ["f32", "f16", "bf16", "q8_0", "fp8", "int8"])
def test_a_plain_weight_holds_each_value_rounded_once(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "CHUNK_BYTES", 1024)  # so that it comes in several parts
    parts = [stored(scheme, rows, 96, rows) for rows in (5, 21)]
    order = np.random.default_rng(1).permutation(9)
    parts.append(stored(scheme, 9, 96, 3).take_rows(order))
    weight = filled(PlainWeight(35, 96, F16, CPU, CARD), *parts)
    assert torch.equal(weight.weight, torch.cat([value(part) for part in parts]).to(F16))
    assert (weight.shape, weight.dtype, weight.nbytes) == ((35, 96), F16, 35 * 96 * 2)
    assert torch.equal(weight.dequantise(), weight.weight.float())


def test_plain_tensors_travel_in_their_own_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "CHUNK_BYTES", 4000)
    for scheme, dtype in upload.PLAIN.items():
        tensor = stored(scheme, 50, 96)
        parts = list(upload.uploaded(tensor, CPU))
        assert {part.dtype for _, part in parts} == {dtype}
        assert max(part.nbytes for _, part in parts) <= 4000
        assert [start for start, _ in parts] == list(range(0, 50, 4000 // (96 * dtype.itemsize)))
        assert torch.equal(torch.cat([part for _, part in parts]).float(), value(tensor))


@pytest.mark.parametrize("make", [PlainWeight, *EIGHT_BITS])
def test_rows_that_do_not_fit_are_refused(make: type[PlainWeight] | EightBits) -> None:
    weight = make(10, 64, F16, CPU, CARD)
    for start, shape in ((0, (4, 63)), (7, (4, 64)), (-1, (4, 64)), (0, (11, 64))):
        with pytest.raises(WeightsMismatch, match=r"of \(10, 64\)"):
            weight.put(start, stored("f32", *shape))
    with pytest.raises(WeightsMismatch):
        weight.put(0, QTensor.from_array(np.zeros(64, np.float32)))
    weight.put(0, stored("f32", 4, 64))
    with pytest.raises(WeightsMismatch, match="4 rows came for a product of 10"):
        weight.finish()


def test_forms() -> None:
    assert fp8_form({"fp8"}, 4096, 4096) and int8_form(["int8", "int8"], 64, 64)
    assert not fp8_form({"fp8"}, 128, 4096)
    assert not fp8_form({"fp8", "bf16"}, 4096, 4096)
    assert not int8_form({"int8_asym"}, 64, 64)


# ---------------------------------------------------------------- eight bits


@pytest.mark.parametrize("make", EIGHT_BITS)
def test_stored_codes_are_kept(make: EightBits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "CHUNK_BYTES", 1024)
    parts = [stored(make.scheme, rows, 70, rows) for rows in (5, 21)]
    half = stored(make.scheme, 4, 70, 9)
    half = QTensor(half.scheme, half.shape, {**half.planes, "s": np.full((4, 1), 0x3C00, np.uint16)})  # bf16
    weight = filled(make(30, 70, F16, CPU, CARD), *parts, half)
    assert torch.equal(weight.dequantise(), torch.cat([value(part) for part in (*parts, half)]))


@pytest.mark.parametrize("make", EIGHT_BITS)
def test_plain_weights_are_rounded_to_the_nearest_code(make: EightBits) -> None:
    tensor = stored("f32", 12, 70)
    plane = tensor.planes["data"].copy()
    plane[3], plane[4, 0] = 0.0, np.nan
    tensor = QTensor.from_array(plane)
    weight = filled(make(12, 70, F16, CPU, CARD), tensor)
    quantise, most = (quantise_fp8, 448.0) if make is Fp8Weight else (quantise_int8, 127.0)
    codes, scales = quantise(value(tensor), 80)
    good = [row for row in range(12) if row != 4]
    assert torch.equal(weight.dequantise()[good], (codes.float() * scales)[good][:, :70])
    assert weight.dequantise()[4].isnan().all()
    error = (weight.dequantise() - value(tensor)).abs()[good]
    size = value(tensor).abs()[good]
    step = size.amax(1, keepdim=True) / most
    assert (error <= (step / 2 if make is Int8Weight else torch.maximum(size / 16, step / 512)) * 1.001).all()


def rounded(x: Tensor, make: EightBits) -> Tensor:
    """What the codes of x's rows stand for, float64."""
    most = 448.0 if make is Fp8Weight else 127.0
    scales = x.float().abs().amax(1, keepdim=True) / most
    scaled = x.float() / scales
    return (scaled.to(make.code) if make is Fp8Weight else scaled.round()).double() * scales


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", EIGHT_BITS)
def test_eight_bit_product(make: EightBits, shape: tuple[int, int, int]) -> None:
    M, N, K = shape
    parts = [stored("f32", N - 7, K, 1), stored("f16", 7, K, 2)]
    plain = torch.cat([value(part) for part in parts])
    types = ((F32, 2e-6), (F16, 2**-10))
    if M > 64:  # the interpreter has no arithmetic of bfloat16, but this is torch's own product
        types = ((BF16, 2**-7),) if make is Fp8Weight else types[1:]
    for dtype, bound in types:
        weight = filled(make(N, K, dtype, CPU, CARD, new_counters(CARD, CPU)), *parts)
        x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
        expected = rounded(x, make) @ weight.dequantise().double().T
        y = weight(x, bias)
        assert (y.dtype, y.shape) == (dtype, (M, N))
        assert off_by(y, expected + bias.double()) < bound
        assert off_by(y - bias, functional.linear(x.float(), plain).double()) < (0.15 if make is Fp8Weight else 0.04)
    if M < 17:
        assert off_by(weight(x, None), expected) < bound


@pytest.mark.parametrize("make", EIGHT_BITS)
def test_a_row_of_nan_is_alone(make: EightBits) -> None:
    weight = filled(make(20, 48, F32, CPU, CARD), stored("f32", 20, 48))
    x = torch.randn(5, 48)
    x[1] = 0.0
    clean = weight(x, None)
    assert not clean[1].any()
    x[3, 7], x[2, 0] = torch.nan, torch.inf
    y = weight(x, None)
    assert y[[2, 3]].isnan().all()
    assert torch.equal(y[[0, 1, 4]], clean[[0, 1, 4]])


def test_int8_rows_have_the_same_bits_in_any_company() -> None:
    weight = filled(Int8Weight(45, 600, F16, CPU, CARD), stored("f32", 45, 600))
    x, bias = torch.randn(70, 600).to(F16), torch.randn(45).to(F16)
    whole = weight(x, bias)
    for start, stop in ((0, 1), (37, 38), (3, 20)):
        assert torch.equal(weight(x[start:stop], bias), whole[start:stop])


def test_an_invariant_fp8_weight_has_one_tile() -> None:
    weight = Fp8Weight(4096, 4096, F16, CPU, CARD, invariant=True)
    assert (
        len({(tile.rows, tile.tokens, tile.depth, tile.parts) for tile in map(weight.tile, (1, 17, 64, 70, 4096))}) == 1
    )


def test_what_cannot_run_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"quant: got 'fp8' on a GPU of capability 8\.0, allowed: 8\.9 and above"):
        Fp8Weight(16, 16, BF16, torch.device("cuda"), Card((8, 0), 108))
    with pytest.raises(ConfigError, match=r"'int8' for rows of 132105 weights"):
        Int8Weight(1, MOST_COLUMNS + 1, BF16, CPU, CARD)


# ---------------------------------------------------------------- plain


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", ["library", "gemv", "tiles", "invariant"])
def test_plain_product(kernel: str, shape: tuple[int, int, int]) -> None:
    M, N, K = shape
    kind = Choices(lambda tokens: "tiles" if kernel == "gemv" and tokens > 4 else kernel)
    weight = filled(PlainWeight(N, K, F32, CPU, CARD, None, kind, kernel == "invariant"), stored("f32", N, K))
    x, bias = torch.randn(M, K), torch.randn(N)
    for given_bias in (bias, None):
        expected = x.double() @ weight.weight.double().T + (0.0 if given_bias is None else given_bias.double())
        assert off_by(weight(x, given_bias), expected) < 1e-6


def test_a_gate_is_fused_where_gemv_is_chosen() -> None:
    tensor = stored("f32", 20, 64)
    weight = PlainWeight.over(value(tensor), CARD, choices=UNMEASURED)
    assert weight.fuses_gate(1) and weight.fuses_gate(2) and not weight.fuses_gate(3)
    assert not PlainWeight.over(value(tensor), CARD).fuses_gate(1)
    assert not PlainWeight.over(value(tensor), CARD, choices=UNMEASURED, invariant=True).fuses_gate(1)
    x, bias = torch.randn(2, 64), torch.randn(20)
    expected = ops.gated(functional.linear(x, weight.weight, bias), "silu").double()
    assert off_by(weight.gated(x, bias, "silu"), expected) < 1e-5


def test_choices_go_by_the_next_bucket() -> None:
    table = Choices(by_size, {(64, 32, 4): "tiles", (64, 32, 8): "library", (64, 32, 64): "tiles"})
    found = [table.kernel(64, 32, tokens) for tokens in (0, 1, 2, 3, 4, 5, 8, 9, 33, 64, 65)]
    by_table = {4: "tiles", 8: "library", 64: "tiles"}
    assert found == ["library", "gemv", "gemv", "library", by_table[4], by_table[8], by_table[8], "library",
                     by_table[64], by_table[64], "library"]  # fmt: skip
    assert {LIBRARY.kernel(64, 32, tokens) for tokens in (1, 2, 64)} == {"library"}


def test_measure_takes_the_quickest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "COLD_BYTES", 3 * 8 * 16 * 4)
    monkeypatch.setattr(choices, "MOST_BYTES", 4 * 8 * 16 * 4)
    ran: list[int] = []

    def timer(call: Callable[[], object]) -> float:
        """Each candidate of a bucket is quicker than the one before, but what comes second by too little."""
        call()
        ran.append(1)
        return 1.0 if len(ran) % 2 else 0.99

    found = measure([(8, 16), (8, 16), (33, 16)], F32, CPU, CARD, timer)
    assert set(found.table) == {(rows, 16, bucket) for rows in (8, 33) for bucket in BUCKETS}
    assert set(found.table.values()) == {"library"}  # 1 % is no reason
    times = iter([1.0, 2.0, 0.5] * 4 + [1.0, 0.5] * 4)
    found = measure([(8, 16)], F32, CPU, CARD, lambda call: next(times))
    assert [found.kernel(8, 16, bucket) for bucket in BUCKETS] == ["gemv"] * 4 + ["tiles"] * 4
