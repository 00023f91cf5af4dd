"""Reader of the safetensors format: memory-mapped, every bound checked before any tensor is touched.

Layout: u64 little-endian length of the header; the header, a JSON object name -> {dtype, shape, data_offsets}, with an
optional `__metadata__` of strings; then the data, which the tensors must cover without overlap or gap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from headrace.core.errors import CheckpointError, UnsupportedModel, shorten
from headrace.weights.files import drop_pages, map_file, parse_object
from headrace.weights.qtensor import QTensor

MAX_HEADER = 100_000_000
"""Bytes; the bound of the format's own library."""
MAX_TENSORS = 2**18
MAX_DIMS = 32
"""numpy's bound (1.x)."""
_INT64_MAX = 2**63 - 1

_BITS: Mapping[str, int] = MappingProxyType(
    {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
    | dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | dict.fromkeys(("U16", "I16", "F16", "BF16"), 16)
    | dict.fromkeys(("U32", "I32", "F32"), 32)
    | dict.fromkeys(("U64", "I64", "F64", "C64"), 64)
)
_SCHEMES: Mapping[str, str] = MappingProxyType({"F32": "f32", "F16": "f16", "BF16": "bf16"})


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    """Bytes [start, stop) of the file."""


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _INT64_MAX


def _bit_count(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Bits of a tensor, or None where the product passes 63 bits (a size of zero counts as one there)."""
    total = _BITS[dtype]
    for size in shape:
        total *= max(size, 1)
        if total > _INT64_MAX:
            return None
    return 0 if 0 in shape else total


class SafetensorsFile:
    """One .safetensors file. Raises CheckpointError, naming file and tensor, for anything the format forbids."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._where = shorten(path.name)
        # Views keep the map alive, so closing only drops this reference.
        self._bytes: NDArray[np.uint8] | None = np.frombuffer(map_file(path), dtype=np.uint8)
        self.size = self._bytes.size
        header = self._header()
        self.header_bytes = header
        parsed = parse_object(header, f"{self._where}: header", unique_keys=True)
        self.metadata = self._read_metadata(parsed.pop("__metadata__", None))
        data_start = 8 + len(header)
        entries = [(name, self._entry(name, value, data_start)) for name, value in parsed.items()]
        entries.sort(key=lambda item: (item[1].start, item[1].stop))
        self._check_cover(entries, data_start)
        self._entries = dict(entries)
        self.names = tuple(self._entries)
        """In the order of the file."""
        self.nbytes = self._bytes.size - data_start

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """The format's own name of the type, such as `BF16`."""
        return self._entries[name].dtype

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor of any type, a view. Raises ValueError after `close`."""
        if self._bytes is None:
            raise ValueError(f"{self._where} is closed")
        entry = self._entries[name]
        return self._bytes[entry.start : entry.stop]

    def tensor(self, name: str) -> QTensor:
        """A view of the file. Raises UnsupportedModel for a type other than F32, F16 and BF16."""
        entry = self._entries[name]
        if entry.dtype not in _SCHEMES:
            raise UnsupportedModel(
                f"{self._where}: tensor {shorten(name)} is {entry.dtype}, supported: {', '.join(_SCHEMES)}"
            )
        return QTensor.from_bytes(_SCHEMES[entry.dtype], entry.shape, self.raw(name))

    def drop_pages(self) -> None:
        """See `files.drop_pages`; nothing after `close`."""
        if self._bytes is not None:
            drop_pages(self._bytes)

    def close(self) -> None:
        """Views already handed out stay valid; the memory goes with the last of them."""
        self._bytes = None

    def _header(self) -> bytes:
        assert self._bytes is not None
        size = self._bytes.size
        if size < 8:
            raise CheckpointError(f"{self._where}: {size} bytes cannot hold a header length of 8 bytes")
        length = int.from_bytes(self._bytes[:8].tobytes(), "little")
        if length > min(MAX_HEADER, size - 8):
            raise CheckpointError(
                f"{self._where}: header length {length}, "
                f"allowed: up to {MAX_HEADER} and what the file holds ({size - 8})"
            )
        header = self._bytes[8 : 8 + length].tobytes()
        # Before JSON makes an object of each: 100 MB of brackets would take minutes and gigabytes.
        for bracket, most in ((b"{", MAX_TENSORS + 2), (b"[", 2 * MAX_TENSORS)):
            if header.count(bracket) > most:
                raise CheckpointError(
                    f"{self._where}: header holds {header.count(bracket)} of {bracket.decode()!r}, "
                    f"allowed: up to {most} (those of {MAX_TENSORS} tensors)"
                )
        return header

    def _read_metadata(self, value: object) -> Mapping[str, str]:
        if value is None:
            return {}
        if not isinstance(value, dict) or any(not isinstance(text, str) for text in value.values()):
            raise CheckpointError(f"{self._where}: __metadata__: got {shorten(value)}, allowed: an object of strings")
        return value

    def _entry(self, name: str, value: object, data_start: int) -> _Entry:
        assert self._bytes is not None
        where = f"{self._where}: tensor {shorten(name)}"
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            raise CheckpointError(f"{where}: the name is not valid Unicode") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{where}: got {shorten(value)}, allowed: an object with dtype, shape, data_offsets")
        dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise CheckpointError(f"{where}: dtype: got {shorten(dtype)}, allowed: {', '.join(_BITS)}")
        if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_count, shape)):
            raise CheckpointError(f"{where}: shape: got {shorten(shape)}, allowed: up to {MAX_DIMS} integers ≥ 0")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
            raise CheckpointError(f"{where}: data_offsets: got {shorten(offsets)}, allowed: two integers ≥ 0")
        start, stop = offsets
        room = self._bytes.size - data_start
        if not start <= stop <= room:
            raise CheckpointError(f"{where}: data_offsets {shorten(offsets)} are not inside the data of {room} bytes")
        bits = _bit_count(dtype, tuple(shape))
        if bits is None:
            raise CheckpointError(f"{where}: shape {shorten(shape)} overflows 64 bits")
        if bits != 8 * (stop - start):
            raise CheckpointError(
                f"{where}: {dtype} {shorten(shape)} takes {bits / 8:g} bytes, data_offsets span {stop - start}"
            )
        return _Entry(dtype, tuple(shape), data_start + start, data_start + stop)

    def _check_cover(self, entries: list[tuple[str, _Entry]], data_start: int) -> None:
        assert self._bytes is not None
        end = data_start
        for name, entry in entries:
            if entry.start != end:
                fault = "overlaps the tensor before it" if entry.start < end else "leaves a gap before it"
                raise CheckpointError(f"{self._where}: tensor {shorten(name)} {fault} (byte {entry.start}, not {end})")
            end = entry.stop
        if end != self._bytes.size:
            raise CheckpointError(
                f"{self._where}: {self._bytes.size - end} bytes after the last tensor belong to no tensor"
            )
