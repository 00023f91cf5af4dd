"""HTTP/1.1 on one connection: what uvicorn's protocol leaves to the client's good will is bounded here.

Time: a request's headers, its body, and how long an answer may lie unread. Space: header bytes, pipelined requests,
unsent bytes. Whatever is not plain HTTP/1.1 is refused with a JSON error and the connection is closed.

Nothing here runs once a token: unread answers are found by a timer of the connection, not by its writes.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Callable, Coroutine
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from headrace.core.errors import (
    BodyTooLarge,
    HeadersTooLarge,
    HeadraceError,
    MethodNotAllowed,
    RequestError,
    RequestTimeout,
    TooManyConnections,
    UpgradeRefused,
)
from headrace.server.config import ServeConfig
from headrace.server.errors import openai_body, retry_headers

MAX_HEAD_BYTES = 32 * 1024
MAX_HEADERS = 100
MAX_URL_BYTES = 8 * 1024
MAX_PIPELINED = 8
"""Requests that may wait on a connection behind the one being answered; those after them are not read."""
MAX_IGNORED_BYTES = 1024 * 1024
"""What a client may still send while answers are due to it that are its last. It is read, to notice when it leaves."""
HIGH_WATER_BYTES = 64 * 1024
"""Unsent bytes at which a stream waits for its client."""
SEND_BUFFER_BYTES = 96 * 1024
"""What the kernel is asked to hold for one connection. It takes the double, its own needs included: 256 KiB with the
above."""
MIN_TAKEN_BYTES = 1024
"""A client that takes less than this within `write_timeout` leaves its answer unread."""
MAX_TICK_S = 1.0
"""How often a connection's unsent bytes are looked at."""
LINGER_S = 5.0
"""How long what a refused client still sends is read and thrown away: closing at once would take its answer from it."""
SPARE_CONNECTIONS = 1024
"""Connections allowed beyond those of requests that wait."""
SLOW_CLIENT = "slow_client"
"""What the request's `scope["state"]["closed_by"]` is where its client did not read."""
METHODS = "GET, HEAD, POST, OPTIONS"
BYTES_ACKED = struct.Struct("@Q")
BYTES_ACKED_AT = 120
"""Where `tcpi_bytes_acked` stands in Linux's `struct tcp_info` (include/uapi/linux/tcp.h)."""

IDLE, HEAD, BODY = range(3)
"""What of a request is being read: nothing, its request line and headers, its body."""

logger = logging.getLogger("headrace.http")


class _Refused(Exception):
    """Ends the parser's work. Only for callbacks of the parser."""


class _Outlet:
    """What a request's answer is written to: the transport, but closed so that the client can read the answer."""

    __slots__ = ("close", "is_closing", "write")

    def __init__(self, protocol: _Protocol) -> None:
        self.write = protocol.transport.write
        self.close = protocol.finish
        self.is_closing = protocol.is_closing


class _Protocol(HttpToolsProtocol):
    settings: ServeConfig

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._phase = IDLE
        self._steps = 0
        """Changes of phase so far."""
        self._read_timer: asyncio.TimerHandle | None = None
        self._tick_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        """Of the request being read, trailers included."""
        self._num_headers = 0
        self._silent_bytes = 0
        """Fed to the parser since it last told of something: a header that does not end, say."""
        self._told = False
        self._unframed = b""
        """The header that frames a body which the parser has given up."""
        self._muted = False
        self._deaf = False
        """Nothing more is read: the connection ends with the answers that are due."""
        self._ignored_bytes = 0
        self._lingering = False
        self._why: HeadraceError | None = None
        self._last_words = b""
        """An error answer that waits until earlier requests are answered."""
        self._running: RequestResponseCycle | None = None
        self._stalled_at_s: float | None = None
        self._taken_bytes = 0

    # ------------------------------------------------------------ the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._outlet = _Outlet(self)
        self._socket: socket.socket | None = transport.get_extra_info("socket")
        transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        write_s = self.settings.write_timeout
        if self._socket is not None and self._socket.family != socket.AF_UNIX:
            with suppress(OSError):  # the client may be gone already
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
                # A client that has vanished (its power, its network) is noticed as one that does not read, only later.
                user_timeout_ms = int(1000 * (write_s + 2 * MAX_TICK_S))
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, user_timeout_ms)
        if len(self.connections) > self.settings.max_queued + SPARE_CONNECTIONS:
            self._deaf = True
            transport.write(self._answer(TooManyConnections("too many connections", retry_after_s=1)))
            transport.close()
        else:
            self._read_timer = self.loop.call_later(self.settings.header_timeout, self._read_timed_out)
        self._tick_s = min(MAX_TICK_S, write_s / 8)
        self._tick_timer = self.loop.call_later(self._tick_s, self._tick)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._read_timer, self._tick_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        self._unset_keepalive_if_required()
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            # uvicorn tells only the newest request, which with pipelining is not the one that is being answered.
            self._running.disconnected = True
            self._running.message_event.set()
            if isinstance(exc, TimeoutError):
                self._running.scope["state"]["closed_by"] = SLOW_CLIENT  # the kernel was the first to lose patience
        super().connection_lost(exc)
        self._running = None

    def shutdown(self) -> None:
        """The server is going: what is only waited for out of politeness ends."""
        if self._lingering:
            self.transport.close()
        else:
            super().shutdown()

    def is_closing(self) -> bool:
        return self._lingering or self.transport.is_closing()

    def finish(self) -> None:
        """Closes the connection after what is written. If the client may still be sending, it is heard out for a while:
        otherwise the kernel would answer it with a reset, which takes unread answers away."""
        if self.is_closing():
            return
        self._deaf = True
        self._stop_read_timer()
        self._unset_keepalive_if_required()
        if self._phase == IDLE or not self.transport.can_write_eof():
            self.transport.close()
            return
        self._lingering = True
        self.flow.resume_reading()
        self.transport.write_eof()
        self._linger_timer = self.loop.call_later(LINGER_S, self.transport.close)

    # ------------------------------------------------------------ reading

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            self._ignored_bytes += len(data)
            if self._ignored_bytes > MAX_IGNORED_BYTES and not self._lingering:
                self.transport.abort()
            return
        self._unset_keepalive_if_required()
        steps, self._told = self._steps, False
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            why, self._why = self._why, None
            self._refuse(why or RequestError(f"not HTTP/1.1: {error}"))
            return
        if self._told:
            self._silent_bytes = 0
        else:
            self._silent_bytes += len(data)
            if self._head_bytes + self._silent_bytes > MAX_HEAD_BYTES:
                self._refuse(HeadersTooLarge(f"headers: more than {MAX_HEAD_BYTES} bytes"))
                return
        if self._steps != steps:
            self._watch_reading()
        elif self._read_timer is None and self._phase == IDLE:
            # Empty lines before a request: they must not keep an idle connection open.
            self._read_timer = self.loop.call_later(self.settings.header_timeout, self._read_timed_out)

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                # An upgrade that nobody has to follow (h2c): the answer is HTTP/1.1, and so is what comes next.
                data = data[upgrade.args[0] :]
                if self._unframed:
                    self._reframe()
                if not data:
                    return

    def _reframe(self) -> None:
        """Another parser for the body of a request with an upgrade: httptools skips such a body, and would take it for
        the next request."""
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._muted = True
        self.parser.feed_data(b"POST / HTTP/1.1\r\n" + self._unframed + b"\r\n\r\n")
        self._muted, self._unframed = False, b""

    def _refuse(self, error: HeadraceError) -> None:
        """Answers what is being read with an error, after the answers due before it, and ends the connection."""
        logger.debug("refused: %s", error.code)
        self._deaf = True
        self._stop_read_timer()
        own = self.cycle if self._phase == BODY else None
        if own is not None and self.pipeline and self.pipeline[0][0] is own:
            self.pipeline.popleft()  # its request never became whole
            own = None
        running = self._running
        if running is not None and running is not own and not running.response_complete:
            self._last_words = self._answer(error)
            return
        if own is not None:
            begun = own.response_started
            own.disconnected = True
            own.message_event.set()
            if begun:
                self.finish()
                return
        if not self.is_closing():
            self.transport.write(self._answer(error))
            self._phase = BODY  # there may be more to come
            self.finish()

    def _answer(self, error: HeadraceError) -> bytes:
        body = openai_body(error)
        lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()]
        lines += [name + b": " + value for name, value in self.server_state.default_headers]
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "x-content-type-options": "nosniff",
            "connection": "close",
            **retry_headers(error),
        }
        if isinstance(error, MethodNotAllowed):
            headers["allow"] = METHODS
        if isinstance(error, UpgradeRefused):
            headers |= {"upgrade": "HTTP/1.1", "connection": "close, upgrade"}
        lines += [f"{name}: {value}".encode() for name, value in headers.items()]
        return b"\r\n".join([*lines, b"", body])

    # ------------------------------------------------------------ time to read

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _watch_reading(self) -> None:
        """Another part of a request is being read: its time begins."""
        self._stop_read_timer()
        if self._phase != IDLE:
            seconds = self.settings.header_timeout if self._phase == HEAD else self.settings.body_timeout
            self._read_timer = self.loop.call_later(seconds, self._read_timed_out)

    def _read_timed_out(self) -> None:
        self._read_timer = None
        if self._phase == HEAD:
            self._refuse(RequestTimeout(f"headers: not complete after {self.settings.header_timeout:g} s"))
        elif self._phase == BODY:
            if self.flow.read_paused:
                self._watch_reading()  # it is us who do not read
            else:
                self._refuse(RequestTimeout(f"body: not complete after {self.settings.body_timeout:g} s"))
        elif self._running is None or self._running.response_complete:
            self.finish()

    # ------------------------------------------------------------ time to write

    def _tick(self) -> None:
        """Ends a connection whose answer lies unread."""
        transport, now_s = self.transport, self.loop.time()
        if transport.get_write_buffer_size() == 0:
            self._stalled_at_s = None
        else:
            taken = self._taken()
            if self._stalled_at_s is None or taken - self._taken_bytes >= MIN_TAKEN_BYTES:
                self._stalled_at_s, self._taken_bytes = now_s, taken
            elif now_s - self._stalled_at_s >= self.settings.write_timeout:
                logger.info("%s: an answer lay unread for %g s", SLOW_CLIENT, self.settings.write_timeout)
                if self._running is not None:
                    self._running.scope["state"]["closed_by"] = SLOW_CLIENT
                if self._socket is not None:
                    # With a reset: otherwise what the kernel holds for the client stays there, and it sees no end.
                    self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                transport.abort()
                return
        self._tick_timer = self.loop.call_later(self._tick_s, self._tick)

    def _taken(self) -> int:
        """Bytes that the client's side has acknowledged; 0 where the kernel does not tell, so that only an emptied
        buffer counts."""
        if self._socket is None or self._socket.family == socket.AF_UNIX:
            return 0
        try:
            size = BYTES_ACKED_AT + BYTES_ACKED.size
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size)
            (taken,) = BYTES_ACKED.unpack_from(info, BYTES_ACKED_AT)
        except (OSError, struct.error):
            return 0
        return int(taken)

    # ------------------------------------------------------------ callbacks of the parser

    def _stop(self, error: HeadraceError) -> _Refused:
        self._why = error
        return _Refused()

    def _count(self, num_bytes: int) -> None:
        self._told = True
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            raise self._stop(HeadersTooLarge(f"headers: more than {MAX_HEAD_BYTES} bytes"))

    def on_message_begin(self) -> None:
        if self._muted:
            return
        self._told = True
        if len(self.pipeline) >= MAX_PIPELINED:
            # HTTP lets a server close after any answer; what it has not answered is the client's to send again.
            self.cycle.keep_alive = False
            raise self._stop(RequestError("requests: too many in a row without waiting for an answer"))
        self._phase, self._steps = HEAD, self._steps + 1
        self._head_bytes = self._num_headers = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if self._muted:
            return
        self._count(len(url))
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            raise self._stop(HeadersTooLarge(f"request target: more than {MAX_URL_BYTES} bytes"))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._muted:
            return
        self._count(len(name) + len(value) + 4)
        self._num_headers += 1
        if self._num_headers > MAX_HEADERS:
            raise self._stop(HeadersTooLarge(f"headers: more than {MAX_HEADERS}"))
        if self._phase == HEAD:  # trailers are not headers: what was decided on is not changed afterwards
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._muted:
            return
        self._told = True
        if (error := self._check_head()) is not None:
            raise self._stop(error)
        self._phase, self._steps = BODY, self._steps + 1
        if self.parser.should_upgrade():
            self._unframed = self._framing()
        super().on_headers_complete()
        cycle = self.cycle
        cycle.transport = self._outlet  # type: ignore[assignment]
        # uvicorn would not read on while this request waits for its turn, and so not notice that the client has left.
        self.flow.resume_reading()
        if self.expect_100_continue:
            # The body may never come, and where the next request begins would then be a guess.
            cycle.keep_alive = False
        if self.scope["http_version"] == "1.0":
            cycle.send = _unchunked(cycle)  # type: ignore[method-assign, assignment]

    def _check_head(self) -> HeadraceError | None:
        """What the parser lets pass and this server does not."""
        version, method = self.parser.get_http_version(), self.parser.get_method()
        if version not in ("1.0", "1.1"):
            return RequestError("HTTP version: allowed: 1.1, 1.0")
        if method in (b"CONNECT", b"TRACE"):
            return MethodNotAllowed(f"method: allowed: {METHODS}")
        target = self.url
        if not target.startswith(b"/") or target.startswith(b"//") or b"#" in target or not target.isascii():
            return RequestError("request target: allowed: an absolute path in ASCII, with one slash at its beginning")
        hosts, codings, upgrades = 0, [], []
        for name, value in self.headers:
            if name == b"host":
                hosts += 1
            elif name == b"transfer-encoding":
                codings.append(value.strip().lower())
            elif name == b"upgrade":
                upgrades.append(value.strip().lower())
            elif name == b"expect" and value.strip().lower() != b"100-continue":
                return RequestError("Expect: allowed: 100-continue")
        if hosts > 1 or (version == "1.1" and hosts == 0):
            return RequestError("Host: allowed: exactly one")
        if codings and (codings != [b"chunked"] or version == "1.0"):
            return RequestError("Transfer-Encoding: allowed: chunked, once, in HTTP/1.1")
        if any(b"websocket" in value for value in upgrades):
            return UpgradeRefused("no route speaks WebSocket; streams are server-sent events (stream: true)")
        return None

    def _framing(self) -> bytes:
        """The header that says how long the body is; empty where there is none."""
        for name, value in self.headers:
            if name == b"transfer-encoding" or (name == b"content-length" and int(value) > 0):
                return name + b": " + value
        return b""

    def _should_upgrade(self) -> bool:
        return False

    def on_chunk_header(self) -> None:
        """A chunk of a body, or its end."""
        self._told = True

    def on_body(self, body: bytes) -> None:
        self._told = True
        if self.cycle is not self._running and len(self.cycle.body) + len(body) > HIGH_WATER_BYTES:
            raise self._stop(BodyTooLarge(f"body: more than {HIGH_WATER_BYTES} bytes behind another request"))
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._told = True
        if self._unframed:
            return
        self._phase, self._steps = IDLE, self._steps + 1
        super().on_message_complete()

    # ------------------------------------------------------------ answering

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        if self._lingering:
            self.pipeline.clear()
        waiting = bool(self.pipeline)
        super().on_response_complete()
        if self._lingering:
            self._unset_keepalive_if_required()
        elif not waiting and self._last_words and not self.is_closing():
            self.transport.write(self._last_words)
            self._phase = BODY  # there may be more to come
            self.finish()


def _unchunked(cycle: RequestResponseCycle) -> Callable[[Any], Coroutine[Any, Any, None]]:
    """`cycle.send` for HTTP/1.0, which knows no chunks: a body of unknown length ends with the connection."""
    send = cycle.send
    unknown = False

    async def send_whole(message: Any) -> None:
        nonlocal unknown
        if message["type"] == "http.response.start":
            unknown = all(name.lower() != b"content-length" for name, _ in message.get("headers", []))
            if unknown:
                cycle.chunked_encoding = False
        elif unknown:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    return send_whole


def make_protocol(settings: ServeConfig) -> type[HttpToolsProtocol]:
    """The protocol class of a server with these settings, for uvicorn's `http`."""
    return type("Protocol", (_Protocol,), {"settings": settings})
