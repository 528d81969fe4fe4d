"""Why a request can't be placed, in a form that says what to change."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from placement.snapshot import Node
from placement.table import format_table

# A message is for reading: of a large cluster it shows the first nodes in the planner's order. The value holds all.
ROWS_SHOWN = 24


class Room(msgspec.Struct, frozen=True):
    """What one node could give: ``fits`` more ranks beside the ``running`` ones, or, with ``span``, 1 if the whole node
    is free. ``note`` is why it gives none whatever it has free."""

    node: Node
    running: int
    fits: int
    note: str = ""


class NoFit(msgspec.Struct, frozen=True):
    """A refused request; ``rooms`` are in the planner's order of nodes. Its text is the whole explanation."""

    asked: str
    reason: str
    fix: str
    rooms: tuple[Room, ...]

    def __str__(self) -> str:
        return f"{self.reason}\nasked:  {self.asked}\nchange: {self.fix}\n\n{show_rooms(self.rooms)}"


def show_rooms(rooms: Sequence[Room]) -> str:
    """The table of what each node has free."""
    rows = []
    for room in rooms:
        node = room.node
        ip = f"{node.ip} (head)" if node.head else node.ip
        rows.append((node.node_id, ip, _free(node, "GPU"), _free(node, "CPU"), room.running, room.fits, room.note))
    header = ("node id", "ip", "free GPU", "free CPU", "running", "fits", "note")
    return format_table(header, rows, ROWS_SHOWN) if rows else "The cluster has no nodes."


def _free(node: Node, resource: str) -> str:
    return f"{node.free.get(resource, 0):g} of {node.total.get(resource, 0):g}"
