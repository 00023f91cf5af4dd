"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

A layer (N outputs, K inputs) of b bits: qweight int32 (K · b / 32, N), packed along the inputs, the lowest bits first;
scales (G, N); qzeros int32 (G, N · b / 32), packed along the outputs; g_idx int32 (K,), the group of each input.
A weight is scales[g] · (q - z), computed in the type of the scales. Format "gptq" stores z - 1 (modulo 2^b, as
AutoGPTQ's own layer reads it), "gptq_v2" z.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headrace.weights.packed import (
    SCALE_TYPES,
    Layer,
    Packed,
    Quantisation,
    RawTensors,
    Table,
    arrange,
    columns_of_words,
    modules_with,
    scaled_tensor,
    unpack_words,
)
from headrace.weights.qtensor import QTensor

V1, V2 = "gptq", "gptq_v2"


def read(config: Table, raw: RawTensors) -> Quantisation:
    """Raises UnsupportedModel, CheckpointError, WeightsMismatch."""
    bits = config.integer("bits", (4, 8))
    group = config.group_size("group_size")
    by_importance = config.flag("desc_act", False)
    config.word("pack_dtype", ("int32",), "int32")
    # `dynamic`: other bits for some layers. The formats of kernels are other layouts under the same names.
    config.refuse("dynamic", "is_marlin_format")
    kind = config.word("checkpoint_format", (V1, V2), V1)
    if config.get("format") is not None and config.word("format", (V1, V2)) != kind:
        raise config.bad("format", f"what checkpoint_format says, {kind}")
    names = frozenset(raw.names())
    layers = (Layer(raw, names, module) for module in modules_with(raw, "qweight"))
    return Quantisation(
        {f"{layer.module}.weight": _layer(layer, bits, group, by_importance, kind == V1) for layer in layers}
    )


def _layer(layer: Layer, bits: int, group: int, by_importance: bool, minus_one: bool) -> Packed:
    num_words, rows = layer.need("qweight", ("I32",), 2)
    columns = num_words * 32 // bits
    size = columns if group == -1 else group
    groups = -(-columns // max(1, size))
    layer.need_shape("scales", SCALE_TYPES, (groups, rows))
    zeros = layer.need_shape("qzeros", ("I32",), (groups, rows * bits // 32))
    if zeros[1] * 32 != rows * bits:
        raise layer.fail("qweight", f"has {rows} rows, allowed: a multiple of {32 // bits}")
    if by_importance or layer.has("g_idx"):
        layer.need_shape("g_idx", ("I32",), (columns,))

    def read() -> QTensor:
        s_NG = np.ascontiguousarray(layer.array("scales").T)
        stored = unpack_words(layer.array("qzeros"), bits)
        z_NG = ((stored + np.uint8(minus_one)) & np.uint8(2**bits - 1)).T
        index = _group_index(layer, columns, size, groups)
        if groups * size == columns and np.array_equal(index, np.arange(columns) // max(1, size)):
            # A word, transposed, is four bytes of its row as QTensor has them.
            words = np.ascontiguousarray(layer.array("qweight").T)
            return scaled_tensor(words.view(np.uint8), s_NG, z_NG, bits, {})
        return arrange(index, columns_of_words(layer.array("qweight"), bits), s_NG, z_NG, bits)

    return layer.packed((rows, columns), read)


def _group_index(layer: Layer, columns: int, size: int, groups: int) -> NDArray[np.int64]:
    if not layer.has("g_idx"):
        return np.arange(columns) // max(1, size)
    index = layer.array("g_idx").astype(np.int64)
    if columns and not 0 <= int(index.min()) <= int(index.max()) < groups:
        raise layer.fail("g_idx", f"holds {index.min()} to {index.max()}, allowed: 0 to {groups - 1}")
    return index
