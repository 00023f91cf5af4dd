"""A few bytes that two processes share: the engine says that it goes on, whoever watches need not ask it."""

from __future__ import annotations

import mmap
import os
import struct
import time

_LAYOUT = struct.Struct("<dQ")
"""Monotonic time of the last beat; beats so far."""


class Heartbeat:
    """Both ends; the memory has no name, and is gone with the last process that holds it. Linux."""

    def __init__(self, descriptor: int | None = None) -> None:
        """`descriptor`: that of the other process's heartbeat; None makes one."""
        if descriptor is None:
            descriptor = os.memfd_create("headrace-heartbeat")
            os.ftruncate(descriptor, mmap.PAGESIZE)
        self.descriptor = descriptor
        self._memory = mmap.mmap(self.descriptor, _LAYOUT.size)
        self._beats = 0

    def beat(self) -> None:
        """The engine has just done something, or has nothing to do."""
        self._beats += 1
        _LAYOUT.pack_into(self._memory, 0, time.monotonic(), self._beats)

    @property
    def last_s(self) -> float:
        """Monotonic time of the last beat; 0: none yet."""
        return 0.0 if self._memory.closed else float(_LAYOUT.unpack_from(self._memory, 0)[0])

    def close(self) -> None:
        """Idempotent."""
        if not self._memory.closed:
            self._memory.close()
            os.close(self.descriptor)
