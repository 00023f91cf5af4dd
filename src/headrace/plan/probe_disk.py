"""How fast a disk is read: a file of our own that the page cache was told to forget."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkstemp

from headrace.engine.hardware import ROOT, read_text
from headrace.plan.probe_tools import Bench, What

FILE_BYTES = 96 * 2**20
CHUNK = 4 * 2**20
MOST_S = 3.0
"""After which a slow disk is read no further."""
ROOM = 4
"""Times the file's size that must be free: a probe fills no disk."""
CACHED = "the page cache kept the file: this is memory, not the disk"


class Disk:
    """Reads a file of FILE_BYTES in `folder`, front to back, with one thread. The file has no name, and is gone when
    the process is, however that ends."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        """Writes the file. What stands in the way is noted in `bench.skipped`."""
        self._bench = bench
        self._where = f"{folder} ({file_system(folder)})"
        self._descriptor: int | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (room := os.statvfs(folder)).f_bavail * room.f_frsize < ROOM * FILE_BYTES:
                raise OSError(None, f"less than {ROOM * FILE_BYTES >> 20} MiB are free")
            if not hasattr(os, "posix_fadvise"):
                raise OSError(None, "this system lets no program empty the page cache of a file")
            self._descriptor, name = mkstemp(dir=folder)
            Path(name).unlink()
            block = os.urandom(CHUNK)  # a file system that compresses is to gain nothing
            for _ in range(FILE_BYTES // CHUNK):
                os.write(self._descriptor, block)
            os.fsync(self._descriptor)
        except OSError as error:
            self._leave_out(error)

    def _leave_out(self, error: OSError) -> None:
        self.close()
        note = f"in {self._where}: {error.strerror}"
        self._bench.skipped.append(What("disk", {"where": self._where, "bytes": FILE_BYTES}, "bytes/s", note))

    def round(self) -> Iterator[tuple[What, float]]:
        if self._descriptor is None:
            return
        try:
            nbytes, seconds, cached = _read(self._descriptor)
        except OSError as error:
            self._leave_out(error)
            return
        note = f"in {self._where}" + (f"; {CACHED}" if cached else "")
        yield What("disk", {"where": self._where, "bytes": FILE_BYTES}, "bytes/s", note), nbytes / seconds

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None


def _read(descriptor: int) -> tuple[int, float, bool]:
    """(bytes that were read: all, or as many as MOST_S allowed; seconds; whether the page cache had them in spite of
    all)"""
    buffer = bytearray(CHUNK)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    cached = is_cached(descriptor, FILE_BYTES // 2)
    os.lseek(descriptor, 0, os.SEEK_SET)
    nbytes, began = 0, time.perf_counter()
    while count := os.readv(descriptor, [buffer]):
        nbytes += count
        if time.perf_counter() - began > MOST_S:
            break
    return nbytes, time.perf_counter() - began, cached


def is_cached(descriptor: int, offset: int) -> bool:
    """Whether the page at `offset` can be had without waiting for the disk; False where the system does not say."""
    if sys.platform != "linux":
        return False
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) > 0
    except OSError:  # EAGAIN: it would wait; EOPNOTSUPP: this file system does not say
        return False


def file_system(folder: Path, root: Path = ROOT) -> str:
    """ext4, tmpfs …: of the mount that holds the folder."""
    best, kind = -1, "file system unknown"
    place = folder.absolute()
    for line in (read_text(root / "proc/mounts") or "").splitlines():
        words = line.split()
        if len(words) > 2 and len(words[1]) > best and place.is_relative_to(words[1]):
            best, kind = len(words[1]), words[2]
    return kind
