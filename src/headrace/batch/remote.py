"""A batch against a server: the same lines, journal and files as `run.py`; the answers come over HTTP.

What holds after a kill at any moment, once the same command has been run to its end: each line has exactly one outcome,
in the order of the input; an outcome that is in the journal stays as it is; at most the lines in flight are sent again.
What the server decides anew each time differs from run to run: ids, times, what its cache held, draws without a seed.

One thread decides (this module), others wait for the server (`endpoint.py`). A line that is to be sent again keeps its
place among the `concurrency` lines in flight. A server that says "not now" gets no more lines at once than it took.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headrace.api.errors import cut
from headrace.api.json import dump
from headrace.batch.endpoint import Exchange, Reply, Senders, Server
from headrace.batch.identity import Identity
from headrace.batch.journal import Journal
from headrace.batch.ledger import Ledger, OnProgress, Report, output_paths, run_durably
from headrace.batch.lines import (
    MAX_IMAGE_LINE_BYTES,
    BatchLine,
    InputFile,
    LineReader,
    RawLine,
    read_lines,
    refuse_stream,
)
from headrace.core.errors import (
    BackendUnavailable,
    BatchChanged,
    BodyTooLarge,
    ConfigError,
    DeadlineExceeded,
    InvalidJson,
    InvalidParameter,
    RequestError,
    shorten,
)

MAX_CONCURRENCY, MAX_TIMEOUT_S = 1024, 86_400
CONCURRENCY, TIMEOUT_S = 64, 600.0
ATTEMPTS = 8
"""How often a line is sent in one run before what came of it last is its outcome."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
"""Between two attempts: the first wait, doubled each time, up to the longest."""
LONGEST_RETRY_AFTER_S = 120.0
"""A server that wants a longer wait is asked again after this one."""
MODELS = "/v1/models"
FIRST_ASKS = 3
"""How often a server is asked for its models before a run gives up on it."""
ASK_S = 10.0
END_S = 5.0
"""A run that is told to stop waits so long for what is in flight."""
MOST_HELD = 256 * 2**20
"""Bytes of bodies in flight above which no new line is begun: images may make each as long as MAX_IMAGE_LINE_BYTES."""
LOOK_S = 0.1
"""Most seconds between two looks at what is late, and at whether to stop."""
GROWTH = 0.25
"""How many lines more may be under way at once after an answer, once the server has said that there were too many."""
NOT_NOW = frozenset({408, 429, 503})
"""Statuses of a server that has more lines than it can take; 408: one of them waited too long for its turn."""
OF_THE_SERVER = frozenset({429, 502, 503, 504})
"""Statuses that tell of the server rather than of the line."""
_FINGERPRINT = re.compile(rb'"system_fingerprint":"([!#-\[\]-~]{1,256})"')


@dataclass(slots=True)
class _Flight:
    """A line in flight: under way, or waiting to be sent again."""

    line: RawLine
    custom_id: str | None
    path: str
    data: bytes
    attempts: int = 0


def run_remote(
    server: Server,
    model: str,
    source: InputFile,
    out: Path,
    stop: Callable[[], bool] = lambda: False,
    on_progress: OnProgress = lambda report: None,
    concurrency: int = CONCURRENCY,
    timeout_s: float = TIMEOUT_S,
) -> Report:
    """Has every line of `source` answered into `out`; goes on where an earlier run with the same input and server
    ended.

    `model`: what `find_model` says of the server. `concurrency`: most lines in flight. `timeout_s`: most seconds for
    one answer. `stop` is asked now and then; once it says yes, nothing is sent any more, what comes within END_S is
    kept, and the report says `interrupted`.

    Raises InputFileError (the file was changed since its scan), InvalidParameter, ConfigError (`out` is in use, was
    begun with something else, or exists), StorageError or BackendUnavailable (the server does not answer any more; in
    both cases nothing is lost).
    """
    if isinstance(concurrency, bool) or not 1 <= concurrency <= MAX_CONCURRENCY:
        raise InvalidParameter("concurrency", concurrency, f"an integer from 1 to {MAX_CONCURRENCY}")
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise InvalidParameter("timeout", timeout_s, f"seconds above 0, up to {MAX_TIMEOUT_S}")
    paths = output_paths(source, out)

    def answer_all(ledger: Ledger) -> bool:
        return _Run(server, source, ledger, stop, concurrency, timeout_s).compute()

    return run_durably(source, paths, identify_server(server, model), answer_all, on_progress)


def identify_server(server: Server, model: str) -> Identity:
    """Of runs against this server while it serves this model first."""
    settings = {"url": server.url, "model": model}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return Identity(settings, (model,), digest)


def find_model(server: Server) -> str:
    """The first id that the server's list of models has. Raises ConfigError or BackendUnavailable."""
    why = ""
    for attempt in range(FIRST_ASKS):
        if attempt:
            time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1))
        exchange = server.ask(MODELS, ASK_S)
        reply = exchange.reply
        if reply is None:
            why = exchange.failure
        elif reply.status in (408, 429) or reply.status >= 500:
            why = f"{MODELS} answers {reply.status}"
        else:
            return _first_model(server, reply)
    raise BackendUnavailable(f"{server.url}: cannot be reached: {why}; no line was sent")


def _first_model(server: Server, reply: Reply) -> str:
    place = f"{server.url}: {MODELS}"
    if reply.status in (401, 403):
        raise ConfigError(f"{place} answers {reply.status}: the server wants another API key")
    if 300 <= reply.status < 400:
        where = f" and points to {shorten(reply.location)}" if reply.location else ""
        raise ConfigError(f"{place} answers {reply.status}{where}; redirects are not followed: name the server itself")
    try:
        model = (reply.body or {})["data"][0]["id"]
    except (KeyError, IndexError, TypeError):
        model = None
    if reply.status != 200 or not isinstance(model, str) or not model:
        raise ConfigError(
            f"{place} answers {reply.status} and names no model: not an OpenAI-compatible server, or another path; "
            "allowed: the base of its routes, such as http://127.0.0.1:8000"
        )
    return model


def kept_systems(journal: Journal) -> dict[str, None]:
    """The fingerprints in the answers that earlier runs have kept, in the order of the lines."""
    found: dict[str, None] = {}
    if journal.found.done:
        for index in range(journal.num_lines):
            outcome = journal.outcome(index)
            if outcome is not None and outcome.ok and (match := _FINGERPRINT.search(outcome.line)):
                found[match[1].decode()] = None
    return found


class _Run:
    def __init__(
        self,
        server: Server,
        source: InputFile,
        ledger: Ledger,
        stop: Callable[[], bool],
        concurrency: int,
        timeout_s: float,
    ) -> None:
        self._server = server
        self._ledger = ledger
        self._stop = stop
        self._concurrency = concurrency
        self._timeout_s = timeout_s
        self._lines: Iterator[RawLine] = read_lines(source)
        self._reader = LineReader(MAX_IMAGE_LINE_BYTES)
        self._at_end = False
        self._senders = Senders(server, timeout_s)
        self._under_way: dict[Exchange, _Flight] = {}
        """In the order in which they were sent."""
        self._waiting: list[tuple[float, int, _Flight]] = []
        """A heap: when to send, the line's index, the line."""
        self._limit = float(concurrency)
        """Most lines under way, as far as the server has shown."""
        self._draw = random.Random()
        self._systems = kept_systems(ledger.journal)
        self._is_known = not self._systems
        """Whether the server is known to be the one that gave the answers kept so far."""
        self._report = ledger.report
        self._num_retries = 0

    def compute(self) -> bool:
        """True once every line has its outcome; False if it was told to stop."""
        began_s = time.monotonic()
        end_s: float | None = None
        try:
            while True:
                if end_s is None and self._stop():
                    end_s = time.monotonic() + END_S
                if end_s is None:
                    self._send()
                if not self._under_way and (end_s is not None or not self._waiting):
                    break
                self._take()
                self._end_late()
                self._ledger.journal.sync()
                if end_s is not None and time.monotonic() >= end_s:
                    break
            self._ledger.journal.sync(at_once=True)
        finally:
            for exchange in self._under_way:
                exchange.cut()
            self._senders.close()
            self._report.again = self._ledger.journal.again
            self._report.retries = self._num_retries
            self._report.systems = tuple(self._systems)
            self._report.run_s = time.monotonic() - began_s
        self._report.interrupted = not self._at_end or bool(self._under_way or self._waiting)
        return not self._report.interrupted

    # ------------------------------------------------------------ what goes out

    def _send(self) -> None:
        """Sends what is due, then new lines, while there is room."""
        while len(self._under_way) < int(self._limit) and not self._stop():
            if self._waiting and self._waiting[0][0] <= time.monotonic():
                self._post(heapq.heappop(self._waiting)[2])
            elif self._is_full() or not self._start_next():
                return

    def _is_full(self) -> bool:
        """Whether as much is in flight as may be."""
        if len(self._under_way) + len(self._waiting) >= self._concurrency:
            return True
        held_bytes = sum(len(flight.data) for flight in self._under_way.values())
        return held_bytes + sum(len(flight.data) for _, _, flight in self._waiting) >= MOST_HELD

    def _start_next(self) -> bool:
        """Takes the next line from the file. False if there is none."""
        line = next(self._lines, None)
        if line is None:
            self._at_end = True
            return False
        read = self._reader.read_call(line)
        if not self._ledger.has(line):
            self._start(line, read)
        return True

    def _start(self, line: RawLine, read: BatchLine) -> None:
        if read.call is None:
            assert read.error is not None
            self._ledger.refuse(line, read, read.error)
            return
        try:
            refuse_stream(read.call.body.get("stream"))
            data = _json_bytes(read.call.body)
        except RequestError as error:
            self._ledger.refuse(line, read, error)
            return
        self._ledger.journal.begin(line.index)
        self._post(_Flight(replace(line, data=None), read.custom_id, read.call.url, data))

    def _post(self, flight: _Flight) -> None:
        self._num_retries += flight.attempts > 0
        flight.attempts += 1
        exchange = Exchange("POST", flight.path, flight.data)
        self._under_way[exchange] = flight
        self._senders.submit(exchange)

    # ------------------------------------------------------------ what comes in

    def _take(self) -> None:
        """Waits for something to happen, and deals with it."""
        seconds = LOOK_S
        if self._waiting and len(self._under_way) < int(self._limit):
            seconds = min(seconds, self._waiting[0][0] - time.monotonic())
        while (exchange := self._senders.take(seconds)) is not None:
            seconds = 0.0
            flight = self._under_way.pop(exchange, None)  # None: it was late
            if flight is not None:
                self._on_end(flight, exchange)

    def _end_late(self) -> None:
        while self._under_way:
            exchange, flight = next(iter(self._under_way.items()))
            if time.monotonic() < exchange.began_s + self._timeout_s:
                return
            exchange.cut()
            del self._under_way[exchange]
            message = f"not answered within {self._timeout_s:g} s"
            self._require_server(message)
            self._ledger.fail(flight.line, flight.custom_id, DeadlineExceeded.code, message)

    def _on_end(self, flight: _Flight, exchange: Exchange) -> None:
        reply = exchange.reply
        if exchange.too_large:
            self._ledger.fail(flight.line, flight.custom_id, BodyTooLarge.code, exchange.failure)
        elif reply is None or reply.status < 200:
            self._retry(flight, None, BackendUnavailable.code, exchange.failure or "an answer that says nothing")
        elif reply.status == 200 and reply.body is not None:
            self._keep_answer(flight, reply, reply.body)
        elif reply.status == 200:
            self._retry(flight, reply, InvalidJson.code, f"the answer is {reply.problem}")
        elif (reply.status in (408, 429) or 500 <= reply.status < 600) and reply.may_retry:
            if reply.status in NOT_NOW:
                self._limit = float(max(1, len(self._under_way)))
            self._retry(flight, reply, "", f"answers {reply.status}")
        else:
            self._keep_refusal(flight, reply)

    def _keep_answer(self, flight: _Flight, reply: Reply, body: dict[str, Any]) -> None:
        self._limit = min(float(self._concurrency), self._limit + GROWTH)
        self._check_system(body.get("system_fingerprint"))
        usage = body.get("usage")
        prompt_tokens, output_tokens = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
        self._ledger.keep(flight.line, flight.custom_id, 200, reply.text, prompt_tokens, output_tokens)

    def _keep_refusal(self, flight: _Flight, reply: Reply) -> None:
        text = reply.text
        if reply.body is None:
            kind = "invalid_request_error" if reply.status < 500 else "server_error"
            said = cut(" ".join(reply.text.split()), 500)
            text = dump({"error": {"message": said, "type": kind, "param": None, "code": None}})
        self._ledger.keep(flight.line, flight.custom_id, reply.status, text)

    def _check_system(self, fingerprint: object) -> None:
        """Raises BatchChanged if the first answer of this run is of another system than all that are kept."""
        if not isinstance(fingerprint, str) or not _FINGERPRINT.fullmatch(_as_field(fingerprint)):
            return
        if not self._is_known and fingerprint not in self._systems:
            known = " or ".join(shorten(one) for one in self._systems)
            raise BatchChanged(
                f"{self._ledger.journal.path}: was begun with system_fingerprint {known}, now {shorten(fingerprint)}: "
                "run it with the same server, or remove the journal to start over"
            )
        self._is_known = True
        self._systems[fingerprint] = None

    def _retry(self, flight: _Flight, reply: Reply | None, code: str, why: str) -> None:
        """Once more after a while; after the last attempt the line has what came of it."""
        if flight.attempts < ATTEMPTS:
            due_s = time.monotonic() + self._wait_s(flight.attempts, reply)
            heapq.heappush(self._waiting, (due_s, flight.line.index, flight))
            return
        if reply is None or reply.status in OF_THE_SERVER:
            self._require_server(why)
        if reply is None or reply.status == 200:
            self._ledger.fail(flight.line, flight.custom_id, code, f"{why} ({ATTEMPTS} attempts)")
        else:
            self._keep_refusal(flight, reply)

    def _wait_s(self, attempts: int, reply: Reply | None) -> float:
        if reply is not None and reply.retry_after_s:
            # Not before it; and not all of them in the same moment.
            return min(LONGEST_RETRY_AFTER_S, reply.retry_after_s) * self._draw.uniform(1.0, 1.1)
        longest: float = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempts - 1))
        return longest * self._draw.uniform(0.5, 1.0)

    def _require_server(self, why: str) -> None:
        """Raises BackendUnavailable if the server does not answer at all: then no line is at fault."""
        exchange = self._server.ask(MODELS, ASK_S)
        reply = exchange.reply
        if reply is None or reply.status == 429 or reply.status >= 500:
            self._ledger.journal.sync(at_once=True)
            raise BackendUnavailable(
                f"{self._server.url}: the server is not there any more: {why}; what is done is kept: run the same "
                "command again"
            )


def _json_bytes(body: object) -> bytes:
    try:
        return dump(body).encode("ascii")
    except RecursionError:
        raise InvalidJson("the JSON is nested too deeply") from None


def _as_field(fingerprint: str) -> bytes:
    return b'"system_fingerprint":' + dump(fingerprint).encode("ascii")


def _count(usage: object, name: str) -> int:
    """Of a server's usage, where it is one; the journal has 32 bits for it."""
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if type(value) is int and 0 <= value < 2**32 else 0
