"""The native backend's kinds of arithmetic, and checkpoints whose weights are packed on their way into it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from headrace.weights.qtensor import SCHEMES, QTensor

Tensors = Iterator[tuple[str, QTensor]]
Change = Callable[[Tensors], Tensors]

SIZES: Mapping[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Rows of whole groups of 32; panels of 16 rows that are not full."""
EXPERTS: Mapping[str, Any] = {**SIZES, "moe_intermediate_size": 32, "head_dim": 16}
WIDE: Mapping[str, Any] = {**SIZES, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
"""Rows of whole blocks of 256."""
PACKED = re.compile(r".*(attn\.[qkvo]|mlp\.(gate|up|down)|mlp\.experts\..*|embed|head)\.weight")
DEEP = 1.5
"""Standard deviation of a packed weight, times the square root of its row: logits differ as a trained model's do."""


def packed_as(*schemes: str) -> Change:
    """Replaces the weights of linear layers, of the embedding and of the head by random ones, in these schemes by
    turns."""

    def change(tensors: Tensors) -> Tensors:
        for index, (name, tensor) in enumerate(tensors):
            scheme = schemes[index % len(schemes)]
            yield name, random_tensor(scheme, tensor.shape, index) if PACKED.fullmatch(name) else tensor

    return change


def random_tensor(scheme: str, shape: tuple[int, ...], seed: int) -> QTensor:
    """Any codes; scales such that values are about 0 and of one size, whatever the scheme."""
    rng = np.random.default_rng([seed, shape[1]])
    if scheme in ("f32", "bf16"):
        values = (rng.standard_normal(shape) * DEEP / np.sqrt(shape[1])).astype(np.float32)
        return QTensor.from_array(values if scheme == "f32" else (values.view(np.uint32) >> 16).astype(np.uint16))
    return _blocks(scheme, shape, rng) if scheme in SCHEMES else _scaled(scheme, shape, rng)


MEAN_CODES: Mapping[str, float] = {"q4_1": 7.5, "q5_1": 15.5, "q2_K": 1.5, "q4_K": 7.5, "q5_K": 15.5}
"""Where a scheme has a minimum: what it must balance."""


def _blocks(scheme: str, shape: tuple[int, ...], rng: np.random.Generator) -> QTensor:
    kind = SCHEMES[scheme]
    records = np.empty(shape[0] * shape[1] // kind.group, dtype=kind.dtype)
    scales = rng.uniform(0.5, 1.0, records.size)
    for name, numpy_type, inner in kind.record:
        if inner:
            records[name] = rng.integers(0, 256, (records.size, *inner), dtype=np.uint8).view(numpy_type)

    def scaled(factor: float) -> QTensor:
        records["d"] = scales * factor
        for name, sign in (("m", -1.0), ("dmin", 1.0)):
            if name in kind.dtype.names:
                records[name] = sign * MEAN_CODES[scheme] * scales * factor
        return QTensor.from_bytes(scheme, shape, records.view(np.uint8))

    return scaled(DEEP / np.sqrt(shape[1]) / scaled(1.0).dequantise().std())


def _scaled(scheme: str, shape: tuple[int, ...], rng: np.random.Generator) -> QTensor:
    """int4, int8 and those with zeros of their own, in groups of 32."""
    four = scheme.startswith("int4")
    numbers = rng.integers(0, 256, (shape[0], shape[1] // (2 if four else 1)), dtype=np.uint8)
    groups = (shape[0], shape[1] // 32)
    size = DEEP / np.sqrt(shape[1]) / (4.6 if four else 74.0)
    planes: dict[str, Any] = {
        "q": numbers if four else numbers.view(np.int8),
        "s": (rng.uniform(0.5, 1.5, groups) * size).astype(np.float32),
    }
    if scheme.endswith("_asym"):
        zeros = rng.integers(6, 10, groups) if four else rng.integers(-9, 9, groups)
        planes["z"] = zeros.astype(np.uint8 if four else np.int8)
    return QTensor(scheme, shape, planes)


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Options of the native backend, with a model for them."""

    options: Mapping[str, Any]
    schemes: tuple[str, ...] = ()
    """Of its weights; none: as the checkpoint has them."""
    sizes: Mapping[str, Any] = field(default_factory=lambda: SIZES)

    def change(self, tensors: Tensors) -> Tensors:
        return packed_as(*self.schemes)(tensors) if self.schemes else tensors


STORED: Mapping[str, Any] = {"quant": "stored"}
ARITHMETIC: Mapping[str, Arithmetic] = {
    "float32": Arithmetic({}),
    "float32, kv int8": Arithmetic({"kv_dtype": "int8"}),
    "bfloat16": Arithmetic({"dtype": "bfloat16", "kv_dtype": "bfloat16"}),
    "float16": Arithmetic({"dtype": "float16"}),
    "int8": Arithmetic({"quant": "int8", "kv_dtype": "bfloat16"}),
    "int4": Arithmetic({"quant": "int4", "kv_dtype": "int8"}),
    "q4_1": Arithmetic(STORED, ("q4_1",)),
    "q8_0": Arithmetic({**STORED, "kv_dtype": "int8"}, ("q8_0",)),
    "q4_0, q5_0, q5_1": Arithmetic({**STORED, "kv_dtype": "bfloat16"}, ("q4_0", "q5_0", "q5_1")),
    "q4_K, q6_K": Arithmetic(STORED, ("q4_K", "q6_K"), WIDE),
    "q3_K, q5_K": Arithmetic({**STORED, "kv_dtype": "int8"}, ("q3_K", "q5_K"), WIDE),
    "int4, int8": Arithmetic(STORED, ("int4", "int8", "int4_asym", "int8_asym")),
    "packed and plain": Arithmetic({**STORED, "kv_dtype": "bfloat16"}, ("q4_1", "f32", "q8_0", "bf16", "q2_K"), WIDE),
}
