"""A few bytes that two processes share: the engine says that it goes on, whoever watches need not ask it."""

from __future__ import annotations

import mmap
import os
import time


class Heartbeat:
    """Both ends; the memory has no name, and is gone with the last process that holds it. Linux."""

    def __init__(self, descriptor: int | None = None) -> None:
        """`descriptor`: that of the other process's heartbeat; None makes one."""
        if descriptor is None:
            descriptor = os.memfd_create("headrace-heartbeat")
            os.ftruncate(descriptor, mmap.PAGESIZE)
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, mmap.PAGESIZE)
        # One aligned store of eight bytes: a reader sees the time before or the time after, never half of one.
        self._time = memoryview(self._memory).cast("d")

    def beat(self) -> None:
        """The engine has just done something, or has nothing to do."""
        self._time[0] = time.monotonic()

    @property
    def last_s(self) -> float:
        """Monotonic time of the last beat; 0: none yet, or closed."""
        return 0.0 if self._memory.closed else self._time[0]

    def close(self) -> None:
        """Idempotent."""
        if not self._memory.closed:
            self._time.release()
            self._memory.close()
            os.close(self.descriptor)
