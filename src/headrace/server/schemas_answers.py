"""JSON schemas of answers, for /openapi.json (`server/schemas.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.server.schemas_requests import Schema, ref

Part = Mapping[str, Any]

COUNT: Mapping[str, Any] = {"type": "integer", "minimum": 0}
TEXT: Mapping[str, Any] = {"type": "string"}
NUMBER: Mapping[str, Any] = {"type": "number"}
FLAG: Mapping[str, Any] = {"type": "boolean"}
NULL: Mapping[str, Any] = {"type": "null"}


def array(items: Part, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def fields(properties: Mapping[str, Part], optional: Mapping[str, Part] | None = None) -> Schema:
    """An object with these fields, and perhaps those, and no others."""
    return {
        "type": "object",
        "properties": {**properties, **(optional or {})},
        "required": list(properties),
        "additionalProperties": False,
    }


def nullable(schema: Part) -> Schema:
    return {"anyOf": [schema, NULL]}


def _choices(own: Mapping[str, Part], reasons: list[str], optional: Mapping[str, Part]) -> Schema:
    choice = {"index": COUNT, **own, "finish_reason": {"enum": reasons}}
    return array(fields(choice, {"token_ids": array(COUNT), **optional}), minItems=1)


def _prompt_fields() -> Schema:
    entry = fields({"logprob": NUMBER, "rank": {"type": ["integer", "null"]}, "decoded_token": TEXT})
    by_id: Schema = {"type": ["object", "null"], "additionalProperties": entry}
    return {"prompt_token_ids": array(COUNT), "prompt_logprobs": array(by_id)}


def _answer(kind: str, prefix: str, choices: Part, optional: Mapping[str, Part] | None = None) -> Schema:
    return fields(
        {
            "id": {"type": "string", "pattern": f"^{prefix}-[0-9a-f]{{32}}$"},
            "object": {"const": kind},
            "created": COUNT,
            "model": TEXT,
            "system_fingerprint": TEXT,
            "choices": choices,
            "usage": ref("Usage"),
        },
        optional,
    )


def _chat() -> Schema:
    token = {"token": TEXT, "logprob": NUMBER, "bytes": array({"type": "integer", "minimum": 0, "maximum": 255})}
    scored = fields({**token, "top_logprobs": array(fields(token))})
    function = fields({"name": TEXT, "arguments": TEXT})
    call = fields({"id": TEXT, "type": {"const": "function"}, "function": function})
    said = fields(
        {
            "role": {"const": "assistant"},
            "content": {"type": ["string", "null"]},
            "refusal": NULL,
            "reasoning": {"type": ["string", "null"]},
        },
        {"tool_calls": array(call, minItems=1)},
    )
    own = {"message": said, "logprobs": nullable(fields({"content": array(scored), "refusal": NULL}))}
    choices = _choices(own, ["stop", "length", "tool_calls"], {})
    return _answer("chat.completion", "chatcmpl", choices, _prompt_fields())


def _completion() -> Schema:
    top: Schema = {"type": ["object", "null"], "additionalProperties": NUMBER}
    scores = fields(
        {
            "tokens": array(TEXT),
            "token_logprobs": array({"type": ["number", "null"]}),
            "top_logprobs": array(top),
            "text_offset": array(COUNT),
        }
    )
    own = {"text": TEXT, "logprobs": nullable(scores)}
    return _answer("text_completion", "cmpl", _choices(own, ["stop", "length"], _prompt_fields()))


def _generated() -> Schema:
    token = {"id": COUNT, "text": TEXT, "logprob": NUMBER, "special": FLAG}
    prefill = fields({"id": COUNT, "text": TEXT, "logprob": {"type": ["number", "null"]}})
    told: Mapping[str, Part] = {
        "finish_reason": {"enum": ["length", "eos_token", "stop_sequence"]},
        "generated_tokens": COUNT,
        "seed": {"type": ["integer", "null"]},
        "prefill": array(prefill),
        "tokens": array(fields(token)),
    }
    top = {"top_tokens": array(array(fields(token)))}
    best = fields({"generated_text": TEXT, **told}, top)
    details = fields(told, {**top, "best_of_sequences": array(best)})
    return fields({"generated_text": TEXT}, {"details": details})


def answer_schemas() -> dict[str, Schema]:
    """The schemas that several routes' answers refer to, and the larger of the others, by name."""
    usage = {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT}
    slices = array(fields({"id": COUNT, "text": TEXT, "start": COUNT, "stop": COUNT}))
    error = {"message": TEXT, "type": TEXT, "param": {"type": ["string", "null"]}, "code": TEXT}
    model = {
        "id": TEXT,
        "object": {"const": "model"},
        "created": COUNT,
        "owned_by": TEXT,
        "root": TEXT,
        "parent": {"type": ["string", "null"]},
        "max_model_len": COUNT,
    }
    return {
        "Error": fields({"error": fields(error)}),
        "TgiError": fields({"error": TEXT, "error_type": TEXT}),
        "Usage": fields(
            {**usage, "completion_tokens_details": fields({"reasoning_tokens": COUNT})},
            {"prompt_tokens_details": fields({"cached_tokens": COUNT})},
        ),
        "Model": fields(model),
        "ChatCompletion": _chat(),
        "Completion": _completion(),
        "Generated": _generated(),
        "TokenSlices": slices,
        "Tokenized": {
            "anyOf": [
                fields(
                    {
                        "count": COUNT,
                        "max_model_len": COUNT,
                        "tokens": array(COUNT),
                        "token_strs": nullable(array(TEXT)),
                    }
                ),
                fields({"tokens": array(COUNT)}),
                ref("TokenSlices"),
            ]
        },
        "ChatTokenized": fields({"tokenize_response": ref("TokenSlices"), "templated_text": TEXT}),
        "Info": _info(),
    }


def _info() -> Schema:
    counts = (
        *("max_concurrent_requests", "max_best_of", "max_stop_sequences", "max_input_tokens", "max_total_tokens"),
        *("validation_workers", "max_client_batch_size"),
    )
    texts = ("model_id", "model_pipeline_tag", "router", "version")
    nothing = ("model_sha", "sha", "docker_label")
    kinds = [
        *((name, COUNT) for name in counts),
        *((name, TEXT) for name in texts),
        *((name, NULL) for name in nothing),
    ]
    return fields(dict(kinds))
