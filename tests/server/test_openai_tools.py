"""openai-python, unchanged, against a real server: tools and answers of a given structure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion

from tests.server.openai_cases import COLOURS, MODEL, NAMED, PLAIN, TOOLS, WEATHER, Weather, joined, strict_client


@pytest.fixture(scope="module")
def client(server_url: str) -> Iterator[OpenAI]:
    with strict_client(server_url) as made:
        yield made


# ---------------------------------------------------------------- tools


def calls_of(answer: ChatCompletion) -> list[tuple[str, Any]]:
    """Names and arguments of the calls of an answer that ended by itself."""
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    calls: Any = choice.message.tool_calls
    assert len({call.id for call in calls}) == len(calls) and all(call.type == "function" for call in calls)
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


def test_tools_as_the_model_likes(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=WEATHER, tools=TOOLS, tool_choice="auto", max_tokens=12, temperature=0
    )
    message = answer.choices[0].message
    assert (message.content is None) == bool(message.tool_calls)
    chunks = client.chat.completions.create(
        model=MODEL, messages=WEATHER, tools=TOOLS, max_tokens=12, temperature=0, stream=True
    )
    assert joined(list(chunks)) == (message.content or "")


def test_a_tool_is_required(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=WEATHER, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, temperature=0
    )
    ((name, arguments),) = calls_of(answer)
    assert name in ("get_weather", "now")
    if name == "get_weather":
        assert arguments["city"] in ("Oslo", "Rome") and arguments["unit"] in ("C", "F") and len(arguments) == 2


def test_a_tool_is_named(client: OpenAI) -> None:
    ((name, arguments),) = calls_of(
        client.chat.completions.create(model=MODEL, messages=WEATHER, tools=TOOLS, tool_choice=NAMED, seed=3)
    )
    assert name == "get_weather" and sorted(arguments) == ["city", "unit"]
    now: Any = {"type": "function", "function": {"name": "now"}}
    called = client.chat.completions.create(model=MODEL, messages=WEATHER, tools=TOOLS, tool_choice=now, temperature=0)
    assert calls_of(called) == [("now", {})]


def test_several_calls_streamed(client: OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": WEATHER, "tools": TOOLS, "tool_choice": "required", "seed": 5}
    asked |= {"max_tokens": 90, "extra_body": {"min_tokens": 45}}  # a call is 30 tokens at most: the model must go on
    whole: Any = client.chat.completions.create(**asked).choices[0]
    assert len(whole.message.tool_calls) >= 2
    found: dict[int, list[str]] = {}
    chunks = list(client.chat.completions.create(**asked, stream=True))
    for call in (call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()):
        function: Any = call.function
        if call.id is not None:
            assert call.index == len(found) and call.type == "function"
            found[call.index] = [function.name, ""]
        else:
            assert function.name is None
        found[call.index][1] += function.arguments
    assert joined(chunks) == (whole.message.content or "")  # a call that is cut short is text
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    assert list(found.values()) == [[one.function.name, one.function.arguments] for one in whole.message.tool_calls]


def test_the_stream_helper_with_a_tool(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=WEATHER, tools=TOOLS, tool_choice=NAMED, temperature=0, max_tokens=60
    ) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion()
    (event,) = done
    calls: Any = final.choices[0].message.tool_calls
    assert event.name == calls[0].function.name == "get_weather"
    assert json.loads(event.arguments) == calls[0].function.parsed_arguments
    assert calls[0].function.parsed_arguments["city"] in ("Oslo", "Rome")


def test_the_stream_helper_with_text(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=COLOURS, temperature=0, stop="\n", max_tokens=60
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert text == final.choices[0].message.content and final.choices[0].finish_reason in ("stop", "length")


# ---------------------------------------------------------------- structured answers


def test_parse(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=WEATHER, response_format=Weather, max_tokens=100, temperature=0
    )
    parsed = answer.choices[0].message.parsed
    assert isinstance(parsed, Weather)
    with client.chat.completions.stream(
        model=MODEL, messages=WEATHER, response_format=Weather, max_tokens=100, temperature=0
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed


def test_parse_with_a_tool(client: OpenAI) -> None:
    tool = openai.pydantic_function_tool(Weather)
    choice: Any = {"type": "function", "function": {"name": "Weather"}}
    answer = client.chat.completions.parse(
        model=MODEL, messages=WEATHER, tools=[tool], tool_choice=choice, max_tokens=100, temperature=0
    )
    calls = answer.choices[0].message.tool_calls
    assert calls is not None and isinstance(calls[0].function.parsed_arguments, Weather)


def test_json_object(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Give me your name in JSON."}],
        response_format={"type": "json_object"},
        max_tokens=40,
        temperature=0,
    )
    text = answer.choices[0].message.content
    assert text is not None and text.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"regex": "[0-9]{3}-(ab|cd)"}, "[0-9]{3}-(ab|cd)"),
        ({"choice": ["yes", "no/maybe"]}, "yes|no/maybe"),
        ({"grammar": 'start: "a" DIGIT\nDIGIT: /[0-9]/'}, "a[0-9]"),
        ({"grammar": 'root ::= "x" [0-9] "y"'}, "x[0-9]y"),
        ({"json": {"type": "integer", "minimum": 10, "maximum": 99}}, "[1-9][0-9]"),
    ],
    ids=["regex", "choice", "lark", "gbnf", "json"],
)
def test_structured_outputs(client: OpenAI, wanted: dict[str, Any], pattern: str) -> None:
    for n, temperature in ((1, 0), (2, 1)):
        answer = client.chat.completions.create(
            **{**PLAIN, "temperature": temperature}, n=n, seed=1, extra_body={"structured_outputs": wanted}
        )
        for choice in answer.choices:
            assert choice.finish_reason == "stop" and re.fullmatch(pattern, choice.message.content or "")


@pytest.mark.parametrize(
    ("format", "param"),
    [
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ],
    ids=["regex", "grammar", "choice", "format"],
)
def test_what_no_answer_can_be(client: OpenAI, format: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**PLAIN, extra_body=format)
    assert caught.value.param == param
