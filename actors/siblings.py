"""How the manager finds the actors that belong to the same deployment: its coordinator and its engines."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.util import list_named_actors

COORDINATOR = "coordinator"
MANAGER = "manager"


@dataclass(frozen=True)
class Siblings:
    """``namespace`` is where the engines of this deployment version are named; ``coordinator_name`` how its coordinator
    ends its name, ``application`` the Serve application."""

    application: str
    namespace: str
    coordinator_name: str

    @classmethod
    def of_this_deployment(cls) -> Siblings:
        """From inside a deployment-scoped actor of Serve.

        The code version is part of the namespace: while a changed application is rolled out, the old and the new group
        stand side by side, and neither manager touches the other's ranks.
        """
        context = serve.get_deployment_actor_context()
        return cls(
            application=context.app_name,
            namespace=f"accordion-{context.app_name}-{context.code_version}",
            coordinator_name=f"::{context.deployment}::{context.code_version}::{COORDINATOR}",
        )

    async def coordinator(self) -> ActorHandle:
        """The coordinator of this deployment, waiting while Serve (re)creates it."""
        while True:
            for actor in list_named_actors(all_namespaces=True):
                name = actor["name"]
                if name.endswith(self.coordinator_name) and self.application in name:
                    return ray.get_actor(name, namespace=actor["namespace"])
            await asyncio.sleep(0.1)

    def engines(self) -> list[ActorHandle]:
        """Engines that run under this deployment version, whoever launched them."""
        found = []
        for actor in list_named_actors(all_namespaces=True):
            if actor["namespace"] == self.namespace and actor["name"].startswith("dp_rank_"):
                with contextlib.suppress(ValueError):  # it ended since it was listed
                    found.append(ray.get_actor(actor["name"], namespace=actor["namespace"]))
        return found
