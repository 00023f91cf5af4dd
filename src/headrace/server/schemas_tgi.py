"""JSON schemas of the bodies of TGI's routes and of those that tokenise, for /openapi.json (`server/schemas.py`)."""

from __future__ import annotations

from typing import Any

from headrace.api.tgi import MAX_BEST_OF, MAX_STOP, MAX_TOP_N
from headrace.server.openai import PLACEHOLDERS
from headrace.server.schemas_requests import (
    INT32,
    Bounds,
    Schema,
    closed,
    maybe,
    named_schema,
    obj,
    one_of,
    ref,
    regex,
    rendered_chat,
    token_id,
)


def tgi_grammar() -> Schema:
    """`parameters.grammar` of TGI."""
    kinds = [
        closed({"type": {"enum": ["json", "json_object"]}, "value": ref("JsonSchema")}, "type", "value"),
        closed({"type": {"const": "json_schema"}, "value": named_schema()}, "type", "value"),
        closed({"type": {"const": "regex"}, "value": regex()}, "type", "value"),
    ]
    return {"anyOf": [{"type": "null"}, *kinds], "default": None}


def tgi_parameters(bounds: Bounds, streamed: bool) -> Schema:
    """`parameters` of TGI's bodies. `streamed`: of an answer that is sent as it comes."""
    choosing = {
        "temperature": maybe("number", exclusiveMinimum=0, maximum=2),
        "top_k": maybe("integer", minimum=1, maximum=INT32),
        "top_p": maybe("number", exclusiveMinimum=0, exclusiveMaximum=1),
        "typical_p": maybe("number", exclusiveMinimum=0, exclusiveMaximum=1),
    }
    fields = choosing | {
        "best_of": one_of(1) if streamed else maybe("integer", minimum=1, maximum=MAX_BEST_OF),
        "repetition_penalty": maybe("number", exclusiveMinimum=0),
        "frequency_penalty": maybe("number", minimum=-2, maximum=2),
        "do_sample": maybe("boolean", False),
        "max_new_tokens": {
            "type": ["integer", "null"],
            "minimum": 1,
            "maximum": 2**32 - 1,
            "examples": [16],
            "description": "Default: the rest of the context.",
        },
        "return_full_text": maybe("boolean"),
        "stop": maybe("array", items={"type": "string", "minLength": 1}, maxItems=MAX_STOP),
        "truncate": maybe("integer", minimum=1, maximum=bounds.max_model_len - 1),
        "watermark": one_of(False),
        "details": maybe("boolean", False),
        "decoder_input_details": one_of(False) if streamed else maybe("boolean", False),
        "seed": maybe("integer", minimum=0, maximum=2**64 - 1),
        "top_n_tokens": maybe("integer", minimum=0, maximum=MAX_TOP_N),
        "grammar": ref("TgiGrammar"),
        "adapter_id": one_of(*bounds.adapters),
    }
    schema: Schema = {"type": ["object", "null"], "properties": fields}
    if streamed:
        return schema
    sampled: list[Schema] = [{"properties": {"do_sample": {"const": True}}, "required": ["do_sample"]}]
    sampled += [{"properties": {name: {"type": _type(one)}}, "required": [name]} for name, one in choosing.items()]
    several = {"properties": {"seed": {"type": "null"}}, "anyOf": sampled}
    schema["anyOf"] = [{"properties": {"best_of": one_of(1)}}, several]
    schema["description"] = "best_of above 1 needs sampling, and no seed."
    return schema


def _type(schema: Schema) -> str:
    kind: str = schema["type"][0]
    return kind


def tgi_request(parameters: str, **stream: Any) -> Schema:
    """A body of TGI. `parameters`: the schema's name; `stream`: that of the field, if not any boolean."""
    inputs = {
        "type": "string",
        "minLength": 1,
        "example": "The capital of France is",
        "description": "For a model that sees, ![](URL) is an image in its place.",
    }
    fields = {"inputs": inputs, "parameters": ref(parameters), "stream": stream or maybe("boolean", False)}
    return obj(fields, "inputs")


# ---------------------------------------------------------------- text and tokens


def tokenize_request(bounds: Bounds) -> Schema:
    """The bodies of POST /tokenize: vLLM's two, llama.cpp's and TGI's."""
    text = {"type": "string", "example": "Hello"}
    model = {"model": one_of(*bounds.models, *bounds.adapters, *sorted(PLACEHOLDERS))}
    strings = {"return_token_strs": maybe("boolean", False)}
    vllm = {"prompt": text, "add_special_tokens": maybe("boolean", True), **strings, **model}
    chat = rendered_chat(bounds, **strings, **model, add_special_tokens=one_of(False))
    return {
        "anyOf": [
            obj(vllm, "prompt"),
            chat,
            obj({"content": text, "add_special": maybe("boolean", False), **model}, "content"),
            obj({"inputs": text, "parameters": {"description": "Plays no part."}}, "inputs"),
        ]
    }


def detokenize_request(bounds: Bounds) -> Schema:
    """The body of POST /detokenize."""
    tokens = {"type": "array", "items": token_id(bounds), "example": [1, 2]}
    return obj({"tokens": tokens, "model": one_of(*bounds.models, *bounds.adapters, *sorted(PLACEHOLDERS))}, "tokens")
