"""Clients that leave: at any byte of a request or an answer, by closing or by RST, one by one and all at once.

    python -m tests.robustness.disconnects [--short] [--url URL] [--json FILE]

Nothing may stay behind: no running request, no block, no open socket; the place is free for the next one, and those who
stay get the bytes that they get when they are alone.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from tests.robustness.http_load import (
    ANSWER,
    COMPLETIONS,
    Connection,
    Outcome,
    answer_body,
    ask,
    computed_tokens,
    descriptors,
    figures,
    get,
    percentile,
    request_bytes,
    until,
    until_free,
)
from tests.robustness.score import Score, Target, run_script

FREE_S = 0.25
"""Within this the place of a client that has left is another's."""
PROMPTS = tuple(f"Chapter {number}. The canal" for number in range(1, 9))
"""Shorter than a block: none finds its prompt in the prefix cache."""
TOKENS = 24
STAYS = 120
LONG = 4000
CONCURRENT = 24
SETTLE_S = 1.0


def body_of(index: int, stream: bool) -> dict[str, Any]:
    return answer_body(PROMPTS[index % len(PROMPTS)], TOKENS, stream=stream)


class Storm:
    """Many requests at once, some of which end before their answers do."""

    def __init__(self, target: Target, draw: random.Random) -> None:
        self._address = target.address
        self._draw = draw
        self._alone: list[str] = []
        self._sizes: dict[bool, tuple[int, int]] = {}
        """By stream or not: bytes of a request, of its answer."""
        self._seconds = 0.0
        self.cuts = 0
        self.stayed: list[tuple[int, Outcome]] = []

    async def learn(self) -> None:
        """The answers, and how large they are, when nobody else is there."""
        for index in range(len(PROMPTS)):
            outcome = await ask(self._address, body_of(index, stream=True))
            self._alone.append(outcome.text)
            self._seconds = outcome.seconds
        for stream in (True, False):
            request = request_bytes(COMPLETIONS, body_of(0, stream))
            connection = await Connection.open(self._address)
            connection.send(request)
            await connection.head()
            await connection.body()
            connection.close()
            self._sizes[stream] = (len(request), connection.received)

    async def run(self, count: int, cut_share: float) -> None:
        places = asyncio.Semaphore(CONCURRENT)

        async def one(index: int) -> None:
            async with places:
                stream = index % 2 == 0
                if self._draw.random() < cut_share:
                    self.cuts += 1
                    await self._leave(index, stream)
                else:
                    self.stayed.append((index, await ask(self._address, body_of(index, stream))))

        await asyncio.gather(*(one(index) for index in range(count)))

    async def _leave(self, index: int, stream: bool) -> None:
        """Ends the connection at a random byte of request and answer, or, where the answer comes all at once, at a
        random time while it is computed."""
        request = request_bytes(COMPLETIONS, body_of(index, stream))
        sizes = self._sizes[stream]
        at = self._draw.randrange(sum(sizes))
        connection = await Connection.open(self._address)
        try:
            connection.send(request[:at])
            if at >= len(request):
                if not stream and self._draw.random() < 0.8:
                    await asyncio.sleep(self._draw.uniform(0, 4 * self._seconds))
                else:
                    with suppress(EOFError, OSError):  # another answer than the first may be a few bytes shorter
                        await connection.read_bytes(at - len(request))
        finally:
            if self._draw.random() < 0.5:
                connection.cut()
            else:
                connection.close()

    def changed(self) -> int:
        """Answers of those who stayed that are not what they are alone."""
        return sum(one.ending != ANSWER or one.text != self._alone[index % len(PROMPTS)] for index, one in self.stayed)


async def hold(target: Target, count: int) -> list[Connection]:
    """Streams that do not end by themselves, each with its first token."""

    async def begin(index: int) -> Connection:
        connection = await Connection.open(target.address)
        connection.send(request_bytes(COMPLETIONS, answer_body(PROMPTS[index % len(PROMPTS)], LONG, stream=True)))
        await connection.head()
        return connection

    return list(await asyncio.gather(*(begin(index) for index in range(count))))


async def drain(connection: Connection) -> None:
    """Reads whatever comes, until the end."""
    with suppress(EOFError, OSError):
        async for _ in connection.pieces():
            pass


async def places_used_again(target: Target, times: int, slots: int) -> list[float]:
    """With every place taken and one request waiting: seconds from a client's RST to the waiting one's first token."""
    streams = await hold(target, slots)
    readers = [asyncio.create_task(drain(one)) for one in streams]
    found = []
    try:
        for turn in range(times):
            first = asyncio.get_running_loop().create_future()

            def seen(first: asyncio.Future[None] = first) -> None:
                if not first.done():
                    first.set_result(None)

            waiting = asyncio.create_task(
                ask(target.address, answer_body("Once there was", 1, stream=True), on_event=seen)
            )

            async def one_waits() -> bool:
                return (await figures(target.address))["num_requests_waiting"] == 1

            if await until(one_waits, 5) == float("inf"):
                raise RuntimeError(f"{slots} streams run, and yet nobody has to wait")
            began_s = time.monotonic()
            streams[turn % slots].cut()
            await first
            found.append(time.monotonic() - began_s)
            await waiting
            (streams[turn % slots],) = await hold(target, 1)
            readers[turn % slots] = asyncio.create_task(drain(streams[turn % slots]))
    finally:
        for stream in streams:
            stream.cut()
        await asyncio.gather(*readers)
    return found


async def all_at_once(target: Target, count: int, alone: str) -> tuple[float, bool]:
    """(seconds from the RST of all streams but one until only that one is left, whether its answer is as if alone)"""
    stays = asyncio.create_task(ask(target.address, answer_body(PROMPTS[0], STAYS, stream=True)))
    await asyncio.sleep(0.05)
    streams = []
    for index in range(count):
        connection = await Connection.open(target.address)
        connection.send(request_bytes(COMPLETIONS, answer_body(PROMPTS[index % len(PROMPTS)], LONG, stream=True)))
        streams.append(connection)

    async def one_left() -> bool:
        found = await figures(target.address)
        return found["num_requests_running"] + found["num_requests_waiting"] <= 1

    await asyncio.sleep(0.5)  # some run, the others wait
    for stream in streams:
        stream.cut()
    seconds = await until(one_left, 10)
    outcome = await stays
    return seconds, outcome.ending == ANSWER and outcome.text == alone


async def tokens_too_many(target: Target, at: int, prompt_tokens: int) -> float:
    """A lone stream's client leaves at its token number `at`: tokens that are computed after the one being computed
    then."""
    before = computed_tokens(await figures(target.address))
    connection = await Connection.open(target.address)
    connection.send(request_bytes(COMPLETIONS, answer_body(PROMPTS[0], LONG, stream=True, return_token_ids=True)))
    await connection.head()
    seen = 0
    async for event in connection.events():
        seen += sum(len(choice.get("token_ids") or ()) for choice in json.loads(event)["choices"])
        if seen >= at:
            break
    connection.cut()
    await until_free(target.address)
    after = computed_tokens(await figures(target.address))
    # The first token comes with the last of the prompt; while the last one seen was on its way, the next was begun.
    return after - before - (prompt_tokens + seen - 1) - 1


async def measure(target: Target, score: Score, short: bool) -> None:
    count, turns, storms, lone = (60, 6, 1, 4) if short else (1000, 100, 5, 40)
    score.note(f"{count} requests, half of them streams, 30 % cut; {storms} times RST of 64 streams at once")
    draw = random.Random(10)
    storm = Storm(target, draw)
    await storm.learn()
    files = descriptors(target.pid) if target.pid else 0
    leaks = (await figures(target.address)).get("engine_block_leaks_total", 0)

    await storm.run(count, 0.3)
    score.at_most(f"nothing held after the last of {storm.cuts} cuts", await until_free(target.address), FREE_S)
    score.zero("answers of those who stayed that changed", storm.changed(), len(storm.stayed))

    long_alone = (await ask(target.address, answer_body(PROMPTS[0], STAYS))).text
    ends = [await all_at_once(target, 64, long_alone) for _ in range(storms)]
    score.at_most("after RST of all at once, only the one that stays is left", max(one[0] for one in ends), FREE_S)
    score.zero("answers of those that changed", sum(not one[1] for one in ends), storms)

    slots = await count_slots(target)
    again = await places_used_again(target, turns, slots)
    score.note(f"{slots} places; RST to another's first token: p50 {1000 * percentile(again, 0.5):.0f} ms")
    score.at_most(f"a place is another's, p99 of {turns}", percentile(again, 0.99), FREE_S)

    await lone_streams(target, score, lone, draw)
    await nothing_left(target, score, leaks, files)


async def count_slots(target: Target) -> int:
    """How many requests run at once."""
    streams = [await Connection.open(target.address) for _ in range(64)]
    for index, stream in enumerate(streams):
        stream.send(request_bytes(COMPLETIONS, answer_body(PROMPTS[index % len(PROMPTS)], LONG, stream=True)))
    await asyncio.sleep(1.0)
    running = int((await figures(target.address))["num_requests_running"])
    for stream in streams:
        stream.cut()
    await until_free(target.address)
    return running


async def lone_streams(target: Target, score: Score, times: int, draw: random.Random) -> None:
    before = computed_tokens(await figures(target.address))
    await ask(target.address, answer_body(PROMPTS[0], 1))
    prompt_tokens = int(computed_tokens(await figures(target.address)) - before)
    late = [await tokens_too_many(target, draw.randint(1, 40), prompt_tokens) for _ in range(times)]
    score.note(f"tokens after the one being computed when a lone client left: {sorted(int(one) for one in late)}")
    score.at_most("the same, half of the times", percentile(late, 0.5), 1, "tokens")


async def nothing_left(target: Target, score: Score, leaks: float, files: int) -> None:
    score.at_most("nothing held at the end", await until_free(target.address), FREE_S)
    first = await figures(target.address)
    await asyncio.sleep(SETTLE_S)
    last = await figures(target.address)
    computed = computed_tokens(last) - computed_tokens(first)
    score.zero(f"tokens computed in {SETTLE_S:g} s with nobody there", computed)
    score.zero("times that blocks were missing", last.get("engine_block_leaks_total", 0) - leaks)
    score.zero("engine restarts", last.get("engine_restarts_total", 0))
    if target.pid:
        score.at_most("open files more than before", descriptors(target.pid) - files, 2, "")
    status, _ = await get(target.address, "/health/ready")
    score.check("/health/ready", status, 200, status == 200)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_script("disconnects", __doc__, measure, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
