"""Quantised checkpoints, written from the formats' published layouts one number at a time, and what they mean.

Slow on purpose, and sharing nothing with the code under test: numbers are packed by shifting Python integers, values
are computed in the scale's own type by numpy or torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

TORCH_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
MODULE = "model.layers.0.self_attn.q_proj"


@dataclass
class Made:
    """One layer: its tensors by the last part of their names, and its weight (rows, columns)."""

    tensors: dict[str, torch.Tensor]
    weight: NDArray[np.float32]
    config: dict[str, Any] = field(default_factory=dict)


def write_folder(path: Path, tensors: Mapping[str, torch.Tensor], quantisation: Mapping[str, Any] | None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if quantisation is not None:
        config["quantization_config"] = dict(quantisation)
    (path / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def write_layer(path: Path, made: Made, module: str = MODULE) -> Path:
    return write_folder(path, {f"{module}.{part}": tensor for part, tensor in made.tensors.items()}, made.config)


def pack_words(numbers: NDArray[np.int64], bits: int) -> torch.Tensor:
    """(R, C) numbers ≥ 0 -> (R, C · bits / 32) int32, the lowest bits first."""
    each = 32 // bits
    packed = np.zeros((numbers.shape[0], -(-numbers.shape[1] // each)), dtype=np.int64)
    for row in range(numbers.shape[0]):
        for column in range(numbers.shape[1]):
            packed[row, column // each] |= int(numbers[row, column]) << (bits * (column % each))
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32))


def scale_tensor(values: NDArray[np.float32], kind: str) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(TORCH_TYPES[kind])


def times_scale(differences: NDArray[np.int64], scale: torch.Tensor) -> NDArray[np.float32]:
    """The product in the type of the scale, element by element."""
    return (torch.from_numpy(differences).to(scale.dtype) * scale).float().numpy()


def draw_scales(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Sizes over many powers of two, so that products round in every way, and leave float16's normals."""
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(-22, 4, shape)).astype(np.float32)


def gptq_layer(
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = False,
    sorted_columns: bool = False,
    kind: str = "F16",
    version: str = "gptq",
    with_index: bool = True,
    seed: int = 0,
    weight: NDArray[np.float32] | None = None,
) -> Made:
    """`weight`: rounded to the grid where given; else the numbers are random."""
    rng = np.random.default_rng(seed)
    size = columns if group == -1 else group
    groups = -(-columns // size)
    index = np.arange(columns) // size
    if sorted_columns:
        index = index[rng.permutation(columns)]
    top = 2**bits
    zeros = np.full((groups, rows), top // 2) if symmetric else rng.integers(0, top, (groups, rows))
    if weight is None:
        scales = scale_tensor(draw_scales(rng, (groups, rows)), kind)
        numbers = rng.integers(0, top, (rows, columns))
    else:
        largest = np.stack([np.abs(weight[:, index == g]).max(axis=1) for g in range(groups)])
        scales = scale_tensor(largest * 2 / (top - 2), kind)
        zeros = (
            np.full((groups, rows), top // 2) if symmetric else rng.integers(top // 2 - 1, top // 2 + 2, zeros.shape)
        )
        divided = np.rint(weight / scales.float().numpy()[index].T) + zeros[index].T
        numbers = np.clip(divided, 0, top - 1).astype(np.int64)
    stored = (zeros - 1) % top if version == "gptq" else zeros
    tensors = {
        "qweight": pack_words(numbers, bits).T,
        "qzeros": pack_words(stored, bits),
        "scales": scales,
    }
    if with_index:
        tensors["g_idx"] = torch.from_numpy(index.astype(np.int32))
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": sorted_columns, "sym": symmetric}
    config["checkpoint_format"] = version
    difference = numbers - zeros[index].T
    return Made(tensors, times_scale(difference, scales[index].T), config)


def awq_layer(
    rows: int,
    columns: int,
    *,
    group: int = 32,
    kind: str = "F16",
    seed: int = 0,
    weight: NDArray[np.float32] | None = None,
) -> Made:
    rng = np.random.default_rng(seed)
    size = columns if group == -1 else group
    index = np.arange(columns) // size
    zeros = rng.integers(0, 16, (columns // size, rows))
    if weight is None:
        scales = scale_tensor(draw_scales(rng, zeros.shape), kind)
        numbers = rng.integers(0, 16, (rows, columns))
    else:
        zeros = rng.integers(7, 10, zeros.shape)
        largest = np.stack([np.abs(weight[:, index == g]).max(axis=1) for g in range(len(zeros))])
        scales = scale_tensor(largest / 7, kind)
        numbers = np.clip(np.rint(weight / scales.float().numpy()[index].T) + zeros[index].T, 0, 15).astype(np.int64)

    def packed(values_RN: NDArray[np.int64]) -> torch.Tensor:
        words = np.zeros((values_RN.shape[0], rows // 8), dtype=np.int64)
        for row in range(values_RN.shape[0]):
            for word in range(rows // 8):
                for place, output in enumerate(AWQ_ORDER):
                    words[row, word] |= int(values_RN[row, 8 * word + output]) << (4 * place)
        return torch.from_numpy(words.astype(np.uint32).view(np.int32))

    tensors = {"qweight": packed(numbers.T), "qzeros": packed(zeros), "scales": scales}
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Made(tensors, times_scale(numbers - zeros[index].T, scales[index].T), config)


def draw_bytes(rng: np.random.Generator, shape: tuple[int, ...], kind: torch.dtype) -> torch.Tensor:
    """Every bit pattern is as likely."""
    size = int(np.prod(shape)) * kind.itemsize
    return torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8)).view(kind).reshape(shape)


def compressed_layer(rows: int, columns: int, args: Mapping[str, Any], form: str, kind: str, seed: int = 0) -> Made:
    """Random codes in the layout of the compressed-tensors package; the weight is what the package makes of them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    rng = np.random.default_rng(seed)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args), format=form)
    weights = scheme.weights
    assert weights is not None
    scope = {
        "tensor": lambda: (1,),
        "channel": lambda: (rows, 1),
        "group": lambda: (rows, columns // weights.group_size),
        "block": lambda: tuple(-(-n // b) for n, b in zip((rows, columns), weights.block_structure, strict=True)),
    }[args["strategy"]]()
    tensors = {"weight_scale": scale_tensor(draw_scales(rng, scope), kind)}
    bits = weights.num_bits
    if form == "pack-quantized":
        tensors["weight_packed"] = draw_bytes(rng, (rows, -(-columns * bits // 32)), torch.int32)
        tensors["weight_shape"] = torch.tensor([rows, columns])
        if not weights.symmetric and args["strategy"] != "tensor":
            tensors["weight_zero_point"] = draw_bytes(rng, (-(-rows * bits // 32), scope[-1]), torch.int32)
    elif weights.type == "float":
        tensors["weight"] = draw_bytes(rng, (rows, columns), torch.float8_e4m3fn)
    else:
        tensors["weight"] = draw_bytes(rng, (rows, columns), torch.int8)
    if not weights.symmetric and "weight_zero_point" not in tensors:
        half = 2 ** (bits - 1)
        # One that is zero would be no zero point at all.
        drawn = rng.integers(-half, half, scope) if np.prod(scope) > 1 else rng.integers(1, half, scope)
        tensors["weight_zero_point"] = torch.from_numpy(drawn.astype(np.int8))
    made = BaseCompressor.get_value_from_registry(form).decompress(tensors, scheme)["weight"]
    return Made(tensors, made.float().numpy(), compressed_config(args, form))


def compressed_config(args: Mapping[str, Any], form: str, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": dict(args)}},
        "ignore": ["lm_head"],
    } | more


def fp8_layer(
    rows: int,
    columns: int,
    block: tuple[int, int] | None,
    kind: str = "F32",
    seed: int = 0,
    weight: NDArray[np.float32] | None = None,
) -> Made:
    """The layout of DeepSeek-V3: the product is a float32. A `weight` is cut to the grid of scales of 0.01."""
    rng = np.random.default_rng(seed)
    height, width = block or (rows, columns)
    scope = (-(-rows // height), -(-columns // width))
    if weight is None:
        scale = scale_tensor(draw_scales(rng, scope), kind)
        codes = draw_bytes(rng, (rows, columns), torch.float8_e4m3fn)
    else:
        scale = scale_tensor(rng.uniform(0.008, 0.012, scope), kind)
        codes = torch.from_numpy(weight / 0.01).to(torch.float8_e4m3fn)
    whole = scale.float().repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    if block is not None:
        config["weight_block_size"] = list(block)
    tensors = {"weight": codes, "weight_scale_inv": scale if block else scale.reshape(())}
    return Made(tensors, (codes.float() * whole).numpy(), config)
