"""A server as the client of a batch sees it: its URL, its key, its models, what it may answer; and the command."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.batch import endpoint, remote
from headrace.batch.endpoint import Server, _seconds
from headrace.batch.remote import find_model
from headrace.cli.main import main
from headrace.core.errors import BackendUnavailable, ConfigError
from tests.unit.batch_cases import call, write_lines
from tests.unit.batch_server import Batch, Plan, serving


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)


@pytest.fixture
def batch(tmp_path: Path) -> Iterator[Batch]:
    plan = Plan()
    with serving(plan) as url:
        yield Batch(tmp_path, plan, url)


def no_server() -> str:
    """The URL of a port where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize(
    ("status", "models", "words"),
    [
        (401, {}, "answers 401: the server wants another API key"),
        (403, {}, "answers 403: the server wants another API key"),
        (307, {}, "answers 307 and points to 'http://elsewhere/'; redirects are not followed"),
        (404, {}, "answers 404 and names no model: not an OpenAI-compatible server"),
        (200, b"<html>", "answers 200 and names no model"),
        (200, {"data": []}, "names no model"),
        (200, {"data": {"id": "x"}}, "names no model"),
        (200, {"data": [{"id": 5}]}, "names no model"),
    ],
)
def test_servers_of_another_kind(batch: Batch, status: int, models: Any, words: str) -> None:
    batch.plan.models_status, batch.plan.models = status, models
    with pytest.raises(ConfigError, match=words):
        find_model(Server(batch.url))
    assert batch.plan.paths == ["/v1/models"]


def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ASK_S", 0.1)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        with pytest.raises(BackendUnavailable, match=r"cannot be reached: (no answer within 0.1 s|timed out)"):
            find_model(Server(f"http://127.0.0.1:{deaf.getsockname()[1]}"))


@pytest.mark.parametrize(
    ("url", "shown", "prefix"),
    [
        ("http://h", "http://h:80", ""),
        ("HTTP://User:Secret@H:81/", "http://h:81", ""),
        ("https://h/v1", "https://h:443", ""),
        ("https://h/v1/", "https://h:443", ""),
        ("http://h:8000/proxy/v1", "http://h:8000/proxy", "/proxy"),
        ("http://h:8000/v1x", "http://h:8000/v1x", "/v1x"),
        ("http://[::1]:5", "http://[::1]:5", ""),
    ],
)
def test_urls(url: str, shown: str, prefix: str) -> None:
    server = Server(url)
    assert (server.url, server.prefix) == (shown, prefix)


@pytest.mark.parametrize(
    "url",
    [
        *("http://", "http://:8000", "http://h:x", "http://h:99999", "http://h?q=secret", "http://h#secret", "ftp://h"),
        *("http://[::1", "http://h/ä", "http://h/a b", "http://" + "a" * 70 + ".b", "http://a b", "http://secret@"),
    ],
)
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Server(url)
    assert "allowed: http://HOST" in str(caught.value) and "secret" not in str(caught.value)


def test_keys(batch: Batch) -> None:
    batch.plan.key = "the-key"
    with pytest.raises(ConfigError, match="wants another API key"):
        find_model(Server(batch.url, "another"))
    assert find_model(Server(batch.url, "the-key")) == "tiny"
    pair = Server(batch.url.replace("//", "//me:p%40ss@"))
    assert pair.headers["Authorization"] == "Basic bWU6cEBzcw==" and "me" not in pair.url
    for key in ("a b", "a\nb", "ä"):
        with pytest.raises(ConfigError, match="characters that a header cannot carry") as caught:
            Server(batch.url, key)
        assert key not in str(caught.value)
    with pytest.raises(ConfigError, match="one of the two"):
        Server("http://me:pass@h", "key")


def test_retry_after_is_seconds_or_a_date() -> None:
    assert _seconds("7") == 7 and _seconds(" 0.5 ") == 0.5
    ahead = datetime.now(UTC) + timedelta(seconds=30)
    found = _seconds(format_datetime(ahead, usegmt=True))
    assert found is not None and 28 < found <= 30
    assert _seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    for odd in (None, "", "-1", "soon", "nan", "inf", "1e9", "9" * 30, "٣", f"Wed, 21 Oct {'9' * 30} 07:28:00 GMT"):
        assert _seconds(odd) is None


class Canned(Server):
    """A server that has said all it will ever say."""

    def __init__(self, data: bytes) -> None:
        super().__init__("http://h")
        self._ours, theirs = socket.socketpair()
        self._ours.sendall(data)
        self._ours.shutdown(socket.SHUT_WR)
        self._theirs = theirs

    def connection(self) -> HTTPConnection:
        http = super().connection()
        http.sock = self._theirs
        return http

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()


STATUS_LINES = st.sampled_from([b"HTTP/1.1 200 OK", b"HTTP/1.1 429 x", b"HTTP/1.0 200", b"HTTP/1.1 999 x", b"ICY 200"])
HEADER_LINES = st.sampled_from(
    [
        *(b"Content-Length: 5", b"Content-Length: 99", b"Content-Length: -1", b"Content-Length: " + b"9" * 40),
        *(b"Transfer-Encoding: chunked", b"Retry-After: 3", b"Retry-After: \xff", b"x-should-retry: false"),
        *(b"Content-Encoding: gzip", b"Location: \xe9", b" folded", b": none", b"\x00: \x00", b"Connection: close"),
    ]
)
BODIES = st.binary(max_size=40) | st.sampled_from([b"{}", b"2\r\n{}\r\n0\r\n\r\n", b"zz\r\n{}", b"f" * 30 + b"\r\n{}"])


@settings(max_examples=300)
@given(
    st.binary(max_size=60)
    | st.builds(
        lambda status, headers, body: b"\r\n".join([status, *headers, b"", body]),
        STATUS_LINES,
        st.lists(HEADER_LINES),
        BODIES,
    )
)
def test_any_bytes_are_a_reply_or_a_failure(data: bytes) -> None:
    """Never an exception, which would end the thread that waits for the server."""
    server = Canned(data)
    exchange = endpoint.Exchange("POST", "/v1/completions", b"{}")
    connection = endpoint.Connection(server, 1.0)
    connection.carry_out(exchange)
    connection.close()
    server.close()
    assert (exchange.reply is None) == bool(exchange.failure)
    assert "\n" not in exchange.failure


def test_https_is_checked(batch: Batch) -> None:
    """A server that speaks no TLS, and the client's own settings."""
    server = Server(batch.url.replace("http:", "https:"))
    with pytest.raises(BackendUnavailable, match="cannot be reached"):
        find_model(server)
    assert server._context is not None
    assert server._context.verify_mode == ssl.CERT_REQUIRED and server._context.check_hostname


def test_the_command(batch: Batch, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    batch.lines("p", "once-500", "400")
    batch.plan.key = "secret-key"
    line = ["batch", batch.url + "/v1", str(batch.source), str(batch.paths.out)]
    monkeypatch.delenv("HEADRACE_API_KEY", raising=False)
    assert main(line) == 2
    assert "wants another API key" in capsys.readouterr().err
    monkeypatch.setenv("HEADRACE_API_KEY", "secret-key")
    assert main(line) == 0
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("3 lines: 2 ok, 1 failed\nthis run: 4 prompt tokens, 6 answer tokens")
    assert told.err.endswith("1 lines sent again\n")
    assert {headers["Authorization"] for headers in batch.plan.headers} == {"Bearer secret-key"}
    assert main([*line, "--api-key", "secret-key", "--concurrency", "3", "--timeout", "5"]) == 0
    assert "already complete (3 lines)" in capsys.readouterr().err
    assert main([*line, "--api-key", "wrong"]) == 2


@pytest.mark.parametrize(
    ("model", "flags", "words"),
    [
        ("http://127.0.0.1:1", ["--threads", "1"], "--threads: MODEL is a URL"),
        ("http://127.0.0.1:1", ["--no-prefix-cache"], "--no-prefix-cache: MODEL is a URL"),
        ("http://127.0.0.1:1", ["--adapter", "a=b"], "--adapter: MODEL is a URL"),
        ("demo", ["--concurrency", "1"], "--concurrency: MODEL is no URL"),
        ("demo", ["--api-key", "k"], "--api-key: MODEL is no URL"),
        ("demo", ["--timeout", "5"], "--timeout: MODEL is no URL"),
    ],
)
def test_flags_of_the_other_kind_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, flags: list[str], words: str
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [call()])
    assert main(["batch", model, str(source), str(tmp_path / "out.jsonl"), *flags]) == 2
    assert words in capsys.readouterr().err


def test_a_server_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "in.jsonl", [call()])
    url = no_server()
    assert main(["batch", url, str(source), str(tmp_path / "out.jsonl")]) == 1
    assert capsys.readouterr().err == (
        f"headrace: error: {url}: cannot be reached: Connection refused; no line was sent\n"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl"}
