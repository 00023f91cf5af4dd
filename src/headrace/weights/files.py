"""What every checkpoint reader needs of a file: a bounded memory map, and JSON read strictly."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable
from pathlib import Path

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


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shorten(text)} is not finite")
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"the number {text} is not finite")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shorten(twice)} is there twice")
    return made


def parse_object(data: bytes, where: str, unique_keys: bool = False) -> dict[str, object]:
    """A JSON object in UTF-8, with finite numbers only; `where` opens the message of every CheckpointError."""
    hook: Callable[[list[tuple[str, object]]], object] | None = _unique if unique_keys else None
    try:
        value = json.loads(
            data.decode("utf-8"), parse_float=_finite, parse_constant=_no_constant, object_pairs_hook=hook
        )
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise CheckpointError(f"{where}: JSON nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: holds a JSON {type(value).__name__}, allowed: an object")
    return value
