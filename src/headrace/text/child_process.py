"""A process that can be killed, and our end of its channel: for work on untrusted input that a thread could not stop.

What runs inside is `headrace.text.child_channel`, and a module of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from headrace.core.errors import EngineError

_MAX_FRAME = 2**27
_READY = b"r"
"""The first frame of every child; `child_channel` is not imported here."""


class ChildStopped(Exception):
    """The child did not answer; the message says why ("ran longer than 1 s of CPU time"). It is of no more use."""

    def __init__(self, why: str, ended_by: int | None = None) -> None:
        super().__init__(why)
        self.ended_by = ended_by
        """The signal that ended it, if one did."""


class ChildProcess:
    """A Python process without environment, site packages and open files, and our end of its channel."""

    def __init__(
        self, purpose: str, module: str, arguments: Sequence[object], packages: Sequence[str], start_s: float
    ) -> None:
        """`purpose` is for messages. `module`: its `main` is called with the arguments, as texts; it imports headrace,
        `packages` and the standard library. Does not wait for the start. Raises EngineError."""
        if not sys.executable:
            raise EngineError(f"{purpose} need a Python interpreter of their own, and sys.executable is empty")
        code = f"import sys; n = int(sys.argv[1]); sys.path += sys.argv[2 + n:]; from {module} import main; "
        code += "main(*sys.argv[2 : 2 + n])"
        ours, theirs = socket.socketpair()
        given = [len(arguments), *arguments, *_import_roots(packages)]
        try:
            with theirs:
                # -I -S: no environment, no user or site directories, no start-up code of theirs. The session of its own
                # keeps a Ctrl-C away. Popen uses vfork here, which is safe beside torch's threads.
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", code, *map(str, given)],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={},
                    cwd="/",
                    start_new_session=True,
                )
        except OSError as error:
            ours.close()
            raise EngineError(f"the process for {purpose} cannot be started: {error}") from None
        self.pid = process.pid
        self._purpose = purpose
        self._start_s = start_s
        self._process = process
        self._socket = ours
        self._owner = os.getpid()
        self._started = time.monotonic()
        self._ready = False
        self.close = weakref.finalize(self, _end, process, ours, self._owner)

    def alive(self) -> bool:
        """Whether it may be asked; a fork of the process that started it may not."""
        return self._owner == os.getpid() and self._process.poll() is None

    def wait_until_ready(self, first: bytes | None = None) -> None:
        """Returns once it takes requests; `first`: a frame that it reads before. Raises EngineError."""
        if self._ready:
            return
        try:
            deadline = self._started + self._start_s
            if first is not None:
                self._send(first, deadline)
            ready = self._receive(deadline)
        except TimeoutError:
            raise EngineError(f"the process for {self._purpose} did not start in {self._start_s:g} s") from None
        if ready != _READY:
            raise EngineError(f"the process for {self._purpose} did not start: {_ending(self._exit_code())}")
        self._ready = True

    def ask(self, data: bytes, wall_s: float, cpu_s: float) -> bytes:
        """The answer to one request. `cpu_s` is what the child was told, for the message. Raises ChildStopped, and
        EngineError if it did not start."""
        self.wait_until_ready()
        deadline = time.monotonic() + wall_s
        try:
            self._send(data, deadline)
            answer = self._receive(deadline)
        except TimeoutError:
            raise ChildStopped(f"ran longer than {wall_s:g} s") from None
        if answer is not None:
            return answer
        code = self._exit_code()
        ended_by = None if code is None or code >= 0 else -code
        if ended_by == signal.SIGPROF:
            raise ChildStopped(f"ran longer than {cpu_s:g} s of CPU time", ended_by)
        raise ChildStopped(f"ended its process ({_ending(code)})", ended_by)

    def _send(self, data: bytes, deadline: float) -> None:
        self._socket.settimeout(max(1e-3, deadline - time.monotonic()))
        with contextlib.suppress(ConnectionError):  # then it has ended, and the answer is missing
            self._socket.sendall(len(data).to_bytes(4, "big") + data)

    def _receive(self, deadline: float) -> bytes | None:
        """A frame; None if the process closed the channel, or wrote what is no frame. Raises TimeoutError."""
        head = self._read(4, deadline)
        count = 0 if head is None else int.from_bytes(head, "big")
        return self._read(count, deadline) if 0 < count <= _MAX_FRAME else None

    def _read(self, count: int, deadline: float) -> bytes | None:
        data = bytearray()
        while len(data) < count:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            try:
                chunk = self._socket.recv(min(count - len(data), 2**16))
            except ConnectionError:
                return None
            if not chunk:
                return None
            data += chunk
        return bytes(data)

    def _exit_code(self) -> int | None:
        """After its channel closed; None if it runs on without."""
        try:
            return self._process.wait(1)
        except subprocess.TimeoutExpired:
            return None


def _ending(code: int | None) -> str:
    if code is None:
        return "its channel closed"
    return f"signal {-code}" if code < 0 else f"exit status {code}"


def _import_roots(packages: Sequence[str]) -> list[str]:
    """Where headrace and `packages` lie, found without importing them."""
    specs = (find_spec(name) for name in ("headrace", *packages))
    return list(dict.fromkeys(str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin))


def _end(process: subprocess.Popen[bytes], channel: socket.socket, owner: int) -> None:
    channel.close()
    if owner == os.getpid():
        process.kill()
        process.wait()
