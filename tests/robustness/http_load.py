"""What the scripts that hurt a server share: a client, and a look at the server's figures and its processes.

The client is asyncio and a socket: with a library in between, the library would be what is measured.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMPLETIONS = "/v1/completions"
DONE = b"[DONE]"
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing discards what is unsent and tells the other side with RST."""
ANSWER, ERROR, CUT, SILENT = "answer", "error", "cut", "silent"
"""How a request ended: with its whole answer; with a coded error; the connection ended before that; not at all."""
POLL_S = 0.005

Address = tuple[str, int]


# ---------------------------------------------------------------- client


class Connection:
    """One connection, written and read by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.headers: Mapping[str, str] = {}
        """Of the last answer, names in lower case."""
        self.received = 0
        """Bytes of answers so far."""

    @classmethod
    async def open(cls, address: Address) -> Connection:
        return cls(*await asyncio.open_connection(*address, limit=2**20))

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def head(self) -> int:
        """The status of the next answer; then `headers` are its own. Raises EOFError or OSError."""
        raw = await self._reader.readuntil(b"\r\n\r\n")
        self.received += len(raw)
        first, *lines = raw.decode("latin-1").split("\r\n")
        self.headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines) if name
        }
        return int(first.split(" ", 2)[1])

    async def pieces(self) -> AsyncIterator[bytes]:
        """The answer's body as it comes. Raises EOFError or OSError if it is cut."""
        if self.headers.get("transfer-encoding") == "chunked":
            while True:
                line = await self._reader.readuntil(b"\r\n")
                size = int(line, 16)
                data = await self._reader.readexactly(size + 2)
                self.received += len(line) + len(data)
                if not size:
                    return
                yield data[:-2]
        elif size := int(self.headers.get("content-length", "0")):
            data = await self._reader.readexactly(size)
            self.received += size
            yield data

    async def body(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])

    async def events(self) -> AsyncIterator[bytes]:
        """The data of server-sent events; comments are left out."""
        buffer = b""
        async for piece in self.pieces():
            *whole, buffer = (buffer + piece).split(b"\n\n")
            for event in whole:
                if event.startswith(b"data:"):
                    yield event[5:].strip()

    async def read_bytes(self, count: int) -> None:
        """So many bytes of what comes, whatever they mean. Raises EOFError or OSError."""
        await self._reader.readexactly(count)

    @property
    def usable(self) -> bool:
        """Whether another request can be sent."""
        return not self._reader.at_eof() and self.headers.get("connection") != "close"

    def cut(self) -> None:
        """Ends the connection with RST, as a client that was killed does."""
        sock: Any = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self._writer.transport.abort()

    def close(self) -> None:
        self._writer.close()


def request_bytes(path: str, body: Mapping[str, Any] | None = None, headers: Sequence[str] = ()) -> bytes:
    """A whole request: POST with a body, GET without."""
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "host: localhost", *headers]
    if body is not None:
        lines += ["content-type: application/json", f"content-length: {len(data)}"]
    return "\r\n".join([*lines, "", ""]).encode() + data


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times are of `time.monotonic`, in seconds."""

    began_s: float
    ended_s: float = 0.0
    ending: str = SILENT
    status: int = 0
    code: str = ""
    """Of the error, where it is one."""
    text: str = ""
    finish_reason: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    """When events with text came; of an answer that is no stream, when it came."""

    @property
    def seconds(self) -> float:
        return self.ended_s - self.began_s

    @property
    def ttft_s(self) -> float:
        return self.times[0] - self.began_s if self.times else float("inf")

    @property
    def gaps_s(self) -> list[float]:
        """Between events with text."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def answer_body(prompt: str, max_tokens: int, **more: Any) -> dict[str, Any]:
    """A completion that is the same every time and has exactly `max_tokens`."""
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **more}


async def ask(
    address: Address,
    body: Mapping[str, Any],
    *,
    path: str = COMPLETIONS,
    headers: Sequence[str] = (),
    timeout_s: float = 300.0,
    on_event: Callable[[], None] | None = None,
) -> Outcome:
    """One request on a connection of its own, followed to its end. Raises nothing: how it ended is in the outcome."""
    outcome = Outcome(time.monotonic())
    try:
        async with asyncio.timeout(timeout_s):
            connection = await Connection.open(address)
            try:
                await follow(connection, request_bytes(path, body, headers), outcome, on_event)
            finally:
                connection.close()
    except TimeoutError:
        outcome.ending = SILENT
    except (EOFError, OSError):
        outcome.ending = CUT
    outcome.ended_s = time.monotonic()
    return outcome


async def follow(
    connection: Connection, request: bytes, outcome: Outcome, on_event: Callable[[], None] | None = None
) -> None:
    """Sends a request and reads its answer to the end. Raises EOFError or OSError where the connection ends."""
    outcome.ending = SILENT
    connection.send(request)
    outcome.status = await connection.head()
    outcome.headers = connection.headers
    if outcome.headers.get("content-type", "").startswith("text/event-stream"):
        await _follow_stream(connection, outcome, on_event)
        return
    body = await connection.body()
    outcome.times.append(time.monotonic())
    if outcome.status != 200:
        outcome.ending = ERROR
        outcome.code = _code(json.loads(body))
        return
    outcome.ending = ANSWER
    if body.startswith(b"{"):
        _read_choice(json.loads(body), outcome)


async def _follow_stream(connection: Connection, outcome: Outcome, on_event: Callable[[], None] | None) -> None:
    """An OpenAI stream ends in exactly one of: a finish_reason and [DONE]; an error event and [DONE]."""
    async for event in connection.events():
        if event == DONE:
            outcome.ending = ERROR if outcome.code else ANSWER if outcome.finish_reason else CUT
        else:
            found = json.loads(event)
            if "error" in found:
                outcome.code = _code(found)
            elif _read_choice(found, outcome):
                outcome.times.append(time.monotonic())
            if on_event is not None:
                on_event()
    if outcome.ending == SILENT:
        outcome.ending = CUT


def _read_choice(found: Mapping[str, Any], outcome: Outcome) -> bool:
    """Whether there is new text."""
    for choice in found.get("choices", ()):
        text = choice.get("text") or ""
        outcome.text += text
        outcome.finish_reason = choice.get("finish_reason") or outcome.finish_reason
        return bool(text)
    return False


def _code(found: Any) -> str:
    error = found.get("error") if isinstance(found, dict) else None
    return str(error.get("code")) if isinstance(error, dict) else "no error object"


class Pool:
    """Requests on connections that are used again, as most clients do."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._idle: list[Connection] = []

    async def ask(self, request: bytes, timeout_s: float) -> Outcome:
        """As the function `ask`."""
        outcome = Outcome(time.monotonic())
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self._take()
                try:
                    await follow(connection, request, outcome)
                except BaseException:
                    connection.close()
                    raise
            if connection.usable:
                self._idle.append(connection)
            else:
                connection.close()
        except TimeoutError:
            outcome.ending = SILENT
        except (EOFError, OSError):
            outcome.ending = CUT
        outcome.ended_s = time.monotonic()
        return outcome

    async def _take(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
            connection.close()
        return await Connection.open(self._address)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle = []


async def get(address: Address, path: str, timeout_s: float = 5.0) -> tuple[int, bytes]:
    """(status, body) of a GET; status 0 where there is no answer in time."""
    try:
        async with asyncio.timeout(timeout_s):
            connection = await Connection.open(address)
            try:
                connection.send(request_bytes(path, headers=("connection: close",)))
                return await connection.head(), await connection.body()
            finally:
                connection.close()
    except (TimeoutError, EOFError, OSError):
        return 0, b""


# ---------------------------------------------------------------- the server's figures


async def figures(address: Address) -> dict[str, float]:
    """/metrics by name without its prefix, summed over labels. Raises ConnectionError if there is no answer."""
    status, body = await get(address, "/metrics")
    if status != 200:
        raise ConnectionError(f"/metrics: {status}")
    found: dict[str, float] = {}
    for line in body.decode().splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0].rpartition(":")[2]
            found[name] = found.get(name, 0.0) + float(value)
    return found


def held(found: Mapping[str, float]) -> float:
    """Requests and blocks that the engine has: 0 when nothing is left of any request."""
    return found["num_requests_running"] + found["num_requests_waiting"] + found["kv_cache_usage_perc"]


def computed_tokens(found: Mapping[str, float]) -> float:
    """Tokens that the engine has computed; of an engine that does not say, those of requests."""
    of_requests = found["prompt_tokens_total"] + found["generation_tokens_total"]
    return found.get("engine_computed_tokens_total", of_requests)


async def until(condition: Callable[[], Awaitable[bool]], limit_s: float) -> float:
    """Seconds until a condition holds; infinity if it does not within the limit."""
    began_s = time.monotonic()
    while time.monotonic() - began_s < limit_s:
        if await condition():
            return time.monotonic() - began_s
        await asyncio.sleep(POLL_S)
    return float("inf")


async def until_free(address: Address, limit_s: float = 10.0) -> float:
    """Seconds until no request and no block is held."""

    async def free() -> bool:
        return held(await figures(address)) == 0

    return await until(free, limit_s)


# ---------------------------------------------------------------- processes (Linux)


def memory_bytes(pid: int) -> int:
    """Anonymous memory of a process, what was swapped out included."""
    wanted = ("RssAnon:", "VmSwap:")
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(wanted))


def descriptors(pid: int) -> int:
    """Open files and sockets of a process."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def descendants(pid: int) -> list[int]:
    """All processes below one, zombies left out."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue  # it has just ended
            if state != "Z":
                parents[int(entry.name)] = int(parent)
    found, frontier = [], [pid]
    while frontier:
        frontier = [child for child, parent in parents.items() if parent in frontier]
        found += frontier
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def engine_pid(server_pid: int) -> int:
    """The engine's process. Raises ProcessLookupError if there is none."""
    for pid in descendants(server_pid):
        try:
            if b"headrace.engine.process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        except OSError:
            continue
    raise ProcessLookupError("the server has no engine process")


def family_bytes(pid: int) -> int:
    """Memory of a server with all its processes."""
    total = 0
    for one in (pid, *descendants(pid)):
        try:
            total += memory_bytes(one)
        except OSError:
            continue
    return total


# ---------------------------------------------------------------- numbers


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed; of none: 0."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
