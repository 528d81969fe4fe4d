"""Placement groups on a real cluster of several raylets on one machine; its GPUs exist for Ray only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import ray
from cluster import TestCluster, running_cluster
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from placement import groups, snapshot
from placement.groups import PlacementError, RankGroup
from placement.planner import NoFit, Plan, Request, choose_leaving, plan

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

WAIT_S = 20.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    """A head without GPUs, and three nodes with two each, two of which share an IP."""
    with running_cluster(
        {"ip": "127.0.0.2", "cpus": 4},
        {"ip": "127.0.0.3", "cpus": 4, "gpus": 2, "labels": {"rack": "a"}},
        {"ip": "127.0.0.3", "cpus": 4, "gpus": 2, "labels": {"rack": "b"}},
        {"ip": "127.0.0.4", "cpus": 8, "gpus": 2, "labels": {"rack": "b"}},
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(cluster: TestCluster) -> Iterator[None]:
    """Every test starts on an empty cluster and must leave none of its groups behind."""
    assert live_groups() == []
    yield
    left = live_groups()
    for group_id in left:
        remove_placement_group(groups.handle(group_id))
    assert left == []


def live_groups() -> list[str]:
    table = ray.util.placement_group_table()
    return [group_id for group_id, group in table.items() if group["state"] != "REMOVED"]


def planned(request: Request) -> Plan:
    answer = plan(snapshot.take(), request)
    assert isinstance(answer, Plan), str(answer)
    return answer


@ray.remote
class Probe:
    def where(self) -> tuple[str, str, str]:
        return (
            ray.get_runtime_context().get_node_id(),
            ray.util.get_node_ip_address(),
            os.environ["CUDA_VISIBLE_DEVICES"],
        )

    def hold(self) -> None:
        pass


def probe(group: RankGroup) -> ray.actor.ActorHandle:
    strategy = PlacementGroupSchedulingStrategy(group.placement_group, group.control_bundle)
    return Probe.options(num_cpus=1, num_gpus=1, scheduling_strategy=strategy).remote()


def test_a_snapshot_shows_nodes_and_what_is_free(cluster: TestCluster) -> None:
    nodes = {node.node_id: node for node in snapshot.take().nodes if node.alive}
    assert set(nodes) == set(cluster.nodes)
    head, first, second, third = (nodes[node_id] for node_id in cluster.nodes)
    assert head.head and not first.head
    assert (head.total.get("GPU", 0), head.total["CPU"], third.total["CPU"]) == (0, 4, 8)
    assert first.ip == second.ip == "127.0.0.3" and third.ip == "127.0.0.4"
    assert first.labels["rack"] == "a" and first.free == {"CPU": 4, "GPU": 2}


def test_actors_run_where_the_plan_says(cluster: TestCluster) -> None:
    made = groups.apply(planned(Request(data_parallel_size=5)), WAIT_S, "app")
    assert [group.name for group in made] == [f"dp_rank_{rank}" for rank in range(5)]
    actors = [probe(group) for group in made]
    answers = ray.get([actor.where.remote() for actor in actors])
    assert [node_id for node_id, _, _ in answers] == [group.node_id for group in made]
    assert len({group.node_id for group in made}) == 3
    # Ray gives the ranks of one node different GPUs.
    assert len({(node_id, gpu) for node_id, _, gpu in answers}) == 5
    assert {ip for _, ip, _ in answers} == {"127.0.0.3", "127.0.0.4"}
    states = groups.describe(group.id for group in made)
    assert [(state.state, state.bundles) for state in states] == [("CREATED", ({"CPU": 1, "GPU": 1},))] * 5
    groups.remove_all(group.id for group in made)
    groups.remove_all(group.id for group in made)


def test_a_snapshot_after_apply_and_after_remove_is_up_to_date(cluster: TestCluster) -> None:
    """So that a plan made at once neither counts on room that is gone nor misses room that is back."""
    for _ in range(3):
        made = groups.apply(planned(Request(data_parallel_size=6)), WAIT_S)
        assert sum(node.free.get("GPU", 0) for node in snapshot.take().nodes) == 0
        groups.remove_all(group.id for group in made)
        assert sum(node.free.get("GPU", 0) for node in snapshot.take().nodes) == 6


def test_a_rank_of_several_devices_has_its_control_bundle_beside_the_first(cluster: TestCluster) -> None:
    (group,) = groups.apply(planned(Request(data_parallel_size=1, world_size=2)), WAIT_S)
    (state,) = groups.describe([group.id])
    assert state.bundles == ({"GPU": 1}, {"GPU": 1}, {"CPU": 1})
    assert set(state.nodes) == {group.node_id}
    assert group.control_bundle == 2
    groups.remove_all([group.id])


def test_a_rank_that_spans_nodes(cluster: TestCluster) -> None:
    (group,) = groups.apply(planned(Request(data_parallel_size=1, world_size=4, strategy="span")), WAIT_S)
    (state,) = groups.describe([group.id])
    assert len(set(state.nodes)) == 2
    assert state.nodes[0] == state.nodes[1] == state.nodes[4] == group.node_id
    groups.remove_all([group.id])


def test_a_refused_plan_makes_nothing(cluster: TestCluster) -> None:
    answer = plan(snapshot.take(), Request(data_parallel_size=7))
    assert isinstance(answer, NoFit)
    assert "room for 6 of 7" in answer.reason
    assert live_groups() == []


def test_a_plan_whose_room_is_taken_rolls_back_and_says_why(cluster: TestCluster) -> None:
    late = planned(Request(data_parallel_size=4, nodes=("rack=b",)))
    squatter = placement_group([{"GPU": 2}], strategy="STRICT_PACK", bundle_label_selector=[{"rack": "b"}])
    assert squatter.wait(WAIT_S)
    with pytest.raises(PlacementError) as error:
        groups.apply(late, 0.3)
    assert live_groups() == [squatter.id.hex()]
    text = str(error.value)
    assert "NO_RESOURCES" in text and "All 4 groups of this plan were removed again" in text
    assert "4 ranks of {GPU: 1, CPU: 1}" in text and "0 of 2" in text and "2 of 2" in text
    remove_placement_group(squatter)


def test_a_node_that_leaves_takes_its_group_and_plans_for_it_fail_at_once(cluster: TestCluster) -> None:
    leaver = cluster.add(ip="127.0.0.5", cpus=4, gpus=4, labels={"rack": "c"})
    request = Request(data_parallel_size=1, nodes=("rack=c", "rack=a"))
    made = groups.apply(planned(request), WAIT_S)
    stale = planned(request.with_size(3, [group.placed for group in made]))
    assert {rank.node_id for rank in stale.ranks} == {leaver} == {group.node_id for group in made}
    cluster.remove(leaver)
    with pytest.raises(PlacementError, match="INFEASIBLE"):
        groups.apply(stale, timeout_s=3600)
    assert [(state.state, state.nodes) for state in groups.describe([made[0].id])] == [("RESCHEDULING", ("",))]
    assert groups.find("accordion") == made
    groups.remove_all(group.id for group in made)


def test_ranks_are_added_and_removed_beside_running_ones(cluster: TestCluster) -> None:
    request = Request(data_parallel_size=2)
    old = groups.apply(planned(request), WAIT_S)
    actors = [probe(group) for group in old]
    before = ray.get([actor.where.remote() for actor in actors])

    larger = planned(request.with_size(4, [group.placed for group in old]))
    added = groups.apply(larger, WAIT_S)
    assert [group.rank for group in added] == [2, 3]
    everything = old + added
    assert len({(group.node_id, group.local_rank) for group in everything}) == 4
    assert groups.find("accordion") == everything

    leaving = choose_leaving([group.placed for group in everything], 3)
    assert leaving == (3,)
    groups.remove_all(group.id for group in everything if group.rank in leaving)
    assert groups.find("accordion") == everything[:3]
    # The first two ranks saw nothing of it.
    assert ray.get([actor.where.remote() for actor in actors]) == before

    leaving = choose_leaving([group.placed for group in everything[:3]], 2, named=[1])
    groups.remove_all(group.id for group in everything if group.rank in leaving)
    (again,) = groups.apply(planned(request.with_size(3, [everything[0].placed, everything[2].placed])), WAIT_S)
    assert again.rank == 1
    groups.remove_all(group.id for group in groups.find("accordion"))


def test_two_owners_on_one_cluster_have_the_same_ranks_side_by_side(cluster: TestCluster) -> None:
    """Serve applications share a Ray namespace, in which Ray allows a name once."""
    request = Request(data_parallel_size=2)
    one = groups.apply(planned(request), WAIT_S, "one")
    other = groups.apply(planned(request), WAIT_S, "the other (v2)")
    assert [group.name for group in other] == ["dp_rank_0@the other (v2)", "dp_rank_1@the other (v2)"]
    assert groups.find("one") == one
    assert groups.find("the other (v2)") == other
    with pytest.raises(PlacementError, match="already has placement group"):
        groups.apply(planned(request), WAIT_S, "one")
    groups.remove_all(group.id for group in one)
    assert groups.find("the other (v2)") == other
    groups.remove_all(group.id for group in other)


def test_groups_are_found_and_removed_by_another_process(cluster: TestCluster) -> None:
    """The process that made them may be gone; a rank may remove its own group with the rest."""
    made = groups.apply(planned(Request(data_parallel_size=3)), WAIT_S, "app")

    @ray.remote
    class Successor:
        def found(self) -> list[RankGroup]:
            return groups.find("app")

        def remove(self, ids: list[str]) -> None:
            groups.remove_all(ids)

    inside = PlacementGroupSchedulingStrategy(made[0].placement_group, 0)
    successor = Successor.options(num_cpus=1, scheduling_strategy=inside, namespace="elsewhere").remote()
    assert ray.get(successor.found.remote()) == made
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(successor.remove.remote([group.id for group in made]))
    assert groups.find("app") == []


@pytest.fixture
def own_groups(cluster: TestCluster) -> Iterator[list[PlacementGroup]]:
    """Two groups that a caller made by other means, on the node with 127.0.0.4."""
    node_id = cluster.nodes[3]
    made = [
        placement_group(
            [{"GPU": 1, "CPU": 2}], strategy="STRICT_PACK", bundle_label_selector=[{"ray.io/node-id": node_id}]
        )
        for _ in range(2)
    ]
    yield made
    for group in made:
        remove_placement_group(group)


def test_groups_handed_in_are_used_and_never_removed(cluster: TestCluster, own_groups: list[PlacementGroup]) -> None:
    adopted = groups.adopt([(own_groups[0], 1), (own_groups[1], 0)], Request(data_parallel_size=2), WAIT_S)
    assert [(group.rank, group.local_rank, group.owned) for group in adopted] == [(0, 1, False), (1, 0, False)]
    assert {group.node_id for group in adopted} == {cluster.nodes[3]}
    assert ray.get(probe(adopted[1]).where.remote())[0] == cluster.nodes[3]
    groups.remove_all(group.id for group in adopted)
    assert {state.state for state in groups.describe(group.id for group in adopted)} == {"CREATED"}
    assert groups.find("accordion") == []


def test_groups_that_do_not_suit_are_refused(cluster: TestCluster, own_groups: list[PlacementGroup]) -> None:
    one, two = Request(data_parallel_size=1), Request(data_parallel_size=2)
    first, second = own_groups

    def refusal(handed: list[tuple[PlacementGroup, int]], request: Request, wait_s: float = WAIT_S) -> str:
        with pytest.raises(PlacementError) as error:
            groups.adopt(handed, request, wait_s)
        return str(error.value)

    assert "1 placement groups were handed in for 2" in refusal([(first, 0)], two)
    assert "handed in twice" in refusal([(first, 0), (first, 1)], two)
    assert "local rank 0" in refusal([(first, 0), (second, 0)], two)
    text = refusal([(first, 0)], Request(data_parallel_size=1, world_size=2))
    assert "its bundles are {GPU: 1, CPU: 2}; make it with 2 x {GPU: 1} + {CPU: 1}" in text
    pending = placement_group([{"GPU": 1, "CPU": 9}])
    assert "is PENDING" in refusal([(pending, 0)], one, 0.2)
    remove_placement_group(pending)
    assert "was removed" in refusal([(pending, 0)], one)


def test_the_plan_command_reads_the_live_cluster(cluster: TestCluster) -> None:
    command = [
        sys.executable,
        "-m",
        "app.cli",
        "plan",
        "--address",
        cluster.address,
        "--json",
        "--data-parallel-size",
        "6",
    ]
    made = groups.apply(planned(Request(data_parallel_size=1)), WAIT_S)
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    groups.remove_all(group.id for group in made)
    fitting = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (refused.returncode, fitting.returncode) == (1, 0), refused.stderr + fitting.stderr
    assert "room for 5 of 6" in json.loads(refused.stdout)["refusal"]["reason"]
    assert {rank["node_id"] for rank in json.loads(fitting.stdout)["plan"]["ranks"]} == set(cluster.nodes[1:])
