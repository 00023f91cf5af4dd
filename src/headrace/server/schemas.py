"""The document at /openapi.json, as data: every route, what it takes, what it answers.

It is made from the running service: its models, its vocabulary, its context, whether it asks for a key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headrace import __version__
from headrace.core.types import MAX_N
from headrace.server.schemas_answers import TEXT, answer_schemas, array, fields
from headrace.server.schemas_requests import (
    Bounds,
    Schema,
    chat_request,
    completion_request,
    json_schema,
    maybe,
    message,
    ref,
    rendered_chat,
    response_format,
    structured_outputs,
    tool,
)
from headrace.server.schemas_tgi import (
    detokenize_request,
    tgi_grammar,
    tgi_parameters,
    tgi_request,
    tokenize_request,
)

JSON = "application/json"
EVENTS: Mapping[str, Any] = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "required": ["data"],
            "properties": {"data": {"type": "string", "contentMediaType": "application/json"}},
            "description": "Of each event. The last of a stream of OpenAI's routes is [DONE], which is no JSON.",
        }
    }
}
MEANINGS: Mapping[int, str] = {
    400: "The request is at fault; `error.param` names the field",
    401: "No key, or a wrong one",
    404: "No such model",
    405: "The path has no such method; `Allow` names those it has",
    408: "The deadline has passed, or the request did not arrive in time",
    413: "The body is too large",
    415: "The body is not said to be JSON",
    422: "The request is at fault",
    424: "The engine failed at this request",
    426: "No route speaks another protocol",
    429: "The queue is full; `Retry-After` says when to try again",
    431: "The headers are too large",
    500: "An error inside the server",
    501: "The model lacks what is asked for",
    503: "Not ready, or shutting down; `Retry-After` says when to try again",
}
EVERY = (400, 401, 405, 408, 426, 431, 500, 503)
"""What any route may answer."""
BODY = (*EVERY, 413, 415)
"""What any route that reads a body may answer."""
RETRIED = frozenset({429, 503})
ABOUT = (
    "OpenAI's API, vLLM's and TGI's. The header X-Request-Timeout is to any body that is answered with text what "
    "`timeout` is in a body of OpenAI's routes."
)


def openapi_document(bounds: Bounds, keyed: bool) -> dict[str, Any]:
    """The document of a service. `keyed`: it asks for a key."""
    components: dict[str, Any] = {"schemas": _request_schemas(bounds) | answer_schemas(), "responses": _errors()}
    tgi, health = _tgi_paths(), _health_paths()
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "headrace", "version": __version__, "description": ABOUT},
        "tags": [
            {"name": "openai", "description": "OpenAI's routes, and vLLM's beside them."},
            {"name": "tgi", "description": "The routes of text-generation-inference."},
            {"name": "health", "description": "Whether the server lives, is ready and answers, and its figures."},
        ],
        "paths": {**_openai_paths(bounds), **tgi, **health, "/": {**health["/"], **tgi["/"]}},
        "components": components,
    }
    if keyed:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _request_schemas(bounds: Bounds) -> dict[str, Schema]:
    label = maybe("string", minLength=1, maxLength=1024)
    whole = {"enum": [False, None], "default": False}
    return {
        "ChatRequest": chat_request(bounds),
        "CompletionRequest": completion_request(bounds),
        "RenderedChat": rendered_chat(bounds, model=label, n=maybe("integer", 1, minimum=1, maximum=MAX_N)),
        "Message": message(bounds.max_images),
        "Tool": tool(called=False),
        "Tools": tool(called=False, several=True),
        "CalledTool": tool(called=True),
        "CalledTools": tool(called=True, several=True),
        "JsonSchema": json_schema(),
        "ResponseFormat": response_format(),
        "StructuredOutputs": structured_outputs(),
        "TgiGrammar": tgi_grammar(),
        "GenerateParameters": tgi_parameters(bounds, streamed=False),
        "StreamParameters": tgi_parameters(bounds, streamed=True),
        "GenerateRequest": tgi_request("GenerateParameters"),
        "StreamRequest": tgi_request("StreamParameters"),
        "CompatRequest": {
            "anyOf": [
                tgi_request("GenerateParameters", **whole),
                {**tgi_request("StreamParameters", const=True), "required": ["inputs", "stream"]},
            ]
        },
        "TokenizeRequest": tokenize_request(bounds),
        "DetokenizeRequest": detokenize_request(bounds),
    }


# ---------------------------------------------------------------- answers


def _errors() -> dict[str, Any]:
    """Error answers by name: the status, and `t` for those of TGI's routes."""
    found: dict[str, Any] = {}
    retry = {"Retry-After": {"required": True, "schema": {"type": "integer", "minimum": 1}}}
    bearer = {"WWW-Authenticate": {"required": True, "schema": {"type": "string"}}}
    for status, meaning in MEANINGS.items():
        for name, schema in ((f"E{status}", ref("Error")), (f"T{status}", {"anyOf": [ref("TgiError"), ref("Error")]})):
            found[name] = {"description": meaning, "content": {JSON: {"schema": schema}}}
            if status in RETRIED:
                found[name]["headers"] = retry
            elif status == 401:
                found[name]["headers"] = bearer
    return found


def _responses(
    content: Mapping[str, Any] | None, statuses: Sequence[int], *, tgi: bool = False, told: str = "As asked for"
) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": told}
    if content is not None:
        answer["content"] = dict(content)
    kind = "T" if tgi else "E"
    errors = {str(status): {"$ref": f"#/components/responses/{kind}{status}"} for status in sorted(statuses)}
    return {"200": answer, **errors}


def _json(schema: Schema) -> dict[str, Any]:
    return {JSON: {"schema": schema}}


def _body(name: str) -> dict[str, Any]:
    return {"required": True, "content": _json(ref(name))}


# ---------------------------------------------------------------- routes


def _openai_paths(bounds: Bounds) -> dict[str, Any]:
    answered = (*BODY, 404, 429, 501)

    def post(name: str, summary: str, body: str, content: Mapping[str, Any], statuses: Sequence[int]) -> dict[str, Any]:
        responses = _responses(content, statuses)
        if name == "tokenize":
            responses["422"] = {"$ref": "#/components/responses/T422"}
        operation = {"operationId": name, "summary": summary, "tags": ["openai"], "requestBody": _body(body)}
        return {"post": {**operation, "responses": responses}}

    def get(name: str, summary: str, schema: Schema, statuses: Sequence[int] = EVERY) -> dict[str, Any]:
        operation = {"operationId": name, "summary": summary, "tags": ["openai"]}
        return {"get": {**operation, "responses": _responses(_json(schema), statuses)}}

    models = fields({"object": {"const": "list"}, "data": array(ref("Model"), minItems=1)})
    name = {"type": "string", "enum": list(dict.fromkeys((*bounds.models, *bounds.adapters)))}
    model = get("model", "One model.", ref("Model"), (*EVERY, 404))
    model["get"]["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": name}]
    info: Schema = {"type": "object", "required": ["eos_token", "bos_token", "pad_token", "chat_template"]}
    detokenized = fields({"prompt": TEXT, "content": TEXT})
    return {
        "/v1/chat/completions": post(
            "chat", "Answer a chat.", "ChatRequest", _json(ref("ChatCompletion")) | dict(EVENTS), answered
        ),
        "/v1/completions": post(
            "completion", "Continue texts.", "CompletionRequest", _json(ref("Completion")) | dict(EVENTS), answered
        ),
        "/v1/models": get("models", "The models.", models),
        "/v1/models/{model}": model,
        "/tokenize": post(
            "tokenize", "The tokens of a text or a chat.", "TokenizeRequest", _json(ref("Tokenized")), (*BODY, 404, 501)
        ),
        "/detokenize": post(
            "detokenize", "The text of tokens.", "DetokenizeRequest", _json(detokenized), (*BODY, 404, 501)
        ),
        "/tokenizer_info": get("tokenizer_info", "The tokenizer's special tokens and template.", info),
        "/version": get("version", "The version of headrace.", fields({"version": TEXT})),
    }


def _tgi_paths() -> dict[str, Any]:
    answered = (*BODY, 422, 424, 429)

    def operation(
        name: str, summary: str, content: Mapping[str, Any], statuses: Sequence[int], body: str = ""
    ) -> dict[str, Any]:
        found: dict[str, Any] = {"operationId": name, "summary": summary, "tags": ["tgi"]}
        if body:
            found["requestBody"] = _body(body)
        return {**found, "responses": _responses(content, statuses, tgi=True)}

    listed = _json(array(ref("Generated"), minItems=1, maxItems=1))
    whole = _json(ref("Generated"))
    rendered = _json(ref("ChatTokenized"))
    told = "The text and the tokens that a chat is to the model."
    return {
        "/": {
            "post": operation(
                "compat_generate",
                "Generate text: the only element of an array, or a stream where `stream` is true.",
                listed | dict(EVENTS),
                answered,
                "CompatRequest",
            )
        },
        "/generate": {"post": operation("generate", "Generate text.", whole, answered, "GenerateRequest")},
        "/generate_stream": {
            "post": operation(
                "generate_stream", "Generate text, an event for each token.", EVENTS, answered, "StreamRequest"
            )
        },
        "/info": {"get": operation("info", "The limits of the server.", _json(ref("Info")), EVERY)},
        "/chat_tokenize": {
            "post": operation("chat_tokenize", told, rendered, (*BODY, 422), "RenderedChat"),
            "get": operation("chat_tokenize_get", told, rendered, (*BODY, 422), "RenderedChat"),
        },
    }


def _health_paths() -> dict[str, Any]:
    def get(name: str, summary: str, content: Mapping[str, Any] | None, *, tgi: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = {"operationId": name, "summary": summary, "tags": ["health"]}
        found["responses"] = _responses(content, EVERY, tgi=tgi, told="It does" if content is None else "As asked for")
        return {"get": found}

    ready = "Whether a request would be worked on at once."
    paths = {
        "/": get("root", f"{ready} To browsers (Accept: text/html) the page is sent.", None, tgi=True),
        "/health": get("health", ready, None),
        "/ping": get("ping", ready, None),
        "/health/ready": get("ready", ready, None),
        "/health/live": get("live", "Whether the server lives.", None),
        "/health/deep": get("deep", "Whether a token is really computed.", _json(fields({"status": {"const": "ok"}}))),
        "/metrics": get("metrics", "Figures for Prometheus.", {"text/plain": {"schema": {"type": "string"}}}),
    }
    paths["/"]["get"]["responses"]["304"] = {"description": "The browser has this very page"}
    for open_path in ("/health/ready", "/health/live"):
        paths[open_path]["get"]["security"] = []
    return paths
