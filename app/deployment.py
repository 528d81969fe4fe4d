"""The Serve application: an ingress deployment whose deployment-scoped actors are the manager and the coordinator.

    serve run configs/demo-cpu.yaml

``reconfigure`` hands the declared size to the manager. On a replica's first start it also waits until the group serves,
so that Serve shows the application as deploying until it can answer, and shows the root cause if it can't be started.
Later it returns at once and never raises: a replica that reconfigures is out of routing, and one that raises is
torn down.

A program resizes the group through the deployment's handle, the same way as over HTTP:

    serve.get_deployment_handle("Ingress", "accordion").scale_elastic_ep.remote(3).result()
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any

import msgspec
import zmq
from fastapi import FastAPI
from pydantic import ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import DeploymentActorConfig

from actors.group import Contact
from actors.siblings import COORDINATOR, MANAGER
from app.api import build_api
from app.client import Client
from app.config import AppConfig, UserConfig, complaints, validated
from app.control import AdminKey
from app.manager_link import ManagerLink
from app.operations import GONE, Operations
from app.tokenizer import Tokenizer

logger = logging.getLogger("ray.serve")

# A replica holds streams, not work: how many it takes is bounded by its own limits (429), not by Serve's queue.
MAX_ONGOING_REQUESTS = 1_000_000
# By then Serve, which looks ten times a second or as often as it was told, has reconfigured a replica that it started
# with an older file.
SETTLED_S = 10.0


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
        self._manager = ManagerLink()
        self._operations = Operations(self._manager)
        key_file = self._config.http.admin_key_file
        self._admin_key = AdminKey.read(key_file) if key_file is not None else None
        self._contact: Contact | None = None
        self._cause: str | None = None
        self._size = self._config.data_parallel_size
        self._tasks: set[asyncio.Task[Any]] = set()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(
            self._client,
            self._tokenizer,
            self._config.limits(),
            self._config.model_name,
            self._trouble,
            self._operations,
            self._admin_key,
        )

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        starting = self._contact is None
        try:
            size = UserConfig.model_validate(user_config).data_parallel_size
        except ValidationError as error:
            logger.error("user_config can't be used:\n%s", complaints(error))
            # A group that serves is never disturbed by a bad file; without one there is nothing to serve.
            if starting and (await self._manager.status())["phase"] != "serving":
                raise ValueError(f"user_config can't be used:\n{complaints(error)}") from None
        else:
            self._size = size
            if not starting:
                self._in_background(self._manager.declare(size))
            elif (await self._manager.status())["phase"] == "serving":
                self._in_background(self._declare_later())
            else:
                await self._manager.declare(size)
        if starting:
            await self._locate()
            await self._client.start()
            self._in_background(self._watch())
            while not self._client.ready:
                await asyncio.sleep(0.05)

    # --- what programs ask through the deployment's handle ---------------------------------------------------------

    async def scale_elastic_ep(
        self,
        new_data_parallel_size: int,
        drain_timeout: float | None = None,
        operation_id: str | None = None,
        retire_ranks: list[int] | None = None,
    ) -> dict[str, Any]:
        """Resizes the group and returns the result when it is done; see ``Operations.scale`` for what it raises."""
        return await self._operations.scale(new_data_parallel_size, drain_timeout, operation_id, retire_ranks)

    async def rebalance_experts(self, operation_id: str | None = None) -> dict[str, Any]:
        """Re-places experts by their load and returns the result when it is done."""
        return await self._operations.rebalance(operation_id)

    async def cancel_scale_elastic_ep(self, operation_id: str) -> dict[str, Any]:
        return await self._operations.cancel(operation_id)

    async def is_scaling_elastic_ep(self) -> dict[str, Any]:
        return await self._operations.status()

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
        contact = await self._manager.contact()
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
            try:
                status = await self._manager.watch(version)
                self._operations.latest = status
                version = status["version"]
                if status["phase"] == "idle":  # a new manager that found no group
                    await self._manager.declare(self._size)
            except RuntimeError as error:
                logger.error("the manager's state can't be followed, trying again: %s", error)
                await asyncio.sleep(1.0)
                continue
            if status["phase"] in GONE:
                self._cause = status["cause"]
                await self._client.fail(self._cause)
                return

    async def _declare_later(self) -> None:
        """What this replica was started with may be older than what the others were told since."""
        await asyncio.sleep(SETTLED_S)
        await self._manager.declare(self._size)

    def _in_background(self, call: Awaitable[Any]) -> None:
        task = asyncio.ensure_future(call)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a task in the background failed", exc_info=task.exception())
