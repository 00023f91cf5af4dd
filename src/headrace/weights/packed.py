"""What the readers of quantised checkpoints share: a layer's tensors, checked, and their way into a QTensor.

A quantised layer has several tensors where a plain one has `weight`. Shapes and types are held against each other when
the checkpoint is opened; what lies in the tensors is read, and checked, when the layer's weight is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from headrace.core.errors import CheckpointError, UnsupportedModel, WeightsMismatch, shorten
from headrace.weights.qtensor import QTensor
from headrace.weights.scaled import ORDER, unpack_nibbles

Array = NDArray[np.generic]
Shape = tuple[int, ...]

SCALE_TYPES = ("F16", "BF16", "F32")
MAX_GROUP = 2**24
ARRAY_TYPES: Mapping[str, str] = MappingProxyType(
    {"I8": "<i1", "I32": "<i4", "I64": "<i8", "F8_E4M3": "<u1", "F16": "<f2", "BF16": "<u2", "F32": "<f4"}
)
"""How numpy holds each; bf16 and fp8 are raw."""


class RawTensors(Protocol):
    """The tensors that a checkpoint's files hold, whatever they mean."""

    def names(self) -> tuple[str, ...]:
        """In the order of the files."""

    def shape(self, name: str) -> Shape: ...

    def dtype(self, name: str) -> str:
        """As safetensors names it."""

    def array(self, name: str) -> Array:
        """A view, for the types of `ARRAY_TYPES`."""


@dataclass(frozen=True, slots=True)
class Packed:
    """One weight that lies packed in several tensors."""

    shape: tuple[int, int]
    sources: tuple[str, ...]
    """The tensors it is made of; the first says where it comes in the order of the files."""
    read: Callable[[], QTensor]


@dataclass(frozen=True, slots=True)
class Quantisation:
    """What a quantised checkpoint holds, in a plain one's names."""

    packed: Mapping[str, Packed] = field(default_factory=dict)
    """By the name that the plain weight would have."""
    unused: frozenset[str] = frozenset()
    """Tensors of the checkpoint that headrace has no use for; `notes` says so where they would change an answer."""
    notes: tuple[str, ...] = ()
    """What the user should know: one line each."""


class Table:
    """An object of the quantization_config, read strictly: CheckpointError for a wrong type, UnsupportedModel for a
    value that headrace does not read. A null counts as absent."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{where} is {shorten(value)}, allowed: an object of keys and values")
        self._values = value
        self.where = where

    def get(self, key: str) -> object:
        return self._values.get(key)

    def items(self) -> Sequence[tuple[str, object]]:
        return list(self._values.items())

    def bad(self, key: str, allowed: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} is {shorten(self.get(key))}, allowed: {allowed}")

    def unsupported(self, key: str, allowed: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self.where}: {key} is {shorten(self.get(key))}, allowed: {allowed}")

    def integer(self, key: str, allowed: Sequence[int], default: int | None = None) -> int:
        value = default if self.get(key) is None else self.get(key)
        words = ", ".join(str(number) for number in allowed)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.bad(key, words)
        if value not in allowed:
            raise self.unsupported(key, words)
        return value

    def group_size(self, key: str) -> int:
        """-1 for a whole row, or a multiple of 8."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value <= MAX_GROUP:
            raise self.bad(key, f"-1, or a multiple of 8 up to {MAX_GROUP}")
        if value != -1 and (value <= 0 or value % 8):
            raise self.unsupported(key, "-1, or a multiple of 8")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, bool):
            raise self.bad(key, "true or false")
        return value

    def word(self, key: str, allowed: Sequence[str], default: str | None = None) -> str:
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, str):
            raise self.bad(key, ", ".join(allowed))
        if value not in allowed:
            raise self.unsupported(key, ", ".join(allowed))
        return value

    def words(self, key: str) -> tuple[str, ...]:
        value = self.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise self.bad(key, "a list of names")
        return tuple(value)

    def table(self, key: str) -> Table | None:
        value = self.get(key)
        return None if value is None else Table(value, f"{self.where}: {key}")

    def refuse(self, *keys: str) -> None:
        """Keys that would change the weights' meaning in a way that is not read: absent, empty or false."""
        for key in keys:
            if self.get(key):
                raise self.unsupported(key, "nothing")


class Layer:
    """The tensors of one quantised layer, by the last part of their names."""

    def __init__(self, raw: RawTensors, names: frozenset[str], module: str) -> None:
        self._raw, self._names, self.module = raw, names, module
        self.used: list[str] = []

    def has(self, part: str) -> bool:
        return f"{self.module}.{part}" in self._names

    def need(self, part: str, dtypes: Sequence[str], dims: int) -> Shape:
        """The shape of a tensor that must be there. Raises WeightsMismatch, CheckpointError."""
        name = self._use(part)
        dtype, shape = self._raw.dtype(name), self._raw.shape(name)
        if dtype not in dtypes:
            raise CheckpointError(f"tensor {shorten(name, 120)} is {dtype}, allowed: {', '.join(dtypes)}")
        if len(shape) != dims:
            raise WeightsMismatch(f"tensor {shorten(name, 120)} has shape {shape}, needed {dims} dimensions")
        if 0 in shape:
            raise CheckpointError(f"tensor {shorten(name, 120)} is empty: {shorten(shape)}")
        return shape

    def need_shape(self, part: str, dtypes: Sequence[str], *allowed: Shape) -> Shape:
        """Like `need`, of one of the shapes `allowed`."""
        name = self._use(part)
        found = self._raw.shape(name)
        if found not in allowed:
            raise WeightsMismatch(
                f"tensor {shorten(name, 120)} has shape {found}, needed {' or '.join(str(shape) for shape in allowed)}"
            )
        return self.need(part, dtypes, len(found))

    def array(self, part: str) -> Array:
        return self._raw.array(f"{self.module}.{part}")

    def fail(self, part: str, what: str) -> CheckpointError:
        return CheckpointError(f"tensor {shorten(f'{self.module}.{part}', 120)} {what}")

    def packed(self, shape: tuple[int, int], read: Callable[[], QTensor]) -> Packed:
        return Packed(shape, tuple(dict.fromkeys(self.used)), read)

    def _use(self, part: str) -> str:
        name = f"{self.module}.{part}"
        if name not in self._names:
            raise WeightsMismatch(f"tensor {shorten(name, 120)} is missing, and the layer's weight needs it")
        self.used.append(name)
        return name


def modules_with(raw: RawTensors, part: str) -> list[str]:
    """The layers that have a tensor of this name, in the order of the files."""
    ending = f".{part}"
    return [name.removesuffix(ending) for name in raw.names() if name.endswith(ending)]


def unpack_words(words: Array, bits: int) -> NDArray[np.uint8]:
    """(…, n) int32 -> (…, n · 32 / bits) numbers of 4 or 8 bits, the lowest bits of a word first."""
    bytes_ = np.ascontiguousarray(words).view(np.uint8)
    return unpack_nibbles(bytes_) if bits == 4 else bytes_


def signed(values: NDArray[np.uint8]) -> NDArray[np.int8]:
    """0 to 255 -> -128 to 127, the order kept."""
    return (values ^ np.uint8(0x80)).view(np.int8)


def spread_nibbles(words: Array, places: Sequence[int]) -> NDArray[np.uint8]:
    """(R, C) int32 -> (R, C, 8) numbers: the lowest nibble of a word goes to places[0], and so on upwards."""
    bytes_ = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
    numbers = np.empty((*words.shape, 8), np.uint8)
    for index in range(4):
        np.bitwise_and(bytes_[..., index], np.uint8(15), out=numbers[..., places[2 * index]])
        np.right_shift(bytes_[..., index], np.uint8(4), out=numbers[..., places[2 * index + 1]])
    return numbers


def columns_of_words(words: Array, bits: int) -> NDArray[np.uint8]:
    """(R, N) int32, packed along the first axis -> (R · 32 / bits, N) numbers, the lowest bits of a word first."""
    each = 32 // bits
    bytes_ = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
    numbers = np.empty((len(words), each, words.shape[1]), np.uint8)
    for index in range(4):
        if bits == 8:
            numbers[:, index] = bytes_[..., index]
        else:
            np.bitwise_and(bytes_[..., index], np.uint8(15), out=numbers[:, 2 * index])
            np.right_shift(bytes_[..., index], np.uint8(4), out=numbers[:, 2 * index + 1])
    return numbers.reshape(len(words) * each, words.shape[1])


def rows_of_numbers(numbers_KN: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """(K, N) numbers -> (N, K · bits / 8) bytes, packed along K."""
    bytes_ = numbers_KN
    if bits == 4:
        bytes_ = numbers_KN[1::2] << np.uint8(4)
        bytes_ |= numbers_KN[::2]
    if len(bytes_) % 4:
        return np.ascontiguousarray(bytes_.T)
    # Four bytes at a time: a transposition byte by byte takes five times as long.
    words = np.empty((len(bytes_) // 4, bytes_.shape[1], 4), np.uint8)
    for index in range(4):
        words[..., index] = bytes_[index::4]
    return np.ascontiguousarray(words.view(np.uint32)[..., 0].T).view(np.uint8)


def arrange(
    index_K: NDArray[np.int64], q_KN: NDArray[np.uint8], s_NG: Array, z_NG: NDArray[np.uint8] | None, bits: int
) -> QTensor:
    """A QTensor of numbers q (0 to 2^bits - 1), the group of each column, and each group's scale and zero.

    Columns are sorted by group where they are not; groups of different lengths are cut into equal ones.
    """
    planes: dict[str, Array] = {}
    if np.any(np.diff(index_K) < 0):
        order = np.argsort(index_K, kind="stable")
        index_K, q_KN = index_K[order], q_KN[order]
        planes[ORDER] = order.astype(np.int32)
    edges = np.concatenate(([0], np.flatnonzero(np.diff(index_K)) + 1, [len(index_K)]))
    of_group = index_K[:: int(np.gcd.reduce(np.diff(edges)))]
    s_NG = np.ascontiguousarray(s_NG[:, of_group])
    z_NG = None if z_NG is None else z_NG[:, of_group]
    return scaled_tensor(rows_of_numbers(q_KN, bits), s_NG, z_NG, bits, planes)


def block_size(table: Table, key: str) -> tuple[int, int]:
    """Rows and columns of a block. Raises CheckpointError."""
    sizes = table.get(key)
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(type(n) is int and 0 < n <= MAX_GROUP for n in sizes):
        raise table.bad(key, "two sizes above 0, rows and columns")
    return sizes[0], sizes[1]


def spread(stored: Array, rows: int, columns: int, block_rows: int, size: int) -> Array:
    """One value a block of (block_rows, size), cut off at the edges -> a plane (rows, groups of one length)."""
    plane = stored if block_rows == 1 else stored[np.arange(rows) // block_rows]
    if columns % size:
        plane = plane[:, np.arange(0, columns, math.gcd(columns, size)) // size]
    return np.ascontiguousarray(plane)


def scaled_tensor(
    q: NDArray[np.uint8], s_NG: Array, z_NG: NDArray[np.uint8] | None, bits: int, more: Mapping[str, Array]
) -> QTensor:
    """int4 or int8 from unsigned numbers (those of 4 bits packed); zeros that all lie in the middle are left out."""
    middle = 1 << (bits - 1)
    scheme = f"int{bits}"
    shape = (q.shape[0], q.shape[1] * (8 // bits))
    planes: dict[str, Array] = {"q": q if bits == 4 else signed(q), "s": s_NG, **more}
    if z_NG is not None and np.any(z_NG != middle):
        scheme += "_asym"
        planes["z"] = np.ascontiguousarray(z_NG if bits == 4 else signed(z_NG))
    return QTensor(scheme, shape, planes)
