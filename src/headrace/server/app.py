"""The application: every route, behind one guard."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from headrace import __version__
from headrace.core.errors import HeadraceError
from headrace.server.errors import on_error, on_http_exception, on_unexpected, on_validation
from headrace.server.health import health_routes
from headrace.server.limits import Guard
from headrace.server.openai import openai_routes
from headrace.server.page_routes import page_routes
from headrace.server.service import Service
from headrace.server.tgi import tgi_routes


def build_app(service: Service) -> ASGIApp:
    """The ASGI application of one service."""
    app = FastAPI(
        title="headrace",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.include_router(openai_routes(service))
    app.include_router(page_routes(service))
    app.include_router(tgi_routes(service))
    app.include_router(health_routes(service))
    app.add_exception_handler(HeadraceError, on_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(Exception, on_unexpected)
    return Guard(app, service)
