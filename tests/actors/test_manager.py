"""The manager on a real Ray cluster: starting, failing, adopting, restarting, and leaving nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import ray
import torch
from cluster import running_cluster
from ray.util import list_named_actors
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from tiny_models import build
from transformers import AutoModelForCausalLM

from actors import wire
from actors.coordinator_actor import CoordinatorOfGroup
from actors.manager import Manager
from actors.siblings import Siblings
from app.client import Client
from app.config import AppConfig
from app.errors import EngineDeadError
from app.limits import Limits
from placement import groups
from placement.planner import RankPlacement

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

PROMPT = [31, 41, 59, 26, 53, 58, 97, 93, 23, 84]
_names = itertools.count()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("mixtral", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    os.environ["ACCORDION_TEST_MARK"] = "copied"
    with running_cluster({"ip": "127.0.0.2", "cpus": 4}):
        yield


@dataclass
class Application:
    """What Serve would keep: a coordinator and a manager, each of which can be killed and made again."""

    config: AppConfig
    siblings: Siblings
    manager: Any = None
    coordinator: Any = None

    def start_coordinator(self) -> None:
        self.coordinator = CoordinatorOfGroup.options(
            name=f"{self.siblings.application}{self.siblings.coordinator_name}",
            namespace="test",
            num_cpus=0,
            lifetime="detached",
        ).remote()

    def start_manager(self) -> None:
        settings = msgspec.to_builtins(self.config.group_settings())
        # The manager's own environment is where the copied variables come from.
        self.manager = Manager.options(num_cpus=0, runtime_env={"env_vars": {"ACCORDION_TEST_MARK": "copied"}}).remote(
            settings, self.siblings
        )

    def declare(self, size: int) -> None:
        ray.get(self.manager.declare.remote(size))

    def serve(self, size: int) -> None:
        self.declare(size)
        ray.get(self.manager.contact.remote(), timeout=240)

    @property
    def status(self) -> dict[str, Any]:
        return ray.get(self.manager.status.remote())

    @property
    def engines(self) -> dict[str, Any]:
        found = {}
        for actor in list_named_actors(all_namespaces=True):
            if actor["namespace"] == self.siblings.namespace:
                with contextlib.suppress(ValueError):  # it ended since it was listed
                    found[actor["name"]] = ray.get_actor(actor["name"], namespace=actor["namespace"])
        return found

    def pids(self) -> dict[str, int]:
        return {name: ray.get(handle.hello.remote()).pid for name, handle in self.engines.items()}

    def nothing_is_left(self) -> bool:
        return not self.engines and not groups.find(self.siblings.namespace)


@contextlib.contextmanager
def application(checkpoint: Path, **settings: Any) -> Iterator[Application]:
    name = f"app{next(_names)}"
    config = AppConfig(
        model=str(checkpoint), kv_blocks=64, max_model_len=256, max_num_seqs=8, max_num_batched_tokens=64, **settings
    )
    app = Application(config, Siblings(name, f"accordion-{name}", f"::{name}::coordinator"))
    app.start_coordinator()
    app.start_manager()
    try:
        yield app
    finally:
        with contextlib.suppress(Exception):
            ray.get(app.manager.stop.remote(), timeout=60)
        ray.kill(app.manager)
        ray.kill(app.coordinator)


@asynccontextmanager
async def client_of(app: Application) -> AsyncIterator[Client]:
    keys = []

    async def locate() -> tuple[str, str]:
        contact = await app.manager.contact.remote()
        keys[:] = [contact.keys]
        return contact.router, contact.publisher

    client = Client(locate, Limits(max_model_len=256), configure=lambda socket: keys[0].client(socket))
    await client.start()
    while not client.ready:
        await asyncio.sleep(0.02)
    try:
        yield client
    finally:
        await client.close()


async def tokens(client: Client, name: str, count: int, rank: int | None = None) -> list[int]:
    sampling = wire.SamplingParams(max_tokens=count, temperature=0.0)
    return [token async for delta in client.generate(name, PROMPT, sampling, rank) for token in delta.tokens]


def reference(checkpoint: Path, count: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    return model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None)[0, len(PROMPT) :].tolist()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.1)


def test_a_group_starts_serves_and_leaves_nothing(checkpoint: Path) -> None:
    with application(checkpoint) as app:
        app.serve(2)
        assert sorted(app.engines) == ["dp_rank_0", "dp_rank_1"]
        placed = groups.find(app.siblings.namespace)
        table = [placement_group_table(group.placement_group) for group in placed]
        assert [(g["name"], g["strategy"], g["state"]) for g in table] == [
            ("dp_rank_0", "STRICT_PACK", "CREATED"),
            ("dp_rank_1", "STRICT_PACK", "CREATED"),
        ]
        for engine in app.engines.values():
            environment = Path(f"/proc/{ray.get(engine.hello.remote()).pid}/environ").read_text()
            assert "ACCORDION_TEST_MARK=copied" in environment

        async def run() -> list[list[int]]:
            async with client_of(app) as first, client_of(app) as second:
                return await asyncio.gather(tokens(first, "a", 10, rank=0), tokens(second, "b", 10, rank=1))

        assert asyncio.run(run()) == [reference(checkpoint, 10)] * 2

        # A size that can't be is refused, and disturbs nothing.
        before = app.pids()
        app.declare(0)
        assert "outside" in app.status["refused"]
        assert app.status["phase"] == "serving" and app.pids() == before

        ray.get(app.manager.stop.remote())
        assert app.nothing_is_left()
        assert not any(Path(f"/proc/{pid}").exists() and _alive(pid) for pid in before.values())
        ray.get(app.manager.stop.remote())


def _alive(pid: int) -> bool:
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_a_start_that_fails_names_the_rank_and_leaves_nothing_and_can_be_repeated(
    checkpoint: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = sorted(broken.glob("*.safetensors"))[-1]
    weights.rename(tmp_path / "aside")
    with application(broken) as app:
        app.declare(2)
        with pytest.raises(Exception, match=r"dp_rank_\d failed while loading.*safetensors"):
            ray.get(app.manager.contact.remote(), timeout=240)
        wait_for(app.nothing_is_left)
        (tmp_path / "aside").rename(weights)
        app.serve(2)
        assert app.status["cause"] == ""


def test_a_rank_that_dies_while_starting_ends_the_start(checkpoint: Path) -> None:
    with application(checkpoint) as app:
        app.declare(2)
        wait_for(lambda: "2 of 2 ranks connected" in app.status["detail"], 120)
        os.kill(app.pids()["dp_rank_1"], signal.SIGKILL)
        with pytest.raises(Exception, match=r"dp_rank_1 (ended|failed while)"):
            ray.get(app.manager.contact.remote(), timeout=120)
        wait_for(app.nothing_is_left)


def test_a_plan_that_does_not_fit_says_so_and_leaves_nothing(checkpoint: Path) -> None:
    with application(checkpoint) as app:
        app.declare(40)
        with pytest.raises(Exception, match=r"(?s)room for 4 of 40.*asked.*change"):
            ray.get(app.manager.contact.remote(), timeout=60)
        assert app.nothing_is_left()


def test_a_broken_group_is_made_anew_and_its_requests_go_on(checkpoint: Path) -> None:
    with application(checkpoint) as app:
        app.serve(2)

        async def run() -> list[list[int]]:
            async with client_of(app) as client:
                calls = [asyncio.create_task(tokens(client, f"r{i}", 200, rank=i % 2)) for i in range(4)]
                while not any(load.running for load in client.loads):
                    await asyncio.sleep(0.01)
                os.kill((await app.engines["dp_rank_1"].hello.remote()).pid, signal.SIGKILL)
                return await asyncio.wait_for(asyncio.gather(*calls), 240)

        assert asyncio.run(run()) == [reference(checkpoint, 200)] * 4
        assert app.status["epoch"] == 2


def test_a_group_given_up_ends_every_waiting_call_with_the_cause(checkpoint: Path) -> None:
    with application(checkpoint, max_restarts=0) as app:
        app.serve(2)

        async def run() -> str:
            async with client_of(app) as client:
                call = asyncio.create_task(tokens(client, "r", 240))
                while not any(load.running for load in client.loads):
                    await asyncio.sleep(0.01)
                version = (await app.manager.status.remote())["version"]
                os.kill((await app.engines["dp_rank_0"].hello.remote()).pid, signal.SIGKILL)
                news = await app.manager.watch.remote(version)
                while news["phase"] == "serving":  # other news may come first
                    news = await app.manager.watch.remote(news["version"])
                assert news["phase"] == "lost"
                await client.fail(news["cause"])
                with pytest.raises(EngineDeadError) as dead:
                    await call
                return str(dead.value)

        assert "dp_rank_0 ended" in asyncio.run(run())
        wait_for(app.nothing_is_left)


def test_a_successor_adopts_the_running_group_while_it_serves(checkpoint: Path) -> None:
    with application(checkpoint) as app:
        app.serve(2)
        before = app.pids()

        async def run() -> tuple[list[int], list[int]]:
            async with client_of(app) as client:
                call = asyncio.create_task(tokens(client, "during", 240))
                ray.kill(app.manager)
                app.start_manager()
                await app.manager.declare.remote(2)
                await app.manager.contact.remote()
                return await call, await tokens(client, "after", 10)

        during, after = asyncio.run(run())
        assert during == reference(checkpoint, 240) and after == during[:10]
        assert app.pids() == before and app.status["epoch"] == 1


def test_a_coordinator_that_is_replaced_late_is_followed(checkpoint: Path) -> None:
    """Later than a lease lasts."""
    with application(checkpoint, lease_s=3.0) as app:
        app.serve(2)
        before = app.pids()

        async def run() -> list[int]:
            async with client_of(app) as client:
                ray.kill(app.coordinator)
                await asyncio.sleep(6)
                app.start_coordinator()
                # The group is paused, and only the new coordinator can wake both ranks.
                return await asyncio.wait_for(tokens(client, "woken", 10, rank=1), 60)

        assert asyncio.run(run()) == reference(checkpoint, 10)
        assert app.pids() == before


@pytest.mark.slow  # a process of a manager takes seconds to start, which the lease must outlast
def test_a_successor_keeps_the_leases_while_there_is_no_coordinator(checkpoint: Path) -> None:
    with application(checkpoint, lease_s=30.0) as app:
        app.serve(2)
        before = app.pids()

        async def run() -> list[int]:
            async with client_of(app) as client:
                ray.kill(app.coordinator)
                ray.kill(app.manager)
                app.start_manager()
                declared = app.manager.declare.remote(2)
                await asyncio.sleep(40)
                app.start_coordinator()
                await declared
                return await asyncio.wait_for(tokens(client, "after", 10), 60)

        assert asyncio.run(run()) == reference(checkpoint, 10)
        assert app.pids() == before and app.status["epoch"] == 1


def test_without_a_manager_the_ranks_end_with_their_lease(checkpoint: Path) -> None:
    with application(checkpoint, lease_s=3.0) as app:
        app.serve(2)
        ray.kill(app.manager)
        wait_for(app.nothing_is_left, 60)


def test_groups_made_while_a_lease_runs_out_stay(checkpoint: Path) -> None:
    """They are a successor's, who found the ranks too late to keep them."""
    with application(checkpoint, lease_s=12.0) as app:
        app.serve(1)
        owner = app.siblings.namespace
        node = groups.find(owner)[0].node_id
        ray.kill(app.manager)
        time.sleep(9.5)
        place = RankPlacement(
            rank=1, local_rank=1, node_id=node, ip="127.0.0.1", bundles=({"CPU": 0.001},), bundle_nodes=(node,),
            strategy="STRICT_PACK",
        )  # fmt: skip
        new = groups._make(place, owner)
        wait_for(lambda: not app.engines, 60)
        assert [group.id for group in groups.find(owner)] == [new.id]
        groups.remove_all([new.id])


def test_groups_of_the_caller_are_used_and_kept(checkpoint: Path) -> None:
    made = [placement_group([{"CPU": 1}], strategy="STRICT_PACK", lifetime="detached") for _ in range(2)]
    handed = {group.id.hex(): local_rank for local_rank, group in enumerate(made)}
    try:
        with application(checkpoint, placement_groups=handed) as app:
            app.serve(2)
            assert groups.find(app.siblings.namespace) == []
            ray.get(app.manager.stop.remote())
            assert not app.engines
        assert {state.state for state in groups.describe(handed)} == {"CREATED"}
    finally:
        for group in made:
            remove_placement_group(group)
