"""Chat templates against transformers' apply_chat_template, and what the sandbox refuses."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models

from headrace.core.errors import InvalidParameter, TemplateError
from headrace.text.chat import ChatTemplate
from headrace.text.template_worker import TemplateLimits, TemplateRenderer
from headrace.weights.checkpoint import open_checkpoint

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": "Hi <b> & \"quotes\" 'é' 日本 {{ 7*7 }} {% raw %}"}
TOOLS = [{"type": "function", "function": {"name": "get", "parameters": {"é": [1, 2.5, None, True], "a": {"<": ">"}}}}]
CALL = {"id": "1", "type": "function", "function": {"name": "get", "arguments": {"x": "ü", "n": 3}}}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": "Be brief.\n"}, USER],
    [USER, {"role": "assistant", "content": "  Hello  "}, {"role": "user", "content": ""}],
    [USER, {"role": "assistant", "content": "x\r\ny"}],
]
TOOL_TALK = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "42"}]

TEMPLATES = {
    "loops": """{{ bos_token }}
{%- for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {{- loop.index0 ~ ':' ~ loop.last ~ '|' + message['content'] | trim + eos_token }}
    {%- if loop.index == 3 %}{% break %}{% endif %}
{%- endfor %}
{% if add_generation_prompt %}A:{% endif %}""",
    "macros": """{%- macro line(role, text='-') -%}
<{{ role | upper }}>{{ text }}{{ caller() if caller else '' }}</{{ role }}>
{% endmacro -%}
{% for m in messages %}{{ line(m.role, m.content) }}{% call line('x') %}in{% endcall %}{% endfor %}""",
    "namespace": """{% set ns = namespace(count=0, last='', self=1) %}
{% for m in messages if m.role != 'system' %}
{% set ns.count = ns.count + 1 %}{% set ns.last = m.content %}
{% endfor %}
{{ ns.count }} {{ ns.last }} {{ ns.count * 2 ** 3 }}
{{ "%s-%d" % (ns.last, ns.count) }} {{ '{:>5}'.format(ns.count) }}""",
    "tojson": """{{ messages | tojson }}
{{ messages | tojson(indent=4) }}{{ messages[0] | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}
{% if tools %}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% else %}no tools {{ tools is none }} {{ documents is none }}{% endif %}""",
    "generation": """{% for m in messages %}
{% if m.role == 'assistant' %}{% generation %}{% set t = m.content %}{{ loop.index }}{{ t }}{% endgeneration %}
{% else %}[{{ m.content }}]{{ t is defined }}{% endif %}
{%- generation -%} x {%- endgeneration %}
{% endfor %}""",
    "dates": "{{ strftime_now('%d %b %Y') }}{{ strftime_now('%Y') | int > 2000 }}"
    "{{ flag }}{{ missing }}{{ missing is defined }}",
    "filters": """{% set d = dict(a=1, b=messages | length) %}{{ d.items() | list }}{{ d | dictsort | join(';') }}
{{ messages | map(attribute='role') | join(', ') }} {{ messages[::-1] | length }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ messages[-1].content.split('\\n')[0].strip().replace('a', 'bb').startswith('H') }}
{{ 'a\nb' | indent(2) }}|{{ 'ab' | center(9) }}|
{{ ('x' * 5).ljust(8) }}|{{ [1, 2] + [3] }}
{{ (messages[0].content ~ 1 ~ none) | replace('1', '2') | title }} {{ 'abc' | batch(2) | list }}""",
}


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    renderer = TemplateRenderer()
    yield renderer
    renderer.close()


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import PreTrainedTokenizerFast

    raw = RawTokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, **SPECIAL)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_equal_to_transformers(renderer: TemplateRenderer, reference: Any, name: str, prompt: bool) -> None:
    template = ChatTemplate(TEMPLATES[name], SPECIAL, renderer)
    for messages in [*CONVERSATIONS, TOOL_TALK]:
        for tools in (None, TOOLS):
            arguments: dict[str, Any] = {"add_generation_prompt": prompt, "tools": tools, "flag": [1, "é"]}
            theirs = reference.apply_chat_template(messages, chat_template=TEMPLATES[name], tokenize=False, **arguments)
            assert template.render(messages, **arguments) == theirs


@pytest.mark.demo
def test_demo_template_equals_transformers(renderer: TemplateRenderer, reference: Any, demo_path: Path) -> None:
    with open_checkpoint(demo_path) as checkpoint:
        source = checkpoint.config["tokenizer.chat_template"]
    assert isinstance(source, str)
    template = ChatTemplate(source, SPECIAL, renderer)
    for messages in [*CONVERSATIONS, TOOL_TALK]:
        for prompt in (True, False):
            theirs = reference.apply_chat_template(
                messages, chat_template=source, tokenize=False, add_generation_prompt=prompt
            )
            assert template.render(messages, prompt) == theirs
    assert template.render([USER]).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


def test_text_parts(renderer: TemplateRenderer, reference: Any) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert ChatTemplate("{{ messages[0].content + '!' }}", {}, renderer).render(parts) == "a\nb!"
    for source in (
        "{% for m in messages %}{% for part in m.content %}<{{ part.text }}>{% endfor %}{% endfor %}",
        "{% for m in messages %}{% for part in m['content'] %}<{{ part['text'] }}>{% endfor %}{% endfor %}",
        "{% set c = messages[0].content %}{% if messages[0]['content'] is string %}s{% else %}{{ c[1] }}{% endif %}",
    ):
        theirs = reference.apply_chat_template(parts, chat_template=source, tokenize=False)
        assert ChatTemplate(source, {}, renderer).render(parts) == theirs


GOOD = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("hello", "messages"),
        (None, "messages"),
        ({"role": "user"}, "messages"),
        ([GOOD, "x"], "messages[1]"),
        ([GOOD, GOOD, {"content": "a"}], "messages[2].role"),
        ([{"role": 3, "content": "a"}], "messages[0].role"),
        ([{"role": "", "content": "a"}], "messages[0].role"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": {"type": "text"}}], "messages[0].content"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([GOOD | {"extra": object()}], "messages[0]"),
        ([GOOD | {"extra": {1: 2}}], "messages[0]"),
    ],
)
def test_bad_messages(renderer: TemplateRenderer, messages: Any, field: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        ChatTemplate("x", {}, renderer).render(messages)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: got ") and ", allowed: " in str(caught.value)


def test_bad_arguments(renderer: TemplateRenderer) -> None:
    template = ChatTemplate("x", {}, renderer)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for arguments in ({"tools": "x"}, {"tools": [1]}, {"add_generation_prompt": 1}, {"flag": open}, {"flag": deep}):
        with pytest.raises(InvalidParameter) as caught:
            template.render([GOOD], **arguments)  # type: ignore[arg-type]
        assert caught.value.field == next(iter(arguments))
    assert template.render([{"role": "assistant", "content": None}, {"role": "tool"}]) == "x"


def test_messages_are_not_changed(renderer: TemplateRenderer) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    ChatTemplate("{{ messages[0].content }}", {}, renderer).render(messages)
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must\n alternate') }}", "roles must alternate"),
        ("{{ messages.nope.deeper }}", "has no attribute 'nope'"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ open | tojson }}", "not JSON serializable"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% include 'x' %}", "no loader"),
    ],
)
def test_template_failures_are_one_line(renderer: TemplateRenderer, source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message) as caught:
        ChatTemplate(source, {}, renderer).render([GOOD])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "source",
    ["{% for x in %}", "{{ ", "{% nope %}", "{{ x | nope }}", "(" * 500 + "{{" + "(" * 20_000, "{% generation %}"],
)
def test_broken_sources(renderer: TemplateRenderer, source: str) -> None:
    with pytest.raises(TemplateError, match=r"^the chat template cannot be read: "):
        ChatTemplate(source, {}, renderer).render([GOOD])


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages['__class__'].__base__.__subclasses__() }}",
    "{{ (''|attr('__class__')).__mro__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ self.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ (namespace()).__class__.__init__.__globals__ }}",
    "{% set ns = namespace(__class__=1) %}{{ ns }}",
    "{% set ns = namespace() %}{% set ns.__init__ = 1 %}{{ ns }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ ('{0.__class__}'|attr('format'))(1) }}",
    "{% set f = '{0.__class__.__base__}'.format %}{{ f(1) }}",
    "{{ ['{0.__class__}'] | map('format', 1) | map('attr', '__class__') | first | attr('__mro__') }}",
    "{{ [''] | map(attribute='__class__') | first | attr('__base__') }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages.clear() }}",
    "{{ dict.__subclasses__() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ (messages|length).to_bytes.__self__.__class__.__mro__ }}",
    "{% macro m() %}{% endmacro %}{{ m.__globals__ }}{{ m._func.__globals__ }}",
    "{{ caller.__globals__ }}{{ loop.__init__.__globals__ }}",
    "{{ lipsum(n=100000000) }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_sandbox_escapes_are_refused(renderer: TemplateRenderer, source: str) -> None:
    """Refused outright, or undefined, which prints as nothing."""
    try:
        out = ChatTemplate(source, {}, renderer).render([GOOD])
    except TemplateError as error:
        assert "\n" not in str(error)
    else:
        assert out == ""


BOMBS = [
    "{{ 'x' * 10**9 }}",
    "{{ 10**9 * 'x' }}",
    "{{ [1] * 10**9 }}",
    "{% set n = namespace(x='aaaa') %}{% for i in range(50) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='aaaa') %}{% for i in range(50) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='aaaa') %}{% for i in range(50) %}{% set n.x = [n.x, n.x] | join %}{% endfor %}",
    "{% set n = namespace(x='aaaa') %}{% for i in range(50) %}{% set n.x = n.x.join([n.x, n.x]) %}{% endfor %}",
    "{% set n = namespace(x='aaaa') %}{% for i in range(50) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "{% set n = namespace(x='aaaa') %}{% for i in range(50) %}{% set n.x = n.x.replace('a', 'aaaa') %}{% endfor %}",
    "{% set n = namespace(x='aaaa') %}{% for i in range(50) %}{% set n.x = n.x | replace('a', 'aaaa') %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ 'a'.center(width=10**9) }}",
    "{{ 'a'.zfill(10**9) }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a\na' | indent(10**9) }}",
    "{{ 'a' | batch(10**9, 'x') | list | length }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ range(10**9) | list }}",
    "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
]


@pytest.mark.parametrize("source", BOMBS)
def test_large_values_are_refused_quickly(renderer: TemplateRenderer, source: str) -> None:
    start = time.perf_counter()
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(source, {}, renderer).render([GOOD])
    assert time.perf_counter() - start < 2
    assert "\n" not in str(caught.value)


def test_output_bound(renderer: TemplateRenderer) -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {}, renderer)
    half = {"role": "user", "content": "x" * (TemplateLimits().output // 2)}
    assert len(template.render([half, half])) == TemplateLimits().output
    with pytest.raises(TemplateError, match=f"more than {TemplateLimits().output}"):
        template.render([half, half, GOOD])


def test_jinja2_stays_out_of_this_process() -> None:
    code = (
        "import sys\nfrom headrace.text.chat import ChatTemplate\n"
        "from headrace.text.template_worker import TemplateRenderer\n"
        "template = ChatTemplate('{{ messages[0].role }}', {}, TemplateRenderer())\n"
        "assert template.render([{'role': 'user'}]) == 'user'\nassert 'jinja2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_no_template_comes_with_a_request(renderer: TemplateRenderer) -> None:
    for name in ("chat_template", "messages"):
        variables: dict[str, Any] = {name: "{{ 1 }}"}
        with pytest.raises(InvalidParameter) as caught:
            ChatTemplate("x", {}, renderer).render([GOOD], **variables)
        assert caught.value.field == name
    odd: dict[str, Any] = {"self": 1, "source": "{{ 1 }}", "variables": 2, "raise_exception": 3, "a b": 4, "": 5}
    assert ChatTemplate("{{ source }}{{ variables }}", {}, renderer).render([GOOD], **odd) == "{{ 1 }}2"
