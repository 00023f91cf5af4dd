"""A picture from the web, without becoming somebody's way into a private network.

A host's name is resolved once, every address it has must be public, and the connection goes to an address that was
checked: a name that resolves otherwise a moment later changes nothing. Redirects are followed by hand, checked anew.
One deadline holds from the first lookup to the last byte. Proxies, cookies and credentials are not known here.
"""

from __future__ import annotations

import contextlib
import io
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import TYPE_CHECKING, cast
from urllib.parse import urljoin

from headrace.core.errors import InvalidImage
from headrace.media.address import CHARACTERS, Address, Refusal, is_public, read_url

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PIECE = 65_536
HEADER_ROOM = 262_144
"""Bytes of an answer, of all hops, that are not the picture: headers, and the frames of chunks."""
MOST_REDIRECTS = 3
MOST_ADDRESSES = 4
"""Of a host, that are tried."""
REDIRECTS = (301, 302, 303, 307, 308)
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
LENGTH = re.compile(r"[0-9]{1,15}")


def system_addresses(host: str, port: int) -> Sequence[str]:
    """The IP addresses of a name, as the system resolves it. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(one[4][0]) for one in found))


def open_socket(address: str, port: int, timeout_s: float) -> socket.socket:
    """A connection to an IP address. Raises OSError."""
    return socket.create_connection((address, port), timeout_s)


@dataclass(frozen=True, slots=True)
class Network:
    """What a fetch needs of the system; tests have their own."""

    resolve: Callable[[str, int], Sequence[str]] = system_addresses
    connect: Callable[[str, int, float], socket.socket] = open_socket
    tls: Callable[[], ssl.SSLContext] = ssl.create_default_context


@dataclass(frozen=True, slots=True)
class Deadline:
    """On the monotonic clock."""

    end_s: float

    def left(self) -> float:
        """Seconds. Raises TimeoutError where there are none."""
        left = self.end_s - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def fetch(url: str, most_bytes: int, timeout_s: float, ports: tuple[int, ...], network: Network, field: str) -> bytes:
    """The body of the answer to a GET. Raises InvalidImage, which names `field`, whatever goes wrong."""
    deadline = Deadline(time.monotonic() + timeout_s)
    try:
        here = url
        for _ in range(1 + MOST_REDIRECTS):
            answer = _ask(read_url(here, ports), most_bytes, deadline, network)
            if isinstance(answer, bytes):
                return answer
            here = answer.location if SCHEME.match(answer.location) else urljoin(here, answer.location)
        raise Refusal(f"at most {MOST_REDIRECTS} redirects")
    except Refusal as refusal:
        raise InvalidImage(field, url, str(refusal)) from None
    except TimeoutError:
        raise InvalidImage(field, url, f"a server that sends the picture within {timeout_s:g} s") from None
    except (OSError, HTTPException, ValueError) as error:
        raise InvalidImage(field, url, "a server that can be reached and answers in good HTTP") from error


@dataclass(frozen=True, slots=True)
class _Redirect:
    location: str


class _Wire(io.RawIOBase):
    """What a socket sends, until the deadline or too many bytes; has the one call that HTTPResponse makes."""

    def __init__(self, connection: socket.socket, most_bytes: int, deadline: Deadline) -> None:
        super().__init__()
        self._connection = connection
        self._left = most_bytes
        self._deadline = deadline

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        self._connection.settimeout(self._deadline.left())
        count = self._connection.recv_into(buffer)
        self._left -= count
        if self._left < 0:
            raise Refusal("an answer that is no longer than a picture may be")
        return count


def _ask(address: Address, most_bytes: int, deadline: Deadline, network: Network) -> bytes | _Redirect:
    with contextlib.closing(_connection(address, deadline, network)) as connection:
        connection.settimeout(deadline.left())
        connection.sendall(
            f"GET {address.target} HTTP/1.1\r\nHost: {address.host_header}\r\nUser-Agent: headrace\r\n"
            "Accept: image/*\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n".encode("ascii")
        )
        wire = _Wire(connection, most_bytes + HEADER_ROOM, deadline)
        with contextlib.closing(HTTPResponse(cast(socket.socket, wire), method="GET")) as response:
            response.begin()
            if response.status in REDIRECTS:
                return _redirect(response)
            if response.status != 200:
                raise Refusal(f"a server that answers 200 (this one: {response.status})")
            return _body(response, most_bytes)


def _connection(address: Address, deadline: Deadline, network: Network) -> socket.socket:
    """To an address of the host that was checked; with TLS, to who can prove the host's name."""
    found = [address.host] if address.literal else _resolved(address, deadline, network)
    if not found or not all(is_public(one) for one in found):
        raise Refusal("a host with public addresses only")
    found = found[:MOST_ADDRESSES]
    for remaining, one in zip(range(len(found), 0, -1), found, strict=True):
        try:
            plain = network.connect(one, address.port, deadline.left() / remaining)
            break
        except OSError:
            if remaining == 1:
                raise
    if not address.secure:
        return plain
    try:
        plain.settimeout(deadline.left())
        return network.tls().wrap_socket(plain, server_hostname=address.host)
    except BaseException:
        plain.close()
        raise


def _resolved(address: Address, deadline: Deadline, network: Network) -> list[str]:
    """In a thread of its own: a lookup knows no timeout."""
    answers: queue.SimpleQueue[Sequence[str] | Exception] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            answers.put(network.resolve(address.host, address.port))
        except (OSError, ValueError) as error:
            answers.put(error)

    threading.Thread(target=look_up, name="headrace-resolve", daemon=True).start()
    try:
        answer = answers.get(timeout=deadline.left())
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, Exception):
        raise answer
    return list(answer)


def _redirect(response: HTTPResponse) -> _Redirect:
    found = response.headers.get_all("Location", [])
    if len(found) != 1 or not CHARACTERS.fullmatch(found[0]):
        raise Refusal("redirects to one good URL")
    return _Redirect(found[0])


def _body(response: HTTPResponse, most_bytes: int) -> bytes:
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Refusal("an answer that is not compressed")
    lengths = response.headers.get_all("Content-Length", [])
    if len(set(lengths)) > 1 or not all(LENGTH.fullmatch(one) for one in lengths):
        raise Refusal("an answer of one length")
    expected = None if response.chunked or not lengths else int(lengths[0])
    if (expected or 0) > most_bytes:
        raise Refusal(f"at most {most_bytes} bytes")
    body = bytearray()
    while piece := response.read(PIECE):
        body += piece
        if len(body) > most_bytes:
            raise Refusal(f"at most {most_bytes} bytes")
    if expected is not None and len(body) != expected:
        raise Refusal("an answer as long as it says")
    return bytes(body)
