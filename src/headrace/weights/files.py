"""What every checkpoint reader needs of a file: a bounded memory map, and JSON read strictly."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace.core import strict_json
from headrace.core.errors import CheckpointError, shorten


def _size(path: Path, where: str) -> int:
    # Asked before opening: to open a named pipe would wait for a writer.
    if not path.is_file():
        raise CheckpointError(f"{where}: {'not a regular file' if path.exists() else 'no such file'}")
    return path.stat().st_size


def map_file(path: Path) -> mmap.mmap:
    """A whole file as a read-only memory map; nothing is read yet.

    The file must not be made shorter while it is mapped: the system then ends a process that touches the lost pages.
    Raises CheckpointError if it is missing, empty, not a regular file or not readable.
    """
    where = shorten(path.name)
    try:
        if not _size(path, where):
            raise CheckpointError(f"{where}: the file is empty")
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where}: cannot be read: {error}") from error


def mapped_file(data: NDArray[np.generic]) -> NDArray[np.uint8] | None:
    """All of the file that an array is a view of, if `map_file` has mapped it; else None."""
    whole = data
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    if isinstance(whole.base, memoryview) and isinstance(whole.base.obj, mmap.mmap):
        return whole.view(np.uint8)
    return None


def drop_pages(data: NDArray[np.uint8]) -> None:
    """Gives back the memory that reading a mapped file has taken; what is read again comes from the file again.

    `data` is what numpy.frombuffer makes of the map, whole.
    """
    if isinstance(data.base, memoryview) and isinstance(data.base.obj, mmap.mmap):
        data.base.obj.madvise(mmap.MADV_DONTNEED)


def read_file(path: Path, max_bytes: int) -> bytes:
    """The bytes of a file. Raises CheckpointError if it cannot be read or holds more than `max_bytes`."""
    where = shorten(path.name)
    try:
        size = _size(path, where)
        if size > max_bytes:
            raise CheckpointError(f"{where}: {size} bytes, allowed: up to {max_bytes}")
        with path.open("rb") as file:
            return file.read(max_bytes)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where}: cannot be read: {error}") from error


def parse_object(data: bytes, where: str, unique_keys: bool = False) -> dict[str, object]:
    """A JSON object in UTF-8, with finite numbers only; `where` opens the message of every CheckpointError."""
    try:
        value = strict_json.parse(data.decode("utf-8"), unique_keys)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise CheckpointError(f"{where}: JSON nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: holds a JSON {type(value).__name__}, allowed: an object")
    return value
