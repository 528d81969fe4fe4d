"""Resizes a group under load without HTTP, and measures what streams of its client notice.

    python scripts/bench/resize_group.py --model DIR --device cuda --dtype float32 --sequence 1,2,1,2 --json OUT

Manager, coordinator and ranks run on a Ray of their own; greedy streams go through the front-end's client in this
process, and every answer is compared, token by token, with the same prompt's alone before. What HTTP and Serve add is
measured by resize.py.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import ray
from load import percentile
from origin import origin

from actors import wire
from actors.coordinator_actor import CoordinatorOfGroup
from actors.manager import Manager
from actors.siblings import Siblings
from app.client import Client
from app.config import AppConfig

# What follows an operation's end still counts as its doing.
AFTER_S = 2.0


@dataclass
class Stream:
    """The times of all tokens that one stream got, and how its answers compared."""

    times: list[float] = field(default_factory=list)
    requests: int = 0
    different: int = 0
    failed: int = 0


class Load:
    """``streams`` greedy streams over ``prompts``, one answer after the other."""

    def __init__(self, client: Client, prompts: list[list[int]], length: int) -> None:
        self.client, self.prompts, self.length = client, prompts, length
        self.expected: list[list[int]] = []
        self.streams: list[Stream] = []
        self._over = False
        self._tasks: list[asyncio.Task[None]] = []

    async def answer(self, name: str, prompt: list[int], times: list[float]) -> list[int]:
        sampling = wire.SamplingParams(max_tokens=self.length, temperature=0.0)
        tokens: list[int] = []
        async for delta in self.client.generate(name, prompt, sampling):
            times.append(time.perf_counter())
            tokens += delta.tokens
        return tokens

    async def alone(self) -> None:
        for number, prompt in enumerate(self.prompts):
            self.expected.append(await self.answer(f"alone-{number}", prompt, []))

    def start(self, streams: int) -> None:
        self.streams = [Stream() for _ in range(streams)]
        self._tasks = [asyncio.create_task(self._run(number)) for number in range(streams)]

    async def _run(self, number: int) -> None:
        stream, turn = self.streams[number], number
        while not self._over:
            which = turn % len(self.prompts)
            times: list[float] = []
            try:
                tokens = await self.answer(f"stream-{number}-{turn}", self.prompts[which], times)
                stream.different += tokens != self.expected[which]
            except Exception as error:
                print(f"stream {number}: {error}", flush=True)
                stream.failed += 1
            stream.requests += 1
            # The wait for a first token is none between two.
            stream.times += [*times, float("nan")]
            turn += len(self.streams)

    async def stop(self) -> None:
        self._over = True
        await asyncio.gather(*self._tasks)

    def gaps(self, start: float, end: float) -> list[float]:
        """Seconds between two tokens of one answer, of which the later came within the span."""
        return [
            late - early
            for stream in self.streams
            for early, late in zip(stream.times, stream.times[1:], strict=False)
            if start <= late <= end and late - early >= 0
        ]


def main() -> None:
    arguments = parse()
    ray.init(address="local", include_dashboard=False, namespace="bench", log_to_driver=arguments.verbose)
    try:
        report = asyncio.run(measure(arguments))
    finally:
        ray.shutdown()
    print(table(report))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    draw, vocab = random.Random(arguments.seed), json.loads((arguments.model / "config.json").read_text())["vocab_size"]
    prompts = [[draw.randrange(vocab) for _ in range(arguments.input)] for _ in range(arguments.prompts)]
    config = AppConfig(
        model=str(arguments.model), device=arguments.device, dtype=arguments.dtype, load_format=arguments.load_format,
        max_model_len=1024, max_num_seqs=64, max_num_batched_tokens=1024, min_data_parallel_size=1,
        max_data_parallel_size=max(arguments.sequence), kv_blocks=arguments.kv_blocks,
    )  # fmt: skip
    first, *rest = arguments.sequence
    rows: list[dict[str, Any]] = []
    async with group(config) as (manager, client_of):
        began = time.perf_counter()
        await manager.declare.remote(first)
        await manager.contact.remote()
        async with client_of() as client:
            ready_s = time.perf_counter() - began
            print(f"serving after {ready_s:.1f} s", flush=True)
            load = Load(client, prompts, arguments.output)
            await load.alone()
            load.start(arguments.streams)
            await asyncio.sleep(AFTER_S)
            for size in rest:
                since = time.perf_counter()
                await asyncio.sleep(arguments.settle)
                rows.append(await resize(manager, client, load, size, since))
                print(line(rows[-1]), flush=True)
            await asyncio.sleep(arguments.settle)
            await load.stop()
    totals = {
        name: sum(getattr(stream, name) for stream in load.streams) for name in ("requests", "failed", "different")
    }
    return {**origin(), "ready_s": ready_s, "streams": arguments.streams, "totals": totals, "resizes": rows}


@contextlib.asynccontextmanager
async def group(config: AppConfig) -> AsyncIterator[Any]:
    """A manager of no group yet, and what makes clients of the group that it will have."""
    siblings = Siblings("bench", "accordion-bench", "::bench::coordinator")
    coordinator = CoordinatorOfGroup.options(
        name=f"{siblings.application}{siblings.coordinator_name}", namespace="bench", num_cpus=0, lifetime="detached"
    ).remote()
    manager = Manager.options(num_cpus=0).remote(msgspec.to_builtins(config.group_settings()), siblings)

    @contextlib.asynccontextmanager
    async def client_of() -> AsyncIterator[Client]:
        contact = await manager.contact.remote()

        async def locate() -> tuple[str, str]:
            return contact.router, contact.publisher

        client = Client(locate, config.limits(), configure=contact.keys.client)
        await client.start()
        while not client.ready:
            await asyncio.sleep(0.02)
        try:
            yield client
        finally:
            await client.close()

    try:
        yield manager, client_of
    finally:
        with contextlib.suppress(Exception):
            await manager.stop.remote()
        ray.kill(manager)
        ray.kill(coordinator)


async def resize(manager: Any, client: Client, load: Load, size: int, since: float) -> dict[str, Any]:
    asked = time.perf_counter()
    operation = await manager.scale_elastic_ep.remote(size)
    if "refused" in operation:
        raise SystemExit(f"the resize to {size} was refused: {operation}")
    while not operation["done"]:
        await asyncio.sleep(0.02)
        operation = await manager.scale_elastic_ep.remote(size, None, operation["id"])
    seconds = time.perf_counter() - asked
    await asyncio.sleep(AFTER_S)
    steady = load.gaps(since, asked)
    return {
        "size": size, "seconds": seconds, "operation": operation, "gpu_bytes_used": gpu_bytes(),
        "longest_gap_s": max(load.gaps(asked, asked + seconds + AFTER_S), default=float("nan")),
        "steady_p50_s": percentile(steady, 50), "steady_p99_s": percentile(steady, 99), "steady_max_s": max(steady),
    }  # fmt: skip


def gpu_bytes() -> list[int]:
    """Bytes in use on each GPU of this machine."""
    with contextlib.suppress(FileNotFoundError):
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True, text=True
        )
        return [int(figure) * 2**20 for figure in asked.stdout.split()]
    return []


def line(row: dict[str, Any]) -> str:
    gpus = ", ".join(f"{used / 2**30:.1f}" for used in row["gpu_bytes_used"])
    phases = ", ".join(f"{name} {spent:.1f}" for name, spent in row["operation"]["seconds"].items() if spent >= 0.05)
    operation = row["operation"]
    return (
        f"to {row['size']}: {row['seconds']:.1f} s ({phases}); longest gap {row['longest_gap_s'] * 1e3:.0f} ms, steady "
        f"{row['steady_p50_s'] * 1e3:.1f} / {row['steady_p99_s'] * 1e3:.1f} / {row['steady_max_s'] * 1e3:.1f} ms "
        f"(p50 / p99 / longest); pause {operation['pause_s'] * 1e3:.1f} ms; GiB in use: {gpus or '-'}; "
        f"{operation['error'] or 'done'}"
    )


def table(report: dict[str, Any]) -> str:
    return "\n".join([*map(line, report["resizes"]), f"{report['totals']}"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--kv-blocks", type=int)
    parser.add_argument("--sequence", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 1, 2])
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--input", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--settle", type=float, default=5.0, help="seconds of steady load before each resize")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="also what the actors log")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
