"""A small client of the endpoints that resize a running group; the standard library is all it needs.

    ElasticClient("http://127.0.0.1:8000").scale_elastic_ep(3, on_progress=print)

An operation gets its id here, is started without waiting, and is then followed by asking. So a lost connection, a
proxy's timeout or a front-end that restarts costs nothing but another question: the same id never starts a second
operation.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from typing import Any

Progress = Callable[[dict[str, Any]], None]

POLL_S = 0.5
FIRST_PATIENCE_S = 5.0
# Answers of proxies and front-ends that say nothing about the operation: worth asking again.
PASSING = (408, 429, 502, 504)


class ElasticError(Exception):
    """What was asked for was not done."""


class Refused(ElasticError):
    """The server says no: ``status`` is the HTTP status, ``code`` and ``param`` are OpenAI's."""

    def __init__(self, message: str, status: int, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


class RolledBack(ElasticError):
    """The operation failed in ``phase`` for ``cause``, and the old group serves on."""

    def __init__(self, message: str, operation: dict[str, Any] | None) -> None:
        super().__init__(message)
        self.operation = operation or {}
        self.phase: str = self.operation.get("failed_phase") or self.operation.get("phase") or "unknown"
        self.cause: str = self.operation.get("error") or message


class Unreachable(ElasticError):
    """Nothing answered for too long. What was asked for may still be carried out."""


class ElasticClient:
    """``url`` is the server's root, ``admin_key`` what its ``http.admin_key_file`` holds, if it has one.

    Asks every ``poll_s`` seconds while it follows an operation; ``patience_s`` without an answer end the following, and
    ``FIRST_PATIENCE_S`` when the server has not answered at all yet.
    """

    def __init__(
        self,
        url: str,
        admin_key: str | None = None,
        poll_s: float = POLL_S,
        patience_s: float = 60.0,
        timeout_s: float = 35.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url={url!r}: expected http://host:port or https://host:port of the server")
        if admin_key is not None and not admin_key.isprintable():
            raise ValueError("the admin key has characters that no header can carry: give one line of text")
        self._url = url.rstrip("/")
        self._admin_key = admin_key
        self._poll_s = poll_s
        self._patience_s = patience_s
        self._timeout_s = timeout_s
        self._answered = False
        self._opener = urllib.request.build_opener(_NoRedirects())

    def __repr__(self) -> str:
        return f"ElasticClient({self._url!r})"

    def scale_elastic_ep(
        self,
        new_data_parallel_size: int,
        drain_timeout: float | None = None,
        retire_ranks: list[int] | None = None,
        on_progress: Progress | None = None,
        operation_id: str | None = None,
        wait: bool = True,
    ) -> dict[str, Any]:
        """Resizes the group and returns the operation's result, or its state so far with ``wait=False``.

        ``on_progress(status)`` is called with each new answer of ``status()``. Raises Refused, RolledBack, Unreachable.
        """
        body = {
            "new_data_parallel_size": new_data_parallel_size,
            "drain_timeout": drain_timeout,
            "retire_ranks": retire_ranks,
        }
        return self._carry_out("/scale_elastic_ep", body, operation_id, on_progress, wait, new_data_parallel_size)

    def rebalance_experts(
        self, on_progress: Progress | None = None, operation_id: str | None = None, wait: bool = True
    ) -> dict[str, Any]:
        """Re-places the experts by their measured load; otherwise like ``scale_elastic_ep``."""
        return self._carry_out("/rebalance_experts", {}, operation_id, on_progress, wait, None)

    def cancel(self, operation_id: str | None = None) -> dict[str, Any]:
        """Has an operation rolled back: the one that runs, if none is named."""
        if operation_id is None:
            status = self.status()
            if not status["is_scaling_elastic_ep"]:
                raise Refused("No operation runs: there is nothing to cancel.", 400)
            operation_id = status["operation_id"]
        return self._until_answered("/cancel_scale_elastic_ep", {"operation_id": operation_id})

    def status(self) -> dict[str, Any]:
        """Sizes, epoch, and the operation that runs or was the last."""
        return self._until_answered("/is_scaling_elastic_ep", None)

    def _carry_out(
        self,
        path: str,
        body: dict[str, Any],
        operation_id: str | None,
        on_progress: Progress | None,
        wait: bool,
        size: int | None,
    ) -> dict[str, Any]:
        operation_id = operation_id or f"op-{uuid.uuid4().hex[:12]}"
        asked = {name: value for name, value in body.items() if value is not None}
        asked |= {"operation_id": operation_id, "wait": False}
        result = self._until_answered(path, asked)
        shown = None
        while wait and not result["operation"]["done"]:
            time.sleep(self._poll_s)
            status = self.status()
            if status["operation_id"] == operation_id and not status["operation"]["done"]:
                if on_progress is not None and status != shown:
                    on_progress(status)
                shown = status
                continue
            # Done, or no more the last one: its own id tells how it ended.
            try:
                result = self._until_answered(path, asked)
            except Refused as error:
                result = _forgotten(error, result, status, size)
        return result

    def _until_answered(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        since = time.monotonic()
        while True:
            try:
                return self._ask(path, body)
            except _NoAnswer as error:
                patience_s = self._patience_s if self._answered else min(FIRST_PATIENCE_S, self._patience_s)
                if time.monotonic() - since >= patience_s:
                    raise Unreachable(f"{self._url} gave no answer for {patience_s:g} s: {error}") from None
            time.sleep(self._poll_s)

    def _ask(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        if self._admin_key is not None:
            # urllib encodes headers in Latin-1; the server compares bytes of UTF-8.
            request.add_header("Authorization", f"Bearer {self._admin_key}".encode().decode("latin-1"))
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                answer = json.load(response)
                self._answered = True
        except urllib.error.HTTPError as error:
            self._answered = True
            with error:
                raise _refusal(error.code, _json(error)) from None
        except (OSError, http.client.HTTPException) as error:
            raise _NoAnswer(str(error) or type(error).__name__) from None
        except ValueError:
            raise _NoAnswer(f"{self._url}{path} does not answer in JSON") from None
        return dict(answer)


class _NoAnswer(Exception):
    """Nothing is known of what was asked: ask again."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the admin key to another server."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _json(error: urllib.error.HTTPError) -> dict[str, Any]:
    try:
        document = json.load(error)
    except (OSError, ValueError, http.client.HTTPException):
        return {}
    return document if isinstance(document, dict) else {}


def _refusal(status: int, document: dict[str, Any]) -> Exception:
    described = document.get("error")
    described = described if isinstance(described, dict) else {}
    message, code = str(described.get("message") or f"HTTP status {status}"), described.get("code")
    if code == "scaling_failed":
        return RolledBack(message, document.get("operation"))
    if status in PASSING or (status == 503 and code in (None, "unavailable")):
        return _NoAnswer(message)
    return Refused(message, status, code, described.get("param"))


def _forgotten(error: Refused, result: dict[str, Any], status: dict[str, Any], size: int | None) -> dict[str, Any]:
    """What became of an operation that was begun, and that the server knows no more: the size says it."""
    operation = result["operation"]
    if error.status != 400 or size is None or status["data_parallel_size"] != size:
        raise RolledBack(f"The end of operation {operation['id']} is unknown: {error}", operation)
    done = operation | {"done": True, "phase": "idle", "epoch": status["epoch"]}
    message = f"The group has {size} ranks."
    return result | {"message": message, "data_parallel_size": size, "epoch": status["epoch"], "operation": done}
