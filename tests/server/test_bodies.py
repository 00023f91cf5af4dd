"""What a JSON body may be."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from headrace.core.errors import InvalidJson
from headrace.server.limits import MAX_CONTAINERS, parse_body, read_json

BAD_BODIES = {
    "empty": b"",
    "blank": b"  \n",
    "array": b"[1]",
    "number": b"1",
    "no JSON": b"hello",
    "cut": b'{"a": ',
    "more": b'{"a": 1} {"b": 2}',
    "byte order mark": b'\xef\xbb\xbf{"a": 1}',
    "latin-1": b'{"a": "\xe9"}',
    "UTF-16": '{"a": 1}'.encode("utf-16-le"),
    "surrogate in UTF-8": b'{"a": "\xed\xa0\x80"}',
    "high surrogate": rb'{"a": "\ud83d"}',
    "low surrogate": rb'{"a": "x\uDE00"}',
    "surrogates in the wrong order": rb'{"a": "\ude00\ud83d"}',
    "high, then a pair": rb'{"a": "\ud83d\ud83d\ude00"}',
    "pair, then low": rb'{"a": "\ud83d\ude00\ude00"}',
    "surrogate in a key": rb'{"\ud800": 1}',
    "surrogate deep inside": rb'{"a": [[{"b": ["\\\ud800"]}]]}',
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": -Infinity}',
    "1e999": b'{"a": [1e999]}',
    "5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "key twice": b'{"a": 1, "a": 2}',
    "NUL": b'{"a": "\0"}',
    "65 levels": b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}",
    "65 levels in two blocks": b'{"a": ' + b"[" * 32 + b" " * 70_000 + b"[" * 32 + b"]" * 64 + b"}",
    "backslash outside": b'{"a": \\"' + b"[" * 100_000 + b"}",
    "too many arrays": b'{"a": [' + b"[]," * MAX_CONTAINERS + b"1]}",
}
GOOD_BODIES = {
    "64 levels": b'{"a": ' + b"[" * 63 + b"]" * 63 + b"}",
    "brackets in texts": b'{"a": "' + b"[{" * 1000 + rb'\"[[\\", "b": ["' + b"]" * 100 + b'"]}',
    "brackets in a long text": b'{"a": "' + b"[" * 200_000 + b'"}',
    "64 levels, again and again": b'{"a": [' + (b"[" * 62 + b"]" * 62 + b",") * 700 + b"1]}",
    "pairs": rb'{"a": "\ud83d\ude00\uD83D\uDE00"}',
    "an escaped backslash": rb'{"a": "\\ud83d"}',
    "control characters": rb'{"a": "\u0000\u001f\u2028"}',
    "many arrays": b'{"a": [' + b"[]," * 1000 + b"1]}",
    "4300 digits": b'{"a": ' + b"9" * 4300 + b"}",
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies(name: str) -> None:
    with pytest.raises(InvalidJson):
        parse_body(BAD_BODIES[name])


@pytest.mark.parametrize("name", GOOD_BODIES)
def test_good_bodies(name: str) -> None:
    assert parse_body(GOOD_BODIES[name]) == json.loads(GOOD_BODIES[name])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=30,
)


@given(st.dictionaries(st.text(alphabet='ab"\\[]{}', max_size=6), VALUES, max_size=4), st.booleans(), st.integers(1, 6))
def test_nesting_is_counted_exactly(value: dict, ascii_only: bool, max_depth: int) -> None:
    def depth(inside: object) -> int:
        below = inside.values() if isinstance(inside, dict) else inside if isinstance(inside, list) else None
        return 0 if below is None else 1 + max((depth(one) for one in below), default=0)

    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    if depth(value) <= max_depth:
        assert parse_body(body, max_depth) == value
    else:
        with pytest.raises(InvalidJson, match="nested deeper"):
            parse_body(body, max_depth)


@given(st.text(alphabet=st.characters() | st.characters(categories=["Cs"]), max_size=20))
def test_lone_surrogates_are_found_exactly(text: str) -> None:
    body = json.dumps({"a": text}).encode()
    whole = json.loads(body)["a"]  # two halves side by side are one character
    try:
        whole.encode()
    except UnicodeEncodeError:
        with pytest.raises(InvalidJson, match="surrogate"):
            parse_body(body)
    else:
        assert parse_body(body) == {"a": whole}


@pytest.mark.parametrize("piece", [b"[", b"[],", b'"[",', rb"\\", rb"\"[", rb"\ud83d\ude00", b"{"])
def test_hostile_bodies_take_linear_time(piece: bytes) -> None:
    """A bound that a quadratic way, or one that makes what it is to refuse, passes by far."""

    def seconds(make: Callable[[], object]) -> float:
        began = time.process_time()
        with pytest.raises(InvalidJson):
            make()
        return time.process_time() - began

    body = b'{"a": ' + piece * (2**21 // len(piece))
    assert min(seconds(lambda: parse_body(body)) for _ in range(3)) < 0.15


def test_large_bodies_leave_the_loop_free() -> None:
    """Parsed in a thread: others are answered meanwhile. Floats let go of the interpreter as they are checked."""
    body = b'{"a": [' + b"1.5," * 400_000 + b"1]}"
    request = Request({"type": "http", "method": "POST", "headers": []}, _receive(body))
    ticks = 0

    async def run() -> dict:
        nonlocal ticks
        reading = asyncio.create_task(read_json(request, 2**21))
        while not reading.done():
            await asyncio.sleep(0.001)
            ticks += 1
        return await reading

    assert len(asyncio.run(run())["a"]) == 400_001
    assert ticks > 2


def _receive(body: bytes):
    async def receive() -> dict:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive
