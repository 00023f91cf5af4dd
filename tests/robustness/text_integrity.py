"""Text that is hard to cut: characters of several tokens, emoji joined from several characters, bytes that are no
character, stop strings that lie across tokens. The text of a stream is that of the whole answer, to the last character.

    python -m tests.robustness.text_integrity [--short] [--url URL]

Answers are drawn at a high temperature from ids that spell parts of rare characters, so that most of them are odd; the
seed makes the stream and the whole answer the same. What the text must be is decoded here, from the bytes that the
server names for each token. Prompts hold letters that no allowed id spells: one of them in an answer is the prompt's.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tests.robustness.attack_client import FLAGS, Before, Connection, Unanswered, events_of, note_first, request
from tests.robustness.score import Score, Target, run_script

FULL, SHORT = 5000, 64
CLIENTS = 8
HEADERS = {"X-Request-Timeout": "120"}
MARK = "QZXJ"
"""Letters of the prompts alone."""
ODD = (
    "👩‍👩‍👧‍👦👨🏽‍🚀🏳️‍🌈❤️‍🔥🇳🇴🇺🇳",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𒀀𒁀𓂀𓆣",
    "नमस्ते क्षत्रिय ਪੰਜਾਬੀ",
    "中文字符測試漢字かなカナ한국어",
    "áéíóú ñ ß ø å ā́ z̸̙̬͠a̵͖͝l̶̨͘",
    "שָׁלוֹם العَرَبِيَّة \u200f\u200e",
    "\u2028\u2029\u0085\ufeff\ufffd\u200b",
    "🤷🏻‍♀️🧑‍🤝‍🧑🫱🏿‍🫲🏻",
)
PLAIN = "\n \t.,;:!?'\"(){}[]<>\\/&%"
STREAMS = ("/v1/completions", "/v1/completions", "/v1/completions", "/v1/chat/completions", "/generate")


@dataclass(frozen=True)
class Case:
    """One body, without `stream`; asked twice."""

    path: str
    body: Mapping[str, Any]
    oracle: bool
    """Whether each token's bytes come with the answer."""


@dataclass
class Told:
    """An answer of either kind: of each choice the text, why it ended, and its tokens' bytes where they are told."""

    texts: list[str]
    ends: list[str | None]
    tokens: list[list[bytes]]


@dataclass
class Faults:
    """Cases by what was wrong with them."""

    unlike: list[str] = field(default_factory=list)
    surrogates: list[str] = field(default_factory=list)
    passing: list[str] = field(default_factory=list)
    decoded: list[str] = field(default_factory=list)
    prompt: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    odd: int = 0
    """Answers that hold a character of several tokens, or bytes that are none."""
    stopped: int = 0
    answers: int = 0


def odd_ids(connection: Connection) -> list[list[int]]:
    """Ids that spell each of the texts, as the server has them."""
    found = []
    for text in (*ODD, PLAIN):
        body = {"prompt": text, "add_special_tokens": False}
        found.append(list(dict.fromkeys(connection.ask(request("POST", "/tokenize", body)).json()["tokens"])))
    return found


def cases(ids: Sequence[Sequence[int]], count: int, seed: int = 0) -> Iterator[Case]:
    """Prompts in text and in ids that end inside a character; any of the routes that stream."""
    draw = random.Random(seed)
    *scripts, plain = ids
    for _ in range(count):
        path = draw.choice(STREAMS)
        some = draw.sample(scripts, draw.randint(1, 4))
        allowed = sorted({one for script in some for one in script} | set(draw.sample(list(plain), 4)))
        common: dict[str, Any] = {"max_tokens": draw.randint(4, 24), "temperature": 2.0, "seed": draw.getrandbits(40)}
        common |= {"allowed_token_ids": allowed, "ignore_eos": True}
        text = f"{MARK} {draw.choice(ODD)[: draw.randint(1, 12)]}{draw.choice(('', MARK, ' ', '👩‍'))}"
        if path == "/generate":
            parameters = {"max_new_tokens": draw.randint(4, 16), "temperature": 2.0, "seed": draw.getrandbits(40)}
            yield Case(path, {"inputs": text, "parameters": {**parameters, "details": True}}, oracle=False)
        elif path == "/v1/chat/completions":
            chat = {"messages": [{"role": "user", "content": text}], "logprobs": True, "n": draw.choice((1, 1, 2))}
            yield Case(path, {**common, **chat}, oracle=True)
        else:
            cut = draw.choice(scripts)
            prompt = draw.choice((text, [*draw.choice(scripts)[:5], *cut[: draw.randint(1, len(cut))]]))
            yield Case(path, {**common, "prompt": prompt, "n": draw.choice((1, 1, 3))}, oracle=False)


# ---------------------------------------------------------------- reading answers


def ask_whole(connection: Connection, case: Case) -> Told:
    """The answer in one piece. Raises Unanswered."""
    reply = connection.ask(request("POST", case.path, dict(case.body), HEADERS))
    if reply.status != 200:
        raise Unanswered(f"{reply.status} {reply.body[:200]!r}")
    body = reply.json()
    if case.path == "/generate":
        return Told([body["generated_text"]], [body["details"]["finish_reason"]], [[]])
    choices = sorted(body["choices"], key=lambda one: one["index"])
    if case.path == "/v1/completions":
        return Told([one["text"] for one in choices], [one["finish_reason"] for one in choices], [[] for _ in choices])
    told = Told([], [], [])
    for one in choices:
        told.texts.append(one["message"]["content"] or "")
        told.ends.append(one["finish_reason"])
        told.tokens.append([bytes(token["bytes"]) for token in one["logprobs"]["content"]])
    return told


def ask_stream(connection: Connection, case: Case) -> tuple[Told, list[list[str]]]:
    """The same answer piece by piece, and the pieces of text of each choice. Raises Unanswered."""
    path = "/generate_stream" if case.path == "/generate" else case.path
    body = dict(case.body) if case.path == "/generate" else {**case.body, "stream": True}
    reply = connection.ask(request("POST", path, body, HEADERS))
    if reply.status != 200:
        raise Unanswered(f"{reply.status} {reply.body[:200]!r}")
    events = events_of(reply.body)
    if any("error" in event for event in events):
        raise Unanswered(f"an error event: {reply.body[-300:]!r}")
    if case.path == "/generate":
        # Each event has its own token's text; the whole comes with the last.
        last, parts = events[-1], [one["token"]["text"] for one in events if not one["token"]["special"]]
        return Told([last["generated_text"]], [last["details"]["finish_reason"]], [[]]), [parts]
    count = int(case.body.get("n", 1))
    told = Told([""] * count, [None] * count, [[] for _ in range(count)])
    pieces: list[list[str]] = [[] for _ in range(count)]
    for event in events:
        for one in event["choices"]:
            index = one["index"]
            piece = one["text"] if "text" in one else one["delta"].get("content") or ""
            pieces[index].append(piece)
            told.texts[index] += piece
            told.ends[index] = one["finish_reason"] or told.ends[index]
            if case.oracle and one.get("logprobs"):
                told.tokens[index] += [bytes(token["bytes"]) for token in one["logprobs"]["content"]]
    return told, pieces


def stop_of(draw: random.Random, told: Told) -> str | None:
    """Some characters of the middle of an answer, across tokens where these are known."""
    text = told.texts[0]
    if told.tokens[0]:
        at = draw.randrange(len(told.tokens[0]))
        start = len(b"".join(told.tokens[0][:at]).decode(errors="ignore"))
        found = text[max(0, start - draw.randint(1, 2)) : start + draw.randint(1, 2)]
    else:
        start = draw.randrange(max(1, len(text)))
        found = text[start : start + draw.randint(1, 4)]
    return found if found and "\ufffd" not in found else None


# ---------------------------------------------------------------- judging


def judge_case(connection: Connection, case: Case, draw: random.Random, faults: Faults) -> None:
    """Both answers to one body; then both again with a stop string out of the answer."""
    whole = judge_pair(connection, case, faults)
    if case.path == "/generate":
        return
    stop = stop_of(draw, whole)
    if stop is None or len(whole.texts) > 1:
        return
    stopped = judge_pair(connection, Case(case.path, {**case.body, "stop": [stop]}, case.oracle), faults, is_cut=True)
    faults.stopped += 1
    expected = whole.texts[0].partition(stop)[0]
    if stopped.texts[0] != expected or stopped.ends[0] != "stop":
        faults.decoded.append(f"stop {stop!r} of {whole.texts[0]!r}: {stopped.texts[0]!r} ({stopped.ends[0]})")


def judge_pair(connection: Connection, case: Case, faults: Faults, is_cut: bool = False) -> Told:
    whole = ask_whole(connection, case)
    streamed, pieces = ask_stream(connection, case)
    shown = f"{case.path} {json.dumps(dict(case.body))[:300]}"
    faults.answers += len(whole.texts)
    if (whole.texts, whole.ends) != (streamed.texts, streamed.ends):
        faults.unlike.append(f"{whole.texts!r} {whole.ends} ≠ {streamed.texts!r} {streamed.ends}: {shown}")
    for index, text in enumerate(whole.texts):
        faults.odd += any(ord(char) > 0x7FF or char == "\ufffd" for char in text)
        if any("\ud800" <= char <= "\udfff" for char in text + streamed.texts[index]):
            faults.surrogates.append(f"{text!r}: {shown}")
        so_far = ""
        for piece in pieces[index] if index < len(pieces) else ():
            so_far += piece
            if not text.startswith(so_far):
                faults.passing.append(f"{so_far!r} is no beginning of {text!r}: {shown}")
                break
        if case.path != "/generate" and any(char in text for char in MARK):
            faults.prompt.append(f"{text!r}: {shown}")
        if case.path == "/generate" and so_far != text:
            faults.unlike.append(f"{text!r} of tokens {pieces[index]}: {shown}")
        if case.oracle:
            told = b"".join(whole.tokens[index])
            if whole.tokens[index] != streamed.tokens[index]:
                faults.unlike.append(f"tokens {whole.tokens[index]} ≠ {streamed.tokens[index]}: {shown}")
            if not is_cut and told.decode(errors="replace") != text:
                faults.decoded.append(f"{text!r}, bytes {told!r}: {shown}")
    return whole


def attack(target: Target, score: Score, count: int, clients: int = CLIENTS) -> None:
    """All cases, from several clients at a time."""
    before = Before(target)
    with Connection(target.address) as connection:
        made = list(cases(odd_ids(connection), count))

    def work(which: int) -> Faults:
        found, draw = Faults(), random.Random(which)
        with Connection(target.address, 120) as connection:
            for case in made[which::clients]:
                try:
                    judge_case(connection, case, draw, found)
                except (Unanswered, OSError, ValueError, KeyError, IndexError, TypeError) as error:
                    found.broken.append(f"{type(error).__name__} {error}: {case.path} {str(dict(case.body))[:300]}")
        return found

    with ThreadPoolExecutor(clients) as pool:
        parts = list(pool.map(work, range(clients)))

    def total(name: str) -> list[str]:
        return [one for part in parts for one in getattr(part, name)]

    answers, odd = sum(part.answers for part in parts), sum(part.odd for part in parts)
    stopped = sum(part.stopped for part in parts)
    score.note(
        f"{count} prompts, {answers} answers in two forms, {odd} with rare characters or cut ones, {stopped} stopped"
    )
    for name, what in (
        ("broken", "prompts without a proper answer"),
        ("unlike", "streams unlike the whole answer"),
        ("surrogates", "texts with a surrogate"),
        ("passing", "streams that showed what the whole answer lacks"),
        ("decoded", "texts unlike their tokens' bytes, or not cut at the stop string"),
        ("prompt", "answers with letters of the prompt"),
    ):
        score.zero(what, len(total(name)), answers)
        note_first(score, name, total(name))
    score.check("answers that could have gone wrong", odd, "half of them", odd >= answers // 2)
    before.judge(score)


async def measure(target: Target, score: Score, short: bool) -> None:
    attack(target, score, SHORT if short else FULL)


if __name__ == "__main__":
    sys.exit(run_script("text integrity", __doc__, measure, lambda short: FLAGS))
