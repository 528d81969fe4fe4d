"""The Ray actor around the coordinator: a deployment-scoped actor that Serve starts, health-checks and recreates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ray

from actors import logs
from actors.coordinator import Coordinator
from actors.membership import Epoch
from actors.sockets import Keys


class CoordinatorActor:
    """Made without arguments; the manager opens it with the group's keys and then tells it of each epoch."""

    def __init__(self) -> None:
        logs.begin("coordinator")
        self._keys: Keys | None = None
        self._coordinator: Coordinator | None = None

    def __repr__(self) -> str:
        return "coordinator"

    def open(self, keys: Keys) -> tuple[str, str]:
        """The (router, publisher) endpoints, bound on the first call. Other keys belong to another group, which gets a
        coordinator that knows nothing of the former one."""
        if self._coordinator is None or keys != self._keys:
            self.stop()
            self._coordinator = Coordinator(ray.util.get_node_ip_address(), keys.server)
            self._keys = keys
        return self._coordinator.addresses()

    def set_epoch(self, epoch: Epoch) -> None:
        """See ``Coordinator.set_epoch``; raises ``RuntimeError`` before ``open``."""
        if self._coordinator is None:
            raise RuntimeError(f"epoch {epoch.number} reached a coordinator without sockets: call open first")
        self._coordinator.set_epoch(epoch)

    def set_leaving(self, epoch_number: int, ranks: Iterable[int]) -> None:
        """See ``Coordinator.set_leaving``; raises ``RuntimeError`` before ``open``."""
        if self._coordinator is None:
            raise RuntimeError(f"ranks {list(ranks)} can't leave a coordinator without sockets: call open first")
        self._coordinator.set_leaving(epoch_number, ranks)

    def status(self) -> dict[str, Any]:
        return self._coordinator.status() if self._coordinator is not None else {}

    def stop(self) -> None:
        """Closes the sockets; safe to repeat."""
        if self._coordinator is not None:
            self._coordinator.stop()
            self._coordinator = None


CoordinatorOfGroup = ray.remote(CoordinatorActor)
