"""What one caller waits for: its requests and what they got, with one wake-up for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from actors.wire import Delta
from app.errors import DeadlineExceeded, ServingError
from app.flight import Flight, Generation


class Call:
    """The requests of one caller, in one mailbox, so that many of them cost one wake-up and no task each.

    A context manager and an asynchronous iterator: it yields batches of (index of the request, what was added to it)
    until all requests have finished; deltas of one request that came while the caller was busy are merged. Leaving
    the context aborts what is unfinished. Made by ``Client.call``.
    """

    def __init__(
        self, generations: Sequence[Generation], now: float, release: Callable[[Sequence[Flight]], None]
    ) -> None:
        self.flights = [Flight(generation, index, now, self._notify) for index, generation in enumerate(generations)]
        self._unfinished = set(range(len(self.flights)))
        self._release = release
        self._ready: list[Flight] = []
        self._error: ServingError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def expire_after(self, timeout_s: float) -> None:
        error = DeadlineExceeded(f"The request did not finish within {timeout_s:g} s.")
        self._deadline = asyncio.get_running_loop().call_later(timeout_s, self.fail, error)

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._release(self.flights)

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> list[tuple[int, Delta]]:
        """Raises the error that ``fail`` was given, at once and for ever."""
        while not self._ready and self._error is None:
            if not self._unfinished:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error is not None:
            raise self._error
        ready, self._ready = self._ready, []
        batch = [(flight.index, flight.take()) for flight in ready]
        self._unfinished.difference_update(index for index, delta in batch if delta.finish is not None)
        return batch

    def drop(self, index: int) -> None:
        """The caller needs no more of this request: it is aborted, the others go on."""
        flight = self.flights[index]
        self._unfinished.discard(index)
        if flight in self._ready:
            self._ready.remove(flight)
        self._release([flight])

    def fail(self, error: ServingError) -> None:
        """Aborts all requests; the caller, waiting or not, sees ``error`` instead of further batches.

        The first error counts.
        """
        self._error = self._error or error
        self._release(self.flights)
        self._wake()

    def _notify(self, flight: Flight) -> None:
        self._ready.append(flight)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
