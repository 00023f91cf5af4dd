"""Chat bodies with tools: what is read, what is refused, what is left aside, and what the engine is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import pydantic_function_tool
from openai.types.chat import ChatCompletionMessage
from pydantic import BaseModel, TypeAdapter

from headrace.api.errors import error_body
from headrace.api.json import dump
from headrace.api.openai import ApiRequest, call_parsers, engine_requests, read_body
from headrace.api.tool_parsers import CallArguments, CallStart, TextPart
from headrace.api.tools import MAX_TOOLS, ToolChoice, ToolSpec
from headrace.core.errors import RequestError, UnknownParameter
from headrace.core.types import FinishEvent, FinishReason, Request, TokenEvent
from headrace.engine.answer import Answer
from headrace.testing.checkpoints import tiny_checkpoint
from tests.unit.batch_cases import FakeModel, fake_model, write_tokenizer

USER = {"role": "user", "content": "Hi"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get", "description": "Weather.", "parameters": SCHEMA}}
OTHER = {"type": "function", "function": {"name": "add-2"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get", "arguments": '{"city": "Oslo"}'}}
ASKED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOLD = {"role": "tool", "tool_call_id": "call_1", "content": "rain"}


def chat(strict: bool = True, **fields: object) -> ApiRequest:
    return read_body("chat", {"messages": [USER], **fields}, strict)


def test_tools_are_read() -> None:
    request = chat(tools=[TOOL, OTHER])
    assert request.tools == (
        ToolSpec("get", "Weather.", SCHEMA),
        ToolSpec("add-2", None, {"type": "object", "properties": {}}),
    )
    assert request.tools[0].described() == TOOL
    assert request.tools[1].described()["function"] == {
        "name": "add-2", "parameters": {"type": "object", "properties": {}},
    }  # fmt: skip
    assert (request.tool_choice, request.parallel_tool_calls) == (ToolChoice("auto"), True)
    assert chat(tools=[TOOL], parallel_tool_calls=False).parallel_tool_calls is False
    assert chat(tools=[{"function": {**TOOL["function"], "strict": True}}]).tools[0].strict  # type: ignore[dict-item]


def test_tool_choices() -> None:
    named = {"type": "function", "function": {"name": "add-2"}}
    for value, choice in (
        (None, ToolChoice("auto")),
        ("auto", ToolChoice("auto")),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        (named, ToolChoice("named", "add-2")),
    ):
        assert chat(tools=[TOOL, OTHER], tool_choice=value).tool_choice == choice
    for value in (None, "auto", "none"):
        assert chat(tool_choice=value) == chat(tools=[], tool_choice=value) == chat()


def named(name: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name}}


FUNCTION: dict[str, Any] = {"name": "get"}
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": {}}, "invalid_parameter", "tools"),
    ({"tools": [5]}, "invalid_parameter", "tools[0]"),
    ({"tools": [TOOL] * (MAX_TOOLS + 1)}, "invalid_parameter", "tools"),
    ({"tools": [{"type": "function"}]}, "invalid_parameter", "tools[0].function"),
    ({"tools": [{"type": "custom", "custom": {}}]}, "unsupported_parameter", "tools[0].type"),
    ({"tools": [{"type": 5}]}, "invalid_parameter", "tools[0].type"),
    ({"tools": [{**TOOL, "colour": 1}]}, "unknown_parameter", "tools[0].colour"),
    ({"tools": [TOOL, TOOL]}, "invalid_parameter", "tools[1].function.name"),
    *(
        ({"tools": [named(name)]}, "invalid_parameter", "tools[0].function.name")
        for name in (None, 5, "", "a b", "é", "a\n", "a" * 65, '"')
    ),
    *(
        ({"tools": [{"function": {**FUNCTION, key: value}}]}, code, f"tools[0].function.{key}")
        for key, value, code in (
            ("description", 5, "invalid_parameter"),
            ("strict", "yes", "invalid_parameter"),
            ("colour", 1, "unknown_parameter"),
            ("parameters", [], "invalid_parameter"),
            ("parameters", {"type": "string"}, "invalid_parameter"),
        )
    ),
    ({"tool_choice": "required"}, "invalid_parameter", "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "any"}, "invalid_parameter", "tool_choice"),
    ({"tools": [TOOL], "tool_choice": 5}, "invalid_parameter", "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {}}, "invalid_parameter", "tool_choice.type"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "unsupported_parameter", "tool_choice.type"),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "invalid_parameter", "tool_choice.function"),
    ({"tools": [TOOL], "tool_choice": named("x")}, "invalid_parameter", "tool_choice.function.name"),
    ({"tools": [TOOL], "parallel_tool_calls": 1}, "invalid_parameter", "parallel_tool_calls"),
    ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "invalid_parameter", "response_format"),
    ({"tools": [TOOL], "structured_outputs": {"regex": "a"}}, "invalid_parameter", "structured_outputs"),
    ({"functions": [FUNCTION]}, "unsupported_parameter", "functions"),
    ({"function_call": {"name": "get"}}, "unsupported_parameter", "function_call"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "invalid_parameter", "add_generation_prompt"),
    ({"messages": [USER, {**ASKED, "tool_calls": [5]}]}, "invalid_parameter", "messages[1].tool_calls[0]"),
    ({"messages": [USER, {**ASKED, "tool_calls": "x"}]}, "invalid_parameter", "messages[1].tool_calls"),
    ({"messages": [USER, {**ASKED, "tool_calls": []}]}, "invalid_parameter", "messages[1].content"),
    ({"messages": [{**TOLD, "tool_call_id": 5}]}, "invalid_parameter", "messages[0].tool_call_id"),
    ({"messages": [{**TOLD, "content": None}]}, "invalid_parameter", "messages[0].content"),
]
BAD_CALLS: list[tuple[dict[str, Any], str, str]] = [
    ({"id": None}, "invalid_parameter", "id"),
    ({"id": ""}, "invalid_parameter", "id"),
    ({"type": "custom"}, "unsupported_parameter", "type"),
    ({"function": None}, "invalid_parameter", "function"),
    ({"colour": 1}, "unknown_parameter", "colour"),
    ({"function": {"arguments": "{}"}}, "invalid_parameter", "function.name"),
    *(
        ({"function": {"name": "get", "arguments": arguments}}, "invalid_parameter", "function.arguments")
        for arguments in ("{", "[]", "5", "NaN", '{"a":NaN}', "[" * 100_000, '{"a":' * 100 + "1" + "}" * 100, [1])
    ),
]
BAD += [
    ({"messages": [USER, {**ASKED, "tool_calls": [{**CALL, **change}]}]}, code, f"messages[1].tool_calls[0].{field}")
    for change, code, field in BAD_CALLS
]


@pytest.mark.parametrize(("fields", "code", "field"), BAD, ids=lambda value: ascii(value)[:60])
def test_bad_fields(fields: dict[str, Any], code: str, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    error = error_body(caught.value)["error"]
    assert (error["code"], error["param"]) == (code, field)
    assert len(dump(error)) < 4096


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"messages": [USER, {**USER, "content": "é\ud800"}]}, "messages[1].content"),
        ({"messages": [{**USER, "content": [{"type": "text", "text": "\udfff"}]}]}, "messages[0].content[0].text"),
        ({"metadata": {"a": ["\ud800"]}}, "metadata.a[0]"),
        ({"stop": ["a", "\udfff"]}, "stop[1]"),
        ({"\ud800": 1}, "body"),
        ({"tools": [{"function": {"name": "get", "parameters": {"\ud800": 1}}}]}, "tools[0].function.parameters"),
        (
            {
                "messages": [
                    {**ASKED, "tool_calls": [{**CALL, "function": {"name": "g", "arguments": '{"a":"\\ud800"}'}}]}
                ]
            },
            "messages[0].tool_calls[0].function.arguments.a",
        ),
    ],
)
def test_lone_surrogates_are_refused_wherever_they_stand(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(strict=False, **fields)
    assert str(caught.value).startswith(f"{path}: a lone surrogate (U+D") and caught.value.status == 400


def test_nesting_is_bounded() -> None:
    deep: dict[str, Any] = {"type": "object"}
    for _ in range(200):
        deep = {"type": "object", "properties": {"a": deep}}
    with pytest.raises(RequestError, match=r"tools\[0\].function.parameters: got .* up to 64 deep"):
        chat(tools=[{"function": {"name": "get", "parameters": deep}}])


def test_tool_history() -> None:
    parts = [{"type": "text", "text": "rain"}, {"type": "text", "text": "4 °C"}]
    messages = [USER, ASKED, {**TOLD, "content": parts, "name": "get"}]
    call = {**CALL, "function": {"name": "get", "arguments": {"city": "Oslo"}}}
    assert chat(messages=messages).prompts[0] == (
        USER,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain\n4 °C", "name": "get"},
    )
    for arguments in (None, "", {}, "{}"):
        bare = {**CALL, "index": 0, "function": {"name": "get", "arguments": arguments}}
        (message,) = chat(messages=[{**ASKED, "content": "", "tool_calls": [bare]}]).prompts[0]
        assert message["content"] == "" and message["tool_calls"][0]["function"]["arguments"] == {}  # type: ignore[index]


def test_what_openai_python_sends() -> None:
    class Weather(BaseModel):
        """The weather of a city."""

        city: str

    tool = pydantic_function_tool(Weather, name="get")
    request = chat(tools=[tool], tool_choice={"type": "function", "function": {"name": "get"}})
    assert request.tools[0].strict and request.tools[0].parameters["required"] == ["city"]
    # An answer of ours, put back into the conversation as its users do.
    answer = TypeAdapter(ChatCompletionMessage).validate_python({**ASKED, "refusal": None, "reasoning": None})
    message = json.loads(answer.model_dump_json())
    assert chat(messages=[USER, message, TOLD]).prompts == chat(messages=[USER, ASKED, TOLD]).prompts


UNKNOWN: dict[str, Any] = {
    "colour": 1,
    "a b\né": 1,
    "messages": [
        {**USER, "mood": 1, "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "x"}}]},
        {**ASKED, "tool_calls": [{**CALL, "size": 1, "function": {**CALL["function"], "x": 1}}]},  # type: ignore[dict-item]
    ],
    "tools": [{**TOOL, "y": 1, "function": {**TOOL["function"], "z": 1}}],  # type: ignore[dict-item]
    "tool_choice": {**named("get"), "w": 1},
    "stream": True,
    "stream_options": {"include_usage": True, "v": 1},
}
NAMED = {
    *("colour", "a?b??", "messages[0].mood", "messages[0].content[0].cache_control", "messages[1].tool_calls[0].size"),
    *("messages[1].tool_calls[0].function.x", "tools[0].y", "tools[0].function.z", "tool_choice.w", "stream_options.v"),
}


def test_unknown_fields_are_left_aside_and_named() -> None:
    request = chat(strict=False, **UNKNOWN)
    assert set(request.ignored) == NAMED and len(request.ignored) == len(NAMED)
    known = chat(
        messages=[{**USER, "content": [{"type": "text", "text": "Hi"}]}, ASKED],
        tools=[TOOL], tool_choice=named("get"), stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    assert request.prompts == known.prompts and request.tools == known.tools and request.stream_usage
    with pytest.raises(UnknownParameter):
        chat(**UNKNOWN)
    assert len(chat(strict=False, **{f"x{i}": 1 for i in range(1000)}).ignored) == 32
    assert len(chat(strict=False, **{"x" * 10_000: 1}).ignored[0]) <= 64
    # Unsupported stays so: what would change the answer is not ignored.
    with pytest.raises(RequestError, match="guided_json"):
        chat(strict=False, guided_json={})
    assert read_body("completions", {"prompt": "a", "colour": 1}, strict=False).ignored == ("colour",)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["function", "get", "{}"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "function", "name", "arguments", "parameters", "id", "x"]), inner)
    ),
    max_leaves=12,
)


@given(st.fixed_dictionaries({}, optional={"tools": JSON, "tool_choice": JSON, "messages": JSON}), JSON, st.booleans())
def test_any_tools_are_read_or_refused(fields: dict[str, Any], calls: object, strict: bool) -> None:
    messages = [USER, {"role": "assistant", "tool_calls": calls, "content": "x"}]
    try:
        chat(strict, **{"messages": messages, **fields})
    except RequestError as error:
        assert len(dump(error_body(error))) < 4096


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(
    [
        *(
            "messages",
            "prompt",
            "model",
            "temperature",
            "n",
            "stop",
            "logit_bias",
            "logprobs",
            "top_logprobs",
            "stream",
        ),
        *("stream_options", "chat_template_kwargs", "documents", "echo", "seed", "max_tokens", "bad_words", "tools"),
        *("tool_choice", "response_format", "structured_outputs", "truncate_prompt_tokens", "continue_final_message"),
    ]
)


@given(st.dictionaries(NAMES | st.text(), ANY_JSON, max_size=6), st.sampled_from(["chat", "completions"]))
def test_any_body_is_read_or_refused(fields: dict[str, Any], kind: Any) -> None:
    base: dict[str, Any] = {"messages": [USER]} if kind == "chat" else {"prompt": "a"}
    try:
        read_body(kind, {**base, **fields})
    except RequestError as error:
        assert len(dump(error_body(error))) < 4096


# ---------------------------------------------------------------- to the engine


def write_model(folder: Path) -> Path:
    return tiny_checkpoint(folder, vocab_size=write_tokenizer(folder), eos_token_id=2, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeModel]:
    """Its template knows no tools."""
    model = fake_model(write_model(tmp_path_factory.mktemp("model")))
    yield model
    model.close()


def ask(opened: FakeModel, **fields: object) -> tuple[Request, ...]:
    return engine_requests(chat(**fields), opened, "r")


def shown(opened: FakeModel, **fields: object) -> str:
    return opened.tokenizer.decode(ask(opened, **fields)[0].token_ids, skip_special_tokens=False)


def test_tools_are_shown_to_any_model(opened: FakeModel) -> None:
    text = shown(opened, tools=[TOOL], messages=[USER, ASKED, TOLD])
    assert text.startswith("<|system|>") and json.dumps(TOOL["function"]) in text
    assert '<tool_call>\n{"name": "get", "arguments": {"city": "Oslo"}}\n</tool_call></s>' in text
    assert text.endswith("<|user|><tool_response>\nrain\n</tool_response></s><|assistant|>")
    assert shown(opened, tools=[TOOL], tool_choice="none") == shown(opened) == "<|user|>Hi</s><|assistant|>"


def test_required_calls_have_a_grammar(opened: FakeModel) -> None:
    assert ask(opened, tools=[TOOL])[0].grammar == ""
    required = ask(opened, tools=[TOOL], tool_choice="required", n=3)
    assert len(required) == 3 and all("<tool_call>" in one.grammar for one in required)
    request = chat(tools=[TOOL], tool_choice=named("get"))
    assert "[TOOL_CALLS]" in engine_requests(request, opened, "r", tool_parser="mistral")[0].grammar
    free = ask(opened, tools=[TOOL], tool_choice="none", response_format={"type": "json_object"})
    assert free[0].grammar.startswith("start: %json")
    body = {"prompt": "a", "structured_outputs": {"regex": "a+"}}
    assert engine_requests(read_body("completions", body), opened, "r")[0].grammar == "start: /a+/"


def test_a_final_message_is_continued(opened: FakeModel) -> None:
    messages = [USER, {"role": "assistant", "content": "Well, "}]
    assert shown(opened, messages=messages, continue_final_message=True) == "<|user|>Hi</s><|assistant|>Well, "
    assert shown(opened, messages=messages, continue_final_message=False).endswith("Well, </s><|assistant|>")


def test_prompts_are_cut_at_their_start(opened: FakeModel) -> None:
    body = {"prompt": ["abcdef", "xy"], "truncate_prompt_tokens": 3, "max_tokens": 4}
    found = engine_requests(read_body("completions", body), opened, "r")
    assert [opened.tokenizer.decode(one.token_ids) for one in found] == ["def", "xy"]
    body = {"prompt": "a" * 5000, "truncate_prompt_tokens": -1, "max_tokens": 96}
    assert len(engine_requests(read_body("completions", body), opened, "r")[0].token_ids) == 4000
    with pytest.raises(RequestError, match="truncate_prompt_tokens"):
        read_body("completions", {**body, "echo": True})


def test_special_markers_of_a_model(tmp_path: Path) -> None:
    """They are in the grammar as tokens, and in the text wherever a call stands: the parser has to see them."""
    from tokenizers import Tokenizer as RawTokenizer

    folder = write_model(tmp_path)
    raw = RawTokenizer.from_file(str(folder / "tokenizer.json"))
    # Two of the special tokens are renamed, so that the vocabulary keeps its size.
    text = raw.to_str().replace("<|user|>", "[TOOL_CALLS]").replace("<|system|>", "[ARGS]")
    (folder / "tokenizer.json").write_text(text)
    model = fake_model(folder)
    try:
        request = chat(tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
        asked = engine_requests(request, model, "r", tool_parser="mistral")[0]
        other = engine_requests(request, model, "r", tool_parser="hermes")[0]
        free = engine_requests(chat(tools=[TOOL]), model, "r", tool_parser="mistral")[0]
        none = engine_requests(chat(tools=[TOOL], tool_choice="none"), model, "r", tool_parser="mistral")[0]
        said = [*model.tokenizer.encode("Wait."), 3, *model.tokenizer.encode("get"), 5]
        said += [*model.tokenizer.encode('{"city": "Oslo"}'), 2]
        answer = Answer(0, free, model.tokenizer, 0.0)
        answer.tokens(TokenEvent("r", tuple(said), (), 1.0))
        text = answer.end(FinishEvent("r", FinishReason.STOP, 1, len(said), 0, 1.0)).text
    finally:
        model.close()
    assert "<[3]> tool" in asked.grammar and '"get" <[5]> args_0' in asked.grammar
    assert other.grammar != asked.grammar
    assert [one.sampling.skip_special_tokens for one in (asked, free, other, none)] == [False, False, True, True]
    parsers = call_parsers(chat(tools=[TOOL]), model, "mistral")
    assert parsers is not None
    parts = [*parsers[0].push(text), *parsers[0].finish()]
    assert "".join(part.text for part in parts if isinstance(part, TextPart)) == "Wait."
    assert [part for part in parts if not isinstance(part, TextPart)] == [
        CallStart(0, "get"),
        CallArguments(0, '{"city": "Oslo"}'),
    ]
