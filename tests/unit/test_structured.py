"""response_format, structured_outputs and TGI's grammar: what is read, and what is refused by which field."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.api.structured import MAX_CHOICES, MAX_TEXT, read_grammar, read_tgi_grammar
from headrace.core.errors import InvalidParameter, RequestError, UnknownParameter, UnsupportedParameter

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
PREFIX = "start: %json "


def schema_of(grammar: str) -> dict[str, object]:
    assert grammar.startswith(PREFIX)
    schema: dict[str, object] = json.loads(grammar.removeprefix(PREFIX))
    assert schema.pop("x-guidance") == {"whitespace_pattern": r"[ \n\r\t]{1,64}"}
    return schema


def test_nothing_asked_for() -> None:
    assert read_grammar(None, None) == read_grammar({"type": "text"}, None) == read_tgi_grammar(None) == ""


def test_response_format() -> None:
    assert schema_of(read_grammar({"type": "json_object"}, None)) == {"type": "object"}
    named = {"name": "n", "schema": SCHEMA, "strict": True, "description": None}
    assert schema_of(read_grammar({"type": "json_schema", "json_schema": named}, None)) == SCHEMA
    assert schema_of(read_grammar({"type": "json_schema", "json_schema": {"schema": {}}}, None)) == {}
    assert schema_of(read_grammar({"type": "json", "value": SCHEMA}, None)) == SCHEMA
    assert read_grammar({"type": "regex", "value": "a+"}, None) == "start: /a+/"
    own = {"x-guidance": {"whitespace_flexible": False}, "type": "array"}
    written = read_grammar({"type": "json_schema", "json_schema": {"schema": own}}, None)
    assert json.loads(written.removeprefix(PREFIX)) == own


def test_the_order_of_properties_is_kept() -> None:
    schema = {"type": "object", "properties": {"z": {}, "a": {}, "m": {}}}
    read = schema_of(read_grammar(None, {"json": json.dumps(schema)}))
    assert list(read["properties"]) == ["z", "a", "m"]  # type: ignore[call-overload]


def test_structured_outputs() -> None:
    assert schema_of(read_grammar(None, {"json": SCHEMA, "regex": None})) == SCHEMA
    assert schema_of(read_grammar(None, {"json": json.dumps(SCHEMA)})) == SCHEMA
    assert schema_of(read_grammar({"type": "text"}, {"json": SCHEMA})) == SCHEMA
    for value in ({"json": True}, {"json_object": True, "disable_any_whitespace": False, "disable_fallback": True}):
        assert schema_of(read_grammar(None, value)) == {"type": "object"}
    assert read_grammar(None, {"choice": ["yes", 'n"\n', "yes", "👩"]}) == (
        'start: CHOICE\nCHOICE: "yes" | "n\\"\\n" | "\\ud83d\\udc69"'
    )
    lark = "start: /a/\n"
    assert read_grammar(None, {"grammar": lark}) == lark
    gbnf = 'root ::= "a"'
    assert read_grammar(None, {"grammar": gbnf}) == gbnf


@pytest.mark.parametrize(
    ("regex", "written"),
    [
        ("a/b", r"a\/b"),
        (r"a\/b", r"a\/b"),
        ("[/]", r"[\/]"),
        ("a\nb\r", r"a\nb\r"),
        (r"\\", r"\\"),
        ("\\\\\\\n", r"\\\n"),
        (r"\\/", r"\\\/"),
        (r"\d+\.\d", r"\d+\.\d"),
    ],
)
def test_regex_between_slashes(regex: str, written: str) -> None:
    assert read_grammar(None, {"regex": regex}) == f"start: /{written}/"
    assert read_tgi_grammar({"type": "regex", "value": regex}) == f"start: /{written}/"


def test_empty_regex() -> None:
    assert read_grammar(None, {"regex": ""}) == 'start: ""'  # // would be a comment


def test_tgi() -> None:
    for kind in ("json", "json_object"):
        assert schema_of(read_tgi_grammar({"type": kind, "value": SCHEMA})) == SCHEMA
        assert schema_of(read_tgi_grammar({"type": kind, "value": json.dumps(SCHEMA)})) == SCHEMA
    untyped = {"properties": {"a": {}}, "required": ["a"]}
    assert schema_of(read_tgi_grammar({"type": "json", "value": untyped})) == {"type": "object", **untyped}
    named = {"type": "json_schema", "value": {"name": "n", "schema": untyped}}
    assert schema_of(read_tgi_grammar(named)) == {"type": "object", **untyped}
    assert schema_of(read_grammar(None, {"json": untyped})) == untyped


DEEP: object = {}
for _ in range(5000):
    DEEP = {"items": DEEP}

REFUSED: list[tuple[object, object, type[RequestError], str]] = [
    ("json_object", None, InvalidParameter, "response_format"),
    ([], None, InvalidParameter, "response_format"),
    ({}, None, InvalidParameter, "response_format.type"),
    ({"type": "xml"}, None, InvalidParameter, "response_format.type"),
    ({"type": ["text"]}, None, InvalidParameter, "response_format.type"),
    ({"type": "structural_tag", "structures": []}, None, UnsupportedParameter, "response_format.type"),
    ({"type": "text", "schema": {}}, None, UnknownParameter, "response_format.schema"),
    ({"type": "json_object", "schema": {}}, None, UnknownParameter, "response_format.schema"),
    ({"type": "json_schema"}, None, InvalidParameter, "response_format.json_schema"),
    (
        {"type": "json_schema", "json_schema": {"name": "n"}},
        None,
        InvalidParameter,
        "response_format.json_schema.schema",
    ),
    (
        {"type": "json_schema", "json_schema": {"schema": 1}},
        None,
        InvalidParameter,
        "response_format.json_schema.schema",
    ),
    (
        {"type": "json_schema", "json_schema": {"schema": {}, "name": 1}},
        None,
        InvalidParameter,
        "response_format.json_schema.name",
    ),
    (
        {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}},
        None,
        InvalidParameter,
        "response_format.json_schema.strict",
    ),
    (
        {"type": "json_schema", "json_schema": {"schema": {}, "more": 1}},
        None,
        UnknownParameter,
        "response_format.json_schema.more",
    ),
    ({"type": "json_object"}, {"regex": "a"}, InvalidParameter, "structured_outputs"),
    (None, [], InvalidParameter, "structured_outputs"),
    (None, {}, InvalidParameter, "structured_outputs"),
    (None, {"json_object": False}, InvalidParameter, "structured_outputs"),
    (None, {"regex": "a", "choice": ["a"]}, InvalidParameter, "structured_outputs"),
    (None, {"jsn": {}}, UnknownParameter, "structured_outputs.jsn"),
    (
        None,
        {"regex": "a", "disable_any_whitespace": True},
        UnsupportedParameter,
        "structured_outputs.disable_any_whitespace",
    ),
    (None, {"json": {}, "whitespace_pattern": " "}, UnsupportedParameter, "structured_outputs.whitespace_pattern"),
    (None, {"structural_tag": "{}"}, UnsupportedParameter, "structured_outputs.structural_tag"),
    (None, {"json": "{"}, InvalidParameter, "structured_outputs.json"),
    (None, {"json": '{"a": NaN}'}, InvalidParameter, "structured_outputs.json"),
    (None, {"json": "[" * 5000}, InvalidParameter, "structured_outputs.json"),
    (None, {"json": 1}, InvalidParameter, "structured_outputs.json"),
    (None, {"json": []}, InvalidParameter, "structured_outputs.json"),
    (None, {"json": DEEP}, InvalidParameter, "structured_outputs.json"),
    (None, {"json": {"const": "x" * MAX_TEXT}}, InvalidParameter, "structured_outputs.json"),
    (None, {"json_object": "yes"}, InvalidParameter, "structured_outputs.json_object"),
    (None, {"regex": 1}, InvalidParameter, "structured_outputs.regex"),
    (None, {"regex": "a\\"}, InvalidParameter, "structured_outputs.regex"),
    (None, {"regex": "\ud800"}, InvalidParameter, "structured_outputs.regex"),
    (None, {"regex": "é" * (MAX_TEXT // 2 + 1)}, InvalidParameter, "structured_outputs.regex"),
    (None, {"choice": "yes"}, InvalidParameter, "structured_outputs.choice"),
    (None, {"choice": []}, InvalidParameter, "structured_outputs.choice"),
    (None, {"choice": ["a", 1]}, InvalidParameter, "structured_outputs.choice"),
    (None, {"choice": ["a"] * (MAX_CHOICES + 1)}, InvalidParameter, "structured_outputs.choice"),
    (None, {"choice": ["x" * MAX_TEXT, "y"]}, InvalidParameter, "structured_outputs.choice"),
    (None, {"grammar": " "}, InvalidParameter, "structured_outputs.grammar"),
    (None, {"grammar": '{"grammars": []}'}, InvalidParameter, "structured_outputs.grammar"),
    (None, {"grammar": None, "regex": True}, InvalidParameter, "structured_outputs.regex"),
]


@pytest.mark.parametrize(("response_format", "structured", "error", "field"), REFUSED)
def test_refused(response_format: object, structured: object, error: type[RequestError], field: str) -> None:
    with pytest.raises(error) as caught:
        read_grammar(response_format, structured)
    assert type(caught.value) is error and getattr(caught.value, "field") == field  # noqa: B009
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ("a", "grammar"),
        ({}, "grammar.type"),
        ({"type": "lark", "value": "a"}, "grammar.type"),
        ({"type": "regex"}, "grammar.value"),
        ({"type": "json"}, "grammar.value"),
        ({"type": "json", "value": 1}, "grammar.value"),
        ({"type": "json_schema", "value": {}}, "grammar.value.schema"),
        ({"type": "regex", "value": "a", "x": 1}, "grammar.x"),
    ],
)
def test_refused_of_tgi(value: object, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_tgi_grammar(value)
    assert getattr(caught.value, "field") == field  # noqa: B009


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "json", "json_schema", "schema", "regex", "choice", "grammar", "value", "x"]),
            inner,
        )
    ),
    max_leaves=12,
)


@given(ANYTHING, ANYTHING)
def test_anything_is_read_or_refused(response_format: object, structured: object) -> None:
    for read in (lambda: read_grammar(response_format, structured), lambda: read_tgi_grammar(structured)):
        try:
            assert isinstance(read(), str)
        except RequestError as error:
            assert "\n" not in str(error)
