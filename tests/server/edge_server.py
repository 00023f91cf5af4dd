"""A real server around a small ASGI application, and a client that sends bytes as they are given."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
import uvloop
from starlette.types import ASGIApp

from headrace.server.config import ServeConfig
from headrace.server.protocol import make_protocol

WAIT_S = 5.0
HOST = b"Host: x\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST
POST = b"POST / HTTP/1.1\r\n" + HOST


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        error = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(self.body) <= 4096
        return error["code"]


class Client:
    """One connection."""

    def __init__(self, port: int, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(WAIT_S)
        self.socket.connect(("127.0.0.1", port))
        self._data = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def _more(self) -> bool:
        try:
            data = self.socket.recv(65536)
        except ConnectionError:
            return False
        self._data += data
        return bool(data)

    def _until(self, end: bytes) -> bytes:
        while end not in self._data:
            if not self._more():
                raise EOFError(self._data)
        found, _, self._data = self._data.partition(end)
        return found

    def _exactly(self, count: int) -> bytes:
        while len(self._data) < count:
            if not self._more():
                raise EOFError(self._data)
        found, self._data = self._data[:count], self._data[count:]
        return found

    def answer(self, *, head: bool = False) -> Answer:
        """The next one. Raises EOFError where the connection ends first."""
        first, *lines = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert version == "HTTP/1.1"
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = b""
        if head or status == "100":
            pass
        elif "content-length" in headers:
            body = self._exactly(int(headers["content-length"]))
        elif headers.get("transfer-encoding") == "chunked":
            while size := int(self._until(b"\r\n"), 16):
                body += self._exactly(size)
                self._exactly(2)
            self._exactly(2)
        else:
            body = self.rest()
        return Answer(int(status), headers, body)

    def rest(self) -> bytes:
        """All up to the connection's end."""
        while self._more():
            pass
        found, self._data = self._data, b""
        return found

    def closed(self) -> bool:
        """Whether the server ends the connection without another byte."""
        return self.rest() == b""

    def close(self) -> None:
        self.socket.close()


@dataclass
class Served:
    port: int
    server: uvicorn.Server
    events: list[str] = field(default_factory=list)

    @contextmanager
    def client(self, receive_buffer: int | None = None) -> Iterator[Client]:
        made = Client(self.port, receive_buffer)
        try:
            yield made
        finally:
            made.close()

    def ask(self, data: bytes, *, head: bool = False) -> Answer:
        """The answer to the bytes of one request, on a connection of its own."""
        with self.client() as client:
            client.send(data)
            return client.answer(head=head)

    def refused(self, data: bytes) -> Answer:
        """The same, of a request that ends its connection."""
        with self.client() as client:
            client.send(data)
            answer = client.answer()
            assert answer.headers["connection"].startswith("close")
            assert client.closed()
            return answer

    def wait_for(self, event: str, seconds: float = WAIT_S) -> float:
        """Seconds until the application has told of it."""
        began = time.monotonic()
        while event not in self.events:
            assert time.monotonic() - began < seconds, (event, self.events)
            time.sleep(0.005)
        return time.monotonic() - began


@contextmanager
def serving(app: ASGIApp, settings: ServeConfig, events: list[str] | None = None) -> Iterator[Served]:
    """A server in a thread."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            loop="none",
            http=make_protocol(settings),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=1,
            timeout_graceful_shutdown=1,
        )
    )

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(server._serve([listener]))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        began = time.monotonic()
        while not server.started:
            assert time.monotonic() - began < WAIT_S
            time.sleep(0.005)
        yield Served(listener.getsockname()[1], server, [] if events is None else events)
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
    assert not thread.is_alive()


async def respond(send, status: int = 200, body: bytes = b"ok", headers: tuple = ()) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [length, *headers]})
    await send({"type": "http.response.body", "body": body})


async def read_all(receive) -> bytes | None:
    """The body; None if the client went away."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message["body"]
        if not message["more_body"]:
            return body


class Application:
    """Echoes, streams without end, answers early. Tells what became of each request."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.sent = 0

    async def __call__(self, scope, receive, send) -> None:
        path = scope["path"]
        if path == "/early":
            await respond(send)
        elif path == "/stream":
            await self._stream(receive, send, scope)
        elif path == "/slow":
            await read_all(receive)
            await asyncio.sleep(0.2)
            await respond(send, body=scope["query_string"])
        elif path == "/wait":
            self.events.append("waiting")
            while (await receive())["type"] != "http.disconnect":
                pass
            self.events.append("gone")
        elif path == "/pieces":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for i in range(3):
                await send({"type": "http.response.body", "body": b"piece%d " % i, "more_body": i < 2})
        else:
            if path == "/lazy":
                await asyncio.sleep(1.5)
            body = await read_all(receive)
            if body is None:
                self.events.append("left")
                return
            names = sorted({name.decode() for name, _ in scope["headers"]})
            shown = {"method": scope["method"], "path": path, "length": len(body), "names": names}
            shown["query"] = scope["query_string"].decode()
            await respond(send, body=json.dumps(shown).encode())

    async def _stream(self, receive, send, scope) -> None:
        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.events.append(f"disconnect {scope['state'].get('closed_by')}")

        watch = asyncio.create_task(gone())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        pause = 0.001 if scope["query_string"] == b"slowly" else 0
        while not watch.done():
            self.sent += 1000
            await send({"type": "http.response.body", "body": b"x" * 1000, "more_body": True})
            await asyncio.sleep(pause)
