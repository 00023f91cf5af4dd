"""Ten times more requests than can be answered: as many are as ever, and the others are told when to come back.

    python -m tests.robustness.overload [--short] [--url URL] [--json FILE]

Capacity is measured first: as many clients as there are places, each with a new request as soon as it has its answer.
Then requests come at ten times that rate, whatever becomes of them. The clients share the machine with the server.
All flags are the default ones but for the KV cache's size: measuring the peak fills a small one, and what memory grows
after that is no cache.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from tests.robustness.http_load import (
    ANSWER,
    COMPLETIONS,
    CUT,
    ERROR,
    SILENT,
    Outcome,
    Pool,
    answer_body,
    ask,
    family_bytes,
    figures,
    percentile,
    request_bytes,
)
from tests.robustness.score import Score, Target, run_script

FACTOR = 10
PLACES, QUEUE = 32, 128
"""Of a server with default flags: requests that run, and that wait."""
TIMEOUT_S = 120.0
TICK_S = 0.01


@dataclass(frozen=True, slots=True)
class Size:
    peak_s: float
    """At least."""
    fill: int
    """Requests, at least, of the peak: their blocks are all of the KV cache, however slow the machine."""
    overload_s: float
    tokens: int
    """Of an answer."""


FULL = Size(20, 500, 60, 32)
SHORT = Size(3, 180, 3, 16)


def request(number: int, tokens: int) -> bytes:
    return request_bytes(COMPLETIONS, answer_body(f"Ship {number} came", tokens, stream=True))


def answers_between(outcomes: Sequence[Outcome], from_s: float, to_s: float) -> float:
    """Whole answers' worth of tokens that came in that time, each answer's spread over its time of coming."""
    total = 0.0
    for one in outcomes:
        if one.ending == ANSWER:
            inside = min(to_s, one.ended_s) - max(from_s, one.times[0])
            total += max(0.0, inside) / max(1e-6, one.ended_s - one.times[0])
    return total


async def peak(target: Target, size: Size) -> float:
    """Answers a second with every place taken and nobody waiting."""
    pool, seconds = Pool(target.address), size.peak_s
    until_s = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    numbers = count(1_000_000)  # no two requests alike: each fills blocks of its own

    async def client() -> None:
        while time.monotonic() < until_s or len(outcomes) < size.fill:
            outcomes.append(await pool.ask(request(next(numbers), size.tokens), TIMEOUT_S))

    await asyncio.gather(*(client() for _ in range(PLACES)))
    pool.close()
    return answers_between(outcomes, until_s - seconds / 2, until_s) / (seconds / 2)


async def flood(target: Target, rate: float, size: Size) -> list[Outcome]:
    """Requests at a fixed rate, each followed to its end."""
    pool = Pool(target.address)
    began_s = time.monotonic()
    tasks: list[asyncio.Task[Outcome]] = []
    while (passed_s := time.monotonic() - began_s) < size.overload_s:
        due = int(passed_s * rate)
        tasks += [asyncio.create_task(pool.ask(request(n, size.tokens), TIMEOUT_S)) for n in range(len(tasks), due)]
        await asyncio.sleep(TICK_S)
    outcomes = await asyncio.gather(*tasks)
    pool.close()
    return list(outcomes)


async def idle_ttft(target: Target, times: int = 5) -> float:
    found = [await ask(target.address, answer_body("A quiet day", 1, stream=True)) for _ in range(times)]
    return percentile([one.ttft_s for one in found], 0.5)


async def until_normal(target: Target, ttft_s: float, limit_s: float = 30.0) -> float:
    """Seconds until a request is answered as on an idle server."""
    began_s = time.monotonic()
    while time.monotonic() - began_s < limit_s:
        outcome = await ask(target.address, answer_body("A quiet day", 1, stream=True), timeout_s=limit_s)
        if outcome.ending == ANSWER and outcome.ttft_s <= 2 * ttft_s + 0.05:
            return time.monotonic() - began_s
    return float("inf")


async def measure(target: Target, score: Score, short: bool) -> None:
    size = SHORT if short else FULL
    ttft_s = await idle_ttft(target)
    rate = await peak(target, size)
    memory = family_bytes(target.pid) if target.pid else 0
    score.note(
        f"peak {rate:.1f} answers of {size.tokens} tokens a second; then {FACTOR * rate:.0f} requests a second for "
        f"{size.overload_s:g} s; an idle server's first token after {1000 * ttft_s:.0f} ms"
    )
    began_s = time.monotonic()
    outcomes = await flood(target, FACTOR * rate, size)
    ended_s = max(one.ended_s for one in outcomes)
    normal_s = await until_normal(target, ttft_s)
    answered = [one for one in outcomes if one.ending == ANSWER]
    refused = [one for one in outcomes if one.status == 429]
    kinds = Counter(one.code or one.ending for one in outcomes)
    score.note(f"{dict(kinds)}; the last answer {ended_s - began_s - size.overload_s:.1f} s after the last request")

    right = [one for one in refused if one.code == "queue_full" and 1 <= int(one.headers.get("retry-after", 0)) <= 60]
    others = len(outcomes) - len(answered) - len(right)
    score.zero("neither an answer nor 429 queue_full with Retry-After of 1–60 s", others, len(outcomes))
    score.check("requests refused", len(refused), "> 0", bool(refused))
    score.zero("without any answer", sum(one.ending in (SILENT, CUT) for one in outcomes), len(outcomes))
    # In the beginning the queue is empty, and a refusal has nothing to wait for either.
    refused_s = [one.seconds for one in refused]
    score.at_most("429, p99", percentile(refused_s, 0.99), 0.5 if short else 0.05)
    half_s = began_s + size.overload_s / 2
    goodput = answers_between(answered, half_s, began_s + size.overload_s) / (size.overload_s / 2)
    least = 0.7 if short else 0.95
    score.check(
        "answers a second in the overload's second half, of the peak",
        f"{100 * goodput / rate:.0f} %",
        f"≥ {100 * least:.0f} %",
        goodput >= least * rate,
    )
    bound_s = (PLACES + QUEUE) / rate + 1
    ttfts = [one.ttft_s for one in answered]
    score.at_most(
        f"first token, p99 ({PLACES} + {QUEUE} places at the peak's rate, and 1 s)", percentile(ttfts, 0.99), bound_s
    )
    if target.pid:
        grown = family_bytes(target.pid) / memory - 1
        score.check("memory more than before", f"{100 * grown:.1f} %", "≤ 5 %", grown <= 0.05)
    score.at_most("as on an idle server again, after the last answer", normal_s, 5)
    errors = [one.code for one in outcomes if one.ending == ERROR and one.status not in (200, 429)]
    score.zero("other errors", len(errors))
    score.zero("engine restarts", (await figures(target.address)).get("engine_restarts_total", 0))


def flags(short: bool) -> Sequence[str]:
    return (f"--kv-cache-mib={64 if short else 256}",)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_script("overload", __doc__, measure, flags, arguments)


if __name__ == "__main__":
    sys.exit(main())
