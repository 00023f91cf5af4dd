"""Tool calls in a model's text: which they are, and that it does not matter how the text was cut."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.api.tool_parsers import CallArguments, CallStart, Part, TextPart, make_parser
from headrace.api.tools import ToolChoice, ToolSpec
from headrace.core.errors import InvalidParameter

TOOLS = [ToolSpec("get"), ToolSpec("get_time"), ToolSpec("add-2")]
AUTO = ToolChoice("auto")
STYLES = ("hermes", "llama3", "mistral")


def join(parts: list[Part]) -> tuple[str, list[tuple[str, str]]]:
    """(text, calls as name and arguments), with what must hold of any parts."""
    text: list[str] = []
    calls: list[list[str]] = []
    for part in parts:
        if isinstance(part, TextPart):
            assert part.text
            text.append(part.text)
        elif isinstance(part, CallStart):
            assert part.index == len(calls)
            calls.append([part.name, ""])
        else:
            assert part.text and part.index == len(calls) - 1
            calls[-1][1] += part.text
    return "".join(text), [(name, arguments) for name, arguments in calls]


def order(parts: list[Part]) -> list[tuple[str, int, str]]:
    """The parts, with neighbours of one kind joined."""
    found: list[tuple[str, int, str]] = []
    for part in parts:
        kind = type(part).__name__
        index = -1 if isinstance(part, TextPart) else part.index
        value = part.name if isinstance(part, CallStart) else part.text
        if found and found[-1][:2] == (kind, index) and kind != "CallStart":
            found[-1] = (kind, index, found[-1][2] + value)
        else:
            found.append((kind, index, value))
    return found


def run(style: str, pieces: list[str], choice: ToolChoice = AUTO, parallel: bool = True) -> list[Part]:
    parser = make_parser(style, TOOLS, choice, parallel)
    parts = [part for piece in pieces for part in parser.push(piece)]
    return parts + parser.finish()


def read(style: str, text: str, **kwargs: object) -> tuple[str, list[tuple[str, str]]]:
    return join(run(style, [text], **kwargs))  # type: ignore[arg-type]


H = '<tool_call>\n{"name": "get", "arguments": {"city": "Oslo"}}\n</tool_call>'
GET = ("get", '{"city": "Oslo"}')

HERMES = [
    (H, "", [GET]),
    (f"\n{H}\n", "", [GET]),
    (f"Let me look.\n{H}", "Let me look.", [GET]),
    (f"{H}\n{H}", "", [GET, GET]),
    (f"a\n{H}\nand\n{H}\nb ", "a\nand\nb ", [GET, GET]),
    (H.replace("\n</tool_call>", ""), "", [GET]),
    (H.replace("}}\n", "}\n"), "", [GET]),
    (H[: H.index("</tool")] + "</tool", "", [GET]),
    ('<tool_call>{"name":"get"}</tool_call>', "", [("get", "{}")]),
    ('<tool_call>{"name":"get","arguments":null}</tool_call>', "", [("get", "{}")]),
    ('<tool_call>{"arguments": {"a" : [1, 2]}, "name": "get"}</tool_call>', "", [("get", '{"a" : [1, 2]}')]),
    ('<tool_call>{"type":"function","name":"get","parameters":{},"n":[1,"]"]}</tool_call>', "", [("get", "{}")]),
    ('<tool_call>{"name":"\\u0067et","arguments":{"a":"}\\"</tool_call>{"}}</tool_call>', "",
     [("get", '{"a":"}\\"</tool_call>{"}')]),
    ('<tool_call>{"name": "get", "arguments": {"a": 1', "", [("get", '{"a": 1')]),
    ('<tool_call>{"name": "get", "arguments": {"a": "x\\', "", [("get", '{"a": "x\\')]),
    ('<tool_call>{"name": "get", "arguments": {} ?? x', "?? x", [("get", "{}")]),
    # What is no call is text, to the letter.
    ("plain <text> \n", "plain <text> \n", []),
    ("  ", "  ", []),
    ("", "", []),
    ("a <tool_cal", "a <tool_cal", []),
    ("<tool_call>", "<tool_call>", []),
    ("</tool_call>", "</tool_call>", []),
    ("<tool_call> no </tool_call> ", "<tool_call> no </tool_call> ", []),
    ('<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
     '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', []),
    ('<tool_call>{"arguments": {"a": 1}}</tool_call>', '<tool_call>{"arguments": {"a": 1}}</tool_call>', []),
    ('<tool_call>{"name": "get", "arguments": "{}"}', '<tool_call>{"name": "get", "arguments": "{}"}', []),
    ('<tool_call>{"name": "get", "arguments": [1]}', '<tool_call>{"name": "get", "arguments": [1]}', []),
    ('<tool_call>{"name": "get", "arguments": 5}', '<tool_call>{"name": "get", "arguments": 5}', []),
    ('<tool_call>{"name": 5, "arguments": {}}', '<tool_call>{"name": 5, "arguments": {}}', []),
    ('<tool_call>{"name": "get", "argum', '<tool_call>{"name": "get", "argum', []),
    ('<tool_call>{"na\nme": "get"}', '<tool_call>{"na\nme": "get"}', []),
    ("<tool_call>{}", "<tool_call>{}", []),
    ("<tool_call>{,}", "<tool_call>{,}", []),
    ('<tool_call>{"name" "get"}', '<tool_call>{"name" "get"}', []),
    ('<tool_call>{"k":}', '<tool_call>{"k":}', []),
    (f"<tool_call>oops {H}", "<tool_call>oops", [GET]),
    (f"<tool_call>{H}", "<tool_call>", [GET]),
    (f'{H}\n<tool_call>{{"name": "ge', '\n<tool_call>{"name": "ge', [GET]),
]  # fmt: skip

L = '{"name": "get", "parameters": {"city": "Oslo"}}'
LLAMA3 = [
    (L, "", [GET]),
    (f"\n<|python_tag|>{L} ", "", [GET]),
    (f"{L}; {L}", "", [GET, GET]),
    (f"{L}\n{L}", "", [GET, GET]),
    (f"{L};", "", [GET]),
    (L.replace("parameters", "arguments"), "", [GET]),
    ('{"type": "function", "name": "get_time", "parameters": {}}', "", [("get_time", "{}")]),
    ('{"name": "get", "parameters": {"a": ', "", [("get", '{"a": ')]),
    (f"{L} done", " done", [GET]),
    (f"{L}; no {L}", f"; no {L}", [GET]),
    (f"Sure: {L}", f"Sure: {L}", []),
    ('{"name": "Bob", "age": 5}\n', '{"name": "Bob", "age": 5}\n', []),
    ('{"name": "get"', '{"name": "get"', []),
    ("<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("<|python", "<|python", []),
    ("  hello ", "  hello ", []),
]

M = '{"name": "get", "arguments": {"city": "Oslo"}}'
MISTRAL = [
    (f"[TOOL_CALLS] [{M}]", "", [GET]),
    (f"[TOOL_CALLS][{M}, {M}]", "", [GET, GET]),
    (f"Hm. [TOOL_CALLS] [ {M} ,\n{M} ] ", "Hm.", [GET, GET]),
    (f"[{M}]", "", [GET]),
    ('[TOOL_CALLS]get[ARGS]{"city": "Oslo"}', "", [GET]),
    ('[TOOL_CALLS]get{"city": "Oslo"}', "", [GET]),
    ('[TOOL_CALLS]get[CALL_ID]abc123DEF[ARGS]{"city": "Oslo"}', "", [GET]),
    ('[TOOL_CALLS]get[ARGS]{"city": "Oslo"}[TOOL_CALLS]get_time[ARGS]{}', "", [GET, ("get_time", "{}")]),
    ('get{"city": "Oslo"}add-2{"a": 1}', "", [GET, ("add-2", '{"a": 1}')]),
    ('Hm.[TOOL_CALLS]get[ARGS]{"city": "Os', "Hm.", [("get", '{"city": "Os')]),
    (f"[TOOL_CALLS] [{M}, ", "", [GET]),
    (f"[TOOL_CALLS] [{M}, x", ", x", [GET]),
    (f"[TOOL_CALLS] [{M}] then", " then", [GET]),
    ("[TOOL_CALLS] []", "[TOOL_CALLS] []", []),
    ("[TOOL_CALLS]unknown[ARGS]{}", "[TOOL_CALLS]unknown[ARGS]{}", []),
    ("[TOOL_CALLS]get[ARG]{}", "[TOOL_CALLS]get[ARG]{}", []),
    ("[TOOL_CALLS]get", "[TOOL_CALLS]get", []),
    ("[TOOL_CALLS] hello", "[TOOL_CALLS] hello", []),
    ("[1, 2, 3]", "[1, 2, 3]", []),
    ("get the weather {now}", "get the weather {now}", []),
    ("[TOOL", "[TOOL", []),
    ("a [TOOL_CALLS", "a [TOOL_CALLS", []),
    (" Hello [x]. ", " Hello [x]. ", []),
    ("[TOOL_CALLS]get[" + "x" * 200 + "{}", "[TOOL_CALLS]get[" + "x" * 200 + "{}", []),
]
CASES = [*(("hermes", *one) for one in HERMES), *(("llama3", *one) for one in LLAMA3)]
CASES += [("mistral", *one) for one in MISTRAL]


@pytest.mark.parametrize(("style", "text", "said", "calls"), CASES)
def test_calls_and_text(style: str, text: str, said: str, calls: list[tuple[str, str]]) -> None:
    assert read(style, text) == (said, calls)
    assert order(run(style, list(text))) == order(run(style, [text]))


def test_arguments_come_as_they_are_written() -> None:
    """A call is told with the first character of its arguments, and they follow one by one."""
    for style, before, after in (
        ("hermes", '<tool_call>\n{"name": "get", "arguments": ', "}\n</tool_call>"),
        ("llama3", '{"name": "get", "parameters": ', "}"),
        ("mistral", '[TOOL_CALLS] [{"name": "get", "arguments": ', "}]"),
        ("mistral", "[TOOL_CALLS]get[ARGS]", ""),
    ):
        parser = make_parser(style, TOOLS, AUTO)
        assert parser.push(before) == []
        assert parser.push("{") == [CallStart(0, "get"), CallArguments(0, "{")]
        for char in '"a" :\n"é}\\""}':
            assert parser.push(char) == [CallArguments(0, char)]
        assert parser.push(after) + parser.finish() == []


def test_text_is_told_at_once_but_for_what_may_be_a_marker() -> None:
    parser = make_parser("hermes", TOOLS, AUTO)
    assert parser.push("a <b> c<tool_") == [TextPart("a <b> c")]
    assert parser.push("box> ") == [TextPart("<tool_box>")]
    assert parser.push("d") == [TextPart(" d")]
    parser = make_parser("llama3", TOOLS, AUTO)
    assert parser.push("Hello") == [TextPart("Hello")]
    parser = make_parser("mistral", TOOLS, AUTO)
    assert parser.push("ge") == []
    assert parser.push("neral") == [TextPart("general")]


def test_choices() -> None:
    assert read("hermes", H, choice=ToolChoice("none")) == (H, [])
    assert read("hermes", H, choice=ToolChoice("required")) == ("", [GET])
    assert read("hermes", H, choice=ToolChoice("named", "get")) == ("", [GET])
    assert read("hermes", H, choice=ToolChoice("named", "get_time")) == (H, [])
    assert read("hermes", H + H + "x" + H, parallel=False) == ("x", [GET])
    with pytest.raises(InvalidParameter, match="hermes, llama3, mistral"):
        make_parser("xml", TOOLS, AUTO)


PIECES = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<tool_", "call>", "<", "</", "[TOOL_CALLS]", "[TOOL", "_CALLS]", "[ARGS]"),
        *("[CALL_ID]", "<|python_tag|>", "<|py", ";", ",", ":", "{", "}", "[", "]", '"', "\\", '\\"', "\\u0041", " "),
        *("\n", "\t", "get", "get_time", "add-2", "un", '"name"', '"arguments"', '"parameters"', "null", "-1.5e3"),
        *('{"name": "get", "arguments": ', '"name": "get"', H, L, M, f"[TOOL_CALLS] [{M}", "é\u2028", "x", "\ud800"),
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=3), max_size=25).map("".join)


@given(st.sampled_from(STYLES), TEXTS, st.lists(st.integers(0, 400), max_size=12), st.booleans())
@example("hermes", "<tool_call>" * 3 + '{"a":[' * 3, [1, 12, 30], True)
def test_parts_do_not_depend_on_how_the_text_was_cut(style: str, text: str, cuts: list[int], parallel: bool) -> None:
    whole = order(run(style, [text], parallel=parallel))
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    assert order(run(style, pieces, parallel=parallel)) == whole
    assert order(run(style, list(text), parallel=parallel)) == whole


@given(st.sampled_from(STYLES), TEXTS)
def test_without_calls_the_text_is_the_text(style: str, text: str) -> None:
    said, calls = read(style, text)
    if not calls:
        assert said == text
    if "get" not in text and "add-2" not in text and "\\u" not in text:
        assert not calls


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(st.tuples(st.sampled_from([tool.name for tool in TOOLS]), st.dictionaries(st.text(), JSON)), min_size=1),
    st.sampled_from([None, 2]),
    st.booleans(),
)
def test_calls_come_back_as_they_were_written(
    calls: list[tuple[str, dict[str, object]]], indent: int | None, ascii_only: bool
) -> None:
    spelled = [(name, json.dumps(arguments, indent=indent, ensure_ascii=ascii_only)) for name, arguments in calls]
    objects = {
        key: [f'{{"name": "{name}", "{key}": {arguments}}}' for name, arguments in spelled]
        for key in ("arguments", "parameters")
    }
    tags = [f"<tool_call>\n{one}\n</tool_call>" for one in objects["arguments"]]
    for style, text in (
        ("hermes", "\n".join(tags)),
        ("llama3", "; ".join(objects["parameters"])),
        ("mistral", f"[TOOL_CALLS] [{', '.join(objects['arguments'])}]"),
        ("mistral", "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in spelled)),
    ):
        assert read(style, text) == ("", spelled)


HOSTILE = [
    *("<", "<tool_call>", '<tool_call>{"a":[', '<tool_call>{"', '<tool_call>{"name":"get","x":', "{", '"', "\\", " "),
    *("[TOOL_CALLS]", "[TOOL_CALLS]get[", "[TOOL_CALLS][", "get", "[[", "<|python_tag|>", "[TOOL_CALLS]get[ARGS]{}"),
    *('{"name":"get","parameters":{}};', H, "[TOOL_CALLS] [" + M + "]", "<tool_call>\n", "<tool_call>{"),
]


@pytest.mark.parametrize("piece", HOSTILE, ids=lambda piece: piece[:24])
def test_time_is_linear(piece: str) -> None:
    """A megabyte of it, whole and in small pieces, takes seconds at most; something quadratic would take hours."""
    text = piece * (2**20 // len(piece))
    small = text[: 2**15]
    for style in STYLES:
        began_s = time.process_time()
        assert run(style, [text])
        assert time.process_time() - began_s < 10
        assert order(run(style, [small[i : i + 3] for i in range(0, len(small), 3)])) == order(run(style, [small]))
