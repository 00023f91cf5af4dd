"""The requests of `fuzz`: drawn from a seed, for every route of /openapi.json and a list of what it leaves out.

A route that nobody has described in FIELDS and GOOD gets bodies made from its schema, or none that is an object.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.robustness.attack_client import MIB, request

TIMEOUT = {"X-Request-Timeout": "1"}
MAX_BODY = 2 * MIB
"""What a server takes by default."""

Json = Any
Kind = tuple[Any, ...]
"""(name,) or (name, low, high) of a field's values."""

FLAG, TEXT, TEXTS, IDS, OBJECT, LIST, ANY = (
    (name,) for name in ("flag", "text", "texts", "ids", "object", "list", "any")
)
SAMPLING: Mapping[str, Kind] = {
    "temperature": ("number", 0, 2),
    "top_p": ("number", 0, 1),
    "top_k": ("integer", -1, None),
    "min_p": ("number", 0, 1),
    "typical_p": ("number", 0, 1),
    "repetition_penalty": ("number", 0, None),
    "presence_penalty": ("number", -2, 2),
    "frequency_penalty": ("number", -2, 2),
    "max_tokens": ("integer", 1, None),
    "min_tokens": ("integer", 0, None),
    "n": ("integer", 1, 128),
    "best_of": ("integer", 1, 128),
    "seed": ("integer", -(2**63), 2**63 - 1),
    "stop": TEXTS,
    "bad_words": TEXTS,
    "stop_token_ids": IDS,
    "allowed_token_ids": IDS,
    "logit_bias": OBJECT,
    "prompt_logprobs": ("integer", 0, 20),
    "truncate_prompt_tokens": ("integer", -1, 2**31 - 1),
    "priority": ("integer", -(2**31), 2**31 - 1),
    "timeout": ("number", 0, 86_400),
    "stream_options": OBJECT,
    "response_format": OBJECT,
    "structured_outputs": OBJECT,
    **dict.fromkeys(("stream", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output"), FLAG),
    **dict.fromkeys(("return_token_ids", "return_tokens_as_token_ids"), FLAG),
    **dict.fromkeys(("model", "cache_salt"), TEXT),
}
CHAT: Mapping[str, Kind] = {
    **SAMPLING,
    "messages": LIST,
    "max_completion_tokens": ("integer", 1, None),
    "logprobs": FLAG,
    "top_logprobs": ("integer", 0, 20),
    "tools": LIST,
    "parallel_tool_calls": FLAG,
    "chat_template_kwargs": OBJECT,
    "documents": LIST,
    "add_generation_prompt": FLAG,
    "chat_template": ANY,
    "guided_regex": ANY,
}
COMPLETIONS: Mapping[str, Kind] = {
    **SAMPLING,
    "prompt": ("prompt",),
    "logprobs": ("integer", 0, 20),
    "echo": FLAG,
    "add_special_tokens": FLAG,
    "suffix": ANY,
}
TGI: Mapping[str, Kind] = {
    "inputs": ("text!",),
    "parameters": OBJECT,
    "parameters.temperature": ("number", 0, 2),
    "parameters.top_p": ("number", 0, 1),
    "parameters.typical_p": ("number", 0, 1),
    "parameters.top_k": ("integer", 1, 2**31 - 1),
    "parameters.top_n_tokens": ("integer", 0, 5),
    "parameters.max_new_tokens": ("integer", 1, 2**32 - 1),
    "parameters.best_of": ("integer", 1, 2),
    "parameters.seed": ("integer", 0, 2**64 - 1),
    "parameters.truncate": ("integer", 1, 2**31),
    "parameters.repetition_penalty": ("number", 0, None),
    "parameters.frequency_penalty": ("number", -2, 2),
    "parameters.stop": TEXTS,
    "parameters.grammar": OBJECT,
    "parameters.adapter_id": ANY,
    **dict.fromkeys(("parameters.do_sample", "parameters.details", "parameters.watermark"), FLAG),
    **dict.fromkeys(("parameters.return_full_text", "parameters.decoder_input_details"), FLAG),
}
TOKENIZE: Mapping[str, Kind] = {"prompt": ("text!",), "return_token_strs": FLAG, "add_special_tokens": FLAG}
FIELDS: Mapping[str, Mapping[str, Kind]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "/generate": TGI,
    "/generate_stream": TGI,
    "/": {**TGI, "stream": FLAG},
    "/chat_tokenize": {name: CHAT[name] for name in ("messages", "tools", "chat_template", "documents")},
    "/tokenize": TOKENIZE,
    "/detokenize": {"tokens": IDS},
}
MESSAGES = [{"role": "user", "content": "Hi é 👍"}]
PARAMETERS = {"max_new_tokens": 2, "temperature": 0.5, "top_k": 5, "stop": ["x"], "seed": 3, "details": True}
GOOD: Mapping[str, Mapping[str, Json]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 2, "temperature": 0.5, "logprobs": True, "stop": "x"},
    "/v1/completions": {"prompt": [1, 2, 3], "max_tokens": 2, "echo": True, "logit_bias": {"5": 1.5}, "stream": True},
    "/generate": {"inputs": "Hi é", "parameters": PARAMETERS},
    "/generate_stream": {"inputs": "Hi é", "parameters": PARAMETERS},
    "/": {"inputs": "Hi é", "parameters": PARAMETERS, "stream": False},
    "/chat_tokenize": {"messages": MESSAGES},
    "/tokenize": {"prompt": "Hi é", "return_token_strs": True},
    "/detokenize": {"tokens": [1, 2, 3]},
}
"""A good body of each route that takes one."""
UNLISTED = (("GET", "/openapi.json"), ("GET", "/page/live.json"), ("GET", "/page/page.js"), ("GET", "/chat_tokenize"))
NOWHERE = (
    "/v1/embeddings",
    "/v1",
    "/docs",
    "/admin",
    "/v1/completions/",
    "/page/../../etc/passwd",
    "/.env",
    "/api/chat",
)


@dataclass(frozen=True)
class Route:
    method: str
    path: str
    fields: Mapping[str, Kind]
    good: Mapping[str, Json]


@dataclass(frozen=True)
class Case:
    """One request. `bad`: it has to be refused. `fresh`: on a connection of its own."""

    what: str
    data: bytes | Callable[[], Iterator[bytes]]
    bad: bool = True
    fresh: bool = False


def routes_of(description: Mapping[str, Json], more: Sequence[tuple[str, str]] = ()) -> list[Route]:
    """Of the server's own description (`/openapi.json`), what that leaves out, and some more."""
    found: list[tuple[str, str, Json]] = [
        (method.upper(), path, operation)
        for path, item in description["paths"].items()
        for method, operation in item.items()
        if method in ("get", "post", "put", "patch", "delete")
    ]
    known = {(method, path) for method, path, _ in found}
    found += [(method, path, {}) for method, path in (*UNLISTED, *more) if (method, path) not in known]
    return [_route(method, path, _schema(description, operation)) for method, path, operation in found]


def _schema(description: Mapping[str, Json], operation: Mapping[str, Json]) -> Mapping[str, Json]:
    """Of an operation's body; empty where it has none."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    schema: Mapping[str, Json] = content.get("schema", {})
    place = str(schema.get("$ref", "")).removeprefix("#/components/schemas/")
    found: Mapping[str, Json] = description["components"]["schemas"][place] if place else schema
    return found


def _route(method: str, path: str, schema: Mapping[str, Json]) -> Route:
    if path in FIELDS:
        return Route(method, path, FIELDS[path], GOOD[path])
    properties = schema.get("properties", {})
    fields = {name: kind for name, one in properties.items() if (kind := _kind_of(one))}
    samples: Mapping[str, Json] = {"flag": True, "text": "Hi", "object": {}, "list": [], "integer": 1, "number": 1}
    good = {name: samples[fields[name][0]] for name in schema.get("required", ()) if name in fields}
    return Route(method, path, fields, good)


def _kind_of(schema: Mapping[str, Json]) -> Kind | None:
    """Of a field that is not in FIELDS."""
    kinds = schema.get("type", ())
    kind = next((one for one in ([kinds] if isinstance(kinds, str) else kinds) if one != "null"), None)
    if kind in ("integer", "number"):
        return (kind, schema.get("minimum"), schema.get("maximum"))
    return {"boolean": FLAG, "string": TEXT, "object": OBJECT, "array": LIST}.get(str(kind))


# ---------------------------------------------------------------- wrong values and what is no JSON


def wrong_values(kind: Kind) -> list[Json]:
    """Values that no field of this kind may have."""
    name = kind[0]
    other: list[Json] = [{}, {"a": 1}, [[]], [None], True, False, 1, -1, 1.5, "", "1", "true", "\x00", "x" * 3000]
    if name in ("integer", "number"):
        low, high = kind[1:]
        outside = ([low - 1, -(10**400)] if low is not None else []) + ([high + 1, 10**400] if high is not None else [])
        rest = [one for one in other if isinstance(one, bool | str | dict | list)]
        return [*outside, *rest, 1.5] if name == "integer" else [*outside, *rest]
    kept: Mapping[str, Callable[[Json], bool]] = {
        "flag": lambda one: not isinstance(one, bool),
        "text": lambda one: not isinstance(one, str) or one in ("",),
        "text!": lambda one: not isinstance(one, str),
        "texts": lambda one: not isinstance(one, str) or not one,
        "ids": lambda one: True,
        "object": lambda one: not isinstance(one, dict),
        "list": lambda one: not isinstance(one, list) or one == [None],
        "prompt": lambda one: not isinstance(one, str),
        "any": lambda one: one not in ("", False, {}),
    }
    more: Mapping[str, list[Json]] = {
        "texts": [[""], [1], ["a", None], [["a"]]],
        "ids": [[-1], [2**31], [2**63], [2**64], [10**40], [1.5], ["1"], [True], [[1]], [10**9, 1]],
        "prompt": [[], [[]], [1, "a"], [[1], "a"], [-1], [2**31], [2**64], [10**40], [1.5], [[1], [10**12]], [True]],
        "object": [[["a", 1]]],
    }
    return [one for one in other if kept[name](one)] + more.get(name, [])


SURROGATES = ('"\\ud800"', '"a\\udfffb"', '{"\\ud83d": 1}', '["\\udc00\\ud800"]')
NO_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "-1e400", "01", "1.", ".5", "+1", "0x10", "1_000")
RAW = (
    *SURROGATES,
    *NO_NUMBERS,
    '"a\nb"',
    '"\x00"',
    '"\\x41"',
    "'a'",
    "undefined",
    "tru",
    "[1,]",
    "{,}",
    "[" * 70 + "]" * 70,
)
"""Texts that are no value of JSON, or of no text or number."""


def spoil_text(draw: random.Random, body: Mapping[str, Json]) -> bytes:
    """A body that is no JSON object in UTF-8."""
    whole = json.dumps(dict(body))
    data = whole.encode()
    at = draw.randrange(1, len(data))
    ways: Sequence[Callable[[], bytes]] = (
        lambda: (whole[:-1] + f', "zz": {draw.choice(RAW)}}}').encode(),
        lambda: data[:at],
        lambda: data + draw.choice((b"}", b"x", b"{}", b",", b"\x00")),
        lambda: b"\xef\xbb\xbf" + data,
        lambda: whole.encode(draw.choice(("utf-16", "utf-32", "utf-16-le"))),
        lambda: (
            (whole[:-1] + ', "zz": "').encode() + draw.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xe2")) + b'"}'
        ),
        lambda: (whole[:-1] + ', "a": 1, "a": 2}').encode(),
        lambda: f"[{whole}]".encode(),
        lambda: draw.choice((b"", b" ", b"null", b"1", b'"x"', b"true", b"[]", b"\x00", b"//x\n{}", b"a=1&b=2")),
    )
    return draw.choice(ways)()


def with_value(route: Route, name: str, value: str) -> bytes:
    """The good body with this JSON text in a field."""
    place, _, inside = name.rpartition(".")
    rest = json.dumps({key: one for key, one in route.good.items() if key != (place or inside)})[:-1]
    pair = f'"{place}": {{"{inside}": {value}}}' if place else f'"{inside}": {value}'
    return f"{rest}{', ' if len(rest) > 1 else ''}{pair}}}".encode()


def spoil_fields(draw: random.Random, route: Route) -> bytes:
    """One to three known fields with wrong values, beside good ones and unknown ones."""
    body = json.loads(json.dumps(dict(route.good)))
    for name in draw.sample(sorted(route.fields), min(len(route.fields), draw.choice((1, 1, 2, 3)))):
        place, _, inside = name.rpartition(".")
        value = draw.choice(wrong_values(route.fields[name]))
        if not place:
            body[name] = value
        elif isinstance(body.setdefault(place, {}), dict):
            body[place][inside] = value
    for _ in range(draw.choice((0, 0, 1, 3))):
        body[f"zz{draw.randrange(1000)}"] = draw.choice(({}, [1, "é"], "\x00", 1e300, None, {"a": {"b": []}}))
    return json.dumps(body).encode()


def edge_values(kind: Kind) -> list[Json]:
    """The outermost numbers that a field may have, and what lies where machine integers end: good or not, no reason to
    fail."""
    if kind[0] == "integer":
        ends = [end for end in kind[1:] if end is not None]
        return [
            *ends,
            *(sign * 2**power + more for power in (31, 32, 63, 64) for sign in (1, -1) for more in (-1, 0, 1)),
        ]
    if kind[0] == "number":
        return [0, -0.0, 5e-324, 1e-45, 1e-38, 3.5e38, 1.7e308, 1e-5, 0.999999999999, 2**64, *kind[1:]]
    if kind[0] == "ids":
        return [[0], [0] * 5000, list(range(3000))]
    if kind[0] == "texts":
        return [["a"] * 1000, "\x00", "é" * 5000, "\ufffd", " ", ["\n"]]
    return [None]


def value_cases(draw: random.Random, routes: Sequence[Route], count: int) -> Iterator[Case]:
    """Wrong values, no JSON, unknown routes, methods and ids."""
    bodies = [route for route in routes if route.method == "POST"]
    for index in range(count):
        if index % 8 == 7:
            route = draw.choice(routes)
            method = draw.choice(("PUT", "DELETE", "PATCH", "OPTIONS", "FOO", "get"))
            path = draw.choice((route.path, route.path, *NOWHERE, f"/v1/models/{_hostile_name(draw)}"))
            data = request(method, path, draw.choice((None, {}, {"a": 1})), TIMEOUT)
            yield Case(f"{method} {path}", data, fresh=method in ("FOO", "get"))
            continue
        route = draw.choice(bodies)
        if index % 8 == 3 and route.fields:
            name = draw.choice(sorted(route.fields))
            body = with_value(route, name, json.dumps(draw.choice(edge_values(route.fields[name]))))
            yield Case(
                f"edge of {name} in {route.path} {body[-200:]!r}", request("POST", route.path, body, TIMEOUT), bad=False
            )
            continue
        spoil = not route.fields or draw.random() < 0.25
        body = spoil_text(draw, route.good) if spoil else spoil_fields(draw, route)
        yield Case(f"POST {route.path} {body[:300]!r}", request("POST", route.path, body, TIMEOUT))


def _hostile_name(draw: random.Random) -> str:
    return draw.choice(("..%2f..%2fetc%2fpasswd", "%00", "%ff%fe", "a" * 4000, "%0d%0aSet-Cookie:x", "{x}", "%25s%25n"))


# ---------------------------------------------------------------- changed bytes

PIECES = (
    b"\x00",
    b"\xff",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\",
    b"\\ud800",
    b"\r\n",
    b"\n",
    b"-",
    b"9",
    b"e9",
)
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,18})[ \t]*\r\n", re.IGNORECASE)


def mutate(draw: random.Random, data: bytes) -> bytes:
    """One to four small changes."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(changed)) if changed else 0
        length = draw.randint(1, 8)
        way = draw.randrange(5)
        if way == 0 and changed:
            changed[at] ^= 1 << draw.randrange(8)
        elif way == 1 and changed:
            changed[at] = draw.randrange(256)
        elif way == 2:
            del changed[at : at + length]
        elif way == 3:
            changed[at:at] = changed[at : at + length]
        else:
            changed[at:at] = draw.choice(PIECES)
    return bytes(changed)


def completed(data: bytes) -> bytes:
    """With whatever the server would otherwise wait for: the end of the headers, the rest of a body."""
    head, end, body = data.partition(b"\r\n\r\n")
    if not end:
        return data + b"\r\n\r\n\r\n\r\n"
    found = _LENGTH.search(head + b"\r\n")
    missing = int(found[1]) - len(body) if found else 0
    return data + b" " * missing if 0 < missing <= MAX_BODY else data


def mutation_cases(draw: random.Random, routes: Sequence[Route], count: int) -> Iterator[Case]:
    bodies = [route for route in routes if route.good]
    for index in range(count):
        route = draw.choice(bodies if index % 4 else routes)
        path = route.path.replace("{model}", "demo")
        body = json.dumps(dict(route.good), ensure_ascii=False).encode() if route.good else None
        if body is not None and index % 3:
            data = request(route.method, path, mutate(draw, body), TIMEOUT)
        else:
            data = completed(mutate(draw, request(route.method, path, body, TIMEOUT)))
        yield Case(f"changed {data[:60]!r} … {data[-200:]!r}", data, bad=False, fresh=True)
