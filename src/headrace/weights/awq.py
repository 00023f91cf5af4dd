"""AWQ checkpoints in AutoAWQ's layout "gemm".

A layer (N outputs, K inputs) of 4 bits: qweight int32 (K, N / 8), packed along the outputs: the nibbles of a word, the
lowest first, are its outputs 0, 2, 4, 6, 1, 3, 5, 7; qzeros int32 (K / g, N / 8), packed alike; scales (K / g, N).
A weight is scales · (q - z), computed in the type of the scales.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headrace.weights.packed import (
    SCALE_TYPES,
    Array,
    Layer,
    Packed,
    Quantisation,
    RawTensors,
    Table,
    modules_with,
    rows_of_numbers,
    scaled_tensor,
    spread_nibbles,
)
from headrace.weights.qtensor import QTensor

_OUTPUT_OF = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which output of a word its nibble i holds."""


def read(config: Table, raw: RawTensors) -> Quantisation:
    """Raises UnsupportedModel, CheckpointError, WeightsMismatch."""
    config.integer("bits", (4,))
    group = config.group_size("group_size")
    if not config.flag("zero_point", True):
        raise config.unsupported("zero_point", "true")
    for key in ("version", "format"):
        word = config.get(key)
        if word is not None and not (isinstance(word, str) and word.lower() == "gemm"):
            raise config.unsupported(key, "gemm")
    if config.get("backend") == "llm-awq":
        raise config.unsupported("backend", "one that stores AutoAWQ's layout")
    names = frozenset(raw.names())
    layers = (Layer(raw, names, module) for module in modules_with(raw, "qweight"))
    return Quantisation({f"{layer.module}.weight": _layer(layer, group) for layer in layers})


def _layer(layer: Layer, group: int) -> Packed:
    columns, num_words = layer.need("qweight", ("I32",), 2)
    rows = num_words * 8
    size = columns if group == -1 else group
    if columns % max(1, size) or columns % 2:
        raise layer.fail("qweight", f"has {columns} inputs, allowed: an even multiple of the group of {size}")
    groups = columns // max(1, size)
    layer.need_shape("scales", SCALE_TYPES, (groups, rows))
    layer.need_shape("qzeros", ("I32",), (groups, num_words))

    def read() -> QTensor:
        packed = rows_of_numbers(_outputs(layer.array("qweight")), 4)
        z_NG = _outputs(layer.array("qzeros")).T
        return scaled_tensor(packed, np.ascontiguousarray(layer.array("scales").T), z_NG, 4, {})

    return layer.packed((rows, columns), read)


def _outputs(words: Array) -> NDArray[np.uint8]:
    """(R, N / 8) int32 -> (R, N) numbers in the order of the outputs."""
    return spread_nibbles(words, _OUTPUT_OF).reshape(len(words), 8 * words.shape[1])
