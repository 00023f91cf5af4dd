"""Pixels between the processes: whole, bounded, and without a step in between."""

from __future__ import annotations

import socket
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.errors import EngineError
from headrace.core.types import MAX_PIXEL_BYTES, ImageSpan, Request
from headrace.engine.ipc import MAX_FRAME, Abort, Channel, Reader, Submit, ToEngine, encode


def request(size: int, name: str = "r") -> Request:
    span = ImageSpan(1, 3, "ab" * 32, 2, bytes(range(256)) * (size // 256), normalised=True)
    return Request(name, (1, 2, 2, 2), images=(span, ImageSpan(4, 1, "cd" * 32)))


def test_a_request_with_the_most_pixels_fits_a_frame() -> None:
    frame = encode(Submit(request(2**16)))
    assert len(frame) < 2**16 + 1000 and MAX_PIXEL_BYTES + 2**24 < MAX_FRAME
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9000), max_size=20))
def test_frames_come_whole_however_they_are_cut(cuts: list[int]) -> None:
    messages = [Submit(request(4096, "a")), Abort("b"), Submit(request(256, "c"))]
    data = b"".join(map(encode, messages))
    reader, found, at = Reader(ToEngine), [], 0
    for cut in [*cuts, len(data)]:
        found += reader.feed(data[at : at + cut])
        at += cut
        assert reader.partial == (len(found) < 3 and sum(len(encode(one)) for one in found) < min(at, len(data)))
    assert found == messages and not reader.partial


def test_a_frame_that_is_none() -> None:
    reader = Reader(ToEngine)
    with pytest.raises(EngineError, match="a frame that is none"):
        reader.feed(b"\0\0\0\2\xc1\xc1")
    with pytest.raises(EngineError, match="allowed: 268435456"):
        Reader(ToEngine).feed(b"\xff\xff\xff\xff")


def test_an_image_comes_within_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is larger than the socket holds: a part of it each step would make it late."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(theirs)
        asked = request(2**22)
        writer = threading.Thread(target=ours.sendall, args=(encode(Submit(asked)),))
        assert list(channel.receive()) == []
        writer.start()
        monkeypatch.setattr("headrace.engine.ipc.REST_S", 60.0)  # however slow the machine is
        found: list[object] = []
        looks = 0
        while not found:
            found += channel.receive()
            looks += bool(found or channel.partial)
        writer.join()
        assert found == [Submit(asked)] and looks == 1
        monkeypatch.undo()
        ours.sendall(encode(Abort("r"))[:-1])
        assert list(channel.receive()) == [], "it does not wait for ever"
