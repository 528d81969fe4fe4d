"""The nodes a request may use: their order, and the room each has."""

from __future__ import annotations

from collections import Counter

from placement.refusal import NoFit, Room
from placement.request import Request
from placement.snapshot import Node, Snapshot

# Ray counts in units of 1e-4; sums of its floats may fall short of a whole by less.
EPSILON = 1e-5


class Candidates:
    """``nodes`` in the planner's order (head first, then by free devices, ties by node id); ``usable`` are those not
    passed over; ``fits`` gives for each node id how many more ranks it has room for, or, with ``span``, 1 if the whole
    node is free; ``running`` counts the existing ranks of each node id."""

    def __init__(self, snapshot: Snapshot, request: Request) -> None:
        self.request = request
        self.running = Counter(placed.node_id for placed in request.existing)
        self.nodes = sorted(snapshot.nodes, key=lambda n: (not n.head, -n.free.get(request.device, 0.0), n.node_id))
        self.notes = {node.node_id: self._passed_over(node) for node in self.nodes}
        self.usable = [node for node in self.nodes if not self.notes[node.node_id]]
        self.fits = dict.fromkeys(self.notes, 0)
        demand = request.demand
        for node in self.usable:
            need = self._whole(node) if request.strategy == "span" else demand
            fits = min(int((node.free.get(name, 0.0) + EPSILON) // value) for name, value in need.items())
            self.fits[node.node_id] = min(fits, 1) if request.strategy == "span" else fits

    def _passed_over(self, node: Node) -> str:
        """Why ``node`` is out of the question whatever it has free; empty when it is not."""
        if not node.alive:
            return "dead"
        if node.draining:
            return "draining"
        if not node.total.get(self.request.device):
            return f"no {self.request.device}"
        allowed = self.request.nodes
        return "" if allowed is None or not _names(node).isdisjoint(allowed) else "not in nodes"

    def devices(self, node: Node) -> int:
        """Device bundles of the whole ``node``, which on a CPU node leave one CPU for a control bundle."""
        reserved = 1 if self.request.device == "CPU" else 0
        return int((node.total[self.request.device] - reserved + EPSILON) // self.request.devices_per_bundle)

    def _whole(self, node: Node) -> Counter[str]:
        return Counter({self.request.device: self.devices(node) * self.request.devices_per_bundle}) + Counter(
            {"CPU": 1}
        )

    @property
    def head(self) -> Node | None:
        return next((node for node in self.nodes if node.head and node.alive), None)

    def room(self, node: Node) -> int:
        """``fits``, of which the head node takes what brings it up to ``data_parallel_size_local``."""
        fits, local = self.fits[node.node_id], self.request.data_parallel_size_local
        return fits if local is None or not node.head else min(fits, max(0, local - self.running[node.node_id]))

    def refuse(self, reason: str, fix: str) -> NoFit:
        """``fix`` also names the entries of the allow-list that match no node."""
        if self.request.nodes is not None:
            known = {name for node in self.nodes for name in _names(node)}
            if unknown := [name for name in self.request.nodes if name not in known]:
                fix += f"; in nodes, correct {', '.join(unknown)}: no node has that id, IP or label"
        rooms = (
            Room(node, self.running[node.node_id], self.fits[node.node_id], self.notes[node.node_id])
            for node in self.nodes
        )
        return NoFit(asked=str(self.request), reason=reason, fix=fix, rooms=tuple(rooms))


def _names(node: Node) -> set[str]:
    """What an allow-list may call ``node``."""
    return {node.node_id, node.ip, *(f"{key}={value}" for key, value in node.labels.items())}
