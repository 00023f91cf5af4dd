"""The application: every route, behind one guard."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp

from headrace import __version__
from headrace.api.json import dump
from headrace.core.errors import HeadraceError
from headrace.server.errors import on_error, on_http_exception, on_unexpected, on_validation
from headrace.server.health import health_routes
from headrace.server.limits import Guard
from headrace.server.openai import openai_routes
from headrace.server.page_routes import page_routes
from headrace.server.schemas import openapi_document
from headrace.server.schemas_requests import Bounds
from headrace.server.service import Service
from headrace.server.tgi import tgi_routes


def build_app(service: Service) -> ASGIApp:
    """The ASGI application of one service."""
    # FastAPI would make /openapi.json from types of bodies, and ours are read raw.
    app = FastAPI(title="headrace", version=__version__, openapi_url=None, redirect_slashes=False)
    routes = all_routes(service)
    for router in routes:
        app.include_router(router)

    async def on_http(request: Request, error: Exception) -> Response:
        """`on_http_exception`; with a 405 go the methods of all routes of the path, where the router tells one's."""
        if isinstance(error, HTTPException) and error.status_code == 405:
            every = [one for router in routes for one in router.routes if isinstance(one, APIRoute)]
            matching = [one for one in every if one.matches(request.scope)[0] is not Match.NONE]
            methods = {name for one in matching for name in one.methods or ()}
            error = HTTPException(405, headers={"Allow": ", ".join(sorted(methods))})
        return await on_http_exception(request, error)

    app.add_exception_handler(HeadraceError, on_error)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(Exception, on_unexpected)
    return Guard(app, service)


def all_routes(service: Service) -> tuple[APIRouter, ...]:
    """Every route there is, by kind. /openapi.json describes those with `include_in_schema`."""
    return (
        openai_routes(service),
        page_routes(service),
        tgi_routes(service),
        health_routes(service),
        _document_routes(service),
    )


def _document_routes(service: Service) -> APIRouter:
    limits, opened = service.limits, service.opened
    bounds = Bounds(
        models=service.served,
        adapters=tuple(sorted(limits.adapters)),
        vocab_size=limits.vocab_size,
        max_model_len=limits.max_model_len,
        max_choices=opened.config.max_num_seqs + service.settings.max_queued,
        empty_prompt=opened.has_text and bool(opened.tokenizer.encode("")),
        max_images=0 if limits.images is None else limits.images.most,
    )
    document = dump(openapi_document(bounds, keyed=bool(service.settings.api_key)))
    router = APIRouter(include_in_schema=False)

    @router.api_route("/openapi.json", methods=["GET", "HEAD"])
    async def openapi() -> Response:
        return Response(document, media_type="application/json")

    return router
