"""Errors that a caller of the service can see, each with its HTTP status and OpenAI's error type.

Status codes, once for the whole API:

* 400: the body is not JSON, or a value is out of range, unknown, unsupported or too long for the context;
* 422: the body is JSON, but a field is missing or has the wrong type;
* 401 no or a wrong admin key, 404 unknown model or path, 408 deadline, 409 another operation runs, 413 body too
  large, 429 queue full (with ``Retry-After``), 499 the client went away, 500 the model raised, 503 the group is
  starting or lost, or an operation was rolled back.
"""

from __future__ import annotations

from typing import Any


class ServingError(Exception):
    """Base of them all. ``param`` names the request's field at fault, ``code`` is OpenAI's machine-readable word."""

    status = 500
    type = "internal_server_error"
    code: str | None = None

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code

    def body(self) -> dict[str, Any]:
        """OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {}


class InvalidRequest(ServingError):
    status = 400
    type = "invalid_request_error"


class MalformedRequest(ServingError):
    status = 422
    type = "invalid_request_error"


class Unauthorized(ServingError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class NotFound(ServingError):
    status = 404
    type = "invalid_request_error"


class DeadlineExceeded(ServingError):
    status = 408
    type = "timeout_error"
    code = "timeout"


class Conflict(ServingError):
    """Another operation is under way; the message names it."""

    status = 409
    type = "conflict_error"
    code = "operation_running"


class BodyTooLarge(ServingError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class Overloaded(ServingError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"
    retry_after_s = 1

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after_s)}


class ClientGone(ServingError):
    """Nobody reads this answer; the status only counts in the metrics."""

    status = 499
    type = "client_closed_request"


class ModelError(ServingError):
    status = 500
    type = "internal_server_error"
    code = "model_error"


class Unavailable(ServingError):
    status = 503
    type = "service_unavailable_error"
    code = "unavailable"


class ScalingFailed(Unavailable):
    """An operation was rolled back, and the old group serves on; ``operation`` is its last state, also in the body."""

    code = "scaling_failed"

    def __init__(self, message: str, operation: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.operation = operation

    def body(self) -> dict[str, Any]:
        return super().body() | {"operation": self.operation}


class EngineDeadError(Unavailable):
    """The whole group is lost for good; ``cause`` is why."""

    code = "engine_dead"

    def __init__(self, cause: BaseException | str) -> None:
        reason = cause if isinstance(cause, str) else f"{type(cause).__name__}: {cause}"
        super().__init__(f"The expert-parallel group is lost: {reason}")
        self.cause = cause
