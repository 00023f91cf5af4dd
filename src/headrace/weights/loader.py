"""The one loader: checkpoint and weight map -> the model's tensors. Names and shapes are settled before bytes move."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from headrace.core.errors import UnsupportedModel, WeightsMismatch, shorten
from headrace.core.spec import WeightMap, WeightRule
from headrace.weights.checkpoint import Checkpoint
from headrace.weights.qtensor import SCHEMES, QTensor

Shapes = Mapping[str, tuple[int, ...]]
_SHOWN = 5
"""Names listed in a message."""


def stream(checkpoint: Checkpoint, weight_map: WeightMap) -> Iterator[tuple[str, QTensor]]:
    """(target, tensor) for every rule, in the order of the files; packed rows stay packed.

    All names and shapes are checked at the call, before any tensor is read. Raises WeightsMismatch on missing,
    left-over or doubled names and on shapes; UnsupportedModel, while streaming, on a tensor type that is not read or
    that the rule's operation cannot work on; ValueError on a rule that makes no sense.
    """
    shapes = checkpoint.shapes()
    _check_names(checkpoint, shapes, weight_map)
    for rule in weight_map.rules:
        _check_shape(rule, shapes)
    place = {name: index for index, name in enumerate(checkpoint.names())}
    in_order = sorted(weight_map.rules, key=lambda rule: min(place[source] for source in rule.sources))
    return ((rule.target, _apply(rule, checkpoint)) for rule in in_order)


def rope_order(num_rows: int, heads: int) -> NDArray[np.intp]:
    """Which stored row each row comes from, when every head's interleaved pairs go back to halves.

    The GGUF converter of llama models stores row i of a head of d rows at 2i, and row i + d/2 at 2i + 1.
    """
    pairs = np.arange(num_rows, dtype=np.intp).reshape(heads, num_rows // heads // 2, 2)
    return pairs.transpose(0, 2, 1).ravel()


def _check_names(checkpoint: Checkpoint, shapes: Shapes, weight_map: WeightMap) -> None:
    used = {source for rule in weight_map.rules for source in rule.sources}
    missing = sorted(used - shapes.keys())
    patterns = [re.compile(pattern) for pattern in weight_map.ignorable]
    left_over = sorted(
        name
        for name in shapes.keys() - used
        if not any(pattern.fullmatch(name) for pattern in patterns) and not checkpoint.droppable(name)
    )
    targets = Counter(rule.target for rule in weight_map.rules)
    doubled = sorted(target for target, count in targets.items() if count > 1)
    faults = [
        f"{len(names)} {fault} ({_listed(names)})"
        for fault, names in (("missing", missing), ("left over", left_over), ("made twice", doubled))
        if names
    ]
    if faults:
        raise WeightsMismatch(f"the checkpoint's tensors are not the model's: {'; '.join(faults)}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(shorten(name) for name in names[:_SHOWN]) + more


def _check_shape(rule: WeightRule, shapes: Shapes) -> None:
    sources = [shapes[source] for source in rule.sources]
    found = _target_shape(rule, sources)
    if found != rule.shape:
        names = ", ".join(shorten(source) for source in rule.sources[:_SHOWN])
        raise WeightsMismatch(f"{rule.target} from {names}: found {found}, needed {rule.shape}")


def _target_shape(rule: WeightRule, sources: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape that the operation makes of the sources' shapes."""
    if not sources or (rule.op != "cat_rows" and len(sources) != 1):
        raise ValueError(f"{rule.target}: {rule.op} cannot take {len(sources)} sources")
    first = sources[0]
    if rule.op == "same":
        return first
    if rule.op == "transpose":
        if len(first) != 2:
            raise WeightsMismatch(f"{rule.target}: {rule.op} needs two dimensions, found {first}")
        return first[::-1]
    if not first:
        raise WeightsMismatch(f"{rule.target}: {rule.op} needs rows, found a tensor of shape ()")
    if rule.op == "cat_rows":
        if any(len(shape) != len(first) or shape[1:] != first[1:] for shape in sources):
            raise WeightsMismatch(f"{rule.target}: rows of different lengths cannot be joined: {list(sources)}")
        return (sum(shape[0] for shape in sources), *first[1:])
    if rule.op == "split_rows":
        if rule.rows is None:
            raise ValueError(f"{rule.target}: split_rows needs `rows`")
        start, stop = rule.rows
        if not 0 <= start <= stop <= first[0]:
            raise WeightsMismatch(f"{rule.target}: rows {start} to {stop} are not inside {rule.sources[0]} {first}")
        return (stop - start, *first[1:])
    if rule.op == "permute_rope":
        if rule.heads < 1:
            raise ValueError(f"{rule.target}: permute_rope needs `heads`")
        if first[0] % (2 * rule.heads):
            raise WeightsMismatch(f"{rule.target}: {first[0]} rows are not {rule.heads} heads of an even size")
        return first
    if rule.op == "take":
        return _taken_shape(rule, first)
    if rule.op == "reshape":
        # Numbers that are not as many as needed are shown in the shape they have.
        return rule.shape if math.prod(first) == math.prod(rule.shape) else first
    if rule.op == "take_cols":
        return _taken_cols_shape(rule, first)
    raise ValueError(f"{rule.target}: unknown operation {shorten(rule.op)}")


def _taken_shape(rule: WeightRule, source: tuple[int, ...]) -> tuple[int, ...]:
    if len(source) != 3 or not 0 <= rule.index < source[0]:
        raise WeightsMismatch(f"{rule.target}: number {rule.index} is not inside {rule.sources[0]} {source}")
    start, stop = rule.rows or (0, source[1])
    if not 0 <= start <= stop <= source[1]:
        raise WeightsMismatch(f"{rule.target}: rows {start} to {stop} are not inside {rule.sources[0]} {source}")
    return (stop - start, source[2])


def _taken_cols_shape(rule: WeightRule, source: tuple[int, ...]) -> tuple[int, ...]:
    if rule.rows is None:
        raise ValueError(f"{rule.target}: take_cols needs `rows`, those of the columns")
    start, stop = rule.rows
    if len(source) != 2 or not 0 <= start <= stop <= source[1]:
        raise WeightsMismatch(f"{rule.target}: columns {start} to {stop} are not inside {rule.sources[0]} {source}")
    return (source[0], stop - start)


def _apply(rule: WeightRule, checkpoint: Checkpoint) -> QTensor:
    parts = [checkpoint.tensor(source) for source in rule.sources]
    first = parts[0]
    try:
        if rule.op == "cat_rows":
            return QTensor.cat_rows(parts)
        if rule.op == "split_rows":
            assert rule.rows is not None
            return first.rows(*rule.rows)
        if rule.op == "permute_rope":
            return first.take_rows(rope_order(first.shape[0], rule.heads))
        if rule.op == "transpose":
            return _transposed(first)
        if rule.op == "take":
            return _taken(first, rule.index, rule.rows)
        if rule.op == "reshape":
            return QTensor(first.scheme, rule.shape, {"data": _plain(first).reshape(rule.shape)})
        if rule.op == "take_cols":
            assert rule.rows is not None
            return QTensor(first.scheme, rule.shape, {"data": _plain(first)[:, slice(*rule.rows)]})
    except ValueError as error:
        raise UnsupportedModel(f"{rule.target}: {rule.op} of {', '.join(rule.sources[:_SHOWN])}: {error}") from error
    return first


def _plain(tensor: QTensor) -> NDArray[np.generic]:
    """Its numbers, in the tensor's shape."""
    if "data" not in tensor.planes:
        raise ValueError(f"groups of {tensor.scheme} run along rows, and columns cannot be taken apart")
    return tensor.planes["data"]


def _transposed(tensor: QTensor) -> QTensor:
    return QTensor(tensor.scheme, tensor.shape[::-1], {"data": _plain(tensor).T})


def _taken(tensor: QTensor, index: int, rows: tuple[int, int] | None) -> QTensor:
    """Number `index` of an (E, N, K) tensor, or `rows` of it: a view, packed as it was."""
    if tensor.scheme not in SCHEMES:
        raise ValueError(f"{tensor.scheme} {tensor.shape} cannot be taken apart")
    planes = {name: plane[index] for name, plane in tensor.planes.items()}
    taken = QTensor(tensor.scheme, tensor.shape[1:], planes)
    return taken if rows is None else taken.rows(*rows)
