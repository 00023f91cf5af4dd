"""What the engines are asked to do, and the figures that come of one run of it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SEED = 20260
FIRST_ID, LAST_ID = 100, 40000
"""Prompts are random ids from this range, which every model here has."""
CONTEXTS = (128, 512, 1024, 2048, 4096, 8000)
WARM_UP_TOKENS = 8
NAMES = ("start", "single", "prefill", "batch", "staggered", "sampling", "context")
GREEDY: Mapping[str, float] = {"temperature": 0.0, "top_p": 1.0, "seed": 0}
SAMPLED: Mapping[str, float] = {"temperature": 1.0, "top_p": 0.9, "seed": 1}


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured quantity."""

    key: str
    title: str
    digits: int
    more_is_better: bool = True


@dataclass(frozen=True, slots=True)
class Work:
    name: str
    title: str
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    figures: tuple[Figure, ...]
    """The first is what engines are ranked and compared by."""
    gap_s: float = 0.0
    """Between two arrivals."""
    sampled: bool = False
    """Top-p sampling; each run comes after a greedy one of the same process, to which it is compared."""
    fresh: bool = False
    """Whether each run has a process of its own, whose start counts."""

    @property
    def max_len(self) -> int:
        return max(map(len, self.prompts)) + self.max_tokens

    @property
    def bound_by_reading(self) -> bool:
        """Whether a step computes one row, so that reading the weights bounds its speed."""
        return len(self.prompts) == 1 and self.figures[0].key == "decode_tok_s"

    def task(self) -> dict[str, Any]:
        """The protocol's `run`."""
        return self._task(self.max_tokens, self.gap_s, SAMPLED if self.sampled else GREEDY)

    def greedy_task(self) -> dict[str, Any]:
        """The same, greedy."""
        return self._task(self.max_tokens, self.gap_s, GREEDY)

    def warm_up_task(self) -> dict[str, Any]:
        """All at once, with short answers."""
        return self._task(min(WARM_UP_TOKENS, self.max_tokens), 0.0, SAMPLED if self.sampled else GREEDY)

    def _task(self, count: int, gap_s: float, sampling: Mapping[str, float]) -> dict[str, Any]:
        requests = [
            {"id": str(index), "token_ids": list(prompt), "max_tokens": count, "at_s": index * gap_s}
            for index, prompt in enumerate(self.prompts)
        ]
        return {"op": "run", "requests": requests, "sampling": dict(sampling)}


DECODE = Figure("decode_tok_s", "decode tok/s", 1)
PREFILL = Figure("prefill_tok_s", "prefill tok/s", 0)
OUTPUT = Figure("output_tok_s", "output tok/s", 1)
TTFT = Figure("ttft_s", "first token s", 3, more_is_better=False)
MAKESPAN = Figure("makespan_s", "makespan s", 2, more_is_better=False)
LATENCY = Figure("mean_latency_s", "mean latency s", 2, more_is_better=False)
START = Figure("start_s", "start to first token s", 2, more_is_better=False)
SHARE = Figure("share_of_greedy", "of its greedy speed", 3)
MEMORY = Figure("peak_rss_mib", "peak memory MiB", 0, more_is_better=False)


def make_works(names: Sequence[str], contexts: Sequence[int] = CONTEXTS) -> list[Work]:
    """`names`: of NAMES, or `all`. Raises ValueError."""
    wanted = NAMES if "all" in names else names
    works: list[Work] = []
    for name in wanted:
        if name not in NAMES:
            raise ValueError(f"work: got {name!r}, allowed: all, {', '.join(NAMES)}")
        works += _contexts(contexts) if name == "context" else [_work(name)]
    return works


def _work(name: str) -> Work:
    many = tuple(_ids(50 + index % 31, index) for index in range(32))
    match name:
        case "start":
            title = "process start to first token, 64 tokens"
            return Work(name, title, (_ids(64),), 1, (START, MEMORY), fresh=True)
        case "single":
            return Work(name, "one stream, 128 + 128 tokens", (_ids(128),), 128, (DECODE, TTFT, MEMORY))
        case "prefill":
            return Work(name, "prompt of 512 tokens, 1 new", (_ids(512),), 1, (PREFILL, TTFT, MEMORY))
        case "batch":
            title = "32 requests of 50–80 + 128 tokens at once"
            return Work(name, title, many, 128, (OUTPUT, MAKESPAN, LATENCY, MEMORY))
        case "staggered":
            title = "the 32 requests, one every 100 ms"
            return Work(name, title, many, 128, (MAKESPAN, LATENCY, OUTPUT, MEMORY), gap_s=0.1)
        case _:
            title = "the 32 requests at once, top-p 0.9, temperature 1"
            return Work(name, title, many, 128, (OUTPUT, SHARE, MAKESPAN, MEMORY), sampled=True)


def _contexts(lengths: Sequence[int]) -> list[Work]:
    return [
        Work(f"context-{n}", f"one stream, {n} + 32 tokens", (_ids(n),), 32, (DECODE, PREFILL, MEMORY)) for n in lengths
    ]


def _ids(count: int, number: int = 0) -> tuple[int, ...]:
    generator = random.Random(f"{SEED}/{number}/{count}")
    return tuple(generator.randint(FIRST_ID, LAST_ID) for _ in range(count))


def measure(work: Work, answer: Mapping[str, Any], start_s: float | None = None) -> dict[str, float]:
    """Every figure of one run, by key. `start_s`: from the process's start to its answer."""
    requests = answer["requests"]
    if [len(one["token_ids"]) for one in requests] != [work.max_tokens] * len(work.prompts):
        raise ValueError("the answer has not the tokens that were asked for")
    first, makespan_s = requests[0], answer["makespan_s"]
    latencies = [one["last_s"] - index * work.gap_s for index, one in enumerate(requests)]
    figures = {
        "ttft_s": first["first_s"],
        "prefill_tok_s": len(work.prompts[0]) / first["first_s"],
        "output_tok_s": work.max_tokens * len(requests) / makespan_s,
        "makespan_s": makespan_s,
        "mean_latency_s": sum(latencies) / len(latencies),
        "peak_rss_mib": answer["peak_rss_bytes"] / 2**20,
        "busy_cores": answer["cpu_s"] / makespan_s,
    }
    if work.max_tokens > 1:
        figures["decode_tok_s"] = (work.max_tokens - 1) / max(1e-9, first["last_s"] - first["first_s"])
    if start_s is not None:
        figures["start_s"] = start_s
    return figures
