"""Reader of the files that `torch.save` writes: a zip with a pickle, read without running anything that it says.

A pickle is a program for a small stack machine. Here is such a machine, with the few instructions that dictionaries of
tensors take, and with three calls, which it does itself. Every other instruction, and every other name, is refused. So
no file can call anything, and torch is not needed.

A tensor is a view of the file: of the entry `data/KEY`, which torch stores as it is, uncompressed.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickletools import genops
from types import MappingProxyType

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from headrace.core.errors import CheckpointError, UnsupportedModel, shorten
from headrace.weights.checkpoint import Checkpoint
from headrace.weights.files import drop_pages, map_file
from headrace.weights.qtensor import SCHEMES, QTensor

MAX_PICKLE = 8 * 2**20
"""Bytes; a tensor takes about 250."""
MAX_DIMS = 32
"""numpy's bound (1.x)."""
_LOCAL_HEADER = 30
"""Bytes of an entry's own header in a zip, before its name."""

STORAGES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "torch FloatStorage": ("f32", "<f4"),
        "torch HalfStorage": ("f16", "<f2"),
        "torch BFloat16Storage": ("bf16", "<u2"),
        "torch DoubleStorage": ("f64", "<f8"),
        "torch LongStorage": ("i64", "<i8"),
        "torch IntStorage": ("i32", "<i4"),
        "torch ShortStorage": ("i16", "<i2"),
        "torch CharStorage": ("i8", "i1"),
        "torch ByteStorage": ("u8", "u1"),
        "torch BoolStorage": ("bool", "u1"),
    }
)
"""What torch calls a tensor's numbers -> (our name, numpy's)."""
_CALLS = ("collections OrderedDict", "torch._utils _rebuild_parameter", "torch._utils _rebuild_tensor_v2")
_KNOWN = frozenset({*_CALLS, *STORAGES})


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor of the file."""

    kind: str
    """f32, f16, bf16, f64, i64, i32, i16, i8, u8 or bool."""
    data: NDArray[np.generic]
    """A read-only view of the file, not always in order; bf16 as raw uint16."""


@dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    """Numbers that tensors are views of."""

    kind: str
    numbers: NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class _Name:
    """A name of Python's that the pickle says."""

    text: str


class TorchFile:
    """One file of `torch.save`, of torch 1.6 or newer. Views of it stay valid.

    Raises CheckpointError for what is no such file, UnsupportedModel for one that holds more than tensors in
    dictionaries and lists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._where = shorten(path.name)
        self._bytes: NDArray[np.uint8] = np.frombuffer(map_file(path), dtype=np.uint8)
        self._storages: dict[str, _Storage] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                program = self._open(archive)
        except zipfile.BadZipFile as error:
            raise CheckpointError(
                f"{self._where}: not a zip as torch.save writes it since torch 1.6 ({error}); an older file: load it "
                "with torch and save it again"
            ) from error
        except (OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{self._where}: cannot be read: {shorten(str(error) or type(error).__name__, 160)}"
            ) from error
        try:
            self.root = _Machine(self._where, self._storage).run(program)
            """What was saved: dictionaries, lists, tuples, text and numbers as they were, tensors as `StoredTensor`. It
            may hold itself."""
        except (IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{self._where}: data.pkl: not a sound pickle: {shorten(str(error), 160)}") from error

    def drop_pages(self) -> None:
        """See `files.drop_pages`."""
        drop_pages(self._bytes)

    def _open(self, archive: zipfile.ZipFile) -> bytes:
        """The pickle; finds where the tensors' numbers are."""
        entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"{self._where}: a zip with {len(pickles)} data.pkl, a file of torch.save has one")
        top = pickles[0].removesuffix("data.pkl")
        size = entries[pickles[0]].file_size
        if size > MAX_PICKLE:
            raise CheckpointError(f"{self._where}: data.pkl has {size} bytes, allowed: up to {MAX_PICKLE}")
        byte_order = entries.get(f"{top}byteorder")
        for entry in entries.values():
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise UnsupportedModel(f"{self._where}: {shorten(entry.filename)} is compressed, torch.save does not")
        if byte_order is not None and (byte_order.file_size != 6 or archive.read(byte_order) != b"little"):
            raise UnsupportedModel(f"{self._where}: byteorder is not little, the only one supported")
        start = f"{top}data/"
        self._entries = {name.removeprefix(start): entry for name, entry in entries.items() if name.startswith(start)}
        return archive.read(pickles[0])

    def _storage(self, identity: object) -> _Storage:
        """Of a persistent id: ("storage", type, key, device, count)."""
        match identity:
            case ("storage", _Name(name), str(key), str(), int(count)) if name in STORAGES and key in self._entries:
                kind, dtype = STORAGES[name]
            case _:
                raise ValueError("a tensor's storage is not described as torch does")
        found = self._storages.get(key)
        if found is None:
            found = self._storages[key] = _Storage(kind, self._entry(key).view(dtype))
        if found.kind != kind or found.numbers.size != count:
            raise ValueError(f"storage {shorten(key)}: {found.numbers.size} {found.kind} are said to be {count} {kind}")
        return found

    def _entry(self, key: str) -> NDArray[np.uint8]:
        """The bytes of an entry, which lie in the file as they are."""
        entry = self._entries[key]
        header = self._bytes[entry.header_offset : entry.header_offset + _LOCAL_HEADER].tobytes()
        if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
            raise ValueError(f"storage {shorten(key)} does not lie where the zip says")
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = entry.header_offset + _LOCAL_HEADER + names
        if start + entry.file_size > self._bytes.size:
            raise ValueError(f"storage {shorten(key)} ends behind the end of the file")
        return self._bytes[start : start + entry.file_size]


class _Machine:
    """Carries out a pickle."""

    def __init__(self, where: str, storage: Callable[[object], _Storage]) -> None:
        self._where = where
        self._storage = storage
        self._stack: list[object] = []
        self._below: list[list[object]] = []
        """What lay on the stack at each mark."""
        self._memo: dict[int, object] = {}

    def run(self, program: bytes) -> object:
        """What the program leaves. Raises UnsupportedModel, or IndexError, KeyError, TypeError, ValueError."""
        for opcode, argument, _ in genops(program):
            if opcode.name == "STOP":
                return self._stack.pop()
            self._do(opcode.name, argument)
        raise ValueError("it has no end")

    def _do(self, name: str, argument: object) -> None:
        stack = self._stack
        match name:
            case "PROTO":
                pass
            case "MARK":
                self._below.append(stack)
                self._stack = []
            case "GLOBAL":
                stack.append(self._name(str(argument)))
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_call(stack.pop(), arguments))
            case "BUILD":
                # Attributes of an OrderedDict; state_dict() hangs the versions of its modules on it.
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise TypeError("attributes of what is no dictionary")
            case "BINPUT" | "LONG_BINPUT":
                assert isinstance(argument, int)
                self._memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                assert isinstance(argument, int)
                stack.append(self._memo[argument])
            case "SETITEM":
                value = stack.pop()
                _extend(stack[-2], [stack.pop(), value], dict)
            case "SETITEMS":
                items = self._to_mark()
                _extend(self._stack[-1], items, dict)
            case "APPEND":
                value = stack.pop()
                _extend(stack[-1], [value], list)
            case "APPENDS":
                items = self._to_mark()
                _extend(self._stack[-1], items, list)
            case "TUPLE":
                items = self._to_mark()
                self._stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(items)))
            case _:
                stack.append(self._constant(name, argument))

    def _to_mark(self) -> list[object]:
        """What lies above the last mark, which goes."""
        items, self._stack = self._stack, self._below.pop()
        return items

    def _name(self, text: str) -> _Name:
        if text not in _KNOWN:
            raise UnsupportedModel(
                f"{self._where}: data.pkl names {shorten(text)}, which may run code; supported: tensors in "
                "dictionaries (what state_dict() gives)"
            )
        return _Name(text)

    def _constant(self, name: str, argument: object) -> object:
        match name:
            case "EMPTY_DICT":
                return {}
            case "EMPTY_LIST":
                return []
            case "EMPTY_TUPLE":
                return ()
            case "NONE":
                return None
            case "NEWTRUE" | "NEWFALSE":
                return name == "NEWTRUE"
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                return argument
        raise UnsupportedModel(
            f"{self._where}: data.pkl has the instruction {name}, which dictionaries of tensors do not need"
        )


def _extend(holder: object, items: list[object], kind: type) -> None:
    """Puts items into a list, or keys and values in turn into a dictionary."""
    if type(holder) is not kind:
        raise TypeError(f"items for a {type(holder).__name__}, where a {kind.__name__} is needed")
    if isinstance(holder, list):
        holder.extend(items)
    elif isinstance(holder, dict):
        holder.update(zip(items[::2], items[1::2], strict=True))


def _call(function: object, arguments: object) -> object:
    """The three calls of torch.save: a dictionary, a parameter (a tensor), a view of a storage (a tensor)."""
    match function, arguments:
        case _Name("collections OrderedDict"), ():
            return {}
        case _Name("torch._utils _rebuild_parameter"), (StoredTensor() as tensor, bool(), _):
            return tensor
        case (
            _Name("torch._utils _rebuild_tensor_v2"),
            (_Storage() as storage, int(offset), tuple(shape), tuple(strides), bool(), *_),
        ):
            return StoredTensor(storage.kind, _view(storage.numbers, offset, shape, strides))
    raise TypeError("a call that torch.save does not write")


def _view(
    numbers: NDArray[np.generic], offset: int, shape: tuple[object, ...], strides: tuple[object, ...]
) -> NDArray[np.generic]:
    """The numbers at `offset` + Σ index × stride. Raises ValueError unless all of them are there."""
    if len(shape) != len(strides) or len(shape) > MAX_DIMS:
        raise ValueError(f"a tensor of {len(shape)} sizes and {len(strides)} strides")
    sizes = [size for size in shape if type(size) is int and size >= 0]
    steps = [step for step in strides if type(step) is int and step >= 0]
    if len(sizes) != len(shape) or len(steps) != len(strides) or offset < 0:
        raise ValueError("a tensor with sizes, strides or an offset that are no counts")
    if 0 in sizes:
        return np.empty(sizes, numbers.dtype)
    if math.prod(sizes) > numbers.size:
        raise ValueError(f"a tensor of {math.prod(sizes)} numbers, where its storage has {numbers.size}")
    last = offset + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    if last >= numbers.size:
        raise ValueError(f"a tensor of numbers up to {last}, where its storage has {numbers.size}")
    width = numbers.dtype.itemsize
    return as_strided(numbers[offset:], sizes, [step * width for step in steps], writeable=False)


class TorchCheckpoint(Checkpoint):
    """Tensors of a `TorchFile` under names of their own, with a config: what the loader reads."""

    format = "hf"

    def __init__(self, file: TorchFile, config: Mapping[str, object], tensors: Mapping[str, StoredTensor]) -> None:
        self.path = file.path
        self.config = config
        self._file = file
        self._tensors = tensors
        self.nbytes = sum(tensor.data.nbytes for tensor in tensors.values())

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.data.shape for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> QTensor:
        """A view of the file. Raises CheckpointError for an unknown name, UnsupportedModel for numbers other than f32,
        f16 and bf16."""
        if name not in self._tensors:
            raise CheckpointError(f"{shorten(self.path.name)}: no tensor {shorten(name)}")
        tensor = self._tensors[name]
        if tensor.kind not in SCHEMES:
            raise UnsupportedModel(f"tensor {shorten(name)} is {tensor.kind}, supported: f32, f16, bf16")
        return QTensor(tensor.kind, tensor.data.shape, {"data": tensor.data})

    def drop_pages(self) -> None:
        self._file.drop_pages()

    def close(self) -> None:
        """Nothing to do: the file is unmapped with the last view of it."""

    def _identity(self) -> Iterator[bytes]:
        yield repr(sorted(self.shapes().items())).encode()
