"""IN.jsonl: what is wrong with the file, and what is wrong with one line of it."""

from __future__ import annotations

import codecs
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.api.json import dump
from headrace.batch import lines as lines_module
from headrace.batch.lines import MAX_LINE_BYTES, MAX_LINES, BatchLine, LineReader, line_error, read_lines, scan
from headrace.core.errors import InputFileError
from tests.unit.batch_cases import call


def read(path: Path) -> list[BatchLine]:
    reader = LineReader()
    return [reader.read(line) for line in read_lines(scan(path))]


def file_of(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(data)
    return path


def test_lines_as_they_are_meant(tmp_path: Path) -> None:
    """BOM, CRLF, blank lines, no line end at the end: none of it matters."""
    one, two = json.dumps(call("a")).encode(), json.dumps(call("b")).encode()
    plain = scan(file_of(tmp_path, one + b"\n" + two + b"\n"))
    numbers = [(line.index, line.number, line.digest) for line in read_lines(plain)]
    assert [pair[:2] for pair in numbers] == [(0, 1), (1, 2)]
    odd = codecs.BOM_UTF8 + one + b"  \r\n\r\n \t\n" + b"  " + two
    found = [(line.index, line.number, line.digest) for line in read_lines(scan(file_of(tmp_path, odd)))]
    assert found == [(0, 1, numbers[0][2]), (1, 4, numbers[1][2])]
    assert [line.custom_id for line in read(tmp_path / "in.jsonl")] == ["a", "b"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no lines"),
        (b"\n\n  \r\n\n", "no lines"),
        (codecs.BOM_UTF8 + b"\n", "no lines"),
        (b'{"custom_id": "\xff"}\n', "not UTF-8"),
        ("{}\n".encode("utf-16"), "not UTF-8"),
        (b"{}\n\xe2\x82", "not UTF-8"),
        (b"{}\n" * (MAX_LINES + 1), "more than 50000 lines"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(InputFileError, match=words):
        scan(file_of(tmp_path, data))


def test_things_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="no such file"):
        scan(tmp_path / "none")
    with pytest.raises(InputFileError, match="is a folder"):
        scan(tmp_path)
    with pytest.raises(InputFileError, match="not a regular file"):
        scan(Path(os.devnull))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputFileError, match="not a regular file"):
        scan(tmp_path / "pipe")


def test_a_file_that_is_too_big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_module, "MAX_BYTES", 3)
    with pytest.raises(InputFileError, match="6 bytes, allowed: up to 3"):
        scan(file_of(tmp_path, b"{}\n{}\n"))


def test_a_file_that_changes_under_us(tmp_path: Path) -> None:
    path = file_of(tmp_path, b"{}\n{}\n{}\n")
    source = scan(path)
    lines = read_lines(source)
    next(lines)
    path.write_bytes(b"{}\n{}\n{} \n")
    with pytest.raises(InputFileError, match="changed while it was read"):
        list(read_lines(source))
    path.write_bytes(b"{}\n" * 10)
    with pytest.raises(InputFileError, match="changed while it was read"):
        list(read_lines(source))


def test_a_long_line_is_one_bad_line(tmp_path: Path) -> None:
    long = json.dumps(call("long", prompt="x" * (3 * MAX_LINE_BYTES)))
    edge = json.dumps(call("edge", prompt=""))
    edge = json.dumps(call("edge", prompt="x" * (MAX_LINE_BYTES - len(edge))))
    over = json.dumps(call("over", prompt="x" * MAX_LINE_BYTES))
    good = json.dumps(call("good"))
    path = file_of(tmp_path, "\r\n".join([long, good, edge, over]).encode())
    found = read(path)
    assert [line.custom_id for line in found] == [None, "good", "edge", None]
    assert [getattr(line.error, "code", None) for line in found] == ["line_too_long", None, None, "line_too_long"]


BAD: list[tuple[str, Any, str, str | None]] = [
    ("not JSON", "{", "invalid_json_line", None),
    ("text", "hello", "invalid_json_line", None),
    ("a list", "[]", "invalid_json_line", None),
    ("a key twice", '{"custom_id":"a","custom_id":"b"}', "invalid_json_line", None),
    ("NaN", '{"custom_id":"a","body":{"temperature":NaN}}', "invalid_json_line", None),
    ("too deep", '{"a":' * 50_000, "invalid_json_line", None),
    ("NUL", "\x00", "invalid_json_line", None),
    ("no custom_id", {**call(), "custom_id": None}, "missing_required_parameter", "custom_id"),
    ("a number", call(5), "invalid_custom_id", "custom_id"),
    ("empty", call(""), "invalid_custom_id", "custom_id"),
    ("long", call("x" * 513), "invalid_custom_id", "custom_id"),
    ("used", call("used"), "duplicate_custom_id", "custom_id"),
    ("no method", {**call(), "method": None}, "missing_required_parameter", "method"),
    ("GET", call(method="GET"), "invalid_method", "method"),
    ("no url", {**call(), "url": None}, "missing_required_parameter", "url"),
    ("another url", call(url="/v1/embeddings"), "invalid_url", "url"),
    ("a list as url", {**call(), "url": ["/v1/completions"]}, "invalid_url", "url"),
    ("no body", {"custom_id": "a", "method": "POST", "url": "/v1/completions"}, "missing_required_parameter", "body"),
    ("a text as body", {**call(), "body": "x"}, "invalid_parameter", "body"),
    ("more keys", {**call(), "colour": 1}, "unknown_parameter", "colour"),
]


@pytest.mark.parametrize(("line", "code", "field"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_lines_that_are_no_call(tmp_path: Path, line: object, code: str, field: str | None) -> None:
    """Twenty kinds, each with its own error; the lines around them are read."""
    text = line if isinstance(line, str) else json.dumps(line)
    data = "\n".join([json.dumps(call("used")), text, json.dumps(call("after"))]).encode()
    before, bad, after = read(file_of(tmp_path, data))
    assert before.request is not None and after.request is not None
    assert bad.request is None and not bad.is_call
    error = line_error(bad, 2)
    assert (error["code"], error["param"], error["line"]) == (code, field, 2)
    assert len(dump(error)) < 4096


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"stream": True}, "unsupported_parameter"),
        ({"timeout": 5}, "unsupported_parameter"),
        ({"temperature": 9}, "invalid_parameter"),
        ({"tools": [{}]}, "unsupported_parameter"),
        ({"colour": 1}, "unknown_parameter"),
    ],
)
def test_calls_that_a_server_would_refuse(tmp_path: Path, body: dict[str, Any], code: str) -> None:
    (line,) = read(file_of(tmp_path, json.dumps(call("a", **body)).encode()))
    assert line.is_call and line.custom_id == "a" and line.error is not None and line.error.code == code


@given(st.lists(st.binary(max_size=40) | st.sampled_from([json.dumps(call(str(k))).encode() for k in range(3)])))
def test_any_bytes_are_lines_or_a_refusal(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]) -> None:
    path = file_of(tmp_path_factory.mktemp("any"), b"\n".join(parts))
    try:
        found = read(path)
    except InputFileError:
        return
    ids = [line.custom_id for line in found if line.request is not None]
    assert len(ids) == len(set(ids))
    for line in found:
        assert (line.request is None) != (line.error is None)
