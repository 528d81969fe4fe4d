"""The planner: which node each rank goes to, as a pure function of a snapshot and a request.

Nodes are taken in order: the head first, then by free devices, ties by node id. The strategies:

- ``strict``: every node used ends with exactly ``data_parallel_size_local`` ranks;
- ``fill``: each node takes all that fits before the next one is used;
- ``span``: each rank takes whole nodes, all with the same number of devices.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import msgspec

from placement.candidates import Candidates
from placement.refusal import NoFit
from placement.request import Placed, Request, show_bundles, unused
from placement.snapshot import Node, Snapshot
from placement.table import format_table

__all__ = ["NoFit", "Placed", "Plan", "RankPlacement", "Request", "choose_leaving", "plan"]


class RankPlacement(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's place. ``bundle_nodes`` holds the node id of each of ``bundles``; ``node_id`` and ``ip`` are those of
    the first device, which the control bundle shares. ``strategy`` is the placement group's."""

    rank: int
    local_rank: int
    node_id: str
    ip: str
    bundles: tuple[dict[str, float], ...]
    bundle_nodes: tuple[str, ...]
    strategy: str

    @property
    def name(self) -> str:
        return f"dp_rank_{self.rank}"


class Plan(msgspec.Struct, frozen=True):
    """Where the ranks that ``request`` adds to its ``existing`` ones go, in order of placement."""

    request: Request
    ranks: tuple[RankPlacement, ...]

    def __str__(self) -> str:
        header = ("group", "local rank", "ip", "node id", "strategy", "bundles")
        rows = []
        for rank in self.ranks:
            others = len(set(rank.bundle_nodes)) - 1
            where = rank.node_id + (f" and {others} more" if others else "")
            rows.append((rank.name, rank.local_rank, rank.ip, where, rank.strategy, show_bundles(rank.bundles)))
        return f"{self.request}\n\n{format_table(header, rows) if rows else 'Nothing to place.'}"


# One entry for each new rank, in order: the node of each of its device bundles.
Choice = list[list[Node]]


def plan(snapshot: Snapshot, request: Request) -> Plan | NoFit:
    """Places the ranks that are missing from ``request.data_parallel_size``, or says why that can't be.

    New ranks get the lowest unused global ranks and, on each node, the lowest unused local ranks. The order of the
    snapshot's nodes plays no part. Takes O(nodes log nodes + ranks).

    Raises:
        ValueError: more ranks exist than are wanted (``choose_leaving`` is for that).
    """
    missing = request.data_parallel_size - len(request.existing)
    if missing < 0:
        raise ValueError(
            f"data_parallel_size={request.data_parallel_size} is less than the {len(request.existing)} existing ranks: "
            "choose ranks to remove instead"
        )
    if missing == 0:
        return Plan(request, ())
    candidates = Candidates(snapshot, request)
    choose = {"fill": _fill, "strict": _strict, "span": _span}[request.strategy]
    chosen = choose(candidates, missing)
    return chosen if isinstance(chosen, NoFit) else Plan(request, tuple(_number(chosen, request)))


def choose_leaving(existing: Sequence[Placed], data_parallel_size: int, named: Collection[int] = ()) -> tuple[int, ...]:
    """The global ranks to remove so that ``data_parallel_size`` remain: the ``named`` ones, then the highest.

    Returned highest first.

    Raises:
        ValueError: the size is above the present one or below 1; ``named`` has unknown ranks, or too many.
    """
    ranks, wanted = {placed.rank for placed in existing}, set(named)
    leaving = len(ranks) - data_parallel_size
    if data_parallel_size < 1 or leaving < 0:
        raise ValueError(f"data_parallel_size={data_parallel_size}: choose 1 to {len(ranks)}, the present size")
    if unknown := sorted(wanted - ranks):
        raise ValueError(f"ranks {unknown} do not exist: name some of {sorted(ranks)}")
    if len(wanted) > leaving:
        raise ValueError(
            f"ranks {sorted(wanted)} are named for removal, but going from {len(ranks)} to {data_parallel_size} "
            f"removes {leaving}: name fewer, or set data_parallel_size={len(ranks) - len(wanted)}"
        )
    unnamed = sorted(ranks - wanted, reverse=True)
    return tuple(sorted([*wanted, *unnamed[: leaving - len(wanted)]], reverse=True))


def _fill(candidates: Candidates, missing: int) -> Choice | NoFit:
    if refusal := _short_head(candidates):
        return refusal
    request, chosen = candidates.request, Choice()
    for node in candidates.usable:
        chosen += [[node] * request.world_size] * min(candidates.room(node), missing - len(chosen))
    if len(chosen) < missing:
        head = candidates.head
        kept_off = head is not None and candidates.room(head) < candidates.fits[head.node_id]
        return _too_few(candidates, len(chosen), missing, "raise data_parallel_size_local" if kept_off else "")
    return chosen


def _strict(candidates: Candidates, missing: int) -> Choice | NoFit:
    request, fits = candidates.request, candidates.fits
    local, size = request.data_parallel_size_local, request.data_parallel_size
    assert local is not None
    if size % local:
        below = f"{size - size % local} or " if size > local else ""
        return candidates.refuse(
            f"data_parallel_size={size} is not a multiple of data_parallel_size_local={local}, the ranks of each node "
            "used.",
            f"set data_parallel_size={below}{size + local - size % local}, another data_parallel_size_local, or "
            "strategy='fill'",
        )
    # Nodes that hold some ranks already are brought to ``local`` first; then others are used.
    started = {node_id: local - number for node_id, number in candidates.running.items()}
    for node_id, lacking in started.items():
        if lacking < 0 or (lacking and fits.get(node_id, 0) < lacking):
            return candidates.refuse(
                f"Node {node_id} runs {local - lacking} of the ranks and has room for {fits.get(node_id, 0)} more: it "
                f"can't end with exactly data_parallel_size_local={local}.",
                "free its devices, remove its ranks first, or set strategy='fill'",
            )
    if not started and (refusal := _short_head(candidates)):
        return refusal
    fresh = size // local - len(started)
    if fresh < 0:
        return candidates.refuse(
            f"The existing ranks stand on {len(started)} nodes; data_parallel_size_local={local} on each is "
            f"{len(started) * local} ranks, more than data_parallel_size={size}.",
            f"set data_parallel_size={len(started) * local}, or strategy='fill'",
        )
    chosen: Choice = []
    for node in candidates.usable:
        chosen += [[node] * request.world_size] * started.get(node.node_id, 0)
    empty = [node for node in candidates.usable if node.node_id not in started and fits[node.node_id] >= local][:fresh]
    for node in empty:
        chosen += [[node] * request.world_size] * local
    return (
        chosen if len(empty) == fresh else _too_few(candidates, len(chosen), missing, "lower data_parallel_size_local")
    )


def _span(candidates: Candidates, missing: int) -> Choice | NoFit:
    request = candidates.request
    nodes = [node for node in candidates.usable if not (node.head and request.data_parallel_size_local == 0)]
    sizes = sorted({candidates.devices(node) for node in nodes})
    if not nodes or sizes[-1] == 0:
        return _too_few(candidates, 0, missing)
    if len(sizes) > 1:
        return candidates.refuse(
            f"strategy='span' needs nodes alike, but those usable hold {', '.join(map(str, sizes))} device bundles.",
            "name nodes of one kind in nodes, or set strategy='fill'",
        )
    per_node = sizes[0]
    if request.world_size % per_node:
        return candidates.refuse(
            f"strategy='span' gives a rank whole nodes, but world_size={request.world_size} is not a multiple of the "
            f"{per_node} device bundles of a node.",
            f"set world_size to a multiple of {per_node}, or strategy='fill'",
        )
    if refusal := _short_head(candidates):
        return refusal
    nodes_per_rank = request.world_size // per_node
    whole = [node for node in nodes if candidates.room(node)]
    possible = len(whole) // nodes_per_rank
    if possible < missing:
        return _too_few(candidates, possible, missing)
    chosen: Choice = []
    for first in range(0, missing * nodes_per_rank, nodes_per_rank):
        chosen.append([node for node in whole[first : first + nodes_per_rank] for _ in range(per_node)])
    return chosen


def _short_head(candidates: Candidates) -> NoFit | None:
    """A refusal if the first ranks are to be on the head node and do not fit there."""
    request, head = candidates.request, candidates.head
    if not request.data_parallel_size_local or request.existing:
        return None
    wanted = min(request.data_parallel_size_local, request.data_parallel_size)
    # With ``strict`` the number holds for every node used, and a head that can't be used at all is passed over.
    if request.strategy == "strict" and (head is None or candidates.notes[head.node_id]):
        return None
    if head is None:
        return candidates.refuse(
            f"There is no live head node for data_parallel_size_local={wanted} ranks.",
            "leave data_parallel_size_local out",
        )
    fits, note = candidates.fits[head.node_id], candidates.notes[head.node_id]
    if fits >= wanted:
        return None
    fix = f"set data_parallel_size_local={fits}" if fits else "leave data_parallel_size_local out"
    return candidates.refuse(
        f"The head node {head.ip} has room for {fits} of the {wanted} ranks that data_parallel_size_local puts there"
        + (f" ({note})." if note else "."),
        f"{fix}, or free {request.device} and CPU on the head node",
    )


def _too_few(candidates: Candidates, possible: int, missing: int, other: str = "") -> NoFit:
    """The refusal when the nodes have room for only ``possible`` of the ``missing`` ranks."""
    request = candidates.request
    size = len(request.existing) + possible
    fixes = [f"set data_parallel_size={size}"] if size else []
    fixes += [other] if other else []
    if any(node.total.get(request.device) for node in candidates.nodes if node.alive):
        fixes.append(f"add nodes or free {request.device} and CPU: a rank needs {show_bundles(request.bundles)}")
    else:
        fixes.append(f"add nodes with {request.device}, which no node has, or choose another device")
    return candidates.refuse(f"The nodes have room for {possible} of {missing} new ranks.", ", or ".join(fixes))


def _number(chosen: Choice, request: Request) -> Iterator[RankPlacement]:
    """Gives ``chosen`` the lowest global ranks, and on each node the lowest local ranks, that no existing rank has."""
    taken_on: dict[str, list[int]] = {}
    for placed in request.existing:
        taken_on.setdefault(placed.node_id, []).append(placed.local_rank)
    local_ranks = {nodes[0].node_id: unused(taken_on.get(nodes[0].node_id, ())) for nodes in chosen}
    ranks, bundles = request.new_ranks(), request.bundles
    for nodes in chosen:
        first = nodes[0]
        # The control bundle, if it is one of its own, comes last.
        on = [node.node_id for node in nodes] + [first.node_id] * (len(bundles) - len(nodes))
        yield RankPlacement(
            rank=next(ranks),
            local_rank=next(local_ranks[first.node_id]),
            node_id=first.node_id,
            ip=first.ip,
            bundles=bundles,
            bundle_nodes=tuple(on),
            strategy="PACK" if request.strategy == "span" else "STRICT_PACK",
        )
