"""Streams of the OpenAI routes: joined they are the whole answer, and each chunk has the shape that clients check."""

from __future__ import annotations

import random
import timeit
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.api.answers import Stamp, answer_body
from headrace.api.openai import ApiRequest
from headrace.api.stream import PING, StreamWriter
from headrace.api.tool_parsers import make_parser
from headrace.api.tools import ToolChoice, ToolSpec
from headrace.core.errors import EngineError
from headrace.core.types import FinishReason, Request
from headrace.engine.answer import Answer
from headrace.text.tokenizer import Tokenizer, load_tokenizer
from tests.unit.batch_cases import write_tokenizer
from tests.unit.stream_cases import (
    VOCABULARY,
    BracketParser,
    Play,
    body_of,
    check_client_types,
    check_stream_is_whole,
    chunks_of,
    entries,
)


@dataclass
class Folder:
    path: Path
    config: dict[str, object]
    format: str = "hf"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    assert write_tokenizer(folder) == VOCABULARY
    return load_tokenizer(Folder(folder, {}))  # type: ignore[arg-type]


PIECES = ("[f|]", '[g|{"a":1}]', "[f|{", "[h", "]", "a", "b", "\n", "é€", "🚀", "\u2028", "\x85", '"', "<cut>", "<any>")


def random_ids(rng: random.Random, tokenizer: Tokenizer) -> list[int]:
    """Tokens of an answer: calls, parts of stop strings, characters whole and cut, special and padding tokens."""
    ids: list[int] = []
    for piece in rng.choices(PIECES, k=rng.randint(1, 8)):
        if piece == "<any>":
            ids.append(rng.randrange(VOCABULARY + 8))
        else:
            ids += ids_of("€", tokenizer)[: rng.randint(1, 2)] if piece == "<cut>" else ids_of(piece, tokenizer)
    return ids


def ids_of(text: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[ApiRequest, bool]:
    kind = draw(st.sampled_from(["chat", "completions"]))
    fields: dict[str, Any] = {"n": draw(st.integers(1, 3)), "max_tokens": 100}
    fields["stop"] = draw(st.lists(st.sampled_from(["b", "ab", "b\n", "é€", "€🚀", "a\n["]), max_size=2)) or None
    for name in ("return_token_ids", "return_tokens_as_token_ids", "include_stop_str_in_output"):
        fields[name] = draw(st.booleans())
    fields["skip_special_tokens"] = draw(st.booleans())
    fields["prompt_logprobs"] = draw(st.sampled_from([None, None, 0, 2]))
    options = draw(st.sampled_from([None, {"include_usage": True}, {"continuous_usage_stats": True}]))
    if kind == "chat":
        top = draw(st.sampled_from([None, 0, 2]))
        fields |= {"logprobs": top is not None, "top_logprobs": top}
        return body_of(kind, stream_options=options, **fields), draw(st.booleans())
    fields |= {"echo": draw(st.booleans()), "logprobs": draw(st.sampled_from([None, 0, 3]))}
    prompt = draw(st.sampled_from(["ab", "é\u2028", [[20, 201], [202, 30, 2]], ["a", "b€"]]))
    return body_of(kind, stream_options=options, prompt=prompt, **fields), False


@settings(max_examples=500)
@given(bodies(), st.integers(0, 2**32))
def test_stream_joined_is_the_whole_answer(tokenizer: Tokenizer, body: tuple[ApiRequest, bool], seed: int) -> None:
    request, tools = body
    rng = random.Random(f"{seed} {body}")
    prompts: list[Sequence[int]] = [(10, 11)]
    if request.kind == "completions":
        asked = request.prompts
        prompts = [tokenizer.encode(one) if isinstance(one, str) else one for one in asked]  # type: ignore[misc]
    play = Play(request, tokenizer, prompts, BracketParser if tools else None)
    left = {index: random_ids(rng, tokenizer) for index in range(request.choices)}
    while left:
        index, count = rng.choice(sorted(left)), rng.randint(1, 9)
        ids, left[index] = left[index][:count], left[index][count:]
        going = play.tokens(index, ids)
        if going and left[index] and rng.random() < 0.7:
            play.delta(index)
        elif going and not left[index]:
            play.end(index, rng.choice([FinishReason.STOP, FinishReason.LENGTH]))
        if not going or not left[index]:
            del left[index]
    check_stream_is_whole(play)
    check_client_types(play)


# ---------------------------------------------------------------- exact chunks


HEAD = '"created":1700000000,"model":"m \\"\\" {","system_fingerprint":"fp_1","choices":['


def test_bytes_of_a_chat(tokenizer: Tokenizer) -> None:
    play = Play(body_of("chat", stream_options={"include_usage": True}), tokenizer)
    play.tokens(0, ids_of("Hé\u2028", tokenizer))
    play.delta(0)
    play.end(0, FinishReason.STOP)
    head = 'data: {"id":"chatcmpl-0a1b","object":"chat.completion.chunk",' + HEAD
    tail = '"logprobs":null,"finish_reason":'
    assert play.finish().decode() == (
        f'{head}{{"index":0,"delta":{{"role":"assistant","content":""}},{tail}null}}]}}\n\n'
        f'{head}{{"index":0,"delta":{{"content":"H\\u00e9\\u2028"}},{tail}null}}]}}\n\n'
        f'{head}{{"index":0,"delta":{{}},{tail}"stop"}}]}}\n\n'
        f'{head}],"usage":{{"prompt_tokens":2,"completion_tokens":6,"total_tokens":8,'
        '"prompt_tokens_details":{"cached_tokens":1},"completion_tokens_details":{"reasoning_tokens":0}}}\n\n'
        "data: [DONE]\n\n"
    )


def test_bytes_of_a_completion(tokenizer: Tokenizer) -> None:
    play = Play(body_of("completions"), tokenizer)
    play.tokens(0, ids_of('"', tokenizer))
    play.delta(0)
    play.end(0)
    head = 'data: {"id":"cmpl-0a1b","object":"text_completion",' + HEAD
    assert play.finish().decode() == (
        f'{head}{{"index":0,"text":"\\"","logprobs":null,"finish_reason":null}}]}}\n\n'
        f'{head}{{"index":0,"text":"","logprobs":null,"finish_reason":"length"}}]}}\n\n'
        "data: [DONE]\n\n"
    )


def test_a_lagging_client_gets_one_event(tokenizer: Tokenizer) -> None:
    for request in (body_of("chat"), body_of("chat", logprobs=True)):
        play = Play(request, tokenizer)
        for token_id in ids_of("several tokens", tokenizer):
            play.tokens(0, [token_id])
        (entry,) = entries(play.delta(0))
        assert entry["delta"] == {"content": "several tokens"}
        assert play.delta(0) == b""


def test_nothing_to_say_is_no_event(tokenizer: Tokenizer) -> None:
    half = ids_of("é", tokenizer)[:1]
    for fields in ({}, {"stream_options": {"continuous_usage_stats": True}}, {"prompt_logprobs": 0}):
        play = Play(body_of("chat", **fields), tokenizer)
        assert play.delta(0) == b""
        play.tokens(0, half)
        assert play.delta(0).count(b"delta") == ("prompt_logprobs" in fields)
        assert play.delta(0) == b""


def test_tool_calls(tokenizer: Tokenizer) -> None:
    play = Play(body_of("chat", logprobs=True), tokenizer, parser=BracketParser)
    told: list[tuple[dict[str, Any], int]] = []
    for text in ("Let", "[ge", 't|{"a"', ":1}][t|]"):
        play.tokens(0, ids_of(text, tokenizer))
        got = entries(play.delta(0))
        told += [(one["delta"], len((one["logprobs"] or {"content": []})["content"])) for one in got]
    ids = [call["id"] for delta, _ in told for call in delta.get("tool_calls", []) if "id" in call]
    assert told == [
        ({"content": "Let"}, 3),
        ({}, 3),
        (call_chunk(0, {"name": "get", "arguments": ""}, ids[0]), 6),
        (call_chunk(0, {"arguments": '{"a"'}), 0),
        (call_chunk(0, {"arguments": ":1}"}), 8),
        (call_chunk(1, {"name": "t", "arguments": ""}, ids[1]), 0),
        (call_chunk(1, {"arguments": "{}"}), 0),
    ]
    assert all(one.startswith("call_") and len(one) == 29 for one in ids) and ids[0] != ids[1]
    (last,) = entries(play.end(0, FinishReason.STOP))
    assert (last["delta"], last["finish_reason"]) == ({}, "tool_calls")
    message = play.body()["choices"][0]["message"]
    assert [call["id"] for call in message["tool_calls"]] == ids


def call_chunk(index: int, function: dict[str, str], call_id: str | None = None) -> dict[str, Any]:
    named = {} if call_id is None else {"id": call_id, "type": "function"}
    return {"tool_calls": [{"index": index, **named, "function": function}]}


CALLS = {
    "hermes": 'Well\n<tool_call>\n{"name": "f", "arguments": {"a": "é€"}}\n</tool_call>\n<tool_call>{"name": "g"}',
    "llama3": '{"name": "f", "parameters": {"a": "é€"}}; {"name": "g", "parameters": {}}',
    "mistral": '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "é€"}}, {"name": "g", "arguments": {}}]',
}


@pytest.mark.parametrize("style", CALLS)
def test_calls_as_models_write_them(tokenizer: Tokenizer, style: str) -> None:
    """Cut anywhere, streamed in pieces of any size."""
    rng = random.Random(style)
    for _ in range(25):
        parser = partial(make_parser, style, (ToolSpec("f"), ToolSpec("g")), ToolChoice("auto"))
        play = Play(body_of("chat", logprobs=rng.random() < 0.5), tokenizer, parser=parser)
        ids = ids_of(CALLS[style], tokenizer)
        ids = ids[: rng.choice([len(ids), rng.randint(1, len(ids))])]
        for start in range(0, len(ids), step := rng.randint(1, 20)):
            play.tokens(0, ids[start : start + step])
            play.delta(0)
        play.end(0, FinishReason.STOP)
        check_stream_is_whole(play)
        check_client_types(play)


def test_calls_of_other_answers_have_other_ids(tokenizer: Tokenizer) -> None:
    play = Play(body_of("chat", n=2), tokenizer, parser=BracketParser)
    for index, reason in enumerate((FinishReason.STOP, FinishReason.LENGTH)):
        play.tokens(index, ids_of("[f|]", tokenizer))
        play.end(index, reason)
    first, second = play.body()["choices"]
    assert first["message"]["content"] is None
    assert (first["finish_reason"], second["finish_reason"]) == ("tool_calls", "length")
    other = answer_body(play.request, Stamp("0a1c", 0, "m", ""), play.whole(), tokenizer, parsers=play.parsers())
    calls = [choice["message"]["tool_calls"][0] for choice in (first, second, *other["choices"])]
    assert len({call["id"] for call in calls}) == 4
    assert [call["function"] for call in calls] == [{"name": "f", "arguments": "{}"}] * 4


def test_without_a_call_the_message_is_text(tokenizer: Tokenizer) -> None:
    play = Play(body_of("chat"), tokenizer, parser=BracketParser)
    play.end(0, FinishReason.STOP)
    (choice,) = play.body()["choices"]
    assert choice["message"] == {"role": "assistant", "content": "", "refusal": None, "reasoning": None}
    assert choice["finish_reason"] == "stop"


def test_offsets_never_pass_the_end_of_the_text(tokenizer: Tokenizer) -> None:
    """The tokens of a stop string begin where it was cut; until it is certain, they are not told of."""
    play = Play(body_of("completions", logprobs=0, echo=True, stop=["xyz"]), tokenizer)
    seen: list[list[Any]] = []
    for char in "axyxyz":
        going = play.tokens(0, ids_of(char, tokenizer))
        new = play.delta(0) if going else play.sent[-1]
        seen += [[one["text"], one["logprobs"] and one["logprobs"]["text_offset"]] for one in entries(new)]
    assert seen == [
        ["ab", [0, 1]],
        ["a", [2]],
        ["", [3]],
        ["xy", [4, 5]],
        ["", [5, 5]],
        ["", None],
    ]


def test_prompt_is_told_first_and_once(tokenizer: Tokenizer) -> None:
    play = Play(body_of("completions", echo=True, return_token_ids=True, prompt_logprobs=0, n=2), tokenizer)
    for index in (1, 0):
        assert play.delta(index) == b""  # not before the first token: what is told of the prompt comes with it
        play.tokens(index, [30])
        first, second = entries(play.delta(index))
        assert (first["index"], first["text"], first["prompt_token_ids"]) == (index, "ab", [10, 11])
        assert first["prompt_logprobs"][0] is None and len(first["prompt_logprobs"]) == 2
        assert second["token_ids"] == [30] and "prompt_token_ids" not in second
    chat = Play(body_of("chat", return_token_ids=True, n=2), tokenizer)
    for index in (0, 1):
        chat.tokens(index, [30])
        chunks = chunks_of(chat.delta(index) + b"data: [DONE]\n\n")
        assert [chunk.get("prompt_token_ids") for chunk in chunks] == ([[10, 11], None] if index == 0 else [None])


def test_running_usage(tokenizer: Tokenizer) -> None:
    options = {"continuous_usage_stats": True}
    play = Play(body_of("chat", n=2, stream_options=options), tokenizer)
    for index in (0, 1, 0):
        play.tokens(index, [30, 31])
        play.delta(index)
    chunks = chunks_of(b"".join(play.sent) + b"data: [DONE]\n\n")
    counts = [(one["usage"]["prompt_tokens"], one["usage"]["completion_tokens"]) for one in chunks]
    assert counts == [(2, 0), (2, 0), (2, 2), (2, 4), (2, 6)]


def test_errors_and_endings(tokenizer: Tokenizer) -> None:
    play = Play(body_of("chat"), tokenizer)
    data = play.writer.error("engine_fault", "the\u2028row\n\nfailed")
    (event,) = chunks_of(data)
    expected = {"message": "the row failed", "type": "server_error", "param": None, "code": "engine_fault"}
    assert event == {"error": expected}
    assert PING == b": ping\n\n"
    play.tokens(0, [30])
    with pytest.raises(EngineError, match="abort"):
        play.end(0, FinishReason.ABORT)


def test_an_event_of_text_costs_little(tokenizer: Tokenizer) -> None:
    """Of the writer's own time; a server with 32 streams spends this for every one of them at each step."""

    class Ready(Answer):
        def take_text(self) -> str:
            return " hello"

    answer = Ready(0, Request("a", (10,)), tokenizer, 0.0)
    for kind in ("chat", "completions"):
        writer = StreamWriter(body_of(kind), Stamp("0", 0, "m", ""), tokenizer)
        (entry,) = entries(writer.delta(0, answer))
        assert entry["delta" if kind == "chat" else "text"] == ({"content": " hello"} if kind == "chat" else " hello")
        assert min(timeit.repeat(partial(writer.delta, 0, answer), number=500, repeat=9)) / 500 < 10e-6
