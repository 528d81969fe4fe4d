"""Live transitions on a real Ray cluster, under load: up, down, rolled back out of every phase, declared, repeated."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from cluster import running_cluster
from test_manager import Application, application, client_of, reference, tokens, wait_for
from tiny_models import build

from actors import priority
from app.client import Client
from placement import groups

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

LENGTH = 60
CYCLES = 50
# Until then caches and pools fill up.
SETTLED = 20
MEMORY_MIB = 24  # allocators' noise


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("mixtral", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[int]:
    return reference(checkpoint, LENGTH)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with running_cluster({"ip": "127.0.0.2", "cpus": 4}):
        yield


@asynccontextmanager
async def load(client: Client, expected: list[int], streams: int = 3) -> AsyncIterator[list[int]]:
    """Greedy streams without a pause; every answer must be the expected one. Yields the count of those finished."""
    over = False
    finished: list[int] = [0]

    async def stream(number: int) -> None:
        turn = 0
        while not over:
            turn += 1
            assert await tokens(client, f"load{number}-{turn}-{id(finished)}", LENGTH) == expected
            finished[0] += 1

    tasks = [asyncio.create_task(stream(number)) for number in range(streams)]
    try:
        yield finished
    finally:
        over = True
        await asyncio.wait_for(asyncio.gather(*tasks), 120)


async def end_of(app: Application, operation_id: str) -> dict[str, Any]:
    while True:
        operation = await app.manager.scale_elastic_ep.remote(1, None, operation_id)
        if operation["done"]:
            return operation
        await asyncio.sleep(0.05)


async def scale(app: Application, size: int, **options: Any) -> dict[str, Any]:
    admitted = await app.manager.scale_elastic_ep.remote(size, **options)
    assert "refused" not in admitted, admitted
    return await end_of(app, admitted["id"])


async def stands_back(app: Application, rank: int) -> bool:
    """Whether any thread of a rank has the priority at which it loaded."""
    process = (await app.engines[f"dp_rank_{rank}"].hello.remote()).pid
    usual = os.getpriority(os.PRIO_PROCESS, process)
    threads = Path(f"/proc/{process}/task").iterdir()
    present = {os.getpriority(os.PRIO_PROCESS, int(thread.name)) for thread in threads}
    return min(usual + priority.STEP, priority.LOWEST) in present


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async def wait() -> None:
        while not await condition():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(wait(), 120)


async def phase(app: Application) -> str:
    operation = (await app.manager.status.remote())["operation"]
    return "done" if operation["done"] else str(operation["phase"])


def test_growing_and_shrinking_while_requests_run(checkpoint: Path, expected: list[int]) -> None:
    with application(checkpoint, expert_slots=5, min_data_parallel_size=1) as app:
        app.serve(2)

        async def run() -> None:
            async with client_of(app) as client, load(client, expected) as finished:
                for number, size in enumerate([3, 2, 4, 2], start=2):
                    operation = await scale(app, size)
                    assert operation["error"] == "" and operation["epoch"] == number, operation
                    status = await app.manager.status.remote()
                    assert [rank["rank"] for rank in status["ranks"]] == list(range(size))
                    assert sorted(app.engines) == [f"dp_rank_{rank}" for rank in range(size)]
                    assert not await stands_back(app, size - 1)
                    before = finished[0]
                    await until(lambda before=before: _more(finished, before + 2))  # type: ignore[misc]
                    assert client.epoch == number and len(client.loads) == size
                # A named rank leaves, and another takes its place.
                operation = await scale(app, 2, retire=[0], drain_timeout_s=0.0)
                assert operation["error"] == ""
                assert [rank["rank"] for rank in (await app.manager.status.remote())["ranks"]] == [1, 2]

        asyncio.run(run())


async def _more(finished: list[int], than: int) -> bool:
    return finished[0] > than


def test_one_rank_is_a_group_too_and_a_paused_group_switches(checkpoint: Path, expected: list[int]) -> None:
    with application(checkpoint) as app:
        app.serve(1)

        async def run() -> None:
            async with client_of(app) as client:
                for size in (2, 1, 2):
                    assert (await scale(app, size))["error"] == ""  # nothing runs: it wakes up for the switch
                    assert await tokens(client, f"after{size}{client.epoch}", LENGTH) == expected
                async with load(client, expected):
                    for size in (1, 2, 1):
                        assert (await scale(app, size))["error"] == ""
                        await asyncio.sleep(0.3)

        asyncio.run(run())
        assert app.status["data_parallel_size"] == 1


def test_who_asks_for_the_impossible_is_refused_and_nothing_changes(checkpoint: Path, expected: list[int]) -> None:
    with application(checkpoint, max_data_parallel_size=8) as app:
        app.serve(2)
        before = app.pids()

        async def run() -> None:
            ask = app.manager.scale_elastic_ep.remote
            for size, options, message in (
                (2, {}, "2 ranks already"),
                (9, {}, "outside 1 .. 8"),
                (2, {"retire": [5]}, r"ranks \[5\] are not in the group"),
                (1, {"retire": [0, 1]}, "all ranks"),
            ):
                refused = await ask(size, **options)
                assert refused["refused"] == "invalid"
                assert refused.get("param") == ("retire_ranks" if options else None)
                with pytest.raises(AssertionError, match=message):
                    raise AssertionError(refused["message"])
            assert (await app.manager.rebalance_experts.remote())["refused"] == "invalid"
            async with client_of(app) as client, load(client, expected):
                operation = await scale(app, 6)
                assert operation["failed_phase"] == "placing" and "room" in operation["error"]
                first = await ask(3, operation_id="grow")
                busy = await ask(4)
                assert busy["refused"] == "busy" and "grow" in busy["message"]
                again = await ask(4, operation_id="grow")
                assert again["id"] == first["id"] == "grow" and again["to_size"] == 3
                assert (await end_of(app, "grow"))["error"] == ""

        asyncio.run(run())
        assert {name: pid for name, pid in app.pids().items() if name in before} == before


FAULTS = [
    (wanted, fault) for wanted in ("launching", "joining", "armed") for fault in ("killed", "stalled", "cancelled")
]
QUICK = [("launching", "killed"), ("joining", "cancelled"), ("armed", "stalled")]


@pytest.mark.parametrize(
    ("wanted", "fault"),
    [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in FAULTS],
)
def test_a_joiner_that_fails_is_rolled_back_and_a_retry_works(
    checkpoint: Path, expected: list[int], wanted: str, fault: str
) -> None:
    timeouts = {"switch_timeout_s": 3.0, "start_timeout_s": 30.0}
    with application(checkpoint, **timeouts) as app:
        app.serve(2)
        before = app.pids()

        async def run() -> None:
            async with client_of(app) as client, load(client, expected) as finished:
                for attempt in range(5):
                    id_ = f"grow{attempt}"
                    assert "refused" not in await app.manager.scale_elastic_ep.remote(3, operation_id=id_)
                    pid = await _stop_joiner(app, wanted, before["dp_rank_0"])
                    if fault == "killed":
                        os.kill(pid, signal.SIGKILL)
                    elif fault == "cancelled":
                        await app.manager.cancel.remote(id_)
                    operation = await end_of(app, id_)
                    if operation["error"]:
                        break
                    os.kill(pid, signal.SIGCONT)  # the switch was faster than the signal: once more
                    assert (await scale(app, 2))["error"] == ""
                assert operation["failed_phase"] == wanted and operation["error"], operation
                status = await app.manager.status.remote()
                assert status["phase"] == "serving" and status["data_parallel_size"] == 2
                assert status["epoch"] == 2 * attempt + 1
                assert sorted(app.engines) == ["dp_rank_0", "dp_rank_1"]
                served = finished[0]
                await until(lambda: _more(finished, served + 2))
                assert (await scale(app, 3))["error"] == ""

        asyncio.run(run())
        assert {name: pid for name, pid in app.pids().items() if name in before} == before


async def _stop_joiner(app: Application, wanted: str, founder: int) -> int:
    """Stops the joiner's process such that phase ``wanted`` can't end; its process id."""
    while "dp_rank_2" not in app.engines:
        await asyncio.sleep(0.01)
    pid: int = (await app.engines["dp_rank_2"].hello.remote()).pid
    if wanted == "joining":
        os.kill(founder, signal.SIGSTOP)  # it hosts the rendezvous: the phase can't end before it does that
        await until(lambda: _in(app, "joining", "aborting", "done"))
    elif wanted == "armed":
        version = -1
        while not await _in(app, "prefetching", "draining", "armed", "committed", "retiring", "done"):
            version = (await app.manager.watch.remote(version))["version"]
    os.kill(pid, signal.SIGSTOP)
    if wanted == "joining":
        os.kill(founder, signal.SIGCONT)
    elif wanted == "armed":
        await until(lambda: _in(app, "armed", "committed", "retiring", "aborting", "done"))
    return pid


async def _in(app: Application, *phases: str) -> bool:
    return await phase(app) in phases


def test_a_declared_size_is_taken_up_and_the_last_one_wins(checkpoint: Path, expected: list[int]) -> None:
    with application(checkpoint) as app:
        app.serve(2)

        async def run() -> None:
            async with client_of(app) as client, load(client, expected):
                await app.manager.declare.remote(3)
                await app.manager.declare.remote(4)
                await app.manager.declare.remote(1)
                await until(lambda: _size(app, 1))
                # What was declared before is no news: what was asked for since stands.
                assert (await scale(app, 2))["error"] == ""
                await app.manager.declare.remote(1)
                await asyncio.sleep(0.5)
                assert await _size(app, 2)

        asyncio.run(run())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_cycles_leave_nothing_behind(checkpoint: Path, expected: list[int]) -> None:
    with application(checkpoint, expert_slots=5, min_data_parallel_size=1) as app:
        app.serve(2)

        async def run() -> None:
            survivors = [app.manager, app.coordinator, app.engines["dp_rank_0"], app.engines["dp_rank_1"]]
            pids = [await actor.__ray_call__.remote(lambda _: os.getpid()) for actor in survivors]
            async with client_of(app) as client, load(client, expected, streams=2):
                for cycle in range(1, CYCLES + 1):
                    for size in (3, 2):
                        assert (await scale(app, size))["error"] == ""
                    if cycle % 10 == 0:
                        held = [_held(pid) for pid in [*pids, os.getpid()]]
                        print(cycle, held, len(list(Path("/dev/shm").iterdir())))
                    if cycle == SETTLED:
                        settled = held
                for before, after in zip(settled, held, strict=True):
                    assert after["files"] <= before["files"] + 2 and after["threads"] <= before["threads"] + 1
                    assert after["MiB"] <= before["MiB"] + MEMORY_MIB

        asyncio.run(run())
        assert len(groups.find(app.siblings.namespace)) == 2


def _held(pid: int) -> dict[str, int]:
    """What a process occupies."""
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return {
        "files": len(list((process / "fd").iterdir())),
        "threads": int(status["Threads"]),
        "MiB": int(status["VmRSS"].split()[0]) // 1024,
    }


async def _size(app: Application, size: int) -> bool:
    status = await app.manager.status.remote()
    return status["data_parallel_size"] == size and status["operation"]["done"]


def test_a_manager_that_dies_in_the_middle_leaves_a_group_that_serves(checkpoint: Path, expected: list[int]) -> None:
    with application(checkpoint) as app:
        app.serve(2)

        async def run() -> None:
            async with client_of(app) as client, load(client, expected) as finished:
                for moment in ("launching", "joining"):
                    await app.manager.scale_elastic_ep.remote(3)
                    await until(lambda moment=moment: _in(app, moment, "done"))  # type: ignore[misc]
                    ray.kill(app.manager)
                    app.start_manager()
                    await app.manager.contact.remote()
                    status = await app.manager.status.remote()
                    assert sorted(app.engines) == [f"dp_rank_{rank['rank']}" for rank in status["ranks"]]
                    served = finished[0]
                    await until(lambda served=served: _more(finished, served + 1))  # type: ignore[misc]
                    if status["data_parallel_size"] == 3:
                        assert (await scale(app, 2))["error"] == ""

        asyncio.run(run())
        ray.get(app.manager.stop.remote())
        wait_for(app.nothing_is_left)
