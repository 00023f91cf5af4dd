"""Tools of a chat: what a body says of them, how the model writes calls, and the grammar of such calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from headrace.api.fields import Fields, Unknown, check_depth
from headrace.core.errors import InvalidParameter, UnsupportedParameter

MAX_TOOLS = 128
MAX_CALLS = 16
"""Most calls of an answer that a grammar admits: a small model would go on until its context is full."""
MISTRAL_MARKERS = ("[TOOL_CALLS]", "[ARGS]")
MARKERS: Mapping[str, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama3": (),
    "mistral": MISTRAL_MARKERS,
}
"""Of each style: what a call cannot be told without. Where these are special tokens, the parser has to see them."""
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}", re.ASCII)
_PARAMETERS = re.compile(r'\\?"parameters\\?"')
_OPEN = frozenset({"$ref", "allOf", "anyOf", "oneOf", "if", "patternProperties", "unevaluatedProperties"})
_OBJECT = r'"{\"name\": \"@name\", \"@key\": " @args "}"'
_SPACING: Mapping[str, object] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""White space as templates write the calls of a history (Python's json.dumps)."""


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    """A JSON schema of its arguments, which are an object."""
    strict: bool = False
    """The client wants arguments that hold to the schema. They do where a call is required; else the model is free."""

    def described(self) -> dict[str, object]:
        """As templates expect it."""
        function: dict[str, object] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": {**function, "parameters": dict(self.parameters)}}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model calls a tool: not at all, as it likes, at least one, or the one that is named."""

    mode: Literal["none", "auto", "required", "named"] = "none"
    name: str = ""


def read_tools(value: object, unknown: Unknown) -> tuple[ToolSpec, ...]:
    """The field `tools`. Raises RequestError."""
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        got = f"{len(value)} tools" if isinstance(value, list) else value
        raise InvalidParameter("tools", got, f"a list of up to {MAX_TOOLS} functions")
    found: dict[str, ToolSpec] = {}
    for i, one in enumerate(value):
        tool = _read_tool(one, f"tools[{i}]", unknown)
        if tool.name in found:
            raise InvalidParameter(f"tools[{i}].function.name", tool.name, "a name of its own for each tool")
        found[tool.name] = tool
    return tuple(found.values())


def _read_tool(value: object, where: str, unknown: Unknown) -> ToolSpec:
    if not isinstance(value, dict):
        raise InvalidParameter(where, value, 'an object {"type": "function", "function": {…}}')
    outer = Fields(value, unknown, f"{where}.")
    _check_type(outer.take("type", "function"), f"{where}.type")
    function = outer.take("function")
    outer.finish("a tool")
    where += ".function"
    if not isinstance(function, dict):
        raise InvalidParameter(where, function, "an object with name, description, parameters")
    inner = Fields(function, unknown, f"{where}.")
    name = _read_name(inner.take("name"), f"{where}.name")
    description = inner.take("description")
    if description is not None and not isinstance(description, str):
        raise InvalidParameter(f"{where}.description", description, "a string")
    strict = inner.flag("strict")
    parameters = inner.take("parameters")
    inner.finish("a function")
    if parameters is None:
        return ToolSpec(name, description, strict=strict)
    kind = parameters.get("type", "object") if isinstance(parameters, dict) else None
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise InvalidParameter(f"{where}.parameters", parameters, "a JSON schema of type object")
    check_depth(parameters, f"{where}.parameters")
    return ToolSpec(name, description, parameters, strict)


def _check_type(kind: object, where: str) -> None:
    if not isinstance(kind, str):
        raise InvalidParameter(where, kind, "function")
    if kind != "function":
        raise UnsupportedParameter(where, kind, "function")


def _read_name(name: object, where: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidParameter(where, name, "1 to 64 of the characters a-z, A-Z, 0-9, _ and -")
    return name


def read_tool_choice(value: object, tools: Sequence[ToolSpec], unknown: Unknown) -> ToolChoice:
    """The field `tool_choice`; absent, it is auto if there are tools. Raises RequestError."""
    allowed = 'none, auto, required or {"type": "function", "function": {"name": …}}'
    if value is None:
        return ToolChoice("auto" if tools else "none")
    if value == "none" or (value == "auto" and not tools):
        return ToolChoice("none")
    if value == "auto":
        return ToolChoice("auto")
    if value == "required":
        if not tools:
            raise InvalidParameter("tool_choice", value, "none or auto, since there are no tools")
        return ToolChoice("required")
    if not isinstance(value, dict):
        raise InvalidParameter("tool_choice", value, allowed)
    outer = Fields(value, unknown, "tool_choice.")
    _check_type(outer.take("type"), "tool_choice.type")
    function = outer.take("function")
    outer.finish("tool_choice")
    if not isinstance(function, dict):
        raise InvalidParameter("tool_choice.function", function, "an object with a name")
    inner = Fields(function, unknown, "tool_choice.function.")
    name = _read_name(inner.take("name"), "tool_choice.function.name")
    inner.finish("tool_choice.function")
    if all(name != tool.name for tool in tools):
        raise InvalidParameter("tool_choice.function.name", name, "the name of one of the tools")
    return ToolChoice("named", name)


def tool_style(template: str | None, setting: str = "auto") -> str:
    """How the model writes calls: hermes, llama3 or mistral; `setting` unless it is auto, else what the text of its
    chat template shows."""
    if setting != "auto":
        return setting
    template = template or ""
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" in template:
        return "hermes"
    return "llama3" if "python_tag" in template or _PARAMETERS.search(template) else "hermes"


def tool_grammar(
    tools: Sequence[ToolSpec],
    choice: ToolChoice,
    style: str,
    parallel: bool = True,
    markers: Mapping[str, int] | None = None,
) -> str:
    """The grammar (Lark, as llguidance reads it) of nothing but well-formed calls of these tools; empty where the
    choice leaves the model free.

    A named choice is one call; a required one is at least one, and one alone without `parallel`. `markers`: those of
    `MISTRAL_MARKERS` that are special tokens of the model, with their ids.
    """
    if choice.mode not in ("required", "named"):
        return ""
    called = [tool for tool in tools if choice.mode == "required" or tool.name == choice.name]
    several = parallel and choice.mode == "required"

    def more(separator: str) -> str:
        return f" ({separator}call){{0,{MAX_CALLS - 1}}}" if several else ""

    ids = markers or {}
    call, tool = "tool", _OBJECT.replace("@key", "parameters" if style == "llama3" else "arguments")
    if style == "hermes":
        start = "call" + more('"\\n" ')
        call = '"<tool_call>\\n" tool "\\n</tool_call>"'
    elif style == "llama3":
        start = "call" + more('"; " ')
    elif ids.keys() >= set(MISTRAL_MARKERS):
        start, call = "call" + more(""), f"<[{ids['[TOOL_CALLS]']}]> tool"
        tool = f'"@name" <[{ids["[ARGS]"]}]> @args'
    else:
        mark = f"<[{ids['[TOOL_CALLS]']}]>" if "[TOOL_CALLS]" in ids else '"[TOOL_CALLS]"'
        start = f'{mark} " "? "[" call' + more('", " ') + ' "]"'
    lines = [f"start: {start}", f"call: {call}", "tool: " + " | ".join(f"tool_{i}" for i in range(len(called)))]
    for i, one in enumerate(called):
        lines.append(f"tool_{i}: " + tool.replace("@name", one.name).replace("@args", f"args_{i}"))
        lines.append(f"args_{i}: %json {json.dumps(_arguments_schema(one))}")
    return "\n".join(lines) + "\n"


def _arguments_schema(tool: ToolSpec) -> dict[str, object]:
    """The parameters as a schema that a model can come to the end of: beside `properties`, where nothing is said of
    others, there are none (JSON schema itself would admit any)."""
    schema: dict[str, object] = {**tool.parameters, "type": "object", "x-guidance": _SPACING}
    properties, required = schema.get("properties"), schema.get("required", [])
    if (
        isinstance(properties, dict)
        and isinstance(required, list)
        and _OPEN.isdisjoint(schema)
        and all(isinstance(name, str) and name in properties for name in required)
    ):
        schema.setdefault("additionalProperties", False)
    return schema
