"""What serving costs: the same requests in process and through the server, in turn; CPU time a token of each process.

    python -m benchmarks.serve_speed [--model demo] [--threads 2] [--streams 1 32] [--repeats 5] [--json FILE]
        [--instruction-set avx2] [--llama-server PROGRAM]

Requests: exact token ids from a fixed seed (64 of prompt, 128 of answer), greedy, end of sequence ignored, streamed
from /v1/completions. The client is one thread that reads raw sockets and looks for the end alone: every READ_S, so that
it takes little of the cores that the server shares with it. In process: `LLM.iterate` in a process of its own.

CPU: of the API process, all its threads between the first request and the last answer, from the kernel's accounts; of
the engine, its main thread's time outside of the backend's calls (`metered_engine`). Both by token of the answers.

--llama-server: llama.cpp's own server as a third way, on the same file and with the same ids, at its best settings.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.metered_engine import LAYOUT, VARIABLE

ROOT = Path(__file__).resolve().parents[1]
PROMPT, ANSWER = 64, 128
READ_S = 0.004
SERVER = """
import sys
import headrace.engine.supervisor as supervisor
supervisor.ENGINE = ("-m", "benchmarks.metered_engine")
from headrace.cli.main import run
sys.argv = ["headrace", *sys.argv[1:]]
run()
"""


def prompts(count: int, seed: int) -> list[list[int]]:
    """Token ids that no two of the prompts share at their beginning."""
    numbers = random.Random(seed)
    return [[numbers.randrange(1000, 40000) for _ in range(PROMPT)] for _ in range(count)]


# ---------------------------------------------------------------- in process


def in_process(model: str, threads: int, instruction_set: str) -> None:
    """Answers each line on stdin (a list of prompts) with the seconds that its answers took."""
    from headrace import LLM, SamplingParams

    with LLM(model, threads=threads, instruction_set=instruction_set, prefix_cache=False) as llm:
        sampling = SamplingParams(max_tokens=ANSWER, ignore_eos=True)
        print("ready", flush=True)
        for line in sys.stdin:
            asked = [(tuple(ids), sampling) for ids in json.loads(line)]
            began = time.perf_counter()
            tokens = sum(len(completion.token_ids) for completion in llm.iterate(asked))
            print(json.dumps([time.perf_counter() - began, tokens]), flush=True)


class InProcess:
    def __init__(self, model: str, threads: int, instruction_set: str) -> None:
        given = (model, str(threads), instruction_set)
        command = [sys.executable, "-m", "benchmarks.serve_speed", "--in-process", *given]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def run(self, asked: list[list[int]]) -> float:
        """Tokens a second."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        seconds, tokens = json.loads(self._process.stdout.readline())
        return float(tokens / seconds)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


# ---------------------------------------------------------------- served


def cpu_s(pid: int) -> float:
    """CPU seconds of all threads of a process."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


@dataclass
class Served:
    tokens_per_s: float
    api_us: float
    """CPU microseconds a token of the API process."""
    engine_us: float
    """The same of the engine's main thread, outside of the backend."""
    events: int
    """Server-sent events, that is less than tokens where a stream lagged."""


class Server:
    def __init__(self, model: str, threads: int, instruction_set: str, meter: Path) -> None:
        meter.write_bytes(bytes(LAYOUT.size))
        self._meter = meter
        flags = ["serve", model, "--threads", str(threads), "--instruction-set", instruction_set, "--port", "0"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, *flags, "--no-prefix-cache"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), VARIABLE: str(meter)},
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self.port = int(line.rsplit(":", 1)[1])

    def run(self, asked: list[list[int]]) -> Served:
        before, api_before = LAYOUT.unpack(self._meter.read_bytes()), cpu_s(self._process.pid)
        began = time.perf_counter()
        events = load(self.port, asked)
        seconds = time.perf_counter() - began
        after, api_after = LAYOUT.unpack(self._meter.read_bytes()), cpu_s(self._process.pid)
        tokens = len(asked) * ANSWER
        inside, thread = after[0] - before[0], after[1] - before[1]
        return Served(
            tokens / seconds, 1e6 * (api_after - api_before) / tokens, 1e6 * (thread - inside) / tokens, events
        )

    def close(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()


class LlamaServer:
    """llama.cpp's server, with a place for each stream."""

    def __init__(self, program: Path, model: str, threads: int, streams: int) -> None:
        from headrace.weights.checkpoint import locate

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        places = ["--parallel", str(streams), "--ctx-size", str(streams * 2 * (PROMPT + ANSWER))]
        counts = ["--threads", str(threads), "--threads-batch", str(threads)]
        self._process = subprocess.Popen(
            [str(program), "--model", str(locate(model)), "--port", str(self.port), *places, *counts],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not self._is_ready():
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"llama-server ended with {self._process.returncode}")
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).status == 200
        except OSError:
            return False

    def run(self, asked: list[list[int]]) -> float:
        """Tokens a second."""
        fields = {"n_predict": ANSWER, "temperature": 0, "ignore_eos": True, "cache_prompt": False, "stream": True}
        began = time.perf_counter()
        load(self.port, asked, "/completion", fields, b'"stop":true')
        return len(asked) * ANSWER / (time.perf_counter() - began)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


OWN = {"max_tokens": ANSWER, "temperature": 0, "ignore_eos": True, "stream": True}


def load(
    port: int,
    asked: list[list[int]],
    path: str = "/v1/completions",
    fields: Mapping[str, Any] = OWN,
    end: bytes = b"data: [DONE]",
) -> int:
    """All requests at once, until the last has ended. Returns the number of events that came."""
    waiting: dict[int, socket.socket] = {}
    tails: dict[int, bytes] = {}
    poll = select.poll()
    events = 0
    for ids in asked:
        body = json.dumps({"prompt": ids, **fields}).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        one = socket.create_connection(("127.0.0.1", port))
        one.sendall(head.encode() + b"\r\n\r\n" + body)
        waiting[one.fileno()] = one
        tails[one.fileno()] = b""
        poll.register(one, select.POLLIN)
    while waiting:
        for number, _ in poll.poll():
            data = waiting[number].recv(1 << 16)
            events += data.count(b"data: {")
            tails[number] = (tails[number] + data)[-4096:]
            if end in tails[number]:
                poll.unregister(number)
                waiting.pop(number).close()
            elif not data:
                raise ConnectionError(f"an answer broke off: {tails[number]!r}")
        time.sleep(READ_S)
    return events


@contextmanager
def servers(model: str, threads: int, instruction_set: str) -> Iterator[tuple[InProcess, Server]]:
    with tempfile.TemporaryDirectory() as folder:
        local = InProcess(model, threads, instruction_set)
        remote = Server(model, threads, instruction_set, Path(folder) / "meter")
        try:
            yield local, remote
        finally:
            local.close()
            remote.close()


def spread(values: list[float], digits: int = 2) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def measure(
    model: str, threads: int, instruction_set: str, streams: int, repeats: int, llama: Path | None
) -> dict[str, Any]:
    """One row: the ways in turn, `repeats` times, after a round that does not count."""
    local_rates: list[float] = []
    llama_rates: list[float] = []
    rows: list[Served] = []
    with servers(model, threads, instruction_set) as (local, remote), ExitStack() as stack:
        other = None
        if llama is not None:
            other = stack.enter_context(closing(LlamaServer(llama, model, threads, streams)))
        for number in range(repeats + 1):
            asked = prompts(streams, number)
            found: dict[str, Any] = {}
            ways = {"local": local.run, "remote": remote.run, **({"llama": other.run} if other else {})}
            for name in list(ways) if number % 2 else reversed(list(ways)):
                found[name] = ways[name](asked)
            if number:
                local_rates.append(found["local"])
                rows.append(found["remote"])
                llama_rates += [found["llama"]] if other else []
    ratios = [row.tokens_per_s / rate for row, rate in zip(rows, local_rates, strict=True)]
    print(
        f"{streams:>3} streams: served {spread([row.tokens_per_s for row in rows], 0)} tokens/s, in process "
        f"{spread(local_rates, 0)}, ratio {spread(ratios)}; CPU µs a token: API {spread([r.api_us for r in rows], 0)}, "
        f"engine outside the backend {spread([r.engine_us for r in rows], 0)}; "
        f"{median([r.events for r in rows]) / (streams * ANSWER):.2f} events a token",
        flush=True,
    )
    if llama_rates:
        ahead = [row.tokens_per_s / rate for row, rate in zip(rows, llama_rates, strict=True)]
        print(f"{'':>11} llama.cpp's server {spread(llama_rates, 0)} tokens/s: served ÷ it {spread(ahead)}", flush=True)
    served = [vars(row) for row in rows]
    return {"streams": streams, "in_process": local_rates, "served": served, "ratios": ratios, "llama": llama_rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 32], metavar="N")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--instruction-set", default="auto", metavar="NAME")
    parser.add_argument("--llama-server", type=Path, metavar="PROGRAM")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    how = (arguments.model, arguments.threads, arguments.instruction_set)
    asked = (arguments.repeats, arguments.llama_server)
    found = [measure(*how, streams, *asked) for streams in arguments.streams]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in-process"]:
        in_process(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        main()
