"""Reader of GGUF v2 and v3, little-endian: memory-mapped, every count checked against the bytes that are left.

Layout (ggml's docs/gguf.md): magic, version, tensor count, key count; keys with typed values; the tensor table
(name, sizes with the fastest first, type, offset); padding to `general.alignment`; the data.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from mmap import mmap
from pathlib import Path
from types import MappingProxyType
from typing import overload

import numpy as np
from numpy.typing import NDArray

from headrace.core.errors import CheckpointError, UnsupportedModel, shorten
from headrace.weights.files import drop_pages, map_file
from headrace.weights.qtensor import SCHEMES, QTensor

MAX_HEADER = 128 * 2**20
"""Bytes up to the end of the tensor table: ten times what a vocabulary of 262,144 with its merges takes."""
MAX_KEYS = 2**16
MAX_TENSORS = 2**18
MAX_ITEMS = 2**22
"""Strings in arrays, all keys together; an array inside an array counts as `ARRAY_COST` of them."""
ARRAY_COST = 64
MAX_DEPTH = 4
"""Arrays within arrays."""
MAX_DIMS = 4

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS: Mapping[int, np.dtype[np.generic]] = MappingProxyType(
    {
        code: np.dtype(kind)
        for code, kind in {
            0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1",
            10: "<u8", 11: "<i8", 12: "<f8",
        }.items()
    }
)  # fmt: skip
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

# ggml type id -> (name, weights a block, bytes a block)
_TYPES: Mapping[int, tuple[str, int, int]] = MappingProxyType(
    {
        0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
        24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
        2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
        9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
        13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
        17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
        21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56),
        34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
        41: ("Q1_0", 128, 18),
    }
)  # fmt: skip
_SCHEME_OF: Mapping[str, str] = MappingProxyType({name.upper(): name for name in SCHEMES})
READ_TYPES = tuple(name for name, _, _ in _TYPES.values() if name in _SCHEME_OF)


@dataclass(frozen=True, slots=True)
class _Info:
    type_name: str
    shape: tuple[int, ...]
    offset: int
    """Byte of the file."""
    size: int | None
    """Bytes; None where the type is not known."""


class _Cursor:
    """Reads forward through the header; every read is held against `limit` first."""

    def __init__(self, path: Path) -> None:
        self.where = shorten(path.name)
        self.map = map_file(path)
        self.limit = min(len(self.map), MAX_HEADER)
        self.pos = 0
        self.items = 0

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {what}")

    def take(self, count: int, what: str) -> int:
        """Steps over `count` bytes and returns where they begin."""
        start = self.pos
        if count > self.limit - start:
            raise self.fail(
                f"{what} needs {count} bytes at byte {start}, and the file "
                f"{'ends' if self.limit < MAX_HEADER else 'may hold its header only'} at {self.limit}"
            )
        self.pos = start + count
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.map, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.map, self.take(8, what))[0])

    def count(self, item_bytes: int, most: int, what: str) -> int:
        """A u64 count of things that take at least `item_bytes` each."""
        value = self.u64(what)
        if value > min(most, (self.limit - self.pos) // item_bytes):
            raise self.fail(
                f"{what} is {value}, allowed: up to {most}, and {self.limit - self.pos} bytes are left for them"
            )
        return value

    def string(self, what: str) -> str:
        length = self.u64(what)
        start = self.take(length, what)
        try:
            return self.map[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8 at byte {start + error.start}") from error

    def strings(self, count: int, what: str) -> Strings | list[str]:
        # The hot loop of opening a model (a vocabulary and its merges): only the lengths are walked one by one.
        data, limit, pos, unpack = self.map, self.limit, self.pos, _U64.unpack_from
        starts: list[int] = []
        try:
            for _ in range(count):
                starts.append(pos)
                (length,) = unpack(data, pos)
                pos += 8 + length
                if pos > limit:
                    raise self.fail(f"{what}: string {len(starts) - 1} of {length} bytes runs past byte {limit}")
        except struct.error as error:
            raise self.fail(f"{what}: ends inside string {len(starts) - 1}") from error
        self.pos = pos
        with suppress(UnicodeDecodeError):
            text = _after_zeros(data, starts, pos)
            if text.count("\0") == count:
                return Strings(text, count)
        # A string holds a zero itself, or is not UTF-8: which one?
        return [self._decoded(start, end, index, what) for index, (start, end) in enumerate(pairwise([*starts, pos]))]

    def _decoded(self, start: int, end: int, index: int, what: str) -> str:
        try:
            return self.map[start + 8 : end].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what}: string {index} is not UTF-8") from error

    def value(self, kind: int, what: str, depth: int = 0) -> object:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what, depth + 1)
        if kind not in _NUMBERS:
            raise self.fail(f"{what} has the value type {kind}, allowed: 0 to 12")
        return self.numbers(kind, 1, what)[0].item()

    def numbers(self, kind: int, count: int, what: str) -> NDArray[np.generic]:
        dtype = _NUMBERS[kind]
        start = self.take(count * dtype.itemsize, what)
        # Copied: aligned, and not bound to the life of the map.
        found = np.frombuffer(self.map, dtype, count, start).copy()
        if kind == _BOOL:
            if count and int(found.max()) > 1:
                raise self.fail(f"{what} holds a bool of {found.max()}, allowed: 0 and 1")
            found = found.view(np.bool_)
        found.flags.writeable = False
        return found

    def array(self, what: str, depth: int) -> object:
        if depth > MAX_DEPTH:
            raise self.fail(f"{what} nests arrays deeper than {MAX_DEPTH}")
        kind = self.u32(what)
        if kind in _NUMBERS:
            size = _NUMBERS[kind].itemsize
            return self.numbers(kind, self.count(size, MAX_HEADER, f"{what}: array length"), what)
        if kind not in (_STRING, _ARRAY):
            raise self.fail(f"{what} is an array of the value type {kind}, allowed: 0 to 12")
        item_bytes, cost = (8, 1) if kind == _STRING else (12, ARRAY_COST)
        length = self.count(item_bytes, (MAX_ITEMS - self.items) // cost, f"{what}: array length")
        self.items += length * cost
        if kind == _STRING:
            return self.strings(length, what)
        return [self.array(what, depth + 1) for _ in range(length)]


class Strings(Sequence[str]):
    """An array of strings, kept as one text with a zero before each: a tenth of what a list of them takes."""

    def __init__(self, text: str, count: int) -> None:
        self._text = text
        self._count = count

    def tolist(self) -> list[str]:
        return self._text.split("\0")[1:]

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self.tolist()[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tolist())

    def __eq__(self, other: object) -> bool:
        return self.tolist() == (other.tolist() if isinstance(other, Strings) else other)

    def __repr__(self) -> str:
        return repr(self.tolist())


def _after_zeros(data: mmap, starts: list[int], end: int) -> str:
    """The strings that begin at `starts`, each with its length in eight bytes: each with a zero before it."""
    if not starts:
        return ""
    first = starts[0]
    text = np.frombuffer(data, np.uint8, end - first, first).copy()
    places = np.array(starts) - first
    text[places] = 0
    keep = np.ones(text.size, np.bool_)
    for byte in range(1, 8):
        keep[places + byte] = False
    return text[keep].tobytes().decode("utf-8")


class GGUFFile:
    """One GGUF file. Raises CheckpointError, naming file and key or tensor, for anything malformed, and
    UnsupportedModel for another version or byte order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        cursor = _Cursor(path)
        self._where = cursor.where
        num_tensors, num_keys = self._preamble(cursor)
        self.metadata: Mapping[str, object] = self._read_metadata(cursor, num_keys)
        alignment = self._alignment()
        table = [self._read_info(cursor) for _ in range(num_tensors)]
        data_start = -(-cursor.pos // alignment) * alignment
        # Views keep the map alive, so closing only drops this reference.
        self._bytes: NDArray[np.uint8] | None = np.frombuffer(cursor.map, dtype=np.uint8)
        self.size = self._bytes.size
        self.header_bytes = cursor.map[: cursor.pos]
        self._infos: dict[str, _Info] = {}
        for name, type_id, shape, offset in table:
            if name in self._infos:
                raise cursor.fail(f"tensor {shorten(name)} is there twice")
            if offset % alignment:
                raise cursor.fail(f"tensor {shorten(name)}: offset {offset} is not a multiple of {alignment}")
            self._infos[name] = self._checked(name, type_id, shape, data_start + offset)
        self._infos = dict(sorted(self._infos.items(), key=lambda item: item[1].offset))
        self._check_overlap()
        self.names = tuple(self._infos)
        """In the order of the file."""
        self.nbytes = sum(info.size or 0 for info in self._infos.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Rows first, as numpy counts: ggml's sizes reversed."""
        return self._infos[name].shape

    def type_name(self, name: str) -> str:
        """ggml's name of the type, such as `Q4_1`; `type 99` where it is not known."""
        return self._infos[name].type_name

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, a view; none where its type is not known. Raises ValueError after `close`."""
        if self._bytes is None:
            raise ValueError(f"{self._where} is closed")
        info = self._infos[name]
        return self._bytes[info.offset : info.offset + (info.size or 0)]

    def tensor(self, name: str) -> QTensor:
        """A view of the file. Raises UnsupportedModel for a type that no scheme describes."""
        info = self._infos[name]
        if info.type_name not in _SCHEME_OF:
            raise UnsupportedModel(
                f"{self._where}: tensor {shorten(name)} is {info.type_name}, supported: {', '.join(READ_TYPES)}"
            )
        return QTensor.from_bytes(_SCHEME_OF[info.type_name], info.shape, self.raw(name))

    def drop_pages(self) -> None:
        """See `files.drop_pages`; nothing after `close`."""
        if self._bytes is not None:
            drop_pages(self._bytes)

    def close(self) -> None:
        """Views already handed out stay valid; the memory goes with the last of them."""
        self._bytes = None

    def _preamble(self, cursor: _Cursor) -> tuple[int, int]:
        start = cursor.take(4, "magic")
        magic = cursor.map[start : cursor.pos]
        if magic != b"GGUF":
            raise cursor.fail(f"magic: got {magic!r}, allowed: b'GGUF'")
        version = cursor.u32("version")
        if version and not version & 0xFFFF:
            raise UnsupportedModel(f"{self._where}: big-endian GGUF, supported: little-endian")
        if version not in (2, 3):
            raise UnsupportedModel(f"{self._where}: GGUF version {version}, supported: 2 and 3")
        # The least a tensor takes: name length, count of dims, one dim, type, offset; a key: length, type, one byte.
        num_tensors = cursor.count(32, MAX_TENSORS, "tensor count")
        return num_tensors, cursor.count(13, MAX_KEYS, "key count")

    def _read_metadata(self, cursor: _Cursor, num_keys: int) -> dict[str, object]:
        metadata: dict[str, object] = {}
        for index in range(num_keys):
            key = cursor.string(f"key {index}")
            if key in metadata:
                raise cursor.fail(f"key {shorten(key)} is there twice")
            what = f"key {shorten(key)}"
            metadata[key] = cursor.value(cursor.u32(what), what)
        return metadata

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", 32)
        if type(value) is not int or value <= 0 or value & (value - 1):
            raise CheckpointError(f"{self._where}: general.alignment: got {shorten(value)}, allowed: a power of two")
        return value

    def _read_info(self, cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
        name = cursor.string("tensor name")
        what = f"tensor {shorten(name)}"
        num_dims = cursor.u32(what)
        if not 1 <= num_dims <= MAX_DIMS:
            raise cursor.fail(f"{what} has {num_dims} dimensions, allowed: 1 to {MAX_DIMS}")
        sizes = struct.unpack_from(f"<{num_dims}Q", cursor.map, cursor.take(8 * num_dims, what))
        if 0 in sizes:
            raise cursor.fail(f"{what} has a dimension of size 0: {sizes}")
        return name, cursor.u32(what), sizes[::-1], cursor.u64(what)

    def _checked(self, name: str, type_id: int, shape: tuple[int, ...], offset: int) -> _Info:
        assert self._bytes is not None
        where = f"{self._where}: tensor {shorten(name)}"
        count = 1
        for dim in shape:
            count *= dim
        if count >= 2**63:
            raise CheckpointError(f"{where}: shape {shape} overflows 64 bits")
        type_name, block, block_bytes = _TYPES.get(type_id, (f"type {type_id}", 1, 0))
        if shape[-1] % block:
            raise CheckpointError(f"{where}: a row of {shape[-1]} is not a multiple of {type_name}'s block of {block}")
        size = count // block * block_bytes
        if offset + size > self._bytes.size:
            raise CheckpointError(
                f"{where}: bytes {offset} to {offset + size} are not inside the file of {self._bytes.size} bytes"
            )
        return _Info(type_name, shape, offset, size if block_bytes else None)

    def _check_overlap(self) -> None:
        end, before = 0, ""
        for name, info in self._infos.items():
            if info.offset < end:
                raise CheckpointError(f"{self._where}: tensors {shorten(before)} and {shorten(name)} overlap")
            end, before = info.offset + (info.size or 0), name
