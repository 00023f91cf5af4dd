"""One engine process of ours, as a server has one, with our end of its channel; without an event loop."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from headrace.core.config import EngineConfig
from headrace.core.errors import EngineError
from headrace.core.types import Event, Request
from headrace.engine.hardware import read_text
from headrace.engine.heartbeat import Heartbeat
from headrace.engine.ipc import Events, FromEngine, Loaded, Reader, Refused, Start, Submit, encode, unpack_event
from headrace.engine.supervisor import ENGINE

LONGEST_STEP_S = 3600.0
"""Its steps are to be as large as those of an engine that nobody waits for, however long they take."""
EXIT_S = 2.0
"""Most seconds to wait for the exit status of a process whose channel is closed."""
_CHUNK = 2**18


class Instance:
    """It ends with the thread that started it, whatever becomes of us."""

    def __init__(self, name: str, config: EngineConfig, eos_token_ids: frozenset[int]) -> None:
        """`name`: in errors. Raises EngineError where no process can be started."""
        self._name = name
        self._reader = Reader(FromEngine)
        self._heartbeat = Heartbeat()
        try:
            self.socket, theirs = socket.socketpair()
        except OSError as error:
            self._heartbeat.close()
            raise EngineError(f"{name}: no channel can be made: {error}") from None
        descriptors = (theirs.fileno(), self._heartbeat.descriptor)
        try:
            with theirs:
                command = [sys.executable, *ENGINE, *map(str, descriptors)]
                self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=descriptors)
        except OSError as error:
            self.socket.close()
            self._heartbeat.close()
            raise EngineError(f"{name} cannot be started: {error}") from None
        self.pid = self._process.pid
        self._start = Start(config, eos_token_ids, LONGEST_STEP_S)

    def wait_ready(self) -> None:
        """Until the model is loaded. Raises EngineError if it cannot be."""
        self._send(self._start)
        while not any(isinstance(message, Loaded) for message in self._receive()):
            pass

    def submit(self, request: Request) -> None:
        """Raises EngineError if the process has ended."""
        self._send(Submit(request))

    def events(self) -> list[Event]:
        """What has come; waits for it. Raises EngineError if the process has ended, or is about to."""
        packed = [one for message in self._receive() if isinstance(message, Events) for one in message.events]
        return [unpack_event(one) for one in packed]

    def _send(self, message: Start | Submit) -> None:
        try:
            self.socket.sendall(encode(message))
        except OSError:
            raise self._ended() from None

    def _receive(self) -> list[Any]:
        try:
            data = self.socket.recv(_CHUNK)
        except OSError:
            data = b""
        if not data:
            raise self._ended()
        messages = self._reader.feed(data)
        for message in messages:
            if isinstance(message, Refused):
                raise EngineError(f"{self._name}: {message.message}")
        return messages

    def _ended(self) -> EngineError:
        # A channel closes before its process is gone.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_S)
        code = self._process.returncode
        if code is None:
            return EngineError(f"{self._name} (process {self.pid}) closed its channel")
        how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
        return EngineError(f"{self._name} (process {self.pid}) {how}")

    @property
    def cpu_s(self) -> float:
        """Processor time so far, all threads. Raises EngineError if the process has ended."""
        try:
            # Linux's number for the clock of another process: clock_getcpuclockid(3).
            return time.clock_gettime((~self.pid << 3) | 2)
        except OSError:
            raise self._ended() from None

    @property
    def rss_bytes(self) -> int:
        return self._status("VmRSS")

    @property
    def peak_rss_bytes(self) -> int:
        """Most since `forget_peak`; pages that processes share count in each."""
        return self._status("VmHWM")

    def forget_peak(self) -> None:
        """Where the system does not let us, the peak is that since its start."""
        with suppress(OSError):
            Path(f"/proc/{self.pid}/clear_refs").write_text("5", encoding="ascii")

    def _status(self, name: str) -> int:
        """Bytes of a line of /proc/PID/status; 0 where it is missing."""
        for line in (read_text(Path(f"/proc/{self.pid}/status")) or "").splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return 1024 * int(value.split()[0])
        return 0

    def kill(self) -> None:
        """Does not wait. Idempotent."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Ends it, and waits until it is gone. Idempotent."""
        self.kill()
        self._process.wait()
        self.socket.close()
        self._heartbeat.close()
