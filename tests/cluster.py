"""Real Ray clusters of several nodes on one machine, for tests.

Each node is a raylet with an address of its own (127.0.0.x) and as many CPUs and GPUs as it is told; GPUs need not
exist. Nothing here touches another cluster on the machine: ``tests/conftest.py`` gives the tests a directory of their
own, clusters are reached by address, and processes are ended one by one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.cluster_utils import Cluster


@dataclass
class TestCluster:
    """A running cluster to which this process is connected. ``nodes`` holds node ids, the head's first."""

    __test__ = False

    cluster: Cluster
    nodes: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, ip: str, cpus: float, gpus: int = 0, labels: dict[str, str] | None = None) -> str:
        """Starts a node and returns its id."""
        options: dict[str, Any] = {"labels": labels} if labels else {}
        if not self.nodes:
            options["include_dashboard"] = False
        node = self.cluster.add_node(node_ip_address=ip, num_cpus=cpus, num_gpus=gpus, **options)
        self.nodes.append(node.node_id)
        return str(node.node_id)

    def remove(self, node_id: str) -> None:
        """Ends a node's processes; the cluster is told (one that crashes is missed after 14 s by default)."""
        node = next(node for node in self.cluster.list_all_nodes() if node.node_id == node_id)
        self.cluster.remove_node(node)
        self.nodes.remove(node_id)


@contextlib.contextmanager
def running_cluster(*nodes: dict[str, Any], namespace: str = "test") -> Iterator[TestCluster]:
    """A cluster of ``nodes`` (arguments of ``TestCluster.add``; the first is the head), ended on the way out.

    Ray takes 127.0.0.1 for the machine's outer address, so nodes start at 127.0.0.2.
    """
    started = TestCluster(Cluster())
    try:
        for node in nodes:
            started.add(**node)
        ray.init(address=started.address, namespace=namespace, log_to_driver=False)
        yield started
    finally:
        ray.shutdown()
        started.cluster.shutdown()
