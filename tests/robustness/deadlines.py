"""Requests with a deadline of their own: each is answered by then, or told that it is not, and costs nothing after.

    python -m tests.robustness.deadlines [--short] [--url URL] [--json FILE]

Deadlines stand in the body (`timeout`) or in the header X-Request-Timeout; requests are streams or not, short or long,
run or still wait for their place when their time has come.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from collections.abc import Sequence

from tests.robustness.http_load import (
    ANSWER,
    ERROR,
    SILENT,
    Outcome,
    answer_body,
    ask,
    computed_tokens,
    figures,
    percentile,
    until_free,
)
from tests.robustness.score import Score, Target, run_script

FIRST_S, LAST_S = 0.1, 2.0
GRACE_S = 0.25
CONCURRENT = 100
"""More than run at once: some wait for their place until their time is over."""
LENGTHS = (1, 8, 64, 512)
CODE = "deadline_exceeded"
SETTLE_S = 1.0


async def one(target: Target, draw: random.Random, index: int) -> tuple[float, Outcome]:
    deadline_s = draw.uniform(FIRST_S, LAST_S)
    body = answer_body(f"Lock {index} of", draw.choice(LENGTHS), stream=draw.random() < 0.5)
    if draw.random() < 0.5:
        return deadline_s, await ask(target.address, body | {"timeout": deadline_s})
    return deadline_s, await ask(target.address, body, headers=(f"x-request-timeout: {deadline_s}",))


def is_right(outcome: Outcome) -> bool:
    """Complete, or the error: with its own status if nothing was sent before."""
    if outcome.ending == ANSWER:
        return True
    return outcome.ending == ERROR and outcome.code == CODE and outcome.status in (200, 408)


async def alone(target: Target, seconds: float) -> float:
    """One long request that runs into its deadline: tokens computed in the second after it was told so."""
    await ask(target.address, answer_body("The longest canal", 4000, stream=True, timeout=seconds))
    first = computed_tokens(await figures(target.address))
    await asyncio.sleep(SETTLE_S)
    return computed_tokens(await figures(target.address)) - first


async def measure(target: Target, score: Score, short: bool) -> None:
    count = 80 if short else 500
    score.note(f"{count} requests with {FIRST_S}–{LAST_S} s, {CONCURRENT} at once, {LENGTHS} tokens")
    draw = random.Random(13)
    places = asyncio.Semaphore(CONCURRENT)

    async def placed(index: int) -> tuple[float, Outcome]:
        async with places:
            return await one(target, draw, index)

    found = await asyncio.gather(*(placed(index) for index in range(count)))
    free_s = await until_free(target.address)
    endings = Counter(outcome.code or outcome.ending for _, outcome in found)
    over_s = [outcome.seconds - deadline_s for deadline_s, outcome in found]
    score.note(
        f"{dict(endings)}; after the deadline: p50 of those too late "
        f"{percentile([s for s in over_s if s > 0], 0.5):.3f} s"
    )
    score.at_most("latest end after the deadline", max(over_s), GRACE_S)
    score.zero("neither complete nor deadline_exceeded", sum(not is_right(outcome) for _, outcome in found), count)
    score.zero("without an answer", sum(outcome.ending == SILENT for _, outcome in found), count)
    both = min(endings[ANSWER], endings[CODE])
    score.check("some were complete, some were not", both, "> 0", both > 0)
    score.at_most("nothing held after the last answer", free_s, GRACE_S)
    score.zero(f"tokens computed in {SETTLE_S:g} s after a lone request's deadline", await alone(target, 0.5))


def main(arguments: Sequence[str] | None = None) -> int:
    return run_script("deadlines", __doc__, measure, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
