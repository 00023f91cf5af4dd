"""An OpenAI-compatible server, as its client sees it: an address, kept connections, one exchange after the other.

The standard library's own client reads the wire. No proxy is used and no redirect followed; https is checked against
the machine's own certificates.
"""

from __future__ import annotations

import base64
import re
import select
import socket
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import unquote

from headrace import __version__
from headrace.api.address import VISIBLE, read_address
from headrace.api.json import dump, read_object
from headrace.core.errors import ConfigError, InvalidJson

MAX_ANSWER_BYTES = 32 * 2**20
CONNECT_S = 10.0
_PIECE = 2**16
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?", re.ASCII)


class Server:
    """Where requests go, and what each of them carries."""

    def __init__(self, url: str, api_key: str = "") -> None:
        """`url`: the base of the routes; one that ends in /v1 names the same server as one that does not. Raises
        ConfigError, which never repeats a password or a key."""
        address = read_address(url)
        self.host, self.port, self.prefix = address.host, address.port, address.prefix
        self.url = address.url
        """The base of the routes, without credentials; equal for equal servers."""
        self.headers = {"Accept": "application/json", "User-Agent": f"headrace/{__version__}"}
        if authorization := _authorization(api_key, address.user, address.password):
            self.headers["Authorization"] = authorization
        self._context = ssl.create_default_context() if address.secure else None

    def connection(self) -> HTTPConnection:
        """A new one, not yet open."""
        if self._context is not None:
            return HTTPSConnection(self.host, self.port, timeout=CONNECT_S, context=self._context)
        return HTTPConnection(self.host, self.port, timeout=CONNECT_S)

    def ask(self, path: str, seconds: float) -> Exchange:
        """GET, on a connection of its own, and no longer than so many seconds."""
        exchange = Exchange("GET", path)
        connection = Connection(self, seconds)

        def carry_out() -> None:
            connection.carry_out(exchange)
            connection.close()

        thread = threading.Thread(target=carry_out, name="headrace-ask", daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            exchange.cut()
            exchange = Exchange("GET", path)
            exchange.failure = f"no answer within {seconds:g} s"
        return exchange


def _authorization(api_key: str, user: str | None, password: str | None) -> str:
    """The header's value. Raises ConfigError."""
    if api_key:
        if user is not None:
            raise ConfigError("the server's URL names a user, and there is an API key: allowed: one of the two")
        if not VISIBLE.fullmatch(api_key):
            raise ConfigError("the API key has characters that a header cannot carry, allowed: visible ASCII")
        return f"Bearer {api_key}"
    if user is None:
        return ""
    pair = f"{unquote(user)}:{unquote(password or '')}".encode()
    return f"Basic {base64.b64encode(pair).decode()}"


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that came whole."""

    status: int
    body: dict[str, Any] | None
    """None: it is no JSON object, for the reason in `problem`."""
    text: str
    """The body again, as one line of ASCII; else the beginning of what came instead."""
    problem: str = ""
    retry_after_s: float | None = None
    may_retry: bool = True
    """Whether the server does not say that it would be in vain."""
    location: str = ""
    """Where a redirect points."""


class Exchange:
    """A request, and then what came of it. Made in one thread, carried out in another, cut in the first."""

    def __init__(self, method: str, path: str, data: bytes | None = None) -> None:
        self.method = method
        self.path = path
        self.data = data
        self.began_s = time.monotonic()
        self.reply: Reply | None = None
        self.failure = ""
        """Why there is no reply."""
        self.too_large = False
        self._lock = threading.Lock()
        self._cut = False
        self._sock: socket.socket | None = None

    def hold(self, sock: socket.socket) -> None:
        """What it goes over from now on. Raises ConnectionAbortedError if it is cut already."""
        with self._lock:
            if self._cut:
                raise ConnectionAbortedError("cut")
            self._sock = sock

    def let_go(self) -> None:
        with self._lock:
            self._sock = None

    def cut(self) -> None:
        """Ends it, at whatever point it is."""
        with self._lock:
            self._cut = True
            if self._sock is not None:
                with suppress(OSError):  # it may have ended by itself
                    # Of the plain socket: TLS would want to say goodbye, and wait for an answer.
                    socket.socket.shutdown(self._sock, socket.SHUT_RDWR)


class _TooLarge(Exception):
    pass


class Connection:
    """One connection at a time to a server, kept from one exchange to the next."""

    def __init__(self, server: Server, timeout_s: float) -> None:
        """`timeout_s`: most seconds that nothing moves."""
        self._server = server
        self._timeout_s = timeout_s
        self._http: HTTPConnection | None = None

    def carry_out(self, exchange: Exchange) -> None:
        """Puts the reply, or why there is none, into the exchange."""
        try:
            http = self._open()
            # From here on it can be cut. The connection itself forgets its socket where the answer's end is its own.
            exchange.hold(http.sock)
            response = self._request(http, exchange)
            exchange.reply = read_reply(response, _read(response))
            if response.will_close:
                self.close()
        except _TooLarge:
            exchange.too_large = True
            exchange.failure = f"the answer is larger than {MAX_ANSWER_BYTES} bytes"
            self.close()
        except (OSError, HTTPException, ValueError) as error:  # ValueError: a name that is no host's
            exchange.failure = _reason(error)
            self.close()
        finally:
            exchange.let_go()

    def _open(self) -> HTTPConnection:
        http = self._http
        if http is not None and http.sock is not None and _is_quiet(http.sock):
            return http
        self.close()
        self._http = http = self._server.connection()
        if http.sock is None:
            http.connect()
        http.sock.settimeout(self._timeout_s)
        return http

    def _request(self, http: HTTPConnection, exchange: Exchange) -> HTTPResponse:
        headers = self._server.headers
        if exchange.data is not None:
            headers = {**headers, "Content-Type": "application/json"}
        # The server may have answered before it had read all; if it has not, to read fails as well.
        with suppress(BrokenPipeError, ConnectionResetError):
            http.request(exchange.method, self._server.prefix + exchange.path, exchange.data, headers)
        return http.getresponse()

    def close(self) -> None:
        http, self._http = self._http, None
        if http is not None:
            http.close()


def _is_quiet(sock: socket.socket) -> bool:
    """Whether nothing has come since the last answer: what has come is the connection's end."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return not poll.poll(0)


def _read(response: HTTPResponse) -> bytes:
    parts: list[bytes] = []
    size = 0
    while part := response.read(_PIECE):
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            raise _TooLarge
        parts.append(part)
    if response.length:  # so many bytes of Content-Length are missing
        raise IncompleteRead(b"", response.length)
    return b"".join(parts)


def _reason(error: Exception) -> str:
    """One line, fit for a user."""
    if isinstance(error, IncompleteRead):
        return "the connection ended inside the answer"
    if isinstance(error, TimeoutError):
        return "timed out"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def read_reply(response: HTTPResponse, data: bytes) -> Reply:
    """What came, read strictly."""
    headers = response.headers
    retry_after_s = _seconds(headers.get("Retry-After"))
    may_retry = (headers.get("x-should-retry") or "").strip().lower() != "false"
    location = (headers.get("Location") or "")[:200]
    status, extra = response.status, (retry_after_s, may_retry, location)
    try:
        body = read_object(data.decode())
        return Reply(status, body, dump(body), "", *extra)
    except UnicodeDecodeError:
        problem = "not UTF-8"
    except RecursionError:
        problem = "the JSON is nested too deeply"
    except InvalidJson as error:
        problem = str(error)
    return Reply(status, None, data[:_PIECE].decode(errors="replace"), problem, *extra)


def _seconds(value: str | None) -> float | None:
    """Of Retry-After: seconds or a date (RFC 9110, section 10.2.3). None for anything else."""
    text = (value or "").strip()
    if _SECONDS.fullmatch(text):
        return float(text)
    try:
        when = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    when = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


class Senders:
    """Threads that carry out exchanges, each over a connection of its own; there are as many as are needed at once."""

    def __init__(self, server: Server, timeout_s: float) -> None:
        self._server = server
        # What is late is cut by whoever submitted it; this is for what cannot be cut.
        self._timeout_s = timeout_s + CONNECT_S
        self._jobs: SimpleQueue[Exchange | None] = SimpleQueue()
        self._done: SimpleQueue[Exchange] = SimpleQueue()
        self._num_threads = self._num_free = 0

    def submit(self, exchange: Exchange) -> None:
        if self._num_free:
            self._num_free -= 1
        else:
            self._num_threads += 1
            # Not waited for at the end: one that looks up a name cannot be cut.
            threading.Thread(target=self._work, name="headrace-send", daemon=True).start()
        self._jobs.put(exchange)

    def take(self, seconds: float) -> Exchange | None:
        """The next one that is over, in at most so many seconds."""
        try:
            exchange = self._done.get(timeout=max(0.0, seconds))
        except Empty:
            return None
        self._num_free += 1
        return exchange

    def close(self) -> None:
        """The threads end once they have nothing left to carry out."""
        for _ in range(self._num_threads):
            self._jobs.put(None)

    def _work(self) -> None:
        connection = Connection(self._server, self._timeout_s)
        while (exchange := self._jobs.get()) is not None:
            connection.carry_out(exchange)
            self._done.put(exchange)
        connection.close()
