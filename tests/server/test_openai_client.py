"""openai-python, unchanged, against a real server. Its strict mode, which refuses an answer its types do not allow, is
on wherever those types are right: streamed completions and echo have nulls that they lack, here as at OpenAI."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.server.conftest import Running, serving
from tests.server.openai_cases import (
    MODEL,
    NAMED,
    PLAIN,
    SETTINGS,
    TOOLS,
    WEATHER,
    Weather,
    joined,
    strict_client,
)


@pytest.fixture(scope="module")
def client(server_url: str) -> Iterator[OpenAI]:
    with strict_client(server_url) as made:
        yield made


@pytest.fixture(scope="module")
def lax(server_url: str) -> Iterator[OpenAI]:
    """For answers that the client's own types do not allow."""
    with OpenAI(base_url=f"{server_url}/v1", api_key="x", **SETTINGS) as made:
        yield made


@pytest.fixture(scope="module")
def guarded(demo_path: Path) -> Iterator[Running]:
    """With a key, and room for one request that runs and one that waits."""
    flags = ("--threads", "1", "--api-key", "secret", "--max-num-seqs", "1", "--max-queued", "1", "--keep-alive", "0.1")
    with serving("demo", *flags) as running:
        yield running


def live(url: str) -> int:
    """Requests that are running or wait."""
    with urllib.request.urlopen(f"{url}/page/live.json", timeout=10) as answer:
        told = json.load(answer)
    return int(told["running"]) + int(told["waiting"])


def becomes_idle(url: str) -> bool:
    until_s = time.monotonic() + 5
    while live(url):
        if time.monotonic() > until_s:
            return False
        time.sleep(0.02)
    return True


# ---------------------------------------------------------------- models


def test_models(client: OpenAI) -> None:
    listed = list(client.models.list())
    assert [one.id for one in listed] == [MODEL]
    assert client.models.retrieve(MODEL) == listed[0]
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nope")
    assert caught.value.code == "model_not_found"


# ---------------------------------------------------------------- chat


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(**PLAIN)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason == "length" and choice.message.tool_calls is None
    assert answer.model == MODEL and answer.id.startswith("chatcmpl-") and abs(answer.created - time.time()) < 60
    usage = answer.usage
    assert usage is not None and usage.completion_tokens == 12
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_chat_streamed_is_chat(client: OpenAI) -> None:
    whole = client.chat.completions.create(**PLAIN)
    with client.chat.completions.create(**PLAIN, stream=True) as stream:
        chunks = list(stream)
    assert joined(chunks) == whole.choices[0].message.content
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_in_streams(client: OpenAI) -> None:
    whole = client.chat.completions.create(**PLAIN).usage
    assert whole is not None
    *chunks, last = client.chat.completions.create(**PLAIN, stream=True, stream_options={"include_usage": True})
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert last.choices == [] and last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (whole.prompt_tokens, 12)
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    told = [chunk.usage for chunk in client.chat.completions.create(**PLAIN, stream=True, stream_options=options)]
    counts = [usage.completion_tokens for usage in told if usage is not None]
    assert len(counts) == len(told) and counts == sorted(counts) and counts[0] <= 1 and counts[-1] == 12


def test_several_choices_and_seeds(client: OpenAI) -> None:
    sampled: Any = {**PLAIN, "temperature": 1, "n": 2, "seed": 7, "max_completion_tokens": 8}
    first, again = (client.chat.completions.create(**sampled) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1] and texts[0] != texts[1]
    assert texts == [choice.message.content for choice in again.choices]
    assert first.usage is not None and first.usage.completion_tokens == 16  # max_completion_tokens wins
    other = client.chat.completions.create(**{**sampled, "seed": 8})
    assert texts != [choice.message.content for choice in other.choices]
    chunks = list(client.chat.completions.create(**sampled, stream=True))
    assert [joined(chunks, index) for index in range(2)] == texts


def test_stop(client: OpenAI) -> None:
    text = client.chat.completions.create(**PLAIN).choices[0].message.content
    assert text is not None
    stop = text[len(text) // 2 :][:3]
    answer = client.chat.completions.create(**PLAIN, stop=["never said", stop])
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(**PLAIN, stop=stop, stream=True))
    assert joined(chunks) == text[: text.index(stop)]


def test_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(**PLAIN, logprobs=True, top_logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 12
    data = b"".join(bytes(one.bytes or ()) for one in logprobs.content)
    assert data.decode() == answer.choices[0].message.content
    for one in logprobs.content:
        top = [other.logprob for other in one.top_logprobs]
        assert len(top) == 3 and top == sorted(top, reverse=True)
        assert (one.token, one.logprob) == (one.top_logprobs[0].token, top[0])
    chunks = list(client.chat.completions.create(**PLAIN, logprobs=True, top_logprobs=3, stream=True))
    streamed = [choice.logprobs for chunk in chunks for choice in chunk.choices if choice.logprobs is not None]
    assert [one for told in streamed for one in told.content or ()] == logprobs.content
    bare = client.chat.completions.create(**PLAIN, logprobs=True).choices[0].logprobs
    assert bare is not None and bare.content is not None and all(one.top_logprobs == [] for one in bare.content)


def test_a_conversation_with_parts_and_a_tool_s_answer(client: OpenAI) -> None:
    call: Any = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages: Any = [
        {"role": "developer", "content": "You are brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "What time is it?"}, {"type": "text", "text": "Please."}],
        },
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, tools=TOOLS, tool_choice="none", max_tokens=8
    )
    assert answer.choices[0].message.content and answer.choices[0].message.tool_calls is None


# ---------------------------------------------------------------- completions


def test_completions(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="The capital of France is", temperature=0)
    assert answer.usage is not None and answer.usage.completion_tokens == 16  # the route's own default
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].text


def test_completion_prompts(client: OpenAI, server_url: str) -> None:
    texts = ["The capital of France is", "One, two,"]
    ids = []
    for text in texts:
        body = json.dumps({"prompt": text}).encode()
        request = urllib.request.Request(f"{server_url}/tokenize", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answered:
            ids.append(json.load(answered)["tokens"])
    asked: Any = {"model": MODEL, "max_tokens": 4, "temperature": 0}
    one_by_one = [client.completions.create(prompt=text, **asked).choices[0].text for text in texts]
    for prompt in (texts, ids):
        answer = client.completions.create(prompt=prompt, n=2, **asked)
        told = [(choice.index, choice.text) for choice in answer.choices]
        assert told == [(index, one_by_one[index // 2]) for index in range(4)]
    assert client.completions.create(prompt=ids[0], **asked).choices[0].text == one_by_one[0]


def test_completion_logprobs(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="One, two,", logprobs=2, max_tokens=4, temperature=0)
    choice = answer.choices[0]
    told = choice.logprobs
    assert told is not None and told.tokens and told.token_logprobs and told.top_logprobs and told.text_offset
    assert "".join(told.tokens) == choice.text
    assert told.text_offset == [len("".join(told.tokens[:index])) for index in range(4)]
    for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert len(top) == 2 and top[token] == logprob == max(top.values())


def test_echo(lax: OpenAI) -> None:
    prompt = "The capital of France"
    answer = lax.completions.create(model=MODEL, prompt=prompt, echo=True, logprobs=1, max_tokens=2, temperature=0)
    choice = answer.choices[0]
    told: Any = choice.logprobs
    assert choice.text.startswith(prompt) and "".join(told.tokens) == choice.text
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert all(logprob <= 0 for logprob in told.token_logprobs[1:])
    assert all(
        top[token] == logprob
        for token, logprob, top in list(zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True))[1:]
    )


def test_completions_streamed(lax: OpenAI) -> None:
    asked: Any = {"model": MODEL, "prompt": ["One, two,", "A"], "max_tokens": 6, "temperature": 0}
    whole = lax.completions.create(**asked)
    *chunks, last = lax.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    for choice in whole.choices:
        mine = [one for chunk in chunks for one in chunk.choices if one.index == choice.index]
        assert "".join(one.text for one in mine) == choice.text
        assert [one.finish_reason for one in mine if one.finish_reason] == [choice.finish_reason]
    assert whole.usage is not None and last.usage is not None and not last.choices
    assert last.usage.completion_tokens == whole.usage.completion_tokens == 12


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 5}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"extra_body": {"guided_json": {}}}, "guided_json"),
        ({"extra_body": {"chat_template_kwargs": {"messages": 1}}}, "chat_template_kwargs.messages"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 1}}},
            "response_format.json_schema.schema",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_field_is_named(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{**PLAIN, **fields})
    assert caught.value.param == param and param.split(".")[0] in caught.value.message
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_too_long(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=[1] * 10_000)
    assert caught.value.code == "context_length_exceeded"


def test_unknown_model_and_route(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**{**PLAIN, "model": "nope"})
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="a")


def test_deadline(client: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**{**PLAIN, "max_tokens": 2000}, extra_body={"timeout": 0.3, "ignore_eos": True})
    assert (caught.value.status_code, caught.value.code) == (408, "deadline_exceeded")


def test_unknown_fields_are_left_aside_and_named(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(**PLAIN, extra_body={"colour": 1, "enable_thinking": False})
    assert raw.headers["x-headrace-ignored"] == "colour,enable_thinking"
    assert raw.parse().choices[0].message.content
    raw = client.chat.completions.with_raw_response.create(
        **PLAIN, user="me", metadata={"a": "b"}, extra_body={"chat_template_kwargs": {"enable_thinking": False}}
    )
    assert "x-headrace-ignored" not in raw.headers and raw.headers["x-request-id"]


def test_key(guarded: Running) -> None:
    url = f"{guarded.url}/v1"
    with OpenAI(base_url=url, api_key="wrong", **SETTINGS) as wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    with OpenAI(base_url=url, api_key="secret", _strict_response_validation=True, **SETTINGS) as right:
        assert right.models.list().data[0].id == MODEL


def test_a_full_queue(guarded: Running) -> None:
    with OpenAI(base_url=f"{guarded.url}/v1", api_key="secret", **SETTINGS) as client:
        busy: Any = {**PLAIN, "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
        with client.chat.completions.create(**busy, stream=True) as stream:
            next(stream)
            # It waits, and hears comments until it is its turn, which the client does not show.
            waiting = client.chat.completions.create(**PLAIN, stream=True)
            with pytest.raises(openai.RateLimitError) as caught:
                client.chat.completions.create(**PLAIN)
            assert caught.value.code == "queue_full" and int(caught.value.response.headers["retry-after"]) >= 1
        # The first stream is closed, so there is room; a client that may try again finds it.
        assert joined(list(waiting))
        assert client.with_options(max_retries=2).chat.completions.create(**PLAIN).choices[0].message.content


# ---------------------------------------------------------------- going away


def test_a_closed_stream_ends_its_request(client: OpenAI, server_url: str) -> None:
    endless: Any = {**PLAIN, "max_tokens": 4000, "extra_body": {"ignore_eos": True}}
    stream = client.chat.completions.create(**endless, stream=True, n=2)
    next(stream)
    assert live(server_url) == 2
    stream.close()
    assert becomes_idle(server_url)


def test_a_client_that_waits_no_longer(client: OpenAI, server_url: str) -> None:
    hasty = client.with_options(timeout=0.4)
    with pytest.raises(openai.APITimeoutError):
        hasty.chat.completions.create(**{**PLAIN, "max_tokens": 4000}, extra_body={"ignore_eos": True})
    assert becomes_idle(server_url)


# ---------------------------------------------------------------- async


def test_async(server_url: str, client: OpenAI) -> None:
    expected = client.chat.completions.create(**PLAIN).choices[0].message.content

    async def ask() -> None:
        async with AsyncOpenAI(
            base_url=f"{server_url}/v1", api_key="x", _strict_response_validation=True, **SETTINGS
        ) as own:
            whole, parsed, *streams = await asyncio.gather(
                own.chat.completions.create(**PLAIN),
                own.chat.completions.parse(
                    model=MODEL, messages=WEATHER, response_format=Weather, max_tokens=100, temperature=0
                ),
                *(own.chat.completions.create(**PLAIN, stream=True) for _ in range(3)),
            )
            assert whole.choices[0].message.content == expected
            assert isinstance(parsed.choices[0].message.parsed, Weather)
            for stream in streams:
                assert joined([chunk async for chunk in stream]) == expected
            async with own.chat.completions.stream(
                model=MODEL, messages=WEATHER, tools=TOOLS, tool_choice=NAMED, temperature=0, max_tokens=60
            ) as helper:
                final = await helper.get_final_completion()
            assert final.choices[0].finish_reason == "tool_calls"
            assert [model.id async for model in own.models.list()] == [MODEL]
            with pytest.raises(openai.BadRequestError):
                await own.chat.completions.create(**{**PLAIN, "temperature": 5})
            endless: Any = {**PLAIN, "max_tokens": 4000, "extra_body": {"ignore_eos": True}}
            cancelled = asyncio.create_task(own.chat.completions.create(**endless))
            await asyncio.sleep(0.3)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled

    asyncio.run(ask())
    assert becomes_idle(server_url)


def test_an_answer_has_one_id(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(**PLAIN)
    assert raw.parse().id == f"chatcmpl-{raw.headers['x-request-id']}"
