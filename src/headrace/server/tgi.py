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
ROUTES: tuple[Route, ...] = ("/", "/generate", "/generate_stream")


def tgi_routes(service: Service) -> APIRouter:
    """`POST /`, generate, info and chat_tokenize. `GET /` and health are not here, and /tokenize has other bodies too:
    `tokenize` is TGI's part of it."""
    routes = _Routes(service)
    router = APIRouter(default_response_class=Response)
    for path in ROUTES:
        router.add_api_route(path, partial(routes.generate, path), methods=["POST"], name=path, response_model=None)
    router.add_api_route("/info", routes.info, methods=["GET"], response_model=None)
    # TGI documents POST and has GET.
    router.add_api_route("/chat_tokenize", routes.chat_tokenize, methods=["POST", "GET"], response_model=None)
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
        label, salt = service.request_id(request), service.salt(request)
        requests = await service.prepare(
            lambda: engine_requests(asked, opened, label, salt),
            asked.sampling.n,
            timeout_s,
            images=request if opened.images is not None and asked.may_have_images else None,
        )
        queued_s = time.monotonic()
        headers = prompt_headers(opened.config.backend, len(asked.inputs)) | ignored_header(asked.ignored)
        # From here on images are the engine's: what this holds is counted no more (`server/held.py`).
        asked = asked.without_inputs()
        run = service.run(requests, request, "text_completion", kept_bytes=len(asked.inputs))
        requests = tuple(run.requests)
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
