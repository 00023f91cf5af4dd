"""OUT.jsonl and OUT.errors.jsonl: written whole, or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from headrace.batch.journal import Journal, sync_folder
from headrace.core.errors import (
    ConfigError,
    StorageError,
)

_ID = re.compile(rb'\{"id":"([0-9a-z_]+)","custom_id":')
_MAX_HEAD = 128


@dataclass(frozen=True, slots=True)
class Paths:
    """Where the outcome of a batch goes."""

    out: Path
    errors: Path
    journal: Path

    @classmethod
    def beside(cls, out: Path) -> Paths:
        """`out` and the files beside it. Raises ConfigError where no file can be."""
        out = Path(os.path.realpath(out))
        if not out.parent.is_dir():
            raise ConfigError(f"{out}: its folder is missing")
        if out.exists() and not out.is_file():
            raise ConfigError(f"{out}: not a regular file")
        stem = out.name.removesuffix(".jsonl")
        return cls(out, out.with_name(f"{stem}.errors.jsonl"), out.with_name(f"{out.name}.journal"))


def write_outputs(journal: Journal, paths: Paths) -> None:
    """Both files in the order of the input, then the journal goes.

    Each step can be done again: a file appears under its name when it is whole and on disk, the errors first, so that
    the output is the sign that all is there. Without failed lines there is no error file. Raises StorageError.
    """
    target = paths.out
    try:
        kept = [_stage(journal, target := path, ok) for path, ok in ((paths.errors, False), (paths.out, True))]
        for (temporary, count), path in zip(kept, (paths.errors, paths.out), strict=True):
            target = path
            if count or path == paths.out:
                temporary.replace(path)
            else:
                temporary.unlink()
        sync_folder(paths.out.parent)
    except OSError as error:
        for path in (paths.errors, paths.out):
            with suppress(OSError):
                _temporary(path).unlink(missing_ok=True)
        raise StorageError(target, error) from error
    journal.remove()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _stage(journal: Journal, path: Path, ok: bool) -> tuple[Path, int]:
    """The lines of one kind in a file beside `path`, on disk; and their number."""
    temporary = _temporary(path)
    count = 0
    with temporary.open("wb", buffering=2**20) as file:
        for index in range(journal.num_lines):
            outcome = journal.outcome(index)
            assert outcome is not None, f"line {index} has no outcome"
            if outcome.ok == ok:
                file.write(outcome.line + b"\n")
                count += 1
        file.flush()
        os.fsync(file.fileno())
    return temporary, count


def is_finished(paths: Paths, line_ids: Iterable[str]) -> bool:
    """Whether the files hold one line for each of these ids, in their order, and nothing else.

    An id is a hash of the input line and of every setting that an answer depends on: that is how a finished run is
    known again without its journal.
    """
    with ExitStack() as stack:
        files: list[BinaryIO] = []
        for path in (paths.out, paths.errors):
            if path.is_file():
                files.append(stack.enter_context(path.open("rb", buffering=2**20)))
        next_ids = [_next_id(file) for file in files]
        for line_id in line_ids:
            found = next((i for i, one in enumerate(next_ids) if one == line_id.encode()), None)
            if found is None:
                return False
            next_ids[found] = _next_id(files[found])
        return all(one == b"" for one in next_ids)


def _next_id(file: BinaryIO) -> bytes | None:
    """The id of the next line; empty at the end of the file, None if the line is not one of ours."""
    head = file.readline(_MAX_HEAD)
    if not head:
        return b""
    piece = head
    while not piece.endswith(b"\n") and (piece := file.readline(2**20)):
        head = head[:_MAX_HEAD] + piece[-2:]
    match = _ID.match(head)
    return match[1] if match and head.endswith(b"}\n") else None
