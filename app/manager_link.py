"""The manager as a front-end reaches it: a deployment-scoped actor that Serve may recreate at any time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from actors.group import Contact
from actors.siblings import MANAGER
from app.errors import Unavailable

T = TypeVar("T")

RETRY_S = 0.2


class ManagerLink:
    """Also the ``Group`` of ``operations.Operations``.

    ``find()`` returns the manager's handle, or raises ValueError while there is none. What an operator asks for is
    answered within ``patience_s`` or ends with Unavailable; the rest waits for a manager however long it takes.
    """

    def __init__(
        self, find: Callable[[], ActorHandle] = lambda: serve.get_deployment_actor(MANAGER), patience_s: float = 30.0
    ) -> None:
        self._find = find
        self._patience_s = patience_s

    async def contact(self) -> Contact:
        return await self._ask(lambda m: m.contact.remote())

    async def declare(self, size: int) -> None:
        await self._ask(lambda m: m.declare.remote(size))

    async def watch(self, version: int) -> dict[str, Any]:
        return await self._ask(lambda m: m.watch.remote(version))

    async def status(self) -> dict[str, Any]:
        return await self._soon(lambda m: m.status.remote())

    async def scale_elastic_ep(
        self, size: int, drain_timeout_s: float | None, operation_id: str, retire: list[int] | None
    ) -> dict[str, Any]:
        return await self._soon(lambda m: m.scale_elastic_ep.remote(size, drain_timeout_s, operation_id, retire))

    async def rebalance_experts(self, operation_id: str) -> dict[str, Any]:
        return await self._soon(lambda m: m.rebalance_experts.remote(operation_id))

    async def cancel(self, operation_id: str) -> dict[str, Any]:
        return await self._soon(lambda m: m.cancel.remote(operation_id))

    async def _soon(self, call: Callable[[ActorHandle], Awaitable[T]]) -> T:
        try:
            return await asyncio.wait_for(self._ask(call), self._patience_s)
        except asyncio.TimeoutError:
            raise Unavailable(
                f"The manager has not answered for {self._patience_s:g} s. Ask again with the same operation_id: what "
                "it has heard of is not done twice."
            ) from None

    async def _ask(self, call: Callable[[ActorHandle], Awaitable[T]]) -> T:
        """Calls the manager, whichever one there is now; a call may so be made twice.

        Raises the manager's own error, without Ray's framing.
        """
        while True:
            try:
                return await call(self._find())
            except RayTaskError as error:  # first: it is a ValueError too when the manager raised one
                raise RuntimeError(str(error.cause)) from None
            except (ValueError, ActorDiedError, ActorUnavailableError):
                await asyncio.sleep(RETRY_S)  # Serve is (re)creating it
