"""The planner, without Ray: properties over random clusters, and the refusals a user reads."""

from __future__ import annotations

import random
from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.planner import NoFit, Placed, Plan, Request, choose_leaving, plan
from placement.snapshot import Node, Snapshot, from_json


def node(
    name: str,
    gpus: float = 0,
    cpus: float = 16,
    free_gpus: float | None = None,
    free_cpus: float | None = None,
    **fields: object,
) -> Node:
    free = {"GPU": gpus if free_gpus is None else free_gpus, "CPU": cpus if free_cpus is None else free_cpus}
    return Node(node_id=name, ip=f"10.0.0.{name}", total={"GPU": gpus, "CPU": cpus}, free=free, **fields)  # type: ignore[arg-type]


def placed(answer: Plan | NoFit) -> Plan:
    assert isinstance(answer, Plan), str(answer)
    return answer


def refused(answer: Plan | NoFit) -> NoFit:
    assert isinstance(answer, NoFit), str(answer)
    return answer


def ranks_on(answer: Plan) -> dict[str, int]:
    return dict(Counter(rank.node_id for rank in answer.ranks))


@st.composite
def clusters(draw: st.DrawFn) -> Snapshot:
    """Up to six nodes, often alike and mostly free, some of them dead, draining or without devices."""
    shape = st.tuples(st.sampled_from([8, 8, 4, 4, 2, 0]), st.sampled_from([32, 16, 2]))
    usual = draw(shape)
    nodes = []
    for index in range(draw(st.sampled_from([6, 5, 4, 3, 5, 4, 3, 2, 1, 0]))):
        gpus, cpus = usual if draw(st.integers(0, 4)) else draw(shape)
        total = {"GPU": float(gpus), "CPU": float(cpus)}
        part = st.sampled_from([1.0] * 12 + [0.75, 0.5, 0.0])
        alive, draining = draw(st.sampled_from([(True, False)] * 8 + [(False, False), (True, True)]))
        nodes.append(
            Node(
                node_id=f"{index:02x}",
                ip=f"10.0.0.{draw(st.integers(1, 4))}",
                total=total,
                free={name: value * draw(part) for name, value in total.items()},
                head=index == 0,
                labels=draw(st.sampled_from([{}, {"rack": "a"}, {"rack": "b"}])),
                alive=alive,
                draining=draining,
            )
        )
    return Snapshot(tuple(draw(st.permutations(nodes))))


@st.composite
def existing_ranks(draw: st.DrawFn, snapshot: Snapshot) -> tuple[Placed, ...]:
    """Ranks as they may be left after others were removed; their nodes may be gone."""
    if draw(st.booleans()):
        return ()
    names = [node.node_id for node in snapshot.nodes] or ["gone"]
    places = draw(st.lists(st.tuples(st.sampled_from(names), st.integers(0, 3)), unique=True, max_size=4))
    numbers = draw(st.lists(st.integers(0, 8), unique=True, min_size=len(places), max_size=len(places)))
    return tuple(Placed(rank, local, node_id) for rank, (node_id, local) in zip(numbers, places, strict=True))


@st.composite
def requests(draw: st.DrawFn, snapshot: Snapshot) -> Request:
    strategy = draw(st.sampled_from(["strict", "fill", "span"]))
    existing = draw(existing_ranks(snapshot))
    local = {
        "strict": st.integers(1, 3),
        "fill": st.one_of(st.none(), st.integers(0, 4)),
        "span": st.sampled_from([None, None, 0, 1]),
    }
    data_parallel_size_local = draw(local[strategy])
    size = len(existing) + draw(st.integers(0 if existing else 1, 5))
    if strategy == "strict" and draw(st.booleans()):
        assert data_parallel_size_local is not None
        size = -(-size // data_parallel_size_local) * data_parallel_size_local
    device = draw(st.sampled_from(["GPU", "CPU"]))
    return Request(
        data_parallel_size=size,
        data_parallel_size_local=data_parallel_size_local,
        world_size=draw(st.sampled_from([8, 4, 2, 15, 3]) if strategy == "span" else st.integers(1, 3)),
        device=device,
        devices_per_bundle=1 if device == "GPU" else draw(st.integers(1, 3)),
        strategy=strategy,
        nodes=draw(st.sampled_from([None] * 8 + [("rack=a",), ("10.0.0.1", "01"), ()])),
        existing=existing,
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Snapshot, Request]:
    snapshot = draw(clusters())
    return snapshot, draw(requests(snapshot))


@given(cases())
def test_no_node_is_given_more_than_it_has_free(case: tuple[Snapshot, Request]) -> None:
    snapshot, request = case
    answer = plan(snapshot, request)
    if isinstance(answer, NoFit):
        return
    free = {node.node_id: dict(node.free) for node in snapshot.nodes}
    for rank in answer.ranks:
        for node_id, bundle in zip(rank.bundle_nodes, rank.bundles, strict=True):
            for name, value in bundle.items():
                free[node_id][name] -= value
    assert all(value >= 0 for left in free.values() for value in left.values())


@given(cases())
def test_ranks_are_numbered_without_gaps_and_local_ranks_never_collide(case: tuple[Snapshot, Request]) -> None:
    snapshot, request = case
    answer = plan(snapshot, request)
    if isinstance(answer, NoFit):
        return
    assert len(answer.ranks) + len(request.existing) == request.data_parallel_size
    old = [placed.rank for placed in request.existing]
    new = [rank.rank for rank in answer.ranks]
    assert new == sorted(new)
    assert not set(new) & set(old)
    # What is below the highest new rank is all in use: new ranks fill gaps before they extend the range.
    if new:
        assert set(range(new[-1] + 1)) <= set(new) | set(old)
    if not old:
        assert new == list(range(request.data_parallel_size))
    everywhere = [(p.node_id, p.local_rank) for p in request.existing] + [
        (r.node_id, r.local_rank) for r in answer.ranks
    ]
    assert len(set(everywhere)) == len(everywhere)
    if not old:
        for node_id, number in ranks_on(answer).items():
            assert [r.local_rank for r in answer.ranks if r.node_id == node_id] == list(range(number))


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_nodes_in_the_snapshot_plays_no_part(case: tuple[Snapshot, Request], rng: random.Random) -> None:
    snapshot, request = case
    shuffled = list(snapshot.nodes)
    rng.shuffle(shuffled)
    assert plan(Snapshot(tuple(shuffled)), request) == plan(snapshot, request)


@given(cases())
def test_only_live_allowed_nodes_with_the_device_are_used(case: tuple[Snapshot, Request]) -> None:
    snapshot, request = case
    answer = plan(snapshot, request)
    if isinstance(answer, NoFit):
        return
    by_id = {node.node_id: node for node in snapshot.nodes}
    for node_id in {node_id for rank in answer.ranks for node_id in rank.bundle_nodes}:
        used = by_id[node_id]
        assert used.alive and not used.draining and used.total[request.device] > 0
        if request.nodes is not None:
            names = {used.node_id, used.ip} | {f"{k}={v}" for k, v in used.labels.items()}
            assert names & set(request.nodes)


@given(cases())
def test_each_strategy_keeps_its_promise(case: tuple[Snapshot, Request]) -> None:
    snapshot, request = case
    answer = plan(snapshot, request)
    if isinstance(answer, NoFit):
        return
    local = request.data_parallel_size_local
    head = next((node.node_id for node in snapshot.nodes if node.head), None)
    total = Counter(ranks_on(answer)) + Counter(placed.node_id for placed in request.existing)
    for rank in answer.ranks:
        device_nodes = rank.bundle_nodes[: request.world_size]
        assert rank.bundle_nodes[-1] == rank.node_id == device_nodes[0]
        if request.strategy == "span":
            assert rank.strategy == "PACK"
            assert len(set(Counter(device_nodes).values())) == 1
        else:
            assert rank.strategy == "STRICT_PACK"
            assert set(rank.bundle_nodes) == {rank.node_id}
    if not answer.ranks:
        return
    if request.strategy == "strict":
        assert set(total.values()) == {local}
    elif local is not None and not request.existing:
        assert total.get(head, 0) == min(local, request.data_parallel_size)
    elif local is not None and head in ranks_on(answer):
        assert total[head] <= local


@given(cases())
def test_a_refusal_explains_itself(case: tuple[Snapshot, Request]) -> None:
    snapshot, request = case
    answer = plan(snapshot, request)
    if isinstance(answer, Plan):
        return
    text = str(answer)
    assert answer.reason.endswith(".") and answer.fix
    assert str(request.data_parallel_size) in answer.asked and request.strategy in answer.asked
    assert {room.node.node_id for room in answer.rooms} == {node.node_id for node in snapshot.nodes}
    for room in answer.rooms:
        row = next(line for line in text.splitlines() if line.startswith(f"{room.node.node_id} "))
        assert f"{room.node.free['GPU']:g} of {room.node.total['GPU']:g}" in row
        assert room.note in row


@given(cases())
def test_fill_refuses_only_what_does_not_fit(case: tuple[Snapshot, Request]) -> None:
    """A refusal for lack of room names the largest size that fits, and that size is placed."""
    snapshot, request = case
    answer = plan(snapshot, request)
    if isinstance(answer, Plan) or not answer.reason.startswith("The nodes have room for "):
        return
    possible = int(answer.reason.split()[5])
    assert possible < request.data_parallel_size - len(request.existing)
    smaller = len(request.existing) + possible
    if smaller and request.strategy != "strict":
        fitting = plan(snapshot, request.with_size(smaller, request.existing))
        if isinstance(fitting, NoFit):  # fewer ranks may be asked of the head than the head has room for
            assert "head" in fitting.reason
        else:
            assert len(fitting.ranks) == possible


@given(cases())
def test_plans_and_refusals_survive_json(case: tuple[Snapshot, Request]) -> None:
    snapshot, request = case
    assert from_json(msgspec.json.encode(snapshot)) == snapshot
    answer = plan(snapshot, request)
    assert msgspec.json.decode(msgspec.json.encode(answer), type=type(answer)) == answer
    assert msgspec.convert(msgspec.to_builtins(request), Request) == request


def test_head_comes_first_then_the_freest_then_the_lowest_id() -> None:
    snapshot = Snapshot((node("3", gpus=4), node("2", gpus=4), node("4", gpus=8), node("1", gpus=1, head=True)))
    answer = placed(plan(snapshot, Request(data_parallel_size=14)))
    assert list(dict.fromkeys(rank.node_id for rank in answer.ranks)) == ["1", "4", "2", "3"]


def test_a_rank_with_one_device_has_one_bundle_and_others_a_control_bundle_beside_the_first_device() -> None:
    assert Request(data_parallel_size=1).bundles == ({"CPU": 1, "GPU": 1},)
    assert Request(data_parallel_size=1, device="CPU", devices_per_bundle=3).bundles == ({"CPU": 3},)
    assert Request(data_parallel_size=1, world_size=2).bundles == ({"GPU": 1}, {"GPU": 1}, {"CPU": 1})


def test_two_raylets_on_one_ip_are_two_nodes() -> None:
    pair = tuple(msgspec.structs.replace(node(name, gpus=2), ip="10.0.0.9") for name in ("a", "b"))
    answer = placed(plan(Snapshot(pair), Request(data_parallel_size=4, nodes=("10.0.0.9",))))
    assert ranks_on(answer) == {"a": 2, "b": 2}
    assert [rank.local_rank for rank in answer.ranks] == [0, 1, 0, 1]


def test_ranks_on_the_head_are_checked_before_the_rest() -> None:
    snapshot = Snapshot((node("1", gpus=2, head=True), node("2", gpus=8)))
    answer = placed(plan(snapshot, Request(data_parallel_size=4, data_parallel_size_local=1)))
    assert ranks_on(answer) == {"1": 1, "2": 3}
    refusal = refused(plan(snapshot, Request(data_parallel_size=4, data_parallel_size_local=3)))
    assert "head node 10.0.0.1 has room for 2 of the 3 ranks" in refusal.reason
    assert "data_parallel_size_local=2" in refusal.fix
    assert ranks_on(placed(plan(snapshot, Request(data_parallel_size=4, data_parallel_size_local=0)))) == {"2": 4}


def test_strict_passes_over_a_head_without_the_device() -> None:
    snapshot = Snapshot((node("1", head=True), node("2", gpus=3), node("3", gpus=2), node("4", gpus=1)))
    request = Request(data_parallel_size=4, data_parallel_size_local=2, strategy="strict")
    assert ranks_on(placed(plan(snapshot, request))) == {"2": 2, "3": 2}
    assert "not a multiple" in refused(plan(snapshot, request.with_size(5))).reason
    refusal = refused(plan(snapshot, request.with_size(6)))
    assert "room for 4 of 6" in refusal.reason and "data_parallel_size=4" in refusal.fix


def test_strict_completes_a_node_before_it_uses_another() -> None:
    snapshot = Snapshot((node("1", gpus=2, free_gpus=1), node("2", gpus=2)))
    request = Request(
        data_parallel_size=4, data_parallel_size_local=2, strategy="strict", existing=(Placed(2, 1, "1"),)
    )
    answer = placed(plan(snapshot, request))
    assert [(r.rank, r.node_id, r.local_rank) for r in answer.ranks] == [(0, "1", 0), (1, "2", 0), (3, "2", 1)]


def test_span_takes_whole_nodes_that_are_alike() -> None:
    four = [node(name, gpus=4) for name in ("2", "3", "4", "5")]
    snapshot = Snapshot((node("1", head=True), *four, node("6", gpus=4, free_gpus=3)))
    request = Request(data_parallel_size=2, world_size=8, strategy="span")
    first, second = placed(plan(snapshot, request)).ranks
    assert first.bundle_nodes == ("2",) * 4 + ("3",) * 4 + ("2",)
    assert second.bundle_nodes == ("4",) * 4 + ("5",) * 4 + ("4",)
    assert "room for 2 of 3" in refused(plan(snapshot, request.with_size(3))).reason
    assert "nodes alike" in refused(plan(Snapshot((*four, node("9", gpus=8))), request)).reason
    odd = Request(data_parallel_size=1, world_size=6, strategy="span")
    assert "world_size=6 is not a multiple of the 4" in refused(plan(snapshot, odd)).reason


def test_a_refusal_names_allowed_nodes_that_do_not_exist() -> None:
    snapshot = Snapshot((node("1", gpus=2, labels={"rack": "a"}), node("2", gpus=2)))
    refusal = refused(plan(snapshot, Request(data_parallel_size=3, nodes=("rack=a", "10.9.9.9"))))
    assert "10.9.9.9" in refusal.fix and "rack=a" not in refusal.fix
    assert [(room.node.node_id, room.fits, room.note) for room in refusal.rooms] == [
        ("1", 2, ""),
        ("2", 0, "not in nodes"),
    ]


def test_a_refusal_says_when_no_node_has_the_device() -> None:
    refusal = refused(plan(Snapshot((node("1", head=True),)), Request(data_parallel_size=1)))
    assert "GPU, which no node has" in refusal.fix
    assert "no nodes" in str(refused(plan(Snapshot(()), Request(data_parallel_size=1))))


def test_ten_thousand_nodes() -> None:
    nodes = [
        node(f"{index:05d}", gpus=8, free_gpus=index % 9, labels={"rack": str(index % 100)}) for index in range(10_000)
    ]
    request = Request(data_parallel_size=4096, world_size=4, nodes=tuple(f"rack={rack}" for rack in range(90)))
    answer = placed(plan(Snapshot(tuple(nodes)), request))
    assert len(answer.ranks) == 4096
    refusal = refused(plan(Snapshot(tuple(nodes)), request.with_size(100_000)))
    assert len(refusal.rooms) == 10_000
    assert "... and 9976 more" in str(refusal)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"data_parallel_size": 0}, "data_parallel_size=0"),
        ({"device": "TPU"}, "device='TPU'"),
        ({"strategy": "pack"}, "strategy='pack'"),
        ({"strategy": "strict"}, "data_parallel_size_local=None"),
        ({"strategy": "span"}, "world_size=1"),
        ({"devices_per_bundle": 2}, "devices_per_bundle=2"),
        ({"existing": (Placed(0, 0, "a"), Placed(0, 1, "a"))}, "same rank"),
        ({"existing": (Placed(0, 0, "a"), Placed(1, 0, "a"))}, "same local rank"),
    ],
)
def test_impossible_requests_are_refused_by_name(fields: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Request(**({"data_parallel_size": 2} | fields))  # type: ignore[arg-type]


def test_more_existing_ranks_than_wanted_is_no_plan() -> None:
    existing = (Placed(0, 0, "1"), Placed(1, 1, "1"))
    with pytest.raises(ValueError, match="2 existing ranks"):
        plan(Snapshot(()), Request(data_parallel_size=1, existing=existing))
    assert placed(plan(Snapshot(()), Request(data_parallel_size=2, existing=existing))).ranks == ()


@given(st.sets(st.integers(0, 40), min_size=1), st.data())
def test_the_named_ranks_leave_and_then_the_highest(ranks: set[int], data: st.DataObject) -> None:
    existing = [Placed(rank, index, "n") for index, rank in enumerate(ranks)]
    size = data.draw(st.integers(1, len(ranks)))
    named = data.draw(st.sets(st.sampled_from(sorted(ranks)), max_size=len(ranks) - size))
    leaving = choose_leaving(existing, size, named)
    assert len(leaving) == len(ranks) - size and named <= set(leaving)
    others = set(leaving) - named
    stay = ranks - set(leaving)
    assert not others or not stay or min(others) > max(stay)


def test_ranks_that_can_not_leave_are_refused() -> None:
    existing = [Placed(rank, rank, "n") for rank in range(3)]
    with pytest.raises(ValueError, match=r"\[7\] do not exist"):
        choose_leaving(existing, 2, [7])
    with pytest.raises(ValueError, match="data_parallel_size=1"):
        choose_leaving(existing, 2, [0, 1])
    with pytest.raises(ValueError, match="choose 1 to 3"):
        choose_leaving(existing, 4)
