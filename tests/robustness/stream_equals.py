"""Is a stream, put together again, the answer that the same body gets without one?

    python -m tests.robustness.stream_equals --requests 500

Bodies are drawn by a seed: chats and completions, one choice or several, greedy and sampled, with log-probabilities,
stop strings, tools, grammars, echo, token ids. Each has a seed of its own for sampling and is asked twice, several of
them at once. Compared are text, finish reason, log-probabilities, token ids, tool calls (but for their random ids) and
usage (but for how much of the prompt was reused). The server is the real command on the demo model, or any at `--url`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tests.server.conftest import serving

AT_ONCE = 4
LIMIT_S = 120
QUESTIONS = (
    "Name three colours.",
    "What is the weather in Rome?",
    "Write a line with 🙂, é and 漢字.",
    "Count: 1, 2, 3,",
    'Say \u2028 or \u0085 or \\ or "quoted".',
    "def f(x):\n    return",
    "<tool_call>",
    "Repeat after me: the\n\nend. The end. THE END",
)
SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
GRAMMARS: tuple[Mapping[str, Any], ...] = (
    {"regex": "[a-f]{2,9}( 🙂| \u2028)?"},
    {"choice": ["yes", "no", "é or 漢"]},
    {"json": SCHEMA},
    {"grammar": 'start: "(" start? ")"'},
)


def draw_body(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """(what kind it is, a body): small answers, so that hundreds are quick."""
    body: dict[str, Any] = {"max_tokens": draw.randint(1, 24), "seed": draw.getrandbits(31)}
    body["temperature"] = draw.choice([0, 0.7, 1.0, 1.5])
    if draw.random() < 0.4:
        body["stop"] = draw.sample(["e", "\n", " the", ". ", "🙂", "</tool_call>", "ing "], draw.randint(1, 3))
        body["include_stop_str_in_output"] = draw.random() < 0.3
    for name, value in (("ignore_eos", True), ("top_p", 0.9), ("top_k", 40), ("repetition_penalty", 1.2), ("n", 2)):
        if draw.random() < 0.25:
            body[name] = value
    for name in ("return_token_ids", "return_tokens_as_token_ids"):
        body[name] = draw.random() < 0.15
    if draw.random() < 0.15:
        body["skip_special_tokens"] = False
    kind = draw.choice(["chat", "chat", "tools", "tools", "completions", "completions"])
    if kind == "completions":
        texts = draw.sample(QUESTIONS, draw.choice([1, 1, 2]))
        body |= {"prompt": texts if len(texts) > 1 else texts[0], "echo": draw.random() < 0.3}
        if draw.random() < 0.6:
            body["logprobs"] = draw.randint(0, 4)
    else:
        body["messages"] = [{"role": "user", "content": draw.choice(QUESTIONS)}]
        if draw.random() < 0.5:
            body |= {"logprobs": True, "top_logprobs": draw.randint(0, 4)}
    if kind == "tools":
        add_tools(draw, body)
    elif draw.random() < 0.25:
        kind += ", grammar"
        body["structured_outputs"] = draw.choice(GRAMMARS)
    return kind + (", logprobs" if body.get("logprobs") not in (None, False) else ""), body


def add_tools(draw: random.Random, body: dict[str, Any]) -> None:
    """Calls that a grammar forces, and answers of a free model: used to calls, it makes some, whole and broken."""
    body["tools"] = TOOLS
    body["parallel_tool_calls"] = draw.random() < 0.7
    if draw.random() < 0.7:
        body.pop("stop", None)  # most calls would not get past it
    way = draw.choice(["free", "used to calls", "used to calls", "required", "named"])
    if way == "used to calls":
        body |= {
            "messages": calling_history(draw),
            "max_tokens": draw.choice([30, 90]),
            "temperature": draw.choice([0, 0.5]),
        }
    elif way != "free":
        body["max_tokens"] = draw.choice([20, 70])
        named = {"type": "function", "function": {"name": "get_weather"}}
        body["tool_choice"] = "required" if way == "required" else named


def calling_history(draw: random.Random) -> list[dict[str, Any]]:
    """A conversation in which each question was answered by calls: the model goes on like that."""
    messages: list[dict[str, Any]] = []
    at_once = draw.randint(1, 2)
    for city in draw.sample(["Oslo", "Rome", "Lima", "Bern"], 3):
        arguments = json.dumps({"city": city, "warm": True})
        calls = [
            {"id": f"call_{city}{i}", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
            for i in range(at_once)
        ]
        messages.append({"role": "user", "content": f"The weather in {city}?"})
        messages.append({"role": "assistant", "content": draw.choice([None, "Let me see."]), "tool_calls": calls})
        messages += [{"role": "tool", "tool_call_id": call["id"], "content": "sunny"} for call in calls]
    return [*messages, {"role": "user", "content": "The weather in Paris?"}]


@dataclass(frozen=True)
class Found:
    """A body, and how the two answers to it differ; empty: they are equal."""

    kind: str
    body: Mapping[str, Any]
    difference: str
    finish_reasons: tuple[str, ...] = ()
    calls: int = 0


def post(url: str, body: Mapping[str, Any]) -> tuple[int, bytes]:
    """(status, body) of one request on a connection of its own."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=LIMIT_S)
    try:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def events(data: bytes) -> Iterator[dict[str, Any]]:
    """The chunks of a stream, which is well formed to its end. Raises ValueError."""
    *parts, last, rest = data.decode("utf-8").split("\n\n")
    if last != "data: [DONE]" or rest:
        raise ValueError(f"the stream ends with {last!r}, {rest!r}")
    for part in parts:
        if part.startswith(":"):
            continue
        if not part.startswith("data: ") or "\n" in part:
            raise ValueError(f"an event is {part!r}")
        yield json.loads(part.removeprefix("data: "))


def put_together(data: bytes) -> dict[str, Any]:
    """The answer that a stream tells, in the form of a whole one. Raises ValueError on what no client expects."""
    body: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    ids: set[tuple[Any, ...]] = set()
    for chunk in events(data):
        if "error" in chunk:
            raise ValueError(f"an error in the stream: {chunk['error']}")
        ids.add(tuple(chunk[name] for name in ("id", "object", "created", "model")))
        if "usage" in chunk:
            if chunk["choices"]:
                raise ValueError("usage beside choices")
            body["usage"] = chunk["usage"]
        for name in ("prompt_token_ids",):
            if name in chunk:
                body[name] = chunk[name]
        for told in chunk["choices"]:
            choice = choices.setdefault(
                told["index"], {"index": told["index"], "finish_reason": None, "logprobs": None}
            )
            if choice["finish_reason"] is not None:
                raise ValueError("a choice goes on after its end")
            add(choice, told)
    if len(ids) != 1:
        raise ValueError(f"chunks call themselves {ids}")
    body["choices"] = [choices[index] for index in sorted(choices)]
    return body


def add(choice: dict[str, Any], told: Mapping[str, Any]) -> None:
    """Puts what a chunk tells of a choice to what is known of it."""
    choice["finish_reason"] = told["finish_reason"]
    for name in ("token_ids", "prompt_token_ids"):
        if name in told:
            choice[name] = choice.get(name, []) + told[name]
    if told["logprobs"] is not None:
        lists = choice["logprobs"] = choice["logprobs"] or {}
        for name, values in told["logprobs"].items():
            lists[name] = None if values is None else lists.get(name, []) + values
    if "text" in told:
        choice["text"] = choice.get("text", "") + told["text"]
        return
    message = choice.setdefault("message", {"content": None, "tool_calls": []})
    delta = told["delta"]
    if "role" in delta:
        if "role" in message:
            raise ValueError("the role is told twice")
        message["role"] = delta["role"]
    if delta.get("content"):
        message["content"] = (message["content"] or "") + delta["content"]
    for call in delta.get("tool_calls", ()):
        calls = message["tool_calls"]
        if "id" in call:
            if call["index"] != len(calls) or call["type"] != "function":
                raise ValueError(f"a call begins with {call}")
            calls.append({"name": call["function"]["name"], "arguments": ""})
        elif call["index"] != len(calls) - 1:
            raise ValueError(f"a call goes on with {call}")
        calls[-1]["arguments"] += call["function"].get("arguments", "")


def plain(body: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared of a whole answer."""
    found: dict[str, Any] = {"choices": [], "usage": dict(body["usage"])}
    found["usage"].pop("prompt_tokens_details", None)
    if "prompt_token_ids" in body:
        found["prompt_token_ids"] = body["prompt_token_ids"]
    for one in body["choices"]:
        choice = dict(one)
        if "message" in choice:
            message = choice["message"]
            calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
            choice["message"] = {"role": message["role"], "content": message["content"] or None, "tool_calls": calls}
        found["choices"].append(choice)
    return found


def compare(url: str, kind: str, body: Mapping[str, Any]) -> Found:
    """Asks for both answers, and says how they differ."""
    status, data = post(url, body)
    streamed, stream = post(url, {**body, "stream": True, "stream_options": {"include_usage": True}})
    if (status, streamed) != (200, 200):
        return Found(kind, body, f"status {status} and {streamed}: {data[:300]!r} {stream[:300]!r}")
    try:
        whole, joined = plain(json.loads(data)), plain(put_together(stream))
    except (ValueError, KeyError, TypeError) as error:
        return Found(kind, body, f"{type(error).__name__}: {error}")
    reasons = tuple(choice["finish_reason"] for choice in whole["choices"])
    calls = sum(len(choice.get("message", {}).get("tool_calls", ())) for choice in whole["choices"])
    return Found(kind, body, first_difference(whole, joined), reasons, calls)


def first_difference(whole: Any, joined: Any, path: str = "") -> str:
    """Where two values differ, and how; empty if they do not."""
    if isinstance(whole, dict) and isinstance(joined, dict) and whole.keys() == joined.keys():
        return next((told for key in whole if (told := first_difference(whole[key], joined[key], f"{path}.{key}"))), "")
    if isinstance(whole, list) and isinstance(joined, list) and len(whole) == len(joined):
        pairs = enumerate(zip(whole, joined, strict=True))
        return next((told for i, pair in pairs if (told := first_difference(*pair, f"{path}[{i}]"))), "")
    return "" if whole == joined else f"{path.removeprefix('.')}: {whole!r} whole, {joined!r} streamed"


def compare_many(url: str, count: int, seed: int) -> list[Found]:
    draw = random.Random(seed)
    drawn = [draw_body(draw) for _ in range(count)]
    with ThreadPoolExecutor(AT_ONCE) as workers:
        return list(workers.map(lambda one: compare(url, *one), drawn))


def table(found: list[Found]) -> str:
    """A line for each kind of body."""
    lines = [f"{'kind':<32}{'requests':>9}{'equal':>7}{'calls':>7}   how they ended"]
    for kind in sorted({one.kind for one in found}):
        mine = [one for one in found if one.kind == kind]
        ends = Counter(reason for one in mine for reason in one.finish_reasons)
        ended = ", ".join(f"{reason} {count}" for reason, count in ends.most_common())
        equal, calls = sum(not one.difference for one in mine), sum(one.calls for one in mine)
        lines.append(f"{kind:<32}{len(mine):>9}{equal:>7}{calls:>7}   {ended}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--url", help="a server that runs")
    parser.add_argument("--show", type=int, default=5, help="how many differences are shown")
    given = parser.parse_args()
    began_s = time.monotonic()
    if given.url:
        found = compare_many(given.url, given.requests, given.seed)
    else:
        with serving("demo", "--threads", "1") as server:
            found = compare_many(server.url, given.requests, given.seed)
    wrong = [one for one in found if one.difference]
    print(table(found))
    for one in wrong[: given.show]:
        print(f"\n{one.kind}: {one.difference}\n  {json.dumps(one.body)}")
    verdict = "fail" if wrong else "pass"
    equal, took_s = len(found) - len(wrong), time.monotonic() - began_s
    print(f"\n{verdict}: {equal} of {len(found)} streams equal the whole answer ({took_s:.0f} s)")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
