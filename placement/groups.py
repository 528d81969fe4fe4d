"""Placement groups: a plan made real, all or nothing.

A group of ours is detached, pinned to its plan's nodes bundle by bundle, and marked: among its label selectors are
some that every node satisfies (``accordion/owner: !<digest>``), which Ray keeps with the group. So who made it, and for
which rank, is written in the same step that makes it; a successor finds it whatever happened in between; and a group
without the mark, one that the caller handed in, is never removed here.

Ray (2.60) keeps the names of live groups unique within the namespace of the *job*, which all Serve applications of a
cluster share. So groups are told apart by id. ``dp_rank_<n>`` is for people; an owner who finds that name taken by
another gets ``dp_rank_<n>@<owner>``.

Everything here blocks; it may be called from any thread of any process that is connected to Ray.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence

import msgspec
from ray._private import state
from ray._raylet import PlacementGroupID
from ray.core.generated.gcs_pb2 import PlacementGroupStats, PlacementGroupTableData  # type: ignore[attr-defined]
from ray.exceptions import RaySystemError
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    remove_placement_group,
)

from placement.candidates import Candidates
from placement.planner import Plan, RankPlacement
from placement.request import Placed, Request, show_bundles
from placement.snapshot import take

NODE_ID = "ray.io/node-id"
OWNER, RANK, LOCAL_RANK = "accordion/owner", "accordion/rank", "accordion/local-rank"

# Groups are ready after 2 to 40 ms; Ray offers no notice of one that becomes infeasible, so their states are polled.
FIRST_POLL_S, LAST_POLL_S = 0.002, 0.1
# Nodes report what they have free every 100 ms. One that does not must not hold us up for long.
REPORT_S = 2.0


class PlacementError(RuntimeError):
    """Groups could not be made or used. The message says what was asked, what is in the way and what to change."""


class RankGroup(msgspec.Struct, frozen=True, kw_only=True):
    """The placement group of one rank; ``id`` is Ray's, in hex. ``owned`` groups were made here, others handed in.

    ``node_id`` is where the first device bundle is, and the control bundle, which is the last of ``bundles``.
    """

    rank: int
    local_rank: int
    node_id: str
    id: str
    name: str
    bundles: int
    owned: bool = True

    @property
    def placement_group(self) -> PlacementGroup:
        return handle(self.id)

    @property
    def control_bundle(self) -> int:
        """Index of the bundle in which the engine core runs."""
        return self.bundles - 1

    @property
    def placed(self) -> Placed:
        """What the planner needs to know of this rank when others are added."""
        return Placed(self.rank, self.local_rank, self.node_id)


class GroupState(msgspec.Struct, frozen=True, kw_only=True):
    """A placement group as Ray has it.

    ``state`` is PENDING, PREPARED, CREATED, RESCHEDULING or REMOVED; ``scheduling`` says how far Ray got (INFEASIBLE:
    no node can ever hold it; NO_RESOURCES: none has room now). ``nodes`` holds each bundle's node id, empty while it
    has none, ``selectors`` its label selectors.
    """

    id: str
    name: str
    state: str
    scheduling: str
    bundles: tuple[dict[str, float], ...]
    nodes: tuple[str, ...]
    selectors: tuple[dict[str, str], ...]

    @property
    def owned(self) -> bool:
        return OWNER in self.selectors[0]

    def __str__(self) -> str:
        return f"placement group {self.id} ({self.name or 'no name'}) is {self.state}, scheduling {self.scheduling}"


def apply(plan: Plan, timeout_s: float, owner: str = "accordion") -> list[RankGroup]:
    """Makes the plan's groups and waits until all are ready. If one is not, all are removed again.

    ``owner`` names the application whose groups these are; ``find`` takes the same.

    Raises:
        PlacementError: a group is infeasible or not ready after ``timeout_s``, or ``owner`` has one for the same rank.
    """
    deadline = time.monotonic() + timeout_s
    taken = {group.rank: group.id for group in find(owner)}
    for rank in plan.ranks:
        if rank.rank in taken:
            raise PlacementError(
                f"{owner} already has placement group {taken[rank.rank]} for {rank.name}: list that rank as existing "
                "in the request, or remove the group"
            )
    made: list[RankGroup] = []
    try:
        for rank in plan.ranks:
            made.append(_make(rank, owner))
        failed = _wait_ready([group.id for group in made], deadline)
    except BaseException:
        remove_all(group.id for group in made)
        raise
    if failed is not None:
        remove_all(group.id for group in made)
        raise PlacementError(_explain(plan, failed, timeout_s))
    expected = {
        (node_id, group.id) for group, rank in zip(made, plan.ranks, strict=True) for node_id in rank.bundle_nodes
    }
    _wait_for_reports(lambda reported: expected <= reported)
    return made


def adopt(handed: Sequence[tuple[PlacementGroup, int]], request: Request, timeout_s: float) -> list[RankGroup]:
    """Uses the caller's groups, each with its local rank, for the ranks that ``request`` adds to its existing ones.

    They get the lowest unused global ranks in the order given.

    Raises:
        PlacementError: their number, a bundle, a node or a state is not what the request needs.
    """
    missing = request.data_parallel_size - len(request.existing)
    if len(handed) != missing:
        raise PlacementError(
            f"{len(handed)} placement groups were handed in for {missing} new ranks ({request}): hand in one for each "
            "rank, or change data_parallel_size"
        )
    ids = [group.id.hex() for group, _ in handed]
    if len(set(ids)) < len(ids):
        raise PlacementError(f"a placement group was handed in twice ({', '.join(ids)}): hand in one for each rank")
    failed = _wait_ready(ids, time.monotonic() + timeout_s)
    if failed is not None:
        raise PlacementError(f"{failed}: hand in groups that are CREATED, or that are within {timeout_s:g} s")
    adopted = []
    local_ranks = {(placed.node_id, placed.local_rank) for placed in request.existing}
    for (_, local_rank), group_state, rank in zip(handed, describe(ids), request.new_ranks(), strict=False):
        if problem := _misshapen(group_state, request):
            raise PlacementError(f"placement group {group_state.id} can't hold dp_rank_{rank}: {problem}")
        node_id = group_state.nodes[0]
        if (node_id, local_rank) in local_ranks:
            raise PlacementError(
                f"local rank {local_rank} of placement group {group_state.id} is taken on node {node_id}: give each "
                "rank of a node its own"
            )
        local_ranks.add((node_id, local_rank))
        adopted.append(
            RankGroup(
                rank=rank,
                local_rank=local_rank,
                node_id=node_id,
                id=group_state.id,
                name=group_state.name,
                bundles=len(group_state.bundles),
                owned=False,
            )
        )
    return adopted


def find(owner: str) -> list[RankGroup]:
    """The live groups that ``apply`` made for ``owner``, by rank, whatever process made them."""
    mark = _mark(owner)
    table = state.state._connect_and_get_accessor().get_placement_group_table()
    found = []
    for group in map(_read, table):
        selector = group.selectors[0]
        if group.state != "REMOVED" and selector.get(OWNER) == mark:
            found.append(
                RankGroup(
                    rank=int(selector[RANK].lstrip("!")),
                    local_rank=int(selector[LOCAL_RANK].lstrip("!")),
                    node_id=selector[NODE_ID],
                    id=group.id,
                    name=group.name,
                    bundles=len(group.bundles),
                )
            )
    return sorted(found, key=lambda group: group.rank)


def describe(ids: Iterable[str]) -> list[GroupState]:
    """The states of groups; those Ray does not know, or no longer, are left out."""
    accessor = state.state._connect_and_get_accessor()
    records = (accessor.get_placement_group_info(PlacementGroupID.from_hex(group_id)) for group_id in ids)
    return [_read(record) for record in records if record is not None]


def remove_all(ids: Iterable[str]) -> None:
    """Removes the groups that are ours and still there, and waits until their nodes report the resources free.

    Ray ends whatever runs in them. A group that was handed in stays. A process inside one of the groups removes that
    one last.
    """
    live = [group.id for group in describe(ids) if group.owned and group.state != "REMOVED"]
    if not live:
        return
    own = get_current_placement_group()
    live.sort(key=lambda group_id: own is not None and group_id == own.id.hex())
    for group_id in live:
        remove_placement_group(handle(group_id))
    _wait_for_reports(lambda reported: {group_id for _, group_id in reported}.isdisjoint(live))


def handle(group_id: str) -> PlacementGroup:
    """Ray's object for the group with this id (hex)."""
    """Ray's handle of the group with this id (hex)."""
    return PlacementGroup(PlacementGroupID.from_hex(group_id))


def _make(rank: RankPlacement, owner: str) -> RankGroup:
    mark = {OWNER: _mark(owner), RANK: f"!{rank.rank}", LOCAL_RANK: f"!{rank.local_rank}"}
    names = (rank.name, f"{rank.name}@{owner}")
    for name in names:
        try:
            group = placement_group(
                list(rank.bundles),
                strategy=rank.strategy,
                name=name,
                lifetime="detached",
                bundle_label_selector=[{NODE_ID: node_id} | mark for node_id in rank.bundle_nodes],
            )
        except RaySystemError as error:
            if "already exists" not in str(error):
                raise
            continue
        return RankGroup(
            rank=rank.rank,
            local_rank=rank.local_rank,
            node_id=rank.node_id,
            id=group.id.hex(),
            name=name,
            bundles=len(rank.bundles),
        )
    raise PlacementError(f"the names {' and '.join(names)} are taken by live placement groups: choose another owner")


def _wait_ready(ids: Sequence[str], deadline: float) -> str | None:
    """Waits until all groups are CREATED; if that can't be, or is not before ``deadline``, says which one is how."""
    pending, pause = list(ids), FIRST_POLL_S
    while True:
        states = describe(pending)
        if gone := set(pending) - {group.id for group in states if group.state != "REMOVED"}:
            return f"placement group {min(gone)} does not exist, or was removed"
        late = [group for group in states if group.state != "CREATED"]
        pending = [group.id for group in late]
        infeasible = [group for group in late if group.scheduling == "INFEASIBLE"]
        if infeasible or (late and time.monotonic() >= deadline):
            return str((infeasible or late)[0])
        if not late:
            return None
        time.sleep(pause)
        pause = min(2 * pause, LAST_POLL_S)


def _wait_for_reports(satisfied: Callable[[set[tuple[str, str]]], bool]) -> None:
    """Waits, REPORT_S at most, until the (node id, group id) pairs in the nodes' reports satisfy a condition."""
    deadline, prefix = time.monotonic() + REPORT_S, "bundle_group_"
    while time.monotonic() < deadline:
        reports = state.available_resources_per_node()
        if satisfied(
            {
                (node, key.removeprefix(prefix))
                for node, free in reports.items()
                for key in free
                if key.startswith(prefix)
            }
        ):
            return
        time.sleep(LAST_POLL_S / 4)


def _explain(plan: Plan, failed: str, timeout_s: float) -> str:
    nodes = {node_id for rank in plan.ranks for node_id in rank.bundle_nodes}
    refusal = Candidates(take(), plan.request).refuse(
        f"{failed}; it had {timeout_s:g} s. All {len(plan.ranks)} groups of this plan were removed again.",
        "plan again on a fresh snapshot, since nodes changed or something else took their room, or wait longer",
    )
    planned = tuple(room for room in refusal.rooms if room.node.node_id in nodes)
    return str(msgspec.structs.replace(refusal, rooms=planned))


def _misshapen(group: GroupState, request: Request) -> str:
    """What keeps a CREATED group from holding a rank of ``request``; empty when nothing does."""
    needed = request.bundles
    if len(group.bundles) != len(needed) or any(
        has.get(name, 0.0) < value
        for has, needs in zip(group.bundles, needed, strict=True)
        for name, value in needs.items()
    ):
        return f"its bundles are {show_bundles(group.bundles)}; make it with {show_bundles(needed)}, in that order"
    if group.nodes[-1] != group.nodes[0]:
        return "its last bundle, the control bundle, is not on the node of the first device; pin both to one node"
    if request.strategy != "span" and len(set(group.nodes)) > 1:
        return "its bundles are on several nodes; make it STRICT_PACK, or set strategy='span'"
    return ""


def _read(record: bytes) -> GroupState:
    # ``ray.util.placement_group_table`` leaves out the label selectors, hence the message itself.
    group = PlacementGroupTableData.FromString(record)
    return GroupState(
        id=group.placement_group_id.hex(),
        name=group.name,
        state=PlacementGroupTableData.PlacementGroupState.Name(group.state),
        scheduling=PlacementGroupStats.SchedulingState.Name(group.stats.scheduling_state),
        bundles=tuple(dict(bundle.unit_resources) for bundle in group.bundles),
        nodes=tuple(bundle.node_id.hex() for bundle in group.bundles),
        selectors=tuple(dict(bundle.label_selector) for bundle in group.bundles),
    )


def _mark(owner: str) -> str:
    """An owner as a selector value: label values allow few characters, names of applications any."""
    return "!" + hashlib.blake2b(owner.encode(), digest_size=16).hexdigest()
