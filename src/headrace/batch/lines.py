"""IN.jsonl: one OpenAI batch line a line. The file is streamed; what is wrong with one line is that line's error."""

from __future__ import annotations

import codecs
import hashlib
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from headrace.api.errors import cut
from headrace.api.json import read_object
from headrace.api.openai import URLS, ApiRequest, read_body
from headrace.core.errors import (
    DuplicateCustomId,
    InputFileError,
    InvalidCustomId,
    InvalidJson,
    InvalidJsonLine,
    InvalidMethod,
    InvalidParameter,
    InvalidUrl,
    LineTooLong,
    MissingField,
    RequestError,
    UnknownParameter,
    UnsupportedParameter,
)

MAX_LINES = 50_000
MAX_BYTES = 200 * 2**20
MAX_LINE_BYTES = 2 * 2**20
"""Longest line of texts alone."""
MAX_IMAGE_LINE_BYTES = 66 * 2**20
"""Longest line that may have images."""
MAX_CUSTOM_ID = 512
FIELDS = ("custom_id", "method", "url", "body")
_BLANK = b" \t\r\n\v\f"


@dataclass(frozen=True, slots=True)
class RawLine:
    """A line that is not blank."""

    index: int
    """From 0, among the lines that are not blank."""
    number: int
    """From 1, in the file."""
    data: bytes | None
    """Without the white space around it; None if it is longer than MAX_IMAGE_LINE_BYTES."""
    digest: bytes
    """The first 16 bytes of its SHA-256."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """What is known of the whole file before a line is answered."""

    path: Path
    sha256: str
    num_lines: int
    mtime_s: int
    """When it was last changed, in seconds since 1970."""


@dataclass(frozen=True, slots=True)
class Call:
    """A line that is put together rightly; what its body holds has not been looked at."""

    url: str
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BatchLine:
    """What one line asks for, or why it cannot be asked."""

    custom_id: str | None
    call: Call | None = None
    request: ApiRequest | None = None
    error: RequestError | None = None

    @property
    def is_call(self) -> bool:
        """Whether the line is a call at all: then its error is the answer to it, as a server would give it."""
        return self.call is not None


def scan(path: Path) -> InputFile:
    """Reads the file once. Raises InputFileError for what is wrong with the file as a whole."""
    try:
        status = path.stat()
        # Asked before opening: to open a named pipe would wait for a writer.
        if stat.S_ISDIR(status.st_mode):
            raise InputFileError(f"{path}: is a folder, allowed: a JSON-lines file")
        if not stat.S_ISREG(status.st_mode):
            raise InputFileError(f"{path}: not a regular file, which a batch needs to go on after an interruption")
        if status.st_size > MAX_BYTES:
            raise InputFileError(f"{path}: {status.st_size} bytes, allowed: up to {MAX_BYTES}")
        with path.open("rb", buffering=2**20) as file:
            return _scan(path, file, max(0, int(status.st_mtime)))
    except FileNotFoundError:
        raise InputFileError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputFileError(f"{path}: not UTF-8: {error.reason}") from None


def _scan(path: Path, file: BinaryIO, mtime_s: int) -> InputFile:
    digest = hashlib.sha256()
    utf8 = codecs.getincrementaldecoder("utf-8")()

    def read(chunk: bytes) -> None:
        digest.update(chunk)
        utf8.decode(chunk)

    count = 0
    for line in _split(file, read):
        count += 1
        if count > MAX_LINES:
            raise InputFileError(f"{path}: more than {MAX_LINES} lines (at line {line.number}), allowed: {MAX_LINES}")
    utf8.decode(b"", final=True)
    if not count:
        raise InputFileError(f"{path}: no lines, allowed: 1 to {MAX_LINES}")
    return InputFile(path, digest.hexdigest(), count, mtime_s)


def read_lines(source: InputFile) -> Iterator[RawLine]:
    """The lines, in order, one in memory. Raises InputFileError at the end if they are not those of the scan."""
    digest = hashlib.sha256()
    count = 0
    with source.path.open("rb", buffering=2**20) as file:
        for line in _split(file, digest.update):
            count += 1
            if count > source.num_lines:
                break
            yield line
    if digest.hexdigest() != source.sha256:
        raise InputFileError(f"{source.path}: the file was changed while it was read; put it back, or start over")


def _split(file: BinaryIO, read: Callable[[bytes], None]) -> Iterator[RawLine]:
    """Lines that are not blank; `read` hears every byte."""
    index = number = 0
    while piece := file.readline(MAX_IMAGE_LINE_BYTES + 2):
        read(piece)
        number += 1
        line = hashlib.sha256()
        data: bytes | None = piece
        if number == 1:
            data = piece.removeprefix(codecs.BOM_UTF8)
        if len(piece) == MAX_IMAGE_LINE_BYTES + 2 and not piece.endswith(b"\n"):
            data = None
            line.update(piece)
            while not piece.endswith(b"\n") and (piece := file.readline(MAX_LINE_BYTES)):
                read(piece)
                line.update(piece)
        elif not (data := (data or b"").strip(_BLANK)):
            continue
        else:
            line.update(data)
        yield RawLine(index, number, data, line.digest()[:16])
        index += 1


class LineReader:
    """Reads lines in the order of the file: a custom_id is remembered, so that its second use is refused."""

    def __init__(self, most_bytes: int = MAX_LINE_BYTES) -> None:
        """`most_bytes`: longer lines are refused; MAX_IMAGE_LINE_BYTES where there is a model that sees."""
        self._most_bytes = most_bytes
        self._seen: dict[str, int] = {}

    def read(self, line: RawLine) -> BatchLine:
        """What the line asks for; never raises for what is in it."""
        read = self.read_call(line)
        if (call := read.call) is None:
            return read
        try:
            request = read_body(URLS[call.url], call.body)
            refuse_stream(request.stream)
            if request.timeout_s is not None:
                raise UnsupportedParameter("timeout", request.timeout_s, "to leave it out: a batch has no deadline")
        except RequestError as error:
            return replace(read, error=error)
        return replace(read, request=request)

    def read_call(self, line: RawLine) -> BatchLine:
        """The same, but nobody looks into the body: `request` is None."""
        try:
            if line.data is None or len(line.data) > self._most_bytes:
                raise LineTooLong(f"the line is longer than {self._most_bytes} bytes")
            fields = _object(line.data)
        except RequestError as error:
            return BatchLine(None, error=error)
        custom_id: str | None = None
        try:
            custom_id = self._custom_id(fields, line.number)
            self._remember(custom_id, line.number)
            return BatchLine(custom_id, _call(fields))
        except RequestError as error:
            return BatchLine(custom_id, error=error)

    def _custom_id(self, fields: Mapping[str, Any], number: int) -> str:
        custom_id = fields.get("custom_id")
        if custom_id is None:
            raise MissingField("custom_id")
        if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID:
            raise InvalidCustomId("custom_id", custom_id, f"a string of 1 to {MAX_CUSTOM_ID} characters")
        return custom_id

    def _remember(self, custom_id: str, number: int) -> None:
        first = self._seen.setdefault(custom_id, number)
        if first != number:
            raise DuplicateCustomId("custom_id", custom_id, f"one line each; line {first} has it too")


def _object(data: bytes) -> dict[str, Any]:
    try:
        return read_object(data.decode())
    except InvalidJson as error:
        raise InvalidJsonLine(str(error)) from None


def _call(fields: Mapping[str, Any]) -> Call:
    for name in FIELDS:
        if fields.get(name) is None:
            raise MissingField(name)
    for name in fields:
        if name not in FIELDS:
            raise UnknownParameter(name, f"a batch line, allowed: {', '.join(FIELDS)}")
    if fields["method"] != "POST":
        raise InvalidMethod("method", fields["method"], "POST")
    url = fields["url"]
    if not isinstance(url, str) or url not in URLS:
        raise InvalidUrl("url", url, ", ".join(URLS))
    if not isinstance(fields["body"], dict):
        raise InvalidParameter("body", fields["body"], "an object")
    return Call(url, fields["body"])


def refuse_stream(value: object) -> None:
    """Of a body's `stream`. Raises UnsupportedParameter."""
    if value is not None and value is not False:
        raise UnsupportedParameter("stream", value, "false: a batch answers in whole bodies")


def line_error(line: BatchLine, number: int) -> dict[str, Any]:
    """The error object of a line that is no call: `code`, `message`, `param`, and the `line` of the file."""
    error = line.error
    assert error is not None
    field = getattr(error, "field", None)
    return {"code": error.code, "message": cut(" ".join(str(error).split()), 1000), "param": field, "line": number}
