"""The messages of a chat body."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.api.fields import Fields, Unknown, check_depth, check_unicode, refuse_unsupported
from headrace.core import strict_json
from headrace.core.errors import InvalidParameter, UnsupportedParameter

ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_FIELDS = frozenset({"role", "content", "name", "reasoning", "reasoning_content", "thinking"})
MESSAGE_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "refusal": (),
    "audio": (),
    "annotations": ([],),
    "tool_calls": ([],),
    "function_call": (),
    "tool_call_id": (),
}
"""As `api.openai.NEUTRAL`; tool_calls and tool_call_id are honoured where the role has them."""
MAX_CALLS = 1024
"""Most calls of one message of a history."""
DETAILS = ("auto", "low", "high")
"""How closely OpenAI's models look at an image. Here each becomes as many tiles as its model's own rule says, which is
what auto and high ask for; low, fewer tokens for an image, is set aside."""


def read_messages(value: object, unknown: Unknown) -> tuple[Mapping[str, object], ...]:
    """The field `messages`, with what templates read. A call's arguments become an object. Raises RequestError."""
    if not isinstance(value, list) or not value:
        raise InvalidParameter("messages", value, "a list of at least one message")
    return tuple(_message(message, f"messages[{i}]", unknown) for i, message in enumerate(value))


def _message(message: object, where: str, unknown: Unknown) -> Mapping[str, object]:
    if not isinstance(message, dict):
        raise InvalidParameter(where, message, "an object with role and content")
    given = {name: value for name, value in message.items() if value is not None}
    role = given.get("role")
    if role == "function":
        raise UnsupportedParameter(f"{where}.role", role, ", ".join(ROLES))
    if role not in ROLES:
        raise InvalidParameter(f"{where}.role", role, ", ".join(ROLES))
    more: dict[str, object] = {}
    if role == "tool":
        more["tool_call_id"] = _identifier(given.pop("tool_call_id", None), f"{where}.tool_call_id")
    if role == "assistant" and given.get("tool_calls"):
        more["tool_calls"] = _calls(given.pop("tool_calls"), f"{where}.tool_calls", unknown)
    refuse_unsupported(given, MESSAGE_NEUTRAL, prefix=f"{where}.")
    for name, value in given.items():
        if name not in MESSAGE_FIELDS and name not in MESSAGE_NEUTRAL:
            unknown.add(f"{where}.{name}", "a message")
        if name != "content" and name in MESSAGE_FIELDS and not isinstance(value, str):
            raise InvalidParameter(f"{where}.{name}", value, "a string")
    kept = {name: value for name, value in given.items() if name in MESSAGE_FIELDS}
    if "content" in kept or "tool_calls" not in more:
        content = _content(kept.get("content"), f"{where}.content", unknown)
        if role == "tool" and isinstance(content, list):
            content = _joined(content, f"{where}.content")
        kept["content"] = content
    return kept | more


def _content(content: object, where: str, unknown: Unknown) -> str | list[dict[str, object]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidParameter(where, content, "a string, or a list of parts")
    return [_part(part, f"{where}[{i}]", unknown) for i, part in enumerate(content)]


def _joined(content: list[dict[str, object]], where: str) -> str:
    """The parts of a tool's result as one text: no template takes a list there."""
    for i, part in enumerate(content):
        if part["type"] != "text":
            raise UnsupportedParameter(f"{where}[{i}].type", part["type"], "text, in what a tool returns")
    return "\n".join(str(part["text"]) for part in content)


def _part(part: object, where: str, unknown: Unknown) -> dict[str, object]:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind not in ("text", "image_url"):
        raise UnsupportedParameter(f"{where}.type", kind, "text, image_url")
    value = part.get(kind) if isinstance(part, dict) and isinstance(kind, str) else None
    if not isinstance(part, dict) or value is None or (kind == "text" and not isinstance(value, str)):
        raise InvalidParameter(where, part, 'an object {"type": "text", "text": …} or {"type": "image_url", …}')
    for name, other in part.items():
        if name not in ("type", kind) and other is not None:
            unknown.add(f"{where}.{name}", "a text part" if kind == "text" else "an image part")
    if kind == "text":
        return {"type": "text", "text": value}
    return {"type": "image_url", "image_url": _image(value, f"{where}.image_url", unknown)}


def _image(value: object, where: str, unknown: Unknown) -> dict[str, object]:
    """{"url": …}; the URL alone will do. Whether it is one is for `media/` to say, once there is work to be done."""
    if isinstance(value, str):
        return {"url": value}
    if not isinstance(value, dict):
        raise InvalidParameter(where, value, 'an object {"url": …}')
    fields = Fields(value, unknown, f"{where}.")
    url, detail = fields.take("url"), fields.take("detail", "auto")
    if not isinstance(url, str):
        raise InvalidParameter(f"{where}.url", url, "a URL, such as data:image/png;base64,…")
    if detail not in DETAILS:
        raise InvalidParameter(f"{where}.detail", detail, ", ".join(DETAILS))
    if detail == "low":
        unknown.set_aside(f"{where}.detail", detail, "auto, high")
    fields.finish("an image")
    return {"url": url}


def _identifier(value: object, where: str) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= 256:
        raise InvalidParameter(where, value, "the id of a call, a string of 1 to 256 characters")
    return value


def _calls(value: object, where: str, unknown: Unknown) -> list[dict[str, object]]:
    if not isinstance(value, list) or len(value) > MAX_CALLS:
        raise InvalidParameter(where, value, f"a list of up to {MAX_CALLS} calls")
    return [_call(call, f"{where}[{i}]", unknown) for i, call in enumerate(value)]


def _call(call: object, where: str, unknown: Unknown) -> dict[str, object]:
    if not isinstance(call, dict):
        raise InvalidParameter(where, call, "an object with id, type and function")
    outer = Fields(call, unknown, f"{where}.")
    identifier = _identifier(outer.take("id"), f"{where}.id")
    kind = outer.take("type", "function")
    if kind != "function":
        raise UnsupportedParameter(f"{where}.type", kind, "function")
    function = outer.take("function")
    outer.finish("a call", inert=frozenset({"index"}))
    where += ".function"
    if not isinstance(function, dict):
        raise InvalidParameter(where, function, "an object with name and arguments")
    inner = Fields(function, unknown, f"{where}.")
    name = inner.text("name", 256)
    if name is None:
        raise InvalidParameter(f"{where}.name", None, "the name of a function")
    arguments = _arguments(inner.take("arguments"), f"{where}.arguments")
    inner.finish("a call's function")
    return {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(value: object, where: str) -> dict[str, Any]:
    """An object, in a string or as it is; nothing is no arguments."""
    if value is None or value == "":
        return {}
    found = value
    if isinstance(value, str):
        try:
            found = strict_json.parse(value)
        except (ValueError, RecursionError):
            found = None
        check_unicode(found, where)
    if not isinstance(found, dict):
        raise InvalidParameter(where, value, "a JSON object, in a string")
    check_depth(found, where)
    return found
