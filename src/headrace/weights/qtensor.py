"""QTensor: a weight as its file holds it, and what it means (docs/CONTRACTS.md §3).

`dequantise()` is the specification of every scheme; backends repack in private. `ggml.py` says what the blocks of GGUF
files mean, `scaled.py` the numbers with a plane of scales that every other quantised checkpoint is read as.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.weights import ggml, scaled

Array = NDArray[np.generic]
Planes = Mapping[str, Array]
Plane = tuple[str, str, tuple[int, ...]]
"""Name, numpy dtype, shape within one group."""


def _f32(planes: Planes) -> NDArray[np.float32]:
    return np.asarray(planes["data"], dtype=np.float32)


def _bf16(planes: Planes) -> NDArray[np.float32]:
    return np.left_shift(planes["data"].astype(np.uint32), np.uint32(16)).view(np.float32)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a row of weights is stored: groups of `group` weights along K, each a record of planes in file order."""

    name: str
    group: int
    record: tuple[Plane, ...]
    """A group of 1 has the one plane `data`."""
    decode: Callable[[Planes], NDArray[np.float32]]

    @property
    def dtype(self) -> np.dtype[np.void]:
        """The record as a packed structured dtype: what one group is in the file."""
        return np.dtype([(name, kind, shape) for name, kind, shape in self.record])

    @property
    def group_bytes(self) -> int:
        return self.dtype.itemsize


_CHUNK = 1 << 20
"""Values dequantised at once: what the steps in between take stays in the cache."""
_D: Plane = ("d", "<f2", ())
_M: Plane = ("m", "<f2", ())
_DMIN: Plane = ("dmin", "<f2", ())

SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("f32", 1, (("data", "<f4", ()),), _f32),
        Scheme("f16", 1, (("data", "<f2", ()),), _f32),
        Scheme("bf16", 1, (("data", "<u2", ()),), _bf16),
        Scheme("q4_0", 32, (_D, ("q", "u1", (16,))), ggml.q4_0),
        Scheme("q4_1", 32, (_D, _M, ("q", "u1", (16,))), ggml.q4_1),
        Scheme("q5_0", 32, (_D, ("h", "u1", (4,)), ("q", "u1", (16,))), ggml.q5_0),
        Scheme("q5_1", 32, (_D, _M, ("h", "u1", (4,)), ("q", "u1", (16,))), ggml.q5_1),
        Scheme("q8_0", 32, (_D, ("q", "i1", (32,))), ggml.q8_0),
        Scheme("q2_K", 256, (("s", "u1", (16,)), ("q", "u1", (64,)), _D, _DMIN), ggml.q2_k),
        Scheme("q3_K", 256, (("h", "u1", (32,)), ("q", "u1", (64,)), ("s", "u1", (12,)), _D), ggml.q3_k),
        Scheme("q4_K", 256, (_D, _DMIN, ("s", "u1", (12,)), ("q", "u1", (128,))), ggml.q4_k),
        Scheme("q5_K", 256, (_D, _DMIN, ("s", "u1", (12,)), ("h", "u1", (32,)), ("q", "u1", (128,))), ggml.q5_k),
        Scheme("q6_K", 256, (("q", "u1", (128,)), ("h", "u1", (64,)), ("s", "i1", (16,)), _D), ggml.q6_k),
    )
}


class Reordered(Mapping[str, Array]):
    """Planes with their rows in another order. A plane is copied when it is asked for: who packs it need not ask."""

    def __init__(self, stored: Planes, order: NDArray[np.intp]) -> None:
        self.stored = stored
        self.order = order

    def __getitem__(self, name: str) -> Array:
        plane = self.stored[name]
        return plane if name == scaled.ORDER else plane[self.order]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


@dataclass(frozen=True, slots=True, eq=False)
class QTensor:
    """A tensor of shape (N, K) or (K,): numpy planes, row-major over N, groups along K.

    Planes of a GGUF scheme have shape (N, K / group, …); the plane of f32, f16 and bf16 has the tensor's shape; those
    of int4, int8 and fp8 are described in `scaled.py`. They are views of a memory map wherever possible: read-only.
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
    def group(self) -> int:
        """Columns that share what scales them; 1 for plain numbers."""
        if self.scheme in SCHEMES:
            return SCHEMES[self.scheme].group
        return int(self.shape[-1] // max(1, self.planes["s"].shape[-1]))

    @property
    def nbytes(self) -> int:
        if self.scheme in SCHEMES:
            scheme = SCHEMES[self.scheme]
            return math.prod(self.shape) // scheme.group * scheme.group_bytes
        return sum(plane.nbytes for plane in self.planes.values())

    def rows(self, start: int, stop: int) -> QTensor:
        """Rows [start, stop), a view. Raises ValueError outside 0 ≤ start ≤ stop ≤ rows, or on a grouped vector."""
        self._require_rows()
        if not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"rows {start}:{stop} are not inside the {self.shape[0]} of {self.scheme} {self.shape}")
        return self._map(lambda plane: plane[start:stop], (stop - start, *self.shape[1:]))

    def take_rows(self, order: NDArray[np.intp]) -> QTensor:
        """Rows in another order, `Reordered`. Raises IndexError outside the rows, ValueError on a grouped vector."""
        self._require_rows()
        if len(order) and not 0 <= order.min() <= order.max() < self.shape[0]:
            raise IndexError(f"rows {order.min()} to {order.max()} of {self.scheme} {self.shape}")
        return QTensor(self.scheme, (len(order), *self.shape[1:]), Reordered(self.planes, order))

    def cols(self, start: int, stop: int) -> QTensor:
        """Columns [start, stop) of a 2-D tensor, a view.

        Raises ValueError unless both fall between groups and inside it.
        """
        group = self.group
        if len(self.shape) != 2 or not group or start % group or stop % group:
            raise ValueError(
                f"columns {start}:{stop} of {self.scheme} {self.shape} do not fall between groups of {group}"
            )
        if not 0 <= start <= stop <= self.shape[1]:
            raise ValueError(f"columns {start}:{stop} are not inside the {self.shape[1]} of {self.scheme} {self.shape}")
        shape = (self.shape[0], stop - start)
        if self.scheme not in SCHEMES:
            return QTensor(self.scheme, shape, scaled.columns(self.scheme, self.planes, start, stop, group))
        return self._map(lambda plane: plane[:, start // group : stop // group], shape)

    @staticmethod
    def cat_rows(parts: Sequence[QTensor]) -> QTensor:
        """Parts of one scheme and one row length, one under the other. Raises ValueError otherwise."""
        if not parts:
            raise ValueError("no parts to join")
        first = parts[0]
        if any(part.scheme != first.scheme or part.shape[1:] != first.shape[1:] for part in parts):
            found = ", ".join(f"{part.scheme} {part.shape}" for part in parts)
            raise ValueError(f"parts of different schemes or row lengths cannot be joined: {found}")
        if first.scheme not in SCHEMES and not all(scaled.can_join(first.planes, part.planes) for part in parts):
            raise ValueError(f"parts of {first.scheme} with different groups, types or column orders cannot be joined")
        planes = {
            name: plane if name == scaled.ORDER else np.concatenate([part.planes[name] for part in parts])
            for name, plane in first.planes.items()
        }
        return QTensor(first.scheme, (sum(part.shape[0] for part in parts), *first.shape[1:]), planes)

    def dequantise(self) -> NDArray[np.float32]:
        """The float32 values, in `shape`. Exact for every scheme: one rounding a multiplication, one an addition, and
        for int4, int8 and fp8 one to the type of their scales.

        A view, read-only, where the tensor is f32. A scale that is infinite or not a number gives such values.
        """
        width = math.prod(self.shape[1:])
        if self.scheme == "f32" or len(self.shape) < 2 or self.shape[0] * width <= _CHUNK:
            return self._decode()
        values = np.empty(self.shape, np.float32)
        step = max(1, _CHUNK // width)
        for start in range(0, self.shape[0], step):
            values[start : start + step] = self.rows(start, min(start + step, self.shape[0]))._decode()
        return values

    def _decode(self) -> NDArray[np.float32]:
        with np.errstate(invalid="ignore", over="ignore"):
            if self.scheme not in SCHEMES:
                return scaled.decode(self.scheme, self.planes)
            return SCHEMES[self.scheme].decode(self.planes).reshape(self.shape)

    def _require_rows(self) -> None:
        if not self.shape or (len(self.shape) == 1 and self.group > 1):
            raise ValueError(f"{self.scheme} {self.shape} has no rows that can be told apart")

    def _map(self, change: Callable[[Array], Array], shape: tuple[int, ...]) -> QTensor:
        planes = {name: plane if name == scaled.ORDER else change(plane) for name, plane in self.planes.items()}
        return QTensor(self.scheme, shape, planes)
