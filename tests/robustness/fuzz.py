"""Bad requests to every route: each gets a short, coded refusal at once, and the server is what it was.

    python -m tests.robustness.fuzz [--short] [--url URL]

Half of the cases have wrong values in known fields or are no JSON, three tenths are good requests with bytes changed
(which may still be good), a tenth breaks HTTP itself, and a tenth is too deep, too large or holds numbers of thousands
of digits.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from tests.robustness.attack_client import (
    FLAGS,
    MIB,
    Before,
    Connection,
    Reply,
    Unanswered,
    ask,
    error_fault,
    note_first,
)
from tests.robustness.fuzz_cases import Case, Route, mutation_cases, routes_of, value_cases
from tests.robustness.fuzz_http import http_cases, size_cases
from tests.robustness.http_load import percentile
from tests.robustness.score import Score, Target, run_script

FULL, SHORT = 10_000, 400
P99_S, LONGEST_S = 0.1, 1.0
MAX_TAKEN = 8 * MIB
"""Of a body that is too large, with what lies in the kernel's buffers."""
LEAK = re.compile(
    rb"Traceback|File \\?\"|site-packages|/(?:home|usr|tmp|root|work|opt|var|proc)/|\w\.py\b|0x[0-9a-f]{6,}|object at "
    rb"|127\.0\.0\.1:\d|headrace\.[a-z]+\.|starlette|uvicorn|msgspec"
)
"""What says how the server is made: a path, an address in memory, a traceback, a module."""


@dataclass
class Findings:
    """Of all cases so far."""

    asked: int = 0
    refused: int = 0
    unanswered: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """Answers of 500 and above."""
    accepted: list[str] = field(default_factory=list)
    """Bad requests with another answer than a 4xx."""
    misshapen: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    seconds: list[tuple[float, str]] = field(default_factory=list)
    """Of refusals."""
    taken: int = 0
    """Most bytes of one request."""

    def take(self, case: Case, reply: Reply) -> None:
        shown = f"{case.what}: {reply.status} {reply.body[:200]!r}"
        self.taken = max(self.taken, reply.sent)
        if reply.status >= 500:
            self.failed.append(shown)
        elif reply.status < 400:
            if case.bad:
                self.accepted.append(shown)
            return
        elif fault := error_fault(reply):
            self.misshapen.append(f"{fault}: {shown}")
        self.refused += 1
        if not reply.sheds:
            self.seconds.append((reply.seconds, case.what))
        said = b"" if not isinstance(case.data, bytes) else case.data
        self.leaks += [f"{found!r}: {shown}" for found in LEAK.findall(reply.body) if found not in said]


def cases_of(routes: list[Route], count: int, seed: int = 0) -> Iterator[Case]:
    """`count` cases: wrong values 50 %, changed bytes 30 %, HTTP 10 %, sizes 10 %."""
    draw = random.Random(seed)
    return chain(
        value_cases(draw, routes, count // 2),
        mutation_cases(draw, routes, 3 * count // 10),
        http_cases(draw, routes, count // 10),
        size_cases(draw, routes, count // 10),
    )


def attack(target: Target, score: Score, count: int) -> Findings:
    """Sends that many cases, one after the other, and says what came of them."""
    routes = routes_of(ask(target, "GET", "/openapi.json").json())
    refused = warm_up(target, routes)
    score.zero("good requests that are refused", len(refused), len(routes))
    note_first(score, "refused", refused)
    before = Before(target)
    found = Findings()
    with Connection(target.address) as kept:
        for case in cases_of(routes, count):
            found.asked += 1
            connection = Connection(target.address) if case.fresh else kept
            try:
                found.take(case, connection.ask(case.data if isinstance(case.data, bytes) else case.data()))
            except (Unanswered, OSError, ValueError) as error:
                found.unanswered.append(f"{case.what}: {type(error).__name__} {error}")
            if case.fresh:
                connection.close()
    tell(score, found, len(routes))
    before.judge(score)
    return found


def warm_up(target: Target, routes: list[Route]) -> list[str]:
    """One good request to each route: what the first of a kind leaves behind is no leak. Returns those refused."""
    refused = []
    for route in routes:
        path = route.path.replace("{model}", _a_model(target))
        reply = ask(target, route.method, path, dict(route.good) if route.good else None)
        if reply.status != 200:
            refused.append(f"{route.method} {path}: {reply.status} {reply.body[:200]!r}")
    # The process that checks grammars starts with the first.
    ask(target, "POST", "/v1/completions", {"prompt": "Hi", "max_tokens": 1, "structured_outputs": {"regex": "a"}})
    for size in (100_000, 2_000_000):
        ask(target, "POST", "/v1/completions", {"prompt": {"a": "x" * size}})
    return refused


def _a_model(target: Target) -> str:
    return str(ask(target, "GET", "/v1/models").json()["data"][0]["id"])


def tell(score: Score, found: Findings, num_routes: int) -> None:
    """A line for each number that must be passed."""
    score.note(f"{found.asked} requests to {num_routes} routes, {found.refused} refused, the rest good as they were")
    score.zero("requests without an answer", len(found.unanswered), found.asked)
    score.zero("answers of 500 and above", len(found.failed), found.asked)
    score.zero("bad requests with another answer than 4xx", len(found.accepted), found.asked)
    score.zero("refusals that are no coded JSON of at most 4 KB", len(found.misshapen), found.refused)
    score.zero("refusals with a path, an address or a traceback", len(found.leaks), found.refused)
    seconds = [one for one, _ in found.seconds]
    score.at_most("p99 of refusals after the last byte", percentile(seconds, 0.99), P99_S)
    score.at_most("slowest refusal", max(seconds, default=0.0), LONGEST_S)
    score.at_most("most of a body that was taken", found.taken / MIB, MAX_TAKEN / MIB, "MiB")
    for name in ("unanswered", "failed", "accepted", "misshapen", "leaks"):
        note_first(score, name, getattr(found, name))
    for one_s, what in sorted(found.seconds, reverse=True)[:3]:
        if one_s > P99_S:
            score.note(f"slow: {one_s:.3f} s: {what[:200]}")


async def measure(target: Target, score: Score, short: bool) -> None:
    attack(target, score, SHORT if short else FULL)


if __name__ == "__main__":
    sys.exit(run_script("fuzz", __doc__, measure, lambda short: FLAGS))
