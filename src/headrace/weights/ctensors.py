"""Checkpoints of the compressed-tensors package (llm-compressor's and vLLM's format).

A layer (N, K) of a config group:

    pack-quantized   weight_packed int32 (N, ceil(K · b / 32)), numbers of b bits plus 2^(b-1), the lowest bits first;
                     weight_shape (2,); weight_zero_point, of groups and rows packed alike along N; weight_g_idx (K,)
    int-quantized    weight int8 (N, K), weight_zero_point int8
    float-quantized  weight fp8 E4M3 (N, K)
    naive-quantized  one of the last two, by the type of the numbers

and weight_scale: one of a tensor, (N, 1) of rows, (N, K / g) of groups, (ceil(N / h), ceil(K / w)) of blocks.
A weight is (q - z) · scale in the type of the scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.core.errors import WeightsMismatch, shorten
from headrace.weights.packed import (
    SCALE_TYPES,
    Array,
    Layer,
    Packed,
    Quantisation,
    RawTensors,
    Shape,
    Table,
    arrange,
    block_size,
    modules_with,
    scaled_tensor,
    spread,
    unpack_words,
)
from headrace.weights.patterns import Pattern, Work
from headrace.weights.qtensor import QTensor

PACKED, INTS, FLOATS, NAIVE, DENSE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense"
FORMATS = (PACKED, INTS, FLOATS, NAIVE)
STRATEGIES = ("tensor", "channel", "group", "block")
MAX_GROUPS = 1024
Targets = Mapping[str, tuple[Pattern, "Group"]]
_ACTIVATIONS = ("input_activations", "output_activations")
_ACTIVATION_PARTS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
_CACHE_PARTS = tuple(f"{part}_{kind}" for part in "qkv" for kind in ("scale", "zero_point"))


@dataclass(frozen=True, slots=True)
class Group:
    """One entry of config_groups."""

    format: str
    bits: int
    floats: bool
    symmetric: bool
    strategy: str
    size: int
    """Columns of a group or a block."""
    block_rows: int


def read(config: Table, raw: RawTensors) -> Quantisation:
    """Raises UnsupportedModel, CheckpointError, WeightsMismatch."""
    # Older files with compressed weights say "frozen"; the types of the tensors tell.
    config.word("quantization_status", ("compressed", "frozen"), "compressed")
    config.refuse("moe_sparsity_config")
    sparsity = config.table("sparsity_config")
    if sparsity is not None:
        sparsity.word("format", (DENSE,), DENSE)
    transforms = config.table("transform_config")
    if transforms is not None:
        transforms.refuse("config_groups")
    work = Work(config.where)
    targets, notes = _groups(config, work)
    ignored = [Pattern(target, f"{config.where}: ignore", work) for target in config.words("ignore")]
    if config.table("kv_cache_scheme") is not None:
        notes.append("the checkpoint wants a quantised KV cache: headrace keeps it in its own precision")
    names = frozenset(raw.names())
    packed: dict[str, Packed] = {}
    unused = [name for name in raw.names() if _is_cache_scale(name)]
    for module in _quantised_modules(raw, names):
        layer = Layer(raw, names, module)
        group = _group_of(module, targets, ignored)
        packed[f"{module}.weight"] = _layer(layer, group)
        unused += [f"{module}.{part}" for part in _ACTIVATION_PARTS if layer.has(part)]
    return Quantisation(packed, frozenset(unused), tuple(notes))


# ---------------------------------------------------------------- quantization_config


def _groups(config: Table, work: Work) -> tuple[Targets, list[str]]:
    """What each target means (a later group wins), and what the user should know."""
    tables = config.table("config_groups")
    if tables is None or not 0 < len(tables.items()) <= MAX_GROUPS:
        raise config.bad("config_groups", f"1 to {MAX_GROUPS} groups")
    targets: dict[str, tuple[Pattern, Group]] = {}
    notes = []
    for name, value in tables.items():
        table = Table(value, f"{config.where}: config_groups: {shorten(name)}")
        kind = _format(config, table)
        weights = table.table("weights")
        if weights is None or kind == DENSE:
            continue
        notes += [_activation_note(table, key) for key in _ACTIVATIONS if table.get(key) is not None]
        group = _group(weights, kind)
        for target in table.words("targets"):
            targets[target] = (Pattern(target, f"{table.where}: targets", work), group)
    return targets, list(dict.fromkeys(notes))


def _format(config: Table, table: Table) -> str:
    """A group's own format, or that of the whole checkpoint."""
    if table.get("format") is not None:
        return table.word("format", (*FORMATS, DENSE))
    return config.word("format", FORMATS)


def _activation_note(table: Table, key: str) -> str:
    args = Table(table.get(key), f"{table.where}: {key}")
    bits, kind = args.get("num_bits"), args.get("type")
    what = "inputs" if key.startswith("input") else "outputs"
    how = "each time anew" if args.get("dynamic") else "with stored scales"
    return (
        f"the checkpoint was made for {what} of its layers rounded to {shorten(kind)} of {shorten(bits)} bits, {how}: "
        "headrace does not round them and applies the quantised weights only"
    )


def _group(weights: Table, kind: str) -> Group:
    bits = weights.integer("num_bits", (4, 8), 8)
    floats = weights.word("type", ("int", "float"), "int") == "float"
    if floats and (bits, kind) not in {(8, FLOATS), (8, NAIVE)}:
        raise weights.unsupported("type", f"int, or float of 8 bits in {FLOATS} or {NAIVE}")
    if not floats and kind == FLOATS:
        raise weights.unsupported("type", f"float in {FLOATS}")
    weights.refuse("dynamic")
    if weights.get("actorder") not in (None, True, False):
        weights.word("actorder", ("group", "dynamic", "weight", "static"))
    size = -1 if weights.get("group_size") is None else weights.group_size("group_size")
    default = "tensor" if weights.get("group_size") is None else "group" if size > 0 else "channel"
    strategy = weights.word("strategy", STRATEGIES, default)
    if (strategy == "group") != (size > 0):
        raise weights.bad("group_size", f"a size above 0 for groups, and none for strategy {strategy}")
    symmetric = weights.flag("symmetric", True)
    if floats and not symmetric:
        raise weights.unsupported("symmetric", "true for float")
    block_rows = 1
    if strategy == "block":
        block_rows, size = block_size(weights, "block_structure")
    return Group(kind, bits, floats, symmetric, strategy, size, block_rows)


def _group_of(module: str, targets: Targets, ignored: Sequence[Pattern]) -> Group:
    """The group that holds for a quantised layer: by its name, else the first fitting expression, else its class."""
    if any(pattern.rank(module) is not None for pattern in ignored):
        raise WeightsMismatch(f"layer {shorten(module, 120)} is quantised, and quantization_config ignores it")
    ranks = [(pattern.rank(module), text) for text, (pattern, _) in targets.items()]
    found = min(((rank, text) for rank, text in ranks if rank is not None), default=None)
    if found is None:
        raise WeightsMismatch(f"layer {shorten(module, 120)} is quantised, and no group of the config targets it")
    return targets[found[1]][1]


def _quantised_modules(raw: RawTensors, names: frozenset[str]) -> Iterator[str]:
    for name in raw.names():
        module, _, part = name.rpartition(".")
        if part == "weight_packed" or (part == "weight" and f"{module}.weight_scale" in names):
            yield module
    # A scale alone is a layer of which the numbers are missing.
    for module in modules_with(raw, "weight_scale"):
        if f"{module}.weight" not in names and f"{module}.weight_packed" not in names:
            raise WeightsMismatch(f"tensor {shorten(f'{module}.weight_scale', 120)} has no weight beside it")


def _is_cache_scale(name: str) -> bool:
    module, _, part = name.rpartition(".")
    return part in _CACHE_PARTS and module.endswith("attn")


# ---------------------------------------------------------------- layers


def _layer(layer: Layer, group: Group) -> Packed:
    if group.format == PACKED:
        return _packed_layer(layer, group)
    rows, columns = layer.need("weight", ("F8_E4M3",) if group.floats else ("I8",), 2)
    scale = _scale_shape(layer, group, rows, columns)
    has_zero = _has_plain_zero(layer, group, scale)

    def read() -> QTensor:
        planes = {"q": layer.array("weight"), "s": _over(layer.array("weight_scale"), group, rows, columns)}
        zero = _plain_zero(layer, group) if has_zero else None
        if zero is not None:
            planes["z"] = _over(zero, group, rows, columns)
        return QTensor("fp8" if group.floats else "int8" if zero is None else "int8_asym", (rows, columns), planes)

    return layer.packed((rows, columns), read)


def _packed_layer(layer: Layer, group: Group) -> Packed:
    rows, num_words = layer.need("weight_packed", ("I32",), 2)
    layer.need_shape("weight_shape", ("I64", "I32"), (2,))
    stored_rows, columns = (int(size) for size in layer.array("weight_shape"))
    if stored_rows != rows or columns < 0 or -(-columns * group.bits // 32) != num_words:
        raise layer.fail("weight_shape", f"is ({stored_rows}, {columns}), which is not what weight_packed holds")
    if columns * group.bits % 8:
        raise layer.fail("weight_shape", f"is ({rows}, {columns}), allowed: an even number of columns")
    scale = _scale_shape(layer, group, rows, columns)
    zero_is_packed = not group.symmetric and group.strategy in ("group", "channel")
    if zero_is_packed:
        layer.need_shape("weight_zero_point", ("I32",), (-(-rows * group.bits // 32), scale[-1]))
    has_plain_zero = not zero_is_packed and _has_plain_zero(layer, group, scale)
    if layer.has("weight_g_idx"):
        layer.need_shape("weight_g_idx", ("I32", "I64"), (columns,))

    def read() -> QTensor:
        words = np.ascontiguousarray(layer.array("weight_packed"))
        stored = layer.array("weight_scale")
        zero: NDArray[np.uint8] | None = None
        if zero_is_packed:
            zero = unpack_words(layer.array("weight_zero_point").T, group.bits)[:, :rows].T
        elif has_plain_zero and (plain := _plain_zero(layer, group)) is not None:
            zero = (plain.view(np.uint8) + np.uint8(1 << (group.bits - 1))).reshape(scale)
        index = _column_groups(layer, scale[-1])
        if index is not None:
            return arrange(index, unpack_words(words, group.bits)[:, :columns].T, stored, zero, group.bits)
        zero = None if zero is None else _over(zero, group, rows, columns).view(np.uint8)
        q = words.view(np.uint8)[:, : columns * group.bits // 8]
        return scaled_tensor(q, _over(stored, group, rows, columns), zero, group.bits, {})

    return layer.packed((rows, columns), read)


def _scale_shape(layer: Layer, group: Group, rows: int, columns: int) -> Shape:
    if group.strategy == "tensor":
        return layer.need_shape("weight_scale", SCALE_TYPES, (1,), (), (1, 1))
    if group.strategy == "channel":
        return layer.need_shape("weight_scale", SCALE_TYPES, (rows, 1))
    if group.strategy == "group" and columns % group.size:
        raise layer.fail("weight_scale", f"of groups of {group.size} cannot cover {columns} columns")
    blocks = (-(-rows // group.block_rows), -(-columns // group.size))
    return layer.need_shape("weight_scale", SCALE_TYPES, blocks)


def _over(stored: Array, group: Group, rows: int, columns: int) -> Array:
    """A scale or zero of whatever scope, as a plane (rows, groups)."""
    if group.strategy == "tensor":
        return spread(stored.reshape(1, 1), rows, columns, max(1, rows), max(1, columns))
    return spread(stored, rows, columns, group.block_rows, group.size if group.size > 0 else max(1, columns))


def _has_plain_zero(layer: Layer, group: Group, scale: Shape) -> bool:
    """Symmetric layers of older files carry zeros that are zero; they are checked, and then forgotten."""
    if group.symmetric and not layer.has("weight_zero_point"):
        return False
    layer.need_shape("weight_zero_point", ("F8_E4M3",) if group.floats else ("I8",), scale)
    return True


def _plain_zero(layer: Layer, group: Group) -> Array | None:
    zero = np.ascontiguousarray(layer.array("weight_zero_point"))
    if not group.symmetric:
        return zero
    if np.any(zero.view(np.uint8) & np.uint8(0x7F if group.floats else 0xFF)):
        raise layer.fail("weight_zero_point", "is not zero, and the config says that the layer is symmetric")
    return None


def _column_groups(layer: Layer, groups: int) -> NDArray[np.int64] | None:
    """The group of each column, where the file says it; -1 everywhere says nothing."""
    if not layer.has("weight_g_idx"):
        return None
    index = layer.array("weight_g_idx").astype(np.int64)
    if not index.size or bool((index == -1).all()):
        return None
    if not 0 <= int(index.min()) <= int(index.max()) < groups:
        raise layer.fail("weight_g_idx", f"holds {index.min()} to {index.max()}, allowed: 0 to {groups - 1}")
    return index
