"""The loop that every driver runs: one JSON object a line in, one out. The protocol: see the package's docstring.

A driver runs this file by its path (it stands in no import path there) and calls `serve` with its engine class.
"""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

MAX_ERROR = 500
"""Characters of an error that go back."""


@dataclass
class Asked:
    """One request of a run, and what has come back of it. Times are seconds from the start of the run."""

    id: str
    token_ids: list[int]
    max_tokens: int
    at_s: float
    output: list[int] = field(default_factory=list)
    first_s: float | None = None
    last_s: float | None = None

    @property
    def done(self) -> bool:
        return len(self.output) >= self.max_tokens


class Run:
    """One run: gives each request to the engine when it is due, takes the tokens as they come out."""

    def __init__(self, requests: list[Asked], sampling: dict[str, Any]) -> None:
        self.requests = requests
        self.temperature = float(sampling.get("temperature", 0.0))
        self.top_p = float(sampling.get("top_p", 1.0))
        self.seed = int(sampling.get("seed", 0))
        self._waiting = sorted(requests, key=lambda asked: asked.at_s)
        self._began = time.perf_counter()

    @property
    def waiting(self) -> bool:
        """Whether some requests were not handed out yet."""
        return bool(self._waiting)

    def now(self) -> float:
        return time.perf_counter() - self._began

    def arrived(self) -> list[Asked]:
        """Requests whose time has come; each is handed out once."""
        now = self.now()
        count = sum(asked.at_s <= now for asked in self._waiting)
        due, self._waiting = self._waiting[:count], self._waiting[count:]
        return due

    def wait(self) -> list[Asked]:
        """Like `arrived`, but sleeps until there is one, if any is left."""
        while self._waiting:
            if due := self.arrived():
                return due
            time.sleep(max(0.0, self._waiting[0].at_s - self.now()))
        return []

    def take(self, asked: Asked, tokens: Iterable[int]) -> None:
        """Tokens of one request that have just come out; those past its `max_tokens` are dropped."""
        now = self.now()
        before = len(asked.output)
        asked.output += [int(token) for token in tokens][: asked.max_tokens - before]
        if len(asked.output) > before:
            asked.first_s = now if asked.first_s is None else asked.first_s
            asked.last_s = now

    def report(self) -> dict[str, Any]:
        """Raises RuntimeError if a request has not all its tokens."""
        for asked in self.requests:
            if not asked.done:
                raise RuntimeError(f"request {asked.id}: {len(asked.output)} of {asked.max_tokens} tokens came out")
        answers = [{"id": a.id, "token_ids": a.output, "first_s": a.first_s, "last_s": a.last_s} for a in self.requests]
        return {"requests": answers, "makespan_s": max(a.last_s or 0.0 for a in self.requests)}


def parse_run(task: dict[str, Any]) -> Run:
    """Raises KeyError, TypeError or ValueError for a task that is none."""
    requests = [
        Asked(str(one["id"]), [int(t) for t in one["token_ids"]], int(one["max_tokens"]), float(one.get("at_s", 0.0)))
        for one in task["requests"]
    ]
    if not requests or any(not asked.token_ids or asked.max_tokens < 1 for asked in requests):
        raise ValueError("requests: at least one, each with token_ids and max_tokens of at least 1")
    return Run(requests, task.get("sampling", {}))


def run_once(engine: Any, task: dict[str, Any]) -> dict[str, Any]:
    gc.collect()
    reset_peak_rss()
    cpu_s = cpu_seconds()
    run = parse_run(task)
    engine.run(run)
    return run.report() | {"cpu_s": cpu_seconds() - cpu_s, "peak_rss_bytes": peak_rss()}


def answer(engine: Any, task: dict[str, Any]) -> dict[str, Any]:
    """What a task gives, without "ok"."""
    if task["op"] == "load":
        began = time.perf_counter()
        facts = engine.load(task)
        return {"load_s": time.perf_counter() - began, "peak_rss_bytes": peak_rss(), **facts}
    if task["op"] == "run":
        return run_once(engine, task)
    if task["op"] == "close":
        return {}
    raise ValueError(f"op: got {task['op']!r}, allowed: load, run, close")


def serve(engine: Any) -> None:
    """Answers tasks until `close` or the end of the input. What libraries print goes to stderr, native code's too."""
    out = own_stdout()
    for line in sys.stdin:
        op = None
        try:
            task = json.loads(line)
            op = task["op"]
            said = {"ok": True, **answer(engine, task)}
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}"
            said = {"ok": False, "error": " ".join(text.split())[:MAX_ERROR]}
        out.write(json.dumps(said) + "\n")
        out.flush()
        if op == "close":
            break
    # Some engines hang or crash when the interpreter takes them down; everything has been said.
    os._exit(0)


def own_stdout() -> TextIO:
    """The process's stdout for us alone; descriptor 1 becomes stderr."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def reset_peak_rss() -> None:
    """From here on the peak is this run's (proc(5), clear_refs). Where the system forbids it, the process's stays."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        print("headrace driver: peak memory is the process's, not the run's", file=sys.stderr)


def peak_rss() -> int:
    """Bytes."""
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
