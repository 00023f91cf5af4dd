"""Whether the server lives, is ready, and really answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from headrace.core.errors import HeadraceError, NotReady, ShuttingDown
from headrace.core.types import Request, SamplingParams
from headrace.server.metrics import CONTENT_TYPE
from headrace.server.openai import json_response
from headrace.server.page_routes import index_file, wants_page
from headrace.server.service import Service

DEEP_S = 5.0
"""Most seconds for the one token of /health/deep."""


def health_routes(service: Service) -> APIRouter:
    """/health/live, /health/ready, /health/deep; /health, /ping and, for programs, / are the second. /metrics."""
    routes = _Health(service)
    router = APIRouter()
    answers: Mapping[str, Callable[..., Awaitable[Response]]] = {
        "/health/live": routes.live,
        "/health/ready": routes.ready,
        "/health": routes.ready,
        "/ping": routes.ready,
        "/": routes.root,
    }
    for path, answer in answers.items():
        router.add_api_route(path, answer, methods=["GET"], response_model=None, name=path)
        router.add_api_route(path, answer, methods=["HEAD"], response_model=None, include_in_schema=False)
    router.add_api_route("/health/deep", routes.deep, methods=["GET"], response_model=None)
    router.add_api_route("/metrics", routes.metrics, methods=["GET"], response_model=None)
    return router


class _Health:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._index = index_file()

    async def root(self, request: HttpRequest) -> Response:
        """GET /: the page for a browser, TGI's health for everybody else."""
        if wants_page(request.headers.get("accept", "")):
            return self._index.response(request, vary="Accept")
        response = await self.ready()
        response.headers["vary"] = "Accept"
        return response

    async def live(self) -> Response:
        """The event loop turns, and somebody watches over the engine."""
        if not self._service.supervisor.alive:
            raise NotReady("nobody watches over the engine")
        return Response(status_code=200)

    async def ready(self) -> Response:
        """A request given now would be worked on at once: loaded, making steps, not shutting down."""
        service = self._service
        if service.draining:
            raise ShuttingDown("the server is shutting down")
        if not service.supervisor.ready:
            stalled_s = service.supervisor.stalled_s()
            raise NotReady(f"no step for {stalled_s:.1f} s" if stalled_s else "the engine is being started")
        return Response(status_code=200)

    async def deep(self, request: HttpRequest) -> Response:
        """One token, computed."""
        service = self._service
        await self.ready()
        sampling = SamplingParams(max_tokens=1)
        made = replace(Request(service.request_id(request), (0,), sampling), salt="health", priority=-(2**31))
        run = service.run((made,))
        try:
            await asyncio.wait_for(run.whole(), DEEP_S)
        except TimeoutError:
            raise NotReady(f"no token in {DEEP_S:g} s") from None
        except HeadraceError as error:
            raise NotReady(f"no token: {error.code}") from None
        finally:
            run.close()
        return json_response({"status": "ok"})

    async def metrics(self) -> Response:
        """GET /metrics. While the engine is away, what it said last."""
        await self._service.refresh()
        return Response(self._service.metrics.text(), headers={"content-type": CONTENT_TYPE})
