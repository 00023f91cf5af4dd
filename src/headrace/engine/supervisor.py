"""The engine's process from outside: started, fed, watched, and started again when it ends.

every request given to `submit` gets exactly one terminal event, whatever happens to the process
a process that ends, or shows no sign of life for `HANG_S` while there is work, is replaced; its requests fail with
engine_fault, later ones are refused with not_ready until the next one has loaded
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, cast

from headrace.core.config import EngineConfig
from headrace.core.errors import CodedError, EngineError, HeadraceError, NotReady
from headrace.core.metrics import EngineStats
from headrace.core.types import ErrorEvent, Event, Request
from headrace.engine.heartbeat import Heartbeat
from headrace.engine.ipc import (
    Abort,
    AskStats,
    Events,
    Finish,
    FromEngine,
    Loaded,
    Reader,
    Refused,
    Start,
    Stats,
    Submit,
    ToEngine,
    Tokens,
    encode,
    unpack_event,
)

Sink = Callable[[Event], None]
"""Hears a request's events, in the event loop, one after the other."""

STALL_S = 3.0
"""Without a sign of life for so long while there is work, the engine is not ready."""
HANG_S = 30.0
"""After so long it is replaced."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
"""Between two starts; twice as long after each that failed."""
LOAD_S = 60.0
"""A new engine may take so long to load, or ten times what the first one took."""
STATS_S = 2.0
"""Most seconds to wait for the engine's counts."""
EXIT_S = 0.1
"""Most seconds to wait for the exit status of a process whose channel is closed."""
_WATCH_S = 0.25
ENGINE = ("-P", "-m", "headrace.engine.process")
"""What the interpreter is given. -P: a file of the folder that the server runs in is not to stand for a module."""

log = logging.getLogger(__name__)


class Supervisor:
    """Keeps one engine process running. All methods belong to one event loop."""

    def __init__(self, config: EngineConfig, eos_token_ids: frozenset[int], step_seconds: float) -> None:
        self._start_frame = Start(config, eos_token_ids, step_seconds)
        self._sinks: dict[str, Sink] = {}
        self._process: _Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._busy_since = 0.0
        self._load_s = 0.0
        """What the first load took."""
        self._stats_waiters: list[asyncio.Future[EngineStats]] = []
        self.loaded: Loaded | None = None
        """What the running engine said when it was ready; None while there is none."""
        self.restarts = 0
        self.closed = False

    async def start(self) -> Loaded:
        """Starts the engine, and from then on keeps it running. Raises what the first load raised."""
        began_s = time.monotonic()
        process = self._spawn()
        loaded = await process.ready()
        self.loaded = loaded
        self._load_s = time.monotonic() - began_s
        self._task = asyncio.create_task(self._watch(process), name="engine-supervisor")
        return loaded

    def _spawn(self) -> _Process:
        self._process = _Process(self._start_frame, self._on_events, self._on_stats)
        return self._process

    # ------------------------------------------------------------ requests

    def submit(self, request: Request, sink: Sink) -> None:
        """Gives a request to the engine. Raises NotReady while there is none."""
        if self.loaded is None or self._process is None:
            raise NotReady("the engine is being started")
        if not self._sinks:
            self._busy_since = time.monotonic()
        self._sinks[request.id] = sink
        self._process.send(Submit(request))

    def finish(self, request_id: str, num_output: int) -> None:
        """The answer is complete with its first `num_output` tokens."""
        self._tell(request_id, Finish(request_id, num_output))

    def abort(self, request_id: str) -> None:
        """Ends a request; its sink hears nothing more. Idempotent."""
        self._tell(request_id, Abort(request_id))
        self._sinks.pop(request_id, None)

    def _tell(self, request_id: str, message: ToEngine) -> None:
        if request_id in self._sinks and self._process is not None:
            self._process.send(message)

    @property
    def live(self) -> int:
        """Requests without a terminal event."""
        return len(self._sinks)

    def _on_events(self, events: Events) -> None:
        sinks = self._sinks
        for packed in events.events:
            sink = sinks.get(packed.id) if isinstance(packed, Tokens) else sinks.pop(packed.id, None)
            if sink is not None:
                self._tell_sink(sink, unpack_event(packed))

    def _tell_sink(self, sink: Sink, event: Event) -> None:
        """What goes wrong in one request's sink is that request's error alone."""
        try:
            sink(event)
        except Exception:
            log.exception("request %s cannot be told of its events", event.request_id)
            self.abort(event.request_id)
            fault = EngineError("an internal fault while this answer was put together; no other was affected")
            # From the loop itself, which goes on whatever the sink makes of this too.
            told = ErrorEvent(event.request_id, fault.code, str(fault), time.monotonic())
            asyncio.get_running_loop().call_soon(sink, told)

    def fail_all(self, error: HeadraceError) -> None:
        """Ends every request with an error; the engine drops them."""
        sinks, self._sinks = self._sinks, {}
        now_s = time.monotonic()
        for request_id, sink in sinks.items():
            if self._process is not None:
                self._process.send(Abort(request_id))
            self._tell_sink(sink, ErrorEvent(request_id, error.code, str(error), now_s))

    # ------------------------------------------------------------ health

    def stalled_s(self) -> float:
        """Seconds without a sign of life while there is work."""
        if not self._sinks or self._process is None:
            return 0.0
        return max(0.0, time.monotonic() - max(self._process.heartbeat.last_s, self._busy_since))

    @property
    def ready(self) -> bool:
        """Whether a request given now would be worked on."""
        return self.alive and self.loaded is not None and self.stalled_s() < STALL_S

    @property
    def alive(self) -> bool:
        """Whether this supervisor itself goes on."""
        return self._task is not None and not self._task.done()

    async def stats(self) -> EngineStats | None:
        """The engine's counts; None if it does not say in time."""
        if self.loaded is None or self._process is None:
            return None
        waiter: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
        self._stats_waiters.append(waiter)
        if len(self._stats_waiters) == 1:
            self._process.send(AskStats())
        try:
            return await asyncio.wait_for(asyncio.shield(waiter), STATS_S)
        except TimeoutError:
            self._stats_waiters = []
            return None

    def _on_stats(self, stats: Stats) -> None:
        waiters, self._stats_waiters = self._stats_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(stats.stats)

    # ------------------------------------------------------------ watching

    async def _watch(self, process: _Process) -> None:
        """Replaces the process whenever it ends or hangs."""
        while not self.closed:
            reason = await self._until_gone(process)
            self.loaded = None
            if self.closed:
                return
            log.error("the engine %s; it is started again", reason)
            self.restarts += 1
            self.fail_all(EngineError(f"the engine {reason} and is being started again"))
            await process.kill()
            process = await self._restart()

    async def _until_gone(self, process: _Process) -> str:
        while not self.closed:
            if process.gone:
                await process.exited(EXIT_S)
                return process.ending()
            if self.stalled_s() > HANG_S:
                await process.dump()
                return f"showed no sign of life for {HANG_S:g} s"
            await asyncio.wait([process.gone_event], timeout=_WATCH_S)
        return "was closed"

    async def _restart(self) -> _Process:
        pause_s = FIRST_PAUSE_S
        limit_s = max(LOAD_S, 10 * self._load_s)
        while True:
            process = None
            try:
                process = self._spawn()
                self.loaded = await asyncio.wait_for(process.ready(), limit_s)
                return process
            except TimeoutError:
                log.error("the engine was not loaded after %g s", limit_s)
            except (HeadraceError, OSError) as error:
                log.error("the engine cannot start: %s", error)
            if process is not None:
                await process.kill()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def close(self) -> None:
        """Ends the process. Idempotent."""
        self.closed = True
        self.loaded = None
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._process is not None:
            await self._process.kill()


class _Process(asyncio.Protocol):
    """One engine process and our end of its channel."""

    def __init__(self, start: Start, on_events: Callable[[Events], None], on_stats: Callable[[Stats], None]) -> None:
        self._on_events = on_events
        self._on_stats = on_stats
        self._reader = Reader(FromEngine)
        self._transport: asyncio.Transport | None = None
        loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[Loaded] = loop.create_future()
        self.gone_event: asyncio.Future[None] = loop.create_future()
        """Done once the channel is closed, by whichever side."""
        self._refused: Refused | None = None
        self.heartbeat = Heartbeat()
        try:
            ours, theirs = socket.socketpair()
        except OSError:
            self.heartbeat.close()
            raise
        descriptors = (theirs.fileno(), self.heartbeat.descriptor)
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, *ENGINE, *map(str, descriptors)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=descriptors,
                )
        except OSError as error:
            ours.close()
            self.heartbeat.close()
            raise EngineError(f"the engine's process cannot be started: {error}") from None
        self.pid = self._process.pid
        self._start = start
        self._socket = ours

    async def ready(self) -> Loaded:
        """Waits until the model is loaded. Raises what the engine says is wrong with it."""
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self, sock=self._socket)
        self.send(self._start)
        either: list[asyncio.Future[Any]] = [self._loaded, self.gone_event]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._loaded.done():
            return self._loaded.result()
        if self._refused is not None:
            raise CodedError(self._refused.code, self._refused.message)
        raise EngineError(f"the engine {self.ending()} while it loaded the model")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        for message in self._reader.feed(data):
            if isinstance(message, Events):
                self._on_events(message)
            elif isinstance(message, Stats):
                self._on_stats(message)
            elif isinstance(message, Loaded):
                if not self._loaded.done():
                    self._loaded.set_result(message)
            else:
                self._refused = message

    def connection_lost(self, error: Exception | None) -> None:
        if not self.gone_event.done():
            self.gone_event.set_result(None)

    def send(self, message: ToEngine) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode(message))

    @property
    def gone(self) -> bool:
        return self.gone_event.done()

    async def exited(self, most_s: float) -> None:
        """Waits a moment for its exit status: a channel closes before its process is gone."""
        until_s = time.monotonic() + most_s
        while self._process.poll() is None and time.monotonic() < until_s:
            await asyncio.sleep(0.005)

    def ending(self) -> str:
        """How it ended, in a few words."""
        if self._refused is not None:
            return f"gave up ({self._refused.message})"
        code = self._process.poll()
        if code is None:
            return "closed its channel"
        return f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"

    async def dump(self) -> None:
        """Lets it write where it is (faulthandler), if it still can."""
        self._process.send_signal(signal.SIGABRT)
        await asyncio.sleep(0.5)

    async def kill(self) -> None:
        """Ends it at once, and waits until it is gone. Idempotent."""
        if self._transport is not None:
            self._transport.abort()
        else:
            self._socket.close()
        if self._process.poll() is None:
            self._process.kill()
        await asyncio.get_running_loop().run_in_executor(None, self._process.wait)
        if not self.gone_event.done():
            self.gone_event.set_result(None)
        self._on_events = self._on_stats = _nothing
        self.heartbeat.close()


def _nothing(message: Any) -> None:
    """What comes after the end is for nobody."""
