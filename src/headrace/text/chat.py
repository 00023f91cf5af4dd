"""Chat templates: messages in, the model's prompt text out.

A template comes with the model, never with a request, and is untrusted all the same: it runs in a process of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime

from headrace.core.errors import InvalidParameter, TemplateError
from headrace.text.template_worker import TemplateRenderer

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Where a message may keep its reasoning; templates read the first, some the second."""
_MAX_DEPTH = 64
_TAKES_PARTS = re.compile(
    r"""content(['"]\s*\])?\s+is\s+(not\s+)?(string|iterable|sequence|mapping)|in\s+(\w+(\.|\[\s*['"]))?content\b"""
)
"""A template that asks what content is, or loops over it, reads a list of parts; others take a string."""

_TURNS = """\
{%- set system = messages[0]['role'] == 'system' %}
{{- '<s><|im_start|>system\\n' + (messages[0]['content'] if system else SYSTEM) + '<|im_end|>\\n' }}
{%- for message in (messages[1:] if system else messages) %}
{%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') %}
{{- raise_exception('user and assistant take turns, the user first') }}
{%- endif %}
{%- if message['role'] == 'user' %}{{ '<|im_start|>user\\n' + message['content'].strip() + '<|im_end|>' }}
{%- else %}{{ 'assistant\\n' + message['content'].strip() + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'OPENED' }}{% endif %}"""
"""Of Open-Qwen2VL: what it was trained on has no newline, and no <|im_start|>, before `assistant`."""
FRAMES: Mapping[str, str] = {
    "chatml": """\
{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n' + SYSTEM + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "mpt": """\
{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n' + SYSTEM + '<|im_end|>' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "train": _TURNS.replace("OPENED", "assistant\\n"),
    "cli": _TURNS.replace("OPENED", "assistant"),
    "raw": """\
{%- if messages | length != 1 or messages[0]['role'] != 'user' %}
{{- raise_exception('the raw form takes one user message, and nothing before it') }}
{%- endif %}
{{- '<s>' + messages[0]['content'] }}""",
}
"""Templates for models that come without one; SYSTEM stands for their system message."""

_MARK = "\uf8ff"
"""A private character: what follows it in a rendered text came after the final message."""


def frame(form: str, system: str) -> str:
    """The source of one of `FRAMES`, with `system` as its system message where the messages have none."""
    return FRAMES[form].replace("SYSTEM", json.dumps(system, ensure_ascii=False))


class ChatTemplate:
    """A model's chat template.

    Rendered as transformers does: blocks are trimmed, `tojson` keeps Unicode, `raise_exception`, `strftime_now`,
    `{% break %}` and `{% generation %}` are known.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], renderer: TemplateRenderer) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._takes_parts = _TAKES_PARTS.search(source) is not None
        self._renderer = renderer

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        /,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        now: datetime | None = None,
        continue_final_message: bool = False,
        **kwargs: object,
    ) -> str:
        """The prompt text of a conversation; `kwargs` are more variables for the template (`enable_thinking=False`).
        `now`: what `strftime_now` writes; the machine's own time if None. `continue_final_message`: the text ends where
        the content of the last message does, so that the answer goes on from there.

        Raises InvalidParameter (messages, tools, a variable), TemplateError (the source is no template, or the template
        refuses, fails or meets a limit), EngineError (it cannot be run).
        """
        if not isinstance(add_generation_prompt, bool):
            raise InvalidParameter("add_generation_prompt", add_generation_prompt, "true or false")
        if now is not None and not isinstance(now, datetime):
            raise InvalidParameter("now", now, "a datetime")
        for name in ("chat_template", "messages"):  # a server passes on the names that a request chooses
            if name in kwargs:
                raise InvalidParameter(name, kwargs[name], "no such variable; the model and the request have one")
        checked = _check_messages(messages)
        mark = _mark_end(checked) if continue_final_message else ""
        if mark and add_generation_prompt:
            raise InvalidParameter("add_generation_prompt", True, "false beside continue_final_message")
        plain = [self._content(_with_reasoning(message)) for message in checked]
        variables = {key: _plain(value, key) for key, value in kwargs.items()}
        text = self._renderer.render(
            self._source,
            {
                "documents": None,
                **self._special_tokens,
                **variables,
                "messages": plain,
                "tools": _check_tools(tools),
                "add_generation_prompt": add_generation_prompt,
            },
            now,
        )
        if not mark:
            return text
        if mark not in text:
            raise TemplateError(
                "the chat template does not show the end of the final message, so it cannot be continued"
            )
        return text[: text.rindex(mark)]

    def _content(self, message: dict[str, object]) -> dict[str, object]:
        content = message.get("content")
        if isinstance(content, list) and not self._takes_parts:
            return {**message, "content": "\n".join(part["text"] for part in content)}
        return message


def _mark_end(messages: list[dict[str, object]]) -> str:
    """Puts a mark behind the last message's content, one that is nowhere else. Returns the mark."""
    last = messages[-1]
    content = last.get("content")
    mark = _MARK * (1 + _longest_run(messages))
    if isinstance(content, str):
        last["content"] = content + mark
    elif isinstance(content, list) and content:
        content[-1]["text"] += mark
    else:
        raise InvalidParameter("messages", content, "a final message with content, to be continued")
    return mark


def _longest_run(value: object) -> int:
    """Of the marking character, in any text of a JSON value."""
    if isinstance(value, str):
        return max(map(len, re.findall(f"{_MARK}+", value)), default=0)
    if isinstance(value, dict):
        return max((_longest_run(one) for pair in value.items() for one in pair), default=0)
    return max((_longest_run(one) for one in value), default=0) if isinstance(value, list) else 0


def _with_reasoning(message: dict[str, object]) -> dict[str, object]:
    """As transformers: whichever name the reasoning came under, a template finds it under those it may read."""
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _check_messages(messages: object) -> list[dict[str, object]]:
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidParameter("messages", messages, "a list of at least one message")
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _check_message(message: object, where: str) -> dict[str, object]:
    if not isinstance(message, Mapping):
        raise InvalidParameter(where, message, "an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidParameter(f"{where}.role", role, "a string such as system, user or assistant")
    content = message.get("content")
    if isinstance(content, list | tuple):
        for i, part in enumerate(content):
            _check_part(part, f"{where}.content[{i}]")
    elif content is not None and not isinstance(content, str):
        raise InvalidParameter(f"{where}.content", content, "a string, null or a list of text parts")
    plain = _plain(dict(message), where)
    assert isinstance(plain, dict)
    return plain


def _check_part(part: object, where: str) -> None:
    if not isinstance(part, Mapping):
        raise InvalidParameter(where, part, "an object with type and text")
    if part.get("type") != "text":
        raise InvalidParameter(f"{where}.type", part.get("type"), "text")
    if not isinstance(part.get("text"), str):
        raise InvalidParameter(f"{where}.text", part.get("text"), "a string")


def _check_tools(tools: object) -> object:
    if tools is None:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InvalidParameter("tools", tools, "a list of objects")
    return _plain(tools, "tools")


def _plain(value: object, where: str, depth: int = 0) -> object:
    """A copy in JSON's types: the template gets no object with methods of its own, and cannot change the caller's."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth < _MAX_DEPTH and isinstance(value, list | tuple):
        return [_plain(item, where, depth + 1) for item in value]
    if depth < _MAX_DEPTH and isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {key: _plain(item, where, depth + 1) for key, item in value.items()}
    raise InvalidParameter(where, value, f"JSON values, up to {_MAX_DEPTH} deep")
