"""The loop that every driver runs: one JSON object a line in, one out. The protocol: see the package's docstring.

A driver runs this file by its path (it stands in no import path there) and calls `serve` with its engine class.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

PR_SET_PDEATHSIG = 1
MAX_ERROR = 500
"""Characters of an error that go back."""


@dataclass
class Asked:
    """One request of a run, and what has come back of it. Times are seconds from the start of the run."""

    id: str
    token_ids: list[int]
    max_tokens: int
    at_s: float
    ends: frozenset[int] = frozenset()
    """Ids after which its answer ends."""
    output: list[int] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    """When each token of the output was in our hands."""

    @property
    def done(self) -> bool:
        return len(self.output) >= self.max_tokens or (bool(self.output) and self.output[-1] in self.ends)


class Run:
    """One run: gives each request to the engine when it is due, takes the tokens as they come out."""

    def __init__(self, requests: list[Asked], sampling: dict[str, Any], ends: frozenset[int] = frozenset()) -> None:
        self.requests = requests
        self.ends = ends
        """Ids after which an answer ends; none where end-of-sequence is ignored."""
        self.temperature = float(sampling.get("temperature", 0.0))
        self.top_p = float(sampling.get("top_p", 1.0))
        self.seed = int(sampling.get("seed", 0))
        self._waiting = sorted(requests, key=lambda asked: asked.at_s)
        self._began = time.perf_counter()

    @property
    def waiting(self) -> bool:
        """Whether some requests were not handed out yet."""
        return bool(self._waiting)

    @property
    def next_s(self) -> float:
        """Seconds until the next request arrives; infinite where none is left."""
        return max(0.0, self._waiting[0].at_s - self.now()) if self._waiting else math.inf

    def now(self) -> float:
        return time.perf_counter() - self._began

    def arrived(self, most: int | None = None) -> list[Asked]:
        """Requests whose time has come, up to `most`, in the order of arrival; each is handed out once."""
        now = self.now()
        count = sum(asked.at_s <= now for asked in self._waiting)
        count = count if most is None else min(count, most)
        due, self._waiting = self._waiting[:count], self._waiting[count:]
        return due

    def wait(self, most: int | None = None) -> list[Asked]:
        """Like `arrived`, but sleeps until there is one, if any is left."""
        while self._waiting:
            if due := self.arrived(most):
                return due
            time.sleep(self.next_s)
        return []

    def take(self, asked: Asked, tokens: Iterable[int]) -> None:
        """Tokens of one request that have just come out; those past its end are dropped."""
        now = self.now()
        for token in tokens:
            if asked.done:
                return
            asked.output.append(int(token))
            asked.token_s.append(now)

    def report(self) -> dict[str, Any]:
        """Raises RuntimeError if a request has not all its tokens."""
        for asked in self.requests:
            if not asked.done:
                raise RuntimeError(f"request {asked.id}: {len(asked.output)} of {asked.max_tokens} tokens came out")
        answers = [
            {"id": a.id, "token_ids": a.output, "token_s": a.token_s, "first_s": a.token_s[0], "last_s": a.token_s[-1]}
            for a in self.requests
        ]
        return {"requests": answers, "makespan_s": max(a.token_s[-1] for a in self.requests)}


def parse_run(task: dict[str, Any]) -> Run:
    """Raises KeyError, TypeError or ValueError for a task that is none."""
    ignore_eos, ends = task.get("ignore_eos", True), frozenset(int(t) for t in task.get("eos_token_ids", ()))
    if ignore_eos not in (True, False) or not (ignore_eos or ends):
        raise ValueError("ignore_eos: true, or false with eos_token_ids")
    ends = frozenset() if ignore_eos else ends
    requests = [
        Asked(
            id=str(one["id"]),
            token_ids=[int(t) for t in one["token_ids"]],
            max_tokens=int(one["max_tokens"]),
            at_s=float(one.get("at_s", 0.0)),
            ends=ends,
        )
        for one in task["requests"]
    ]
    if not requests or any(not asked.token_ids or asked.max_tokens < 1 for asked in requests):
        raise ValueError("requests: at least one, each with token_ids and max_tokens of at least 1")
    return Run(requests, task.get("sampling", {}), ends)


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
    end_with_parent()
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


def end_with_parent() -> None:
    """A parent that is killed closes our input, which a run in progress would only see at its end (Linux: prctl(2))."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


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
