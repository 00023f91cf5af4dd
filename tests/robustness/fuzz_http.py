"""More requests of `fuzz`: what breaks HTTP itself, and what is too deep, too large or too long."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from tests.robustness.attack_client import MIB, request
from tests.robustness.fuzz_cases import ANY, MAX_BODY, TIMEOUT, Case, Route, with_value

Way = Callable[[random.Random, bytes, bytes], bytes]
"""From a path and a good body: the bytes of a request."""


# ---------------------------------------------------------------- HTTP itself


def http_cases(draw: random.Random, routes: Sequence[Route], count: int) -> Iterator[Case]:
    """What is no HTTP/1.1, or more than a server should take."""
    for _ in range(count):
        route = draw.choice(routes)
        path, body = route.path.replace("{model}", "demo"), json.dumps(dict(route.good)).encode()
        name = draw.choice(sorted(HTTP_WAYS))
        yield Case(f"HTTP: {name} on {path}", HTTP_WAYS[name](draw, path.encode(), body), fresh=True)


def _post(
    path: bytes, *lines: bytes, body: bytes = b"", host: bytes = b"Host: a\r\n", version: bytes = b"1.1"
) -> bytes:
    head = b"POST " + path + b" HTTP/" + version + b"\r\n" + host + b"Content-Type: application/json\r\n"
    return head + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


def _lines(*lines: bytes) -> Way:
    """A POST with these headers, a body and its length."""

    def make(draw: random.Random, path: bytes, body: bytes) -> bytes:
        return _post(path, *lines, b"Content-Length: %d" % len(body), body=body)

    return make


def _framed(*lines: bytes, body: bytes = b"") -> Way:
    """A POST whose body is framed by these headers alone."""

    def make(draw: random.Random, path: bytes, good: bytes) -> bytes:
        return _post(path, *lines, body=body or good)

    return make


def _get(target: bytes, more: bytes = b"") -> Way:
    def make(draw: random.Random, path: bytes, body: bytes) -> bytes:
        return b"GET " + target.replace(b"PATH", path) + b" HTTP/1.1\r\nHost: a\r\n" + more + b"\r\n"

    return make


CHUNKED = b"Transfer-Encoding: chunked"
HTTP_WAYS: Mapping[str, Way] = {
    "no Host": lambda draw, path, body: _post(path, b"Content-Length: 0", host=b""),
    "two Hosts": _lines(b"Host: b"),
    "version 2.0": lambda draw, path, body: _post(path, b"Content-Length: 0", version=b"2.0"),
    "version 9.9": lambda draw, path, body: _post(path, b"Content-Length: 0", version=b"9.9"),
    "no version": lambda draw, path, body: b"GET " + path + b"\r\n\r\n",
    "HTTP/2 preface": lambda draw, path, body: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": lambda draw, path, body: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + draw.randbytes(64) + b"\r\n\r\n",
    "random bytes": lambda draw, path, body: draw.randbytes(draw.randint(1, 500)) + b"\r\n\r\n",
    "SSH": lambda draw, path, body: b"SSH-2.0-OpenSSH_9.9\r\n\r\n",
    "CONNECT": lambda draw, path, body: b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n",
    "TRACE": lambda draw, path, body: b"TRACE " + path + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "absolute target": _get(b"http://evil.examplePATH"),
    "star": _get(b"*"),
    "two slashes": _get(b"//evil.examplePATH"),
    "fragment": _get(b"PATH#a"),
    "bytes in the target": _get(b"PATH\xff\xfe"),
    "NUL in the target": _get(b"PATH\x00"),
    "long target": _get(b"PATH?" + b"a" * 9000),
    "very long target": _get(b"PATH?" + b"a" * 200_000),
    "two lengths": _lines(b"Content-Length: 1"),
    "negative length": _framed(b"Content-Length: -1"),
    "hexadecimal length": _framed(b"Content-Length: 0x10"),
    "length of 5,000 digits": _framed(b"Content-Length: " + b"9" * 5000),
    "length of 2^64": _framed(b"Content-Length: 18446744073709551616"),
    "length of 1 TB": _framed(b"Content-Length: 1099511627776"),
    "list of lengths": _framed(b"Content-Length: 5, 5"),
    "length and chunks": _framed(b"Content-Length: 5", CHUNKED, body=b"0\r\n\r\n"),
    "two codings": _framed(b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"),
    "chunked twice": _framed(CHUNKED, CHUNKED, body=b"0\r\n\r\n"),
    "unknown coding": _framed(b"Transfer-Encoding: xchunked", body=b"0\r\n\r\n"),
    "chunk of no size": _framed(CHUNKED, body=b"zz\r\nabc\r\n0\r\n\r\n"),
    "chunk of 2^64": _framed(CHUNKED, body=b"FFFFFFFFFFFFFFFFF\r\nabc\r\n"),
    "negative chunk": _framed(CHUNKED, body=b"-1\r\nabc\r\n0\r\n\r\n"),
    "chunk that is too long": _framed(CHUNKED, body=b"1\r\nabc\r\n0\r\n\r\n"),
    "chunks in HTTP/1.0": lambda draw, path, body: _post(path, CHUNKED, body=b"0\r\n\r\n", version=b"1.0"),
    "space before a colon": _lines(b"X-A : b"),
    "no colon": _lines(b"X-A"),
    "folded header": _lines(b"X-A: b\r\n c"),
    "empty name": _lines(b": b"),
    "NUL in a header": _lines(b"X-A: a\x00b"),
    "bare CR": _lines(b"X-A: a\rb"),
    "101 headers": _lines(*(b"X-%d: a" % index for index in range(101))),
    "header of 64 KB": _lines(b"X-A: " + b"a" * 65_536),
    "name of 64 KB": _lines(b"a" * 65_536 + b": a"),
    "header of 1 MB": _lines(b"X-A: " + b"a" * MIB),
    "WebSocket": _get(b"PATH", b"Upgrade: websocket\r\nConnection: Upgrade\r\n"),
    "expectation": _lines(b"Expect: 200-maybe"),
    "gzip": _lines(b"Content-Encoding: gzip"),
    "two kinds": _lines(b"Content-Type: text/plain"),
    "form": lambda draw, path, body: _post(path, b"Content-Length: 3", body=b"a=1").replace(
        b"/json", b"/x-www-form-urlencoded"
    ),
    "text": lambda draw, path, body: _lines()(draw, path, body).replace(b"application/json", b"text/plain"),
    "UTF-16": lambda draw, path, body: _lines()(draw, path, body).replace(b"/json", b"/json; charset=utf-16"),
    "multipart": lambda draw, path, body: _lines()(draw, path, body).replace(
        b"application/json", b"multipart/form-data"
    ),
}


# ---------------------------------------------------------------- too deep, too large, too long


def size_cases(draw: random.Random, routes: Sequence[Route], count: int) -> Iterator[Case]:
    bodies = [route for route in routes if route.method == "POST"]
    for index in range(count):
        route = draw.choice(bodies)
        if index % 3 == 0:
            yield _deep(draw, route)
        elif index % 3 == 1:
            yield _digits(draw, route)
        else:
            yield _large(draw, route)


def _main(route: Route) -> str:
    """The field that a body needs."""
    return next(iter(route.good), "a")


def _deep(draw: random.Random, route: Route) -> Case:
    """Up to a million levels where no level should be."""
    depth = round(10 ** draw.uniform(1, 6))
    opening, closing = draw.choice((("[", "]"), ('{"a":', "}"), ('[{"a":', "}]"), ("[", "")))
    value = opening * depth + '"x"' + closing * depth
    data = request("POST", route.path, with_value(route, _main(route), value)[: MAX_BODY - 1], TIMEOUT)
    return Case(f"depth {depth} of {opening} in {route.path}", data, bad=bool(route.good))


def _digits(draw: random.Random, route: Route) -> Case:
    """A number that is longer than any, in any field."""
    name = draw.choice(sorted(route.fields) or ["a"])
    count = draw.choice((400, 4299, 4300, 5000, 50_000))
    kind = route.fields.get(name, ANY)
    negative = len(kind) == 3 and kind[2] is None
    value = ("-" if negative or draw.random() < 0.5 else "") + "7" * count
    data = request("POST", route.path, with_value(route, name, value), TIMEOUT)
    return Case(f"{count} digits in {name} of {route.path}", data, bad=bool(route.good))


def _large(draw: random.Random, route: Route) -> Case:
    """1 KB to 1 GB of text where no object should be."""
    size = round(2 ** draw.uniform(10, 30))
    before, _, after = with_value(route, _main(route), '{"a": "@"}').partition(b"@")
    what = f"{size} bytes in {route.path}"
    if size + len(before) + len(after) <= MAX_BODY:
        data = request("POST", route.path, before + b"x" * size + after, TIMEOUT)
        return Case(what, data, bad=bool(route.good))
    chunked = draw.random() < 0.5
    framing = {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": str(size)}
    head = request("POST", route.path, None, {"Content-Type": "application/json", **TIMEOUT, **framing})

    def pieces() -> Iterator[bytes]:
        yield head
        sent, data = 0, before
        while sent < size:
            yield b"%x\r\n%s\r\n" % (len(data), data) if chunked else data
            sent += len(data)
            data = b"x" * min(65_536, size - sent)

    return Case(what + (", chunked" if chunked else ""), pieces, fresh=True)
