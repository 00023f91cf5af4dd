"""QTensor: a weight as its file holds it, and what it means (docs/CONTRACTS.md §3).

`dequantise()` is the specification of every scheme; backends repack in private.
Block layouts of the GGUF schemes: ggml's `block_q4_0`, `block_q4_1`, `block_q8_0`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
Planes = Mapping[str, Array]


def _f32(planes: Planes) -> NDArray[np.float32]:
    return np.asarray(planes["data"], dtype=np.float32)


def _bf16(planes: Planes) -> NDArray[np.float32]:
    return np.left_shift(planes["data"].astype(np.uint32), np.uint32(16)).view(np.float32)


def _nibbles(packed: Array) -> NDArray[np.uint8]:
    """(…, 16) bytes -> (…, 32) values: the low nibbles are values 0–15, the high ones 16–31."""
    bytes_ = packed.astype(np.uint8, copy=False)
    return np.concatenate((bytes_ & np.uint8(0x0F), bytes_ >> np.uint8(4)), axis=-1)


def _q4_0(planes: Planes) -> NDArray[np.float32]:
    centred = _nibbles(planes["q"]).view(np.int8) - np.int8(8)
    return centred.astype(np.float32) * planes["d"].astype(np.float32)[..., None]


def _q4_1(planes: Planes) -> NDArray[np.float32]:
    scaled = _nibbles(planes["q"]).astype(np.float32) * planes["d"].astype(np.float32)[..., None]
    return scaled + planes["m"].astype(np.float32)[..., None]


def _q8_0(planes: Planes) -> NDArray[np.float32]:
    return planes["q"].astype(np.float32) * planes["d"].astype(np.float32)[..., None]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a row of weights is stored: groups of `group` weights along K, each a record of planes in file order."""

    name: str
    group: int
    record: tuple[tuple[str, str, tuple[int, ...]], ...]
    """(plane, numpy dtype, shape within one group); a group of 1 has the one plane `data`."""
    decode: Callable[[Planes], NDArray[np.float32]]

    @property
    def dtype(self) -> np.dtype[np.void]:
        """The record as a packed structured dtype: what one group is in the file."""
        return np.dtype([(name, kind, shape) for name, kind, shape in self.record])

    @property
    def group_bytes(self) -> int:
        return self.dtype.itemsize


SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("f32", 1, (("data", "<f4", ()),), _f32),
        Scheme("f16", 1, (("data", "<f2", ()),), _f32),
        Scheme("bf16", 1, (("data", "<u2", ()),), _bf16),
        Scheme("q4_0", 32, (("d", "<f2", ()), ("q", "u1", (16,))), _q4_0),
        Scheme("q4_1", 32, (("d", "<f2", ()), ("m", "<f2", ()), ("q", "u1", (16,))), _q4_1),
        Scheme("q8_0", 32, (("d", "<f2", ()), ("q", "i1", (32,))), _q8_0),
    )
}


@dataclass(frozen=True, slots=True, eq=False)
class QTensor:
    """A tensor of shape (N, K) or (K,): numpy planes, row-major over N, groups along K.

    Planes of a grouped scheme have shape (N, K / group, …); the plane of f32, f16 and bf16 has the tensor's shape.
    They are views of a memory map wherever possible: read-only.
    """

    scheme: str
    shape: tuple[int, ...]
    planes: Planes

    @classmethod
    def from_array(cls, array: Array) -> QTensor:
        """float32 or float16 array -> QTensor; a uint16 array is taken as raw bf16."""
        names = {"float32": "f32", "float16": "f16", "uint16": "bf16"}
        if array.dtype.name not in names:
            raise ValueError(f"no scheme for dtype {array.dtype}; known: {', '.join(names)}")
        return cls(names[array.dtype.name], array.shape, {"data": array})

    @classmethod
    def from_bytes(cls, scheme: str, shape: tuple[int, ...], buffer: Array) -> QTensor:
        """A flat uint8 array in file order -> views of its planes, without a copy.

        Raises ValueError on a wrong size.
        """
        kind = SCHEMES[scheme]
        if kind.group > 1 and not shape:
            raise ValueError(f"{scheme} has groups of {kind.group}: a tensor of shape () cannot hold one")
        if shape and shape[-1] % kind.group:
            raise ValueError(f"a row of {shape[-1]} is not a multiple of {scheme}'s group of {kind.group}")
        grouped = (*shape[:-1], shape[-1] // kind.group) if kind.group > 1 else shape
        count = 1
        for size in grouped:
            count *= size
        if buffer.nbytes != count * kind.group_bytes:
            raise ValueError(f"{scheme} {shape} needs {count * kind.group_bytes} bytes, got {buffer.nbytes}")
        records = buffer.view(kind.dtype).reshape(grouped)
        return cls(scheme, shape, {name: records[name] for name, _, _ in kind.record})

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes.values())

    def rows(self, start: int, stop: int) -> QTensor:
        """Rows [start, stop), a view. Raises ValueError outside 0 ≤ start ≤ stop ≤ rows, or on a grouped vector."""
        self._require_rows()
        if not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"rows {start}:{stop} are not inside the {self.shape[0]} of {self.scheme} {self.shape}")
        return self._map(lambda plane: plane[start:stop], (stop - start, *self.shape[1:]))

    def take_rows(self, order: NDArray[np.intp]) -> QTensor:
        """Rows in another order, a copy. Raises IndexError outside the rows, ValueError on a grouped vector."""
        self._require_rows()
        return self._map(lambda plane: plane[order], (len(order), *self.shape[1:]))

    def cols(self, start: int, stop: int) -> QTensor:
        """Columns [start, stop) of a 2-D tensor, a view.

        Raises ValueError unless both fall between groups and inside it.
        """
        group = SCHEMES[self.scheme].group
        if len(self.shape) != 2 or start % group or stop % group:
            raise ValueError(
                f"columns {start}:{stop} of {self.scheme} {self.shape} do not fall between groups of {group}"
            )
        if not 0 <= start <= stop <= self.shape[1]:
            raise ValueError(f"columns {start}:{stop} are not inside the {self.shape[1]} of {self.scheme} {self.shape}")
        return self._map(lambda plane: plane[:, start // group : stop // group], (self.shape[0], stop - start))

    @staticmethod
    def cat_rows(parts: Sequence[QTensor]) -> QTensor:
        """Parts of one scheme and one row length, one under the other. Raises ValueError otherwise."""
        if not parts:
            raise ValueError("no parts to join")
        first = parts[0]
        if any(part.scheme != first.scheme or part.shape[1:] != first.shape[1:] for part in parts):
            found = ", ".join(f"{part.scheme} {part.shape}" for part in parts)
            raise ValueError(f"parts of different schemes or row lengths cannot be joined: {found}")
        planes = {name: np.concatenate([part.planes[name] for part in parts]) for name in first.planes}
        return QTensor(first.scheme, (sum(part.shape[0] for part in parts), *first.shape[1:]), planes)

    def dequantise(self) -> NDArray[np.float32]:
        """The float32 values, in `shape`. Exact for every scheme: one rounding a multiplication, one an addition.

        A view, read-only, where the tensor is f32. A scale that is infinite or not a number gives such values.
        """
        with np.errstate(invalid="ignore"):
            return SCHEMES[self.scheme].decode(self.planes).reshape(self.shape)

    def _require_rows(self) -> None:
        if not self.shape or (len(self.shape) == 1 and SCHEMES[self.scheme].group > 1):
            raise ValueError(f"{self.scheme} {self.shape} has no rows that can be told apart")

    def _map(self, change: Callable[[Array], Array], shape: tuple[int, ...]) -> QTensor:
        return QTensor(self.scheme, shape, {name: change(plane) for name, plane in self.planes.items()})
