"""A real group without Ray: tokens, waves, idle ranks, clients that vanish, requests that make the model raise."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
import torch
import zmq
from local_group import LocalGroup, local_group
from tiny_models import build
from transformers import AutoModelForCausalLM

from actors import wire
from actors.engine.config import EngineConfig
from app.client import Client
from app.errors import ModelError
from app.limits import Limits

POISON = 13


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build("mixtral", tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module", params=[(1, 1), (2, 1), (2, 2)], ids=["one", "two, each with every expert", "two"])
def group(request: pytest.FixtureRequest, checkpoint: str) -> Iterator[LocalGroup]:
    size, smallest = request.param
    config = EngineConfig(
        model=checkpoint,
        kv_blocks=256,
        max_model_len=256,
        max_num_batched_tokens=64,
        client_timeout_s=2.0,
        min_data_parallel_size=smallest,
    )
    with local_group(config, size) as running:
        for engine in running.engines:
            engine.call("poison", POISON)
        yield running


@asynccontextmanager
async def client_of(group: LocalGroup) -> AsyncIterator[Client]:
    client = Client(group.locate, Limits(max_model_len=256), configure=group.keys.client)
    await client.start()
    while not client.ready:
        await asyncio.sleep(0.01)
    try:
        yield client
    finally:
        await client.close()


def reference(checkpoint: str, prompt: list[int], count: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.tensor([prompt])
    return model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None)[0, len(prompt) :].tolist()


async def collect(client: Client, name: str, prompt: list[int], count: int, rank: int | None = None) -> list[int]:
    sampling = wire.SamplingParams(max_tokens=count, temperature=0.0)
    return [token async for delta in client.generate(name, prompt, sampling, rank) for token in delta.tokens]


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(3, 40, (count,), generator=generator).tolist()
    return [torch.randint(20, 500, (n,), generator=generator).tolist() for n in lengths]


def test_each_rank_gives_the_reference_tokens(group: LocalGroup, checkpoint: str) -> None:
    async def run() -> list[list[int]]:
        async with client_of(group) as client:
            calls = [
                collect(client, f"r{i}", prompt, 12, rank=i % len(group.engines)) for i, prompt in enumerate(prompts(6))
            ]
            return await asyncio.gather(*calls)

    assert asyncio.run(run()) == [reference(checkpoint, prompt, 12) for prompt in prompts(6)]


def test_a_paused_group_is_woken_by_one_request_to_any_rank(group: LocalGroup) -> None:
    async def run() -> None:
        async with client_of(group) as client:
            for rank in range(len(group.engines)):
                await wait_paused(group)
                waves = [status["wave"] for status in group.status()]
                assert len(set(waves)) == 1
                assert len(await collect(client, f"wake{rank}", [40, 41, 42], 3, rank=rank)) == 3
                await wait_paused(group)
                assert all(status["wave"] > waves[0] for status in group.status())

    asyncio.run(run())


def test_a_paused_group_does_not_compute(group: LocalGroup) -> None:
    asyncio.run(wait_paused(group))
    before = [(s["steps"], s["dummy_steps"], s["wave"]) for s in group.status()]
    time.sleep(1.0)
    assert [(s["steps"], s["dummy_steps"], s["wave"]) for s in group.status()] == before


def test_closing_the_stream_aborts_in_the_engine(group: LocalGroup) -> None:
    async def run() -> None:
        async with client_of(group) as client:
            stream = client.generate("gone", [50, 51, 52], wire.SamplingParams(max_tokens=200, temperature=0.0))
            await stream.__anext__()
            await stream.aclose()
            await wait_empty(group)

    asyncio.run(run())


def test_requests_of_a_client_that_fell_silent_are_aborted(group: LocalGroup) -> None:
    """A client that dies without a word: its socket is simply gone."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    group.keys.client(socket)
    socket.connect(group.epoch.members[0].address)
    sampling = wire.SamplingParams(max_tokens=240, temperature=0.0)
    # Enough of them that they are still running when the client is given up.
    for i in range(24):
        socket.send(wire.encode(wire.Submit(1, f"orphan{i}", [60 + i, 61], [], sampling)))
    assert socket.poll(20_000)
    context.destroy(linger=0)
    asyncio.run(wait_empty(group))


def test_a_request_that_makes_the_model_raise_fails_alone(group: LocalGroup, checkpoint: str) -> None:
    async def run() -> tuple[list[list[int]], list[BaseException]]:
        async with client_of(group) as client:
            good = [collect(client, f"good{i}", prompt, 12) for i, prompt in enumerate(prompts(5))]
            bad = [collect(client, f"bad{i}", [30, POISON, 31 + i], 12) for i in range(2)]
            results = await asyncio.gather(*good, *bad, return_exceptions=True)
            return results[:5], results[5:]

    good, bad = asyncio.run(run())
    assert good == [reference(checkpoint, prompt, 12) for prompt in prompts(5)]
    assert all(isinstance(error, ModelError) and "poison" in str(error) for error in bad), bad


def test_strangers_and_garbage_are_ignored(group: LocalGroup) -> None:
    address = group.epoch.members[0].address
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.connect(address)
    stranger.send(wire.encode(wire.Attach()))
    insider = context.socket(zmq.DEALER)
    group.keys.client(insider)
    insider.connect(address)
    before = group.engines[0].call("status")["malformed"]
    for garbage in (b"", b"\xc1", b"x" * 1000, wire.encode(wire.Lookup())):
        insider.send(garbage)
    insider.send(wire.encode(wire.Attach()))
    assert insider.poll(5000) and isinstance(wire.from_engine(insider.recv()), wire.Attached)
    assert group.engines[0].call("status")["malformed"] == before + 4
    assert not stranger.poll(200)
    context.destroy(linger=0)


async def wait_paused(group: LocalGroup) -> None:
    await until(lambda: not any(status["running"] for status in group.status()))


async def wait_empty(group: LocalGroup) -> None:
    await until(lambda: not any(s["requests_running"] + s["requests_waiting"] for s in group.status()))


async def until(condition: Callable[[], bool]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.05)

    await asyncio.wait_for(wait(), 30)


@pytest.fixture(scope="module")
def pair(checkpoint: str) -> Iterator[LocalGroup]:
    """Two ranks, each with every expert, which nothing poisons."""
    config = EngineConfig(model=checkpoint, kv_blocks=64, max_model_len=256, client_timeout_s=60.0)
    with local_group(config, 2) as running:
        yield running


def test_a_rank_with_every_expert_does_not_wait_for_the_step_of_another(pair: LocalGroup, checkpoint: str) -> None:
    first, second = prompts(2)
    pair.engines[1].call("hold")

    async def run() -> None:
        async with client_of(pair) as client:
            held = asyncio.create_task(collect(client, "held", second, 12, rank=1))
            await until(lambda: pair.engines[1].call("holds"))
            for turn in range(2):  # the second one comes in the middle of a sync
                assert await collect(client, f"free{turn}", first, 12, rank=0) == reference(checkpoint, first, 12)
            assert not held.done()
            pair.engines[1].call("release")
            assert await held == reference(checkpoint, second, 12)
            await wait_paused(pair)

    asyncio.run(run())


def test_twenty_epochs_leave_nothing_behind_and_change_no_token(pair: LocalGroup, checkpoint: str) -> None:
    prompt = prompts(1)[0]
    expected = reference(checkpoint, prompt, 40)
    held = []

    async def run() -> None:
        async with client_of(pair) as client:
            for turn in range(20):
                request = asyncio.create_task(collect(client, f"during{turn}", prompt, 40, rank=turn % 2))
                await asyncio.to_thread(pair.switch)
                assert await request == expected
                held.append(pair.all("held"))

    asyncio.run(run())
    assert [status["step_failures"] for status in pair.status()] == [0, 0]
    # File descriptors (so sockets too) and threads; the first epochs make what stays.
    assert held[-1] == held[5]
