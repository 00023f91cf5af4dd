"""The exception tree. Each class has an HTTP `status` and a stable `code`.

HeadraceError                     500 internal_error
├── RequestError                  400 bad_request            this request is at fault
│   ├── InvalidParameter          400 invalid_parameter
│   │   ├── InvalidImage          400 invalid_image          not a picture, too large, or not to be fetched
│   │   ├── InvalidCustomId       400 invalid_custom_id      (this and those below: of a line of a batch)
│   │   ├── DuplicateCustomId     400 duplicate_custom_id
│   │   ├── InvalidMethod         400 invalid_method
│   │   └── InvalidUrl            400 invalid_url
│   ├── UnknownParameter          400 unknown_parameter      a field that no route knows
│   ├── UnsupportedParameter      400 unsupported_parameter  a field that is not carried out
│   ├── InvalidJson               400 invalid_json
│   │   └── InvalidJsonLine       400 invalid_json_line
│   ├── MissingField              400 missing_required_parameter
│   ├── LineTooLong               400 line_too_long
│   ├── ContextLengthExceeded     400 context_length_exceeded
│   ├── EmptyPrompt               400 empty_prompt
│   ├── NoTokenAllowed            400 no_token_allowed
│   ├── TemplateError             400 template_error
│   ├── GrammarError              400 invalid_grammar        not a grammar, or too costly to follow
│   ├── InputFileError            400 bad_input_file
│   ├── Unauthorized              401 unauthorized           (this and those below: of the HTTP edge)
│   ├── RouteNotFound             404 not_found
│   ├── MethodNotAllowed          405 method_not_allowed
│   ├── RequestTimeout            408 request_timeout        headers or body did not arrive in time
│   ├── BodyTooLarge              413 body_too_large
│   ├── UnsupportedMediaType      415 unsupported_media_type
│   ├── UpgradeRefused            426 upgrade_refused
│   ├── HeadersTooLarge           431 headers_too_large
│   ├── QueueTimeout              408 queue_timeout          waited too long to join the running batch
│   └── DeadlineExceeded          408 deadline_exceeded      the request's own deadline passed
├── Unavailable                   503 unavailable            not now; says when to try again
│   ├── QueueFull                 429 queue_full
│   ├── NotReady                  503 not_ready
│   ├── ShuttingDown              503 server_shutting_down
│   └── TooManyConnections        503 too_many_connections
├── ClientGone                    499 client_gone            nobody is left to read the answer
├── CodedError                    500 other_process          of another process: each has the code it had there
├── ModelError                    422 bad_model              the checkpoint is at fault
│   ├── ModelNotFound             404 model_not_found
│   ├── CheckpointError           422 bad_checkpoint
│   ├── WeightsMismatch           422 weights_mismatch
│   └── UnsupportedModel          501 unsupported_model
├── ConfigError                   400 bad_config             a setting, or a pair of them, cannot be
│   ├── BatchInUse                400 batch_in_use
│   └── BatchChanged              400 batch_changed
├── StorageError                  500 storage_failed         a file of a batch cannot be written
└── EngineError                   500 engine_fault           the machine or the engine is at fault
    ├── NonFiniteLogits           500 nan_logits
    ├── OutOfMemory               503 out_of_memory
    └── BackendUnavailable        503 backend_unavailable
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import ClassVar


def shorten(value: object, limit: int = 64) -> str:
    """`repr(value)` cut to `limit` characters, so that an error never echoes a whole input."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 1] + "…"


class HeadraceError(Exception):
    """Root of every error headrace raises on purpose; the message is one line, fit for a user."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"


class RequestError(HeadraceError):
    status = 400
    code = "bad_request"


class InvalidParameter(RequestError):
    """A field holds a value that is not allowed. The message names the three: field, value, allowed."""

    code = "invalid_parameter"

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field}: got {shorten(value)}, allowed: {allowed}")
        self.field = field


class InvalidImage(InvalidParameter):
    """A picture that cannot be decoded, is too large, or may not be fetched."""

    code = "invalid_image"


class UnknownParameter(RequestError):
    """A field that no route knows."""

    code = "unknown_parameter"

    def __init__(self, field: str, where: str) -> None:
        super().__init__(f"{shorten(field)}: unknown field of {where}")
        self.field = field


class UnsupportedParameter(RequestError):
    """A field, or a value of it, that would change the answer and that this version does not carry out."""

    code = "unsupported_parameter"

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field}: got {shorten(value)}, which is not supported; allowed: {allowed}")
        self.field = field


class InvalidJson(RequestError):
    code = "invalid_json"


class InvalidJsonLine(InvalidJson):
    code = "invalid_json_line"


class LineTooLong(RequestError):
    code = "line_too_long"


class MissingField(RequestError):
    code = "missing_required_parameter"

    def __init__(self, field: str) -> None:
        super().__init__(f"{field}: missing, required in every line")
        self.field = field


class InvalidCustomId(InvalidParameter):
    code = "invalid_custom_id"


class DuplicateCustomId(InvalidParameter):
    code = "duplicate_custom_id"


class InvalidMethod(InvalidParameter):
    code = "invalid_method"


class InvalidUrl(InvalidParameter):
    code = "invalid_url"


class ContextLengthExceeded(RequestError):
    code = "context_length_exceeded"


class EmptyPrompt(RequestError):
    code = "empty_prompt"


class NoTokenAllowed(RequestError):
    """The request's masks leave no token to choose."""

    code = "no_token_allowed"


class TemplateError(RequestError):
    code = "template_error"


class GrammarError(RequestError):
    """What the answer must look like cannot be read, or costs too much to follow."""

    code = "invalid_grammar"

    def __init__(self, message: str, field: str | None = None) -> None:
        """`field`: where the body has it."""
        super().__init__(message if field is None else f"{field}: {message}")
        self.field = field


class InputFileError(RequestError):
    code = "bad_input_file"


class Unauthorized(RequestError):
    status = 401
    code = "unauthorized"


class RouteNotFound(RequestError):
    status = 404
    code = "not_found"


class MethodNotAllowed(RequestError):
    status = 405
    code = "method_not_allowed"


class RequestTimeout(RequestError):
    """The headers or the body of a request did not arrive in time."""

    status = 408
    code = "request_timeout"


class BodyTooLarge(RequestError):
    status = 413
    code = "body_too_large"


class UnsupportedMediaType(RequestError):
    status = 415
    code = "unsupported_media_type"


class UpgradeRefused(RequestError):
    status = 426
    code = "upgrade_refused"


class HeadersTooLarge(RequestError):
    status = 431
    code = "headers_too_large"


class QueueTimeout(RequestError):
    """The request waited too long to join the running batch."""

    status = 408
    code = "queue_timeout"


class DeadlineExceeded(RequestError):
    """The request's own deadline passed before its answer was complete."""

    status = 408
    code = "deadline_exceeded"


class Unavailable(HeadraceError):
    """The server cannot take the request now; `retry_after_s` (seconds) is when to try again."""

    status = 503
    code = "unavailable"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Unavailable):
    status = 429
    code = "queue_full"


class NotReady(Unavailable):
    code = "not_ready"


class ShuttingDown(Unavailable):
    code = "server_shutting_down"


class TooManyConnections(Unavailable):
    code = "too_many_connections"


class ModelError(HeadraceError):
    status = 422
    code = "bad_model"


class ModelNotFound(ModelError):
    status = 404
    code = "model_not_found"


class CheckpointError(ModelError):
    """A file is not what it claims: wrong magic, truncated, overlapping or out of bounds."""

    code = "bad_checkpoint"


class WeightsMismatch(ModelError):
    """Tensors the model needs are missing, of another shape, or left over."""

    code = "weights_mismatch"


class UnsupportedModel(ModelError):
    """An architecture, a config value or a tensor type that headrace does not run."""

    status = 501
    code = "unsupported_model"


class ConfigError(HeadraceError):
    status = 400
    code = "bad_config"


class BatchInUse(ConfigError):
    code = "batch_in_use"


class BatchChanged(ConfigError):
    """The journal was begun with another input or other settings."""

    code = "batch_changed"


class StorageError(HeadraceError):
    """A file of the batch cannot be written."""

    code = "storage_failed"

    def __init__(self, path: Path, error: OSError) -> None:
        remedy = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "put that right"
        reason = error.strerror or error
        super().__init__(f"{path}: {reason}; what is done is kept: {remedy}, then run the same command again")


class EngineError(HeadraceError):
    code = "engine_fault"


class NonFiniteLogits(EngineError):
    code = "nan_logits"


class OutOfMemory(EngineError):
    status = 503
    code = "out_of_memory"


class BackendUnavailable(EngineError):
    status = 503
    code = "backend_unavailable"


class ClientGone(HeadraceError):
    """Nobody is left to read the answer."""

    status = 499
    code = "client_gone"


class CodedError(HeadraceError):
    """An error that has crossed from another process: code, status and message are those it had there."""

    code = "other_process"

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code  # type: ignore[misc]
        self.status = status_of(code)  # type: ignore[misc]


def status_of(code: str) -> int:
    """The HTTP status of a stable error code; 500 for one that no class has."""
    pending: list[type[HeadraceError]] = [HeadraceError]
    while pending:
        cls = pending.pop()
        if cls.code == code:
            return cls.status
        pending += cls.__subclasses__()
    return 500
