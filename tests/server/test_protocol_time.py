"""HTTP on the wire: how long a client may take, and how many there may be."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from headrace.server import protocol
from headrace.server.config import ServeConfig
from tests.server.edge_server import GET, HOST, POST, Application, Client, Served, serving

TIMEOUT_S = 0.5


@pytest.fixture
def hasty() -> Iterator[tuple[Served, Application]]:
    """A server whose limits of time are short."""
    app = Application()
    settings = ServeConfig(header_timeout=TIMEOUT_S, body_timeout=TIMEOUT_S, write_timeout=TIMEOUT_S)
    with serving(app, settings, app.events) as made:
        yield made, app


# ------------------------------------------------------------ time


def test_headers_have_a_deadline(hasty: tuple[Served, Application]) -> None:
    served, _ = hasty
    with served.client() as silent, served.client() as slow, served.client() as empty:
        began = time.monotonic()
        slow.send(b"GET / HT")
        for _ in range(4):
            time.sleep(0.1)
            slow.send(b"TP/1.1\r\nA: b\r\n"[_ * 2 : _ * 2 + 2])
            empty.send(b"\r\n")
        answer = slow.answer()
        assert (answer.status, answer.code) == (408, "request_timeout")
        assert 0.8 * TIMEOUT_S < time.monotonic() - began < TIMEOUT_S + 0.4
        assert slow.closed()
        assert silent.closed()
        assert empty.closed()
        assert time.monotonic() - began < TIMEOUT_S + 0.5


def test_empty_lines_do_not_keep_a_connection(hasty: tuple[Served, Application]) -> None:
    served, _ = hasty
    with served.client() as client:
        client.send(GET + b"\r\n")
        assert client.answer().status == 200
        began = time.monotonic()
        while time.monotonic() - began < 2 * TIMEOUT_S + 1:
            try:
                client.send(b"\r\n")
            except OSError:
                break
            time.sleep(0.05)
        assert time.monotonic() - began < TIMEOUT_S + 0.5


def test_bodies_have_a_deadline(hasty: tuple[Served, Application]) -> None:
    served, _ = hasty
    with served.client() as client:
        began = time.monotonic()
        client.send(POST + b"Content-Length: 1000\r\n\r\nabc")
        for _ in range(4):
            time.sleep(0.1)
            client.send(b"x")
        answer = client.answer()
        assert (answer.status, answer.code) == (408, "request_timeout")
        assert 0.8 * TIMEOUT_S < time.monotonic() - began < TIMEOUT_S + 0.4
        assert client.closed()
    served.wait_for("left")
    with served.client() as client:  # the answer is there already: it is not followed by another
        client.send(b"POST /early HTTP/1.1\r\n" + HOST + b"Content-Length: 1000\r\n\r\nabc")
        assert client.answer().status == 200
        assert client.closed()


def test_slow_applications_are_not_the_clients_fault(hasty: tuple[Served, Application]) -> None:
    served, _ = hasty
    body = b"x" * 2_000_000
    answer = served.ask(b"POST /lazy HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert answer.json()["length"] == len(body)


def test_slow_answers_are_not_timed_out(hasty: tuple[Served, Application]) -> None:
    served, app = hasty
    with served.client() as client:
        client.send(b"GET /wait HTTP/1.1\r\n" + HOST + b"\r\n")
        time.sleep(3 * TIMEOUT_S)
        assert app.events == ["waiting"]


@pytest.mark.parametrize("query", [b"", b"?slowly"])
def test_unread_answers_end_their_connection(hasty: tuple[Served, Application], query: bytes) -> None:
    served, app = hasty
    with served.client(receive_buffer=4096) as client:
        client.send(b"GET /stream" + query + b" HTTP/1.1\r\n" + HOST + b"\r\n")
        took = served.wait_for("disconnect slow_client")
        assert 0.8 * TIMEOUT_S < took < TIMEOUT_S + 1.5
        # What the server held, and a little that the client's kernel has taken.
        assert app.sent < 256 * 1024 + 8192


def test_slow_readers_are_served(hasty: tuple[Served, Application]) -> None:
    """Who reads slowly, but reads, keeps the connection."""
    served, app = hasty
    with served.client(receive_buffer=4096) as client:
        client.send(b"GET /stream HTTP/1.1\r\n" + HOST + b"\r\n")
        until = time.monotonic() + 4 * TIMEOUT_S
        while time.monotonic() < until:
            assert client.socket.recv(4096)
            time.sleep(0.02)
        assert app.events == []


def test_pipelined_head_during_a_long_answer(hasty: tuple[Served, Application]) -> None:
    """The deadline of a request that is begun behind another spares the one being answered."""
    served, app = hasty
    with served.client() as client:
        client.send(b"GET /wait HTTP/1.1\r\n" + HOST + b"\r\nGET /un")
        time.sleep(TIMEOUT_S + 0.3)
        assert app.events == ["waiting"]
    served.wait_for("gone")


# ------------------------------------------------------------ number


def test_connections_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "SPARE_CONNECTIONS", 3)
    app = Application()
    with serving(app, ServeConfig(max_queued=2)) as served:
        open_ones = [Client(served.port) for _ in range(5)]
        for client in open_ones:
            client.send(GET + b"\r\n")
            assert client.answer().status == 200
        with served.client() as client:
            answer = client.answer()
            assert (answer.status, answer.code) == (503, "too_many_connections")
            assert answer.headers["retry-after"] == "1"
            assert client.closed()
        open_ones.pop().close()
        time.sleep(0.05)
        assert served.ask(GET + b"\r\n").status == 200
        for client in open_ones:
            client.close()
