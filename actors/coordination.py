"""The coordinator as the manager reaches it: an actor that Serve may replace at any time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from actors.membership import NO_EPOCH, Epoch
from actors.siblings import Siblings
from actors.sockets import Keys

logger = logging.getLogger(__name__)

RETRY_S = 0.1


class Coordination:
    """Remembers what the coordinator was told, and tells it to a successor. ``addresses`` are (router, publisher)."""

    def __init__(self, siblings: Siblings) -> None:
        self._siblings = siblings
        self._keys: Keys | None = None
        self._actor: ActorHandle | None = None
        self._epoch = NO_EPOCH
        self._leaving: tuple[int, ...] = ()
        self.addresses: tuple[str, str] | None = None

    async def open(self, keys: Keys) -> tuple[str, str]:
        """The addresses it has now, bound with the group's ``keys``; a successor knows all that its predecessor did."""
        self._keys = keys
        await self._ask(lambda actor: actor.open.remote(keys))
        assert self.addresses is not None
        return self.addresses

    async def set_epoch(self, epoch: Epoch) -> None:
        """From now on the group is ``epoch``. Tries until it is done."""
        self._epoch, self._leaving = epoch, ()
        await self._ask(lambda actor: actor.set_epoch.remote(epoch))

    async def set_leaving(self, ranks: Sequence[int]) -> None:
        """Front-ends give these ranks nothing new, and others again. Tries until it is done."""
        self._leaving = tuple(ranks)
        await self._ask(lambda actor: actor.set_leaving.remote(self._epoch.number, self._leaving))

    async def _ask(self, call: Callable[[ActorHandle], Awaitable[Any]]) -> None:
        while True:
            try:
                if self._actor is None:
                    await self._introduce()
                assert self._actor is not None
                await call(self._actor)
                return
            except RayTaskError:
                raise  # its own answer
            except RayError as error:
                logger.warning("the coordinator did not answer, looking for its successor: %s", error)
                self._actor = None
                await asyncio.sleep(RETRY_S)

    async def _introduce(self) -> None:
        """Finds the coordinator that Serve has now, and tells it what its predecessor knew."""
        actor = await self._siblings.coordinator()
        self.addresses = await actor.open.remote(self._keys)
        if self._epoch.number:
            await actor.set_epoch.remote(self._epoch)
            await actor.set_leaving.remote(self._epoch.number, self._leaving)
        self._actor = actor
