"""Hostile requests that are well formed, beside streams that must not notice: ids out of range, numbers at the ends of
machine integers, parameters that meet each other badly.

    python -m tests.robustness.poison [--short] [--url URL]

Wrong values are refused with a 4xx. Values that are extreme and allowed may be carried out or refused, without an
error of the server. Eight greedy streams run all the while and give the bytes, log-probabilities included, that they
give alone.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.robustness.attack_client import (
    FLAGS,
    Before,
    Connection,
    Unanswered,
    Watch,
    ask,
    error_fault,
    note_first,
    request,
)
from tests.robustness.score import Score, Target, run_script

WRONG, SHORT_WRONG = 300, 60
EXTREME, SHORT_EXTREME = 120, 30
WITNESS_TOKENS = 48
UNKNOWN_WIDTH = 2**22
TIMEOUT = {"X-Request-Timeout": "5"}
CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
STARTS: Mapping[str, Mapping[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    COMPLETIONS: {"prompt": "Hi", "max_tokens": 2},
}


@dataclass(frozen=True)
class Poison:
    path: str
    body: Mapping[str, Any]
    wrong: bool

    def __str__(self) -> str:
        return f"{self.path} {str(dict(self.body))[:300]}"


def width(target: Target) -> int:
    """How many token ids there are: the first id that /detokenize refuses. Without that route, more than any has."""
    low, high = 0, UNKNOWN_WIDTH
    with Connection(target.address) as connection:
        while low < high:
            middle = (low + high) // 2
            taken = connection.ask(request("POST", "/detokenize", {"tokens": [middle]})).status == 200
            low, high = (middle + 1, high) if taken else (low, middle)
    return low or UNKNOWN_WIDTH


def _both(fields: Mapping[str, Any], wrong: bool) -> Iterator[Poison]:
    for path, start in STARTS.items():
        yield Poison(path, {**start, **fields}, wrong)


def _outside(vocabulary: int) -> list[int]:
    ends = [sign * 2**power + more for power in (31, 32, 63, 64) for sign in (1, -1) for more in (-1, 0)]
    return [vocabulary, vocabulary + 1, -1, 10**30, -(10**30), *ends]


def _ids(vocabulary: int) -> Iterator[Poison]:
    """Ids that the model does not have, wherever ids are taken."""
    for token_id in _outside(vocabulary):
        yield from _both({"stop_token_ids": [token_id]}, True)
        yield from _both({"allowed_token_ids": [5, token_id]}, True)
        yield from _both({"logit_bias": {str(token_id): 1}}, True)
        yield Poison(COMPLETIONS, {"prompt": [5, token_id], "max_tokens": 2}, True)
        yield Poison(COMPLETIONS, {"prompt": [[5], [token_id, 5]], "max_tokens": 2}, True)
        yield Poison("/detokenize", {"tokens": [5, token_id]}, True)
    for wrong in ([], [None], [True], [5.5], ["5"], [[5]], {"5": 1}, "5", 5):
        yield from _both({"allowed_token_ids": wrong}, True)
        if wrong != []:
            yield from _both({"stop_token_ids": wrong}, True)
    for bias in ({"5": 101}, {"5": -100.1}, {"5": 1e308}, {"5": None}, {"5": "1"}, {"5": True}, {"a": 1}, {" 5": 1}):
        yield from _both({"logit_bias": bias}, True)
    yield from _both({"logit_bias": {"٥": 1}}, True)
    yield from _both({"logit_bias": [[5, 1]]}, True)


def _numbers() -> Iterator[Poison]:
    """Outside their bounds, and where machine integers end."""
    bounds: Mapping[str, tuple[float, ...]] = {
        "temperature": (-1e-9, 2.0000001, 1e308),
        "top_p": (0, -1e-9, 1.0000001),
        "min_p": (-1e-9, 1.0000001),
        "typical_p": (0, 1.1),
        "top_k": (-2, -(2**31), -(2**63), -(2**64), 1.5),
        "repetition_penalty": (0, -1, -1e-300),
        "presence_penalty": (-2.1, 2.1, 1e308),
        "frequency_penalty": (-2.1, 2.1, -1e308),
        "n": (0, -1, 129, 2**31, 2**63, 2**64, 1e3),
        "best_of": (0, 2, 2**63),
        "max_tokens": (0, -1, -(2**63), -(2**64), 1.5),
        "min_tokens": (-1, 3, 2**31, 2**63, 2**64),
        "seed": (2**63, -(2**63) - 1, 2**64, 10**30, 1.5),
        "prompt_logprobs": (-1, 21, 2**63),
        "truncate_prompt_tokens": (0, -2, 2**31, 2**64),
        "priority": (2**31, -(2**31) - 1, 2**63, 2**64, 0.5),
        "timeout": (0, -1, 86_401, 1e308, 2**64),
    }
    for name, values in bounds.items():
        for value in values:
            yield from _both({name: value}, True)
        yield from _both({name: True}, True)
    for value in (-1, 21, 2**63, True, 1.5):
        yield Poison(COMPLETIONS, {**STARTS[COMPLETIONS], "logprobs": value}, True)
        yield Poison(CHAT, {**STARTS[CHAT], "logprobs": True, "top_logprobs": value}, True)


def _meetings() -> Iterator[Poison]:
    """Fields that are at odds, or too many together."""
    found: tuple[Mapping[str, Any], ...] = (
        {"min_tokens": 10**9, "max_tokens": None},
        {"min_tokens": 10**6},
        {"min_tokens": 2, "max_tokens": 1},
        {"stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"include_usage": 1}},
        {"stop": [""]},
        {"stop": ["a", 5]},
        {"bad_words": [""]},
        {"bad_words": [[5]]},
        {"cache_salt": ""},
        {"cache_salt": 5},
        {"cache_salt": "x" * 100_000},
        {"cache_salt": ["a"]},
        {"model": "../../x"},
        {"model": "demo\x00"},
        {"model": 5},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "x"}},
        {"structured_outputs": {"regex": "a", "json": {}}},
        {"structured_outputs": {"choice": []}},
        {"logits_processors": ["x"]},
        {"prompt_embeds": "AAAA"},
        {"use_beam_search": True},
        {"guided_regex": "(a+)+b"},
        {"chat_template": "{{ 1 }}"} | {"suffix": "x"},
        {"documents": 5} | {"suffix": "x"},
    )
    for fields in found:
        yield from _both(fields, True)
    many = {"max_tokens": 2, "n": 128}
    yield Poison(COMPLETIONS, {"prompt": ["a"] * 100, **many}, True)
    yield Poison(COMPLETIONS, {"prompt": ["a"] * 5000, "max_tokens": 2}, True)
    yield Poison(COMPLETIONS, {"prompt": [[5]] * 40_000, "max_tokens": 2}, True)
    yield Poison(COMPLETIONS, {"prompt": [5] * 200_000, "max_tokens": 2}, True)
    yield Poison(COMPLETIONS, {"prompt": [[]], "max_tokens": 2}, True)
    parameters: tuple[tuple[str, Any], ...] = (
        *(("adapter_id", "x"), ("adapter_id", 5), ("best_of", 3), ("top_n_tokens", 6), ("seed", 2**64)),
        *(("truncate", 0), ("truncate", 2**63), ("max_new_tokens", 2**32), ("stop", ["a"] * 5)),
    )
    for name, value in parameters:
        yield Poison(GENERATE, {"inputs": "Hi", "parameters": {"max_new_tokens": 2, name: value}}, True)


def _extremes(vocabulary: int) -> Iterator[Poison]:
    """Allowed, or a matter of taste: never a reason to fail."""
    every = list(range(0, vocabulary, max(1, vocabulary // 2000)))[:2000]
    found: tuple[Mapping[str, Any], ...] = (
        {"allowed_token_ids": every},
        {"allowed_token_ids": every, "temperature": 0},
        {"allowed_token_ids": list(range(vocabulary))},
        {"allowed_token_ids": [vocabulary - 1], "min_tokens": 2},
        {"stop_token_ids": every},
        {"stop_token_ids": list(range(vocabulary)), "min_tokens": 1},
        {"logit_bias": {str(one): -100 for one in every}},
        {"logit_bias": {str(one): 100 for one in range(min(vocabulary, 60_000))}},
        {"min_tokens": 1, "max_tokens": None, "stop": ["e"]},
        {"min_tokens": 500, "max_tokens": None},
        {"max_tokens": 2**31},
        {"max_tokens": 2**63},
        {"max_tokens": 2**64},
        {"max_tokens": 10**30},
        {"top_k": 2**31},
        {"top_k": 2**63},
        {"top_k": 2**64},
        {"top_k": 10**30},
        {"bad_words": ["a"] * 3000},
        {"bad_words": [chr(0x4E00 + one) * 20 for one in range(500)]},
        {"bad_words": ["\x00", "\ufffd", "👩‍👩‍👧‍👦", " ", "\n"]},
        {"stop": [chr(0x61 + one % 26) * (1 + one) for one in range(300)]},
        {"stop": ["\x00", "\ufffd", "\u200d"]},
        {"repetition_penalty": 1e-320, "temperature": 2},
        {"repetition_penalty": 1.7e308, "temperature": 2},
        {"repetition_penalty": 5e-324, "presence_penalty": -2, "frequency_penalty": 2},
        {"presence_penalty": 2, "frequency_penalty": -2, "repetition_penalty": 3e38},
        {"temperature": 5e-324},
        {"temperature": 2, "top_p": 5e-324},
        {"temperature": 2, "top_k": 1, "min_p": 1, "typical_p": 5e-324},
        {"seed": 2**63 - 1},
        {"seed": -(2**63)},
        {"n": 64, "max_tokens": 1},
        {"priority": 2**31 - 1},
        {"priority": -(2**31)},
        {"cache_salt": "\x00\u2028😀" * 300},
        {"cache_salt": "x" * 1024},
        {"cache_salt": ":" * 64},
        {"truncate_prompt_tokens": 2**31 - 1},
        {"timeout": 5e-324},
        {"timeout": 86_400},
        {"prompt_logprobs": 20},
        {"user": "x" * 100_000, "metadata": {"a": [1] * 1000}},
        {"request_id": "../../x\r\nX: y"},
        {"ignore_eos": True, "stop_token_ids": [0], "allowed_token_ids": [0]},
    )
    for fields in found:
        yield from _both(fields, False)
    yield Poison(COMPLETIONS, {"prompt": ["a"] * 100, "max_tokens": 1}, False)
    yield Poison(COMPLETIONS, {"prompt": [[5], [6]] * 20, "n": 2, "max_tokens": 1, "echo": True, "logprobs": 20}, False)
    yield Poison(COMPLETIONS, {"prompt": "", "max_tokens": 1}, False)
    yield Poison(COMPLETIONS, {"prompt": "\x00" * 1000, "max_tokens": 1}, False)
    yield Poison(COMPLETIONS, {"prompt": [0] * 900, "max_tokens": 1}, False)
    yield Poison(COMPLETIONS, {"prompt": [vocabulary - 1] * 3, "max_tokens": 1, "logprobs": 20, "echo": True}, False)
    for name, value in (("seed", 2**64 - 1), ("top_k", 2**31 - 1), ("max_new_tokens", 2**32 - 1), ("truncate", 1)):
        yield Poison(GENERATE, {"inputs": "Hi", "parameters": {"max_new_tokens": 2, name: value}}, False)


def poisons(vocabulary: int, wrong: int, extreme: int, seed: int = 0) -> list[Poison]:
    """So many of each, mixed."""
    draw = random.Random(seed)

    def some(found: Iterable[Poison], count: int) -> list[Poison]:
        known = list(found)
        draw.shuffle(known)
        return (known * (1 + count // len(known)))[:count] if len(known) < count else known[:count]

    mixed = some([*_ids(vocabulary), *_numbers(), *_meetings()], wrong) + some(_extremes(vocabulary), extreme)
    draw.shuffle(mixed)
    return mixed


def attack(target: Target, score: Score, wrong: int, extreme: int) -> None:
    """The hostile requests, one after the other, beside the witnesses."""
    cases = poisons(width(target), wrong, extreme)
    before = Before(target)
    watch = Watch(target, WITNESS_TOKENS)
    faults: list[str] = []
    broken: list[str] = []
    with watch, Connection(target.address) as connection:
        for case in cases:
            try:
                reply = connection.ask(request("POST", case.path, dict(case.body), TIMEOUT))
            except (Unanswered, OSError) as error:
                broken.append(f"{case}: {error}")
                continue
            shown = f"{case}: {reply.status} {reply.body[:200]!r}"
            if case.wrong and (fault := error_fault(reply)):
                faults.append(f"{fault}: {shown}")
            if reply.status >= 500:
                broken.append(shown)
    refused = wrong - len(faults)
    score.check("wrong values refused with a coded 4xx", refused, wrong, refused == wrong)
    score.zero("requests unanswered or answered with 500 and above", len(broken), len(cases))
    note_first(score, "not refused", faults, 10)
    note_first(score, "broken", broken, 10)
    watch.judge(score)
    before.judge(score)
    if (faulty := ask(target, "GET", "/health/deep")).status != 200:
        score.note(f"/health/deep: {faulty.status}")


async def measure(target: Target, score: Score, short: bool) -> None:
    attack(target, score, *((SHORT_WRONG, SHORT_EXTREME) if short else (WRONG, EXTREME)))


if __name__ == "__main__":
    sys.exit(run_script("poison", __doc__, measure, lambda short: FLAGS))
