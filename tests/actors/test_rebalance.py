"""Experts re-placed by their measured load on a real Ray cluster, under load; ``-s`` prints what it gained."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from cluster import running_cluster
from safetensors.torch import load_file, save_file
from test_manager import Application, application, client_of, reference
from test_resize import end_of, load, until
from tiny_models import build

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

LENGTH = 60
POPULAR = (0, 1, 2)


@pytest.fixture(scope="module")
def skewed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose router wants three of eight experts far more often than the others."""
    directory = build("mixtral", tmp_path_factory.mktemp("models"))
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("gate.weight"):
                tensor[list(POPULAR)] *= 8
        save_file(tensors, path, metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with running_cluster({"ip": "127.0.0.2", "cpus": 4}):
        yield


def computed(app: Application) -> list[int]:
    return [ray.get(engine.status.remote())["rows_computed"] for _, engine in sorted(app.engines.items())]


async def share_of_the_busiest(app: Application, finished: list[int]) -> float:
    """Rows that the busiest rank's experts computed over the mean rank's, while a few requests were served."""
    before, served = computed(app), finished[0]
    await until(lambda: _served(finished, served + 4))
    rows = [after - start for after, start in zip(computed(app), before, strict=True)]
    print(f"rows by rank: {rows}")
    return max(rows) * len(rows) / sum(rows)


async def _served(finished: list[int], count: int) -> bool:
    return finished[0] >= count


def test_a_skewed_router_is_evened_out_and_changes_no_token(skewed: Path) -> None:
    expected = reference(skewed, LENGTH)
    with application(
        skewed, expert_slots=3, min_data_parallel_size=3, data_parallel_size=4, rebalance_interval_s=2.0
    ) as app:
        app.serve(4)

        async def run() -> tuple[float, float, int]:
            async with client_of(app) as client, load(client, expected) as finished:
                before = await share_of_the_busiest(app, finished)
                await until(lambda: _weighed(app))
                admitted = await app.manager.rebalance_experts.remote()
                assert "refused" not in admitted, admitted
                operation = await end_of(app, admitted["id"])
                assert operation["error"] == "" and operation["epoch"] == 2
                return before, await share_of_the_busiest(app, finished), operation["experts_moved"]

        before, after, moved = asyncio.run(run())
        print(f"busiest rank over the mean: {before:.2f} before, {after:.2f} after {moved} experts moved")
        assert moved > 0 and after < before


def test_a_threshold_starts_it_by_itself(skewed: Path) -> None:
    expected = reference(skewed, LENGTH)
    options = {"rebalance_interval_s": 2.0, "rebalance_threshold": 1.1}
    with application(skewed, expert_slots=3, min_data_parallel_size=3, data_parallel_size=4, **options) as app:
        app.serve(4)

        async def run() -> None:
            async with client_of(app) as client, load(client, expected):
                await until(lambda: _rebalanced(app))

        asyncio.run(run())


async def _weighed(app: Application) -> bool:
    return (await app.manager.status.remote())["imbalance"] is not None


async def _rebalanced(app: Application) -> bool:
    status = await app.manager.status.remote()
    return status["operation"]["kind"] == "rebalance" and status["epoch"] == 2
