"""SIGTERM under a hundred streams: each is finished or told, new ones are refused, and nothing stays behind.

    python -m tests.robustness.drain [--short] [--json FILE]

Each round is a server of its own. Most have default flags and answers that the drain has time for; in some a second
signal comes, in some the drain is too short for the answers, in some the signal is SIGINT, or the server is killed -9.
"""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.robustness.http_load import (
    ANSWER,
    CUT,
    ERROR,
    Address,
    Connection,
    Outcome,
    answer_body,
    ask,
    descendants,
    get,
    is_alive,
    percentile,
    request_bytes,
)
from tests.robustness.score import Score, finish, options
from tests.server.conftest import Running, serving

DRAIN_S = 30.0
CODE = "server_shutting_down"
SHORT_ANSWER, LONG_ANSWER = 48, 4000
LOOK_S = 0.05
LAST_S = 0.5
"""Before its end a server may leave a connection unanswered that nobody has accepted yet."""
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Case:
    """What happens in a round."""

    name: str
    flags: Sequence[str] = ()
    tokens: int = SHORT_ANSWER
    first: signal.Signals = signal.SIGTERM
    second_s: float | None = None
    """Seconds from the first signal to a second SIGTERM."""
    drain_s: float = DRAIN_S


FINISHES = Case("drains")
SECOND = Case("second signal", tokens=LONG_ANSWER, second_s=0.5)
TOO_LONG = Case("drain too short", ("--drain=1",), LONG_ANSWER, drain_s=1.0)
INTERRUPTED = Case("SIGINT", first=signal.SIGINT)
IDLE = Case("nobody there", tokens=0)
FULL = (FINISHES,) * 30 + (SECOND,) * 10 + (TOO_LONG,) * 5 + (INTERRUPTED,) * 2 + (IDLE,) * 3


@dataclass(slots=True)
class Found:
    """What all rounds led to."""

    endings: Counter[str] = field(default_factory=Counter)
    statuses: list[int] = field(default_factory=list)
    """Of the processes."""
    heeded_s: list[float] = field(default_factory=list)
    """From the signal until it is not ready."""
    refusals_s: list[float] = field(default_factory=list)
    wrong_news: list[str] = field(default_factory=list)
    """What new requests were told instead of 503."""
    wrong_ready: int = 0
    over_s: list[float] = field(default_factory=list)
    """Of the drain, until the process had ended."""
    after_second_s: list[float] = field(default_factory=list)
    idle_s: list[float] = field(default_factory=list)
    unfinished: int = 0
    """Answers that the drain had time for, and that were not finished."""
    orphans: int = 0
    shared: int = 0


async def knock(address: Address, process: subprocess.Popen[str], found: Found) -> None:
    """From when the signal is heeded: new requests, one after the other, until the process has ended."""
    news: list[Outcome] = []
    began_s = time.monotonic()
    while process.poll() is None and (await get(address, "/health/ready"))[0] == 200:
        pass
    found.heeded_s.append(time.monotonic() - began_s)
    while process.poll() is None:
        news.append(await ask(address, answer_body("Too late", 1), timeout_s=10))
        ready, _ = await get(address, "/health/ready")
        found.wrong_ready += ready not in (0, 503)
        await asyncio.sleep(LOOK_S)
    ended_s = time.monotonic()
    for one in news:
        if one.ending == ERROR and one.status == 503 and one.code == CODE and "retry-after" in one.headers:
            found.refusals_s.append(one.seconds)
        elif one.ending != CUT or one.began_s < ended_s - LAST_S:
            found.wrong_news.append(one.code or one.ending)


async def hangers_on(address: Address) -> list[Connection]:
    """Connections that ask for nothing: after an answer, before a request, inside one's headers."""
    found = [await Connection.open(address) for _ in range(3)]
    found[0].send(request_bytes("/health/live"))
    await found[0].head()
    await found[0].body()
    found[2].send(request_bytes("/health/live")[:-2])
    return found


async def round_of(running: Running, case: Case, count: int, found: Found, draw: random.Random) -> None:
    """One server, from its streams to its end."""
    address = running.address
    started = 0

    def seen() -> None:
        nonlocal started
        started += 1

    body = [
        answer_body(f"Barge {number} is", case.tokens, stream=True) for number in range(count if case.tokens else 0)
    ]
    streams = [asyncio.create_task(ask(address, one, on_event=seen)) for one in body]
    while body and started < 64:
        await asyncio.sleep(0.01)
    await asyncio.sleep(draw.uniform(0, 0.5))
    idle = await hangers_on(address)
    family = [running.process.pid, *descendants(running.process.pid)]
    running.process.send_signal(case.first)
    at_s = time.monotonic()
    knocking = asyncio.create_task(knock(address, running.process, found))
    if case.second_s is not None:
        await asyncio.sleep(case.second_s)
        running.process.send_signal(signal.SIGTERM)
        second_s = time.monotonic()
    outcomes = await asyncio.gather(*streams)
    await knocking
    ended_s = time.monotonic()
    found.statuses.append(running.process.wait())
    for connection in idle:
        connection.close()
    if case.second_s is not None:
        found.after_second_s.append(ended_s - second_s)
    elif case.tokens == 0:
        found.idle_s.append(ended_s - at_s)
    else:
        found.over_s.append(ended_s - at_s - case.drain_s)
    for one in outcomes:
        found.endings[one.code or one.ending] += 1
    if case.tokens == SHORT_ANSWER:
        found.unfinished += sum(one.ending != ANSWER for one in outcomes)
    await asyncio.sleep(0.2)
    found.orphans += sum(is_alive(pid) for pid in family)


async def killed(running: Running, found: Found) -> None:
    """SIGKILL of the server: its children must notice by themselves."""
    family = descendants(running.process.pid)
    streams = [asyncio.create_task(ask(running.address, answer_body("Sunk", LONG_ANSWER))) for _ in range(8)]
    await asyncio.sleep(0.5)
    running.process.kill()
    running.process.wait()
    outcomes = await asyncio.gather(*streams)
    found.unfinished += sum(one.ending != CUT for one in outcomes)
    await asyncio.sleep(1.0)
    found.orphans += sum(is_alive(pid) for pid in family)


def shared_memory() -> set[str]:
    return {path.name for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()


def main(arguments: Sequence[str] | None = None) -> int:
    given = options(__doc__, False, arguments)
    score = Score("drain")
    cases = (FINISHES, SECOND) if given.short else FULL
    count, kills = (40, 0) if given.short else (100, 3)
    score.note(
        f"{len(cases)} servers, {dict(Counter(case.name for case in cases))}; {count} streams each; {kills} kill -9"
    )
    found, draw, before = Found(), random.Random(17), shared_memory()
    for case in cases:
        with serving(given.model, *case.flags, *given.flag) as running:
            asyncio.run(round_of(running, case, count, found, draw))
    for _ in range(kills):
        with serving(given.model, *given.flag) as running:
            asyncio.run(killed(running, found))
    found.shared = len(shared_memory() - before)
    judge(score, found, given.short)
    return finish(score, given.json)


def judge(score: Score, found: Found, short: bool) -> None:
    slack = 5 if short else 1  # a short form runs beside other tests
    streams = sum(found.endings.values())
    others = streams - found.endings[ANSWER] - found.endings[CODE]
    score.note(f"streams: {dict(found.endings)}; {len(found.refusals_s)} new requests refused {found.wrong_news}")
    score.zero(f"neither finished nor told {CODE}", others, streams)
    score.zero("unfinished, although the drain had time for them", found.unfinished)
    score.at_most("not ready after the signal", max(found.heeded_s), 0.25 * slack)
    score.zero("new requests that were told anything but 503", len(found.wrong_news))
    score.at_most("new requests: 503 after, p99", percentile(found.refusals_s, 0.99), 0.1 * slack)
    score.zero("/health/ready: not 503 while it drains", found.wrong_ready)
    bad = [status for status in found.statuses if status != 0]
    score.check("exit statuses other than 0", bad or "none", "none", not bad)
    if found.over_s:
        score.at_most("ended after the drain's time", max(found.over_s), 3)
    if found.after_second_s:
        score.at_most("ended after a second signal", max(found.after_second_s), slack)
    if found.idle_s:
        score.at_most("ended with nobody there", max(found.idle_s), 1)
    score.zero("processes left", found.orphans)
    score.zero("shared memory left", found.shared)


if __name__ == "__main__":
    sys.exit(main())
