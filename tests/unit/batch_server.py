"""A small OpenAI-compatible server that can fail in chosen ways (the prompt of a body says how), and batches for it."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from headrace.batch.endpoint import Server
from headrace.batch.ledger import Report
from headrace.batch.lines import scan
from headrace.batch.outputs import Paths
from headrace.batch.remote import find_model, run_remote
from tests.unit.batch_cases import call, read_jsonl, write_lines


@dataclass
class Plan:
    """What the server is, and what it has seen."""

    models: Any = field(default_factory=lambda: {"object": "list", "data": [{"id": "tiny", "object": "model"}]})
    models_status: int = 200
    fingerprint: str | None = "fp_one"
    key: str = ""
    capacity: int = 10**9
    """More bodies at once are answered with this status."""
    capacity_status: int = 429
    answer_s: float = 0.0
    seen: Counter[str] = field(default_factory=Counter)
    """How often each prompt came."""
    times: dict[str, list[float]] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    connections: int = 0
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    release: threading.Event = field(default_factory=threading.Event)
    """Ends what waits for ever."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    plan: Plan

    def setup(self) -> None:
        super().setup()
        self.plan.connections += 1

    def log_message(self, *_: object) -> None:
        pass

    def send(self, status: int, body: object, headers: Mapping[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.plan.paths.append(self.path)
        if self.plan.key and self.headers["Authorization"] != f"Bearer {self.plan.key}":
            self.send(401, {"error": {"message": "no", "type": "x", "param": None, "code": "unauthorized"}})
        else:
            self.send(self.plan.models_status, self.plan.models, {"Location": "http://elsewhere/"})

    def do_POST(self) -> None:
        plan = self.plan
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        with plan.lock:
            plan.seen[prompt] += 1
            plan.times.setdefault(prompt, []).append(time.monotonic())
            plan.bodies.append(body)
            plan.headers.append(dict(self.headers))
            plan.paths.append(self.path)
            plan.at_once += 1
            plan.most_at_once = max(plan.most_at_once, plan.at_once)
            refused = plan.at_once > plan.capacity
        try:
            if refused:
                self.send(plan.capacity_status, error("queue_full"), {"Retry-After": "0"})
                return
            time.sleep(plan.answer_s)
            with suppress(BrokenPipeError, ConnectionResetError):
                self.answer(prompt, plan.seen[prompt] == 1)
        finally:
            with plan.lock:
                plan.at_once -= 1

    def answer(self, prompt: str, first: bool) -> None:
        how, *rest = prompt.split()
        once = how.startswith("once-")
        if once and not first:
            how = "good"
        match how.removeprefix("once-"):
            case status if status.isdigit():
                self.send(int(status), error("planned"), dict([part.split("=") for part in rest if "=" in part]))
            case "reset":  # before a byte of an answer
                self.abort()
            case "cut":  # inside the answer
                self.send_head("Content-Length", "5000")
                self.wfile.write(b'{"id":"x"')
                self.close_connection = True
            case "chunk":
                self.send_head("Transfer-Encoding", "chunked")
                self.wfile.write(b'ff\r\n{"id":')
                self.close_connection = True
            case "half":  # whole for HTTP, not for JSON
                self.send(200, b'{"id":"x","choices":[')
            case "page":
                self.send(404, b"<html>no such page</html>")
            case "endless":
                self.send_head("Connection", "close")
                for _ in range(1024):
                    self.wfile.write(b" " * 2**16)
                self.close_connection = True
            case "chunked":
                data = json.dumps(self.good(prompt)).encode()
                self.send_head("Transfer-Encoding", "chunked")
                pieces = [data[i : i + 7] for i in range(0, len(data), 7)]
                self.wfile.write(b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n")
            case "closes":
                self.send(200, self.good(prompt), {"Connection": "close"})
                self.close_connection = True
            case "stuck":
                self.plan.release.wait(30)
                self.close_connection = True
            case "drip" | "drip-on":  # a byte now and then, for ever
                self.send_head(*(("Content-Length", "5000") if how == "drip" else ("Connection", "close")))
                while not self.plan.release.wait(0.02):
                    self.wfile.write(b" ")  # fails once the client is gone
                self.close_connection = True
            case "deep":
                self.send(200, b'{"a":' * 50_000 + b"1" + b"}" * 50_000)
            case "odd":
                self.send(200, {"text": "\u2028\ud800\x00é", "big": 10**400, "usage": {"prompt_tokens": -1}})
            case _:
                self.send(200, self.good(prompt))

    def send_head(self, name: str, value: str) -> None:
        self.send_response(200)
        self.send_header(name, value)
        self.end_headers()

    def abort(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def good(self, prompt: str) -> dict[str, Any]:
        usage = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
        made: dict[str, Any] = {"id": f"cmpl-{time.monotonic_ns()}", "object": "text_completion", "created": 7}
        made |= {"model": "tiny", "choices": [{"index": 0, "text": f"to {prompt}"}], "usage": usage}
        return made | ({"system_fingerprint": self.plan.fingerprint} if self.plan.fingerprint else {})


def error(code: str) -> dict[str, Any]:
    return {"error": {"message": "as planned", "type": "x", "param": None, "code": code}}


class Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, *_: object) -> None:
        pass  # a client that is gone


@contextmanager
def serving(plan: Plan, port: int = 0) -> Iterator[str]:
    """The server's URL."""
    handler = type("Planned", (Handler,), {"plan": plan})
    server = Quiet(("127.0.0.1", port), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        plan.release.set()
        server.shutdown()
        server.server_close()
        thread.join()


class Batch:
    """A server, an input, and runs of it."""

    def __init__(self, folder: Path, plan: Plan, url: str) -> None:
        self.folder = folder
        self.plan = plan
        self.url = url
        self.source = folder / "in.jsonl"
        self.paths = Paths.beside(folder / "out.jsonl")

    def lines(self, *prompts: str) -> None:
        write_lines(self.source, [call(f"r{k}", prompt=prompt) for k, prompt in enumerate(prompts)])

    def run(self, stop: Callable[[], bool] = lambda: False, **settings: Any) -> Report:
        server = Server(self.url)
        return run_remote(server, find_model(server), scan(self.source), self.paths.out, stop, **settings)

    def run_some(self, new: int, **settings: Any) -> Report:
        """A run that is told to stop once it has so many new outcomes."""
        reports: list[Report] = []

        def stop() -> bool:
            return bool(reports) and reports[-1].done - reports[-1].done_before >= new

        return self.run(stop, on_progress=reports.append, **settings)

    def answers(self) -> dict[str, Any]:
        return {one["custom_id"]: one["response"]["body"] for one in read_jsonl(self.paths.out)}

    def errors(self) -> dict[str, Any]:
        return {one["custom_id"]: one for one in read_jsonl(self.paths.errors)}

    def files(self) -> tuple[bytes, bytes | None]:
        errors = self.paths.errors
        return self.paths.out.read_bytes(), errors.read_bytes() if errors.exists() else None

    def left(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}
