"""Plays answers through a stream as the server does, and holds the joined stream against the whole answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types import Completion as OpenaiCompletion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from headrace.api.answers import Stamp, answer_body
from headrace.api.openai import ApiRequest, read_body
from headrace.api.stream import StreamWriter
from headrace.api.tool_parsers import CallArguments, CallStart, Part, TextPart, ToolParser
from headrace.core.types import FinishEvent, FinishReason, Request, TokenEvent, TokenLogprobs
from headrace.engine.answer import Answer, Completion
from headrace.text.tokenizer import Tokenizer

STAMP = Stamp("0a1b", 1_700_000_000, 'm "" {', "fp_1")
VOCABULARY = 262
"""Six special tokens and a token a byte; ids from here on are padding."""


class BracketParser:
    """Calls are written `[name|arguments]`; a name waits until it is whole. Character by character."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._inside = False
        self._calls = 0
        self._empty = True

    def push(self, text: str) -> list[Part]:
        return [part for char in text for part in self._read(char)]

    def finish(self) -> list[Part]:
        if self._name is not None:
            return [TextPart("[" + self._name)]
        return self._close() if self._inside else []

    def _read(self, char: str) -> list[Part]:
        if self._inside:
            if char == "]":
                return self._close()
            self._empty = False
            return [CallArguments(self._calls, char)]
        if self._name is None:
            if char != "[":
                return [TextPart(char)]
            self._name = ""
        elif char == "|":
            start = CallStart(self._calls, self._name)
            self._name, self._inside, self._empty = None, True, True
            return [start]
        else:
            self._name += char
        return []

    def _close(self) -> list[Part]:
        self._inside = False
        self._calls += 1
        return [CallArguments(self._calls - 1, "{}")] if self._empty else []


def body_of(kind: str, **fields: Any) -> ApiRequest:
    base = {"messages": [{"role": "user", "content": "Hi"}]} if kind == "chat" else {"prompt": "ab"}
    return read_body(kind, {**base, "stream": True, **fields})  # type: ignore[arg-type]


def score(token_id: int, k: int | None) -> tuple[TokenLogprobs, ...]:
    """The token is among the likeliest or not, as its id has it."""
    if k is None:
        return ()
    top = sorted((((token_id * 7 + j * 5) % VOCABULARY, -0.5 * j) for j in range(k)), key=lambda pair: -pair[1])
    return (TokenLogprobs(float("-inf") if token_id % 13 == 0 else -token_id / 8, tuple(top)),)


@dataclass
class Play:
    """Runs answers and a writer as the server does: tokens come, now and then the client is told, answers end."""

    request: ApiRequest
    tokenizer: Tokenizer
    prompts: Sequence[Sequence[int]] = ((10, 11),)
    parser: Callable[[], ToolParser] | None = None
    answers: list[Answer] = field(init=False)
    completions: dict[int, Completion] = field(default_factory=dict)
    sent: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = self.request.sampling.n
        self.answers = [
            Answer(p, Request(f"{p}/{i}", tuple(ids), self.request.sampling), self.tokenizer, 0.0, i)
            for p, ids in enumerate(self.prompts)
            for i in range(count)
        ]
        self.writer = StreamWriter(self.request, STAMP, self.tokenizer, self.parsers())
        self.sent.append(self.writer.start(self.answers))

    def parsers(self) -> list[ToolParser] | None:
        return None if self.parser is None else [self.parser() for _ in self.answers]

    def tokens(self, index: int, ids: Iterable[int]) -> bool:
        """Whether the answer goes on."""
        answer, ids = self.answers[index], tuple(ids)
        sampling = answer.request.sampling
        told = tuple(one for token_id in ids for one in score(token_id, sampling.logprobs))
        of_prompt: tuple[TokenLogprobs, ...] = ()
        if sampling.prompt_logprobs is not None and not answer.num_tokens:
            of_prompt = tuple(one for i in answer.request.token_ids[1:] for one in score(i, sampling.prompt_logprobs))
        if answer.tokens(TokenEvent(answer.request.id, ids, told, 1.0, of_prompt)) is None:
            return True
        self.end(index, FinishReason.STOP)
        return False

    def delta(self, index: int) -> bytes:
        self.sent.append(self.writer.delta(index, self.answers[index]))
        return self.sent[-1]

    def end(self, index: int, reason: FinishReason = FinishReason.LENGTH) -> bytes:
        answer = self.answers[index]
        prompt_tokens = len(answer.request.token_ids)
        event = FinishEvent(answer.request.id, reason, prompt_tokens, answer.num_tokens, prompt_tokens // 2, 2.0)
        self.completions[index] = completion = answer.end(event)
        self.sent.append(self.writer.end(index, answer, completion))
        return self.sent[-1]

    def finish(self) -> bytes:
        self.sent.append(self.writer.finish(self.whole()))
        return b"".join(self.sent)

    def whole(self) -> list[Completion]:
        return [self.completions[index] for index in range(len(self.answers))]

    def body(self) -> dict[str, Any]:
        body = answer_body(self.request, STAMP, self.whole(), self.tokenizer, parsers=self.parsers())
        loaded: dict[str, Any] = json.loads(json.dumps(body))
        return loaded


def chunks_of(stream: bytes) -> list[dict[str, Any]]:
    """Reads as the strictest client does: lines end wherever Python's `splitlines` ends them."""
    lines = stream.decode("ascii").splitlines()
    assert lines[1::2] == [""] * (len(lines) // 2) and lines[-2] == "data: [DONE]"
    assert all(line.startswith("data: {") for line in lines[:-2:2])
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2:2]]


def add(joined: dict[str, Any], key: str, value: Any) -> None:
    """Lists and texts grow, null is no news."""
    if isinstance(value, dict):
        inside = joined.setdefault(key, None) or {}
        for name, one in value.items():
            add(inside, name, one)
        joined[key] = inside
    elif value is None:
        joined.setdefault(key, None)
    else:
        joined[key] = value if joined.get(key) is None else joined[key] + value


def join_choice(chunks: Sequence[dict[str, Any]], chat: bool) -> dict[str, Any]:
    """One choice of a whole answer, from its entries in the chunks."""
    joined: dict[str, Any] = {"index": chunks[0]["index"]}
    message: dict[str, Any] = {"refusal": None, "reasoning": None}
    calls: list[dict[str, Any]] = []
    assert [chunk["finish_reason"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert not chat or [chunk["delta"] for chunk in chunks if "role" in chunk["delta"]] == [chunks[0]["delta"]]
    for chunk in chunks:
        assert chunk.pop("index") == joined["index"]
        for delta in [chunk.pop("delta")] if chat else []:
            assert len(delta) < 2 or delta == {"role": "assistant", "content": ""}
            for call in delta.pop("tool_calls", []):
                if "id" in call:
                    assert (call.pop("index"), call["function"]["arguments"]) == (len(calls), "")
                    calls.append(call)
                else:
                    assert call["function"]["arguments"]
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            for name, value in delta.items():
                add(message, name, value)
        for name, value in chunk.items():
            add(joined, name, value)
    if calls:
        message |= {"content": message["content"] or None, "tool_calls": calls}
    return joined | {"message": message} if chat else joined


def check_stream_is_whole(play: Play) -> None:
    chat = play.request.kind == "chat"
    chunks, body = chunks_of(play.finish()), play.body()
    used = body.pop("usage")
    totals = [chunk["usage"]["total_tokens"] for chunk in chunks if "usage" in chunk]
    if play.request.stream_usage:
        last = chunks.pop()
        assert (last.pop("choices"), last.pop("usage")) == ([], used)
        assert all(last[name] == body[name] for name in last if name != "object")
    assert len(totals) == play.request.stream_usage + len(chunks) * play.request.continuous_usage
    assert totals == sorted(totals)
    for index, expected in enumerate(body.pop("choices")):
        own = [entry for chunk in chunks for entry in chunk["choices"] if entry["index"] == index]
        joined = join_choice([dict(entry) for entry in json.loads(json.dumps(own))], chat)
        assert joined == expected
    for chunk in chunks:
        assert len(chunk.pop("choices")) == 1
        chunk.pop("usage", None)
        assert chunk.pop("object") == ("chat.completion.chunk" if chat else "text_completion")
    body.pop("object")
    joined = {name: value for chunk in chunks for name, value in chunk.items()}
    assert joined == body
    assert all(chunk.items() >= {name: body[name] for name in ("id", "created", "model")}.items() for chunk in chunks)


def entries(data: bytes) -> list[dict[str, Any]]:
    """The choices in a run of events without an end."""
    return [chunk["choices"][0] for chunk in chunks_of(data + b"data: [DONE]\n\n")]


def check_client_types(play: Play) -> None:
    """Against the classes of openai-python, strictly. Two things its classes of completions do not know are put right
    first: a chunk that is not the last has no finish reason, and an echoed prompt begins with null."""
    chunks = chunks_of(b"".join(play.sent))
    if play.request.kind == "chat":
        ChatCompletion.model_validate(play.body(), strict=True)
        state: Any = ChatCompletionStreamState()
        for chunk in chunks:
            state.handle_chunk(ChatCompletionChunk.model_validate(chunk, strict=True))
        for one, whole in zip(state.current_completion_snapshot.choices, play.body()["choices"], strict=True):
            assert (one.message.content or None) == (whole["message"]["content"] or None)
            assert one.finish_reason == whole["finish_reason"]
            calls = [(call.id, call.function.name, call.function.arguments) for call in one.message.tool_calls or ()]
            expected = [(call["id"], *call["function"].values()) for call in whole["message"].get("tool_calls", ())]
            assert calls == expected
        return
    for chunk in chunks:
        for choice in chunk["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
            for name, value in (choice["logprobs"] or {}).items():
                choice["logprobs"][name] = value[1:] if value[:1] == [None] else value
        OpenaiCompletion.model_validate(chunk, strict=True)
