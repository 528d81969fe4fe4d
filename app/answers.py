"""Answers under way: a run written to the client as one JSON body or as server-sent events.

Both watch the connection while the run goes on. When the client goes away, the run is aborted in the engines at once,
streamed or not. The head of a stream is sent with its first event, so that whatever fails before it has its own status.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.choice import Piece
from app.errors import ClientGone, ServingError
from app.metrics import Metrics
from app.responses import DONE, PromptTokensDetails, Usage, event
from app.run import Run

log = logging.getLogger(__name__)


class Writer(Protocol):
    """How an endpoint words its answer."""

    def chunk(self, index: int, piece: Piece) -> bytes:
        """The events for a piece of choice ``index``; may be empty."""

    def usage(self) -> bytes:
        """The event that reports usage, empty if it was not asked for."""

    def keep(self, index: int, piece: Piece) -> None:
        """Takes a piece of an answer that is not streamed."""

    def whole(self) -> bytes:
        """The JSON body of all that was kept."""


def usage_of(run: Run) -> Usage:
    prompt, generated = run.prompt_tokens, run.generated_tokens
    return Usage(prompt, generated, prompt + generated, PromptTokensDetails(run.cached_tokens))


class WholeAnswer(Response):
    """The run's answer in one body, when all choices have finished."""

    media_type = "application/json"

    def __init__(self, run: Run, writer: Writer) -> None:
        super().__init__()
        self._run = run
        self._writer = writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._run, _watched(self._run, receive):
            async for batch in self._run:
                for index, piece in batch:
                    self._writer.keep(index, piece)
        response = Response(self._writer.whole(), media_type=self.media_type)
        await response(scope, receive, send)


class StreamedAnswer(Response):
    """The run's answer as events, each sent when its tokens come; tokens that came together share one."""

    media_type = "text/event-stream"

    def __init__(self, run: Run, writer: Writer, metrics: Metrics) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._run = run
        self._writer = writer
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            with self._run, _watched(self._run, receive):
                chunk = self._writer.chunk
                async for batch in self._run:
                    body = b"".join([chunk(index, piece) for index, piece in batch])
                    if not body:
                        continue
                    if not started:
                        started = True
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            tail = self._writer.usage()
        except Exception as error:
            if not started:
                raise
            if not isinstance(error, ServingError):
                log.exception("%s failed while it was streamed", self._run.id)
                error = ServingError("Internal server error")
            self._metrics.errors.labels(error.status).inc()
            if isinstance(error, ClientGone):
                return
            tail = event(error.body())
        await send({"type": "http.response.body", "body": tail + DONE, "more_body": False})


@contextlib.contextmanager
def _watched(run: Run, receive: Receive) -> Iterator[None]:
    """Fails the run with ClientGone when the connection closes."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        run.fail(ClientGone("The client closed the connection."))

    task = asyncio.get_running_loop().create_task(watch())
    try:
        yield
    finally:
        task.cancel()
