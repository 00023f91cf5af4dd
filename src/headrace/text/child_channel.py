"""What every killable process shares on its side: the frames on fd 0, and what it gives up before its first request.

A frame is four bytes of length (big-endian) and that many bytes. The standard library only: the start is paid for in
milliseconds. CPU time is ended by the kernel (SIGPROF at its default kills), since no Python code runs while one long
C call does.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal

READY = b"r"
"""The first frame of every child."""
_CHANNEL = 0
_PARENT_CHECK_MS = 10_000


def restore_signals() -> None:
    """The parent may have ignored or blocked them, and that is inherited. A Ctrl-C is the parent's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})


def open_statm() -> int | None:
    """A descriptor for `address_space`, from before files are given up."""
    try:
        return os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return None


def address_space(statm: int | None) -> int:
    """Bytes mapped now; 0 where the platform does not say. (ru_maxrss would count what the parent had before vfork.)"""
    return 0 if statm is None else int(os.pread(statm, 64, 0).split()[0]) * resource.getpagesize()


def give_up(address_space: int | None, stack: int | None = None) -> None:
    """Memory, files, children. A limit that the platform lacks is left out; `poll` needs room for one descriptor."""
    limits = {
        "RLIMIT_FSIZE": 0,
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": 0,
        "RLIMIT_NOFILE": 1,
        "RLIMIT_AS": address_space,
        "RLIMIT_STACK": stack,
    }
    for name, value in limits.items():
        if value is not None and hasattr(resource, name):
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(getattr(resource, name), (value, value))


def limit_cpu(seconds: float) -> None:
    """CPU seconds from now until the kernel ends the process; 0: no end."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def receive(parent: int) -> bytes | None:
    """The next frame; None when the parent has closed its end or is gone."""
    waiting = select.poll()
    waiting.register(_CHANNEL, select.POLLIN)
    while not waiting.poll(_PARENT_CHECK_MS):
        if os.getppid() != parent:  # a fork of the parent may hold the channel open
            return None
    head = _read(4)
    return None if head is None else _read(int.from_bytes(head, "big"))


def _read(count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        chunk = os.read(_CHANNEL, min(count - len(data), 2**16))
        if not chunk:
            return None
        data += chunk
    return bytes(data)


def send(data: bytes) -> None:
    view = memoryview(len(data).to_bytes(4, "big") + data)
    while view:
        view = view[os.write(_CHANNEL, view) :]
