"""/openapi.json: it is well formed, it is of this server, and what it says of bodies and answers holds.

`tests/clients/schemathesis_run.py` asks far more of it."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
from fastapi.routing import APIRoute

from headrace.core.types import EngineLimits
from headrace.server.app import all_routes
from headrace.server.config import ServeConfig
from headrace.server.schemas import MEANINGS, openapi_document
from headrace.server.schemas_requests import Bounds, decimals_below
from headrace.server.service import Service

KINDS = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
KEYWORDS: Mapping[str, type | tuple[type, ...]] = {
    "type": (str, list),
    "enum": list,
    "const": object,
    "properties": dict,
    "required": list,
    "additionalProperties": (dict, bool),
    "propertyNames": dict,
    "items": dict,
    "minItems": int,
    "maxItems": int,
    "minLength": int,
    "maxLength": int,
    "pattern": str,
    "minimum": int,
    "maximum": int,
    "exclusiveMinimum": int,
    "exclusiveMaximum": int,
    "anyOf": list,
    "allOf": list,
    "not": dict,
    "contentMediaType": str,
    "description": str,
    "default": object,
    "example": object,
    "examples": list,
}
"""The keywords that the document uses, and what stands under them."""
BOUNDS = Bounds(("demo",), (), 49152, 8192)
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def document(server_url: str) -> dict[str, Any]:
    return cast("dict[str, Any]", ask(server_url, "GET", "/openapi.json")[2])


def ask(url: str, method: str, path: str, body: object = None) -> tuple[int, str, Any]:
    """(status, content type, the JSON of the answer or its text)"""
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    try:
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, path, data, {"content-type": "application/json"} if data else {})
        response = connection.getresponse()
        kind = (response.getheader("content-type") or "").split(";")[0]
        text = response.read().decode()
        return response.status, kind, json.loads(text) if kind == "application/json" else text
    finally:
        connection.close()


def operations(document: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def find(document: Mapping[str, Any], pointer: str) -> Any:
    found: Any = document
    for part in pointer.removeprefix("#/").split("/"):
        found = found[part]
    return found


# ---------------------------------------------------------------- a small reader of JSON Schema


def fits(document: Mapping[str, Any], schema: Mapping[str, Any], value: object) -> bool:
    """Whether a value is what a schema says, as far as this document's keywords go."""

    def all_fit(schemas: Any, values: Any) -> bool:
        return all(fits(document, one, inside) for one, inside in zip(schemas, values, strict=True))

    if "$ref" in schema and not fits(document, find(document, schema["$ref"]), value):
        return False
    kinds = schema.get("type", list(KINDS))
    if not any(is_kind(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        return False
    if "enum" in schema and not any(same(value, one) for one in schema["enum"]):
        return False
    if "const" in schema and not same(value, schema["const"]):
        return False
    if "anyOf" in schema and not any(fits(document, one, value) for one in schema["anyOf"]):
        return False
    if not all(fits(document, one, value) for one in schema.get("allOf", ())):
        return False
    if "not" in schema and fits(document, schema["not"], value):
        return False
    if isinstance(value, str):
        pattern = schema.get("pattern", "").replace(r"\p{Any}", r"\s\S")
        pattern = re.sub(r"^\^\\s\\S\*\$$", "", pattern)
        return schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 2**31) and bool(
            re.search(pattern, value)
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (
            schema.get("minimum", value) <= value <= schema.get("maximum", value)
            and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
            and ("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"])
        )
    if isinstance(value, list):
        fitting = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 2**31)
        return fitting and all_fit([schema.get("items", {})] * len(value), value)
    if isinstance(value, dict):
        known = schema.get("properties", {})
        more = schema.get("additionalProperties", {})
        more = {"not": {}} if more is False else {} if more is True else more
        names = [schema.get("propertyNames", {})] * len(value)
        return (
            all(name in value for name in schema.get("required", ()))
            and all_fit(names, list(value))
            and all_fit([known.get(name, more) for name in value], list(value.values()))
        )
    return True


def is_kind(value: object, kind: str) -> bool:
    if isinstance(value, bool) or kind == "boolean":
        return isinstance(value, bool) and kind == "boolean"
    if isinstance(value, float) and kind == "integer":
        return value.is_integer()
    types: Mapping[str, type | tuple[type, ...]] = {
        "null": type(None),
        "integer": int,
        "number": (int, float),
        "string": str,
        "array": list,
        "object": dict,
    }
    return isinstance(value, types[kind])


def same(left: object, right: object) -> bool:
    return isinstance(left, bool) == isinstance(right, bool) and left == right


# ---------------------------------------------------------------- the form of the document


def check_schema(document: Mapping[str, Any], schema: Any, where: str) -> None:
    assert isinstance(schema, dict), where
    if "$ref" in schema:
        assert set(schema) == {"$ref"} and find(document, schema["$ref"]) is not None, where
        return
    for name, inside in schema.items():
        assert name in KEYWORDS and isinstance(inside, KEYWORDS[name]), f"{where}.{name}"
    kinds = schema.get("type", [])
    assert {*([kinds] if isinstance(kinds, str) else kinds)} <= KINDS, where
    for name, inside in schema.get("properties", {}).items():
        check_schema(document, inside, f"{where}.{name}")
    for name in ("items", "propertyNames", "additionalProperties", "not"):
        if isinstance(schema.get(name), dict):
            check_schema(document, schema[name], f"{where}.{name}")
    for name in ("anyOf", "allOf"):
        for i, inside in enumerate(schema.get(name, ())):
            check_schema(document, inside, f"{where}.{name}[{i}]")
    assert schema.get("enum") != [], where
    for example in [schema[name] for name in ("example", "default") if name in schema] + schema.get("examples", []):
        assert fits(document, schema, example), f"{where}: {example!r}"


@pytest.mark.parametrize("keyed", [False, True])
def test_well_formed(keyed: bool) -> None:
    document = openapi_document(BOUNDS, keyed)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["openapi"] == "3.1.0" and {"title", "version"} <= set(document["info"])
    tags = {tag["name"] for tag in document["tags"]}
    for name, schema in document["components"]["schemas"].items():
        check_schema(document, schema, name)
    identifiers = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(identifiers) == len(set(identifiers))
    for path, method, operation in operations(document):
        assert path.startswith("/") and method in ("get", "post")
        assert operation["summary"] and set(operation["tags"]) <= tags
        named = {one["name"] for one in operation.get("parameters", ()) if one["in"] == "path" and one["required"]}
        assert named == set(re.findall(r"\{(\w+)\}", path))
        if "requestBody" in operation:
            check_schema(document, operation["requestBody"]["content"]["application/json"]["schema"], path)
        for status, response in operation["responses"].items():
            told = find(document, response["$ref"]) if "$ref" in response else response
            assert re.fullmatch("[1-5][0-9]{2}", status) and told["description"]
            for kind, content in told.get("content", {}).items():
                assert re.fullmatch("[a-z]+/[a-z-]+", kind)
                check_schema(document, content["schema"], f"{path} {status}")
    schemes = document["components"].get("securitySchemes", {})
    assert bool(schemes) == keyed
    assert [one for names in document.get("security", []) for one in names] == list(schemes)


def test_nothing_is_left_over() -> None:
    text = json.dumps(openapi_document(BOUNDS, keyed=False))
    for kind in ("schemas", "responses"):
        for name in openapi_document(BOUNDS, keyed=False)["components"][kind]:
            used = f'"#/components/{kind}/{name}"' in text
            assert used or (kind == "responses" and int(name[1:]) in MEANINGS), name


class Stub:
    """What the routes read of a service before any request comes."""

    settings = ServeConfig()
    limits = EngineLimits(BOUNDS.vocab_size, BOUNDS.max_model_len)
    served = BOUNDS.models

    opened = SimpleNamespace(has_text=False, config=SimpleNamespace(max_num_seqs=1))


def test_every_route_is_in_it() -> None:
    routes = [one for router in all_routes(cast("Service", Stub())) for one in router.routes]
    described = [route for route in routes if isinstance(route, APIRoute) and route.include_in_schema]
    told = {(route.path_format, method) for route in described for method in route.methods or ()}
    document = openapi_document(BOUNDS, keyed=False)
    assert told == {(path, method.upper()) for path, method, _ in operations(document)}
    hidden = {route.path_format for route in routes if isinstance(route, APIRoute) and not route.include_in_schema}
    assert all(path in ("/", "/openapi.json") or path.startswith(("/page/", "/health", "/ping")) for path in hidden)


@pytest.mark.parametrize("limit", [1, 2, 10, 11, 97, 100, 1000, 49152, 128256])
def test_decimals_below(limit: int) -> None:
    pattern = re.compile(decimals_below(limit))
    numbers = {0, 1, 9, 10, 99, limit // 2, limit - 2, limit - 1, limit, limit + 1, limit * 10, limit + 10}
    for number in (one for one in numbers if one >= 0):
        assert bool(pattern.search(str(number))) == bool(pattern.search(f"00{number}")) == (number < limit), number
    assert not any(pattern.search(text) for text in ("", "-1", "1.0", "a", " 1", "1 "))


# ---------------------------------------------------------------- what it says of this server


def test_is_of_this_server(document: Mapping[str, Any], server_url: str) -> None:
    models = ask(server_url, "GET", "/v1/models")[2]["data"]
    one = document["paths"]["/v1/models/{model}"]["get"]["parameters"][0]["schema"]
    assert one["enum"] == [model["id"] for model in models]
    fields = document["components"]["schemas"]["CompletionRequest"]["properties"]
    ids, most_choices = fields["prompt"]["anyOf"][1], fields["n"]["description"].split()[-1]
    assert ids["maxItems"] == models[0]["max_model_len"] - 1
    bounds = Bounds(tuple(one["enum"]), (), ids["items"]["maximum"] + 1, ids["maxItems"] + 1, int(most_choices[:-1]))
    assert document == openapi_document(bounds, keyed=False)
    most = ids["items"]["maximum"]
    assert ask(server_url, "POST", "/detokenize", {"tokens": [most]})[0] == 200
    assert ask(server_url, "POST", "/detokenize", {"tokens": [most + 1]})[0] == 400


def check_answer(document: Mapping[str, Any], path: str, method: str, answer: tuple[int, str, Any]) -> None:
    """The answer is one that the document tells of."""
    status, kind, value = answer
    response = document["paths"][path][method]["responses"][str(status)]
    response = find(document, response["$ref"]) if "$ref" in response else response
    if "content" not in response:
        assert not value
        return
    schema = response["content"][kind]["schema"]
    events = kind == "text/event-stream"
    assert fits(document, schema, {"data": value} if events else value), f"{path}: {value}"


GETS = [path for path, methods in openapi_document(BOUNDS, False)["paths"].items() if "get" in methods]


@pytest.mark.parametrize("path", [path for path in GETS if path != "/chat_tokenize"])
def test_answers_to_get(document: Mapping[str, Any], server_url: str, path: str) -> None:
    answer = ask(server_url, "GET", path.format(model="demo"))
    assert answer[0] == 200
    check_answer(document, path, "get", answer)


def chat(**fields: object) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, **fields}


def text(**fields: object) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"prompt": "Hello", "max_tokens": 2, **fields}


def generate(path: str = "/generate", **parameters: object) -> tuple[str, dict[str, Any]]:
    return path, {"inputs": "Hello", "parameters": {"max_new_tokens": 2, **parameters}}


TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("f", "g")]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, {"b": "c"}]}'}}
OBJECT = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
TAKEN: tuple[tuple[str, dict[str, Any]], ...] = (
    chat(),
    chat(n=2, logprobs=True, top_logprobs=3, prompt_logprobs=1, return_token_ids=True, seed=-(2**63)),
    chat(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}, tools=TOOLS),
    chat(tools=TOOLS, tool_choice="required", parallel_tool_calls=False),
    chat(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "g"}}),
    chat(messages=[*MESSAGES, {"role": "assistant", "tool_calls": [CALL]},
                   {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "x"}]}]),
    chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": OBJECT, "strict": True}}),
    chat(response_format={"type": "json_object"}, metadata={"a": 1}, unknown=[{}]),
    chat(model="tgi", logit_bias={"007": -100, "5": 1.5}, stop=["a"], bad_words=["b"], allowed_token_ids=[1, 2, 3]),
    chat(chat_template_kwargs={"a": None}, continue_final_message=True, truncate_prompt_tokens=-1),
    text(logprobs=2, echo=True),
    text(prompt=["a", "b"], n=2, prompt_logprobs=0),
    text(prompt=[[1, 2], [3]], stream=True, max_tokens=None, stop="e", max_completion_tokens=None, ignore_eos=False),
    text(structured_outputs={"regex": r"(?i)(yes|no)\.{1,2}"}),
    text(structured_outputs={"grammar": 'start: "a" | "b"', "json": None, "disable_fallback": 1}),
    text(structured_outputs={"choice": ["a", "b"]}, best_of=1, min_tokens=1, timeout=60),
    generate(details=True, decoder_input_details=True, top_n_tokens=2, best_of=2, do_sample=True),
    generate("/", return_full_text=False, grammar={"type": "json", "value": OBJECT}, truncate=1),
    generate("/generate_stream", details=True, seed=2**64 - 1, temperature=0.5),
    ("/", {"inputs": "Hello", "stream": True, "parameters": {"max_new_tokens": 1}}),
    ("/tokenize", {"prompt": "Hello", "return_token_strs": True, "unknown": 1}),
    ("/tokenize", {"messages": MESSAGES, "tools": TOOLS}),
    ("/tokenize", {"content": ""}),
    ("/tokenize", {"inputs": "Hello"}),
    ("/detokenize", {"tokens": []}),
    ("/chat_tokenize", {"messages": MESSAGES, "model": "any"}),
)  # fmt: skip
REFUSED: tuple[tuple[str, dict[str, Any]], ...] = (
    chat(messages=[]),
    chat(messages=[{"role": "user"}]),
    chat(messages=[{"role": "user", "content": [{"type": "image_url", "text": "a"}]}]),
    chat(messages=[{"role": "tool", "content": "a"}]),
    chat(messages=[{"role": "user", "content": "a", "function_call": {}}]),
    chat(messages=[{"role": "assistant", "content": "a", "tool_calls": [{"id": "", "function": {"name": "f"}}]}]),
    chat(top_logprobs=1),
    chat(logprobs=1),
    chat(temperature=True),
    chat(temperature=2.1),
    chat(top_p=0),
    chat(n=0),
    chat(n=129),
    chat(seed=2**63),
    chat(stop=""),
    chat(stop=[""]),
    chat(stream_options={}),
    chat(logit_bias={"49152": 1}),
    chat(logit_bias={"1": 101}),
    chat(allowed_token_ids=[]),
    chat(truncate_prompt_tokens=0),
    chat(chat_template="{{ 1 }}"),
    chat(chat_template_kwargs={"tools": 1}),
    chat(tools=[{"type": "function", "function": {"name": "a b"}}]),
    chat(tools=[], tool_choice="required"),
    chat(tools=TOOLS, response_format={"type": "json_object"}),
    chat(response_format={"type": "json_object", "more": 1}),
    chat(response_format={"type": "json_schema"}),
    chat(audio={}),
    chat(echo=True),
    chat(model=5),
    chat(model="another"),
    text(prompt=""),
    text(prompt=[]),
    text(prompt=[1, "a"]),
    text(prompt=[-1]),
    text(prompt=None),
    text(logprobs=True),
    text(logprobs=21),
    text(suffix="a"),
    text(echo=True, truncate_prompt_tokens=1),
    text(structured_outputs={}),
    text(structured_outputs={"choice": []}),
    text(structured_outputs={"json": OBJECT, "regex": "a"}),
    text(structured_outputs={"json": {"type": "object", "properties": 5}}),
    text(max_tokens=0),
    text(max_tokens="1"),
    generate(temperature=0),
    generate(top_p=1),
    generate(best_of=2),
    generate(best_of=2, do_sample=True, seed=1),
    generate(best_of=3, do_sample=True),
    generate(stop=["a"] * 5),
    generate(grammar={"type": "regex"}),
    generate(adapter_id="a"),
    generate("/generate_stream", decoder_input_details=True),
    ("/", {"inputs": "Hello", "stream": True, "parameters": {"best_of": 2, "do_sample": True}}),
    ("/generate", {"inputs": ""}),
    ("/generate", {"inputs": "a", "parameters": []}),
    ("/tokenize", {}),
    ("/tokenize", {"prompt": None}),
    ("/tokenize", {"prompt": "a", "return_token_strs": 1}),
    ("/tokenize", {"inputs": 5}),
    ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}),
    ("/detokenize", {"tokens": [True]}),
    ("/detokenize", {"tokens": None}),
    ("/chat_tokenize", {"messages": "a"}),
)


def request_schema(document: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    found = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return cast("Mapping[str, Any]", found)


@pytest.mark.parametrize(("path", "body"), TAKEN)
def test_taken(document: Mapping[str, Any], server_url: str, path: str, body: dict[str, Any]) -> None:
    """Bodies that fit their schemas are taken, and the answers fit theirs."""
    assert fits(document, request_schema(document, path), body)
    answer = ask(server_url, "POST", path, body)
    assert answer[0] == 200, answer
    check_answer(document, path, "post", answer)


@pytest.mark.parametrize(("path", "body"), REFUSED)
def test_refused(document: Mapping[str, Any], server_url: str, path: str, body: dict[str, Any]) -> None:
    """Bodies that do not fit are refused, and the errors fit."""
    assert not fits(document, request_schema(document, path), body)
    answer = ask(server_url, "POST", path, body)
    assert answer[0] in (400, 404, 422), answer
    check_answer(document, path, "post", answer)


@pytest.mark.parametrize("path", ["/", "/v1/chat/completions", "/chat_tokenize", "/health"])
def test_allow_names_every_method(document: Mapping[str, Any], server_url: str, path: str) -> None:
    parts = urlsplit(server_url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    try:
        connection.request("DELETE", path)
        response = connection.getresponse()
        allowed = set((response.getheader("allow") or "").split(", "))
        assert response.status == 405
    finally:
        connection.close()
    assert allowed - {"HEAD"} == {method.upper() for method in document["paths"][path]}


@pytest.mark.parametrize(
    ("path", "body"),
    [("/tokenize", {"prompt": "a"}), ("/tokenize", {"content": "a"}), ("/detokenize", {"tokens": [1]})],
)
def test_unknown_fields_are_named(server_url: str, path: str, body: dict[str, Any]) -> None:
    parts = urlsplit(server_url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    try:
        data = json.dumps({**body, "another": 1})
        connection.request("POST", path, data, {"content-type": "application/json"})
        response = connection.getresponse()
        assert (response.status, response.getheader("x-headrace-ignored")) == (200, "another")
    finally:
        connection.close()
