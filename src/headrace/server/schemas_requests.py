"""JSON schemas of request bodies, for /openapi.json (`server/schemas.py`).

What a schema demands, the server demands too, and what fits it is taken. Where JSON Schema cannot say when a value is
taken, since that depends on another value, the field stands in the description alone. Where a text is itself a
language, its schema is the simple form or any text (`ANY`). null is the same as absent; unknown fields are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headrace.api.messages import DETAILS, MAX_CALLS, ROLES
from headrace.api.openai import COMPLETION_MAX_TOKENS, INERT, MAX_CHOICES, NEUTRAL, RESERVED_VARIABLES
from headrace.api.structured import MAX_CHOICES as MAX_OPTIONS
from headrace.core.types import MAX_INT, MAX_LOGPROBS, MAX_N
from headrace.server.openai import PLACEHOLDERS

Schema = dict[str, Any]
INT32 = 2**31 - 1

REGEX = r"^(?:(?:[a-zA-Z0-9 ,:-]|\\[dws]|\[a-z\]|\([a-z]{1,4}\|[a-z]{1,4}\))[*+?]?){1,16}$"
"""Regular expressions of the simple kind."""
ANY = r"^\p{Any}*$"
"""Any text. Tools that check a value read it as such; those that make examples up cannot draw from it, and keep to the
form beside it, whose texts are surely taken."""
NAME = "^[a-zA-Z0-9_-]{1,64}$"
OTHER_NAME = r"^(?:[a-zA-Z0-9_-]|[^\p{Any}]){1,64}$"
"""The same, and as `ANY` for checks alone: of several tools each has a name of its own."""
LARK = '^start: "[a-z ]{1,16}"$'
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)
"""An image that is surely taken: one red pixel."""
ARGUMENTS = r'^(?:\{(?:"[a-z]{1,8}": (?:"[a-z ]{0,16}"|-?[1-9][0-9]{0,5}|true|false|null))?\})?$'


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the running service allows."""

    models: tuple[str, ...]
    adapters: tuple[str, ...]
    vocab_size: int
    max_model_len: int
    max_choices: int = MAX_CHOICES
    """Most answers to one body: prompts × n."""
    empty_prompt: bool = False
    """Whether a text without characters has tokens."""
    max_images: int = 0
    """Most images of a body; 0: the model reads none."""


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def maybe(kind: str, default: object = None, **bounds: Any) -> Schema:
    """A field that may be null."""
    return {"type": [kind, "null"], "default": default, **bounds}


def one_of(*values: object) -> Schema:
    """A field with few values; null is another."""
    found: list[object] = []
    for value in (*values, None):
        if not any(type(value) is not bool and type(one) is not bool and value == one for one in found):
            found.append(value)
    return {"enum": found, "default": None}


def obj(properties: Mapping[str, object], *required: str, **more: Any) -> Schema:
    """An object with these fields."""
    schema: Schema = {"type": "object", "properties": dict(properties), **more}
    return schema | {"required": list(required)} if required else schema


def decimals_below(limit: int) -> str:
    """A pattern of the decimal numbers from 0 to `limit` − 1, with any zeros before them."""
    top = str(limit - 1)
    found = [rf"[0-9]{{1,{len(top) - 1}}}"] if len(top) > 1 else []
    for at, digit in enumerate(top):
        if digit > "0":
            rest = len(top) - at - 1
            found.append(f"{top[:at]}[0-{int(digit) - 1}]" + (f"[0-9]{{{rest}}}" if rest else ""))
    return f"^0*(?:{'|'.join((*found, top))})$"


# ---------------------------------------------------------------- what chat and completions share


def token_id(bounds: Bounds) -> Schema:
    """The id of a token that the model has."""
    return {"type": "integer", "minimum": 0, "maximum": bounds.vocab_size - 1}


def _token_ids(bounds: Bounds, **more: Any) -> Schema:
    return maybe("array", items=token_id(bounds), **more)


def texts() -> Schema:
    """One text or several."""
    return {
        "type": ["string", "array", "null"],
        "default": None,
        "minLength": 1,
        "items": {"type": "string", "minLength": 1},
    }


def number_of_answers(bounds: Bounds) -> Schema:
    """`n`."""
    told = f"Prompts × n: up to {min(MAX_CHOICES, bounds.max_choices)}."
    return maybe("integer", 1, minimum=1, maximum=min(MAX_N, bounds.max_choices), description=told)


def _common(bounds: Bounds) -> Schema:
    bias = {"pattern": decimals_below(bounds.vocab_size), "maxLength": 10}
    inert = {name: {"description": "Taken, and without any effect."} for name in sorted(INERT)}
    neutral = {name: one_of(*values) for name, values in NEUTRAL.items()}
    return (
        inert
        | neutral
        | {
            "model": one_of(*bounds.models, *bounds.adapters, *sorted(PLACEHOLDERS)),
            "temperature": maybe("number", 1, minimum=0, maximum=2, description="0: greedy."),
            "top_p": maybe("number", 1, exclusiveMinimum=0, maximum=1),
            "top_k": maybe("integer", 0, minimum=-1, maximum=MAX_INT, description="0 and -1: off."),
            "min_p": maybe("number", 0, minimum=0, maximum=1),
            "typical_p": maybe("number", 1, exclusiveMinimum=0, maximum=1),
            "repetition_penalty": maybe("number", 1, exclusiveMinimum=0),
            "presence_penalty": maybe("number", 0, minimum=-2, maximum=2),
            "frequency_penalty": maybe("number", 0, minimum=-2, maximum=2),
            "seed": maybe("integer", minimum=-MAX_INT - 1, maximum=MAX_INT, description="null: one is drawn."),
            "n": number_of_answers(bounds),
            "stop": texts(),
            "stop_token_ids": _token_ids(bounds),
            "include_stop_str_in_output": maybe("boolean", False),
            "ignore_eos": maybe("boolean", False),
            "skip_special_tokens": maybe("boolean", True),
            "logit_bias": maybe(
                "object", propertyNames=bias, additionalProperties={"type": "number", "minimum": -100, "maximum": 100}
            ),
            "prompt_logprobs": maybe("integer", minimum=0, maximum=MAX_LOGPROBS),
            "truncate_prompt_tokens": {
                **maybe("integer", minimum=-1, maximum=INT32),
                "not": {"const": 0},
                "description": "Only so many of the prompt's last tokens count; -1: as many as fit.",
            },
            "return_token_ids": maybe("boolean", False),
            "return_tokens_as_token_ids": maybe("boolean", False),
            "cache_salt": maybe("string", minLength=1, maxLength=1024),
            "priority": maybe("integer", 0, minimum=-INT32 - 1, maximum=INT32, description="Lower goes first."),
            "stream": maybe("boolean", False),
            "stream_options": maybe(
                "object",
                properties={
                    "include_usage": maybe("boolean", False),
                    "continuous_usage_stats": maybe("boolean", False),
                    "include_obfuscation": {"description": "Taken, and without any effect."},
                },
                description="Only beside stream: true.",
            ),
        }
    )


MORE = (
    "Also taken: min_tokens (an integer from 0 to max_tokens, and to the room that the prompt leaves), best_of (what n "
    "is), timeout (seconds above 0, up to 86400, after which the answer is 408). Unknown fields are ignored and named "
    "in the header x-headrace-ignored, or refused by a server with --strict."
)
_STREAMED: Mapping[str, Any] = {
    "anyOf": [
        {"properties": {"stream_options": {"type": "null"}}},
        {"properties": {"stream": {"const": True}}, "required": ["stream"]},
    ]
}


def _masks(bounds: Bounds) -> Schema:
    """Fields that may leave no token to an answer that has a form."""
    return {"allowed_token_ids": _token_ids(bounds, minItems=1), "bad_words": texts()}


def _formed() -> list[Schema]:
    """Bodies whose answer has a form."""
    structured = {"structured_outputs": ref("StructuredOutputs"), "response_format": one_of({"type": "text"})}
    formatted = {"response_format": ref("ResponseFormat"), "structured_outputs": {"type": "null"}}
    return [
        {"properties": structured, "required": ["structured_outputs"]},
        {"properties": formatted, "required": ["response_format"]},
    ]


def _free(bounds: Bounds) -> Schema:
    """What bodies of an answer without a form have."""
    formats = {"structured_outputs": {"type": "null"}, "response_format": one_of({"type": "text"})}
    return formats | _masks(bounds)


def completion_request(bounds: Bounds) -> Schema:
    """The body of POST /v1/completions."""
    text = {"type": "string"} if bounds.empty_prompt else {"type": "string", "minLength": 1}
    ids = {"type": "array", "minItems": 1, "maxItems": bounds.max_model_len - 1, "items": token_id(bounds)}
    several: list[Schema] = [{"type": "array", "minItems": 1, "items": one} for one in (text, ids)]
    prompts = [text, ids, *several]
    own = {
        "prompt": {"anyOf": prompts, "example": "The capital of France is"},
        "max_tokens": maybe("integer", COMPLETION_MAX_TOKENS, minimum=1, maximum=MAX_INT),
        "logprobs": maybe("integer", minimum=0, maximum=MAX_LOGPROBS),
        "echo": maybe("boolean", False),
        "add_special_tokens": maybe("boolean", True),
    }
    echo: Schema = {
        "anyOf": [
            {"properties": {"echo": {"enum": [False, None]}}},
            {"properties": {"truncate_prompt_tokens": {"type": "null"}}},
        ]
    }
    kinds = {"anyOf": [{"properties": _free(bounds)}, *_formed()]}
    return obj(
        _common(bounds) | own,
        "prompt",
        allOf=[_STREAMED, echo, kinds],
        description="No field of chats is taken but those named here. " + MORE,
    )


# ---------------------------------------------------------------- chat


def _chat_fields(bounds: Bounds) -> Schema:
    """What shapes the prompt of a chat."""
    reserved: Schema = {"anyOf": [{"enum": sorted(RESERVED_VARIABLES)}, {"pattern": "template|_token$"}]}
    return {
        "messages": {
            "type": "array",
            "minItems": 1,
            "items": ref("Message"),
            "example": [{"role": "user", "content": "Hello"}],
        },
        "add_generation_prompt": maybe("boolean", description="Default: whether the final message is not continued."),
        "continue_final_message": maybe("boolean", False),
        "chat_template": {"type": "null", "description": "Templates of clients are refused."},
        "chat_template_kwargs": maybe("object", propertyNames={"not": reserved}),
        "documents": maybe("array", items={"type": "object"}),
    }


_CONTINUED: Mapping[str, Any] = {
    "anyOf": [
        {"properties": {"continue_final_message": {"enum": [False, None]}}},
        {"properties": {"add_generation_prompt": {"enum": [False, None]}}},
    ]
}


def chat_request(bounds: Bounds) -> Schema:
    """The body of POST /v1/chat/completions."""
    tokens = maybe("integer", minimum=1, maximum=MAX_INT)
    own = {
        "max_completion_tokens": tokens | {"description": "Default: the rest of the context."},
        "max_tokens": {key: value for key, value in tokens.items() if key != "default"}
        | {"examples": [16], "description": "The older name; max_completion_tokens wins."},
        "logprobs": maybe("boolean", False),
        "top_logprobs": maybe("integer", minimum=0, maximum=MAX_LOGPROBS, description="Only beside logprobs: true."),
        "parallel_tool_calls": maybe("boolean", True),
        "echo": one_of(False),
        "add_special_tokens": one_of(False),
    }
    scored: Schema = {
        "anyOf": [
            {"properties": {"top_logprobs": {"type": "null"}}},
            {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
        ]
    }
    may = {"enum": ["none", "auto", None], "default": None}
    without = {"tools": maybe("array", maxItems=0), "tool_choice": may}
    free = _free(bounds) | {"tools": _tools(), "tool_choice": may}
    named = obj({"type": {"const": "function"}, "function": obj({"name": _name(OTHER_NAME)}, "name")})
    several = {"type": "array", "minItems": 1}
    called = {
        "tools": {
            "anyOf": [{**several, "maxItems": 1, "items": ref("CalledTool")}, {**several, "items": ref("CalledTools")}]
        },
        "tool_choice": {"anyOf": [{"const": "required"}, named | {"required": ["type", "function"]}]},
        "structured_outputs": {"type": "null"},
        "response_format": one_of({"type": "text"}),
    }
    formed = [{**kind, "properties": kind["properties"] | without} for kind in _formed()]
    kinds: Schema = {
        "anyOf": [{"properties": free}, *formed, {"properties": called, "required": ["tools", "tool_choice"]}]
    }
    found = _common(bounds) | _chat_fields(bounds) | own
    for name in ("tools", "tool_choice", "add_generation_prompt"):  # of the kinds, or in words
        del found[name]
    told = (
        "Tools have names of their own, and a named choice is one of them. add_generation_prompt is taken (true unless "
        "the final message is continued). "
    )
    return obj(found, "messages", allOf=[_STREAMED, scored, kinds], description=told + MORE)


def rendered_chat(bounds: Bounds, **more: Schema) -> Schema:
    """A chat of which only the prompt is made. `more`: fields beside."""
    fields = _chat_fields(bounds) | {"tools": _tools(), **more}
    return obj(fields, "messages", allOf=[_CONTINUED])


def _image_part(max_images: int) -> Schema:
    url = {
        "anyOf": [{"const": PIXEL}, {"type": "string", "pattern": ANY}],
        "example": PIXEL,
        "description": "data: with a PNG, JPEG, WebP or GIF in base64; http:, https: and file: where they are allowed.",
    }
    detail = one_of(*DETAILS) | {"description": "Without any effect: each image is looked at as closely as can be."}
    image: Schema = {"anyOf": [obj({"url": url, "detail": detail}, "url"), url]}
    told = f"Up to {max_images} images in a body."
    return obj({"type": {"const": "image_url"}, "image_url": image}, "type", "image_url", description=told)


def message(max_images: int = 0) -> Schema:
    """A message of a chat. `max_images`: of a body; 0: the model reads none."""
    text = maybe("string")
    part = obj({"type": {"const": "text"}, "text": {"type": "string"}}, "type", "text")
    told: Schema = {"type": ["string", "array"], "minItems": 1, "items": part, "example": "Hello"}
    content = told | {"items": {"anyOf": [part, _image_part(max_images)]}} if max_images else told
    never = {"type": "null"}
    shared = {
        **dict.fromkeys(("name", "reasoning", "reasoning_content", "thinking"), text),
        **dict.fromkeys(("refusal", "audio", "function_call"), never),
        "annotations": maybe("array", maxItems=0),
    }
    no_calls = {"tool_calls": maybe("array", maxItems=0)}
    roles = {"enum": [role for role in ROLES if role != "tool"], "example": "user"}
    identifier = {"type": "string", "minLength": 1, "maxLength": 256}
    arguments: Schema = {
        "anyOf": [{"type": ["string", "object", "null"], "pattern": ARGUMENTS}, {"type": "string", "pattern": ANY}],
        "description": "A JSON object, in a string or as it is.",
        "example": '{"city": "Oslo"}',
    }
    function = obj({"name": identifier, "arguments": arguments}, "name")
    kind = {"enum": ["function", None]}
    call = obj({"id": identifier, "type": kind, "function": function}, "id", "function")
    calls = {"type": "array", "minItems": 1, "items": call, "description": f"Up to {MAX_CALLS}."}
    said = shared | {"tool_call_id": never}
    calling = said | {"role": {"const": "assistant"}, "tool_calls": calls}
    calling["content"] = content | {"type": ["string", "array", "null"]}
    result = shared | no_calls | {"role": {"const": "tool"}, "content": told, "tool_call_id": identifier}
    return {
        "anyOf": [
            obj(said | no_calls | {"role": roles, "content": content}, "role", "content"),
            obj(calling, "role", "tool_calls"),
            obj(result, "role", "content", "tool_call_id"),
        ]
    }


def _tools() -> Schema:
    arrays = [{"type": "array", "maxItems": 1, "items": ref("Tool")}, {"type": "array", "items": ref("Tools")}]
    return {"anyOf": [{"type": "null"}, *arrays], "default": None}


def _name(pattern: str) -> Schema:
    return {"type": "string", "pattern": pattern, "example": "get_weather"}


def tool(called: bool, several: bool = False) -> Schema:
    """A tool. `called`: one that must be, so that its parameters become a grammar. `several`: one of them."""
    parameters: Schema = {
        "type": ["object", "null"],
        "properties": {"type": {"const": "object"}},
        "description": "A JSON schema of type object.",
    }
    if called:
        parameters["properties"] |= _members()
    function = obj(
        {
            "name": _name(OTHER_NAME if several else NAME),
            "description": maybe("string"),
            "parameters": parameters | {"default": None},
            "strict": maybe("boolean", False),
        },
        "name",
    )
    return obj({"type": {"enum": ["function", None]}, "function": function}, "function")


# ---------------------------------------------------------------- the form of answers


def _members() -> Schema:
    names = ["string", "integer", "number", "boolean", "null", "array", "object"]
    one = {"type": ["object", "boolean"], "properties": {"type": {"enum": names}}}
    return {
        "properties": {"type": "object", "additionalProperties": one},
        "required": {"type": "array", "items": {"type": "string"}},
    }


def json_schema() -> Schema:
    """JSON schemas that make grammars; of objects, or of anything else."""
    others = ["string", "integer", "number", "boolean", "null", "array"]
    whole = obj({"type": {"const": "object"}, **_members()})
    return {
        "anyOf": [
            whole,
            obj({"type": {"enum": others}}, "type"),
            {"const": True},
            {"type": "string", "pattern": ANY},
        ],
        "description": "A JSON schema, as far as llguidance takes it, or its JSON text.",
        "example": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }


def closed(properties: Mapping[str, object], *required: str) -> Schema:
    """An object that has no other fields."""
    return obj(properties, *required, additionalProperties={"type": "null"})


def named_schema() -> Schema:
    """OpenAI's schema with a name."""
    fields = {
        "name": maybe("string"),
        "description": maybe("string"),
        "strict": maybe("boolean"),
        "schema": ref("JsonSchema"),
    }
    return closed(fields, "schema")


def response_format() -> Schema:
    """`response_format`, where it asks for a form."""
    kinds = [
        closed({"type": {"const": "json_object"}}, "type"),
        closed({"type": {"const": "json_schema"}, "json_schema": named_schema()}, "type", "json_schema"),
        closed({"type": {"const": "json"}, "value": ref("JsonSchema")}, "type", "value"),
        closed({"type": {"const": "regex"}, "value": regex()}, "type", "value"),
    ]
    return {"anyOf": kinds}


def regex() -> Schema:
    """A regular expression."""
    return {
        "anyOf": [{"type": "string", "pattern": REGEX}, {"type": "string", "pattern": ANY}],
        "description": "A regular expression that the whole answer matches, in Rust's syntax without look-around.",
        "example": "[0-9]{4}",
    }


def structured_outputs() -> Schema:
    """`structured_outputs`: exactly one kind of form."""
    kinds: Mapping[str, Schema] = {
        "json": ref("JsonSchema"),
        "regex": regex(),
        "choice": {"type": "array", "minItems": 1, "maxItems": MAX_OPTIONS, "items": {"type": "string"}},
        "grammar": {
            "anyOf": [{"type": "string", "pattern": LARK}, {"type": "string", "pattern": ANY}],
            "description": "A grammar in Lark (llguidance's dialect) or GBNF.",
            "example": 'start: "yes"',
        },
        "json_object": {"const": True},
    }
    others = {"enum": [None, False]}
    inert = {"disable_fallback": {"description": "Taken, and without any effect."}}
    return {
        "anyOf": [obj({name: schema, **inert}, name, additionalProperties=others) for name, schema in kinds.items()]
    }
