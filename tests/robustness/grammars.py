"""Grammars that are meant to cost: regular expressions, schemas and grammars that explode, beside streams that must not
notice; then thousands of harmless ones, each another, that must leave nothing behind.

    python -m tests.robustness.grammars [--short] [--url URL]

Every request is answered within two seconds, whatever the answer is; the gaps between the tokens of eight streams stay
within twice what they are with nothing else going on; memory and disks are as before.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.robustness.attack_client import (
    FLAGS,
    Before,
    Connection,
    Unanswered,
    Watch,
    bytes_written,
    note_first,
    request,
)
from tests.robustness.http_load import percentile
from tests.robustness.score import Score, Target, run_script

ADVERSARIAL, BENIGN = 1000, 10_000
SHORT_ADVERSARIAL, SHORT_BENIGN = 40, 40
MOST_S = 2.0
MOST_RATIO = 2.0
IDLE_S, SHORT_IDLE_S = 20.0, 3.0
WITNESS_TOKENS = 64
TIMEOUT = {"X-Request-Timeout": "10"}

Schema = dict[str, Any]


@dataclass(frozen=True)
class Hostile:
    """One grammar: the field of the body that holds it, or a body of another route."""

    family: str
    path: str
    body: Mapping[str, Any]


def _regexes(draw: random.Random) -> str:
    """Nested and counted repetition, ambiguity, huge classes, what Rust's syntax lacks, what is no expression."""
    m, n = draw.randint(2, 60), round(10 ** draw.uniform(1, 6))
    ways: Sequence[Callable[[], str]] = (
        lambda: "(" * (m % 9 + 1) + "a" + "+)" * (m % 9 + 1) + "b",
        lambda: f"(a|a|aa|a?){{{n}}}b",
        lambda: f"(a?){{{n}}}a{{{n}}}",
        lambda: f"((a{{0,{m}}}){{0,{m}}}){{0,{m}}}",
        lambda: f"(.*a){{{m}}}.{{{n}}}",
        lambda: f".*a.{{{m}}}",
        lambda: f"(.*x.*y.*z){{{m}}}",
        lambda: "(" * n + "a" + ")" * n,
        lambda: "|".join(f"{draw.randrange(n)}x{i}" for i in range(min(n, 20_000))),
        lambda: f"[\\p{{L}}\\p{{N}}]{{{n}}}",
        lambda: f"\\w{{{n},{2 * n}}}",
        lambda: "".join(f"(a{i}?|b{i}*)" for i in range(min(n, 5000))),
        lambda: "(x+x+)+y" * m,
        lambda: f"(?i)({'aé' * m})*\\p{{Greek}}{{{n}}}",
        lambda: "(?=a)(?!b)\\1" * m,
        lambda: draw.choice(("(", "[", "*", "a{2,1}", "a{99999999999}", "\\", "[z-a]", "(?P<", "\\p{X}", "(?<a>")) * m,
        lambda: f"^({'(a|b)*' * m})$",
        lambda: f"([a-z]{{1,{m}}}-?){{{n}}}",
        lambda: "".join(draw.choice("ab()[]{}*+?|.\\^$,0123456789é\n") for _ in range(min(n, 3000))),
    )
    return draw.choice(ways)()


def _nested(depth: int, wrap: Callable[[Schema], Schema], core: Schema) -> Schema:
    for _ in range(depth):
        core = wrap(core)
    return core


def _schemas(draw: random.Random) -> Schema:
    """Deep, wide, recursive, contradictory, and with bounds that no answer could reach."""
    n, depth = round(10 ** draw.uniform(1, 4)), draw.randint(2, 30)
    many = round(10 ** draw.uniform(1, 9))
    text: Schema = {"type": "string"}
    ways: Sequence[Callable[[], Schema]] = (
        lambda: _nested(depth, lambda one: {"type": "object", "properties": {"a": one}, "required": ["a"]}, text),
        lambda: _nested(depth, lambda one: {"type": "array", "items": one}, text),
        lambda: _nested(depth // 3, lambda one: {"anyOf": [one, {"type": "array", "items": one}]}, text),
        lambda: _nested(depth // 3, lambda one: {"allOf": [one, {"oneOf": [one, text]}]}, text),
        lambda: {"type": "object", "properties": {f"p{i}": text for i in range(n)}},
        lambda: {"type": "object", "properties": {f"p{i}": {"enum": list(range(i % 50 + 1))} for i in range(n // 4)}},
        lambda: {"enum": [f"{draw.random()}" for _ in range(n)]},
        lambda: {"type": "array", "items": text, "minItems": many, "maxItems": 2 * many},
        lambda: {"type": "string", "minLength": many, "maxLength": 2 * many},
        lambda: {"type": "string", "pattern": _regexes(draw)},
        lambda: {"type": "object", "patternProperties": {_regexes(draw): text}, "additionalProperties": False},
        lambda: {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, text]}}, "$ref": "#/$defs/a"},
        lambda: {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        lambda: {"$ref": draw.choice(("file:///etc/passwd", "http://127.0.0.1:1/x", "#/a/b", "#", "", "x" * n))},
        lambda: {"type": "integer", "minimum": -many, "maximum": many, "multipleOf": draw.choice((7, 1e-9, 0, -1))},
        lambda: {"type": "number", "exclusiveMinimum": 1e308, "maximum": -1e308},
        lambda: {"type": "object", "minProperties": many, "additionalProperties": text},
        lambda: {"type": "array", "prefixItems": [text] * n, "items": False},
        lambda: {"type": "array", "uniqueItems": True, "items": {"enum": list(range(n))}},
        lambda: {"const": _nested(depth, lambda one: {"a": one, "b": [one]} if depth < 12 else {"a": one}, text)},
        lambda: {"type": draw.choice(("x", 5, [], None)), "properties": draw.choice((5, [], {"a": 5}))},
        lambda: {"not": {"type": "string"}, "if": text, "then": text, "else": {"type": "integer"}},
        lambda: {"type": "string", "format": draw.choice(("date-time", "email", "ipv6", "regex", "zz"))},
    )
    return draw.choice(ways)()


def _texts(draw: random.Random) -> str:
    """Lark and GBNF: ambiguous, left-recursive, empty, endless, undefined, and no grammar at all."""
    m, n = draw.randint(2, 40), round(10 ** draw.uniform(1, 4))
    ways: Sequence[Callable[[], str]] = (
        lambda: 'start: start start | "a" | ' + " ".join(["start"] * m),
        lambda: 'start: a\na: b |\nb: a a | "x"',
        lambda: "start: " + " ".join(f"r{i}" for i in range(n)) + "\n" + "\n".join(f'r{i}: "a"?' for i in range(n)),
        lambda: "\n".join([*(f"r{i}: r{i + 1} r{i + 1}" for i in range(m)), f'r{m}: "a"', "start: r0"]),
        lambda: f'start: ("a" | "aa" | "aaa"){{{n}}}',
        lambda: f"start: /{_regexes(draw).replace('/', 'x')}/",
        lambda: "start: undefined_rule",
        lambda: "start: start",
        lambda: 'root ::= root root | "a" | ' + " ".join(["root"] * m),
        lambda: "root ::= " + "(" * n + '"a"' + ")*" * n,
        lambda: "\n".join(["root ::= r0", *(f"r{i} ::= r{i + 1} r{i + 1}?" for i in range(m)), f'r{m} ::= "a"']),
        lambda: "root ::= [" + "".join(f"\\u{code:04x}" for code in range(0x100, 0x100 + n)) + "]{1,9999}",
        lambda: 'root ::= "' + "a" * n * 10 + '"',
        lambda: f'root ::= ("a" | "b"){{{n},{n * 10}}}',
        lambda: "".join(draw.choice('start:|"/\n ab()*+?[]{}::=%') for _ in range(n)),
        lambda: f'%llguidance {{"no_forcing": false}}\nstart: "a"{{{n}}}',
        lambda: "%import common.WORD\nstart: WORD+",
        lambda: "start: @sub\n" + "x: /a/\n" * m,
    )
    return draw.choice(ways)()


def adversarial(count: int, seed: int = 0) -> Iterator[Hostile]:
    """So many, on every field and route that takes a grammar."""
    draw = random.Random(seed)
    for index in range(count):
        # Few with tools: those stand in the prompt, and reading a long prompt is another cost than the grammar's.
        kinds = ("regex", "schema", "grammar", "chat schema", "TGI regex", "TGI schema", "choice")
        kind = "tool" if index % 40 == 5 else kinds[index % len(kinds)]
        yield _hostile(draw, kind)


def _hostile(draw: random.Random, kind: str) -> Hostile:
    if kind.startswith("TGI"):
        grammar: Schema = {"type": "regex", "value": _regexes(draw)}
        if kind == "TGI schema":
            grammar = {"type": "json", "value": _schemas(draw)}
        return Hostile(
            kind, "/generate", {"inputs": "Answer:", "parameters": {"max_new_tokens": 2, "grammar": grammar}}
        )
    if kind in ("chat schema", "tool"):
        chat: Schema = {"messages": [{"role": "user", "content": "Answer."}], "max_tokens": 2}
        if kind == "tool":
            tool = {"type": "function", "function": {"name": "f", "parameters": _schemas(draw)}}
            chat |= {"tools": [tool], "tool_choice": "required"}
        else:
            named = {"name": "a", "schema": _schemas(draw)}
            chat |= {"response_format": {"type": "json_schema", "json_schema": named}}
        return Hostile(kind, "/v1/chat/completions", chat)
    makers: Mapping[str, Callable[[], Schema]] = {
        "regex": lambda: {"regex": _regexes(draw)},
        "schema": lambda: {"json": _schemas(draw)},
        "grammar": lambda: {"grammar": _texts(draw)},
        "choice": lambda: {"choice": [_odd_text(draw) for _ in range(draw.randint(1, 3000))]},
    }
    return Hostile(
        kind, "/v1/completions", {"prompt": "Answer:", "max_tokens": 2, "structured_outputs": makers[kind]()}
    )


def _odd_text(draw: random.Random) -> str:
    return "".join(draw.choice('abé\x00\n"\\') for _ in range(9))


def benign(count: int, seed: int = 0) -> Iterator[Hostile]:
    """Small schemas, no two alike."""
    draw = random.Random(seed)
    for index in range(count):
        fields: Schema = {f"field_{index}": {"type": draw.choice(("string", "integer", "boolean", "number"))}}
        fields |= {f"f{one}": {"type": "string", "maxLength": draw.randint(1, 20)} for one in range(draw.randint(0, 3))}
        schema = {"type": "object", "properties": fields, "required": sorted(fields)}
        body = {"prompt": "Answer:", "max_tokens": 1, "temperature": 0, "structured_outputs": {"json": schema}}
        yield Hostile("benign", "/v1/completions", body)


@dataclass
class Answers:
    """What came of some requests."""

    seconds: list[tuple[float, float, str]]
    """(how long, from when on, which)."""
    statuses: dict[int, int]
    broken: list[str]
    refused: list[str]


def send(connection: Connection, cases: Iterator[Hostile]) -> Answers:
    """One after the other."""
    found = Answers([], {}, [], [])
    for case in cases:
        shown = f"{case.family}: {str(dict(case.body))[:400]}"
        began_s = time.perf_counter()
        try:
            reply = connection.ask(request("POST", case.path, dict(case.body), TIMEOUT))
        except (Unanswered, OSError) as error:
            found.broken.append(f"{error}: {shown}")
            continue
        found.seconds.append((reply.seconds, began_s, shown))
        found.statuses[reply.status] = found.statuses.get(reply.status, 0) + 1
        if reply.status >= 500:
            found.broken.append(f"{reply.status} {reply.body[:200]!r}: {shown}")
        elif reply.status >= 400:
            found.refused.append(f"{reply.status} {reply.body[:200]!r}: {shown}")
    return found


def tell(score: Score, what: str, found: Answers, count: int) -> None:
    by_status = ", ".join(f"{number} × {status}" for status, number in sorted(found.statuses.items()))
    score.note(f"{what}: {count} requests: {by_status}")
    score.zero(f"{what}: unanswered, or answered with 500 and above", len(found.broken), count)
    slowest = max(found.seconds, default=(0.0, 0.0, ""))
    score.at_most(f"{what}: slowest answer", slowest[0], MOST_S)
    if slowest[0] > MOST_S:
        note_first(
            score, "slowest", [f"{one_s:.2f} s {shown}" for one_s, _, shown in sorted(found.seconds, reverse=True)]
        )
    note_first(score, "broken", found.broken)


def long_gaps(watch: Watch, found: Answers, most_s: float, since_s: float) -> list[str]:
    """Which requests were under way during gaps of more than that, the longest gap first."""
    worst: dict[str, float] = {}
    for one in watch.witnesses:
        for ended_s, gap_s in one.gaps:
            if gap_s > most_s and ended_s - gap_s > since_s:
                for seconds, began_s, shown in found.seconds:
                    if began_s < ended_s and began_s + seconds > ended_s - gap_s:
                        worst[shown] = max(gap_s, worst.get(shown, 0.0))
    ordered = sorted(worst.items(), key=lambda pair: -pair[1])
    return [f"{len(ordered)} requests in all", *(f"{1000 * gap_s:.0f} ms: {shown}" for shown, gap_s in ordered)]


def judge_gaps(score: Score, watch: Watch, hostile: Answers, times_s: tuple[float, float, float]) -> None:
    """The time between tokens while the witnesses were alone, and then beside the attack."""
    began_s, attacked_s, ended_s = times_s
    alone, beside = watch.gaps(began_s, attacked_s), watch.gaps(attacked_s, ended_s)
    alone_s, beside_s = percentile(alone, 0.99), percentile(beside, 0.99)
    shown = (
        f"{1000 * alone_s:.1f} ms of {len(alone)} alone, {1000 * beside_s:.1f} ms of {len(beside)} beside the attack"
    )
    score.note(f"gaps between tokens, p99: {shown}")
    score.at_most("gaps between tokens, p99 beside the attack ÷ alone", beside_s / max(alone_s, 1e-9), MOST_RATIO, "×")
    if beside_s > MOST_RATIO * alone_s:
        note_first(score, "beside a long gap", long_gaps(watch, hostile, MOST_RATIO * alone_s, attacked_s), 10)


def attack(target: Target, score: Score, num_adversarial: int, num_benign: int, idle_s: float) -> None:
    """First the witnesses by themselves (`idle_s`; 0: their gaps are not judged), then beside the adversarial grammars;
    then the harmless ones."""
    with Connection(target.address) as connection:
        warm = [*adversarial(8, seed=1), *benign(40, seed=1)]
        send(connection, iter(warm))  # the process that checks grammars has started, and the engine's caches are full
        before = Before(target)
        written = None if target.pid is None else bytes_written(target.pid)
        watch = Watch(target, WITNESS_TOKENS)
        with watch:
            time.sleep(idle_s / 3)  # until all have begun
            began_s = time.perf_counter()
            time.sleep(idle_s)
            attacked_s = time.perf_counter()
            hostile = send(connection, adversarial(num_adversarial))
            ended_s = time.perf_counter()
        tell(score, "adversarial", hostile, num_adversarial)
        if idle_s:
            judge_gaps(score, watch, hostile, (began_s, attacked_s, ended_s))
        watch.judge(score)
        harmless = send(connection, benign(num_benign))
        tell(score, "harmless", harmless, num_benign)
        score.zero("harmless schemas refused", len(harmless.refused), num_benign)
        note_first(score, "refused", harmless.refused)
    before.judge(score)
    if target.pid is not None and written is not None:
        score.zero("bytes written to disks", bytes_written(target.pid) - written)


async def measure(target: Target, score: Score, short: bool) -> None:
    if short:
        attack(target, score, SHORT_ADVERSARIAL, SHORT_BENIGN, SHORT_IDLE_S)
    else:
        attack(target, score, ADVERSARIAL, BENIGN, IDLE_S)


if __name__ == "__main__":
    sys.exit(run_script("grammars", __doc__, measure, lambda short: FLAGS))
