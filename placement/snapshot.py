"""A snapshot of the cluster: what each node has, and what of it is free."""

from __future__ import annotations

import msgspec

# What ranks are made of; memory and custom resources play no part in a plan.
RESOURCES = ("CPU", "GPU")
HEAD_RESOURCE = "node:__internal_head__"


class Node(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One raylet. Two may share an ``ip``; ``node_id`` (hex) tells them apart.

    ``total`` and ``free`` count ``CPU`` and ``GPU``; ``head`` marks Ray's head node. Ray puts nothing new on a node
    that is ``draining``.
    """

    node_id: str
    ip: str
    total: dict[str, float]
    free: dict[str, float]
    head: bool = False
    labels: dict[str, str] = {}
    alive: bool = True
    draining: bool = False


class Snapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The cluster at one moment. Written as JSON with ``msgspec.json.encode`` and read back with ``from_json``."""

    nodes: tuple[Node, ...]


def from_json(text: str | bytes) -> Snapshot:
    """Reads a saved snapshot.

    Raises:
        msgspec.ValidationError: a field is missing, unknown or of the wrong type; the message holds its path.
        msgspec.DecodeError: ``text`` is not JSON.
    """
    return msgspec.json.decode(text, type=Snapshot)


def take() -> Snapshot:
    """Reads the cluster this process is connected to; dead nodes that Ray still remembers are marked as such.

    A node reports what it has free every 100 ms, so a group made or removed a moment ago by somebody else may not
    show yet; ``groups.apply`` and ``groups.remove`` wait until their own do.
    """
    # Imported here, so that planning on a saved snapshot needs no Ray.
    import ray
    from ray._private import state

    free = state.available_resources_per_node()
    # Ray has public functions for the sums only, not for what each node has free or which ones drain.
    draining = state.state.get_draining_nodes()
    nodes = []
    for node in ray.nodes():
        node_id, resources = node["NodeID"], node["Resources"]
        # A node without a report yet has just joined: nothing can have been placed on it.
        reported = free.get(node_id, resources)
        nodes.append(
            Node(
                node_id=node_id,
                ip=node["NodeManagerAddress"],
                total={name: resources[name] for name in RESOURCES if name in resources},
                free={name: reported.get(name, 0.0) for name in RESOURCES if name in resources},
                head=HEAD_RESOURCE in resources,
                labels=dict(node["Labels"]),
                alive=node["Alive"],
                draining=node_id in draining,
            )
        )
    return Snapshot(tuple(nodes))
