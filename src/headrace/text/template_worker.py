"""Renders chat templates in a process that can be killed: a template is untrusted, and threads cannot be stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

from headrace.core.errors import EngineError, TemplateError

_MAX_SOURCE = 2**20
_MAX_INPUT = 20 * 2**20
_MAX_FRAME = 2**27
_MIB = 2**20
# The kinds of answer, as template_child writes them; that module is not imported here, since it imports jinja2.
_READY, _TEXT, _RETIRE, _FAULT, _NO_MEMORY = b"r", b"t", b"T", b"f", b"m"
_BOOTSTRAP = (
    "import sys; sys.path += sys.argv[4:]; from headrace.text.template_child import main; "
    "main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))"
)


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """What one rendering may cost, compiling included."""

    cpu_s: float = 1.0
    """Seconds of CPU time."""
    wall_s: float = 10.0
    """Seconds in all; larger, since a busy machine is no fault of the template."""
    memory_bytes: int = 112 * _MIB
    """Address space above what the process has when it starts. What is resident may grow by a little more, by pages
    that were mapped before: it stays below 128 MB."""
    output: int = 4 * _MIB
    """Characters."""
    start_s: float = 60.0
    """Seconds for the process to start; not counted in `wall_s`."""


class TemplateRenderer:
    """At most one template process: started with the first rendering (or `start`), started anew after one that had to
    be killed. Thread-safe; one rendering at a time."""

    def __init__(self, limits: TemplateLimits | None = None) -> None:
        self.limits = limits or TemplateLimits()
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def start(self) -> None:
        """Starts the process without waiting for it. Raises EngineError."""
        with self._lock:
            self._living_child()

    def render(self, source: str, variables: Mapping[str, object], now: datetime | None = None) -> str:
        """What the template `source` writes; `variables` are JSON values, `now` is what its clock says.

        Raises TemplateError: no template, one that refuses or fails, or one that meets a limit; EngineError if the
        process cannot be started.
        """
        if len(source) > _MAX_SOURCE:
            raise TemplateError(f"the chat template has {len(source)} characters, allowed: {_MAX_SOURCE}")
        request = {"now": (now or datetime.now()).isoformat(), "source": source, "variables": variables}
        try:
            data = json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass")
        except ValueError as error:  # an integer of more digits than Python turns into text
            raise TemplateError(f"the messages cannot be written as JSON: {error}") from None
        if len(data) > _MAX_INPUT:
            raise TemplateError(f"the messages and the template have {len(data)} bytes, allowed: {_MAX_INPUT}")
        with self._lock:
            child = self._living_child()
            try:
                answer = child.ask(data, self.limits)
            except BaseException:  # Ctrl-C too: what the process would answer later belongs to nobody
                self._drop()
                raise
            kind, text = answer[:1], answer[1:].decode("utf-8", "surrogatepass")
            if kind not in (_TEXT, _FAULT):
                self._drop()
        if kind in (_TEXT, _RETIRE):
            return text
        if kind == _FAULT:
            raise TemplateError(text)
        raise TemplateError(f"the chat template needs more than {self.limits.memory_bytes // _MIB} MiB of memory")

    def close(self) -> None:
        """Ends the process. The next rendering would start another."""
        with self._lock:
            self._drop()

    def _living_child(self) -> _Child:
        if self._child is not None and not self._child.alive():
            self._drop()
        if self._child is None:
            self._child = _Child(self.limits)
        return self._child

    def _drop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.close()


class _Child:
    """A template process and our end of its channel."""

    def __init__(self, limits: TemplateLimits) -> None:
        if not sys.executable:
            raise EngineError("chat templates need a Python interpreter of their own, and sys.executable is empty")
        ours, theirs = socket.socketpair()
        arguments = (limits.memory_bytes, limits.cpu_s, limits.output)
        try:
            with theirs:
                # -I -S: no environment, no user or site directories, no start-up code of theirs. The session of its own
                # keeps a Ctrl-C away. Popen uses vfork here, which is safe beside torch's threads.
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _BOOTSTRAP, *map(str, arguments), *_import_roots()],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={},
                    cwd="/",
                    start_new_session=True,
                )
        except OSError as error:
            ours.close()
            raise EngineError(f"the process for chat templates cannot be started: {error}") from None
        self.pid = process.pid
        self._process = process
        self._socket = ours
        self._owner = os.getpid()
        self._started = time.monotonic()
        self._ready = False
        self.close = weakref.finalize(self, _end, process, ours, self._owner)

    def alive(self) -> bool:
        """Whether it may be asked; a fork of the process that started it may not."""
        return self._owner == os.getpid() and self._process.poll() is None

    def ask(self, data: bytes, limits: TemplateLimits) -> bytes:
        """The answer to one request. Raises TemplateError, EngineError."""
        if not self._ready:
            try:
                ready = self._receive(self._started + limits.start_s)
            except TimeoutError:
                raise EngineError(f"the process for chat templates did not start in {limits.start_s:g} s") from None
            if ready != _READY:
                raise EngineError(f"the process for chat templates did not start: {self._ending()}")
            self._ready = True
        deadline = time.monotonic() + limits.wall_s
        try:
            self._socket.settimeout(limits.wall_s)
            with contextlib.suppress(ConnectionError):  # then it has ended, and the answer is missing
                self._socket.sendall(len(data).to_bytes(4, "big") + data)
            answer = self._receive(deadline)
        except TimeoutError:
            raise TemplateError(f"the chat template ran longer than {limits.wall_s:g} s") from None
        if answer is not None:
            return answer
        ending = self._ending()
        if ending == f"signal {int(signal.SIGPROF)}":
            raise TemplateError(f"the chat template ran longer than {limits.cpu_s:g} s of CPU time")
        raise TemplateError(f"the chat template ended its process ({ending})")

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

    def _ending(self) -> str:
        """How it ended, after its channel closed."""
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return "its channel closed"
        return f"signal {-code}" if code < 0 else f"exit status {code}"


def _import_roots() -> list[str]:
    """Where headrace and what the sandbox imports lie, found without importing them."""
    specs = (find_spec(name) for name in ("headrace", "jinja2", "markupsafe"))
    return list(dict.fromkeys(str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin))


def _end(process: subprocess.Popen[bytes], channel: socket.socket, owner: int) -> None:
    channel.close()
    if owner == os.getpid():
        process.kill()
        process.wait()
