"""The HTTP API: OpenAI's endpoints and the ones that operators of such servers expect. Knows nothing of Ray."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.chat import chat
from app.client import Client
from app.completions import complete
from app.control import AdminKey, add_control
from app.errors import BodyTooLarge, InvalidRequest, MalformedRequest, NotFound, ServingError, Unavailable
from app.limits import Limits
from app.metrics import Metrics
from app.operations import Operations
from app.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from app.responses import Json, Model, Models
from app.run import Service
from app.sampling import check_prompt
from app.tokenizer import Tokenizer

# Kinds of pydantic errors that are about a value; all others are about the shape or type of the body.
VALUE_ERRORS = (
    "greater_than",
    "less_than",
    "finite_number",
    "string_pattern_mismatch",
    "string_too_short",
    "too_short",
    "too_long",
    "unsupported_value",
    "value_error",
)


def build_api(
    client: Client,
    tokenizer: Tokenizer,
    limits: Limits,
    model: str,
    status: Callable[[], str | None] | None = None,
    operations: Operations | None = None,
    admin_key: AdminKey | None = None,
) -> FastAPI:
    """The application that serves ``model`` through ``client`` (started by the caller, on the loop that serves).

    ``status()`` returns None while all is well, else the reason that ``/health`` reports with 503; by default it is
    the client's own ``trouble``. With ``operations`` the group can be resized, by those who know the ``admin_key``
    if there is one.
    """
    service = Service(client, tokenizer, limits, model, Metrics(client, operations))
    trouble = status or (lambda: client.trouble)
    app = FastAPI(title="Accordion", version=_version())
    app.add_middleware(_BodyLimit, max_bytes=limits.max_body_bytes)
    _add_errors(app, service.metrics)
    _add_openai(app, service)
    _add_tokens(app, service)
    _add_state(app, service, trouble)
    if operations is not None:
        add_control(app, operations, admin_key)
    return app


def _add_openai(app: FastAPI, service: Service) -> None:
    card = Model(service.model, int(time.time()), service.limits.max_model_len)

    @app.get("/v1/models")
    async def models() -> Response:
        return Json(Models([card]))

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        _check_model(name, service)
        return Json(card)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody) -> Response:
        _check_model(body.model, service)
        return await complete(body, service)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody) -> Response:
        _check_model(body.model, service)
        return await chat(body, service)


def _add_tokens(app: FastAPI, service: Service) -> None:
    tokenizer = service.tokenizer

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Response:
        _check_model(body.model, service)
        if body.messages is not None:
            messages = [message.rendered() for message in body.messages]
            tokens = await tokenizer.encode_chat(messages, body.add_generation_prompt)
        else:
            tokens = await tokenizer.encode(body.prompt or "", body.add_special_tokens)
        return Json({"count": len(tokens), "max_model_len": service.limits.max_model_len, "tokens": tokens})

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Response:
        _check_model(body.model, service)
        if any(token >= tokenizer.vocab_size for token in body.tokens):
            check_prompt(body.tokens, service.limits, tokenizer.vocab_size, "tokens")
        return Json({"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)})


def _add_state(app: FastAPI, service: Service, trouble: Callable[[], str | None]) -> None:
    client = service.client

    @app.get("/health")
    @app.get("/ping")
    async def health() -> Response:
        reason = trouble()
        if reason is not None:
            raise Unavailable(reason)
        return Json({"status": "ready"})

    @app.get("/version")
    async def version() -> Response:
        return Json({"version": _version()})

    @app.get("/load")
    async def load() -> Response:
        wave, running = client.wave
        ranks = [
            {name: getattr(load, name) for name in ("rank", "waiting", "running", "kv_used", "kv_total")}
            for load in client.loads
        ]
        return Json(
            {
                "server_load": client.waiting + client.running,
                "waiting": client.waiting,
                "running": client.running,
                "epoch": client.epoch,
                "wave": wave,
                "group_running": running,
                "missing": client.missing,
                "leaving": client.leaving,
                "ranks": ranks,
            }
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _check_model(name: str | None, service: Service) -> None:
    if name is not None and name != service.model:
        message = f"The model '{name}' does not exist; this server serves '{service.model}'."
        raise NotFound(message, param="model", code="model_not_found")


# --- errors ---------------------------------------------------------------------------------------------------------


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    def answer(error: ServingError) -> Response:
        metrics.errors.labels(error.status).inc()
        return Json(error.body(), status_code=error.status, headers=error.headers)

    @app.exception_handler(ServingError)
    async def serving_error(request: Request, error: ServingError) -> Response:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        content_type = request.headers.get("content-type", "none")
        if "json" not in content_type:
            return answer(InvalidRequest(f"The Content-Type must be application/json; it is {content_type}."))
        return answer(_validation_error(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == BodyTooLarge.status:
            return answer(BodyTooLarge(error.detail))
        described = NotFound(f"{error.detail}: {request.method} {request.url.path}")
        described.status = error.status_code  # also 405
        return answer(described)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return answer(ServingError("Internal server error"))


def _validation_error(errors: Sequence[Any]) -> ServingError:
    """The first of pydantic's errors: 400 when a value is wrong or the body is no JSON, 422 for its type or shape."""
    first = errors[0]
    kind, message = first["type"], first["msg"]
    if kind == "json_invalid":
        return InvalidRequest(f"The body is not valid JSON: {first.get('ctx', {}).get('error', message)}.")
    path = [str(part) for part in first["loc"] if part != "body"]
    param = (first.get("ctx") or {}).get("param") or ".".join(path) or None
    if kind == "unsupported_value":
        return InvalidRequest(f"{message}.", param, code=kind)
    if kind == "missing":
        return MalformedRequest(f"Missing required parameter: '{param}'." if param else "The body is empty.", param)
    error = InvalidRequest if kind.startswith(VALUE_ERRORS) else MalformedRequest
    return error(f"Invalid '{param}': {message}." if param else f"{message}.", param)


class _BodyLimit:
    """Refuses a body beyond ``max_bytes`` while it is read, and at once when its declared length is."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        read = int(declared) if declared.isdigit() else 0
        refused = read > self._max_bytes
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if refused or read > self._max_bytes:
                raise HTTPException(413, f"The body is larger than this server's limit of {self._max_bytes} bytes.")
            return message

        await self._app(scope, limited, send)


def _version() -> str:
    try:
        return importlib.metadata.version("accordion")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was not installed
        return "unknown"
