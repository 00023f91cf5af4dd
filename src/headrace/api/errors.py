"""Errors of the wire formats, and the error object that a client reads."""

from __future__ import annotations

from typing import Any

from headrace.core.errors import (
    GrammarError,
    HeadraceError,
    InvalidParameter,
    UnknownParameter,
    UnsupportedParameter,
    status_of,
)

MAX_MESSAGE = 1000


def cut(text: str, limit: int = 64) -> str:
    """At most `limit` characters of a text."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def error_field(error: HeadraceError) -> str | None:
    """The field that is at fault, if the error knows."""
    if isinstance(error, InvalidParameter | UnknownParameter | UnsupportedParameter | GrammarError):
        return None if error.field is None else cut(error.field)
    return None


def error_object(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """`{"message", "type", "param", "code"}`: what stands under `error` in an OpenAI body."""
    kind = "invalid_request_error" if status_of(code) < 500 else "server_error"
    return {"message": cut(" ".join(message.split()), MAX_MESSAGE), "type": kind, "param": param, "code": code}


def error_body(error: HeadraceError) -> dict[str, Any]:
    """The whole body of an OpenAI error answer; its HTTP status is `error.status`."""
    return {"error": error_object(error.code, str(error), error_field(error))}
