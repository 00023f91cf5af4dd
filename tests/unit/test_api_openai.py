"""OpenAI bodies: what is read, what is refused and in which words, and the exact shape of what is answered."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers

from headrace.api.answers import Stamp, answer_body
from headrace.api.errors import error_body, status_of
from headrace.api.json import dump, read_object
from headrace.api.openai import INERT, MAX_CHOICES, NEUTRAL, ApiRequest, check_model, read_body, read_chat
from headrace.api.tokens import Offsets, TokenNames
from headrace.core.errors import (
    EngineError,
    InvalidJson,
    InvalidParameter,
    ModelNotFound,
    RequestError,
    UnknownParameter,
    UnsupportedParameter,
)
from headrace.core.types import SamplingParams, TokenLogprobs
from headrace.engine.answer import Completion
from headrace.text.tokenizer import Tokenizer, load_tokenizer
from tests.unit.batch_cases import write_tokenizer

USER = {"role": "user", "content": "Hi"}
STAMP = Stamp("0a1b", 1_700_000_000, "m", "fp_1")


@dataclass
class Folder:
    path: Path
    config: dict[str, object]
    format: str = "hf"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level: a token is a byte; ids 0 to 5 are special."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(Folder(folder, {}))  # type: ignore[arg-type]


def chat(**fields: object) -> ApiRequest:
    return read_body("chat", {"messages": [USER], **fields})


def text(**fields: object) -> ApiRequest:
    return read_body("completions", {"prompt": "a", **fields})


# ---------------------------------------------------------------- reading


def test_defaults_are_those_of_the_routes() -> None:
    assert chat().sampling == SamplingParams(max_tokens=None, temperature=1.0)
    assert text().sampling == SamplingParams(max_tokens=16, temperature=1.0)
    assert chat(max_tokens=3).sampling.max_tokens == 3
    assert chat(max_tokens=3, max_completion_tokens=5).sampling.max_tokens == 5
    assert chat(max_tokens=None, temperature=None, stop=None).sampling == chat().sampling


def test_every_sampling_field_arrives() -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": -1,
        "frequency_penalty": 0.5, "seed": -(2**63), "stop": ["a", "b"], "stop_token_ids": [5], "ignore_eos": True,
        "include_stop_str_in_output": True, "skip_special_tokens": False, "min_tokens": 2, "n": 3, "max_tokens": 9,
        "allowed_token_ids": [1, 2], "bad_words": ["x"], "typical_p": 0.5,
    }  # fmt: skip
    expected = SamplingParams(**fields, logit_bias={7: -100.0, 12: 3.0})  # type: ignore[arg-type]
    for request in (chat(**fields, logit_bias={"12": 3, "7": -100}), text(**fields, logit_bias={"12": 3, "7": -100})):
        assert request.sampling == expected
    assert text(stop="a").sampling.stop == ("a",)


def test_log_probabilities() -> None:
    assert chat().sampling.logprobs is None
    assert chat(logprobs=False).sampling.logprobs is None
    assert chat(logprobs=True).sampling.logprobs == 0
    assert chat(logprobs=True, top_logprobs=20).sampling.logprobs == 20
    assert text(logprobs=0).sampling.logprobs == 0
    assert text(logprobs=4).sampling.prompt_logprobs is None
    assert text(logprobs=4, echo=True).sampling.prompt_logprobs == 4
    assert text(logprobs=1, echo=True, prompt_logprobs=3).sampling.prompt_logprobs == 3
    assert text(echo=True, prompt_logprobs=0).prompt_logprobs == 0


@pytest.mark.parametrize(
    ("value", "prompts"),
    [
        ("a", ("a",)),
        ("", ("",)),
        (["a", "b"], ("a", "b")),
        ([5, 6], ((5, 6),)),
        ([[5], [6, 7]], ((5,), (6, 7))),
    ],
)
def test_prompt_forms(value: object, prompts: tuple[object, ...]) -> None:
    assert text(prompt=value).prompts == prompts


def test_stream_options() -> None:
    request = chat(stream=True, stream_options={"include_usage": True})
    assert (request.stream, request.stream_usage, request.continuous_usage) == (True, True, False)
    assert chat(stream=True, stream_options={"continuous_usage_stats": True}).continuous_usage
    assert not chat(stream=True, stream_options={"include_usage": None}).stream_usage


def test_inert_fields_change_nothing() -> None:
    for name in INERT:
        assert chat(**{name: {"k": "v"}}) == chat()
        assert text(**{name: "x"}) == text()


CHAT_ONLY = frozenset({"tools", "tool_choice", "parallel_tool_calls", "continue_final_message"})
"""Honoured in a chat, unsupported for a completion."""


@pytest.mark.parametrize("name", NEUTRAL)
def test_unsupported_fields_pass_only_where_they_ask_for_nothing(name: str) -> None:
    for read in (text,) if name in CHAT_ONLY else (chat, text):
        for value in NEUTRAL[name]:
            assert read(**{name: value}) == read()
        for value in ({"type": "function"}, "x", 7, [{"a": 1}]):
            with pytest.raises(UnsupportedParameter, match=f"^{name}: got "):
                read(**{name: value})


def test_template_variables() -> None:
    request = chat(chat_template_kwargs={"enable_thinking": False}, documents=[{"t": "d"}], add_generation_prompt=False)
    assert request.variables == {"enable_thinking": False, "documents": [{"t": "d"}], "add_generation_prompt": False}
    for fields in (
        {"chat_template": "{{ 1 }}"},
        {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        {"chat_template_kwargs": {"messages": []}},
        {"chat_template_kwargs": {"tools": []}},
        {"chat_template_kwargs": {"bos_token": "x"}},
    ):
        with pytest.raises(UnsupportedParameter, match=r"^chat_template"):
            chat(**fields)


def test_messages_keep_what_templates_read() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": "s", "name": "x"}, {"role": "user", "content": parts, "refusal": None}]
    request = read_chat({"messages": messages})
    assert request.prompts == (({"role": "system", "content": "s", "name": "x"}, {"role": "user", "content": parts}),)


BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 2.1}, "invalid_parameter", "temperature"),
    ({"temperature": "1"}, "invalid_parameter", "temperature"),
    ({"top_p": 0}, "invalid_parameter", "top_p"),
    ({"top_k": -2}, "invalid_parameter", "top_k"),
    ({"min_p": 1.5}, "invalid_parameter", "min_p"),
    ({"n": 0}, "invalid_parameter", "n"),
    ({"n": 129}, "invalid_parameter", "n"),
    ({"n": True}, "invalid_parameter", "n"),
    ({"best_of": 2}, "unsupported_parameter", "best_of"),
    ({"max_tokens": 0}, "invalid_parameter", "max_tokens"),
    ({"max_tokens": 1.0}, "invalid_parameter", "max_tokens"),
    ({"max_tokens": 4, "min_tokens": 5}, "invalid_parameter", "min_tokens"),
    ({"seed": 2**63}, "invalid_parameter", "seed"),
    ({"stop": ""}, "invalid_parameter", "stop"),
    ({"logit_bias": {"a": 1}}, "invalid_parameter", "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "invalid_parameter", "logit_bias"),
    ({"logit_bias": {"5": 101}}, "invalid_parameter", "logit_bias of token 5"),
    ({"logit_bias": [[5, 1]]}, "invalid_parameter", "logit_bias"),
    ({"logprobs": 21}, "invalid_parameter", "logprobs"),
    ({"prompt_logprobs": -1}, "invalid_parameter", "prompt_logprobs"),
    ({"stream": 1}, "invalid_parameter", "stream"),
    ({"stream_options": {"include_usage": True}}, "invalid_parameter", "stream_options"),
    ({"stream": True, "stream_options": {"x": 1}}, "unknown_parameter", "stream_options.x"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "invalid_parameter", "stream_options.include_usage"),
    ({"model": 5}, "invalid_parameter", "model"),
    ({"model": ""}, "invalid_parameter", "model"),
    ({"timeout": 0}, "invalid_parameter", "timeout"),
    ({"timeout": 10**400}, "invalid_parameter", "timeout"),
    ({"cache_salt": 5}, "invalid_parameter", "cache_salt"),
    ({"priority": "high"}, "invalid_parameter", "priority"),
    ({"response_format": {"type": "xml"}}, "invalid_parameter", "response_format.type"),
    ({"structured_outputs": {}}, "invalid_parameter", "structured_outputs"),
    ({"typical_p": 0}, "invalid_parameter", "typical_p"),
    ({"truncate_prompt_tokens": 0}, "invalid_parameter", "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "invalid_parameter", "truncate_prompt_tokens"),
    ({"guided_json": {}}, "unsupported_parameter", "guided_json"),
    ({"no_such": 1}, "unknown_parameter", "no_such"),
]


@pytest.mark.parametrize(("fields", "code", "field"), BAD_FIELDS, ids=lambda value: str(value)[:40])
def test_bad_fields_of_both_routes(fields: dict[str, Any], code: str, field: str) -> None:
    for kind, base in (("chat", {"messages": [USER]}), ("completions", {"prompt": "a"})):
        if kind == "chat" and "logprobs" in fields:
            continue
        with pytest.raises(RequestError) as caught:
            read_body(kind, {**base, **fields})  # type: ignore[arg-type]
        error = error_body(caught.value)["error"]
        assert (error["code"], error["param"], error["type"]) == (code, field, "invalid_request_error")
        assert len(json.dumps(error)) < 4096


BAD_MESSAGES: list[tuple[object, str, str | None]] = [
    (None, "invalid_parameter", "messages"),
    ([], "invalid_parameter", "messages"),
    ("hi", "invalid_parameter", "messages"),
    ([5], "invalid_parameter", "messages[0]"),
    ([{"content": "x"}], "invalid_parameter", "messages[0].role"),
    ([USER, {"role": "wizard", "content": "x"}], "invalid_parameter", "messages[1].role"),
    ([{"role": "function", "content": "x"}], "unsupported_parameter", "messages[0].role"),
    ([{"role": "tool", "content": "x"}], "invalid_parameter", "messages[0].tool_call_id"),
    ([{**USER, "tool_call_id": "x"}], "unsupported_parameter", "messages[0].tool_call_id"),
    ([{"role": "user"}], "invalid_parameter", "messages[0].content"),
    ([{"role": "user", "content": None}], "invalid_parameter", "messages[0].content"),
    ([{"role": "user", "content": []}], "invalid_parameter", "messages[0].content"),
    ([{"role": "user", "content": 5}], "invalid_parameter", "messages[0].content"),
    ([{"role": "user", "content": ["x"]}], "invalid_parameter", "messages[0].content[0]"),
    ([{"role": "user", "content": [{"type": "text"}]}], "invalid_parameter", "messages[0].content[0]"),
    ([{**USER, "content": [{"type": "image_url"}]}], "invalid_parameter", "messages[0].content[0]"),
    ([{**USER, "content": [{"type": "input_audio"}]}], "unsupported_parameter", "messages[0].content[0].type"),
    ([{**USER, "tool_calls": [{}]}], "unsupported_parameter", "messages[0].tool_calls"),
    ([{**USER, "colour": 1}], "unknown_parameter", "messages[0].colour"),
    ([{**USER, "name": 1}], "invalid_parameter", "messages[0].name"),
]


@pytest.mark.parametrize(("messages", "code", "field"), BAD_MESSAGES, ids=lambda value: str(value)[:40])
def test_bad_messages(messages: object, code: str, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_chat({"messages": messages})
    error = error_body(caught.value)["error"]
    assert (error["code"], error["param"]) == (code, field)


@pytest.mark.parametrize("prompt", [None, [], [[]], ["a", 5], [True], [[1], "a"], {"a": 1}, 5, [[1.0]]])
def test_bad_prompts(prompt: object) -> None:
    with pytest.raises(InvalidParameter, match=r"^prompt: got"):
        text(prompt=prompt)


def test_fields_of_the_other_route_are_refused() -> None:
    for kind, body in (
        ("chat", {"messages": [USER], "prompt": "a"}),
        ("chat", {"messages": [USER], "echo": True}),
        ("completions", {"prompt": "a", "messages": [USER]}),
        ("completions", {"prompt": "a", "top_logprobs": 2}),
        ("completions", {"prompt": "a", "max_completion_tokens": 2}),
    ):
        with pytest.raises((UnknownParameter, UnsupportedParameter)):
            read_body(kind, body)  # type: ignore[arg-type]
    with pytest.raises(InvalidParameter, match=r"^top_logprobs"):
        chat(top_logprobs=2)


def test_choices_are_bounded_before_anything_is_expanded() -> None:
    assert text(prompt=["a"] * 8, n=128).choices == MAX_CHOICES
    with pytest.raises(InvalidParameter, match=r"^n: got 128, allowed: prompts × n up to 1024"):
        text(prompt=["a"] * 9, n=128)


def test_model_names() -> None:
    assert check_model(chat(), ["m", "m.gguf"]) == "m"
    assert check_model(chat(model="m.gguf"), ["m", "m.gguf"]) == "m.gguf"
    with pytest.raises(ModelNotFound, match="got 'gpt-9', allowed: m"):
        check_model(chat(model="gpt-9"), ["m"])
    assert status_of("model_not_found") == 404


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    "line",
    [
        *("", "{", "[]", "5", '"a"', "nul", '{"a":NaN}', '{"a":1e999}', '{"a":1,"a":2}', "{} {}", "\x00"),
        *('{"a":' + "9" * 5000 + "}", "[" * 100_000, '{"a":' * 100_000, '{"a":"\n"}', '{"a":-Infinity}'),
    ],
    ids=lambda line: line[:12],
)
def test_bad_json(line: str) -> None:
    with pytest.raises(InvalidJson) as caught:
        read_object(line)
    assert len(str(caught.value)) < 200


def test_dumped_lines_hold_no_line_ends() -> None:
    value = {"a": "\u2028\u2029\x85\n\r\ud800é"}
    line = dump(value)
    assert line.isascii() and line.splitlines() == [line]
    assert json.loads(line) == value


# ---------------------------------------------------------------- answering


def completion(token_ids: list[int], said: str, choice: int = 0, **fields: Any) -> Completion:
    fields = {"prompt_token_ids": (10, 11), "finish_reason": "length", "cached_tokens": 1, **fields}
    return Completion(0, choice, token_ids=tuple(token_ids), text=said, **fields)


def scored(*pairs: tuple[int, float]) -> TokenLogprobs:
    """The first is the token that is there."""
    return TokenLogprobs(pairs[0][1], tuple(sorted(pairs, key=lambda pair: -pair[1])))


def test_chat_body(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hi")
    body = answer_body(chat(), STAMP, [completion(ids, "Hi")], tokenizer)
    assert body == {
        "id": "chatcmpl-0a1b",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "m",
        "system_fingerprint": "fp_1",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hi", "refusal": None, "reasoning": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 2,
            "total_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 1},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


def test_chat_log_probabilities(tokenizer: Tokenizer) -> None:
    h, i = tokenizer.encode("Hi")
    euro = tokenizer.encode("€")[0]
    told = (scored((h, -0.5), (i, -1.5), (euro, -2.0)), scored((i, -3.0), (h, float("-inf"))))
    one = completion([h, i], "Hi", logprobs=told, finish_reason="stop")
    request = chat(logprobs=True, top_logprobs=2, return_token_ids=True)
    choice = answer_body(request, STAMP, [one], tokenizer)["choices"][0]
    assert choice["logprobs"] == {
        "content": [
            {
                "token": "H",
                "logprob": -0.5,
                "bytes": [72],
                "top_logprobs": [
                    {"token": "H", "logprob": -0.5, "bytes": [72]},
                    {"token": "i", "logprob": -1.5, "bytes": [105]},
                ],
            },
            {
                "token": "i",
                "logprob": -3.0,
                "bytes": [105],
                "top_logprobs": [
                    {"token": "i", "logprob": -3.0, "bytes": [105]},
                    {"token": "H", "logprob": -9999.0, "bytes": [72]},
                ],
            },
        ],
        "refusal": None,
    }
    assert choice["token_ids"] == [h, i]
    bare = answer_body(chat(logprobs=True), STAMP, [one], tokenizer)["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in bare] == [[], []]


def test_choices_are_numbered_and_counted(tokenizer: Tokenizer) -> None:
    request = text(prompt=["a", "b"], n=2)
    answers = [completion([20] * (k + 1), f"t{k}", k % 2) for k in range(4)]
    body = answer_body(request, STAMP, answers, tokenizer, cached_tokens=False)
    assert [(one["index"], one["text"]) for one in body["choices"]] == [(k, f"t{k}") for k in range(4)]
    assert (body["id"], body["object"]) == ("cmpl-0a1b", "text_completion")
    # Two prompts of two tokens; 1 + 2 + 3 + 4 tokens of answers.
    assert body["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 10,
        "total_tokens": 14,
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_echo_with_log_probabilities(tokenizer: Tokenizer) -> None:
    """What lm-eval reads: arrays of prompt and answer, the first entry null, the likeliest always among the top."""
    a, b = tokenizer.encode("ab")
    prompt_scores = (None, scored((b, -4.0), (a, -0.25)))
    cut_off = TokenLogprobs(-4.0, ((a, -0.25),))
    one = completion([a], "a", prompt_token_ids=(a, b), prompt_logprobs=prompt_scores, logprobs=(scored((a, -1.0)),))
    choice = answer_body(text(prompt="ab", logprobs=1, echo=True), STAMP, [one], tokenizer)["choices"][0]
    assert choice["text"] == "aba"
    expected = {
        "tokens": ["a", "b", "a"],
        "token_logprobs": [None, -4.0, -1.0],
        "top_logprobs": [None, {"a": -0.25, "b": -4.0}, {"a": -1.0}],
        "text_offset": [0, 1, 2],
    }
    assert choice["logprobs"] == expected
    same = completion([a], "a", prompt_token_ids=(a, b), prompt_logprobs=(None, cut_off), logprobs=(scored((a, -1.0)),))
    body = answer_body(text(prompt=[[a, b]], logprobs=1, echo=True), STAMP, [same], tokenizer)
    assert body["choices"][0]["logprobs"] == expected


def test_prompt_log_probabilities(tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("ab")
    one = completion([a], "a", prompt_token_ids=(a, b), prompt_logprobs=(None, scored((b, -4.0), (a, -0.25))))
    expected = [
        None,
        {
            str(a): {"logprob": -0.25, "rank": 1, "decoded_token": "a"},
            str(b): {"logprob": -4.0, "rank": None, "decoded_token": "b"},
        },
    ]
    assert answer_body(chat(prompt_logprobs=1), STAMP, [one], tokenizer)["prompt_logprobs"] == expected
    body = answer_body(text(prompt_logprobs=1), STAMP, [one], tokenizer)
    assert body["choices"][0]["prompt_logprobs"] == expected


def test_names_of_pieces_of_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é€")
    names = TokenNames(tokenizer)
    assert [names.name(one) for one in ids] == [
        r"bytes:\xc3", r"bytes:\xa9", r"bytes:\xe2", r"bytes:\x82", r"bytes:\xac",
    ]  # fmt: skip
    assert b"".join(names.data(one) for one in ids).decode() == "é€"
    assert Offsets(tokenizer, True).push([*ids, *tokenizer.encode("a")]) == [0, 0, 1, 1, 1, 2]
    assert names.name(2) == "</s>"
    assert (names.name(100_000), names.data(100_000)) == ("token_id:100000", b"")
    assert TokenNames(tokenizer, as_ids=True).name(ids[0]) == f"token_id:{ids[0]}"
    assert TokenNames(None).name(7) == "token_id:7"


def test_names_of_tokens_that_begin_with_a_space(tmp_path: Path) -> None:
    """A token is named as it stands inside a text, where it keeps its space; `<0xE2>` is a byte."""
    raw = RawTokenizer(models.BPE({"<unk>": 0, "▁a": 1, "a": 2, "<0xE2>": 3}, [], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(parts)
    raw.save(str(tmp_path / "tokenizer.json"))
    names = TokenNames(load_tokenizer(Folder(tmp_path, {})))  # type: ignore[arg-type]
    assert [names.name(one) for one in (1, 2, 3)] == [" a", "a", r"bytes:\xe2"]
    assert names.data(3) == b"\xe2"


def test_an_ending_no_client_knows_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(EngineError, match="abort"):
        answer_body(chat(), STAMP, [completion([1], "", finish_reason="abort")], tokenizer)


def test_many_keys_one_of_them_twice_are_read_in_one_pass() -> None:
    names = [*(f"k{i}" for i in range(200_000)), "k199999"]
    with pytest.raises(InvalidJson, match="'k199999' is there twice"):
        read_object("{" + ",".join(f'"{name}":1' for name in names) + "}")


def test_error_body_is_short() -> None:
    error = error_body(UnknownParameter("x" * 10_000, "this body"))["error"]
    assert error["code"] == "unknown_parameter" and len(json.dumps(error)) < 400
    assert status_of("nan_logits") == 500 and status_of("no such code") == 500
