"""The run of a batch: lines in, a bounded number of them in flight, every outcome into the journal, then the files.

What holds after a kill at any moment, once the same command has been run to its end: each line has exactly one outcome,
in the order of the input, with the bytes of a run that nothing disturbed; no more lines are computed twice than were in
flight.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from headrace.api.answers import Stamp, answer_body
from headrace.api.errors import error_object
from headrace.api.json import dump
from headrace.api.openai import ApiRequest, call_parsers, check_model, engine_requests
from headrace.batch.identity import identify, line_seed
from headrace.batch.ledger import Ledger, OnProgress, Report, output_paths, run_durably
from headrace.batch.lines import MAX_IMAGE_LINE_BYTES, BatchLine, InputFile, LineReader, RawLine, read_lines
from headrace.core.errors import EngineError, ModelNotFound, RequestError, status_of
from headrace.core.types import ErrorEvent, Event, Request, TokenEvent
from headrace.engine.answer import Answer, Completion
from headrace.engine.client import InProcessClient
from headrace.engine.grammars import Grammars
from headrace.engine.llm import MOST_PIXEL_BYTES
from headrace.engine.model import OpenModel


@dataclass(slots=True)
class _Flight:
    """A line in flight."""

    line: RawLine
    custom_id: str | None
    request: ApiRequest
    model: str
    answers: dict[str, Answer]
    completions: dict[int, Completion] = field(default_factory=dict)


def run_batch(
    opened: OpenModel,
    source: InputFile,
    out: Path,
    stop: Callable[[], bool] = lambda: False,
    on_progress: OnProgress = lambda report: None,
) -> Report:
    """Answers every line of `source` into `out`; goes on where an earlier run with the same input and settings ended.

    `stop` is asked between steps; once it says yes, what is finished is put on disk and the report says `interrupted`.
    Raises InputFileError (the file was changed since its scan), ConfigError (`out` is in use, was begun with something
    else, or exists), StorageError (nothing is lost), ModelError or EngineError.
    """
    paths = output_paths(source, out)
    if opened.has_text:
        _ = opened.tokenizer  # what is wrong with it is no line's fault

    def answer_all(ledger: Ledger) -> bool:
        return _Run(opened, source, ledger, stop).compute()

    return run_durably(source, paths, identify(opened), answer_all, on_progress)


class _Run:
    def __init__(self, opened: OpenModel, source: InputFile, ledger: Ledger, stop: Callable[[], bool]) -> None:
        self._opened = opened
        self._identity = ledger.identity
        self._ledger = ledger
        self._journal = ledger.journal
        self._stop = stop
        self._created = int(ledger.journal.manifest["created"])
        # A template that writes the date must write the same one after midnight.
        self._clock = datetime.fromtimestamp(self._created, UTC)
        self._lines: Iterator[RawLine] = read_lines(source)
        self._reader = LineReader() if opened.images is None else LineReader(MAX_IMAGE_LINE_BYTES)
        self._client: InProcessClient | None = None
        self._live: dict[str, _Flight] = {}
        """Request id -> its line."""
        self._held_bytes = 0
        """Of the pixels of these requests."""
        self._window = 2 * opened.config.max_num_seqs
        self._report = ledger.report

    def compute(self) -> bool:
        """True once every line has its outcome; False if it was told to stop."""
        began_s = time.monotonic()
        try:
            while not self._stop():
                self._fill()
                if not self._live:
                    break
                self._step()
                self._journal.sync()
            else:
                self._report.interrupted = True
            self._journal.sync(at_once=True)
        finally:
            if self._client is not None:
                self._client.close()
            self._report.again = self._journal.again
            self._report.run_s = time.monotonic() - began_s - self._report.load_s
        return not self._report.interrupted

    def _fill(self) -> None:
        """Starts lines while there is room: what is not yet in flight stays in the file."""
        while len(self._live) < self._window and self._held_bytes < MOST_PIXEL_BYTES and not self._stop():
            line = next(self._lines, None)
            if line is None:
                return
            read = self._reader.read(line)
            if not self._ledger.has(line):
                self._start(line, read)

    def _start(self, line: RawLine, read: BatchLine) -> None:
        if read.error is not None:
            self._ledger.refuse(line, read, read.error)
            return
        request = read.request
        assert request is not None
        try:
            model = check_model(request, self._identity.served)
            if request.sampling.temperature > 0 and request.sampling.seed is None:
                request = replace(request, sampling=replace(request.sampling, seed=line_seed(line)))
            adapter = model if model in self._opened.limits.adapters else ""
            now_s = time.monotonic()
            asked = engine_requests(request, self._opened, str(line.index), now_s, adapter, self._clock)
        except (RequestError, ModelNotFound) as error:
            self._ledger.refuse(line, read, error)
            return
        client = self._running_client()
        self._journal.begin(line.index)
        tokenizer = self._opened.tokenizer if self._opened.has_text else None
        answers = {one.id: Answer(i, one, tokenizer, now_s) for i, one in enumerate(asked)}
        # Of what it holds, a line of images is the largest part by far, and nothing asks for it any more.
        flight = _Flight(replace(line, data=None), read.custom_id, request.without_messages(), model, answers)
        for one in asked:
            self._live[one.id] = flight
            self._held_bytes += _pixel_bytes(one)
            client.submit(one)

    def _running_client(self) -> InProcessClient:
        """Loads the weights when the first line needs them."""
        if self._client is None:
            core, self._report.load_s = self._opened.start(grammars=Grammars(self._opened.vocabulary))
            self._client = InProcessClient(core)
        return self._client

    def _step(self) -> None:
        client = self._running_client()
        events = client.poll()
        if (reason := client.health()) is not None:
            # No line is at fault: they stay open, for the next run.
            raise EngineError(f"the engine has ended: {reason}; what is done is kept: run the same command again")
        for event in events:
            self._on_event(client, event)

    def _on_event(self, client: InProcessClient, event: Event) -> None:
        flight = self._live.get(event.request_id)
        if flight is None:
            return
        answer = flight.answers[event.request_id]
        if isinstance(event, TokenEvent):
            if (num_output := answer.tokens(event)) is not None:
                client.finish(event.request_id, num_output)
            return
        self._forget(event.request_id)
        if isinstance(event, ErrorEvent):
            for request_id in flight.answers:
                if request_id in self._live:
                    self._forget(request_id)
                    client.abort(request_id)
            body = {"error": error_object(event.code, event.message)}
            self._ledger.keep(flight.line, flight.custom_id, status_of(event.code), dump(body))
            return
        flight.completions[answer.index] = answer.end(event)
        if len(flight.completions) == len(flight.answers):
            self._answer(flight)

    def _forget(self, request_id: str) -> None:
        flight = self._live.pop(request_id)
        self._held_bytes -= _pixel_bytes(flight.answers[request_id].request)

    def _answer(self, flight: _Flight) -> None:
        completions = [flight.completions[i] for i in range(len(flight.answers))]
        identity = self._identity
        stamp = Stamp(identity.answer_id(flight.line), self._created, flight.model, identity.system_fingerprint)
        tokenizer = self._opened.tokenizer if self._opened.has_text else None
        # What the cache held depends on which lines ran before: the only thing that would differ after a restart.
        parsers = call_parsers(flight.request, self._opened)
        body = answer_body(flight.request, stamp, completions, tokenizer, cached_tokens=False, parsers=parsers)
        usage = body["usage"]
        tokens = (usage["prompt_tokens"], usage["completion_tokens"])
        self._ledger.keep(flight.line, flight.custom_id, 200, dump(body), *tokens)


def _pixel_bytes(request: Request) -> int:
    return sum(len(image.pixels) for image in request.images)
