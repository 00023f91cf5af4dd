"""What the API process and the engine process say to each other: length-prefixed msgpack frames on a socketpair.

Every frame is one of the structs below. Nothing in a frame names code, so that none can be run by reading it.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from headrace.core.config import EngineConfig
from headrace.core.errors import EngineError
from headrace.core.metrics import EngineStats
from headrace.core.types import ErrorEvent, Event, FinishEvent, FinishReason, Request, TokenEvent, TokenLogprobs

MAX_FRAME = 2**28
"""Bytes. A frame of a step of 256 rows with 20 log-probabilities has about 200 kB, a request of 128k tokens 600 kB, one
with images up to `core.types.MAX_PIXEL_BYTES` more."""
REST_S = 0.01
"""Seconds that a step may wait for the rest of a frame; an image of seven tiles (4 MB) takes about half of that."""
_HEAD = 4
_CHUNK = 2**18


class Start(msgspec.Struct, array_like=True, tag=0):
    """First frame to the engine: what to load."""

    config: EngineConfig
    eos_token_ids: frozenset[int]
    step_seconds: float


class Submit(msgspec.Struct, array_like=True, tag=1):
    request: Request


class Finish(msgspec.Struct, array_like=True, tag=2):
    """A stop string was found: the answer is the first `num_output` tokens."""

    id: str
    num_output: int


class Abort(msgspec.Struct, array_like=True, tag=3):
    id: str


class AskStats(msgspec.Struct, array_like=True, tag=4):
    """Is answered with Stats."""


class Loaded(msgspec.Struct, array_like=True, tag=0):
    """The engine is ready."""

    seconds: dict[str, float]
    """By phase of the start."""
    memory: dict[str, int]
    """Bytes by use."""
    backend: dict[str, str]
    """What the backend found on this machine."""


class Refused(msgspec.Struct, array_like=True, tag=1):
    """The engine cannot start, or ends."""

    code: str
    message: str


class Tokens(msgspec.Struct, array_like=True, tag=2, gc=False):
    id: str
    token_ids: tuple[int, ...]
    time_s: float
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class Ended(msgspec.Struct, array_like=True, tag=3, gc=False):
    id: str
    reason: FinishReason
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    time_s: float
    stop_id: int | None
    joined_s: float | None


class Failed(msgspec.Struct, array_like=True, tag=4, gc=False):
    id: str
    code: str
    message: str
    time_s: float


class Events(msgspec.Struct, array_like=True, tag=5):
    """All that one step led to, in order."""

    events: list[Tokens | Ended | Failed]


class Stats(msgspec.Struct, array_like=True, tag=6):
    stats: EngineStats


ToEngine = Start | Submit | Finish | Abort | AskStats
FromEngine = Loaded | Refused | Events | Stats


def pack_events(events: list[Event]) -> Events:
    """Events as they go over the wire."""
    return Events([_pack(event) for event in events])


def _pack(event: Event) -> Tokens | Ended | Failed:
    if isinstance(event, TokenEvent):
        return Tokens(event.request_id, event.token_ids, event.time_s, event.logprobs, event.prompt_logprobs)
    if isinstance(event, FinishEvent):
        counts = (event.prompt_tokens, event.output_tokens, event.cached_tokens)
        return Ended(event.request_id, event.reason, *counts, event.time_s, event.stop_id, event.joined_s)
    return Failed(event.request_id, event.code, event.message, event.time_s)


def unpack_event(event: Tokens | Ended | Failed) -> Event:
    """The event that `pack_events` packed."""
    if isinstance(event, Tokens):
        return TokenEvent(event.id, event.token_ids, event.logprobs, event.time_s, event.prompt_logprobs)
    if isinstance(event, Ended):
        counts = (event.prompt_tokens, event.output_tokens, event.cached_tokens)
        return FinishEvent(event.id, event.reason, *counts, event.time_s, event.stop_id, event.joined_s)
    return ErrorEvent(event.id, event.code, event.message, event.time_s)


def encode(message: ToEngine | FromEngine) -> bytearray:
    """One frame, with its length before it. Pixels are copied once."""
    frame = bytearray(_HEAD)
    msgspec.msgpack.Encoder().encode_into(message, frame, _HEAD)
    frame[:_HEAD] = (len(frame) - _HEAD).to_bytes(_HEAD, "big")
    return frame


class Reader:
    """Frames out of a stream of bytes, decoded as one of the structs of `kind`."""

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The frames that are now whole. Raises EngineError for what is none: the other side is not ours."""
        buffer = self._buffer
        buffer += data
        frames: list[Any] = []
        start = 0
        while len(buffer) - start >= _HEAD:
            count = int.from_bytes(buffer[start : start + _HEAD], "big")
            if count > MAX_FRAME:
                raise EngineError(f"a frame of {count} bytes, allowed: {MAX_FRAME}")
            stop = start + _HEAD + count
            if len(buffer) < stop:
                break
            # A view: the decoder makes its own copy of pixels. It is released before the buffer may change.
            with memoryview(buffer) as whole, whole[start + _HEAD : stop] as frame:
                frames.append(self._decode(frame))
            start = stop
        del buffer[:start]
        return frames

    def _decode(self, frame: memoryview) -> Any:
        try:
            return self._decoder.decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise EngineError(f"a frame that is none: {error}") from None

    @property
    def partial(self) -> bool:
        """Whether a part of a frame has come, and not the rest."""
        return bool(self._buffer)


class Channel:
    """The engine's end: it never blocks on a reader that is slow, for then no step would run."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._reader = Reader(ToEngine)
        self._unsent = bytearray()
        self.closed = False
        """Whether the other side is gone."""

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def partial(self) -> bool:
        """Whether a part of a frame has come, and not the rest."""
        return self._reader.partial

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def send(self, message: FromEngine) -> None:
        self._unsent += encode(message)
        self.flush()

    def flush(self) -> None:
        """Sends as much as the other side takes now."""
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent)
            except BlockingIOError:
                return
            except OSError:
                self.closed = True
                return
            del self._unsent[:sent]

    def receive(self) -> Iterator[Any]:
        """What has come. Waits only for the rest of a frame that is on its way, and not for long: the socket holds a
        small part of an image, and one part a step would make it late."""
        until_s = None
        while not self.closed:
            try:
                data = self._socket.recv(_CHUNK)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self.closed = True
                return
            yield from self._reader.feed(data)
            if self.partial:
                now_s = time.monotonic()
                until_s = now_s + REST_S if until_s is None else until_s
                if now_s >= until_s or not select.select([self._socket], [], [], until_s - now_s)[0]:
                    return
            elif len(data) < _CHUNK:
                return
