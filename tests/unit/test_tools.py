"""How models write tool calls: the style of a template, the grammar of calls, and what templates show."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import pytest
from llguidance import LLMatcher

from headrace.api.tool_parsers import CallArguments, CallStart, TextPart, make_parser
from headrace.api.tools import MAX_CALLS, ToolChoice, ToolSpec, tool_grammar, tool_style
from headrace.core.errors import GrammarError, InvalidParameter, TemplateError
from headrace.text.chat import ChatTemplate
from headrace.text.chat_tools import fit_tools, knows_tools
from headrace.text.grammar import GrammarCompiler, Matcher, Vocabulary
from headrace.text.template_worker import TemplateRenderer
from tests.unit.published_templates import PUBLISHED

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CITY: Mapping[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 0}},
    "required": ["city"],
}
TOOLS = (ToolSpec("get", "Weather.", CITY), ToolSpec("get_time"), ToolSpec("PARSE_ARGS-name", None, {"type": "object"}))
REQUIRED = ToolChoice("required")
USER = {"role": "user", "content": "Hi"}
CALL = {"id": "call_a1", "type": "function", "function": {"name": "get", "arguments": {"city": "Østby", "days": 2}}}
CALLED: dict[str, Any] = {"role": "assistant", "tool_calls": [CALL]}
TOLD: dict[str, Any] = {"role": "tool", "tool_call_id": "call_a1", "content": "rain"}
DESCRIBED = [tool.described() for tool in TOOLS[:2]]

HERMES = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Write <tool_call>{"name": …, "arguments": {…}}</tool_call><|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content if m.content else '' }}
{%- for call in m.tool_calls %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA3 = """{{ bos_token }}{% if tools is not none %}<|system|>Answer with {"name": …, "parameters": {…}}
{% for t in tools %}{{ t | tojson }}
{% endfor %}{% endif %}{% for m in messages %}<|{{ m.role }}|>
{%- if 'tool_calls' in m %}{% set f = m.tool_calls[0].function %}
{{- '{"name": "' + f.name + '", "parameters": ' }}{{ f.arguments | tojson }}}
{%- else %}{{ m.content | trim }}{% endif %}<|eot|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}{% if tools is defined and tools and loop.last %}[AVAILABLE_TOOLS] {{ tools | tojson }}
{%- endif %}[INST] {{ m.content }}[/INST]
{%- elif m.tool_calls is defined %}[TOOL_CALLS] [{% for c in m.tool_calls %}{% set f = c.function %}
{%- if c.id | length != 9 %}{{ raise_exception('nine characters') }}{% endif %}
{{- {'name': f.name, 'arguments': f.arguments, 'id': c.id} | tojson }}{% endfor %}]</s>
{%- elif m.role == 'tool' %}[TOOL_RESULTS] {"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}
{%- else %}{{ raise_exception('only user, assistant, tool') }}{% endif %}{% endfor %}"""
STRICT = """{% for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}
{%- if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"""


def test_the_style_of_a_template() -> None:
    for template, style in (
        (HERMES, "hermes"),
        (LLAMA3, "llama3"),
        (MISTRAL, "mistral"),
        (LLAMA3.replace('"parameters"', r"\"parameters\""), "llama3"),
        ("<|python_tag|>", "llama3"),
        (STRICT, "hermes"),
        (None, "hermes"),
        (PUBLISHED["llama3"], "llama3"),
        (PUBLISHED["qwen2.5"], "hermes"),
        (PUBLISHED["qwen3"], "hermes"),
        (PUBLISHED["mistral"], "mistral"),
        (PUBLISHED["chatml"], "hermes"),
    ):
        assert tool_style(template) == style
        assert tool_style(template, "llama3") == "llama3"


# ---------------------------------------------------------------- the grammar of calls

MARKERS = {"[TOOL_CALLS]": 257, "[ARGS]": 258}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    """A token a byte, an end, and Mistral's two markers as special tokens."""
    tokens = (*(bytes([i]) for i in range(256)), b"</s>", b"[TOOL_CALLS]", b"[ARGS]")
    return GrammarCompiler(Vocabulary(tokens, frozenset({256, 257, 258}), frozenset({256})))


def accepts(compiler: GrammarCompiler, grammar: str, text: str) -> bool:
    """Whether a text is a whole answer; `⟨T⟩` and `⟨A⟩` are the special markers."""
    ids = [{"⟨": 257, "⟩": 258}[c] if c in "⟨⟩" else b for c in text for b in ([0] if c in "⟨⟩" else c.encode())]
    matcher = compiler.compile(grammar).start()
    try:
        matcher.advance(ids)
        return bool(matcher.mask()[256 >> 3] & 1)
    except GrammarError:
        return False


GET = '{"name": "get", "KEY": {"city": "Oslo", "days": 3}}'
TIME = '{"name": "get_time", "KEY": {}}'


def spelled(style: str, *calls: str) -> str:
    calls = tuple(call.replace("KEY", "parameters" if style == "llama3" else "arguments") for call in calls)
    if style == "hermes":
        return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
    return "; ".join(calls) if style == "llama3" else f"[TOOL_CALLS] [{', '.join(calls)}]"


@pytest.mark.parametrize("style", ["hermes", "llama3", "mistral"])
def test_a_grammar_admits_calls_of_these_tools_alone(compiler: GrammarCompiler, style: str) -> None:
    many, one = (tool_grammar(TOOLS, REQUIRED, style, parallel) for parallel in (True, False))
    only = tool_grammar(TOOLS, ToolChoice("named", "get_time"), style)
    assert accepts(compiler, many, spelled(style, GET)) and accepts(compiler, many, spelled(style, GET, TIME, TIME))
    assert accepts(compiler, one, spelled(style, TIME)) and not accepts(compiler, one, spelled(style, GET, TIME))
    assert accepts(compiler, only, spelled(style, TIME))
    assert not accepts(compiler, only, spelled(style, GET)) and not accepts(compiler, only, spelled(style, TIME, TIME))
    assert not accepts(compiler, many, spelled(style, *[TIME] * (MAX_CALLS + 1)))
    for bad in (
        "",
        "Sure. " + spelled(style, GET),
        spelled(style, GET) + " done",
        spelled(style, GET.replace('"get"', '"unknown"')),
        spelled(style, GET.replace('"city": "Oslo", ', "")),
        spelled(style, GET.replace("3", '"3"')),
        spelled(style, GET.replace("3", '3, "more": 1')),
        spelled(style, TIME.replace("{}", '{"more": 1}')),
        spelled(style, GET)[:-1],
    ):
        assert not accepts(compiler, many, bad), bad
    free_form = TIME.replace("get_time", "PARSE_ARGS-name").replace("{}", '{"any": [1, null]}')
    assert accepts(compiler, many, spelled(style, free_form))


def test_markers_that_are_special_tokens(compiler: GrammarCompiler) -> None:
    grammar = tool_grammar(TOOLS, REQUIRED, "mistral", markers={"[TOOL_CALLS]": 257})
    body = spelled("mistral", GET, TIME).removeprefix("[TOOL_CALLS]")
    assert accepts(compiler, grammar, "⟨" + body) and accepts(compiler, grammar, "⟨" + body.lstrip())
    assert not accepts(compiler, grammar, "[TOOL_CALLS]" + body)
    grammar = tool_grammar(TOOLS, REQUIRED, "mistral", markers=MARKERS)
    assert accepts(compiler, grammar, '⟨get⟩{"city": "Oslo"}⟨get_time⟩{}')
    assert not accepts(compiler, grammar, '⟨get{"city": "Oslo"}') and not accepts(compiler, grammar, "get_time⟩{}")


def test_only_required_calls_have_a_grammar() -> None:
    for mode in ("none", "auto"):
        assert tool_grammar(TOOLS, ToolChoice(mode), "hermes") == ""  # type: ignore[arg-type]


SCHEMAS: list[dict[str, Any]] = [
    {"type": "object"},
    {"type": ["object", "null"], "properties": {"a": {"type": "null"}}},
    {"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"enum": ["x", "y"]}}, "required": ["a"]},
    {"type": "object", "properties": {"a": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}, "required": ["b"]},
    {"type": "object", "properties": {'é"\\': {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}}},
    {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 2},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "string"}}}, {"required": ["a"]}]},
    {"type": "object", "properties": {"a": {}}, "x-guidance": {"whitespace_flexible": True}, "title": "T"},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: str(schema)[:50])
def test_common_schemas_compile(schema: dict[str, Any]) -> None:
    for style, parallel in product(("hermes", "llama3", "mistral"), (True, False)):
        grammar = tool_grammar([ToolSpec("f", None, schema)], REQUIRED, style, parallel)
        assert LLMatcher.validate_grammar(grammar) == ""


def wander(matcher: Matcher, draw: random.Random) -> str | None:
    """What a model without any sense writes under a grammar; None if it comes to no end."""
    written = bytearray()
    for _ in range(600):
        bits = int.from_bytes(matcher.mask(), "little")
        allowed = [i for i in range(259) if bits >> i & 1]
        assert allowed
        if 256 in allowed and (len(allowed) == 1 or draw.random() < 0.5):
            return written.decode()
        ends = [i for i in allowed if i < 256 and chr(i) in '"}],']
        plain = [i for i in allowed if 32 <= i < 127] or [i for i in allowed if i < 256]
        token_id = draw.choice(ends) if ends and draw.random() < 0.4 else draw.choice(plain or allowed)
        written += bytes([token_id]) if token_id < 256 else b""
        matcher.advance([token_id])
    return None


@pytest.mark.parametrize("style", ["hermes", "llama3", "mistral", "mistral with tokens"])
def test_what_is_written_under_a_grammar_is_parsed_as_calls(compiler: GrammarCompiler, style: str) -> None:
    markers = MARKERS if style == "mistral with tokens" else {}
    style = style.split()[0]
    draw = random.Random(5)
    ended = 0
    for choice, parallel in product((REQUIRED, ToolChoice("named", "get")), (True, False)):
        grammar = compiler.compile(tool_grammar(TOOLS[:2], choice, style, parallel, markers))
        for _ in range(8):
            text = wander(grammar.start(), draw)
            if text is None:
                continue
            ended += 1
            parser = make_parser(style, TOOLS[:2], choice, parallel)
            parts = [part for char in text for part in parser.push(char)] + parser.finish()
            assert not any(isinstance(part, TextPart) for part in parts), text
            names = [part.name for part in parts if isinstance(part, CallStart)]
            assert names and set(names) <= ({"get"} if choice.name else {"get", "get_time"})
            assert len(names) == 1 or (parallel and not choice.name)
            for index, name in enumerate(names):
                said = [part.text for part in parts if isinstance(part, CallArguments) and part.index == index]
                arguments = json.loads("".join(said))
                if name == "get":
                    assert isinstance(arguments["city"], str) and arguments.keys() <= {"city", "days"}
                else:
                    assert arguments == {}
    assert ended > 16


# ---------------------------------------------------------------- templates


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    renderer = TemplateRenderer()
    yield renderer
    renderer.close()


def render(renderer: TemplateRenderer, source: str, messages: list[Any], tools: list[Any], **kwargs: Any) -> str:
    fitted, shown = fit_tools(source, messages, tools)
    return ChatTemplate(source, SPECIAL, renderer).render(fitted, tools=shown, **kwargs)


def test_which_templates_know_tools() -> None:
    known = {name for name, source in PUBLISHED.items() if knows_tools(source)}
    assert known == {"llama3", "qwen2.5", "mistral", "modern"}
    assert all(map(knows_tools, (HERMES, LLAMA3, MISTRAL))) and not knows_tools(STRICT)
    assert not knows_tools("{# no tools #}You have no tools.{{ messages }}")


def test_templates_with_tools_are_given_them(renderer: TemplateRenderer) -> None:
    talk = [USER, CALLED, TOLD]
    text = render(renderer, HERMES, talk, DESCRIBED)
    assert all(json.dumps(tool, ensure_ascii=False) in text for tool in DESCRIBED)
    assert '<tool_call>\n{"name": "get", "arguments": {"city": "Østby", "days": 2}}\n</tool_call>' in text
    text = render(renderer, LLAMA3, talk, DESCRIBED)
    assert '<|assistant|>{"name": "get", "parameters": {"city": "Østby", "days": 2}}<|eot|>' in text
    assert "none" not in render(renderer, LLAMA3, talk, []) and "{…}" not in render(renderer, LLAMA3, talk, [])


def test_mistral_is_given_ids_of_nine_characters(renderer: TemplateRenderer) -> None:
    text = render(renderer, MISTRAL, [USER, CALLED, TOLD], DESCRIBED)
    call_id = text.split('"call_id": "')[1][:9]
    assert f'"id": "{call_id}"' in text and call_id.isalnum()
    kept = [USER, {**CALLED, "tool_calls": [{**CALL, "id": "abcDEF123"}]}, {**TOLD, "tool_call_id": "abcDEF123"}]
    assert render(renderer, MISTRAL, kept, []).count("abcDEF123") == 2


def test_a_message_of_nothing_but_calls(renderer: TemplateRenderer) -> None:
    source = "{% if tools %}{% endif %}{% for m in messages %}{{ m.content is none }}|{{ m.content }};{% endfor %}"
    assert render(renderer, source, [CALLED], []) == "True|None;"
    assert render(renderer, source.replace("is none", "| length"), [CALLED], []) == "0|;"


def test_templates_without_tools_are_given_text(renderer: TemplateRenderer) -> None:
    text = render(renderer, PUBLISHED["chatml"], [{"role": "system", "content": "Be brief."}, USER], DESCRIBED)
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou can call functions.")
    assert all(json.dumps(tool["function"]) in text for tool in DESCRIBED)
    again = [USER, {**CALLED, "content": "Hm.", "tool_calls": [CALL, CALL]}, TOLD, {**TOLD, "content": "4 °C"}]
    said = '<tool_call>\n{"name": "get", "arguments": {"city": "Østby", "days": 2}}\n</tool_call>'
    text = render(renderer, PUBLISHED["chatml"], again, [])
    assert f"<|im_start|>assistant\nHm.\n{said}\n{said}<|im_end|>" in text
    results = "<tool_response>\nrain\n</tool_response>\n<tool_response>\n4 °C\n</tool_response>"
    assert f"<|im_start|>user\n{results}<|im_end|>" in text
    # Where roles alternate, and no system message is taken.
    text = render(renderer, STRICT, [USER, CALLED, TOLD], DESCRIBED)
    assert text.startswith("[INST] You can call functions.") and f"\n\nHi [/INST]{said}</s>[INST] <tool_resp" in text
    parts = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, USER]
    fitted, shown = fit_tools(PUBLISHED["chatml"], parts, DESCRIBED)
    assert shown is None and len(fitted[0]["content"]) == 2  # type: ignore[arg-type]
    assert parts[0]["content"] == [{"type": "text", "text": "Be brief."}]


def test_a_parser_reads_what_the_templates_write(renderer: TemplateRenderer) -> None:
    """The style found for a template is the one in which it writes the calls of a history."""
    for name, source in (*PUBLISHED.items(), ("hermes", HERMES), ("l", LLAMA3), ("m", MISTRAL), ("strict", STRICT)):
        if name in ("modern", "deepseek"):  # they show no calls, or begin each answer with a tag
            continue
        whole = render(renderer, source, [USER, CALLED], [], add_generation_prompt=False)
        answer = whole.removeprefix(render(renderer, source, [USER], [], add_generation_prompt=True))
        assert answer != whole
        parser = make_parser(tool_style(source), TOOLS, ToolChoice("auto"))
        parts = parser.push(answer) + parser.finish()
        assert [part.name for part in parts if isinstance(part, CallStart)] == ["get"], (name, answer)
        said = "".join(part.text for part in parts if isinstance(part, CallArguments))
        assert json.loads(said) == CALL["function"]["arguments"]  # type: ignore[index]


# ---------------------------------------------------------------- a final message that is continued


@pytest.mark.parametrize("name", ["chatml", "qwen2.5", "qwen3", "mistral", "deepseek", "llama3", "llama2", "phi3"])
def test_the_prompt_ends_where_the_final_message_does(renderer: TemplateRenderer, name: str) -> None:
    template = ChatTemplate(PUBLISHED[name], SPECIAL, renderer)
    for content in ("a", "Well, ", "", "</s>", "\uf8ff", "x\uf8ff\uf8ffx"):
        messages = [USER, {"role": "assistant", "content": content}]
        text = template.render(messages, add_generation_prompt=False, continue_final_message=True)
        whole = template.render(messages, add_generation_prompt=False)
        assert text.endswith(content) and whole.startswith(text.rstrip())
    with pytest.raises(InvalidParameter, match="continue_final_message"):
        template.render(messages, continue_final_message=True)


def test_a_final_message_that_is_not_shown(renderer: TemplateRenderer) -> None:
    template = ChatTemplate("{{ messages[0].content }}", SPECIAL, renderer)
    messages = [USER, {"role": "assistant", "content": "x"}]
    with pytest.raises(TemplateError, match="final message"):
        template.render(messages, add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(InvalidParameter, match="final message"):
        template.render([USER, CALLED], add_generation_prompt=False, continue_final_message=True)
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert template.render(parts, add_generation_prompt=False, continue_final_message=True) == "a\nb"
