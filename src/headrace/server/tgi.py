"""The routes of text-generation-inference."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from headrace.api.json import dump
from headrace.api.openai import read_body
from headrace.api.tgi import (
    MAX_BEST_OF,
    MAX_STOP,
    MAX_TOP_N,
    Route,
    chat_tokenize_body,
    compute_headers,
    engine_requests,
    info_body,
    prompt_headers,
    read_generate,
    read_tokenize,
    tgi_error,
    tokenize_body,
)
from headrace.api.tgi_answers import TgiStream, best_of, generate_body
from headrace.core.errors import HeadraceError
from headrace.server.respond import StreamResponse, ignored_header
from headrace.server.service import Service

VALIDATION_WORKERS = 2
"""Threads that tokenise, as `/info` tells them."""


def _optional(kind: str, **bounds: Any) -> dict[str, Any]:
    """The schema of a field that may be null."""
    return {"type": [kind, "null"], **bounds}


_GRAMMAR: Mapping[str, Any] = {
    "type": ["object", "null"],
    "required": ["type", "value"],
    "properties": {"type": {"enum": ["json", "json_object", "json_schema", "regex"]}, "value": {}},
}
_PARAMETERS: Mapping[str, Any] = {
    "best_of": _optional("integer", minimum=1, maximum=MAX_BEST_OF),
    "temperature": _optional("number", exclusiveMinimum=0, maximum=2),
    "repetition_penalty": _optional("number", exclusiveMinimum=0),
    "frequency_penalty": _optional("number", minimum=-2, maximum=2),
    "top_k": _optional("integer", minimum=1, maximum=2**31 - 1),
    "top_p": _optional("number", exclusiveMinimum=0, exclusiveMaximum=1),
    "typical_p": _optional("number", exclusiveMinimum=0, exclusiveMaximum=1),
    "do_sample": _optional("boolean"),
    "max_new_tokens": _optional("integer", minimum=1, maximum=2**32 - 1),
    "return_full_text": _optional("boolean"),
    "stop": _optional("array", items={"type": "string", "minLength": 1}, maxItems=MAX_STOP),
    "truncate": _optional("integer", minimum=1),
    "watermark": {"enum": [False, None]},
    "details": _optional("boolean"),
    "decoder_input_details": _optional("boolean"),
    "seed": _optional("integer", minimum=0, maximum=2**64 - 1),
    "top_n_tokens": _optional("integer", minimum=0, maximum=MAX_TOP_N),
    "grammar": _GRAMMAR,
    "adapter_id": _optional("string"),
}
_GENERATE: Mapping[str, Any] = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "inputs": {"type": "string", "minLength": 1},
        "parameters": _optional("object", properties=_PARAMETERS),
        "stream": _optional("boolean"),
    },
}
_TEXT: Mapping[str, Any] = {
    "type": "object",
    "required": ["generated_text"],
    "properties": {"generated_text": {"type": "string"}, "details": {"type": "object"}},
}
_EVENTS: Mapping[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}}
_GENERATES: Mapping[Route, tuple[str, str, Mapping[str, Any]]] = {
    "/": (
        "compat_generate",
        "Generate text, as the only element of an array, or as a stream where `stream` is true.",
        {"application/json": {"schema": {"type": "array", "items": _TEXT}}, **_EVENTS},
    ),
    "/generate": ("generate", "Generate text.", {"application/json": {"schema": _TEXT}}),
    "/generate_stream": ("generate_stream", "Generate text, an event for each token.", _EVENTS),
}
"""Path -> (name, what it does, what comes back)."""
_ERROR: Mapping[str, Any] = {
    "type": "object",
    "required": ["error", "error_type"],
    "properties": {"error": {"type": "string"}, "error_type": {"type": "string"}},
}
_MEANINGS: Mapping[int, str] = {
    401: "No key, or a wrong one",
    408: "The deadline has passed",
    413: "The body is too large",
    415: "The body is not JSON",
    422: "Input validation error",
    424: "Generation error",
    429: "Model is overloaded",
    500: "Incomplete generation",
    503: "Not ready, or shutting down",
}
ERRORS: Mapping[int | str, dict[str, Any]] = {
    status: {"description": meaning, "content": {"application/json": {"schema": _ERROR}}}
    for status, meaning in _MEANINGS.items()
}


def tgi_routes(service: Service) -> APIRouter:
    """`POST /`, generate, info and chat_tokenize. `GET /` and health are not here, and /tokenize has other bodies too:
    `tokenize` is TGI's part of it."""
    routes = _Routes(service)
    router = APIRouter(tags=["tgi"], responses=dict(ERRORS), default_response_class=Response)
    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": _GENERATE}}}}
    for path, (name, description, content) in _GENERATES.items():
        router.add_api_route(
            path,
            partial(routes.generate, path),
            methods=["POST"],
            name=name,
            operation_id=name,
            description=description,
            response_model=None,
            responses={200: {"description": "Generated text", "content": dict(content)}},
            openapi_extra=body,
        )
    told = {"description": "As asked for", "content": {"application/json": {"schema": {"type": "object"}}}}
    router.add_api_route(
        "/info", routes.info, methods=["GET"], operation_id="info", response_model=None, responses={200: told}
    )
    # TGI documents POST and has GET.
    for method in ("POST", "GET"):
        router.add_api_route(
            "/chat_tokenize",
            routes.chat_tokenize,
            methods=[method],
            operation_id=f"chat_tokenize_{method.lower()}",
            response_model=None,
            responses={200: told},
            include_in_schema=method == "POST",
        )
    return router


async def tokenize(service: Service, body: Mapping[str, Any]) -> Response:
    """The answer of /tokenize to a body of TGI's, and its errors too."""
    try:
        text, ignored = read_tokenize(body, service.settings.strict)
        found = await service.work(lambda: tokenize_body(service.opened.tokenizer, text))
    except HeadraceError as error:
        status, refusal = tgi_error(error)
        return _json(refusal, status=status)
    return _json(found, ignored_header(ignored))


class _Routes:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def generate(self, route: Route, request: HttpRequest) -> Response:
        """POST /, /generate, /generate_stream."""
        service, opened = self._service, self._service.opened
        began_s = time.monotonic()
        asked = read_generate(await service.read_json(request), service.limits, route, service.settings.strict)
        timeout_s = service.timeout_s(request, None)
        service.admit(asked.sampling.n)
        label, salt = service.new_id(), service.salt(request)
        requests = await service.prepare(
            lambda: engine_requests(asked, opened, label, salt), asked.sampling.n, timeout_s
        )
        queued_s = time.monotonic()
        headers = prompt_headers(opened.config.backend, len(asked.inputs)) | ignored_header(asked.ignored)
        run = service.run(requests, request, "text_completion")
        if asked.stream:
            return StreamResponse(service, run, TgiStream(asked, requests[0], opened), headers)
        completions = await service.whole(request, run)
        body = await service.work(lambda: generate_body(asked, completions, opened.tokenizer, opened.eos_token_ids))
        best = best_of(completions)
        joined_s = requests[0].arrival_s + (best.queue_s or 0.0)
        headers |= compute_headers(
            total_s=time.monotonic() - began_s,
            validation_s=queued_s - began_s,
            queue_s=max(0.0, joined_s - queued_s),
            prompt_tokens=len(best.prompt_token_ids),
            generated_tokens=len(best.token_ids),
        )
        return _json(body, headers)

    async def info(self) -> Response:
        """GET /info."""
        service = self._service
        most = service.opened.config.max_num_seqs + service.settings.max_queued
        return _json(info_body(service.served[0], service.limits, most, VALIDATION_WORKERS))

    async def chat_tokenize(self, request: HttpRequest) -> Response:
        """POST and GET /chat_tokenize."""
        service = self._service
        asked = read_body("chat", await service.read_json(request), strict=service.settings.strict)
        found = await service.work(lambda: chat_tokenize_body(asked, service.opened.tokenizer))
        return _json(found, ignored_header(asked.ignored))


def _json(body: object, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    return Response(dump(body), status, dict(headers or {}), media_type="application/json")
