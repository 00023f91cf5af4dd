"""QTensor: its dequantise is ggml's bit for bit, and cutting and joining packed rows commutes with it."""

from __future__ import annotations

from pathlib import Path

import gguf
import gguf.quants
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.weights.checkpoint import open_checkpoint
from headrace.weights.qtensor import SCHEMES, QTensor

GROUPED = tuple(name for name, scheme in SCHEMES.items() if scheme.group > 1)
FLOATS = tuple(name for name, scheme in SCHEMES.items() if scheme.group == 1)
# float16 bit patterns: zeros, least and largest subnormal, least normal, one, largest, infinity, a NaN; and negatives.
EXTREME = np.array([0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF, 0x7C00, 0x7E01], dtype=np.uint16)
SCALES = np.concatenate([EXTREME, EXTREME | 0x8000])


def packed(scheme: str, shape: tuple[int, ...], seed: int) -> NDArray[np.uint8]:
    """Random bytes in file order with finite values."""
    kind = SCHEMES[scheme]
    rng = np.random.default_rng(seed)
    if kind.group == 1:
        values = rng.standard_normal(shape).astype(np.float32)
        if scheme == "bf16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).ravel()
        return values.astype(kind.dtype["data"]).view(np.uint8).ravel()
    records = np.empty(int(np.prod(shape)) // kind.group, dtype=kind.dtype)
    for plane in kind.dtype.names or ():
        if plane in ("d", "m", "dmin"):
            records[plane] = rng.standard_normal(records.size).astype(np.float16)
        else:
            bytes_ = rng.integers(0, 256, records[plane].shape, dtype=np.uint8)
            records[plane] = bytes_.view(records[plane].dtype)
    return records.view(np.uint8)


def make(scheme: str, shape: tuple[int, ...], seed: int = 0) -> QTensor:
    return QTensor.from_bytes(scheme, shape, packed(scheme, shape, seed))


def reference(scheme: str, raw: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.float32]:
    kind = gguf.GGMLQuantizationType[scheme.upper()]
    with np.errstate(invalid="ignore"):
        return gguf.quants.dequantize(raw.reshape(shape[0], -1), kind).reshape(shape)


def same_bits(found: NDArray[np.float32], expected: NDArray[np.float32]) -> bool:
    """Equal bit for bit, but that any NaN equals any other."""
    nan = np.isnan(expected)
    bits_equal = found.view(np.uint32) == expected.astype(np.float32, copy=False).view(np.uint32)
    return (
        found.dtype == np.float32 and found.shape == expected.shape and bool(np.all(bits_equal | nan & np.isnan(found)))
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@given(seed=st.integers(0, 2**32 - 1))
def test_dequantise_is_ggmls_on_random_bytes(scheme: str, seed: int) -> None:
    # Every byte random, scales too: infinities and NaN come up by themselves.
    shape = (3, 512)
    size = 3 * 512 // SCHEMES[scheme].group * SCHEMES[scheme].group_bytes
    raw = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    assert same_bits(QTensor.from_bytes(scheme, shape, raw).dequantise(), reference(scheme, raw, shape))


@pytest.mark.parametrize("scheme", GROUPED)
def test_dequantise_is_ggmls_at_every_extreme_scale_and_value(scheme: str) -> None:
    kind = SCHEMES[scheme]
    scales = [plane for plane in kind.dtype.names or () if plane in ("d", "m", "dmin")]
    grid = np.stack(np.meshgrid(*[SCALES] * len(scales), np.arange(256, dtype=np.uint16)), axis=-1)
    grid = grid.reshape(-1, len(scales) + 1)
    records = np.empty(len(grid), dtype=kind.dtype)
    for index, plane in enumerate(scales):
        records[plane] = np.ascontiguousarray(grid[:, index]).view(np.float16)
    for plane in set(kind.dtype.names or ()) - set(scales):
        records[plane] = grid[:, -1:].astype(np.uint8).view(kind.dtype[plane].base)
    raw, shape = records.view(np.uint8), (len(grid), kind.group)
    assert same_bits(QTensor.from_bytes(scheme, shape, raw).dequantise(), reference(scheme, raw, shape))


@pytest.mark.parametrize(("scheme", "dtype"), [("f16", "float16"), ("bf16", "uint16")])
def test_every_16_bit_value(scheme: str, dtype: str) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    tensor = QTensor.from_array(bits.view(dtype))
    assert tensor.scheme == scheme
    assert same_bits(tensor.dequantise(), reference(scheme, bits.view(np.uint8), (1, 2**16))[0])


def test_values_by_hand() -> None:
    raw = np.zeros(20, dtype=np.uint8)
    raw[:4] = np.array([0.5, -1.0], dtype=np.float16).view(np.uint8)
    raw[4], raw[19] = 0x3A, 0xF0
    values = QTensor.from_bytes("q4_1", (1, 32), raw).dequantise()[0]
    assert (values[0], values[16], values[15], values[31], values[1]) == (4.0, 0.5, -1.0, 6.5, -1.0)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("blk.0.attn_k.weight", "q4_1"), ("token_embd.weight", "q8_0"), ("blk.0.attn_norm.weight", "f32")],
)
def test_demo_tensor_is_ggmls(demo_path: Path, name: str, scheme: str) -> None:
    with open_checkpoint(demo_path) as checkpoint:
        tensor = checkpoint.tensor(name)
    assert tensor.scheme == scheme
    if name == "token_embd.weight":
        tensor = tensor.rows(17_000, 21_000)
    raw = np.empty(tensor.planes["d"].shape if "d" in tensor.planes else tensor.shape, SCHEMES[scheme].dtype)
    for plane, values in tensor.planes.items():
        raw[plane] = values
    shape = (1, *tensor.shape) if len(tensor.shape) == 1 else tensor.shape
    assert same_bits(tensor.dequantise(), reference(scheme, raw.view(np.uint8), shape).reshape(tensor.shape))


@pytest.mark.parametrize("scheme", SCHEMES)
@given(data=st.data())
def test_cutting_and_joining_commute_with_dequantise(scheme: str, data: st.DataObject) -> None:
    num_rows, num_groups = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 4))
    step = SCHEMES[scheme].group
    columns = max(step, 32) * num_groups
    tensor = make(scheme, (num_rows, columns), data.draw(st.integers(0, 99)))
    values = tensor.dequantise()
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, num_rows)] * 2)))
    top, rest = tensor.rows(0, start), tensor.rows(start, num_rows)
    assert same_bits(tensor.rows(start, stop).dequantise(), values[start:stop])
    assert same_bits(QTensor.cat_rows([top, rest]).dequantise(), values)
    assert top.nbytes + rest.nbytes == tensor.nbytes == values.size // step * SCHEMES[scheme].group_bytes
    left, right = sorted(data.draw(st.tuples(*[st.integers(0, columns // step)] * 2)))
    cut = tensor.cols(left * step, right * step)
    assert same_bits(cut.dequantise(), values[:, left * step : right * step])
    # A cut of a cut.
    assert same_bits(cut.rows(start, stop).dequantise(), values[start:stop, left * step : right * step])
    order = np.array(
        data.draw(st.lists(st.integers(0, num_rows - 1), max_size=8) if num_rows else st.just([])), np.intp
    )
    taken = tensor.take_rows(order)
    assert taken.scheme == scheme and taken.shape == (len(order), tensor.shape[1])
    assert same_bits(taken.dequantise(), values[order])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_cuts_are_views_and_from_bytes_copies_nothing(scheme: str) -> None:
    raw = packed(scheme, (4, 512), 1)
    tensor = QTensor.from_bytes(scheme, (4, 512), raw)
    for part in (tensor, tensor.rows(1, 3), tensor.cols(256, 512)):
        assert all(np.shares_memory(plane, raw) for plane in part.planes.values())
    taken = tensor.take_rows(np.array([0, 1]))
    assert not any(np.shares_memory(plane, raw) for plane in taken.planes.values())


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint16"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4), (0, 3)])
def test_from_array_keeps_shape_and_values(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.ones(shape, dtype=dtype)
    tensor = QTensor.from_array(array)
    assert tensor.shape == shape and tensor.planes["data"] is array
    expected = np.float32(1) if dtype != "uint16" else np.uint32(1 << 16).view(np.float32)
    assert tensor.dequantise().shape == shape and np.all(tensor.dequantise() == expected)
    again = QTensor.from_bytes(tensor.scheme, shape, array.reshape(-1).view(np.uint8))
    assert again.dequantise().tobytes() == tensor.dequantise().tobytes()


def test_unaligned_bytes_are_read() -> None:
    raw = np.zeros(17, dtype=np.uint8)
    raw[1:] = np.arange(4, dtype=np.float32).view(np.uint8)
    assert QTensor.from_bytes("f32", (2, 2), raw[1:]).dequantise().tolist() == [[0, 1], [2, 3]]


def test_what_cannot_be_is_a_value_error() -> None:
    q8, f32 = make("q8_0", (4, 64)), make("f32", (4, 64))
    vector = make("q8_0", (64,))
    for attempt, words in (
        (lambda: QTensor.from_array(np.zeros(3, dtype=np.int64)), "int64"),
        (lambda: QTensor.from_bytes("q4_0", (2, 33), np.zeros(36, np.uint8)), "33"),
        (lambda: QTensor.from_bytes("q4_0", (), np.zeros(18, np.uint8)), "shape"),
        (lambda: QTensor.from_bytes("q4_0", (2, 32), np.zeros(35, np.uint8)), "needs 36 bytes, got 35"),
        (lambda: q8.cols(0, 40), "between groups"),
        (lambda: q8.cols(32, 96), "not inside"),
        (lambda: q8.cols(64, 32), "not inside"),
        (lambda: vector.cols(0, 32), "between groups"),
        (lambda: q8.rows(0, 5), "not inside"),
        (lambda: q8.rows(-1, 2), "not inside"),
        (lambda: q8.rows(3, 2), "not inside"),
        (lambda: vector.rows(0, 1), "no rows"),
        (lambda: vector.take_rows(np.array([0])), "no rows"),
        (lambda: QTensor.cat_rows([]), "no parts"),
        (lambda: QTensor.cat_rows([q8, f32]), "cannot be joined"),
        (lambda: QTensor.cat_rows([f32, make("f32", (4, 32))]), "cannot be joined"),
    ):
        with pytest.raises(ValueError, match=words):
            attempt()
    with pytest.raises(IndexError):
        q8.take_rows(np.array([4]))
