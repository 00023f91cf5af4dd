"""HTTP on the wire: what a client sends neither hurts, nor hangs, nor leaks."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Iterator

import pytest

from headrace.server import protocol
from headrace.server.config import ServeConfig
from tests.server.edge_server import GET, HOST, POST, Application, Served, serving

MARK = b"S3CRET"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    app = Application()
    with serving(app, ServeConfig(), app.events) as made:
        yield made


# ------------------------------------------------------------ what is served


def test_plain_requests_keep_their_connection(served: Served) -> None:
    with served.client() as client:
        for i in range(3):
            client.send(b"GET /a%%20b?q=%d HTTP/1.1\r\n%s\r\n" % (i, HOST))
            shown = client.answer().json()
            assert (shown["path"], shown["query"]) == ("/a b", f"q={i}")
        client.send(b"POST /p HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\n")
        time.sleep(0.02)
        client.send(b"hello")
        assert client.answer().json()["length"] == 5


def test_chunked_body_and_trailers(served: Served) -> None:
    data = b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
    shown = served.ask(data + b"3;ext=1\r\nabc\r\n2\r\nde\r\n0\r\nAuthorization: later\r\n\r\n").json()
    assert shown["length"] == 5
    assert shown["names"] == ["host", "transfer-encoding"]  # a trailer is no header


def test_bytes_one_at_a_time(served: Served) -> None:
    with served.client() as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"POST /one HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\n\r\nhi":
            client.send(bytes([byte]))
        assert client.answer().json() == {
            "method": "POST",
            "path": "/one",
            "length": 2,
            "names": ["content-length", "host"],
            "query": "",
        }


def test_http_10_gets_no_chunks(served: Served) -> None:
    with served.client() as client:
        client.send(b"GET /pieces HTTP/1.0\r\n\r\n")
        answer = client.answer()
        assert "transfer-encoding" not in answer.headers
        assert answer.headers["connection"] == "close"
        assert answer.body == b"piece0 piece1 piece2 "
    assert served.ask(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").headers["connection"] == "close"


def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    with served.client() as client:
        client.send(b"".join(b"GET /slow?%d HTTP/1.1\r\n%s\r\n" % (i, HOST) for i in range(3)))
        assert [client.answer().body for _ in range(3)] == [b"0", b"1", b"2"]


def test_too_many_pipelined_requests(served: Served) -> None:
    with served.client() as client:
        client.send(b"".join(b"GET /slow?%d HTTP/1.1\r\n%s\r\n" % (i, HOST) for i in range(2000)))
        answers = [client.answer() for _ in range(protocol.MAX_PIPELINED + 1)]
        assert [int(answer.body) for answer in answers] == list(range(protocol.MAX_PIPELINED + 1))
        assert answers[-1].headers["connection"] == "close"
        assert client.closed()


def test_nothing_is_answered_behind_a_last_answer(served: Served) -> None:
    served.events.clear()
    with served.client() as client:
        first = b"GET /slow?1 HTTP/1.1\r\nExpect: 100-continue\r\n" + HOST + b"\r\n"
        client.send(first + b"GET /wait HTTP/1.1\r\n" + HOST + b"\r\nGET /beg")
        assert client.answer().status == 100
        assert client.answer().body == b"1"
        assert client.closed()
        time.sleep(0.05)
    assert served.events == []


def test_disconnect_reaches_every_pipelined_request(served: Served) -> None:
    served.events.clear()
    with served.client() as client:
        client.send(b"GET /wait HTTP/1.1\r\n" + HOST + b"\r\nGET / HTTP/1.1\r\n" + HOST + b"\r\n")
        served.wait_for("waiting")
    assert served.wait_for("gone") < 0.5


def test_disconnect_is_noticed_behind_a_pipelined_request(served: Served) -> None:
    served.events.clear()
    with served.client() as client:
        client.send(b"GET /wait HTTP/1.1\r\n" + HOST + b"\r\n")
        served.wait_for("waiting")
        time.sleep(0.02)
        client.send(GET + b"\r\n")
        time.sleep(0.02)
    assert served.wait_for("gone") < 0.5
    served.events.clear()
    with served.client() as client:
        client.send(b"GET /wait HTTP/1.1\r\n" + HOST + b"\r\n")
        served.wait_for("waiting")
        client.send(POST + b"Content-Length: 150000\r\n\r\n" + b"x" * 150_000)
        time.sleep(0.02)
    assert served.wait_for("gone") < 0.5
    with served.client() as client:
        client.send(b"GET /slow?1 HTTP/1.1\r\n" + HOST + b"\r\n")
        client.send(POST + b"Content-Length: 150000\r\n\r\n" + b"x" * 150_000)
        assert client.answer().body == b"1"
        assert client.answer().status == 413
        assert client.closed()


def test_flood_behind_a_last_answer(served: Served) -> None:
    """What is not read any more is not taken in without end either."""
    served.events.clear()
    with served.client() as client:
        client.send(b"GET /wait HTTP/1.1\r\n" + HOST + b"\r\ngarbage\r\n\r\n")
        served.wait_for("waiting")
        with pytest.raises(OSError):
            for _ in range(2000):
                client.send(b"x" * 65536)
    assert served.wait_for("gone") < 0.5


def test_head_and_close(served: Served) -> None:
    with served.client() as client:
        client.send(b"HEAD / HTTP/1.1\r\n" + HOST + b"\r\n" + GET + b"Connection: close\r\n\r\n")
        assert int(client.answer(head=True).headers["content-length"]) > 0
        answer = client.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert client.closed()


def test_expect_continue(served: Served) -> None:
    head = b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n"
    with served.client() as client:
        client.send(b"POST / HTTP/1.1\r\n" + HOST + head)
        assert client.answer().status == 100
        client.send(b"abc")
        assert client.answer().json()["length"] == 3
    with served.client() as client:  # refused before the body: no 100, and nothing is guessed of what follows
        client.send(b"POST /early HTTP/1.1\r\n" + HOST + head)
        answer = client.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")


def test_unread_body_is_thrown_away(served: Served) -> None:
    with served.client() as client:
        client.send(b"POST /early HTTP/1.1\r\n" + HOST + b"Content-Length: 300000\r\n\r\n")
        assert client.answer().status == 200
        client.send(b"x" * 300_000 + b"GET /next HTTP/1.1\r\n" + HOST + b"\r\n")
        assert client.answer().json()["path"] == "/next"


def test_other_upgrades_are_ignored(served: Served) -> None:
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ\r\n"
    with served.client() as client:
        client.send(b"POST /h2c HTTP/1.1\r\n" + HOST + upgrade + b"Content-Length: 3\r\n\r\na")
        time.sleep(0.02)
        client.send(b"bc")
        assert client.answer().json()["length"] == 3
        chunked = b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
        client.send(b"POST /h2c HTTP/1.1\r\n" + HOST + upgrade + chunked)
        assert client.answer().json()["length"] == 3
        client.send(b"GET /then HTTP/1.1\r\n" + HOST + upgrade + b"\r\nGET /last HTTP/1.1\r\n" + HOST + b"\r\n")
        assert [client.answer().json()["path"] for _ in range(2)] == ["/then", "/last"]


# ------------------------------------------------------------ what is refused

BAD_REQUESTS = {
    "both lengths": POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "both, other order": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "length twice": POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "lengths in a list": POST + b"Content-Length: 3, 3\r\n\r\nabc",
    "signed length": POST + b"Content-Length: +3\r\n\r\nabc",
    "negative length": POST + b"Content-Length: -3\r\n\r\nabc",
    "huge length": POST + b"Content-Length: 99999999999999999999999\r\n\r\nabc",
    "blank before colon": POST + b"Content-Length : 3\r\n\r\nabc",
    "identity": POST + b"Transfer-Encoding: identity\r\n\r\nabc",
    "gzip, chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked in 1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunk overflow": POST + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\nabc",
    "chunk size not hex": POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\nabc",
    "chunk without CR": POST + b"Transfer-Encoding: chunked\r\n\r\n3\nabc\n0\n\n",
    "chunk longer than said": POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\nabcd\r\n",
    "folded header": GET + b"A: b\r\n c\r\n\r\n",
    "bare LF": b"GET / HTTP/1.1\nHost: x\n\n",
    "bare CR": b"GET / HTTP/1.1\r\nHost: x\rA: b\r\n\r\n",
    "NUL in a value": GET + b"A: b\0c\r\n\r\n",
    "NUL in a name": GET + b"A\0: b\r\n\r\n",
    "NUL in the target": b"GET /\0 HTTP/1.1\r\n" + HOST + b"\r\n",
    "bytes above 127 in the target": b"GET /\xff HTTP/1.1\r\n" + HOST + b"\r\n",
    "no name": GET + b": b\r\n\r\n",
    "absolute target": b"GET http://x/v1/models HTTP/1.1\r\n" + HOST + b"\r\n",
    "two slashes": b"GET //x/v1/models HTTP/1.1\r\n" + HOST + b"\r\n",
    "asterisk": b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n",
    "no slash": b"GET x HTTP/1.1\r\n" + HOST + b"\r\n",
    "fragment": b"GET /a#b HTTP/1.1\r\n" + HOST + b"\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": GET + HOST + b"\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/2": b"GET / HTTP/2.0\r\n" + HOST + b"\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "method in small letters": b"get / HTTP/1.1\r\n" + HOST + b"\r\n",
    "unknown method": b"S3CRET / HTTP/1.1\r\n" + HOST + b"\r\n",
    "other expectation": GET + b"Expect: the best\r\n\r\n",
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests(served: Served, name: str) -> None:
    served.events.clear()
    answer = served.refused(BAD_REQUESTS[name])
    assert (answer.status, answer.code) == (400, "bad_request")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-should-retry"] == "false"
    assert MARK not in answer.body


@pytest.mark.parametrize("method", ["CONNECT x:80", "TRACE /"])
def test_refused_methods(served: Served, method: str) -> None:
    answer = served.refused(method.encode() + b" HTTP/1.1\r\n" + HOST + b"\r\n")
    assert (answer.status, answer.code) == (405, "method_not_allowed")
    assert answer.headers["allow"] == protocol.METHODS


def test_websockets_are_refused(served: Served) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AA==\r\n"
    answer = served.refused(b"GET / HTTP/1.1\r\n" + HOST + upgrade + b"\r\n")
    assert (answer.status, answer.code, answer.headers["upgrade"]) == (426, "upgrade_refused", "HTTP/1.1")


def test_head_limits(served: Served) -> None:
    ok = GET + b"".join(b"A%d: b\r\n" % i for i in range(protocol.MAX_HEADERS - 1))
    assert served.ask(ok + b"\r\n").status == 200
    long_url = b"GET /" + b"a" * (protocol.MAX_URL_BYTES - 1) + b" HTTP/1.1\r\n" + HOST + b"\r\n"
    assert served.ask(long_url).status == 200
    assert served.ask(GET + b"A: " + MARK * 5000 + b"\r\n\r\n").status == 200
    for data in (
        ok + b"B: c\r\n\r\n",
        long_url.replace(b"/a", b"/ab"),
        GET + b"A: " + MARK * 6000 + b"\r\n\r\n",
        GET + b"A: " + MARK * 200_000,  # without an end
        GET + MARK * 200_000,
        GET + (b"A: " + b"b" * 1000 + b"\r\n") * 40 + b"\r\n",
        b"GET /" + b"a" * 1_000_000,
        b"\r\n" * 100_000,
        POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nA: " + MARK * 200_000,  # a trailer
        POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"a" * 1_000_000,  # a chunk's extension
    ):
        answer = served.refused(data)
        assert (answer.status, answer.code) == (431, "headers_too_large"), data[:60]
        assert MARK not in answer.body


def test_head_limits_are_of_one_request(served: Served) -> None:
    with served.client() as client:
        for _ in range(3):
            client.send(GET + b"A: bcdefghij\r\n" * 80 + b"B: " + b"c" * 15_000 + b"\r\n\r\n")
            assert client.answer().status == 200


def test_long_body_before_the_next_head_does_not_count(served: Served) -> None:
    body = b"x" * 200_000
    with served.client() as client:
        client.send(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(body) + body + b"GET /aft")
        assert client.answer().json()["length"] == len(body)
        client.send(b"er HTTP/1.1\r\n" + HOST + b"\r\n")
        assert client.answer().json()["path"] == "/after"


def test_refusal_waits_for_the_answers_before_it(served: Served) -> None:
    with served.client() as client:
        client.send(b"GET /slow?first HTTP/1.1\r\n" + HOST + b"\r\n" + b"garbage\r\n\r\n")
        assert client.answer().body == b"first"
        answer = client.answer()
        assert (answer.status, answer.code) == (400, "bad_request")
        assert client.closed()
    with served.client() as client:  # one that broke off in its body
        client.send(b"GET /slow?first HTTP/1.1\r\n" + HOST + b"\r\n" + BAD_REQUESTS["chunk size not hex"])
        assert client.answer().body == b"first"
        assert client.answer().status == 400
        assert client.closed()


def test_bad_body_ends_its_request(served: Served) -> None:
    served.events.clear()
    with served.client() as client:
        client.send(POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        time.sleep(0.05)  # the application waits for more
        client.send(b"no size\r\n")
        assert client.answer().status == 400
        assert served.wait_for("left") < 0.5  # while the client is still there


def test_refusal_arrives_while_the_client_still_sends(served: Served) -> None:
    with served.client() as client:
        client.send(b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip\r\n\r\n")
        for _ in range(64):
            client.send(b"x" * 65536)
        assert client.answer().status == 400


# ------------------------------------------------------------ anything

SEEDS = (
    POST + b'Content-Type: application/json\r\nContent-Length: 13\r\n\r\n{"a": [1, 2]}',
    POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: y\r\n\r\n",
    GET + b"Accept: */*\r\nConnection: keep-alive\r\n\r\n" + GET + b"\r\n",
    b"GET /stream?q=1 HTTP/1.1\r\n" + HOST + b"Authorization: Bearer S3CRET\r\n\r\n",
)


def mutate(data: bytes, random_: random.Random) -> bytes:
    made = bytearray(data)
    for _ in range(random_.randint(1, 4)):
        at = random_.randrange(len(made) + 1)
        kind = random_.randrange(5)
        if kind == 0 and at < len(made):
            made[at] = random_.randrange(256)
        elif kind == 1:
            made[at:at] = random_.choice([b"\r\n", b"\0", b" ", b"\n", b"\xff", b":", b"0", b"%", b"\r"])
        elif kind == 2:
            del made[at : at + random_.randint(1, 8)]
        elif kind == 3:
            made[at:at] = made[at : at + random_.randint(1, 40)]
        else:
            del made[at:]
    return bytes(made)


def test_mutated_requests(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """Always an answer below 500, or a close once the client has said that no more will come."""
    random_ = random.Random(5)
    statuses = set()
    for i in range(400):
        data = mutate(random_.choice(SEEDS), random_)
        with served.client() as client:
            try:
                client.send(data)
                client.socket.shutdown(socket.SHUT_WR)
                text = client.socket.recv(65536)
            except ConnectionError:
                continue
            if text:
                assert text.startswith(b"HTTP/1.1 "), (i, data, text)
                statuses.add(status := int(text[9:12]))
                assert status < 500, (i, data, text)
    assert {200, 400} <= statuses
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert served.ask(GET + b"\r\n").status == 200
