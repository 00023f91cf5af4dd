"""The engine as a process of its own: `python -m headrace.engine.process SOCKET HEARTBEAT`, started by `supervisor`.

It reads what is asked between two steps, and tells what a step led to in one frame. It ends when the other side does.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import select
import signal
import socket
import sys
import time
import traceback

from headrace.core.errors import EngineError, HeadraceError
from headrace.engine.core import EngineCore
from headrace.engine.grammars import Grammars
from headrace.engine.heartbeat import Heartbeat
from headrace.engine.ipc import Abort, AskStats, Channel, Finish, Loaded, Refused, Start, Stats, Submit, pack_events
from headrace.engine.model import OpenModel

COLLECT_EVERY = 50_000
"""New objects between two searches for garbage: a step makes few that need one, and each search stops the step."""
LONGEST_WAIT_S = 1.0
_PR_SET_PDEATHSIG = 1


class EngineProcess:
    """The loop around one EngineCore."""

    def __init__(self, channel: Channel, heartbeat: Heartbeat) -> None:
        self._channel = channel
        self._heartbeat = heartbeat

    def run(self) -> int:
        """Loads what the first frame asks for, then serves. Returns the exit status."""
        start = self._first()
        if start is None:
            return 0
        try:
            opened, core = self._load(start)
        except HeadraceError as error:
            return self._refuse(error)
        except Exception as error:
            return self._refuse(EngineError(f"{type(error).__name__} while the engine started: {error}"))
        try:
            self._serve(core)
            if core.error is not None:
                return self._refuse(core.error)
            return 0
        finally:
            core.close()
            opened.close()

    def _first(self) -> Start | None:
        while not self._channel.closed:
            self._wait(None)
            for message in self._channel.receive():
                if isinstance(message, Start):
                    return message
        return None

    def _load(self, start: Start) -> tuple[OpenModel, EngineCore]:
        began = time.monotonic()
        opened = OpenModel(start.config)
        opened.begin()
        opened_s = time.monotonic() - began
        core, load_s = opened.start(
            eos_token_ids=start.eos_token_ids,
            step_seconds=start.step_seconds,
            grammars=Grammars(opened.vocabulary) if opened.has_text else None,
            on_fault=traceback.print_exception,
        )
        # What is here now stays: no search for garbage need look at it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(COLLECT_EVERY)
        self._heartbeat.beat()
        seconds = {"headers": opened_s, "weights": load_s}
        backend = {name: str(value) for name, value in core.probe().items()}
        self._channel.send(Loaded(seconds, dict(core.memory()), backend))
        return opened, core

    def _serve(self, core: EngineCore) -> None:
        channel = self._channel
        while core.error is None:
            for message in channel.receive():
                self._take(core, message)
            if channel.closed:
                return
            self._heartbeat.beat()
            if not core.has_work:
                self._wait(None)
                continue
            if events := core.step():
                channel.send(pack_events(events))
            elif channel.has_unsent:
                channel.flush()
            if delay_s := core.sleep_s():
                self._wait(min(delay_s, LONGEST_WAIT_S))

    def _take(self, core: EngineCore, message: object) -> None:
        if isinstance(message, Submit):
            core.submit(message.request)
        elif isinstance(message, Finish):
            core.finish(message.id, message.num_output)
        elif isinstance(message, Abort):
            core.abort(message.id)
        elif isinstance(message, AskStats):
            self._channel.send(Stats(core.engine_stats()))

    def _wait(self, timeout_s: float | None) -> None:
        """Until something comes, or what waits to be sent can go on."""
        writers = [self._channel] if self._channel.has_unsent else []
        _, ready, _ = select.select([self._channel], writers, [], timeout_s)
        if ready:
            self._channel.flush()

    def _refuse(self, error: HeadraceError) -> int:
        self._channel.send(Refused(error.code, str(error)))
        return 1


def main(arguments: list[str]) -> int:
    """The process. Its parent's end is its own."""
    # Ctrl-C goes to the whole foreground group: what it means is for the parent to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() == 1:
            return 0  # the parent was gone before it was asked for
    channel = Channel(socket.socket(fileno=int(arguments[0])))
    return EngineProcess(channel, Heartbeat(int(arguments[1]))).run()


if __name__ == "__main__":
    # To take the interpreter apart would only take time.
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)
