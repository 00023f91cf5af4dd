"""Who comes in, and with what: the outermost layer of the application, and the one way to read a JSON body."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
import re
import secrets
import sys
import time
from collections.abc import Awaitable, MutableMapping
from typing import Any, Protocol

import numpy as np
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.api.json import dump, read_object
from headrace.core.errors import (
    BodyTooLarge,
    ClientGone,
    HeadraceError,
    InvalidJson,
    NotReady,
    QueueFull,
    ShuttingDown,
    Unauthorized,
    UnsupportedMediaType,
)
from headrace.server.config import ServeConfig
from headrace.server.errors import UNEXPECTED, error_response
from headrace.server.page_routes import OPEN_PATHS, wants_page

MAX_DEPTH = 64
"""Deepest nesting of a JSON body."""
MAX_CONTAINERS = 50_000
"""Most objects and arrays in a JSON body: making a million of them stops every stream for a tenth of a second."""
THREAD_BYTES = 64 * 1024
"""Bodies above this are parsed in a thread: 2 MB take up to 90 ms. The parser keeps the interpreter to itself, but not
while it calls our checks of numbers and keys, and those are what takes long."""
BLOCK_BYTES = 64 * 1024
"""Of a body, looked at together when nesting is counted."""
MAX_LABEL = 64
"""Characters of a client's own request id, and of a path, in the log."""
MAX_LOGGED_PATH = 256
KEYLESS = frozenset({"/health/live", "/health/ready"})
NO_SNIFFING = (b"x-content-type-options", b"nosniff")
WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
GENERATING = frozenset({"/v1/completions", "/v1/chat/completions", "/generate", "/generate_stream", "/"})
"""Routes whose every POST needs a place in the engine."""
READ_BYTES = 64 * 1024
"""A body of up to this much is read although it is refused, so that its connection can serve the next request."""
CORS_HEADERS = ("authorization", "content-type", "x-request-id", "x-request-timeout")
CORS_EXPOSED = ("x-request-id", "retry-after", "x-headrace-ignored")

logger = logging.getLogger("headrace.http")

# Of one byte of JSON outside strings: how much deeper it leads.
_DEEPER = np.array([(chr(byte) in "[{") - (chr(byte) in "]}") for byte in range(256)], np.int8)
_DEEPER.flags.writeable = False

# After removal of escaped backslashes: one half of a surrogate pair without the other.
_LONE_SURROGATE = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD])[c-fC-F])"
)


class Guarded(Protocol):
    """What the guard reads of the service."""

    settings: ServeConfig
    draining: bool

    def admit(self, count: int) -> None:
        """Raises ShuttingDown, NotReady or QueueFull where `count` requests cannot come in now."""


class Guard:
    """The outermost ASGI application: request ids, keys, kinds and sizes of bodies, shutting down, the last word on
    errors, the access log. Whatever it refuses has done no work yet.

    For the application inside it sets `scope["state"]`: `request_id` (128 bits, hex) and `key_salt` (of the caller's
    key; empty where no key is asked for)."""

    def __init__(self, app: ASGIApp, service: Guarded) -> None:
        settings = service.settings
        self._app = app
        self._service = service
        self._keys = tuple(hashlib.sha256(key.encode()).digest() for key in settings.api_key)
        self._secret = secrets.token_bytes(32)
        self._access = _access_logger() if settings.access_log else None
        # Inside CORS, so that a page can read refusals too, and that what browsers ask first needs no key.
        self._inner: ASGIApp = self._admit
        if settings.cors_origin:
            self._inner = CORSMiddleware(
                self._admit,
                allow_origins=settings.cors_origin,
                allow_methods=("GET", "POST"),
                allow_headers=CORS_HEADERS,
                expose_headers=CORS_EXPOSED,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        began_s = time.monotonic()
        request_id = secrets.token_hex(16)
        state = scope.setdefault("state", {})
        state["request_id"], state["key_salt"] = request_id, ""
        answer = _Answer(send, request_id, count_bytes=self._access is not None)
        try:
            await self._inner(scope, receive, answer.send)
        except (ClientDisconnect, ClientGone):
            pass  # nobody is left to be told
        except HeadraceError as error:
            await self._answer_error(error, answer, scope, receive)
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException:  # what extensions panic with is no Exception
            logger.exception("unexpected error in request %s", request_id)
            await self._answer_error(HeadraceError(UNEXPECTED), answer, scope, receive)
        finally:
            if self._access is not None:
                self._log(scope, answer, time.monotonic() - began_s)

    async def _answer_error(self, error: HeadraceError, answer: _Answer, scope: Scope, receive: Receive) -> None:
        if answer.status == 0:
            await error_response(error, scope["path"])(scope, receive, answer.send)
        else:
            # If it is not complete, the connection is cut: a client must not take half an answer for the whole.
            logger.warning("request %s failed after its answer had begun: %s", answer.request_id, error.code)

    # ------------------------------------------------------------ who comes in

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _Headers(scope)
        try:
            self._authenticate(scope, headers)
            if self._service.draining and not _is_health(scope):
                raise ShuttingDown("the server is shutting down", retry_after_s=5)
            if scope["method"] in WITH_BODY:
                _check_kind(headers)
            receive = self._limited(headers, receive)
            if scope["method"] == "POST" and scope["path"] in GENERATING:
                # A body asks for at least one: while there is no room for that, it need not be looked at.
                self._service.admit(1)
        except HeadraceError as error:
            response = error_response(error, scope["path"])
            if isinstance(error, Unauthorized):
                response.headers["www-authenticate"] = "Bearer"
            if isinstance(error, NotReady | QueueFull) and headers.length <= READ_BYTES:
                await Request(scope, receive).body()
            elif headers.has_body:
                # The body stays unread: the connection cannot serve another request.
                response.headers["connection"] = "close"
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _authenticate(self, scope: Scope, headers: _Headers) -> None:
        """Raises Unauthorized. Decides on the path that routes are chosen by."""
        if not self._keys or _is_open(scope, headers):
            return
        given = headers.all(b"authorization")
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        key = key.strip()
        digest = hashlib.sha256(key).digest()
        # Every key is compared, in constant time.
        matches = sum(hmac.compare_digest(digest, known) for known in self._keys)
        if scheme.lower() != b"bearer" or not matches:
            raise Unauthorized("a key is needed: Authorization: Bearer KEY")
        scope["state"]["key_salt"] = hmac.new(self._secret, key, hashlib.sha256).hexdigest()

    def _limited(self, headers: _Headers, receive: Receive) -> Receive:
        """Raises BodyTooLarge where the length is told beforehand; otherwise the returned `receive` does."""
        limit = self._service.settings.max_body_bytes
        length = headers.one(b"content-length")
        if length is not None:
            if int(length) > limit:
                raise _too_large(limit)
            return receive  # the server reads no more than it was told
        if headers.one(b"transfer-encoding") is None:
            return receive
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > limit:
                raise _too_large(limit)
            return message

        return counted

    def _log(self, scope: Scope, answer: _Answer, seconds: float) -> None:
        line: dict[str, object] = {
            "time": round(time.time(), 3),
            "request_id": answer.request_id,
            "method": scope["method"],
            "path": scope["path"][:MAX_LOGGED_PATH],
            "status": answer.status or 499,
            "seconds": round(seconds, 6),
            "bytes": answer.num_bytes,
        }
        label = _Headers(scope).one(b"x-request-id")
        if label:
            line["label"] = label.decode("latin-1")[:MAX_LABEL]
        if closed_by := scope["state"].get("closed_by"):
            line["closed_by"] = closed_by
        if self._access is not None:
            self._access.info(dump(line))


class _Answer:
    """Passes an answer on, with headers that every answer has."""

    __slots__ = ("_count_bytes", "_send", "num_bytes", "request_id", "status")

    def __init__(self, send: Send, request_id: str, *, count_bytes: bool) -> None:
        self._send = send
        self._count_bytes = count_bytes
        self.request_id = request_id
        self.status = 0
        """0: nothing was sent yet."""
        self.num_bytes = 0

    def send(self, message: MutableMapping[str, Any]) -> Awaitable[None]:
        """Not a coroutine itself: what is sent once a token goes through here."""
        if message["type"] == "http.response.body":
            if self._count_bytes:
                self.num_bytes += len(message.get("body", b""))
        elif message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", []), (b"x-request-id", self.request_id.encode())]
            if all(name != NO_SNIFFING[0] for name, _ in headers):
                headers.append(NO_SNIFFING)
            message = {**message, "headers": headers}
        return self._send(message)


class _Headers:
    """Headers of a request, as bytes."""

    __slots__ = ("_pairs",)

    def __init__(self, scope: Scope) -> None:
        self._pairs: list[tuple[bytes, bytes]] = scope["headers"]

    def all(self, name: bytes) -> list[bytes]:
        return [value for key, value in self._pairs if key == name]

    def one(self, name: bytes) -> bytes | None:
        """The first of that name."""
        return next((value for key, value in self._pairs if key == name), None)

    @property
    def length(self) -> float:
        """Bytes of the body; infinite where that is not told beforehand."""
        length = self.one(b"content-length")
        if length is not None:
            return int(length)
        return 0 if self.one(b"transfer-encoding") is None else math.inf

    @property
    def has_body(self) -> bool:
        return self.one(b"transfer-encoding") is not None or self.one(b"content-length") not in (None, b"0")


def _is_open(scope: Scope, headers: _Headers) -> bool:
    """Whether a route needs no key: what watches the server, and the page's files."""
    path = scope["path"]
    if scope["method"] not in ("GET", "HEAD"):
        return False
    if path == "/":
        return wants_page((headers.one(b"accept") or b"").decode("latin-1"))
    return path in KEYLESS or path in OPEN_PATHS


def _is_health(scope: Scope) -> bool:
    """Routes that answer while the server is shutting down: they are how that is seen."""
    path = scope["path"]
    if path == "/":
        return scope["method"] in ("GET", "HEAD")
    return path in ("/health", "/ping", "/metrics") or path.startswith("/health/")


def _check_kind(headers: _Headers) -> None:
    """Raises UnsupportedMediaType unless the body is JSON in UTF-8, or says nothing of itself."""
    kinds = headers.all(b"content-type")
    if any(value.strip().lower() not in (b"", b"identity") for value in headers.all(b"content-encoding")):
        raise UnsupportedMediaType("Content-Encoding: allowed: identity")
    if not kinds:
        return
    kind, *parameters = kinds[0].lower().split(b";")
    kind = kind.strip()
    is_json = kind == b"application/json" or (kind.startswith(b"application/") and kind.endswith(b"+json"))
    if len(kinds) > 1 or not is_json:
        raise UnsupportedMediaType("Content-Type: allowed: application/json")
    for parameter in parameters:
        name, _, value = parameter.partition(b"=")
        if name.strip() == b"charset" and value.strip(b' "') not in (b"utf-8", b"utf8", b"us-ascii"):
            raise UnsupportedMediaType("Content-Type: allowed: charset=utf-8")


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"body: more than {limit} bytes (max_body_mib)")


def _access_logger() -> logging.Logger:
    """JSON lines on stderr, in no one else's hierarchy of loggers."""
    made = logging.Logger("headrace.access", logging.INFO)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    made.addHandler(handler)
    return made


# ---------------------------------------------------------------- bodies


async def read_json(request: Request, limit_bytes: int, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """The JSON object of a request's body.

    Raises BodyTooLarge above `limit_bytes`, InvalidJson where the body is not UTF-8, not a JSON object, nested deeper
    than `max_depth`, or holds what is no text (lone surrogates) or no number (NaN, 1e999), and starlette's
    ClientDisconnect.
    """
    pieces: list[bytes] = []
    num_bytes = 0
    async for piece in request.stream():
        num_bytes += len(piece)
        if num_bytes > limit_bytes:
            raise _too_large(limit_bytes)
        pieces.append(piece)
    body = b"".join(pieces)
    pieces.clear()  # a body with images is long: it is held once
    if num_bytes > THREAD_BYTES:
        return await asyncio.to_thread(parse_body, body, max_depth)
    return parse_body(body, max_depth)


def parse_body(body: bytes, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """The JSON object in a body. Raises InvalidJson; takes time linear in the body's length, whatever is in it."""
    if not body.lstrip(b" \t\r\n").startswith(b"{"):
        raise InvalidJson("the body is empty" if not body else "the body is not a JSON object")
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise InvalidJson(f"not UTF-8 at byte {error.start}") from None
    check_nesting(body, max_depth)
    if b"\\u" in body and _LONE_SURROGATE.search(body.replace(rb"\\", b"")):
        raise InvalidJson("a lone surrogate (\\ud800 to \\udfff) is not a character")
    return read_object(text)


def check_nesting(body: bytes, max_depth: int) -> None:
    """Raises InvalidJson where arrays and objects lie deeper than `max_depth` in one another, or are too many."""
    most = body.count(b"[") + body.count(b"{")
    if most <= max_depth:
        return
    # Without escapes, a quote always begins or ends a string.
    plain = np.frombuffer(body.replace(rb"\\", b"").replace(rb"\"", b""), np.uint8)
    inside, depth, containers = 0, 0, 0
    for at in range(0, len(plain), BLOCK_BYTES):
        block = plain[at : at + BLOCK_BYTES]
        quotes = (block == ord('"')).view(np.uint8)
        quotes[0] ^= inside
        strings = np.bitwise_xor.accumulate(quotes)
        steps = _DEEPER[block] * (1 - strings.view(np.int8))
        inside = int(strings[-1])
        depths = np.cumsum(steps, dtype=np.int32)
        containers += int(np.count_nonzero(steps == 1))
        if depth + int(depths.max()) > max_depth:
            raise InvalidJson(f"nested deeper than {max_depth} levels")
        if containers > MAX_CONTAINERS:
            raise InvalidJson(f"more than {MAX_CONTAINERS} arrays and objects")
        depth += int(depths[-1])
