"""What the attacking scripts share: a client that sends bytes as they are and waits for one answer at a time, a look at
the server before and after, and streams that watch.

A client that understands what it sends could not send what is wrong; so this one blocks, and knows only answers.
"""

from __future__ import annotations

import json
import re
import select
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.robustness.http_load import descendants, engine_pid, family_bytes, is_alive
from tests.robustness.score import Score, Target

WAIT_S = 30.0
"""After so long a request counts as unanswered."""
SETTLE_S = 0.5
"""Before memory is read: threads that have nothing left to do end by then."""
MIB = 2**20
PIECE = 2**16
MAX_ERROR_BYTES = 4096
RESTARTS = "headrace:engine_restarts_total"
FLAGS = ("--threads", "1", "--kv-cache-mib", "64", "--max-model-len", "1024")
"""Of a server whose memory is watched: its KV cache takes memory as it is first used, so it is small, and filled before
the attack."""
MAX_FILLED = 20_000
CACHE_INFO = re.compile(r'headrace:cache_config_info\{.*block_size="(\d+)",num_gpu_blocks="(\d+)"')


class Unanswered(Exception):
    """No answer, or half of one."""


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float
    """From the last byte that was sent to the answer's last."""
    sent: int
    """Bytes of the request that had been sent by then."""

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of an OpenAI error, the type of a TGI error; empty for anything else."""
        try:
            error = self.json()
        except ValueError:
            return ""
        if not isinstance(error, dict):
            return ""
        inside = error.get("error")
        return str(inside.get("code") if isinstance(inside, dict) else error.get("error_type", ""))

    @property
    def sheds(self) -> bool:
        """Refused for what else is going on, or for its own time: says nothing of the request."""
        return self.status in (408, 429) or self.code in ("generation", "overloaded")


class Connection:
    """One connection, made anew whenever the server ends it."""

    def __init__(self, address: tuple[str, int], wait_s: float = WAIT_S) -> None:
        self._address = address
        self._wait_s = wait_s
        self._socket: socket.socket | None = None
        self._data = b""
        self._bodiless = False

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket, self._data = None, b""

    def ask(self, data: bytes | Iterable[bytes]) -> Reply:
        """The answer to the bytes of one request, which may come in pieces: those after the answer are not sent.
        Raises Unanswered."""
        reused = self._socket is not None
        whole = isinstance(data, bytes)
        self._bodiless = isinstance(data, bytes) and data.startswith(b"HEAD ")
        try:
            return self._ask([data] if isinstance(data, bytes) else data)
        except _ClosedUnasked:
            # An idle connection may have been closed in the meantime.
            if not (reused and whole):
                raise Unanswered("the connection was closed") from None
        try:
            return self._ask([data])  # type: ignore[list-item]
        except _ClosedUnasked:
            raise Unanswered("the connection was closed") from None

    def stream(self, data: bytes) -> Iterator[tuple[float, bytes]]:
        """Pieces of the body of the answer (status 200 or Unanswered), each with the time of its arrival."""
        self._send([data])
        status, headers = self._head()
        if status != 200:
            body = b"".join(piece for _, piece in self._pieces(headers))
            raise Unanswered(f"status {status}: {body[:200]!r}")
        yield from self._pieces(headers)
        if headers.get("connection", "").startswith("close"):
            self.close()

    def _ask(self, pieces: Iterable[bytes]) -> Reply:
        try:
            sent, is_open = self._send(pieces)
            last_s = time.perf_counter()
            status, headers = self._head()
            while status == 100:
                status, headers = self._head()
            body = b"".join(piece for _, piece in self._pieces(headers))
        except BaseException:
            self.close()
            raise
        seconds = time.perf_counter() - last_s
        if not is_open or headers.get("connection", "").startswith("close") or self._data:
            self.close()
        return Reply(status, headers, body, seconds, sent)

    def _send(self, pieces: Iterable[bytes]) -> tuple[int, bool]:
        """(bytes sent, whether all were). Ends as soon as there is something to read."""
        if self._socket is None:
            self._socket = socket.create_connection(self._address, self._wait_s)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sent = 0
        for piece in pieces:
            left = memoryview(piece)
            while left:
                readable, writable, _ = select.select([self._socket], [self._socket], [], self._wait_s)
                if readable:
                    return sent, False
                if not writable:
                    raise Unanswered("the server neither reads nor answers")
                try:
                    count = self._socket.send(left[:PIECE])
                except OSError:
                    return sent, False
                sent += count
                left = left[count:]
        return sent, True

    def _more(self) -> bool:
        assert self._socket is not None
        try:
            data = self._socket.recv(PIECE)
        except TimeoutError:
            raise Unanswered(f"nothing after {self._wait_s:g} s") from None
        except OSError:
            return False
        self._data += data
        return bool(data)

    def _until(self, end: bytes) -> bytes:
        while end not in self._data:
            if not self._more():
                if not self._data:
                    raise _ClosedUnasked
                raise Unanswered(f"half an answer: {self._data[:100]!r}")
        found, _, self._data = self._data.partition(end)
        return found

    def _exactly(self, count: int) -> bytes:
        while len(self._data) < count:
            if not self._more():
                raise Unanswered("half an answer")
        found, self._data = self._data[:count], self._data[count:]
        return found

    def _head(self) -> tuple[int, dict[str, str]]:
        first, *lines = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        if version not in ("HTTP/1.1", "HTTP/1.0") or not rest[:3].isdigit():
            raise Unanswered(f"not HTTP: {first[:80]!r}")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return int(rest[:3]), headers

    def _pieces(self, headers: Mapping[str, str]) -> Iterator[tuple[float, bytes]]:
        if self._bodiless:
            return
        if "content-length" in headers:
            data = self._exactly(int(headers["content-length"]))
            yield time.perf_counter(), data
        elif headers.get("transfer-encoding") == "chunked":
            while size := int(self._until(b"\r\n"), 16):
                data = self._exactly(size)
                self._exactly(2)
                yield time.perf_counter(), data
            self._exactly(2)
        elif headers.get("connection", "").startswith("close"):
            while self._more():
                data, self._data = self._data, b""
                yield time.perf_counter(), data


class _ClosedUnasked(Exception):
    """The connection ended before a byte of an answer."""


# ---------------------------------------------------------------- requests


def request(
    method: str,
    path: str,
    body: object = None,
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """The bytes of a plain request. `body`: bytes as they are, or anything for JSON."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"Host": "127.0.0.1", "X-Request-Timeout": "20"}
    if body is not None:
        fields |= {"Content-Type": "application/json", "Content-Length": str(len(data))}
    fields |= dict(headers or {})
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + data


def events_of(body: bytes) -> list[Any]:
    """The JSON of a stream's events. Raises ValueError where one is none."""
    found = []
    for block in body.decode().split("\n\n"):
        for line in block.split("\n"):
            if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
                found.append(json.loads(data))
    return found


def error_fault(reply: Reply) -> str:
    """What is wrong with an error answer: empty if it is a 4xx with an OpenAI or a TGI error in at most 4 KB."""
    if not 400 <= reply.status < 500:
        return f"status {reply.status}"
    if len(reply.body) > MAX_ERROR_BYTES:
        return f"{len(reply.body)} bytes of error"
    if reply.headers.get("content-type", "").partition(";")[0] != "application/json":
        return f"content-type {reply.headers.get('content-type')}"
    try:
        body = reply.json()
    except ValueError:
        return f"not JSON: {reply.body[:80]!r}"
    if not isinstance(body, dict):
        return f"not an object: {reply.body[:80]!r}"
    error = body.get("error")
    if isinstance(error, dict) and set(body) == {"error"} and set(error) == {"message", "type", "param", "code"}:
        texts = (error["message"], error["type"], error["code"], error["param"] or "")
        return "" if all(isinstance(one, str) for one in texts) else "fields of the error are not strings"
    if isinstance(error, str) and set(body) == {"error", "error_type"} and isinstance(body["error_type"], str):
        return ""
    return f"neither OpenAI's nor TGI's shape: {reply.body[:80]!r}"


# ---------------------------------------------------------------- the server


def metric(target: Target, name: str) -> float | None:
    """The sum over the labels of one of the server's figures; None if it has none of that name."""
    lines = ask(target, "GET", "/metrics").body.decode().splitlines()
    found = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " "))]
    return sum(found) if found else None


def ask(target: Target, method: str, path: str, body: object = None) -> Reply:
    """One request on a connection of its own."""
    with Connection(target.address) as connection:
        return connection.ask(request(method, path, body))


def bytes_written(pid: int) -> int:
    """What a server with all its processes has had written to disks so far."""
    total = 0
    for one in (pid, *descendants(pid)):
        with suppress(OSError):
            lines = Path(f"/proc/{one}/io").read_text().splitlines()
            fields = {name: int(value) for name, _, value in (line.partition(":") for line in lines)}
            total += fields["write_bytes"] - fields["cancelled_write_bytes"]
    return total


def fill_cache(target: Target) -> None:
    """Uses every block of the KV cache once, where it is a small one."""
    found = CACHE_INFO.search(ask(target, "GET", "/metrics").body.decode())
    num_tokens = int(found[1]) * int(found[2]) if found else 0
    if num_tokens <= MAX_FILLED:
        for at in range(0, num_tokens, 500):
            body = {"prompt": [100 + at // 500, *range(200, 700)], "max_tokens": 1}
            ask(target, "POST", "/v1/completions", body)


class Before:
    """A server before an attack: its processes, its memory, how often its engine was started again, and what it answers
    to a plain request."""

    PROBE: Mapping[str, object] = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}

    def __init__(self, target: Target) -> None:
        self._target = target
        fill_cache(target)
        self._answer = self._probe()
        self._restarts = metric(target, RESTARTS)
        self._pids: list[int] = []
        self._bytes = 0
        if target.pid is not None:
            self._pids = [target.pid, engine_pid(target.pid)]
            self._bytes = family_bytes(target.pid)

    def _probe(self) -> object:
        reply = ask(self._target, "POST", "/v1/completions", dict(self.PROBE))
        return reply.json()["choices"] if reply.status == 200 else reply.status

    def judge(self, score: Score, most_mib: float = 64) -> None:
        """Whether it is the same server still."""
        target = self._target
        if target.pid is not None:
            score.zero("processes that ended", sum(not is_alive(pid) for pid in self._pids), len(self._pids))
        if self._restarts is not None:
            score.zero("restarts of the engine", (metric(target, RESTARTS) or 0) - self._restarts)
        answer = self._probe()
        score.check(
            "the answer to a plain request",
            "the same" if answer == self._answer else answer,
            "the same",
            answer == self._answer,
        )
        if target.pid is not None:
            time.sleep(SETTLE_S)
            grown = (family_bytes(target.pid) - self._bytes) / MIB
            score.at_most("memory of all processes grown by", grown, most_mib, "MiB")


# ---------------------------------------------------------------- streams that watch

WITNESSES = (
    "The capital of France is",
    "Once upon a time, there was a small village",
    "def fibonacci(n):",
    "Water boils at",
    "The three primary colours are",
    "1, 2, 3, 4, 5, 6,",
    "Dear Sir or Madam,",
    "In the beginning",
)


class Witness(threading.Thread):
    """One greedy stream after another of the same prompt, until told to end: what came, and when."""

    def __init__(self, target: Target, prompt: str, num_tokens: int) -> None:
        super().__init__(daemon=True)
        self._address = target.address
        self._ending = threading.Event()
        body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "logprobs": 1}
        body |= {"stream": True, "return_token_ids": True}
        headers = {"X-Request-Timeout": "600"}
        self._request = request("POST", "/v1/completions", body, headers)
        self.answers: list[str] = []
        """Text, ids and log-probabilities of each stream, as JSON."""
        self.gaps: list[tuple[float, float]] = []
        """(when, seconds since the event before it)."""
        self.failures: list[str] = []

    def once(self) -> str:
        """One stream to its end. Raises Unanswered."""
        body, last_s = b"", None
        with Connection(self._address, 60) as connection:
            for now_s, piece in connection.stream(self._request):
                body += piece
                if b"data:" in piece:
                    if last_s is not None:
                        self.gaps.append((now_s, now_s - last_s))
                    last_s = now_s
        return _answer(events_of(body))

    def run(self) -> None:
        while not self._ending.is_set():
            try:
                self.answers.append(self.once())
            except (Unanswered, OSError, ValueError, KeyError) as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                self._ending.wait(0.1)

    def end(self) -> None:
        """After the stream that is under way."""
        self._ending.set()


def _answer(events: Sequence[Mapping[str, Any]]) -> str:
    """All that must not depend on what else goes on. Ids and times do; so does how many tokens an event has."""
    text, end = "", None
    ids: list[int] = []
    logprobs: list[tuple[Any, ...]] = []
    for event in events:
        if "error" in event:
            raise Unanswered(f"an error event: {event['error']}")
        for choice in event["choices"]:
            text += choice["text"]
            ids += choice.get("token_ids") or []
            end = choice["finish_reason"] or end
            if found := choice.get("logprobs"):
                logprobs += list(zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True))
    if end is None:
        raise Unanswered("a stream without an end")
    return json.dumps([text, ids, logprobs, end])


class Watch:
    """Eight witnesses: first each by itself, then together for as long as the `with` lasts."""

    def __init__(self, target: Target, num_tokens: int) -> None:
        self.witnesses = [Witness(target, prompt, num_tokens) for prompt in WITNESSES]
        self.expected = [witness.once() for witness in self.witnesses]
        for witness in self.witnesses:
            witness.gaps.clear()

    def __enter__(self) -> Watch:
        for witness in self.witnesses:
            witness.start()
        return self

    def __exit__(self, *_: object) -> None:
        for witness in self.witnesses:
            witness.end()
        for witness in self.witnesses:
            witness.join(120)

    def gaps(self, since_s: float, until_s: float) -> list[float]:
        """Seconds between events that came in that time."""
        return [gap for one in self.witnesses for when, gap in list(one.gaps) if since_s <= when < until_s]

    def judge(self, score: Score) -> None:
        """Whether every stream of every witness was the one it is alone. Call after the `with`."""
        pairs = list(zip(self.witnesses, self.expected, strict=True))
        same = sum(bool(one.answers) and set(one.answers) == {alone} for one, alone in pairs)
        score.check("witnesses with the bytes they have alone", same, len(pairs), same == len(pairs))
        failures = [failure for one in self.witnesses for failure in one.failures]
        score.zero("streams of witnesses cut short", len(failures), sum(len(one.answers) for one in self.witnesses))
        for failure in failures[:3]:
            score.note(f"a witness: {failure[:300]}")


def note_first(score: Score, what: str, cases: Sequence[str], most: int = 5) -> None:
    """Shows some of what went wrong."""
    for case in cases[:most]:
        score.note(f"{what}: {case[:500]}")
