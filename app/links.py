"""The client's connections: one to each engine of the epoch, and a pair to the coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

import zmq

from actors import wire
from actors.membership import Member
from app.connection import Connection

log = logging.getLogger(__name__)

Configure = Callable[[zmq.Socket[bytes]], None]
Locate = Callable[[], Awaitable[tuple[str, str]]]


class EngineLink:
    """A DEALER to one member: Attach until answered, then a Beat each tick, whose echo shows that the rank lives."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        member: Member,
        identity: bytes,
        configure: Configure,
        on_attached: Callable[[EngineLink, wire.Attached], None],
        on_outputs: Callable[[EngineLink, wire.Outputs], None],
    ) -> None:
        self.member = member
        self.attached = False
        self._on_attached = on_attached
        self._on_outputs = on_outputs
        self._loop = asyncio.get_running_loop()
        self.heard_at = self._loop.time()
        self._connection = Connection(context, zmq.DEALER, member.address, configure, self._receive, identity)
        self.send(wire.Attach())

    @property
    def rank(self) -> int:
        return self.member.rank

    @property
    def silent_s(self) -> float:
        """Seconds since the engine was last heard, or since the link was made."""
        return self._loop.time() - self.heard_at

    def send(self, message: wire.ToEngine) -> None:
        self._connection.send(wire.encode(message))

    def tick(self, epoch: int) -> None:
        self.send(wire.Beat(epoch) if self.attached else wire.Attach())

    def drain(self) -> None:
        """Takes what has arrived already."""
        self._connection.drain()

    def close(self) -> None:
        self._connection.close()

    def _receive(self, frame: bytes) -> None:
        message = wire.from_engine(frame)
        self.heard_at = self._loop.time()
        if isinstance(message, wire.Outputs):
            self._on_outputs(self, message)
        elif isinstance(message, wire.Attached):
            if message.rank != self.rank:
                log.error("%s answered as rank %d, not %d", self.member.address, message.rank, self.rank)
                return
            self.attached = True
            self._on_attached(self, message)


class CoordinatorLink:
    """A DEALER to the coordinator's ROUTER and a SUB to its PUB, found again when the coordinator falls silent.

    The coordinator publishes a view every few seconds even when nothing changed; in between, a Lookup per tick asks
    for one. Views come over two sockets, and one that another overtook is dropped. No view for ``timeout_s`` means
    that the coordinator may have been replaced: ``locate`` is asked where it is now.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        locate: Locate,
        configure: Configure,
        on_view: Callable[[wire.View], None],
        timeout_s: float,
    ) -> None:
        self._context = context
        self._locate = locate
        self._configure = configure
        self._on_view = on_view
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        self._newest = 0
        self._router: Connection | None = None
        self._publisher: Connection | None = None
        self._search: asyncio.Task[None] | None = None

    def send(self, message: wire.ToCoordinator) -> None:
        """Sends if the coordinator was ever found; what a dead one does not answer is sent again by later ticks."""
        if self._router is not None:
            self._router.send(wire.encode(message))

    def look_up(self) -> None:
        self.send(wire.Lookup())

    def tick(self) -> None:
        silent = self._loop.time() - self._heard_at
        if self._router is None or silent > self._timeout_s:
            if self._search is None or self._search.done():
                self._search = self._loop.create_task(self._find())
        else:
            self.look_up()

    async def close(self) -> None:
        if self._search is not None:
            self._search.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._search
        self._disconnect()

    async def _find(self) -> None:
        try:
            router, publisher = await asyncio.wait_for(self._locate(), self._timeout_s)
        except Exception as error:
            log.warning("the coordinator was not found, trying again: %s: %s", type(error).__name__, error)
            return
        # Also at the same addresses: a fresh connection makes a fresh key exchange.
        self._disconnect()
        self._newest = 0  # another coordinator counts its own
        log.info("coordinator at %s, publishing at %s", router, publisher)
        self._router = Connection(self._context, zmq.DEALER, router, self._configure, self._receive)
        self._publisher = Connection(self._context, zmq.SUB, publisher, self._configure, self._receive)
        self._heard_at = self._loop.time()
        self.look_up()

    def _disconnect(self) -> None:
        for connection in (self._router, self._publisher):
            if connection is not None:
                connection.close()
        self._router = self._publisher = None

    def _receive(self, frame: bytes) -> None:
        view = wire.coordinator_to_client(frame)
        self._heard_at = self._loop.time()
        if view.number >= self._newest:
            self._newest = view.number
            self._on_view(view)
