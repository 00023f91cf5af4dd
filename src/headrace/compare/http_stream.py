"""One HTTP exchange after the other with a server, its answer read piece by piece as it comes (RFC 9112, and the event
stream format of the HTML standard). No proxy is used and no redirect followed."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from headrace import __version__
from headrace.api.address import ALLOWED, VISIBLE, read_address
from headrace.core.errors import ConfigError

CONNECT_S, SILENCE_S = 30.0, 600.0
"""Most seconds to open a connection, and between two pieces of an answer."""
MAX_BODY = 32 * 2**20
"""Bytes of one answer."""
MAX_LINE = 2**20
"""Bytes of one line of it."""
MAX_HEADERS = 256
_PIECE = 2**16


class BrokenStream(Exception):
    """What came is no answer, or not the whole of it; the message is a few words."""


@dataclass(frozen=True, slots=True)
class Response:
    """An answer whose body is still to come."""

    status: int
    headers: Mapping[str, str]
    """Names in small letters."""
    reader: asyncio.StreamReader

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises BrokenStream or OSError."""
        size = 0
        async for piece in self._pieces():
            size += len(piece)
            if size > MAX_BODY:
                raise BrokenStream(f"the answer is larger than {MAX_BODY} bytes")
            yield piece

    async def _pieces(self) -> AsyncIterator[bytes]:
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            while size := _number(await read_line(self.reader), 16):
                if size > MAX_BODY:
                    raise BrokenStream(f"the answer is larger than {MAX_BODY} bytes")
                yield await _read(self.reader.readexactly(size))
                await read_line(self.reader)
            return
        length = self.headers.get("content-length")
        left = None if length is None else _number(length, 10)
        while left != 0:
            piece = await _read(self.reader.read(_PIECE if left is None else min(left, _PIECE)))
            if not piece:
                if left is None:
                    return
                raise BrokenStream("the connection ended inside the answer")
            left = None if left is None else left - len(piece)
            yield piece

    async def whole(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])

    async def events(self) -> AsyncIterator[str]:
        """The data of each server-sent event. Raises BrokenStream or OSError."""
        data: list[str] = []
        rest = b""
        async for piece in self.pieces():
            *lines, rest = (rest + piece).split(b"\n")
            if len(rest) > MAX_LINE:
                raise BrokenStream(f"a line is longer than {MAX_LINE} bytes")
            for line in lines:
                text = line.removesuffix(b"\r").decode(errors="replace")
                if text.startswith("data:"):
                    data.append(text.removeprefix("data:").removeprefix(" "))
                elif not text and data:
                    yield "\n".join(data)
                    data = []


class Server:
    """Where requests go, and what each of them carries."""

    def __init__(self, url: str, api_key: str = "") -> None:
        """`url`: the base of the routes; one that ends in /v1 names the same server as one that does not. `api_key`:
        sent as a bearer's; empty: none. Raises ConfigError, which never repeats a secret."""
        address = read_address(url)
        if address.user is not None or address.password is not None:
            raise ConfigError(f"the server's URL names a user, which would stand in every report, allowed: {ALLOWED}")
        if api_key and not VISIBLE.fullmatch(api_key):
            raise ConfigError("the API key has characters that a header cannot carry, allowed: visible ASCII")
        self._host, self._port, self._prefix = address.host, address.port, address.prefix
        self._authority = address.authority
        self.url = address.url
        """The base of the routes."""
        self._authorization = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._context = ssl.create_default_context() if address.secure else None

    @asynccontextmanager
    async def exchange(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[Response]:
        """A request on a connection of its own, and its answer. Raises BrokenStream or OSError."""
        reader, writer = await self._connect()
        try:
            writer.write(self._head(method, path, len(body)) + body)
            # The server may have answered before it had read all; if it has not, to read fails as well.
            with suppress(BrokenPipeError, ConnectionResetError):
                await writer.drain()
            yield await read_head(reader)
        finally:
            # Not `close`: what is still to come is not waited for.
            writer.transport.abort()
            with suppress(OSError):
                await writer.wait_closed()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            async with asyncio.timeout(CONNECT_S):
                return await asyncio.open_connection(self._host, self._port, ssl=self._context, limit=MAX_LINE)
        except TimeoutError:
            raise BrokenStream(f"cannot be reached: no connection within {CONNECT_S:g} s") from None
        except OSError as error:
            # The event loop has texts of its own for what the system refuses; names and TLS have numbers of their own.
            systems = not isinstance(error, (socket.gaierror, ssl.SSLError))
            reason = os.strerror(error.errno) if error.errno and systems else error.strerror or str(error)
            raise BrokenStream(f"cannot be reached: {reason}") from error

    def _head(self, method: str, path: str, length: int) -> bytes:
        kind = f"Content-Type: application/json\r\nContent-Length: {length}\r\n" if length else ""
        return (
            f"{method} {self._prefix}{path} HTTP/1.1\r\nHost: {self._authority}\r\nAccept: */*\r\n"
            f"User-Agent: headrace/{__version__}\r\nConnection: close\r\n{self._authorization}{kind}\r\n"
        ).encode("ascii")


async def read_head(reader: asyncio.StreamReader) -> Response:
    """Status line and headers. Raises BrokenStream or OSError."""
    while True:
        version, _, rest = (await read_line(reader)).partition(" ")
        status = rest[:3]
        if not version.startswith("HTTP/1.") or not (status.isascii() and status.isdecimal() and len(status) == 3):
            raise BrokenStream("what answers does not speak HTTP")
        headers: dict[str, str] = {}
        for _ in range(MAX_HEADERS):
            line = await read_line(reader)
            if not line:
                break
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        else:
            raise BrokenStream(f"the answer has more than {MAX_HEADERS} headers")
        if int(status) >= 200:  # those below announce another
            return Response(int(status), headers, reader)


async def read_line(reader: asyncio.StreamReader) -> str:
    """Without its end. Raises BrokenStream or OSError."""
    try:
        line = await _read(reader.readline())
    except ValueError:
        raise BrokenStream(f"a line is longer than {MAX_LINE} bytes") from None
    if not line.endswith(b"\n"):
        raise BrokenStream("the connection ended inside the answer")
    return line.decode("latin-1").rstrip("\r\n")


async def _read(reading: Awaitable[bytes]) -> bytes:
    try:
        async with asyncio.timeout(SILENCE_S):
            return await reading
    except asyncio.IncompleteReadError:
        raise BrokenStream("the connection ended inside the answer") from None
    except TimeoutError:
        raise BrokenStream(f"nothing came for {SILENCE_S:g} s") from None


def _number(text: str, base: int) -> int:
    """Of a chunk's size, whose extensions are passed over, or of Content-Length. Raises BrokenStream."""
    digits = text.partition(";")[0].strip()
    if not digits.isascii() or not digits.isalnum() or len(digits) > 16:
        raise BrokenStream("the answer's length cannot be read")
    try:
        return int(digits, base)
    except ValueError:
        raise BrokenStream("the answer's length cannot be read") from None
