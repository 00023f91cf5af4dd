"""Answers that come in pieces: one event for all that is new of a choice, however many tokens that is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from headrace.core.errors import HeadraceError
from headrace.engine.answer import Answer, Completion
from headrace.server.errors import error_response
from headrace.server.run import Run
from headrace.server.service import Service

PING = b": ping\n\n"
HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
IGNORED_HEADER = "x-headrace-ignored"
MAX_NAMED = 512
"""Characters of that header."""


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """Names the fields of a body that nobody knows; they are printable ASCII."""
    return {IGNORED_HEADER: ",".join(names)[:MAX_NAMED]} if names else {}


class Writer(Protocol):
    """Makes the bytes of a stream."""

    def start(self, answers: Sequence[Answer]) -> bytes:
        """What comes before any token."""

    def delta(self, index: int, answer: Answer) -> bytes:
        """What is new of a choice."""

    def end(self, index: int, answer: Answer, completion: Completion) -> bytes:
        """The rest of a choice, and how it ended."""

    def finish(self, completions: Sequence[Completion]) -> bytes:
        """After the last choice."""

    def error(self, code: str, message: str) -> bytes:
        """Instead of everything that would have come."""


class StreamResponse(Response):
    """A run as server-sent events. Nothing is sent before the first event, so that what fails at once has its own
    status."""

    def __init__(self, service: Service, run: Run, writer: Writer, headers: Mapping[str, str]) -> None:
        """`headers`: beside those of every stream."""
        self._service = service
        self._run = run
        self._writer = writer
        self._own_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        self.background = None
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        run = self._run
        stream = asyncio.create_task(self._stream(scope, receive, send))
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait([stream, gone], return_when=asyncio.FIRST_COMPLETED)
            if stream.done():
                stream.result()
        finally:
            run.close()
            for task in (stream, gone):
                task.cancel()

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        run, writer = self._run, self._writer
        keep_alive = self._service.settings.keep_alive
        loop = asyncio.get_running_loop()
        last_s = time.monotonic()
        timer = loop.call_later(keep_alive, run.wake) if keep_alive else None
        told = [False] * len(run.answers)
        try:
            while not all(told):
                changed = await run.changes()
                if (failure := run.failure) is not None:
                    await self._fail(failure, scope, receive, send)
                    return
                data = b"".join([self._piece(index, told) for index in changed])
                if data:
                    last_s = time.monotonic()
                elif not changed and timer is not None:
                    # The timer has come: either it was long silent, or it is to come again.
                    silent_s = time.monotonic() - last_s
                    if silent_s >= 0.99 * keep_alive:
                        data, last_s, silent_s = PING, time.monotonic(), 0.0
                    timer = loop.call_later(keep_alive - silent_s, run.wake)
                if data:
                    await self._send(send, data)
            completions = [one for one in run.completions if one is not None]
            await self._send(send, writer.finish(completions), more=False)
        finally:
            if timer is not None:
                timer.cancel()

    def _piece(self, index: int, told: list[bool]) -> bytes:
        completion = self._run.completions[index]
        if completion is None:
            return self._writer.delta(index, self._run.answers[index])
        told[index] = True
        return self._writer.end(index, self._run.answers[index], completion)

    async def _send(self, send: Send, data: bytes, more: bool = True) -> None:
        if not self._begun:
            self._begun = True
            await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS, *self._own_headers]})
            data = self._writer.start(self._run.answers) + data
        await send({"type": "http.response.body", "body": data, "more_body": more})

    async def _fail(self, failure: HeadraceError, scope: Scope, receive: Receive, send: Send) -> None:
        self._run.close()
        if self._begun:
            await self._send(send, self._writer.error(failure.code, str(failure)), more=False)
        else:
            await error_response(failure, scope["path"])(scope, receive, send)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
