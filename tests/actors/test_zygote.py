"""Ranks as forks of one process, on a real Ray: what they share, what they must not, and who outlives whom."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import ray
from cluster import TestCluster, running_cluster
from ray.exceptions import RayActorError

from actors import zygote

SHARED = {"OMP_NUM_THREADS": "1", "ZYGOTE_TEST": "shared"}


@ray.remote(num_cpus=1)
class Rank:
    def describe(self) -> dict[str, Any]:
        import torch

        return {
            "pid": os.getpid(),
            "parent": os.getppid(),
            "group": os.getpgrp(),
            "transformers": "transformers" in sys.modules,
            "environment": {name: value for name, value in os.environ.items() if name.startswith("ZYGOTE_TEST")},
            "drawn": (random.random(), float(numpy.random.random()), float(torch.rand(())), ray.WorkerID.from_random()),
            "product": float((torch.ones(300, 300) @ torch.ones(300, 300)).sum()),
        }


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    with running_cluster({"ip": "127.0.0.2", "cpus": 4}) as running:
        yield running


def start(own: str, device: str = "cpu") -> Any:
    return Rank.options(  # type: ignore[attr-defined]
        runtime_env={
            "env_vars": SHARED | {"ZYGOTE_TEST_RANK": own},
            "py_executable": zygote.command(SHARED, device, "no model"),
        }
    ).remote()


def program(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def gone(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited for half a minute"
        time.sleep(0.05)


def end(*ranks: Any) -> None:
    for rank in ranks:
        ray.kill(rank)


def test_ranks_are_forks_of_one_process_and_share_nothing_else(cluster: TestCluster) -> None:
    ranks = [start("first"), start("second")]
    first, second = (ray.get(rank.describe.remote()) for rank in ranks)
    assert first["parent"] == second["parent"] and "actors.zygote" in program(first["parent"])
    assert first["transformers"]
    assert first["environment"] == {"ZYGOTE_TEST": "shared", "ZYGOTE_TEST_RANK": "first"}
    assert second["environment"]["ZYGOTE_TEST_RANK"] == "second"
    assert all(one != other for one, other in zip(first["drawn"], second["drawn"], strict=True))
    assert first["product"] == 300**3
    assert len({first["group"], second["group"], os.getpgid(first["parent"])}) == 3
    end(*ranks)
    until(lambda: gone(first["pid"]) and gone(second["pid"]) and gone(first["parent"]))


def test_a_rank_that_dies_takes_nobody_along(cluster: TestCluster) -> None:
    ranks = [start("first"), start("second")]
    first, second = (ray.get(rank.describe.remote()) for rank in ranks)
    os.kill(first["pid"], signal.SIGKILL)
    with pytest.raises(RayActorError):
        ray.get(ranks[0].describe.remote())
    third = start("third")
    assert ray.get(third.describe.remote())["parent"] == second["parent"]
    assert ray.get(ranks[1].describe.remote())["pid"] == second["pid"]
    end(ranks[1], third)


def test_ranks_outlive_their_zygote_and_the_next_rank_starts_another(cluster: TestCluster) -> None:
    rank = start("first")
    before = ray.get(rank.describe.remote())
    os.kill(before["parent"], signal.SIGKILL)
    until(lambda: gone(before["parent"]))
    second = start("second")
    after = ray.get(second.describe.remote())
    assert after["parent"] != before["parent"] and "actors.zygote" in program(after["parent"])
    assert ray.get(rank.describe.remote())["pid"] == before["pid"]
    end(rank, second)
    until(lambda: gone(before["pid"]) and gone(after["parent"]))


def test_without_a_zygote_a_rank_starts_as_any_worker_does(cluster: TestCluster) -> None:
    rank = start("alone", device="abacus")  # whose modules nobody knows: the zygote ends at once
    alone = ray.get(rank.describe.remote())
    assert not alone["transformers"] and "zygote" not in program(alone["parent"])
    assert alone["environment"]["ZYGOTE_TEST_RANK"] == "alone"
    end(rank)
    until(lambda: gone(alone["pid"]))
