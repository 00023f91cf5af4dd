"""Tools, calls and results as a chat template takes them, or as text for a template that knows none."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256

_KNOWS_TOOLS = re.compile(r"\b(if|elif|in|not|and|or)\s+tools\b|\btools\s*(\||\[|is\b)")
"""A template that asks whether there are tools, or walks them, shows them to its model in its own way."""
_ASKS_FOR_NONE = re.compile(r"""content(['"]\s*\])?\s+is\s+(not\s+)?none""")
"""A template that asks whether content is none takes that for a message of nothing but calls; others take a string."""
_ANY_ROLE = re.compile(r"\{\{[^{}]*\brole\b")
"""A template that writes the role of each message, so that it takes a system message too."""
_SHORT_ID = re.compile("[a-zA-Z0-9]{9}")
"""What templates of Mistral's models take as the id of a call."""
_INSTRUCTION = """\
You can call functions. These are the functions, one JSON object a line:
<tools>
{}
</tools>
To call one, write its name and its arguments as JSON between two tags; several calls follow one another:
<tool_call>
{{"name": "a function's name", "arguments": {{"an argument's name": "its value"}}}}
</tool_call>
What a call returned is then told between <tool_response> and </tool_response>."""


def knows_tools(source: str) -> bool:
    """Whether a template shows tools, calls and their results by itself."""
    return _KNOWS_TOOLS.search(source) is not None


def fit_tools(
    source: str, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]]
) -> tuple[list[Mapping[str, object]], list[Mapping[str, object]] | None]:
    """Messages and tools as a template takes them.

    `messages`: with a call's arguments as objects, and strings as the content of tool messages. Where the template
    knows no tools, they and the calls and results of the conversation become text, so that any chat model can use them.
    """
    if not knows_tools(source):
        has_system = "system" in source or ("raise_exception" not in source and _ANY_ROLE.search(source) is not None)
        return _as_text(messages, tools, has_system), None
    nothing = None if _ASKS_FOR_NONE.search(source) else ""
    found: list[Mapping[str, object]] = []
    for message in messages:
        if "tool_calls" in message and message.get("content") is None:
            message = {**message, "content": nothing}
        if "[TOOL_CALLS]" in source:
            message = _with_short_ids(message)
        found.append(message)
    return found, list(tools) or None


def _with_short_ids(message: Mapping[str, object]) -> Mapping[str, object]:
    def short(value: object) -> object:
        fits = not isinstance(value, str) or _SHORT_ID.fullmatch(value)
        return value if fits else sha256(str(value).encode()).hexdigest()[:9]

    changed = dict(message)
    if "tool_call_id" in changed:
        changed["tool_call_id"] = short(changed["tool_call_id"])
    if isinstance(calls := changed.get("tool_calls"), list | tuple):
        changed["tool_calls"] = [{**call, "id": short(call.get("id"))} for call in calls]
    return changed


def _as_text(
    messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]], has_system: bool
) -> list[Mapping[str, object]]:
    found: list[Mapping[str, object]] = []
    answered = False
    for message in messages:
        if message.get("role") == "tool":
            text = f"<tool_response>\n{message.get('content')}\n</tool_response>"
            if answered:  # of several calls: one message, since roles alternate in many templates
                text = f"{found.pop()['content']}\n{text}"
            message = {"role": "user", "content": text}
            answered = True
        else:
            answered = False
        if isinstance(calls := message.get("tool_calls"), list | tuple):
            message = {key: value for key, value in message.items() if key != "tool_calls"}
            message = _with_text(message, "\n".join(map(_call_text, calls)), "\n")
        found.append(message)
    if not tools:
        return found
    instruction = _INSTRUCTION.format("\n".join(_json(tool.get("function", tool)) for tool in tools))
    first = found[0]
    if first.get("role") in ("system", "developer"):
        return [_with_text(first, instruction, "\n\n"), *found[1:]]
    if has_system:
        return [{"role": "system", "content": instruction}, *found]
    return [{**first, "content": _join(instruction, "\n\n", first.get("content"))}, *found[1:]]


def _with_text(message: Mapping[str, object], text: str, separator: str) -> Mapping[str, object]:
    """The message with more text at its end."""
    content = message.get("content")
    if isinstance(content, list | tuple):
        return {**message, "content": [*content, {"type": "text", "text": separator + text}]}
    return {**message, "content": f"{content}{separator}{text}" if content else text}


def _join(text: str, separator: str, content: object) -> object:
    if isinstance(content, list | tuple):
        return [{"type": "text", "text": text + separator}, *content]
    return f"{text}{separator}{content}" if content else text


def _call_text(call: Mapping[str, object]) -> str:
    function = call.get("function")
    assert isinstance(function, Mapping)
    said = {"name": function.get("name"), "arguments": function.get("arguments")}
    return f"<tool_call>\n{_json(said)}\n</tool_call>"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
