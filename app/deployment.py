"""The Serve application: an ingress deployment whose deployment-scoped actors are the manager and the coordinator.

    serve run configs/demo-cpu.yaml

``reconfigure`` hands the declared size to the manager. On a replica's first start it also waits until the group serves,
so that Serve shows the application as deploying until it can answer, and shows the root cause if it can't be started.
Later it returns at once and never raises: a replica that reconfigures is out of routing, and one that raises is
torn down.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
import zmq
from fastapi import FastAPI
from pydantic import ValidationError
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve import Application
from ray.serve.config import DeploymentActorConfig

from actors.manager import Contact
from actors.siblings import COORDINATOR, MANAGER
from app.api import build_api
from app.client import Client
from app.config import AppConfig, UserConfig, complaints, validated
from app.tokenizer import Tokenizer

logger = logging.getLogger("ray.serve")

T = TypeVar("T")

# A replica holds streams, not work: how many it takes is bounded by its own limits (429), not by Serve's queue.
MAX_ONGOING_REQUESTS = 1_000_000


def build_app(args: dict[str, Any]) -> Application:
    """The application of a Serve config file's ``args``. Raises ValueError naming each bad field, value and fix."""
    config = validated(args)
    ingress: Any = serve.deployment(
        Ingress,
        name="Ingress",
        num_replicas=2,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        health_check_period_s=1,
        health_check_timeout_s=10,
        ray_actor_options={"num_cpus": 0},
        user_config={"data_parallel_size": config.data_parallel_size},
        deployment_actors=[
            DeploymentActorConfig(
                name=MANAGER,
                actor_class="actors.manager:Manager",
                init_kwargs={"settings": msgspec.to_builtins(config.group_settings())},
                actor_options={"num_cpus": 0},
            ),
            DeploymentActorConfig(
                name=COORDINATOR,
                actor_class="actors.coordinator_actor:CoordinatorOfGroup",
                actor_options={"num_cpus": 0},
            ),
        ],
    )
    return ingress.bind(config.model_dump())


@serve.ingress()
class Ingress:
    """One HTTP front-end: OpenAI API, tokenizer, client of the group."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = AppConfig.model_validate(config)
        self._tokenizer = Tokenizer(self._config.model)
        self._client = Client(self._locate, self._config.limits(), configure=self._secure)
        self._contact: Contact | None = None
        self._cause: str | None = None
        self._size = self._config.data_parallel_size
        self._tasks: set[asyncio.Task[Any]] = set()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._client, self._tokenizer, self._config.limits(), self._config.model_name, self._trouble)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        starting = self._contact is None
        try:
            size = UserConfig.model_validate(user_config).data_parallel_size
        except ValidationError as error:
            logger.error("user_config can't be used:\n%s", complaints(error))
            # A group that serves is never disturbed by a bad file; without one there is nothing to serve.
            if starting and (await self._ask(lambda m: m.status.remote()))["phase"] != "serving":
                raise ValueError(f"user_config can't be used:\n{complaints(error)}") from None
        else:
            self._size = size
            declared = self._ask(self._declaration)
            if starting:
                await declared
            else:
                self._in_background(declared)
        if starting:
            await self._locate()
            await self._client.start()
            self._in_background(self._watch())
            while not self._client.ready:
                await asyncio.sleep(0.05)

    def check_health(self) -> None:
        """Raises once the group is lost: Serve replaces this replica, and its successor has the group made anew."""
        if self._cause is not None:
            raise RuntimeError(f"the expert-parallel group is lost: {self._cause}")

    async def __del__(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self._client.close()

    # --- the group -------------------------------------------------------------------------------------------------

    async def _locate(self) -> tuple[str, str]:
        contact: Contact = await self._ask(lambda m: m.contact.remote())
        self._contact = contact
        return contact.router, contact.publisher

    def _secure(self, socket: zmq.Socket[bytes]) -> None:
        assert self._contact is not None
        self._contact.keys.client(socket)

    def _trouble(self) -> str | None:
        return self._cause or self._client.trouble

    async def _watch(self) -> None:
        """Follows the group's state, and fails every waiting call once the group is lost for good."""
        version = -1
        while True:
            status = await self._ask(self._news_after(version))
            version = status["version"]
            if status["phase"] == "idle":  # a new manager that found no group
                await self._ask(self._declaration)
            elif status["phase"] in ("lost", "failed"):
                self._cause = status["cause"]
                await self._client.fail(self._cause)
                return

    def _declaration(self, manager: ActorHandle) -> Awaitable[None]:
        return manager.declare.remote(self._size)

    @staticmethod
    def _news_after(version: int) -> Callable[[ActorHandle], Awaitable[dict[str, Any]]]:
        return lambda m: m.watch.remote(version)

    async def _ask(self, call: Callable[[ActorHandle], Awaitable[T]]) -> T:
        """Calls the manager, whichever one Serve has now. Raises the manager's own error, without Ray's framing."""
        while True:
            try:
                return await call(serve.get_deployment_actor(MANAGER))
            except (ValueError, ActorDiedError, ActorUnavailableError):
                await asyncio.sleep(0.2)  # Serve is (re)creating it
            except RayTaskError as error:
                raise RuntimeError(str(error.cause)) from None

    def _in_background(self, call: Awaitable[Any]) -> None:
        task = asyncio.ensure_future(call)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
