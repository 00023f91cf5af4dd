"""What an answer must look like, as clients say it: `response_format`, `structured_outputs`, TGI's `grammar`.

Read here is only the form. Whether the grammar itself is one is found by `headrace.text.grammar_worker`, which also
puts GBNF in the form that `Request.grammar` takes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.core.errors import InvalidParameter, UnknownParameter, UnsupportedParameter
from headrace.core.strict_json import parse

MAX_TEXT = 2**16
"""Most bytes of a schema, a regular expression, a grammar, or all choices together."""
MAX_CHOICES = 1024
_WHITESPACE: Mapping[str, str] = {"whitespace_pattern": r"[ \n\r\t]{1,64}"}
"""Between JSON's tokens: enough for any indentation, not enough for a model to lose itself in."""
_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_SETTINGS = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern", "structural_tag")
"""Fields of vLLM's that change what is allowed, and that are not carried out."""
_INERT = frozenset({"disable_fallback"})
_SLASH_OR_LINE = re.compile(r"\\?[/\n\r]|\\.", re.DOTALL)
_IN_SLASHES: Mapping[str, str] = {"/": r"\/", "\n": r"\n", "\r": r"\r", "\\\n": r"\n", "\\\r": r"\r"}
"""Between slashes a slash is escaped, and no line ends."""
_FORMATS = "text, json_object or json_schema"


def read_grammar(response_format: object, structured_outputs: object) -> str:
    """The grammar that the two fields ask for, None where absent; empty: any answer will do.

    Raises InvalidParameter, UnknownParameter or UnsupportedParameter with the field's path.
    """
    grammar = "" if response_format is None else _response_format(response_format)
    if structured_outputs is None:
        return grammar
    if grammar:
        raise InvalidParameter("structured_outputs", structured_outputs, "to leave it out beside a response_format")
    return _structured_outputs(structured_outputs)


def grammar_field(body: Mapping[str, Any]) -> str:
    """The path of the field that a body's grammar comes from."""
    if isinstance(outputs := body.get("structured_outputs"), dict):
        return "structured_outputs." + next((name for name in _KINDS if name in outputs), "")
    if isinstance(wanted := body.get("response_format"), dict):
        return "response_format" + (".json_schema" if "json_schema" in wanted else "")
    return "tools"


def read_tgi_grammar(value: object) -> str:
    """The grammar of a TGI body's `grammar`; empty where it is None. Raises as `read_grammar`."""
    return "" if value is None else _tgi_grammar("grammar", value)


def schema_grammar(path: str, schema: object, objects: bool = False) -> str:
    """The grammar of JSON that a schema, or the JSON text of one, describes. `path` is the field's. `objects`: a schema
    with properties and no type means an object, as TGI has it (to JSON Schema it means anything). Raises
    InvalidParameter."""
    if isinstance(schema, str):
        _bounded(path, schema)
        try:
            schema = parse(schema)
        except (ValueError, RecursionError):
            raise InvalidParameter(path, schema, "a JSON schema") from None
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise InvalidParameter(path, schema, "a JSON schema")
    if objects and "properties" in schema:
        schema = {"type": "object"} | schema
    try:
        _bounded(path, json.dumps(schema, ensure_ascii=False, separators=(",", ":")))
        return "start: %json " + json.dumps({"x-guidance": _WHITESPACE} | schema)
    except RecursionError:
        raise InvalidParameter(path, schema, "a JSON schema that nests less deeply") from None


def _tgi_grammar(path: str, value: object) -> str:
    fields = _object(path, value, '{"type": …, "value": …}')
    _no_others(path, fields, ("type", "value"))
    kind, given = fields.get("type"), fields.get("value")
    path = f"{path}.value"
    if kind in ("json", "json_object"):
        return schema_grammar(path, given, objects=True)
    if kind == "json_schema":
        return _named_schema(path, given, objects=True)
    if kind == "regex":
        return _regex(path, given)
    raise InvalidParameter("grammar.type", kind, "json, json_schema or regex")


def _response_format(value: object) -> str:
    fields = _object("response_format", value, '{"type": …}')
    kind = fields.get("type")
    if kind == "structural_tag":
        raise UnsupportedParameter("response_format.type", kind, _FORMATS)
    if kind == "json_schema":
        _no_others("response_format", fields, ("type", "json_schema"))
        return _named_schema("response_format.json_schema", fields.get("json_schema"))
    if kind in ("json", "json_object", "regex") and "value" in fields:  # as TGI's chat route takes it
        return _tgi_grammar("response_format", fields)
    if kind not in ("text", "json_object"):
        raise InvalidParameter("response_format.type", kind, _FORMATS)
    _no_others("response_format", fields, ("type",))
    return "" if kind == "text" else _any_object()


def _named_schema(path: str, value: object, objects: bool = False) -> str:
    """OpenAI's schema with a name. `strict` changes nothing: every answer follows its schema."""
    fields = _object(path, value, '{"name": …, "schema": …}')
    _no_others(path, fields, ("name", "description", "schema", "strict"))
    for name in ("name", "description"):
        if not isinstance(fields.get(name, ""), str):
            raise InvalidParameter(f"{path}.{name}", fields[name], "a string")
    if not isinstance(fields.get("strict", False), bool):
        raise InvalidParameter(f"{path}.strict", fields["strict"], "true or false")
    return schema_grammar(f"{path}.schema", fields.get("schema"), objects)


def _structured_outputs(value: object) -> str:
    path = "structured_outputs"
    one_of = f"exactly one of {', '.join(_KINDS)}"
    fields = _object(path, value, f"an object with {one_of}")
    fields = {name: given for name, given in fields.items() if given is not False and name not in _INERT}
    for name in _SETTINGS:
        if name in fields:
            raise UnsupportedParameter(f"{path}.{name}", fields[name], f"to leave it out; {one_of}")
    _no_others(path, fields, _KINDS)
    if len(fields) != 1:
        raise InvalidParameter(path, sorted(fields), one_of)
    kind, given = fields.popitem()
    path = f"{path}.{kind}"
    if kind == "json":
        return _any_object() if given is True else schema_grammar(path, given)
    if kind == "regex":
        return _regex(path, given)
    if kind == "choice":
        return _choice(path, given)
    if kind == "grammar":
        return _text(path, given)
    if given is not True:
        raise InvalidParameter(path, given, "true or false")
    return _any_object()


def _any_object() -> str:
    return schema_grammar("", {"type": "object"})


def _choice(path: str, value: object) -> str:
    """Any one of several texts."""
    allowed = f"a list of 1 to {MAX_CHOICES} strings"
    if not isinstance(value, Sequence) or isinstance(value, str) or not 1 <= len(value) <= MAX_CHOICES:
        raise InvalidParameter(path, value, allowed)
    if not all(isinstance(one, str) for one in value):
        raise InvalidParameter(path, value, allowed)
    _bounded(path, "".join(value))
    return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(one) for one in dict.fromkeys(value))


def _regex(path: str, value: object) -> str:
    """A regular expression that the whole answer matches (Rust's syntax, without look-around and back-references)."""
    text = _bounded(path, value)
    text = _SLASH_OR_LINE.sub(lambda match: _IN_SLASHES.get(match[0], match[0]), text)
    if text.replace("\\\\", "").endswith("\\"):
        raise InvalidParameter(path, value, "a regular expression that does not end in a single backslash")
    return f"start: /{text}/" if text else 'start: ""'


def _text(path: str, value: object) -> str:
    """A grammar in Lark or GBNF."""
    text = _bounded(path, value)
    if not text.strip() or text.lstrip().startswith("{"):
        raise InvalidParameter(path, value, "a grammar in Lark (with a rule 'start:') or GBNF (with a rule 'root ::=')")
    return text


def _bounded(path: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidParameter(path, value, "a string")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise InvalidParameter(path, value, "a string without lone surrogates") from None
    if size > MAX_TEXT:
        raise InvalidParameter(path, value, f"at most {MAX_TEXT} bytes")
    return value


def _object(path: str, value: object, allowed: str) -> dict[str, Any]:
    """Its fields but those that are null."""
    if not isinstance(value, dict):
        raise InvalidParameter(path, value, allowed)
    return {name: given for name, given in value.items() if given is not None}


def _no_others(path: str, fields: Mapping[str, object], known: Sequence[str]) -> None:
    """A field that is not known might be what the client relies on: the answer would look otherwise."""
    for name in fields:
        if name not in known:
            raise UnknownParameter(f"{path}.{name}", path)
