"""`url:` methods of a comparison: against the real server, and against servers that know less or break off."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from headrace.compare import http_stream
from headrace.compare.methods.admission import play
from headrace.compare.methods.bench import Bench
from headrace.compare.methods.url import UrlMethod, told_ids
from headrace.compare.workloads import Workload, WorkloadRequest
from headrace.core.config import EngineConfig
from headrace.core.errors import ConfigError, EngineError
from headrace.engine.model import OpenModel

QUESTIONS = ("What is 2+2? Answer with one number.", "Say hi.", "Name a color.")
PROMPT = (1, 2, 3)


@pytest.fixture(scope="module")
def bench(demo_path: Path) -> Iterator[Bench]:
    opened = OpenModel(EngineConfig("demo", threads=1, max_num_seqs=4, max_model_len=256, prefix_cache=False))
    made = Bench(opened)
    yield made
    made.close()
    opened.close()


@pytest.fixture(scope="module")
def questions(bench: Bench) -> Workload:
    prompts = [bench.opened.encode([{"role": "user", "content": text}]) for text in QUESTIONS]
    return Workload("questions", tuple(WorkloadRequest(ids, 16, 0.15 * i) for i, ids in enumerate(prompts)))


# ------------------------------------------------------------ the real server


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_answers_are_the_models_own(server_url: str, bench: Bench, questions: Workload, ignore_eos: bool) -> None:
    work = replace(questions, ignore_eos=ignore_eos)
    expected = play(bench.core, work, "own")
    method = UrlMethod(f"url:{server_url}/v1", bench)
    assert (method.config, method.exact) == (None, False)
    assert method.start(work) == 0
    found = method.run(work)
    assert found.outputs == expected.outputs
    for one, other in zip(found.requests, expected.requests, strict=True):
        assert (one.finish_reason, one.arrival_s) == (other.finish_reason, other.arrival_s)
        assert len(one.token_s) == len(one.token_ids) and list(one.token_s) == sorted(one.token_s)
        assert one.arrival_s < one.token_s[0] < one.token_s[-1] <= one.end_s <= found.seconds
    assert "as it tells them;" in method.description and "'demo'" in method.description
    assert "not controlled: its weights" in method.description and "ignore_eos" not in method.description
    assert method.run(work.warm_up(2, 2)).outputs == tuple(one[:2] for one in expected.outputs[:2])
    method.close()


def test_a_server_that_refuses(server_url: str, bench: Bench) -> None:
    method = UrlMethod(f"url:{server_url}", bench)
    method.start(Workload("short", (WorkloadRequest(PROMPT, 1),)))
    long = Workload("long", (WorkloadRequest(PROMPT, 1), WorkloadRequest((5,) * 9000, 1)))
    with pytest.raises(EngineError, match=r"^url:http://127.0.0.1:[0-9]+: request 2: answers 400: .*8192 tokens"):
        method.run(long)


# ------------------------------------------------------------ servers of our own making


@dataclass
class Plan:
    """What a server does, and what it has seen."""

    reply: Callable[[dict[str, Any]], list[object]]
    """Body -> the events; bytes are written as they are, a string ends the stream with that text."""
    refused: tuple[str, ...] = ()
    """Fields that are answered with 400."""
    status: int = 200
    kind: str = "text/event-stream; charset=utf-8"
    models: object = field(default_factory=lambda: {"data": [{"id": "m"}]})
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)


@contextmanager
def serving(plan: Plan) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def send(self, status: int, kind: str, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            plan.headers.append(dict(self.headers))
            self.send(200, "application/json", json.dumps(plan.models).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            plan.bodies.append(body)
            plan.headers.append(dict(self.headers))
            if found := [name for name in plan.refused if name in body]:
                self.send(400, "application/json", json.dumps({"error": {"message": f"no {found[0]}"}}).encode())
                return
            if plan.status != 200:
                self.send(plan.status, "text/plain", b"all\nwrong\x1b[2J")
                return
            self.send(200, plan.kind, b": a comment\r\n\r\n")
            for event in plan.reply(body):
                line = event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode() + b"\r\n\r\n"
                self.wfile.write(line)
                self.wfile.flush()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"url:http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


DONE = b"data: [DONE]\n\n"


def choice(text: str, finish: str | None = None, **more: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish, **more}]}


def usage(count: int) -> dict[str, object]:
    return {"choices": [], "usage": {"completion_tokens": count}}


def one_request(max_tokens: int = 8, ignore_eos: bool = False) -> Workload:
    return Workload("one", (WorkloadRequest(PROMPT, max_tokens),), ignore_eos)


def run(plan: Plan, bench: Bench, work: Workload) -> tuple[tuple[int, ...], str]:
    """Token ids, and the description afterwards."""
    with serving(plan) as name:
        method = UrlMethod(name, bench, "secret-key")
        method.start(work)
        found = method.run(work)
    (one,) = found.requests
    assert len(one.token_ids) == len(one.token_s)
    assert all(0 <= when <= one.end_s for when in one.token_s)
    return one.token_ids, method.description


def test_ids_beside_log_probabilities(bench: Bench) -> None:
    def vllm(body: dict[str, Any]) -> list[object]:
        told = "return_tokens_as_token_ids" in body
        scores = {"tokens": ["token_id:504", "token_id:2"] if told else [" The", ""]}
        return [choice(" The", "stop", logprobs=scores if "logprobs" in body else None), DONE]

    plan = Plan(vllm, refused=("return_token_ids",))
    assert run(plan, bench, one_request())[0] == (504, 2)
    assert plan.bodies[-1] == {
        "model": "m",
        "prompt": [1, 2, 3],
        "max_tokens": 8,
        "temperature": 0,
        "stream": True,
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
        "cache_prompt": False,
    }
    assert {one["Authorization"] for one in plan.headers} == {"Bearer secret-key"}

    def llama_cpp(body: dict[str, Any]) -> list[object]:
        scores = {"content": [{"id": 504, "token": " The"}]} if "logprobs" in body else None
        return [choice(" The", None, logprobs=scores), choice("", "stop"), DONE]

    ids, description = run(Plan(llama_cpp), bench, one_request())
    assert ids == (504, 2), "the token that ended it is the model's only one"
    assert "beside log-probabilities" in description


def test_text_alone(bench: Bench) -> None:
    tokenizer = bench.opened.tokenizer
    known = tokenizer.encode(" The sky — is 🙂 blue.", False)
    text = tokenizer.decode(known, False)
    middle = len(text) // 2

    def reply(body: dict[str, Any]) -> list[object]:
        assert "stream_options" in body or "return_token_ids" in body or "logprobs" in body
        return [choice(text[:middle]), choice(text[middle:], "length"), usage(len(known)), DONE]

    ids, description = run(Plan(reply), bench, one_request(len(known)))
    assert list(ids) == known and "encoded again" in description


def test_requests_are_under_way_together(bench: Bench) -> None:
    """Each is answered only once all of them are there."""
    together = threading.Barrier(5, timeout=60)

    def reply(body: dict[str, Any]) -> list[object]:
        if body["max_tokens"] == 3:
            together.wait()
        return [choice("", "length", token_ids=[5] * body["max_tokens"]), DONE]

    work = Workload("many", (WorkloadRequest(PROMPT, 3),) * 5)
    plan = Plan(reply)
    with serving(plan) as name:
        method = UrlMethod(name, bench)
        method.start(work)
        assert method.run(work).outputs == ((5, 5, 5),) * 5
    assert len({one["cache_salt"] for one in plan.bodies}) == 6, "nothing is found in a cache"


@pytest.mark.parametrize("counted", [[usage(7)], []])
def test_text_that_cannot_be_taken_back(bench: Bench, counted: list[object]) -> None:
    plan = Plan(lambda body: [choice(" The", "stop"), *counted, DONE])
    with pytest.raises(EngineError, match=r"request 1: the server tells no token ids, and they cannot be found again"):
        run(plan, bench, one_request())


def test_ignore_eos_refused_or_passed_over(bench: Bench) -> None:
    short: list[object] = [choice(" The", "stop", token_ids=[504, 2]), DONE]
    plan = Plan(lambda body: short, refused=("ignore_eos",))
    assert "it refuses ignore_eos" in run(plan, bench, one_request(8, ignore_eos=True))[1]
    assert "ignore_eos" not in plan.bodies[-1]
    assert "told to go on" in run(Plan(lambda body: short), bench, one_request(8, ignore_eos=True))[1]


BROKEN: list[tuple[Plan, str]] = [
    (Plan(lambda body: [choice("a", token_ids=[5])]), "the stream ended before the answer did"),
    (Plan(lambda body: [choice("a", token_ids=[5]), DONE]), "the stream ended before the answer did"),
    (Plan(lambda body: [{"error": {"message": "out of memory"}}]), "failed: out of memory"),
    (Plan(lambda body: [choice("", "abort", token_ids=[5])]), "ended with 'abort'"),
    (Plan(lambda body: [choice("", "stop", token_ids=[10**6])]), "the server has another model"),
    (Plan(lambda body: [choice("", "length", token_ids=[5] * 9), DONE]), "9 tokens came, 8 were asked for"),
    (Plan(lambda body: [b"data: {nonsense\n\n"]), "an event cannot be read"),
    (Plan(lambda body: [{"object": "x"}]), "an event lacks what a completion has"),
    (Plan(lambda body: [choice("", "stop", token_ids=["five"])]), "an event lacks what a completion has"),
    (Plan(lambda body: [b"data: " + b"x" * (http_stream.MAX_LINE + 9)]), "a line is longer"),
    (Plan(lambda body: [], status=503), "answers 503: all wrong\N{REPLACEMENT CHARACTER}[2J"),
    (Plan(lambda body: [], refused=("prompt",)), "answers 400: no prompt"),
    (Plan(lambda body: [], kind="application/json"), "not a stream of events"),
    (Plan(lambda body: [], models=[]), "names no model"),
    (Plan(lambda body: [], models={"data": []}), "names no model"),
]


@pytest.mark.parametrize(("plan", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_servers_that_break_off(plan: Plan, message: str, bench: Bench) -> None:
    with pytest.raises(EngineError, match=r"^url:http://127.0.0.1:[0-9]+: ") as caught:
        run(plan, bench, one_request())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"", "the connection ended inside the answer"),
        (b"220 mail.example.org\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}", "the connection ended inside the answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}", "length cannot be read"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{", "the connection ended inside the answer"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "length cannot be read"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffff\r\n", "larger than"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 300, "more than 256 headers"),
    ],
)
def test_what_is_no_server(said: bytes, message: str, bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        method = UrlMethod(f"url:http://127.0.0.1:{listening.getsockname()[1]}", bench)
        with pytest.raises(EngineError, match=message):
            method.start(one_request())
        thread.join()


def test_nobody_there(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(EngineError, match=f"^url:http://127.0.0.1:{port}: /v1/models: cannot be reached: Connection"):
        UrlMethod(f"url:http://127.0.0.1:{port}", bench).start(one_request())


@pytest.mark.parametrize(
    "address", ["", "127.0.0.1:8000", "ftp://a", "http://", "http://a:x", "http://a?b=c", "http://me:secret@host"]
)
def test_addresses(address: str, bench: Bench) -> None:
    with pytest.raises(ConfigError, match="allowed: http://HOST") as caught:
        UrlMethod(f"url:{address}", bench)
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="the API key has characters"):
        UrlMethod("url:http://[::1]:80/base/v1/", bench, "a\r\nb")
    assert "http://[::1]:80/base;" not in UrlMethod("url:http://[::1]:80/base/v1/", bench).description


def test_told_ids() -> None:
    assert told_ids({"token_ids": []}) == []
    assert told_ids({"token_ids": None, "logprobs": None}) is None
    assert told_ids({"logprobs": {"tokens": ["token_id:7", "a"]}}) is None
    assert told_ids({"logprobs": {"content": [{"token": "a"}]}}) is None
    assert told_ids({"logprobs": {"tokens": ["token_id:7"]}}) == [7]
