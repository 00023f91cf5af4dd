"""Quantised checkpoints: every value bit for bit, every fault named, whatever the files hold."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.errors import CheckpointError, HeadraceError, ModelError, UnsupportedModel, WeightsMismatch
from headrace.core.spec import WeightMap, WeightRule
from headrace.weights.checkpoint import open_checkpoint
from headrace.weights.loader import stream
from headrace.weights.qtensor import QTensor
from tests.unit.quantised_cases import (
    MODULE,
    Made,
    awq_layer,
    compressed_config,
    compressed_layer,
    fp8_layer,
    gptq_layer,
    write_folder,
    write_layer,
)
from tests.unit.test_qtensor import same_bits

SCALES = st.sampled_from(["F16", "BF16", "F32"])
SEEDS = st.integers(0, 2**32 - 1)
W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
W8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}


def read(made: Made) -> QTensor:
    """Through a folder, as everything is."""
    with tempfile.TemporaryDirectory() as folder, open_checkpoint(write_layer(Path(folder), made)) as checkpoint:
        assert checkpoint.names() == (f"{MODULE}.weight",)
        assert checkpoint.shapes() == {f"{MODULE}.weight": made.weight.shape}
        return checkpoint.tensor(f"{MODULE}.weight")


def check(made: Made, scheme: str) -> QTensor:
    tensor = read(made)
    assert (tensor.scheme, tensor.shape) == (scheme, made.weight.shape)
    assert same_bits(tensor.dequantise(), np.ascontiguousarray(made.weight))
    return tensor


# ---------------------------------------------------------------- values


@given(SEEDS, SCALES, st.sampled_from([4, 8]), st.sampled_from([-1, 8, 32, 64, 128]), st.booleans(), st.booleans())
@settings(max_examples=60)
def test_gptq(seed: int, kind: str, bits: int, group: int, sorted_columns: bool, symmetric: bool) -> None:
    # 96 columns: groups of 64 and 128 have a short one at the end.
    version = "gptq" if seed % 2 else "gptq_v2"
    made = gptq_layer(
        16, 96, bits=bits, group=group, symmetric=symmetric, sorted_columns=sorted_columns, kind=kind, version=version,
        with_index=sorted_columns or bool(seed % 3), seed=seed,
    )  # fmt: skip
    tensor = check(made, f"int{bits}" if symmetric else f"int{bits}_asym")
    assert ("order" in tensor.planes) == (sorted_columns and group in (8, 32, 64))


@given(SEEDS, SCALES, st.sampled_from([-1, 16, 32]))
@settings(max_examples=30)
def test_awq(seed: int, kind: str, group: int) -> None:
    check(awq_layer(24, 64, group=group, kind=kind, seed=seed), "int4_asym")


@given(SEEDS, SCALES, st.sampled_from([4, 8]), st.sampled_from(["tensor", "channel", "group"]), st.booleans())
@settings(max_examples=60)
def test_pack_quantized(seed: int, kind: str, bits: int, strategy: str, symmetric: bool) -> None:
    args = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric}
    if strategy == "group":
        args["group_size"] = 32
    # 13 rows and, without groups, 30 columns: words that are not full.
    made = compressed_layer(13, 96 if strategy == "group" else 30, args, "pack-quantized", kind, seed)
    tensor = check(made, f"int{bits}" if symmetric else f"int{bits}_asym")
    assert tensor.group == (32 if strategy == "group" else 30)


@given(SEEDS, SCALES, st.sampled_from(["tensor", "channel", "group", "block"]), st.booleans(), st.booleans())
@settings(max_examples=60)
def test_int_and_float_quantized(seed: int, kind: str, strategy: str, floats: bool, symmetric: bool) -> None:
    args: dict[str, Any] = {"num_bits": 8, "type": "float" if floats else "int", "strategy": strategy}
    args |= {"group": {"group_size": 32}, "block": {"block_structure": [8, 32]}}.get(strategy, {})
    args["symmetric"] = symmetric or floats
    if not floats and seed % 3 == 0:
        args["num_bits"] = 4
    form = "naive-quantized" if seed % 2 else "float-quantized" if floats else "int-quantized"
    made = compressed_layer(20, 96, args, form, kind, seed)
    check(made, "fp8" if floats else "int8" if symmetric else "int8_asym")


@given(SEEDS, SCALES, st.sampled_from([None, (8, 32), (16, 64), (128, 128)]))
@settings(max_examples=30)
def test_fp8_of_blocks(seed: int, kind: str, block: tuple[int, int] | None) -> None:
    # Blocks that are cut off at both edges.
    check(fp8_layer(20, 96, block, kind, seed), "fp8")


def test_fp8_of_whole_matrices_in_autofp8s_names(tmp_path: Path) -> None:
    made = fp8_layer(16, 32, None)
    tensors = {"weight": made.tensors["weight"], "weight_scale": made.tensors["weight_scale_inv"]}
    made.config["activation_scheme"] = "static"
    check(Made(tensors | {"input_scale": torch.ones(())}, made.weight, made.config), "fp8")


def test_values_by_hand() -> None:
    # 0x98 is columns 0 and 1: 8 and 9.
    planes = {"q": np.array([[0x98, 0xF0]], np.uint8), "s": np.array([[0.5]], np.float16)}
    assert QTensor("int4", (1, 4), planes).dequantise().tolist() == [[0.0, 0.5, -4.0, 3.5]]
    planes |= {"z": np.array([[9]], np.uint8), "order": np.array([3, 1, 2, 0], np.int32)}
    assert QTensor("int4_asym", (1, 4), planes).dequantise().tolist() == [[3.0, 0.0, -4.5, -0.5]]
    # E4M3: 1, -2, the largest, the least.
    codes = {"q": np.array([[0x38, 0xC0, 0x7E, 0x01]], np.uint8), "s": np.array([[1.0]], np.float32)}
    assert QTensor("fp8", (1, 4), codes).dequantise().tolist() == [[1.0, -2.0, 448.0, 2.0**-9]]


def test_every_fp8_value_is_torchs() -> None:
    codes = np.arange(256, dtype=np.uint8)
    planes = {"q": codes[None], "s": np.ones((1, 1), np.float32)}
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    assert same_bits(QTensor("fp8", (1, 256), planes).dequantise(), expected[None])


@pytest.mark.parametrize("kind", ["F16", "BF16"])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_every_16_bit_scale_rounds_as_torch_does(kind: str, scheme: str) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    codes = np.tile(np.array([0, 1, 3, 77, 127, 128, 131, 255], np.uint8), (2**16, 1))
    q = codes.view(np.int8) if scheme == "int8" else codes
    planes = {"q": q, "s": (bits if kind == "BF16" else bits.view(np.float16))[:, None]}
    number = torch.from_numpy(codes).view(torch.int8 if scheme == "int8" else torch.float8_e4m3fn)
    dtype = torch.float16 if kind == "F16" else torch.bfloat16
    expected = number.to(dtype) * torch.from_numpy(bits.view(np.int16)).view(dtype)[:, None]
    assert same_bits(QTensor(scheme, codes.shape, planes).dequantise(), expected.float().numpy())


# ---------------------------------------------------------------- operations

LAYERS: dict[str, Callable[[int], Made]] = {
    "int4": lambda seed: gptq_layer(16, 96, group=16, symmetric=True, seed=seed),
    "int4_asym": lambda seed: awq_layer(16, 96, group=16, seed=seed),
    "int8": lambda seed: gptq_layer(16, 96, bits=8, group=16, symmetric=True, seed=seed),
    "int8_asym": lambda seed: gptq_layer(16, 96, bits=8, group=16, seed=seed),
    "fp8": lambda seed: fp8_layer(16, 96, (8, 16), seed=seed),
}


@pytest.mark.parametrize("scheme", LAYERS)
@given(data=st.data())
@settings(max_examples=25)
def test_cutting_and_joining_commute_with_dequantise(scheme: str, data: st.DataObject) -> None:
    tensor = read(LAYERS[scheme](data.draw(st.integers(0, 9))))
    assert (tensor.scheme, tensor.group) == (scheme, 16)
    values = tensor.dequantise()
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, 16)] * 2)))
    assert same_bits(tensor.rows(start, stop).dequantise(), values[start:stop])
    parts = [tensor.rows(0, start), tensor.rows(start, 16)]
    joined = QTensor.cat_rows(parts)
    assert same_bits(joined.dequantise(), values)
    assert parts[0].nbytes + parts[1].nbytes == tensor.nbytes == joined.nbytes
    left, right = sorted(data.draw(st.tuples(*[st.integers(0, 6)] * 2)))
    cut = tensor.cols(16 * left, 16 * right)
    assert cut.shape == (16, 16 * (right - left))
    assert same_bits(cut.rows(start, stop).dequantise(), values[start:stop, 16 * left : 16 * right])
    order = np.array(data.draw(st.lists(st.integers(0, 15), max_size=20)), np.intp)
    assert same_bits(tensor.take_rows(order).dequantise(), values[order])


def test_sorted_columns_are_cut_by_rows_only() -> None:
    made = gptq_layer(16, 96, sorted_columns=True)
    tensor = check(made, "int4_asym")
    assert same_bits(
        QTensor.cat_rows([tensor.rows(4, 9), tensor.rows(0, 2)]).dequantise(), made.weight[[4, 5, 6, 7, 8, 0, 1]]
    )
    assert same_bits(tensor.take_rows(np.array([3, 3])).dequantise(), made.weight[[3, 3]])
    with pytest.raises(ValueError, match="sorted by importance and cannot be cut"):
        tensor.cols(0, 32)
    with pytest.raises(ValueError, match="column orders cannot be joined"):
        QTensor.cat_rows([tensor, read(gptq_layer(16, 96, sorted_columns=True, seed=1))])
    with pytest.raises(ValueError, match="different groups"):
        QTensor.cat_rows([read(awq_layer(16, 96, group=16)), read(awq_layer(16, 96, group=32))])
    with pytest.raises(ValueError, match="between groups of 32"):
        read(awq_layer(16, 96)).cols(16, 64)


def test_a_large_tensor_is_dequantised_in_pieces() -> None:
    made = fp8_layer(1100, 1024, (128, 128))
    check(made, "fp8")


def test_packed_words_are_read_in_place() -> None:
    tensor = read(compressed_layer(8, 64, W4, "pack-quantized", "F16"))
    assert tensor.planes["q"].base is not None and not tensor.planes["q"].flags.writeable


# ---------------------------------------------------------------- names, shapes and what is left beside


def test_a_quantised_folder_has_a_plain_ones_names(tmp_path: Path) -> None:
    made = gptq_layer(16, 32)
    tensors = {f"a.{part}": tensor for part, tensor in made.tensors.items()}
    tensors |= {
        "a.bias": torch.zeros(16),
        "b.bias": torch.zeros(16),
        "c.weight": torch.ones(3),
        "z.bias": torch.ones(2),
    }
    write_folder(tmp_path, tensors, made.config)
    with open_checkpoint(tmp_path) as checkpoint:
        assert sorted(checkpoint.names()) == ["a.bias", "a.weight", "b.bias", "c.weight", "z.bias"]
        assert checkpoint.shapes()["a.weight"] == (16, 32)
        assert checkpoint.tensor("c.weight").scheme == "f32"
        assert [checkpoint.droppable(name) for name in ("a.bias", "b.bias", "c.weight", "nothing")] == [True] + [
            False
        ] * 3
        with pytest.raises(CheckpointError, match=r"no tensor 'a\.qweight'"):
            checkpoint.tensor("a.qweight")
        rules = (WeightRule(("a.weight",), "t", (8, 32), "split_rows", rows=(4, 12)),)
        left = WeightMap((*rules, WeightRule(("c.weight",), "c", (3,))), (r"[bz]\.bias",))
        made_t = dict(stream(checkpoint, left))["t"]
        assert same_bits(made_t.dequantise(), made.weight[4:12])
        assert len(checkpoint.fingerprint()) == 64
    tensors["a.bias"] = torch.full((16,), 0.5)
    write_folder(tmp_path / "biased", tensors, made.config)
    with (
        open_checkpoint(tmp_path / "biased") as checkpoint,
        pytest.raises(WeightsMismatch, match=r"left over \('a\.bias'"),
    ):
        stream(checkpoint, left)


def test_the_fingerprint_covers_packed_numbers_and_the_config(tmp_path: Path) -> None:
    made = gptq_layer(16, 32)
    first = open_checkpoint(write_layer(tmp_path / "a", made)).fingerprint()
    assert open_checkpoint(write_layer(tmp_path / "b", made)).fingerprint() == first
    assert open_checkpoint(write_layer(tmp_path / "c", gptq_layer(16, 32, seed=1))).fingerprint() != first
    made.config["checkpoint_format"] = "gptq_v2"
    assert open_checkpoint(write_layer(tmp_path / "d", made)).fingerprint() != first


def test_activation_quantisation_is_said_and_its_scales_are_left_out(tmp_path: Path) -> None:
    made = compressed_layer(16, 32, W8, "int-quantized", "F32")
    group = made.config["config_groups"]["group_0"]
    group["input_activations"] = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    made.config["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    tensors = {f"{MODULE}.{part}": tensor for part, tensor in made.tensors.items()}
    tensors[f"{MODULE}.input_scale"] = torch.ones(1)
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    with open_checkpoint(write_folder(tmp_path, tensors, made.config)) as checkpoint:
        assert checkpoint.names() == (f"{MODULE}.weight",)
        rounding, cache = checkpoint.notes
    assert "inputs of its layers rounded to 'int' of 8 bits, each time anew" in rounding
    assert "KV cache" in cache
    assert open_checkpoint(write_layer(tmp_path / "fp8", fp8_layer(8, 32, (8, 8)))).notes
    assert open_checkpoint(write_layer(tmp_path / "plain", gptq_layer(8, 32))).notes == ()


def test_groups_of_several_formats_by_name_expression_and_class(tmp_path: Path) -> None:
    wide = compressed_layer(16, 64, W8, "pack-quantized", "F32")
    packed = compressed_layer(16, 64, W4, "pack-quantized", "BF16")
    floats = compressed_layer(16, 64, FP8, "float-quantized", "BF16")
    made = {"model.layers.0.mlp.up_proj": packed, "model.layers.1.mlp.up_proj": floats, "model.layers.2.x": wide}
    config = compressed_config(W8, "mixed-precision", ignore=["re:.*lm_head"]) | {
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": W8, "format": "pack-quantized"},
            "group_1": {"targets": [r"re:.*mlp\.(up|gate)_proj$"], "weights": W4, "format": "pack-quantized"},
            "group_2": {"targets": ["model.layers.1.mlp.up_proj"], "weights": FP8, "format": "float-quantized"},
        }
    }
    tensors = {f"{module}.{part}": t for module, one in made.items() for part, t in one.tensors.items()}
    with open_checkpoint(write_folder(tmp_path, tensors, config)) as checkpoint:
        for module, one in made.items():
            assert same_bits(checkpoint.tensor(f"{module}.weight").dequantise(), one.weight)


# ---------------------------------------------------------------- what is refused


def changed(made: Made, **config: Any) -> Made:
    return Made(made.tensors, made.weight, made.config | config)


def with_weights(**args: Any) -> Made:
    made = compressed_layer(16, 64, W4, "pack-quantized", "F16")
    return changed(made, config_groups={"group_0": {"targets": ["Linear"], "weights": W4 | args}})


GPTQ, AWQ, CT = gptq_layer(16, 64), awq_layer(16, 64), compressed_layer(16, 64, W4, "pack-quantized", "F16")


@pytest.mark.parametrize(
    ("made", "error", "words"),
    [
        (changed(GPTQ, quant_method="bitsandbytes"), UnsupportedModel, "quant_method is 'bitsandbytes', allowed: gptq"),
        (changed(GPTQ, quant_method=None), CheckpointError, "quant_method is None"),
        (changed(GPTQ, bits=3), UnsupportedModel, "bits is 3, allowed: 4, 8"),
        (changed(GPTQ, bits="4"), CheckpointError, "bits is '4'"),
        (changed(GPTQ, group_size=12), UnsupportedModel, "group_size is 12"),
        (changed(GPTQ, group_size=0), UnsupportedModel, "group_size is 0"),
        (changed(GPTQ, group_size=2**60), CheckpointError, "group_size"),
        (changed(GPTQ, group_size=None), CheckpointError, "group_size is None"),
        (changed(GPTQ, desc_act=1), CheckpointError, "desc_act is 1, allowed: true or false"),
        (changed(GPTQ, checkpoint_format="marlin"), UnsupportedModel, "checkpoint_format is 'marlin'"),
        (changed(GPTQ, format="gptq_v2"), CheckpointError, "format is 'gptq_v2', allowed: what checkpoint_format says"),
        (changed(GPTQ, dynamic={"-:.*": {}}), UnsupportedModel, "dynamic"),
        (changed(GPTQ, group_size=16), WeightsMismatch, r"scales' has shape \(2, 16\), needed \(4, 16\)"),
        (changed(GPTQ, bits=8), WeightsMismatch, r"scales' has shape"),
        (changed(AWQ, bits=8), UnsupportedModel, "bits is 8, allowed: 4"),
        (changed(AWQ, version="gemv"), UnsupportedModel, "version is 'gemv', allowed: gemm"),
        (changed(AWQ, backend="llm-awq"), UnsupportedModel, "backend is 'llm-awq'"),
        (changed(AWQ, zero_point=False), UnsupportedModel, "zero_point is False, allowed: true"),
        (changed(AWQ, group_size=40), CheckpointError, "has 64 inputs, allowed"),
        (changed(CT, format="marlin-24"), UnsupportedModel, "format is 'marlin-24', allowed: pack-quantized"),
        (changed(CT, format="nvfp4-pack-quantized"), UnsupportedModel, "nvfp4-pack-quantized"),
        (changed(CT, quantization_status="initialized"), UnsupportedModel, "quantization_status is"),
        (changed(CT, sparsity_config={"format": "sparse-24-bitmask"}), UnsupportedModel, "sparsity_config: format is"),
        (changed(CT, transform_config={"config_groups": {"u": {}}}), UnsupportedModel, "transform_config"),
        (changed(CT, config_groups=None), CheckpointError, "config_groups is None"),
        (changed(CT, config_groups={"W4A16": ["Linear"]}), CheckpointError, "allowed: an object"),
        (changed(CT, ignore=["re:.*q_proj"]), WeightsMismatch, "is quantised, and quantization_config ignores it"),
        (changed(CT, ignore=["Linear"]), WeightsMismatch, "ignores it"),
        (changed(CT, ignore=["re:(a"]), UnsupportedModel, "a group that does not end"),
        (changed(CT, ignore=[1]), CheckpointError, "ignore is"),
        (with_weights(num_bits=3), UnsupportedModel, "num_bits is 3, allowed: 4, 8"),
        (with_weights(type="float"), UnsupportedModel, "type is 'float'"),
        (with_weights(symmetric=False), WeightsMismatch, "weight_zero_point' is missing"),
        (with_weights(strategy="tensor_group"), UnsupportedModel, "strategy is 'tensor_group'"),
        (with_weights(strategy="channel"), CheckpointError, "group_size is 32"),
        (with_weights(group_size=24), CheckpointError, "of groups of 24 cannot cover 64 columns"),
        (with_weights(dynamic=True), UnsupportedModel, "dynamic"),
        (with_weights(num_bits=8), CheckpointError, "is not what weight_packed holds"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_read(made: Made, error: type[ModelError], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words) as caught:
        open_checkpoint(write_layer(tmp_path, made))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("made", [GPTQ, AWQ, CT, fp8_layer(16, 64, (8, 16)), gptq_layer(16, 64, sorted_columns=True)])
def test_a_missing_companion_is_named(made: Made, tmp_path: Path) -> None:
    for part in made.tensors:
        if part == "g_idx" and not made.config["desc_act"]:
            continue
        rest = {name: tensor for name, tensor in made.tensors.items() if name != part}
        path = write_layer(tmp_path / part, Made(rest, made.weight, made.config))
        left_alone = part in ("qweight", "weight_packed", "weight") and "weight_scale" not in rest
        if left_alone and "weight_scale_inv" not in rest:
            # What is left has no meaning, and stays in the list of names for the loader to name.
            assert f"{MODULE}.scales" in open_checkpoint(path).names()
            continue
        with pytest.raises(WeightsMismatch, match=rf"{MODULE}\.{part}' is missing|has no weight beside it"):
            open_checkpoint(path)


@pytest.mark.parametrize(
    ("made", "part", "tensor", "words"),
    [
        (GPTQ, "g_idx", torch.full((64,), 2, dtype=torch.int32), "g_idx' holds 2 to 2, allowed: 0 to 1"),
        (GPTQ, "g_idx", torch.full((64,), -1, dtype=torch.int32), "g_idx' holds -1 to -1"),
        (CT, "weight_zero_point", torch.ones(16, 2, dtype=torch.int8), "is not zero, and the config says"),
        (CT, "weight_g_idx", torch.full((64,), 2), "weight_g_idx' holds 2 to 2, allowed: 0 to 1"),
    ],
)
def test_contents_are_checked_when_they_are_read(
    made: Made, part: str, tensor: torch.Tensor, words: str, tmp_path: Path
) -> None:
    path = write_layer(tmp_path, Made(made.tensors | {part: tensor}, made.weight, made.config))
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match=words):
        checkpoint.tensor(f"{MODULE}.weight")


def test_an_empty_tensor_of_endless_columns(tmp_path: Path) -> None:
    made = Made(GPTQ.tensors | {"qweight": torch.zeros(2**40, 0, dtype=torch.int32)}, GPTQ.weight, GPTQ.config)
    with pytest.raises(CheckpointError, match="qweight' is empty"):
        open_checkpoint(write_layer(tmp_path, made))


def test_older_files_zeros_and_indices_that_say_nothing(tmp_path: Path) -> None:
    more = {"weight_zero_point": torch.zeros(16, 2, dtype=torch.int8), "weight_g_idx": torch.full((64,), -1)}
    path = write_layer(tmp_path, Made(CT.tensors | more, CT.weight, CT.config))
    with open_checkpoint(path) as checkpoint:
        assert same_bits(checkpoint.tensor(f"{MODULE}.weight").dequantise(), CT.weight)


def test_columns_that_compressed_tensors_sorted(tmp_path: Path) -> None:
    index = np.random.default_rng(0).permutation(np.arange(64) // 32)
    numbers = np.random.default_rng(1).integers(-8, 8, (16, 64))
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    tensors = CT.tensors | {
        "weight_packed": pack_to_int32(torch.from_numpy(numbers.astype(np.int8)), 4),
        "weight_g_idx": torch.from_numpy(index),
    }
    scale = tensors["weight_scale"][:, torch.from_numpy(index)]
    expected = (torch.from_numpy(numbers).to(scale.dtype) * scale).float().numpy()
    config = compressed_config(W4 | {"actorder": "group"}, "pack-quantized")
    with open_checkpoint(write_layer(tmp_path, Made(tensors, expected, config))) as checkpoint:
        assert same_bits(checkpoint.tensor(f"{MODULE}.weight").dequantise(), expected)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8), st.lists(st.integers(-2, 9), max_size=3), st.dictionaries(st.text(max_size=3), st.none()),
)  # fmt: skip


@pytest.mark.parametrize("made", [GPTQ, AWQ, CT, fp8_layer(16, 64, (8, 16))], ids=["gptq", "awq", "ct", "fp8"])
@given(data=st.data())
@settings(max_examples=120)
def test_any_corruption_ends_in_a_coded_error_or_in_numbers(made: Made, data: st.DataObject) -> None:
    config, tensors = copy.deepcopy(made.config), dict(made.tensors)
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            table = config
            while nested := [key for key, value in table.items() if isinstance(value, dict) and value]:
                if data.draw(st.booleans()):
                    break
                table = table[data.draw(st.sampled_from(nested))]
            table[data.draw(st.sampled_from([*table, "actorder", "desc_act", "block_structure", "ignore"]))] = (
                data.draw(VALUES)
            )
            continue
        part = data.draw(st.sampled_from([*made.tensors, "g_idx", "weight_g_idx", "weight_zero_point"]))
        kind = data.draw(st.sampled_from([torch.int32, torch.int8, torch.int64, torch.float16, torch.float8_e4m3fn]))
        sizes = st.integers(0, 70) if part not in tensors else st.sampled_from([0, 1, 2, 3, 8, *tensors[part].shape])
        shape = data.draw(st.lists(sizes, max_size=3))
        tensors[part] = torch.zeros(shape).to(kind)
        if data.draw(st.integers(0, 5)) == 0:
            del tensors[part]
    folder = Path(tempfile.mkdtemp())
    try:
        with open_checkpoint(write_layer(folder, Made(tensors, made.weight, config))) as checkpoint:
            for name in checkpoint.names():
                tensor = checkpoint.tensor(name)
                assert tensor.dequantise().shape == checkpoint.shapes()[name]
    except HeadraceError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    finally:
        shutil.rmtree(folder)
