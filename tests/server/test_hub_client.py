"""huggingface_hub's clients, unchanged, against a real server: what they send, and what they make of the answers. The
routes' exact shapes: test_tgi_routes.py."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import BadRequestError, OverloadedError, UnknownError, ValidationError

from tests.server.conftest import Running, serving

PROMPT = "The capital of France is"
CHAT: Any = [{"role": "user", "content": "Name three colours."}]
WEATHER: Any = [{"role": "user", "content": "What is the weather in Rome?"}]
SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "description": "The time", "parameters": {"type": "object"}}},
]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
SEPARATORS = "a\u2028b\u0085c\u2029d"
"""What the client's reader of lines takes for ends of lines."""


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clients take offline mode to forbid the loopback address too."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def client(server_url: str) -> InferenceClient:
    return InferenceClient(model=server_url, timeout=60)


@pytest.fixture(scope="module")
def guarded(demo_path: Path) -> Iterator[Running]:
    """With a key, and room for one request that runs and one that waits."""
    flags = ("--threads", "1", "--api-key", "secret", "--max-num-seqs", "1", "--max-queued", "1", "--keep-alive", "0.1")
    with serving("demo", *flags) as running:
        yield running


# ---------------------------------------------------------------- text_generation


def test_every_parameter(client: InferenceClient) -> None:
    asked: Any = {
        "details": True,
        "do_sample": True,
        "frequency_penalty": 0.1,
        "max_new_tokens": 4,
        "repetition_penalty": 1.1,
        "return_full_text": True,
        "seed": 5,
        "stop": ["never said"],
        "temperature": 0.9,
        "top_k": 50,
        "top_n_tokens": 2,
        "top_p": 0.95,
        "truncate": 3,
        "typical_p": 0.98,
        "watermark": False,
    }
    first, again = (client.text_generation(PROMPT, decoder_input_details=True, **asked) for _ in range(2))
    assert first == again and first.generated_text.startswith(PROMPT)
    details = first.details
    assert details is not None and (details.seed, details.generated_tokens, details.finish_reason) == (5, 4, "length")
    assert [one.text for one in details.prefill] == [" of", " France", " is"] and details.prefill[0].logprob is None
    assert "".join(one.text for one in details.tokens) == first.generated_text.removeprefix(PROMPT)
    assert details.top_tokens is not None and [len(top) for top in details.top_tokens] == [2] * 4
    outputs = list(client.text_generation(PROMPT, stream=True, **asked))
    assert [asdict(one.token) for one in outputs] == [asdict(one) for one in details.tokens]
    assert outputs[-1].generated_text == first.generated_text and outputs[-1].details is not None
    assert outputs[-1].details.input_length == 3


def test_stop(client: InferenceClient) -> None:
    whole = client.text_generation(PROMPT, max_new_tokens=10, return_full_text=False)
    stop = whole[5:8]
    output = client.text_generation(PROMPT, max_new_tokens=10, stop=[stop], details=True, return_full_text=False)
    assert output.generated_text == whole[: whole.index(stop) + 3]  # TGI leaves the stop string there
    assert output.details is not None and output.details.finish_reason == "stop_sequence"


def test_best_of(client: InferenceClient) -> None:
    output = client.text_generation(PROMPT, best_of=2, do_sample=True, details=True, max_new_tokens=3)
    assert output.details is not None and output.details.best_of_sequences is not None
    (other,) = output.details.best_of_sequences
    assert sum(one.logprob for one in output.details.tokens) >= sum(one.logprob for one in other.tokens)


@pytest.mark.parametrize(
    "grammar",
    [
        {"type": "json", "value": SCHEMA},
        {"type": "json_schema", "value": {"name": "weather", "schema": SCHEMA}},
        {"type": "regex", "value": '\\{"city": "(Oslo|Rome)", "warm": (true|false)\\}'},
    ],
    ids=lambda grammar: grammar["type"],
)
def test_grammars(client: InferenceClient, grammar: Any) -> None:
    asked: Any = {"grammar": grammar, "max_new_tokens": 100, "return_full_text": False}
    text = client.text_generation(PROMPT, **asked)
    parsed = json.loads(text)
    assert parsed["city"] in ("Oslo", "Rome") and isinstance(parsed["warm"], bool) and len(parsed) == 2
    *outputs, last = client.text_generation(PROMPT, stream=True, details=True, **asked)
    assert last.generated_text == text
    assert "".join(one.token.text for one in [*outputs, last] if not one.token.special) == text


def test_line_separators_do_not_split_events(client: InferenceClient) -> None:
    asked: Any = {"grammar": {"type": "regex", "value": SEPARATORS}, "max_new_tokens": 40, "return_full_text": False}
    outputs = list(client.text_generation(PROMPT, stream=True, details=True, **asked))
    assert outputs[-1].generated_text == SEPARATORS == client.text_generation(PROMPT, **asked)
    body: Any = {"structured_outputs": {"choice": [SEPARATORS]}}
    chunks = client.chat_completion(CHAT, stream=True, max_tokens=40, extra_body=body)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SEPARATORS


@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_typed(client: InferenceClient, guarded: Running, stream: bool) -> None:
    with pytest.raises(ValidationError, match="top_n_tokens"):
        list(client.text_generation(PROMPT, top_n_tokens=6, stream=stream))
    with pytest.raises(ValidationError, match="grammar"):
        list(client.text_generation(PROMPT, grammar={"type": "regex", "value": "("}, stream=stream))  # type: ignore[arg-type]
    strange = InferenceClient(model=guarded.url, token="wrong")
    with pytest.raises(UnknownError, match="a key is needed"):
        list(strange.text_generation(PROMPT, stream=stream))
    first, second, third = (InferenceClient(model=guarded.url, token="secret", timeout=60) for _ in range(3))
    endless = first.chat_completion(CHAT, stream=True, max_tokens=4000, extra_body={"ignore_eos": True})
    next(iter(endless))
    waiting = second.text_generation(PROMPT, stream=True, max_new_tokens=4)  # hears comments until it is its turn
    with pytest.raises(OverloadedError):
        list(third.text_generation(PROMPT, stream=stream))
    first.exit_stack.close()
    assert len(list(waiting)) == 4


# ---------------------------------------------------------------- chat_completion


def test_chat(client: InferenceClient) -> None:
    asked: Any = {"max_tokens": 8, "seed": 3, "temperature": 0.8, "top_p": 0.9, "n": 2, "logprobs": True}
    asked |= {"top_logprobs": 2, "presence_penalty": 0.1, "frequency_penalty": 0.1, "stop": ["never said"]}
    whole = client.chat_completion(CHAT, **asked)
    assert [choice.index for choice in whole.choices] == [0, 1] and whole.usage.completion_tokens == 16
    assert whole.choices[0].message.role == "assistant" and whole.choices[0].finish_reason == "length"
    *chunks, last = client.chat_completion(CHAT, stream=True, stream_options={"include_usage": True}, **asked)  # type: ignore[arg-type]
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == 16
    for choice in whole.choices:
        mine = [one for chunk in chunks for one in chunk.choices if one.index == choice.index]
        assert "".join(one.delta.content or "" for one in mine) == choice.message.content
        assert mine[-1].finish_reason == choice.finish_reason
        told = [scores for one in mine for scores in (one.logprobs.content if one.logprobs is not None else ())]
        assert choice.logprobs is not None and len(told) == 8
        assert [asdict(one) for one in told] == [asdict(one) for one in choice.logprobs.content]


def test_tools(client: InferenceClient) -> None:
    answer = client.chat_completion(WEATHER, tools=TOOLS, tool_choice=NAMED, max_tokens=60, temperature=0)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather" and sorted(json.loads(call.function.arguments)) == ["city", "warm"]
    chunks = client.chat_completion(WEATHER, tools=TOOLS, tool_choice=NAMED, max_tokens=60, temperature=0, stream=True)
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert calls[0].function.name == "get_weather" and calls[0].id
    assert "".join(one.function.arguments or "" for one in calls) == call.function.arguments
    history: Any = [*WEATHER, {"role": "assistant", "tool_calls": [call]}]
    history.append({"role": "tool", "tool_call_id": call.id, "content": "warm"})
    assert client.chat_completion(history, tools=TOOLS, tool_choice="none", max_tokens=4).choices[0].message.content
    required = client.chat_completion(WEATHER, tools=TOOLS, tool_choice="required", max_tokens=60, temperature=0)
    assert required.choices[0].message.tool_calls


@pytest.mark.parametrize(
    "format",
    [
        {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}},
        {"type": "json", "value": SCHEMA},
        {"type": "regex", "value": '\\{"city": "Rome", "warm": (true|false)\\}'},
    ],
    ids=lambda format: format["type"],
)
def test_response_formats(client: InferenceClient, format: Any) -> None:
    text = (
        client.chat_completion(WEATHER, response_format=format, max_tokens=100, temperature=0)
        .choices[0]
        .message.content
    )
    assert text is not None and sorted(json.loads(text)) == ["city", "warm"]


def test_the_openai_face(server_url: str) -> None:
    """As its documentation has it: `client.chat.completions.create`, with a base URL with and without `/v1`."""
    for base in (server_url, f"{server_url}/v1"):
        client = InferenceClient(base_url=base, api_key="x")
        assert client.chat.completions.create(messages=CHAT, model="demo", max_tokens=2).choices[0].message.content


def test_chat_errors(client: InferenceClient) -> None:
    with pytest.raises(BadRequestError, match=re.escape("temperature: got 5")):
        client.chat_completion(CHAT, temperature=5)


# ---------------------------------------------------------------- asynchronous


def test_async(server_url: str, client: InferenceClient) -> None:
    expected = client.text_generation(PROMPT, max_new_tokens=6)
    told = client.chat_completion(CHAT, max_tokens=6, temperature=0).choices[0].message.content

    async def ask() -> None:
        async with AsyncInferenceClient(model=server_url, timeout=60) as own:
            text, chat, outputs, chunks = await asyncio.gather(
                own.text_generation(PROMPT, max_new_tokens=6),
                own.chat_completion(CHAT, max_tokens=6, temperature=0),
                own.text_generation(PROMPT, max_new_tokens=6, stream=True, details=True),
                own.chat_completion(CHAT, max_tokens=6, temperature=0, stream=True),
            )
            assert text == expected and chat.choices[0].message.content == told
            assert [one async for one in outputs][-1].generated_text == expected
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in chunks]) == told
            with pytest.raises(ValidationError):
                await own.text_generation(PROMPT, top_p=2)

    asyncio.run(ask())
