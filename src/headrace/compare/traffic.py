"""Recorded traffic and lists of questions: a file of requests, one a line.

A line of a JSON-lines file is an object; a CSV file has the same fields under its header. Names are read without regard
to case, and a space is as good as `_`: so the public traces of Azure (TIMESTAMP, ContextTokens, GeneratedTokens),
BurstGPT (Timestamp, Request tokens, Response tokens) and Mooncake (timestamp, input_length, output_length) can be read
as they are. Of a line's fields there is

- one prompt: text (through the model's chat template, if it has one), messages (of a model that sees also with
  image_url parts), token ids, or, where only its length was recorded, a number of tokens: such a prompt is made of
  random ordinary tokens;
- at most one answer: max_tokens, the most that it may have; or a recorded length, then every answer has exactly that;
- at most one time: seconds, milliseconds where the name ends in _ms, a date and time in ISO 8601 (UTC unless it says
  another zone). A `timestamp` beside input_length, output_length or hash_ids is Mooncake's: milliseconds;
- a title.
"""

from __future__ import annotations

import codecs
import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from headrace.api.fields import Unknown, check_unicode
from headrace.api.json import read_object
from headrace.api.messages import read_messages
from headrace.compare.arrivals import ARRIVE, MAX_REQUESTS, MAX_SECONDS, RECORDED
from headrace.compare.pictures import PictureReader
from headrace.compare.synthetic import ordinary_ids, random_prompt
from headrace.compare.workloads import Workload, WorkloadRequest, check_room, repeat
from headrace.core import strict_json
from headrace.core.errors import InputFileError, InvalidParameter, RequestError, shorten
from headrace.core.types import SamplingParams
from headrace.engine.images import IMAGE_MARK

if TYPE_CHECKING:
    from headrace.engine.model import OpenModel, Prompt

DEFAULT_MAX_TOKENS = 96
"""Of an answer where nobody says how long it may be."""
PROMPTS: Mapping[str, str] = {
    "prompt": "text",
    "messages": "messages",
    "token_ids": "token_ids",
    "prompt_token_ids": "token_ids",
    "prompt_tokens": "length",
    "input_tokens": "length",
    "input_length": "length",
    "contexttokens": "length",
    "request_tokens": "length",
}
"""Name -> what it holds."""
ANSWERS: Mapping[str, bool] = {
    "max_tokens": False,
    "output_tokens": True,
    "output_length": True,
    "generatedtokens": True,
    "response_tokens": True,
}
"""Name -> whether it is a recorded length."""
TIMES: Mapping[str, float] = {"arrival_s": 1.0, "arrival_ms": 1e-3, "timestamp": 1.0, "timestamp_ms": 1e-3}
"""Name -> seconds of its unit."""
MOONCAKE = frozenset({"input_length", "output_length", "hash_ids"})
MAX_LINE_BYTES = 16 * 2**20
MAX_TIME = 1e12
"""Seconds; more than any calendar has."""
MAX_NAMED = 10
"""Most fields that a note names."""
_NUMBERS = frozenset(name for name, kind in PROMPTS.items() if kind == "length").union(ANSWERS, TIMES)
_USED = frozenset({*PROMPTS, *ANSWERS, *TIMES, "title"})
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_PROMPTS = "one of prompt, messages, token_ids, prompt_tokens"


@dataclass(frozen=True, slots=True)
class Line:
    """A request as it was recorded."""

    number: int
    """Of its line in the file, from 1."""
    kind: str
    """Of its prompt: text, messages, token_ids or length."""
    prompt_field: str
    """The name of its prompt's field, as the file has it."""
    prompt: Prompt | int
    """A number where only its length is known."""
    answer_field: str
    answer_tokens: int | None
    """None: not stated."""
    exact: bool
    """Whether the answer has exactly so many, or at most."""
    clock: str
    """How its time was given; empty: not at all."""
    time_s: float
    title: str

    @property
    def text(self) -> str:
        """The prompt as it was written; empty where it never was text."""
        if isinstance(self.prompt, str):
            return self.prompt
        if self.kind != "messages":
            return ""
        assert isinstance(self.prompt, Sequence)
        return "\n".join(_message_text(one) for one in self.prompt if isinstance(one, Mapping))


def _message_text(message: Mapping[str, object]) -> str:
    content = message.get("content", "")
    if isinstance(content, list):
        content = "\n".join(part.get("text", IMAGE_MARK) for part in content)
    return f"{message['role']}: {content}"


@dataclass(slots=True)
class Recording:
    """What a file holds."""

    lines: list[Line] = field(default_factory=list)
    unused: dict[str, None] = field(default_factory=dict)
    """Names of fields that nothing was done with."""
    unanswered: int = 0
    """Lines left out: requests that failed (a recorded length of 0)."""


@contextmanager
def located(path: Path, number: int) -> Iterator[None]:
    """What is wrong in there is told as an InputFileError with the file and the line."""
    try:
        yield
    except InputFileError:
        raise
    except RequestError as error:
        raise InputFileError(f"{printable(path)}, line {number}: {error}") from error


def printable(path: Path) -> str:
    """A file name need not be valid text, nor be fit for a terminal."""
    text = os.fsencode(path).decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def read_recording(path: Path, most: int | None) -> Recording:
    """The first `most` requests of a file (.jsonl, .csv), in its order; None: all. Raises InputFileError, which names
    file, line and field."""
    where = printable(path)
    found = Recording()
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    try:
        if not path.is_file():
            raise InputFileError(f"{where}: {'not a regular file' if path.exists() else 'no such file'}")
        for number, row in rows:
            with located(path, number):
                line = _read_line(number, row, found)
                if line is not None:
                    _check_alike(line, found.lines)
                    found.lines.append(line)
            if most is not None and len(found.lines) == most:
                break
            if len(found.lines) > MAX_REQUESTS:
                raise InputFileError(f"{where}: more than {MAX_REQUESTS} requests; take the first with num_requests")
    except OSError as error:
        raise InputFileError(f"{where}: cannot be read: {error.strerror}") from error
    if not found.lines:
        left_out = f" but {found.unanswered} without an answer" if found.unanswered else ""
        raise InputFileError(f"{where}: no requests{left_out}, allowed: at least one line with {_PROMPTS}")
    return found


def _text_lines(path: Path) -> Iterator[str]:
    """The lines as they are, their ends included."""
    with path.open("rb") as file:
        number = 0
        while data := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            with located(path, number):
                if len(data) > MAX_LINE_BYTES:
                    raise RequestError(f"longer than {MAX_LINE_BYTES} bytes")
                try:
                    text = data.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode()
                except UnicodeDecodeError as error:
                    raise RequestError(f"not UTF-8 at byte {error.start}") from None
            yield text


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in enumerate(_text_lines(path), 1):
        if text.strip():
            with located(path, number):
                row = read_object(text)
            yield number, row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Cells of fields that are numbers are read as such; empty ones are not there."""
    reader = csv.reader(_text_lines(path), strict=True)
    header: list[str] | None = None
    while True:
        with located(path, reader.line_num + 1):
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise RequestError(f"not CSV: {error}") from None
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = cells
            continue
        with located(path, reader.line_num):
            if len(cells) != len(header):
                raise InvalidParameter("columns", len(cells), f"{len(header)}, as in the header")
            row = {}
            for name, cell in zip(header, cells, strict=True):
                if name in row:
                    raise InvalidParameter("header", name, "every name once")
                row[name] = _number(cell) if canonical(name) in _NUMBERS else cell or None
        yield reader.line_num, row


def _number(cell: str) -> object:
    """The number that a cell spells, or the cell."""
    try:
        return strict_json.parse(cell, whole=True) if cell else None
    except (ValueError, RecursionError):
        return cell


def canonical(name: str) -> str:
    return name.lower().replace(" ", "_")


class _Fields:
    """The fields of a line by their canonical names; null is the same as absent."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self._left: dict[str, tuple[str, Any]] = {}
        self.unused: list[str] = []
        """Names that say nothing here."""
        for name, value in row.items():
            key = canonical(name)
            if value is None:
                continue
            if key not in _USED:
                self.unused.append(name)
            elif key in self._left:
                raise InvalidParameter(name, value, f"to leave it out beside {self._left[key][0]}, the same field")
            else:
                self._left[key] = (name, value)
        self.is_mooncake = any(canonical(name) in MOONCAKE for name in row)

    def take_one(self, names: Iterable[str], what: str) -> tuple[str, str, Any]:
        """(canonical name, name, value) of the one that is there; ("", "", None) if none is. Raises InvalidParameter
        for two."""
        here = [(name, *self._left.pop(name)) for name in names if name in self._left]
        if len(here) > 1:
            raise InvalidParameter(here[1][1], here[1][2], f"to leave it out beside {here[0][1]}: {what}")
        return here[0] if here else ("", "", None)


def _read_line(number: int, row: Mapping[str, Any], found: Recording) -> Line | None:
    """None: a request that failed. Raises RequestError."""
    check_unicode(row)
    fields = _Fields(row)
    prompt_name, prompt_field, prompt = fields.take_one(PROMPTS, _PROMPTS)
    answer_name, answer_field, answer = fields.take_one(ANSWERS, "one of max_tokens, output_tokens")
    time_name, time_field, time = fields.take_one(TIMES, "one of arrival_s, timestamp")
    _, title_field, title = fields.take_one(("title",), "title")
    if not prompt_name:
        raise InvalidParameter("prompt", None, _PROMPTS)
    kind = PROMPTS[prompt_name]
    prompt = _read_prompt(kind, prompt_field, prompt, found)
    if answer_name:
        _check_count(answer_field, answer, low=0 if ANSWERS[answer_name] else 1)
    clock, time_s = "", 0.0
    if time_name:
        unit = 1e-3 if fields.is_mooncake and time_name == "timestamp" else TIMES[time_name]
        clock, time_s = _read_time(time_field, time, unit)
    if title is not None and not isinstance(title, str):
        raise InvalidParameter(title_field, title, "a string")
    found.unused.update(dict.fromkeys(fields.unused))
    if answer == 0:
        found.unanswered += 1
        return None
    exact = kind == "length" or (bool(answer_name) and ANSWERS[answer_name])
    return Line(number, kind, prompt_field, prompt, answer_field, answer, exact, clock, time_s, title or "")


def _read_prompt(kind: str, field_name: str, value: Any, found: Recording) -> Prompt | int:
    if kind == "messages":
        unknown = Unknown(strict=False)
        messages = read_messages(value, unknown)
        found.unused.update(dict.fromkeys(unknown.names))
        return messages
    if kind == "length":
        _check_count(field_name, value, low=1)
    elif kind == "text":
        if not isinstance(value, str) or not value:
            raise InvalidParameter(field_name, value, "a text of at least one character")
    elif not isinstance(value, list) or not value or not all(type(one) is int for one in value):
        raise InvalidParameter(field_name, value, "a list of at least one token id")
    checked: Prompt | int = value
    return checked


def _check_count(name: str, value: object, low: int) -> None:
    if type(value) is not int or value < low:
        raise InvalidParameter(name, value, f"a number of tokens, an integer from {low}")


def _read_time(name: str, value: object, unit: float) -> tuple[str, float]:
    """(how it was given, seconds from some moment that is the same for all of a file)."""
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            moment = None
        if moment is not None:
            moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
            return f"{name} in ISO 8601", (moment - _EPOCH).total_seconds()
    elif type(value) in (int, float) and abs(value) <= MAX_TIME:  # type: ignore[arg-type]
        return f"{name} in {'seconds' if unit == 1 else 'milliseconds'}", value * unit  # type: ignore[operator]
    allowed = f"a number from {-MAX_TIME:g} to {MAX_TIME:g}, or a date and time in ISO 8601"
    raise InvalidParameter(name, value, allowed)


def _check_alike(line: Line, before: list[Line]) -> None:
    """All lines have a time, told in one way, or none has; every answer's length is exact, or none is."""
    if not before:
        return
    first = before[0]
    if line.clock != first.clock:
        allowed = f"{first.clock or 'to leave it out'}, as in line {first.number}"
        raise InvalidParameter("time", line.clock or None, allowed)
    if line.exact != first.exact:
        kinds = {True: "a recorded length (output_tokens)", False: "no more than max_tokens"}
        raise InvalidParameter("answer", kinds[line.exact], f"{kinds[first.exact]}, as in line {first.number}")


def read_traffic(
    path: Path,
    opened: OpenModel,
    *,
    max_tokens: int | None = None,
    num_requests: int | None = None,
    seed: int = 0,
    speed: float = 1.0,
    replay: bool | None = None,
) -> Workload:
    """The requests of a file, for one model.

    `max_tokens`: longer answers are cut to it; it also holds where a line states none. `num_requests`: the first of the
    file; where there are fewer, and they are not replayed, they are asked again. `seed`: of prompts whose length alone
    is known. `replay`: whether requests arrive when they were recorded; None: where the file has times; else all arrive
    at once. `speed`: how many times as fast as recorded. Raises InputFileError (file, line, field), InvalidParameter.
    """
    recording = read_recording(path, num_requests)
    where, lines = printable(path), sorted(recording.lines, key=lambda line: line.time_s)
    timed = bool(lines[0].clock)
    if replay and not timed:
        raise InvalidParameter("arrivals", RECORDED, f"another process: {where} has no times")
    replay = timed if replay is None else replay
    if not replay and speed != 1:
        raise InvalidParameter("speed", speed, "1 where requests do not arrive as recorded")
    if replay and num_requests is not None and num_requests > len(lines):
        allowed = f"1 to {len(lines)}, the requests of {where}; more with another process for arrivals"
        raise InvalidParameter("num_requests", num_requests, allowed)
    make = _Maker(opened, max_tokens, seed, any(line.kind == "length" for line in lines))
    requests: list[WorkloadRequest] = []
    for line in lines:
        with located(path, line.number):
            requests.append(make(line))
    if replay:
        times = _replayed([line.time_s for line in lines], speed)
        requests = [replace(one, arrival_s=time_s) for one, time_s in zip(requests, times, strict=True)]
    notes = [*_file_notes(recording), *_answer_notes(lines, requests)]
    if replay:
        notes.append(f"{ARRIVE}as recorded" + (f", {speed:g} times as fast." if speed != 1 else "."))
    if num_requests is not None and num_requests > len(lines):
        notes.append(repeated_note(len(lines), num_requests))
        requests = list(repeat(requests, num_requests))
    return Workload(
        printable(Path(path.name)),
        tuple(requests),
        ignore_eos=lines[0].exact,
        templated=any(line.kind == "messages" or (line.kind == "text" and make.templated) for line in lines),
        seed=seed if make.words else None,
        notes=tuple(notes),
    )


class _Maker:
    """Lines to requests of one model."""

    def __init__(self, opened: OpenModel, max_tokens: int | None, seed: int, draws: bool) -> None:
        self._opened = opened
        self._max_tokens = max_tokens
        self._seed = seed
        self._pictures = PictureReader(opened)
        self.words = ordinary_ids(opened) if draws else ()
        self.templated = opened.has_text and opened.tokenizer.chat_template is not None

    def __call__(self, line: Line) -> WorkloadRequest:
        """At no time yet. Raises RequestError."""
        longest = self._opened.limits.max_model_len
        if isinstance(line.prompt, int):
            limit = self._check(line, line.prompt, longest)
            token_ids = random_prompt(self.words, line.prompt, self._seed, line.number)
            return WorkloadRequest(token_ids, limit, title=line.title, text=line.text)
        prompt: Prompt = line.prompt
        sources: Mapping[str, str] = {}
        if line.kind == "text" and self.templated:
            prompt = [{"role": "user", "content": prompt}]
        elif line.kind == "messages" and self._opened.images is not None:
            prompt, sources = self._pictures.into(cast("Sequence[Mapping[str, Any]]", prompt))
        asked = self._opened.request(f"line {line.number}", prompt, SamplingParams())
        limit = self._check(line, len(asked.token_ids), longest)
        return WorkloadRequest(
            asked.token_ids,
            limit,
            title=line.title,
            text=line.text,
            images=asked.images,
            sources=tuple(sources[image.hash] for image in asked.images),
        )

    def _check(self, line: Line, count: int, longest: int) -> int:
        """Most tokens of the answer."""
        limits = [most for most in (line.answer_tokens, self._max_tokens) if most is not None]
        # What nobody asked for gives way to the context.
        limit = min(limits) if limits else max(1, min(DEFAULT_MAX_TOKENS, longest - count))
        check_room(line.prompt_field, count, line.answer_field or "max_tokens", limit, longest)
        return limit


def _replayed(times: Sequence[float], speed: float) -> list[float]:
    """From the first on, to the microsecond."""
    found = [round((time_s - times[0]) / speed, 6) for time_s in times]
    if found[-1] > MAX_SECONDS:
        span_s = times[-1] - times[0]
        allowed = f"{span_s / MAX_SECONDS:.6g} or more, for {span_s:g} recorded seconds to last at most {MAX_SECONDS:g}"
        raise InvalidParameter("speed", speed, f"{allowed}; or fewer requests")
    return found


def _file_notes(recording: Recording) -> Iterator[str]:
    first = recording.lines[0]
    if any(line.kind == "length" for line in recording.lines):
        yield "The file has lengths where prompts would be: those prompts are random ordinary tokens."
    if first.exact:
        yield "Answers do not end by themselves: each has its full length."
    if first.clock:
        yield f"The file has its times as {first.clock}."
    if recording.unanswered:
        yield f"Left out, since their recorded answers have 0 tokens: {recording.unanswered}."
    if recording.unused:
        more = len(recording.unused) - MAX_NAMED
        named = ", ".join(shorten(name) for name in list(recording.unused)[:MAX_NAMED])
        yield f"Fields that were not used: {named}{f' and {more} more' if more > 0 else ''}."


def _answer_notes(lines: Sequence[Line], requests: Sequence[WorkloadRequest]) -> Iterator[str]:
    pairs = [(line.answer_tokens, one.max_tokens) for line, one in zip(lines, requests, strict=True)]
    if cut := [most for stated, most in pairs if stated is not None and stated > most]:
        yield f"{len(cut)} of {len(lines)} answers were cut to {max(cut)} tokens."
    if unstated := [most for stated, most in pairs if stated is None]:
        said = f"{max(unstated)} tokens" + ("" if lines[0].exact else " at most")
        yield f"The file does not state how long {len(unstated)} of {len(lines)} answers are: {said}."


def repeated_note(count: int, asked: int) -> str:
    return f"The {count} requests are asked again from the first on, up to {asked}."
