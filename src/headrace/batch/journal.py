"""The journal: every finished line, on disk, before the output file exists.

One append-only file, `OUT.jsonl.journal`:

    MAGIC, then records:  length (u32) · CRC-32 of length and payload (u32) · payload
    payload:  kind (1 byte) · the rest
        M  manifest: JSON; the first record, and only there
        B  begun: line index (u32). Not needed to go on: it shows what is computed twice
        R, E  answer, error: line index (u32) · digest of the input line (16 bytes) · prompt, output tokens (u32 each)
              · the output line

What a kill, a full disk or a broken disk can leave is a tail that is not whole. `open` keeps every record before the
first one that fails its check and cuts the file there: what followed is computed again, since nothing behind a broken
length can be trusted. An answer counts only for the input line whose digest it carries.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import struct
import time
import zlib
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

from headrace.core.errors import (
    BatchChanged,
    BatchInUse,
    ConfigError,
    EngineError,
    StorageError,
    shorten,
)

MAGIC = b"headrace batch journal 1\n"
SYNC_S = 0.1
"""A finished line is on disk this many seconds later, or at the end of the engine's step that then runs."""
_HEAD = struct.Struct("<II")
_LINE = struct.Struct("<cI16sII")
_BEGUN = struct.Struct("<cI")
_MAX_RECORD = 2**32 - 1


@dataclass(slots=True)
class Opened:
    """What was found when the journal was opened."""

    done: int = 0
    """Lines with an answer or an error."""
    cut_bytes: int = 0
    """Bytes at the end that were not whole, and are gone."""
    fresh: bool = True
    """Nothing was there that could be used."""


class Journal:
    """Open, locked and checked. One process has it; the lock ends with the process."""

    def __init__(self, path: Path, fd: int, num_lines: int) -> None:
        self.path = path
        self.found = Opened()
        self.num_lines = num_lines
        self._fd = fd
        self._end = 0
        self._dirty_since_s: float | None = None
        self.manifest: Mapping[str, Any] = {}
        """As it was when the journal was begun."""
        self.again = 0
        """How often a line was begun that had been begun before, over all the runs."""
        self._offsets = array("Q", bytes(8 * num_lines))
        """Of each line's record; 0: none."""
        self._begun = bytearray(num_lines)

    @classmethod
    def open(cls, path: Path, manifest: Mapping[str, Any], num_lines: int) -> Self:
        """Opens or begins the journal of a run.

        Raises BatchInUse (another process has it), BatchChanged (it belongs to another input or other settings),
        ConfigError (the file is no journal) or StorageError.
        """
        fd = _open_locked(path)
        journal = cls(path, fd, num_lines)
        try:
            journal._start(manifest)
        except OSError as error:
            journal.close()
            raise StorageError(path, error) from error
        except BaseException:
            journal.close()
            raise
        return journal

    def _start(self, manifest: Mapping[str, Any]) -> None:
        size = os.fstat(self._fd).st_size
        with open(self._fd, "rb", buffering=2**20, closefd=False) as file:
            magic = file.read(len(MAGIC))
            if not MAGIC.startswith(magic):
                raise ConfigError(f"{self.path}: is not a journal of a batch; move it away, or name another output")
            whole = magic == MAGIC and self._read_manifest(file, size, manifest)
        if whole:
            self.found.fresh = False
            self.found.cut_bytes = size - self._end
            os.ftruncate(self._fd, self._end)
        else:
            self.found.cut_bytes = size
            os.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
            self._write(MAGIC + _record(b"M" + json.dumps(manifest, sort_keys=True).encode()))
            self.manifest = manifest
        os.lseek(self._fd, self._end, os.SEEK_SET)
        os.fsync(self._fd)
        sync_folder(self.path.parent)

    def _read_manifest(self, file: BinaryIO, size: int, manifest: Mapping[str, Any]) -> bool:
        """Reads all that is whole. False if not even the manifest is."""
        records = _records(file, len(MAGIC), size)
        offset, payload = next(records, (0, b""))
        if not payload.startswith(b"M"):
            return False
        self.manifest = _compare(self.path, payload[1:], manifest)
        self._end = offset + _HEAD.size + len(payload)
        for offset, payload in records:
            if not self._take(offset, payload):
                break
            self._end = offset + _HEAD.size + len(payload)
        return True

    def _take(self, offset: int, payload: bytes) -> bool:
        """Notes a record; False if it makes no sense."""
        kind = payload[:1]
        if kind == b"B" and len(payload) == _BEGUN.size:
            index = int(_BEGUN.unpack(payload)[1])
            if index >= self.num_lines:
                return False
            self._note_begun(index)
            return True
        if kind not in (b"R", b"E") or len(payload) < _LINE.size:
            return False
        index = int(_LINE.unpack_from(payload)[1])
        if index >= self.num_lines:
            return False
        self.found.done += not self._offsets[index]
        self._offsets[index] = offset
        return True

    def _note_begun(self, index: int) -> None:
        self.again += self._begun[index]
        self._begun[index] = 1

    def begin(self, index: int) -> None:
        """Notes that a line is computed from now on. Raises StorageError."""
        self._append(_BEGUN.pack(b"B", index))
        self._note_begun(index)

    def finish(self, index: int, digest: bytes, line: str, ok: bool, prompt_tokens: int, output_tokens: int) -> None:
        """Keeps a line's outcome. Raises StorageError."""
        head = _LINE.pack(b"R" if ok else b"E", index, digest, prompt_tokens, output_tokens)
        offset = self._end
        self._append(head + line.encode("ascii"))
        self._offsets[index] = offset
        if self._dirty_since_s is None:
            self._dirty_since_s = time.monotonic()

    def outcome(self, index: int) -> Outcome | None:
        """What is kept for a line. Raises StorageError if it cannot be read as it was written."""
        offset = self._offsets[index]
        if not offset:
            return None
        try:
            length, checksum = _HEAD.unpack(os.pread(self._fd, _HEAD.size, offset))
            payload = _read_at(self._fd, length, offset + _HEAD.size)
        except OSError as error:
            raise StorageError(self.path, error) from error
        if _checksum(payload) != checksum:
            raise EngineError(f"{self.path}: changed while this process had it; run the same command again")
        kind, found, digest, prompt_tokens, output_tokens = _LINE.unpack_from(payload)
        assert found == index
        return Outcome(kind == b"R", digest, prompt_tokens, output_tokens, payload[_LINE.size :])

    def sync(self, at_once: bool = False) -> None:
        """Puts what was finished on disk, once SYNC_S have passed or `at_once`. Raises StorageError."""
        since_s = self._dirty_since_s
        if since_s is None or not (at_once or time.monotonic() - since_s >= SYNC_S):
            return
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise StorageError(self.path, error) from error
        self._dirty_since_s = None

    def _append(self, payload: bytes) -> None:
        if len(payload) > _MAX_RECORD:
            raise EngineError(f"{self.path}: a line's answer has {len(payload)} bytes, allowed: up to {_MAX_RECORD}")
        try:
            self._write(_record(payload))
        except OSError as error:
            with contextlib.suppress(OSError):  # what is left of the record is cut off here, or when it is next opened
                os.ftruncate(self._fd, self._end)
            raise StorageError(self.path, error) from error

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(self._fd, left) :]
        self._end += len(data)

    def remove(self) -> None:
        """Deletes the journal, and gives the lock back. Raises StorageError."""
        try:
            self.path.unlink(missing_ok=True)
            sync_folder(self.path.parent)
        except OSError as error:
            raise StorageError(self.path, error) from error
        finally:
            self.close()

    def close(self) -> None:
        """Idempotent; the lock ends."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one line."""

    ok: bool
    digest: bytes
    prompt_tokens: int
    output_tokens: int
    line: bytes
    """As it stands in the output or the error file, without the line's end."""


def sync_folder(folder: Path) -> None:
    """Makes renames and new names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _open_locked(path: Path) -> int:
    try:
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise ConfigError(f"{path}: not a regular file, which the journal of a batch needs to be")
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The one who had it before may have finished and deleted it.
                if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
                    return fd
            except BlockingIOError:
                os.close(fd)
                raise BatchInUse(f"{path}: another process is running this batch; wait for it, or stop it") from None
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
    except OSError as error:
        raise StorageError(path, error) from error


def _checksum(payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(len(payload).to_bytes(4, "little")))


def _record(payload: bytes) -> bytes:
    return _HEAD.pack(len(payload), _checksum(payload)) + payload


def _records(file: BinaryIO, start: int, size: int) -> Iterator[tuple[int, bytes]]:
    """(offset, payload) of each record up to the first that is not whole; `file` stands at `start`."""
    offset = start
    while len(head := file.read(_HEAD.size)) == _HEAD.size:
        length, checksum = _HEAD.unpack(head)
        if length > size - offset - _HEAD.size:
            return
        payload = file.read(length)
        if len(payload) != length or _checksum(payload) != checksum:
            return
        yield offset, payload
        offset += _HEAD.size + length


def _read_at(fd: int, length: int, offset: int) -> bytes:
    parts: list[bytes] = []
    while length and (part := os.pread(fd, length, offset)):
        parts.append(part)
        length -= len(part)
        offset += len(part)
    return b"".join(parts)


def _compare(path: Path, payload: bytes, now: Mapping[str, Any]) -> Mapping[str, Any]:
    """The manifest as it was. Raises BatchChanged naming the first difference that changes answers."""
    begun = json.loads(payload)
    if begun["input_sha256"] != now["input_sha256"]:
        raise BatchChanged(
            f"{path}: was begun with another input (SHA-256 {begun['input_sha256'][:12]}…, now "
            f"{now['input_sha256'][:12]}…): put the input back, or remove the journal to start over"
        )
    before, after = begun["settings"], now["settings"]
    for name in sorted({*before, *after}, key=lambda name: (name != "url", name)):
        if before.get(name) != after.get(name):
            raise BatchChanged(
                f"{path}: was begun with {name} {shorten(before.get(name))}, now {shorten(after.get(name))}: "
                "run it with the same settings, or remove the journal to start over"
            )
    return cast("Mapping[str, Any]", begun)
