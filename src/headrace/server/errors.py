"""Errors as HTTP answers: one shape for a route, whoever found the error."""

from __future__ import annotations

import http
import math

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from headrace.api.errors import error_field, error_object
from headrace.api.json import dump
from headrace.core.errors import (
    BodyTooLarge,
    HeadraceError,
    InvalidParameter,
    MethodNotAllowed,
    RequestError,
    RouteNotFound,
    Unavailable,
    UnsupportedMediaType,
)

MAX_BODY_BYTES = 4096
"""Largest body of an error answer."""
MAX_SHORT_MESSAGE = 250
"""Characters that are left of a message whose body would be larger: ASCII JSON may take 12 bytes for each."""
TGI_PATHS = frozenset({"/", "/generate", "/generate_stream", "/info", "/chat_tokenize"})
"""Routes whose clients read TGI's error body."""
RETRY_HELPS = frozenset({"queue_timeout", "request_timeout", "queue_full"})
"""Codes below 500 for which the same request may succeed later."""
DEFAULT_RETRY_S = 1
UNEXPECTED = "an error inside the server; its log has it under this answer's x-request-id"
"""What a client is told of an exception that nobody expected: nothing of it."""


def openai_error(error: HeadraceError) -> Response:
    """`{"error": {"message", "type", "param", "code"}}` with the error's own status, at most 4 KB."""
    return _response(error.status, openai_body(error), _headers(error))


def error_response(error: HeadraceError, path: str) -> Response:
    """The answer in the shape that clients of the route read."""
    if path not in TGI_PATHS:
        return openai_error(error)
    from headrace.api.tgi import tgi_error

    status, body = tgi_error(error)
    return _response(status, dump(body).encode(), _headers(error))


def openai_body(error: HeadraceError) -> bytes:
    """The JSON of `openai_error`."""
    param, message = error_field(error), str(error)
    body = dump({"error": error_object(error.code, message, param)})
    if len(body) > MAX_BODY_BYTES:
        body = dump({"error": error_object(error.code, message[:MAX_SHORT_MESSAGE], param)})
    return body.encode()


def retry_headers(error: HeadraceError) -> dict[str, str]:
    """`Retry-After` (whole seconds) with 429 and 503, `x-should-retry: false` where the same request fails again."""
    if error.status in (429, 503):
        wait_s = error.retry_after_s if isinstance(error, Unavailable) else DEFAULT_RETRY_S
        return {"retry-after": str(max(1, math.ceil(wait_s)))}
    if error.status == 501 or (error.status < 500 and error.code not in RETRY_HELPS):
        return {"x-should-retry": "false"}
    return {}


def _headers(error: HeadraceError) -> dict[str, str]:
    # The rest of a body that is too large is not worth reading.
    return retry_headers(error) | ({"connection": "close"} if isinstance(error, BodyTooLarge) else {})


async def on_error(request: Request, error: Exception) -> Response:
    """Handler of HeadraceError."""
    if not isinstance(error, HeadraceError):
        raise error
    return error_response(error, request.scope["path"])


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Handler of starlette's HTTPException: unknown routes (404), methods (405, with Allow) and the like."""
    if not isinstance(error, HTTPException):
        raise error
    headers = dict(error.headers or {})
    if error.status_code in (405, 404):
        made: HeadraceError
        if error.status_code == 404:
            made = RouteNotFound("no such route; GET /openapi.json lists them")
        else:
            made = MethodNotAllowed(
                f"the route does not take this method, allowed: {headers.get('Allow', 'see Allow')}"
            )
        response = error_response(made, request.scope["path"])
    else:
        response = _response(error.status_code, _body_of_status(error.status_code), {})
    response.headers.update(headers)
    return response


async def on_validation(request: Request, error: Exception) -> Response:
    """Handler of FastAPI's own checks (of paths and queries). Nothing of the input is repeated but the field's name."""
    if not isinstance(error, RequestValidationError):
        raise error
    where = [".".join(str(part) for part in one["loc"][1:]) for one in error.errors()]
    made = InvalidParameter(where[0] if where else "request", "a value of the wrong kind", "see /openapi.json")
    return error_response(made, request.scope["path"])


async def on_unexpected(request: Request, error: Exception) -> Response:
    """Handler of any other exception, which goes on to the guard and is logged there."""
    return error_response(HeadraceError(UNEXPECTED), request.scope["path"])


def _body_of_status(status: int) -> bytes:
    """An error body for a status that no class of ours has raised."""
    known = {cls.status: cls for cls in (RequestError, BodyTooLarge, UnsupportedMediaType)}
    code = known[status].code if status in known else "bad_request" if status < 500 else "internal_error"
    try:
        message = http.HTTPStatus(status).phrase
    except ValueError:
        message = "refused"
    return dump({"error": error_object(code, message)}).encode()


def _response(status: int, body: bytes, headers: dict[str, str]) -> Response:
    return Response(body, status, headers, media_type="application/json")
