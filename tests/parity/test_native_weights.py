"""Packed weights of the native backend mean what `QTensor.dequantise` says, their specification."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.weights.qtensor import SCHEMES, QTensor
from tests.parity.native_cases import random_tensor

kernels = pytest.importorskip("headrace.backends.native._kernels")
weights = pytest.importorskip("headrace.backends.native.weights")

F32 = NDArray[np.float32]
PACKER = kernels.Packer(1)

BLOCKS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q3_K", "q4_K", "q5_K", "q6_K")
SCALED = ("int4", "int8", "int4_asym", "int8_asym")
SCALES = ("float32", "float16", "bfloat16")


def stored(tensor: QTensor, quant: str = "stored", dtype: str = "float32") -> Any:
    """As the backend keeps a layer's weight."""
    packed = weights.pack_all([("w", tensor)], PACKER, quant, dtype)
    return packed.weights["w"]


def same(found: F32, wanted: F32) -> bool:
    """Equal numbers; -0 is 0, since it adds nothing to a sum."""
    return bool(np.array_equal(found, wanted, equal_nan=True))


def any_bytes(scheme: str, shape: tuple[int, int], seed: int) -> QTensor:
    """Every pattern: scales of any size, subnormal, infinite and NaN among them."""
    kind = SCHEMES[scheme]
    size = shape[0] * shape[1] // kind.group * kind.group_bytes
    return QTensor.from_bytes(scheme, shape, np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


@pytest.mark.parametrize("scheme", BLOCKS)
@given(data=st.data())
def test_gguf_blocks_bit_for_bit(scheme: str, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 40), "rows")
    columns = SCHEMES[scheme].group * data.draw(st.integers(1, 5), "blocks")
    seed = data.draw(st.integers(0, 2**32 - 1), "seed")
    make = data.draw(st.sampled_from([any_bytes, random_tensor]))
    tensor = make(scheme, (rows, columns), seed)
    if data.draw(st.booleans(), "part"):  # views: rows of a fused tensor, and columns
        start = data.draw(st.integers(0, rows - 1))
        tensor = tensor.rows(start, data.draw(st.integers(start + 1, rows)))
        stop = data.draw(st.integers(1, columns // tensor.group))
        tensor = tensor.cols(tensor.group * data.draw(st.integers(0, stop - 1)), tensor.group * stop)
    weight = stored(tensor)
    assert (weight.rows, weight.columns, weight.scheme) == (*tensor.shape, scheme)
    with np.errstate(all="ignore"):
        assert same(weight.unpack(), tensor.dequantise())


@pytest.mark.parametrize("scheme", SCALED)
@pytest.mark.parametrize("scales", SCALES)
@given(data=st.data())
def test_numbers_with_scales(scheme: str, scales: str, data: st.DataObject) -> None:
    """Bit for bit where scales are float32 and zero is zero. Otherwise: a value is (q - z) · s. With 16-bit scales the
    specification rounds it to their type, half a unit of which is the most that lies between. With float32 scales ours
    is q · s - z · s, each of them rounded."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    group = 32 * data.draw(st.integers(1, 4), "group")
    rows, groups = data.draw(st.integers(1, 40), "rows"), data.draw(st.integers(1, 4), "groups")
    tensor = with_scales(random_scaled(rng, scheme, rows, group, groups), rng, scales)
    weight = stored(tensor)
    assert (weight.rows, weight.columns) == tensor.shape and weight.codes == ("q4" if "int4" in scheme else "q8")
    found, wanted = weight.unpack(), tensor.dequantise()
    if scales == "float32" and not scheme.endswith("_asym"):
        assert same(found, wanted)
        return
    terms = 256 * np.repeat(np.abs(scale_of(tensor)), group, axis=1)
    unit = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[scales]
    bound = 3 * unit * terms if scales == "float32" else unit * np.abs(wanted) + 2.0**-25
    assert (np.abs(found - wanted) <= bound).all()


def random_scaled(rng: np.random.Generator, scheme: str, rows: int, group: int, groups: int) -> QTensor:
    four, columns = scheme.startswith("int4"), group * groups
    numbers = rng.integers(0, 256, (rows, columns // (2 if four else 1)), dtype=np.uint8)
    planes: dict[str, Any] = {"q": numbers if four else numbers.view(np.int8)}
    if scheme.endswith("_asym"):
        zeros = rng.integers(0, 16 if four else 256, (rows, groups), dtype=np.uint8)
        planes["z"] = zeros if four else zeros.view(np.int8)
    return QTensor(scheme, (rows, columns), planes | {"s": np.ones((rows, groups), np.float32)})


def with_scales(tensor: QTensor, rng: np.random.Generator, kind: str) -> QTensor:
    values = (rng.standard_normal(tensor.planes["s"].shape) * 0.01).astype(np.float32)
    plane: Any = values
    if kind == "float16":
        plane = values.astype(np.float16)
    if kind == "bfloat16":
        plane = (values.view(np.uint32) >> 16).astype(np.uint16)
    return QTensor(tensor.scheme, tensor.shape, {**tensor.planes, "s": plane})


def scale_of(tensor: QTensor) -> F32:
    plane = tensor.planes["s"]
    wide = (plane.astype(np.uint32) << 16).view(np.float32) if plane.dtype == np.uint16 else plane.astype(np.float32)
    return np.asarray(wide, np.float32)


@pytest.mark.parametrize("source", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("quant", ["stored", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (16, 64), (61, 47)])
def test_plain_numbers_are_kept_or_rounded_once(source: str, quant: str, shape: tuple[int, int]) -> None:
    """To the nearest, ties to even, as numpy and torch do."""
    import torch

    values = (np.random.default_rng(0).standard_normal(shape) * 10.0 ** np.arange(shape[1])[None] ** 0.5).astype("f4")
    values.flat[:3] = (0.0, np.inf, np.nan)[: values.size]
    values = np.clip(values, -6e4, 6e4)
    array = {"f32": values, "f16": values.astype("f2"), "bf16": (values.view("u4") >> 16).astype("u2")}[source]
    tensor = QTensor.from_array(array)
    weight = stored(tensor) if quant == "stored" else stored(tensor, "none", quant)
    wanted = torch.from_numpy(np.array(tensor.dequantise()))
    if quant != "stored":
        wanted = wanted.to(getattr(torch, quant))
    assert weight.codes == (source if quant == "stored" else weights.COMPUTE_TYPES[quant])
    assert same(weight.unpack(), wanted.float().numpy())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("source", ["f32", "f16", "bf16"])
@given(data=st.data())
def test_rounding_at_load(bits: int, source: str, data: st.DataObject) -> None:
    """No weight moves by more than half a step and what rounding the step and the minimum to float16 costs."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    rows, groups = data.draw(st.integers(1, 40), "rows"), data.draw(st.integers(1, 4), "groups")
    values = rng.standard_normal((rows, groups, 32)) * np.exp2(rng.integers(-6, 6, (rows, groups, 1)))
    values = (values + data.draw(st.sampled_from([0.0, 1.0, -300.0]))).astype(np.float32).reshape(rows, 32 * groups)
    array = {"f32": values, "f16": values.astype("f2"), "bf16": (values.view("u4") >> 16).astype("u2")}[source]
    tensor = QTensor.from_array(array)
    weight = stored(tensor, f"int{bits}")
    assert weight.quantised and weight.codes == f"q{bits}"
    wanted = np.asarray(tensor.dequantise(), np.float64).reshape(rows, groups, 32)
    found = weight.unpack().reshape(rows, groups, 32)
    low, high = wanted.min(-1, keepdims=True), wanted.max(-1, keepdims=True)
    peak = np.maximum(np.abs(low), np.abs(high))
    span, steps = (high - low, 15) if bits == 4 else (peak, 127)
    half = (span + (peak * 2.0**-11 if bits == 4 else 0)) / steps / 2
    rounding = (span + peak) * 2.0**-11 + 2.0**-24 * steps
    assert (np.abs(found - wanted) <= half + rounding).all()


def test_what_has_no_kernel_or_no_whole_groups_is_kept_as_plain_numbers() -> None:
    tensor = random_tensor("q2_K", (17, 256), 0)
    assert stored(tensor).codes == "f32" and same(stored(tensor).unpack(), tensor.dequantise())
    narrow = QTensor.from_array(np.ones((5, 40), np.float32))
    assert stored(narrow, "int4").codes == "f32" and stored(narrow, "int8").codes == "f32"
    uneven = random_scaled(np.random.default_rng(1), "int4", 3, 16, 4)
    assert stored(uneven).codes == "f32" and same(stored(uneven).unpack(), uneven.dequantise())
    order = np.random.default_rng(2).permutation(64).astype(np.int32)
    sorted_columns = random_scaled(np.random.default_rng(1), "int4", 3, 32, 2)
    sorted_columns = QTensor("int4", (3, 64), {**sorted_columns.planes, "order": order})
    assert same(stored(sorted_columns).unpack(), sorted_columns.dequantise())
    eight = random_scaled(np.random.default_rng(3), "int8", 3, 64, 1)
    fp8 = QTensor("fp8", (3, 64), {"q": eight.planes["q"].view(np.uint8) & 0x77, "s": eight.planes["s"]})
    assert stored(fp8).codes == "f32" and same(stored(fp8).unpack(), fp8.dequantise())
    assert stored(fp8, "int8").codes == "q8", "asked for, it is rounded again"


def test_the_embedding_keeps_eight_bits_and_a_router_all() -> None:
    values = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    tensors = [(name, QTensor.from_array(values)) for name in ("embed.weight", "layers.0.mlp.router.weight", "w")]
    packed = weights.pack_all(tensors, PACKER, "int4", "float32", ["layers.0.mlp.router.weight"])
    assert [packed.weights[name].codes for name, _ in tensors] == ["q8", "f32", "q4"]
    assert packed.nbytes == sum(weight.nbytes for weight in packed.weights.values())
    half = weights.pack_all(tensors, PACKER, "none", "bfloat16", ["layers.0.mlp.router.weight"])
    assert [half.weights[name].codes for name, _ in tensors] == ["bf16", "f32", "bf16"]
