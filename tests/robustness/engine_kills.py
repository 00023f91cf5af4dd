"""The engine's process killed and stopped under load: nobody waits for ever, health says so, and it serves again.

    python -m tests.robustness.engine_kills [--short] [--json FILE]

A killed engine's clients get their error at once. A stopped one is not ready after three seconds; after thirty it is
replaced. Some are killed again while they load. A short form lets a stopped engine go on instead. In the end, an
engine is killed while connections use up all files, and a server whose supervisor has died must not say that it lives.
"""

from __future__ import annotations

import asyncio
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import kill
from pathlib import Path

from tests.robustness.http_load import (
    ANSWER,
    CUT,
    ERROR,
    SILENT,
    Address,
    Connection,
    Outcome,
    answer_body,
    ask,
    descriptors,
    engine_pid,
    figures,
    get,
    is_alive,
    until_free,
)
from tests.robustness.score import Score, Target, finish, options, own_server

KILLS, STOPS = 50, 10
CLIENTS = 16
TOKENS = 24
PARTS = ("wheel", "race", "stone", "gate", "pond", "roof", "door", "weir")
PROMPTS = tuple(f"The {part} of the mill" for part in PARTS)
PAUSE_S = 0.1
"""Of a client whose request was refused."""
LOOK_S = 0.02
HANG_S = 30.0
"""After which a stopped engine is replaced (engine/supervisor.py)."""
CODES = frozenset({"engine_fault", "not_ready"})
MORTAL = """
import asyncio, resource, signal, sys
from headrace.cli.main import main
from headrace.engine.supervisor import Supervisor
real = Supervisor.start
async def start(self):
    loaded = await real(self)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._task.cancel)
    return loaded
Supervisor.start = start
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""
"""The server with few files, and with a signal that ends its supervisor."""
MOST_FILES = 128
AGAIN_S = 10.0
"""For an engine to be back after all files were in use: a pause between two attempts included."""


class Load:
    """Clients that ask for one stream after the other, and a look at the server's health all the time."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self.outcomes: list[Outcome] = []
        self.ready: list[tuple[float, int]] = []
        """When it was asked, and the status."""
        self.live: list[tuple[float, int]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._ending = False

    def begin(self) -> None:
        self._tasks = [asyncio.create_task(self._client(number)) for number in range(CLIENTS)]
        self._tasks.append(asyncio.create_task(self._look("/health/ready", self.ready)))
        self._tasks.append(asyncio.create_task(self._look("/health/live", self.live)))

    async def end(self) -> None:
        self._ending = True
        await asyncio.gather(*self._tasks)

    async def _client(self, number: int) -> None:
        while not self._ending:
            body = answer_body(PROMPTS[number % len(PROMPTS)], TOKENS, stream=True)
            outcome = await ask(self._address, body, timeout_s=2 * HANG_S)
            self.outcomes.append(outcome)
            number += 1
            if outcome.ending != ANSWER:
                await asyncio.sleep(PAUSE_S)

    async def _look(self, path: str, found: list[tuple[float, int]]) -> None:
        while not self._ending:
            began_s = time.monotonic()
            status, _ = await get(self._address, path)
            found.append((began_s, status))
            await asyncio.sleep(LOOK_S)

    async def first(self, status: int, after_s: float, limit_s: float) -> float:
        """Seconds until /health/ready says a status."""
        while time.monotonic() < after_s + limit_s:
            for at_s, found in reversed(self.ready):
                if at_s <= after_s:
                    break
                if found == status:
                    return at_s - after_s
            await asyncio.sleep(LOOK_S)
        return float("inf")


class Blows:
    """What each kill or stop led to, in seconds."""

    def __init__(self) -> None:
        self.at_s: list[float] = []
        self.seen_s: list[float] = []
        """Until it is not ready."""
        self.serving_s: list[float] = []
        """Until a request is answered again."""

    def told_s(self, load: Load) -> float:
        """Until the last of all clients that were interrupted had its terminal event."""
        return max(
            one.ended_s - at_s
            for at_s in self.at_s
            for one in load.outcomes
            if one.began_s < at_s < one.ended_s and one.ending != ANSWER
        )


async def until_serving(address: Address, limit_s: float) -> None:
    until_s = time.monotonic() + limit_s
    while time.monotonic() < until_s:
        outcome = await ask(address, answer_body(PROMPTS[0], 1), timeout_s=limit_s)
        if outcome.ending == ANSWER:
            return
        await asyncio.sleep(LOOK_S)
    raise TimeoutError(f"no answer in {limit_s:g} s")


async def strike(target: Target, load: Load, blows: Blows, number: signal.Signals, again: bool, limit_s: float) -> None:
    """One kill or stop, until the server serves again. `again`: the next engine is killed while it loads."""
    assert target.pid is not None
    victim = engine_pid(target.pid)
    kill(victim, number)
    at_s = time.monotonic()
    blows.at_s.append(at_s)
    blows.seen_s.append(await load.first(503, at_s, limit_s))
    since_s = at_s
    if again:
        while engine_pid_or_none(target.pid) in (None, victim):
            await asyncio.sleep(LOOK_S)
        await asyncio.sleep(0.3)
        kill(engine_pid(target.pid), signal.SIGKILL)
        since_s = time.monotonic()
    if number == signal.SIGSTOP:
        await load.first(200, at_s + blows.seen_s[-1], limit_s)
    await until_serving(target.address, limit_s)
    blows.serving_s.append(time.monotonic() - since_s)
    if is_alive(victim):
        raise RuntimeError("the old engine still runs")


def engine_pid_or_none(pid: int) -> int | None:
    try:
        return engine_pid(pid)
    except ProcessLookupError:
        return None


async def pause_and_go_on(target: Target, load: Load, score: Score) -> float:
    """SIGSTOP, and SIGCONT before the engine is replaced. Returns when it was stopped."""
    assert target.pid is not None
    before = (await figures(target.address))["engine_restarts_total"]
    victim = engine_pid(target.pid)
    kill(victim, signal.SIGSTOP)
    at_s = time.monotonic()
    seen_s = await load.first(503, at_s, 20)
    kill(victim, signal.SIGCONT)
    on_s = time.monotonic()
    score.at_most("stopped: not ready after", seen_s, 5)
    score.at_most("let go on: ready after", await load.first(200, on_s, 20), 5)
    await until_serving(target.address, 20)
    restarts = (await figures(target.address))["engine_restarts_total"] - before
    score.zero("stopped and let go on: engines replaced", restarts)
    return at_s


async def load_seconds(target: Target) -> float:
    """What the server says that the engine's first start took."""
    for _ in range(100):
        for line in tuple(target.log):
            if found := re.match(r"\s*engine loaded\s+([0-9.]+) s", line):
                return float(found[1])
        await asyncio.sleep(LOOK_S)
    raise RuntimeError("the server did not say how long the engine loaded")


async def answers(address: Address) -> list[str]:
    return [(await ask(address, answer_body(prompt, TOKENS))).text for prompt in PROMPTS]


async def measure(target: Target, score: Score, short: bool) -> None:
    assert target.pid is not None
    kills, stops = (2, 0) if short else (KILLS, STOPS)
    load_s = await load_seconds(target)
    score.note(f"{kills} kills, {stops} stops; {CLIENTS} clients; the engine's first start took {load_s:.2f} s")
    alone = await answers(target.address)
    files = descriptors(target.pid)
    load, killed, stopped = Load(target.address), Blows(), Blows()
    draw = random.Random(16)
    load.begin()
    for turn in range(kills):
        await asyncio.sleep(draw.uniform(0.2, 2.0))
        await strike(target, load, killed, signal.SIGKILL, turn % 5 == 1 and not short, 60)
    for _ in range(stops):
        await asyncio.sleep(draw.uniform(0.2, 2.0))
        await strike(target, load, stopped, signal.SIGSTOP, False, 2 * HANG_S)
    if short:
        await asyncio.sleep(0.3)
        stopped_s = await pause_and_go_on(target, load, score)
    await load.end()
    if short:
        waited = [one for one in load.outcomes if one.began_s < stopped_s < one.ended_s]
        score.zero("stopped and let go on: answers lost", sum(one.ending != ANSWER for one in waited), len(waited))

    slack_s = 3 if short else 1  # a short form runs beside other tests
    score.at_most("killed: not ready after", max(killed.seen_s), slack_s)
    score.at_most("killed: the last client's terminal event after", killed.told_s(load), 2 * slack_s)
    bound_s = slack_s * (load_s + 2)
    score.at_most("killed: an answer again after", max(killed.serving_s), bound_s)
    if stopped.seen_s:
        score.at_most("stopped: not ready after", max(stopped.seen_s), 5)
        score.at_most("stopped: the last client's terminal event after", stopped.told_s(load), HANG_S + 2)
        score.at_most("stopped: an answer again after", max(stopped.serving_s), HANG_S + load_s + 2)
    await whole(target, score, load, alone, files)


async def whole(target: Target, score: Score, load: Load, alone: Sequence[str], files: int) -> None:
    """What must hold over all of it."""
    assert target.pid is not None
    endings = Counter(one.code or one.ending for one in load.outcomes)
    score.note(f"{len(load.outcomes)} requests: {dict(endings)}")
    hung = sum(one.ending in (SILENT, CUT) for one in load.outcomes)
    score.zero("clients without a terminal event", hung, len(load.outcomes))
    wrong = [one.code for one in load.outcomes if one.ending == ERROR and one.code not in CODES]
    score.zero("errors other than engine_fault and not_ready", len(wrong))
    texts = set(alone)
    changed = [one for one in load.outcomes if one.ending == ANSWER and one.text not in texts]
    score.zero("answers under load that changed", len(changed), endings[ANSWER])
    dead = sum(status != 200 for _, status in load.live)
    score.zero("/health/live: not 200, although somebody watches", dead, len(load.live))
    again = zip(await answers(target.address), alone, strict=True)
    score.zero("answers that differ afterwards", sum(one != before for one, before in again), len(alone))
    score.at_most("nothing held at the end", await until_free(target.address), 0.25)
    score.at_most("open files more than before", descriptors(target.pid) - files, 2, "")


# ---------------------------------------------------------------- nobody watches


@contextmanager
def mortal_server(model: str | Path, flags: Sequence[str]) -> Iterator[Target]:
    process = subprocess.Popen(
        [sys.executable, "-c", MORTAL, str(MOST_FILES), "serve", str(model), "--port", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            raise RuntimeError("the server did not start")
        yield Target(line.split()[-1], process.pid)
    finally:
        process.kill()
        process.communicate()


async def no_files_left(target: Target, score: Score) -> None:
    """The engine is killed while no file can be opened: it is started as soon as one can."""
    assert target.pid is not None
    connections = [await Connection.open(target.address) for _ in range(MOST_FILES)]
    await asyncio.sleep(0.5)
    kill(engine_pid(target.pid), signal.SIGKILL)
    await asyncio.sleep(1.0)
    for connection in connections:
        connection.cut()
    began_s = time.monotonic()
    try:
        await until_serving(target.address, AGAIN_S)
    except TimeoutError:
        began_s = float("-inf")
    score.at_most("killed with no file left: an answer again after", time.monotonic() - began_s, AGAIN_S)


async def dead_supervisor(target: Target, score: Score) -> None:
    assert target.pid is not None
    before, _ = await get(target.address, "/health/live")
    kill(target.pid, signal.SIGUSR1)
    await asyncio.sleep(0.2)
    live = [(await get(target.address, "/health/live"))[0] for _ in range(20)]
    kill(engine_pid(target.pid), signal.SIGKILL)
    await asyncio.sleep(0.5)
    live += [(await get(target.address, "/health/live"))[0] for _ in range(20)]
    ready = [(await get(target.address, "/health/ready"))[0] for _ in range(5)]
    score.check("/health/live before its supervisor is dead", before, 200, before == 200)
    score.zero("/health/live: 200 with a dead supervisor", live.count(200), len(live))
    score.zero("/health/ready: 200 with its engine dead too", ready.count(200), len(ready))


def main(arguments: Sequence[str] | None = None) -> int:
    given = options(__doc__, False, arguments)
    score = Score("engine kills")
    with own_server(given.model, *given.flag) as target:
        asyncio.run(measure(target, score, given.short))
    with mortal_server(given.model, given.flag) as target:
        asyncio.run(no_files_left(target, score))
        asyncio.run(dead_supervisor(target, score))
    return finish(score, given.json)


if __name__ == "__main__":
    sys.exit(main())
