"""Weights as the native kernels keep them: what is packed means what the checkpoint says, what is rounded is near."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.core.errors import WeightsMismatch
from headrace.models.names import EMBED
from headrace.weights.checkpoint import open_checkpoint
from headrace.weights.qtensor import SCHEMES, QTensor
from headrace.weights.scaled import scale_values
from tests.unit.native_reference import same_bits
from tests.unit.test_qtensor import SCALES, make, reference

kernels = pytest.importorskip("headrace.backends.native._kernels")
weights = pytest.importorskip("headrace.backends.native.weights")

F32 = NDArray[np.float32]

PACKER = kernels.Packer(1)
BLOCKS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q3_K", "q4_K", "q5_K", "q6_K")
SCALED = ("int4", "int4_asym", "int8", "int8_asym")
PLAIN = ("f32", "f16", "bf16")
ALL_HALVES = np.arange(2**16, dtype=np.uint16)


def groups_of(values: F32) -> F32:
    return values.reshape(len(values), -1, 32)


def stored(tensor: QTensor) -> Any:
    weight = weights._stored(PACKER, tensor)
    assert weight is not None and (weight.rows, weight.columns) == tensor.shape
    return weight


def random_bytes(scheme: str, shape: tuple[int, int], seed: int) -> QTensor:
    """Every byte random, scales too: infinities and NaN come up by themselves."""
    size = shape[0] * shape[1] // SCHEMES[scheme].group * SCHEMES[scheme].group_bytes
    return QTensor.from_bytes(scheme, shape, np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


# ---------------------------------------------------------------- GGUF blocks


@pytest.mark.parametrize("scheme", BLOCKS)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(0, 40), groups=st.integers(1, 5))
@settings(max_examples=30)
def test_blocks_mean_what_ggml_says(scheme: str, seed: int, rows: int, groups: int) -> None:
    columns = SCHEMES[scheme].group * groups
    tensor = random_bytes(scheme, (rows, columns), seed)
    found = stored(tensor).unpack()
    assert same_bits(found, tensor.dequantise())
    if rows:
        raw = np.empty((rows, groups), SCHEMES[scheme].dtype)
        for name, plane in tensor.planes.items():
            raw[name] = plane
        assert same_bits(found, reference(scheme, raw.view(np.uint8), (rows, columns)))


@pytest.mark.parametrize("scheme", BLOCKS)
def test_every_byte_at_extreme_scales(scheme: str) -> None:
    kind = SCHEMES[scheme]
    records = np.zeros((len(SCALES), 256), kind.dtype)
    for name in kind.dtype.names or ():
        if name in ("d", "m", "dmin"):
            records[name] = SCALES.view(np.float16)[:, None]
        else:
            every = np.arange(256, dtype=np.uint8).reshape(256, *[1] * (records[name].ndim - 2))
            records[name] = np.broadcast_to(every, records[name].shape).view(kind.dtype[name].base)
    tensor = QTensor.from_bytes(scheme, (len(SCALES), 256 * kind.group), records.reshape(-1).view(np.uint8))
    assert same_bits(stored(tensor).unpack(), tensor.dequantise())


@pytest.mark.parametrize("scheme", (*BLOCKS, *PLAIN))
def test_views_of_a_map_cuts_and_joins(scheme: str, tmp_path: Path) -> None:
    """An odd offset into a read-only map, rows, columns, joins, other orders: planes with any strides."""
    whole = make(scheme, (37, 1024), 3)
    records = np.empty(37 * 1024 // SCHEMES[scheme].group, SCHEMES[scheme].dtype)
    for name, plane in whole.planes.items():
        records[name] = plane.reshape(-1, *plane.shape[2:]) if SCHEMES[scheme].group > 1 else plane.reshape(-1)
    path = tmp_path / "weights"
    path.write_bytes(b"\0" + records.tobytes())
    mapped = QTensor.from_bytes(scheme, whole.shape, np.memmap(path, np.uint8, "r", 1))
    cuts = [
        mapped,
        mapped.rows(5, 23),
        mapped.cols(256, 768),
        mapped.rows(1, 36).cols(512, 1024),
        mapped.take_rows(np.array([36, 0, 0, 17])),
        QTensor.cat_rows([mapped.rows(0, 3), mapped.rows(30, 37)]),
        QTensor(scheme, (19, 1024), {name: plane[::2] for name, plane in mapped.planes.items()}),
        QTensor(scheme, (37, 1024), {name: plane[::-1] for name, plane in mapped.planes.items()}),
    ]
    for tensor in cuts:
        plain = scheme in PLAIN
        weight = weights._dense(PACKER, tensor, scheme) if plain else stored(tensor)
        assert same_bits(weight.unpack(), np.array(tensor.dequantise()))


@pytest.mark.parametrize("scheme", ["q2_K", "tq1_0"])
def test_a_scheme_without_kernel_is_not_packed(scheme: str) -> None:
    assert kernels.pack_blocks(PACKER, scheme, [np.zeros((1, 1), np.uint8)], 1, 256) is None


@pytest.mark.parametrize("scheme", BLOCKS)
def test_planes_that_are_not_the_schemes_are_refused(scheme: str) -> None:
    tensor = make(scheme, (4, 512), 0)
    planes = [tensor.planes[name] for name, _, _ in SCHEMES[scheme].record]
    for wrong, rows, columns in (
        (planes, 5, 512),
        (planes, 4, 1024),
        (planes[:-1], 4, 512),
        ([*planes, planes[0]], 4, 512),
        ([plane[:, :1] for plane in planes], 4, 512),
        ([*planes[:-1], np.zeros((4, 512 // SCHEMES[scheme].group, 7), np.uint8)], 4, 512),
    ):
        with pytest.raises(ValueError, match=f"not the planes of a {scheme} tensor"):
            kernels.pack_blocks(PACKER, scheme, wrong, rows, columns)
    strided = [np.zeros((4, 512 // SCHEMES[scheme].group, 4), np.uint8)[:, :, ::2]]
    with pytest.raises(ValueError, match="contiguous within a group"):
        kernels.pack_blocks(PACKER, scheme, strided, 4, 512)


def test_a_row_of_half_a_block_is_not_packed() -> None:
    assert kernels.pack_blocks(PACKER, "q4_K", [np.zeros((1, 1), np.uint8)], 1, 128) is None


@pytest.mark.parametrize("scheme", BLOCKS)
def test_any_number_of_threads_packs_the_same(scheme: str) -> None:
    tensor = make(scheme, (200, 512), 9)
    one = stored(tensor).unpack()
    for threads in (2, 3):
        assert same_bits(weights._stored(kernels.Packer(threads), tensor).unpack(), one)


# ---------------------------------------------------------------- int4 and int8


def scaled_tensor(scheme: str, rows: int, columns: int, group: int, kind: str, seed: int) -> QTensor:
    rng = np.random.default_rng(seed)
    four = scheme.startswith("int4")
    groups = columns // group
    bytes_ = rng.integers(0, 256, (rows, columns // (2 if four else 1)), dtype=np.uint8)
    scale: NDArray[Any] = rng.uniform(-0.2, 0.2, (rows, groups)).astype(np.float32)
    if kind == "bf16":
        scale = (scale.view(np.uint32) >> 16).astype(np.uint16)
    planes: dict[str, NDArray[Any]] = {"q": bytes_ if four else bytes_.view(np.int8), "s": scale}
    if kind == "f16":
        planes["s"] = scale.astype(np.float16)
    if scheme.endswith("_asym"):
        zeros = rng.integers(0, 16 if four else 256, (rows, groups), dtype=np.uint8)
        planes["z"] = zeros if four else zeros.view(np.int8)
    return QTensor(scheme, (rows, columns), planes)


@pytest.mark.parametrize("scheme", SCALED)
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@given(data=st.data())
@settings(max_examples=15)
def test_scaled_numbers_mean_what_the_scheme_says(scheme: str, kind: str, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 35))
    group = 32 * data.draw(st.integers(1, 4))
    columns = group * data.draw(st.integers(1, 4))
    tensor = scaled_tensor(scheme, rows, columns, group, kind, data.draw(st.integers(0, 99)))
    if data.draw(st.booleans()) and rows > 2:
        tensor = tensor.rows(1, rows - 1)
    found, expected = stored(tensor).unpack(), tensor.dequantise()
    if kind == "f32" and "z" not in tensor.planes:
        assert same_bits(found, expected)
        return
    # The scheme rounds q × s to the type of s, the kernel does not; a zero point costs a rounding of its product.
    epsilon = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8}[kind]
    size = np.repeat(np.abs(scale_values(tensor.planes["s"])), tensor.group, axis=1)
    assert (np.abs(found - expected) <= epsilon * np.abs(expected) + 2.0**-22 * 255 * size + 2.0**-24).all()


def test_a_zero_point_is_zero_exactly() -> None:
    tensor = scaled_tensor("int8_asym", 4, 64, 32, "f32", 1)
    zeros = np.repeat(tensor.planes["z"], 32, axis=1)
    assert (stored(QTensor("int8_asym", (4, 64), {**tensor.planes, "q": zeros})).unpack() == 0).all()


@pytest.mark.parametrize("scheme", SCALED)
def test_a_scale_that_is_not_finite_stays_in_its_group(scheme: str) -> None:
    tensor = scaled_tensor(scheme, 4, 64, 32, "f32", 1)
    tensor.planes["s"][1, 1], tensor.planes["s"][2, 0] = np.inf, np.nan
    found = groups_of(stored(tensor).unpack())
    strange = np.asarray(~np.isfinite(found).any(-1))
    assert strange.sum() == 2 and strange[1, 1] and strange[2, 0]
    assert np.isfinite(found[~strange]).all()


def test_what_no_kernel_reads_is_left() -> None:
    sorted_ = scaled_tensor("int4", 2, 64, 32, "f32", 0)
    order = QTensor("int4", (2, 64), {**sorted_.planes, "order": np.arange(64, dtype=np.int32)})
    short = scaled_tensor("int8", 2, 64, 16, "f32", 0)
    fp8 = QTensor("fp8", (2, 32), {"q": np.zeros((2, 32), np.uint8), "s": np.ones((2, 1), np.float32)})
    for tensor in (order, short, fp8):
        assert weights._stored(PACKER, tensor) is None
        for quant, bound in (("stored", 0.0), ("int8", 0.2 * 8 / 254 * 1.01 if tensor is order else 0.11)):
            found = weights._pack(PACKER, tensor, quant, "float32").unpack()
            assert np.abs(found - tensor.dequantise()).max() <= bound


def test_planes_that_do_not_fit_each_other_are_refused() -> None:
    codes, scales = np.zeros((4, 64), np.uint8), np.ones((4, 2), np.float32)
    for args in (
        (5, codes, scales, None, 8),
        (4, codes, scales[:3], None, 8),
        (4, codes, np.ones((4, 4), np.float32), None, 8),
        (4, codes, np.ones((4, 3), np.float32), None, 8),
        (4, codes, np.ones((4, 0), np.float32), None, 8),
        (4, codes, scales, np.ones((4, 1), np.float32), 0),
    ):
        with pytest.raises(ValueError, match="do not fit each other"):
            kernels.pack_scaled(PACKER, *args)


# ---------------------------------------------------------------- plain numbers


def nasty_floats() -> F32:
    """Every half and bfloat16, the middles between neighbours and what lies beside those, and what overflows."""
    halves = ALL_HALVES.view(np.float16).astype(np.float32)
    bf16 = (ALL_HALVES.astype(np.uint32) << np.uint32(16)).view(np.float32)
    half = np.float32(0.5)
    middles: list[F32] = [one[:-1] * half + one[1:] * half for one in (halves, bf16)]
    # The middle of two bfloat16 by its bits: the halving above loses subnormal ones.
    middles.append(((ALL_HALVES.astype(np.uint32) << np.uint32(16)) | np.uint32(0x8000)).view(np.float32))
    beside = [np.nextafter(one, np.float32(side)) for one in [*middles, halves, bf16] for side in (np.inf, -np.inf)]
    ends = np.array([65504, 65519.996, 65520, 65536, 3.4e38, -65520, 1e-45, 2.0**-25, 2.0**-24 * 1.5], np.float32)
    return np.concatenate([halves, bf16, *middles, *beside, ends])


def as_bf16(values: F32) -> NDArray[np.uint16]:
    """To nearest, ties to even; a NaN stays one."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def in_rows(values: NDArray[Any]) -> NDArray[Any]:
    """(N, 64), the last row filled up with zeros."""
    padded = np.zeros((len(values) + 63) // 64 * 64, values.dtype)
    padded[: len(values)] = values
    return padded.reshape(-1, 64)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("target", PLAIN)
def test_numbers_are_converted_as_numpy_does(target: str) -> None:
    floats = in_rows(nasty_floats())
    sources: dict[str, tuple[NDArray[Any], F32]] = {
        "f32": (floats, floats),
        "f16": (in_rows(ALL_HALVES).view(np.float16), in_rows(ALL_HALVES).view(np.float16).astype(np.float32)),
        "bf16": (in_rows(ALL_HALVES), (in_rows(ALL_HALVES).astype(np.uint32) << np.uint32(16)).view(np.float32)),
    }
    for source, (array, values) in sources.items():
        expected = {
            "f32": values,
            "f16": values.astype(np.float16).astype(np.float32),
            "bf16": (as_bf16(values).astype(np.uint32) << np.uint32(16)).view(np.float32),
        }[target]
        found = kernels.pack_numbers(PACKER, array, source, target).unpack()
        assert same_bits(found, expected)
        zeros = found == 0
        assert (np.signbit(found) == np.signbit(expected))[zeros].all()


@pytest.mark.parametrize("source", PLAIN)
@pytest.mark.parametrize("shape", [(0, 32), (1, 1), (15, 3), (16, 32), (17, 5), (33, 31)])
def test_numbers_of_any_shape(source: str, shape: tuple[int, int]) -> None:
    tensor = make(source, shape, 1)
    for target in PLAIN:
        weight = kernels.pack_numbers(PACKER, tensor.planes["data"], source, target)
        assert (weight.rows, weight.columns, weight.codes) == (*shape, target) and not weight.quantised
        if target in ("f32", source):
            assert same_bits(weight.unpack(), np.array(tensor.dequantise()))


def test_arrays_that_are_no_weight_are_refused() -> None:
    for array, words in (
        (np.zeros(4, np.float32), "must be"),
        (np.zeros((2, 2, 2), np.float32), "must be"),
        (np.zeros((2, 4), np.float64), "4 bytes"),
        (np.zeros((4, 4), np.float32).T[:, ::2], "contiguous"),
    ):
        with pytest.raises(ValueError, match=words):
            kernels.pack_numbers(PACKER, array, "f32", "f32")
    with pytest.raises(ValueError, match="no numbers of type f64"):
        kernels.pack_numbers(PACKER, np.zeros((1, 1)), "f64", "f32")


# ---------------------------------------------------------------- rounded at load


def steps(values: F32, bits: int) -> NDArray[np.float64]:
    """(N, K / 32): the most that two codes may lie apart: scale and minimum are rounded outwards, to f16 where it holds
    them."""
    groups = groups_of(values).astype(np.float64)
    if bits == 8:
        ideal = np.abs(groups).max(-1) / 127
    else:
        least = groups.min(-1)
        ideal = (groups.max(-1) - least + np.maximum(np.abs(least) * 2.0**-10, 2.0**-24)) / 15
    return np.asarray(np.maximum(ideal * (1 + 2.0**-10), ideal + 2.0**-24))


def sized(kind: str, seed: int) -> F32:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((19, 96)).astype(np.float32)
    sizes = {
        "usual": 1.0,
        "small": 2.0**-12,
        "subnormal scales": 2.0**-22,
        "below every scale": 2.0**-40,
        "large": 2.0**14,
        "too large for f16": 2.0**30,
        "huge": 2.0**100,
    }
    if kind in sizes:
        return values * np.float32(sizes[kind])
    if kind == "constant":
        return np.repeat(values[:, ::32], 32, axis=1)
    if kind == "far from zero":
        return values * np.float32(0.01) + np.float32(3)
    if kind == "far below zero":
        return values * np.float32(0.01) - np.float32(700)
    if kind == "one outlier":
        values[:, 40] = 1e4
        return values
    return values * np.exp2(rng.integers(-30, 30, (19, 1))).astype(np.float32)  # mixed


SIZES = (
    *("usual", "small", "subnormal scales", "below every scale", "large", "too large for f16", "huge"),
    *("constant", "far from zero", "far below zero", "one outlier", "mixed"),
)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", SIZES)
def test_rounding_moves_nothing_by_more_than_half_a_step(bits: int, kind: str) -> None:
    values = sized(kind, 1)
    found = kernels.quantise_numbers(PACKER, bits, values, "f32")
    assert found.quantised and found.scheme == f"int{bits} at load"
    unpacked = found.unpack()
    assert np.isfinite(unpacked).all()
    error = np.abs(groups_of(unpacked).astype(np.float64) - groups_of(values)).max(-1)
    size = np.abs(groups_of(values)).max(-1)
    assert (error <= 0.5 * steps(values, bits) * (1 + 1e-6) + size * 2.0**-22).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("source", ["f16", "bf16"])
def test_every_type_is_rounded(bits: int, source: str) -> None:
    tensor = make(source, (33, 64), 2)
    values = np.array(tensor.dequantise())
    from_source = kernels.quantise_numbers(PACKER, bits, tensor.planes["data"], source)
    assert same_bits(from_source.unpack(), kernels.quantise_numbers(PACKER, bits, values, "f32").unpack())


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_stay_zero_and_rounding_twice_changes_nothing(bits: int) -> None:
    zeros = np.zeros((17, 64), np.float32)
    zeros[3] = -0.0
    assert (kernels.quantise_numbers(PACKER, bits, zeros, "f32").unpack() == 0).all()
    once = kernels.quantise_numbers(PACKER, bits, sized("usual", 3), "f32").unpack()
    twice = kernels.quantise_numbers(PACKER, bits, once, "f32").unpack()
    assert np.abs(twice - once).max() <= 2.0**-9 * np.abs(once).max()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [1.0, 2.0**60])
def test_what_is_not_finite_makes_its_group_nan(bits: int, value: float, size: float) -> None:
    values = sized("usual", 4) * np.float32(size)
    values[5, 33] = value
    found = groups_of(kernels.quantise_numbers(PACKER, bits, values, "f32").unpack())
    strange = np.asarray(np.isnan(found).all(-1))
    assert strange[5, 1] and strange.sum() == 1 and np.isfinite(found[~strange]).all()


def test_only_whole_groups_are_rounded() -> None:
    for bits, columns in ((8, 33), (4, 31), (5, 32), (8, 16)):
        with pytest.raises(ValueError, match="whole groups"):
            kernels.quantise_numbers(PACKER, bits, np.zeros((2, columns), np.float32), "f32")


# ---------------------------------------------------------------- a whole checkpoint


def kept_as(quant: str, tensor: QTensor, name: str = "weight", dtype: str = "float32") -> Any:
    return weights.pack_all([(name, tensor)], PACKER, quant, dtype).weight(name, *tensor.shape)


def test_how_a_weight_is_kept() -> None:
    q4, q2, f16 = make("q4_0", (3, 512)), make("q2_K", (3, 512)), make("f16", (3, 512))
    odd = make("bf16", (3, 40))
    assert kept_as("none", q4).codes == "f32" and kept_as("none", q4, dtype="bfloat16").codes == "bf16"
    assert kept_as("stored", q4).scheme == kept_as("int8", q4).scheme == kept_as("int4", q4).scheme == "q4_0"
    assert kept_as("stored", q2).codes == "f32" and same_bits(kept_as("stored", q2).unpack(), q2.dequantise())
    assert kept_as("int8", q2).scheme == "int8 at load" and kept_as("int4", q2).scheme == "int4 at load"
    assert kept_as("stored", f16).codes == "f16" and kept_as("stored", odd).codes == "bf16"
    assert kept_as("int4", f16).scheme == "int4 at load"
    assert kept_as("int4", f16, EMBED).scheme == "int8 at load"
    assert kept_as("int8", odd).codes == "bf16", "no whole groups: plain numbers"
    exact = weights.pack_all([("a", q4), ("v", make("f32", (7,)))], PACKER, "int4", "float32", ["a"])
    assert exact.nbytes == exact.weight("a", 3, 512).nbytes + exact.vector("v", 7).nbytes
    exact.finish()


def test_what_is_no_part_of_a_model_is_named() -> None:
    q8 = make("q8_0", (3, 64))
    for tensors, words in (
        ([("a", q8), ("a", q8)], "'a' came twice"),
        ([("a", make("f32", (2, 2, 2)))], "'a' has shape"),
    ):
        with pytest.raises(WeightsMismatch, match=words):
            weights.pack_all(tensors, PACKER, "stored", "float32")
    packed = weights.pack_all([("a", q8), ("v", make("f32", (7,)))], PACKER, "stored", "float32")
    with pytest.raises(WeightsMismatch, match="'b' did not come"):
        packed.weight("b", 3, 64)
    with pytest.raises(WeightsMismatch, match="'a' is not part of the model"):
        packed.finish()
    with pytest.raises(WeightsMismatch, match=r"\(3, 64\), needed \(4, 64\)"):
        packed.weight("a", 4, 64)
    with pytest.raises(WeightsMismatch, match=r"\(7,\), needed \(8,\)"):
        packed.vector("v", 8)


@pytest.mark.demo
@pytest.mark.parametrize("name", ["blk.0.attn_k.weight", "blk.3.ffn_down.weight", "token_embd.weight"])
def test_the_demo_models_weights(demo_path: Path, name: str) -> None:
    """Of a file that llama.cpp made, from its map."""
    with open_checkpoint(demo_path) as checkpoint:
        tensor = checkpoint.tensor(name)
        if name == "token_embd.weight":
            tensor = tensor.rows(17_001, 20_003)
        assert tensor.scheme in BLOCKS
        assert same_bits(stored(tensor).unpack(), tensor.dequantise())
