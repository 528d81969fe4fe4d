#!/usr/bin/env python3
"""Resizes a serving group under steady load, and measures what the streams notice.

    .venv/bin/python scripts/bench/resize.py --json build/bench/resize.json

Serves the demo model, or takes the server at --url. Greedy streams run all the time; each answer is compared, token by
token, with what the server said to the same prompt alone before. README.md beside this file says what the table has.
Ends with 1 if the goal is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import contenders
from contenders import Server, ServerFailed, Setting
from deployed import deploy
from footprint import Footprint
from load import RequestFailed, percentile
from origin import origin
from resize_report import Resize, figures, line, met, table, totals
from streams import Case, Request, Said, Streams, dialect_of, reference, some_cases

from app.elastic import ElasticClient, ElasticError, RolledBack

# What follows an operation's end still counts as its doing.
AFTER_S = 2.0
# An operation that could not be cancelled either is left to itself.
CANCEL_S = 60.0
DASHBOARD = "http://127.0.0.1:8265"

Result = TypeVar("Result")


class Run:
    """Everything measured so far, so that a run which is cut short is not lost."""

    def __init__(self, arguments: argparse.Namespace, cases: Sequence[Case]) -> None:
        self.arguments = arguments
        self.cases = cases
        self.server = f"server at {arguments.url}"
        self.model = ""
        self.alone: list[float] = []
        self.same_as_transformers: int | None = None
        self.resizes: list[Resize] = []
        self.streams: Streams | None = None
        self.before: dict[str, float] | None = None
        self.after: dict[str, float] | None = None
        self.origin = origin()

    def report(self, requests: Sequence[Request], stalls: Sequence[tuple[float, float]]) -> dict[str, Any]:
        rows = [figures(resize, requests, stalls) for resize in self.resizes]
        return {
            **self.origin,
            "load": {
                "server": self.server,
                "model": self.model,
                "streams": self.arguments.streams,
                "prompts": len(self.cases),
                "settle_s": self.arguments.settle,
                "gap_alone_p50": percentile(self.alone, 50),
                "gap_alone_p99": percentile(self.alone, 99),
                "load_average": os.getloadavg(),
            },
            "same_as_transformers": self.same_as_transformers,
            "totals": totals(requests, rows),
            "resizes": rows,
            "before": self.before,
            "after": self.after,
        }

    def save(self, requests: Sequence[Request], stalls: Sequence[tuple[float, float]]) -> dict[str, Any]:
        """The report, written to where it was asked for."""
        report = self.report(requests, stalls)
        if self.arguments.json:
            self.arguments.json.parent.mkdir(parents=True, exist_ok=True)
            self.arguments.json.write_text(json.dumps(report, indent=1) + "\n")
        return report


def main() -> None:
    arguments = parse()
    run = Run(arguments, some_cases(arguments.prompts, arguments.seed))
    trouble = None
    try:
        asyncio.run(served(run))
    except (ServerFailed, RequestFailed, ElasticError) as error:
        trouble = f"failed: {error}"
    except (KeyboardInterrupt, asyncio.CancelledError):
        trouble = "interrupted; what was started is stopped"
    if run.streams is None:
        sys.exit(trouble)
    report = run.save(run.streams.requests, run.streams.stalls)
    print(table(report))
    sys.exit(trouble or not met(report["totals"]))


async def served(run: Run) -> None:
    """The measurement, around it the server if it is ours. Raises ServerFailed, RequestFailed, ElasticError."""
    arguments = run.arguments
    said = await in_thread(lambda: transformers_says(arguments.model, run.cases)) if arguments.transformers else None
    if arguments.url:
        here = urllib.parse.urlsplit(arguments.url).hostname in ("127.0.0.1", "localhost")
        await measure(run, arguments.url.rstrip("/"), Footprint(arguments.url, arguments.dashboard, here), said)
        return
    setting = Setting(
        model=arguments.model.resolve(),
        port=arguments.port,
        cores=len(os.sched_getaffinity(0)),
        max_sequences=32,
        build=contenders.ROOT / "build" / "bench",
    )
    largest = max(arguments.sequence) if not arguments.random_minutes else max(arguments.largest, arguments.sequence[0])
    contender = contenders.accordion(
        setting, arguments.config, arguments.sequence[0], 1, front_ends=arguments.replicas, largest=largest
    )
    run.server = contender.note
    log = setting.build / "resize.log"
    say(f"==> starting {contender.note} (log: {log})")
    server = Server(contender, setting.port, log, say)
    try:
        ready_s = await in_thread(lambda: server.wait(arguments.start_timeout))
        say(f"    ready after {ready_s:.1f} s")
        await measure(run, server.url, Footprint(server.url, DASHBOARD, here=True), said)
    finally:
        server.end()


async def measure(run: Run, url: str, footprint: Footprint, elsewhere: list[Said] | None = None) -> None:
    """References, then all resizes beside the streams; ``elsewhere`` is what another implementation said."""
    arguments = run.arguments
    key = arguments.admin_key_file.read_text().strip() if arguments.admin_key_file else None
    client = ElasticClient(url, key, poll_s=arguments.poll)
    timeout = aiohttp.ClientTimeout(total=arguments.request_timeout)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, read_bufsize=2**20) as session:
        async with session.get(f"{url}/v1/models") as response:
            run.model = (await response.json())["data"][0]["id"]
        dialect = dialect_of(run.model)
        if (await in_thread(client.status))["data_parallel_size"] != arguments.sequence[0]:
            say(f"==> to {arguments.sequence[0]} ranks, to begin with")
            await in_thread(lambda: client.scale_elastic_ep(arguments.sequence[0]))
        say(f"==> {len(run.cases)} prompts alone, one after the other")
        expected, run.alone = await reference(session, url, dialect, run.cases)
        say(f"    gaps between tokens {percentile(run.alone, 50):.0f} / {percentile(run.alone, 99):.0f} ms (p50 / p99)")
        if elsewhere is not None:
            run.same_as_transformers = sum(a.tokens == b.tokens for a, b in zip(elsewhere, expected, strict=True))
            say(f"    {run.same_as_transformers} of {len(run.cases)} answers are those of transformers")
        say(f"==> {arguments.streams} streams, {arguments.settle:g} s before each resize")
        run.streams = Streams(session, url, dialect, run.cases, expected, arguments.streams)
        async with run.streams:
            await resizes(run, client, footprint)


async def resizes(run: Run, client: ElasticClient, footprint: Footprint) -> None:
    arguments = run.arguments
    # The first seconds of a load are not steady: all streams have their first token ahead.
    await asyncio.sleep(min(AFTER_S, arguments.settle))
    steady_since = time.perf_counter()
    for target in targets(arguments):
        await asyncio.sleep(arguments.settle)
        # What is looked at from here on costs time on these cores: not part of the steady span.
        steady = (steady_since, time.perf_counter())
        if run.before is None:
            run.before = await in_thread(footprint.counts)
        resize = await one(client, target, steady, footprint, arguments)
        if resize is not None:
            assert run.streams is not None
            run.resizes.append(resize)
            requests, stalls = run.streams.requests, list(run.streams.stalls)
            # In a thread: this process must be awake when tokens come.
            report = await in_thread(partial(run.save, requests, stalls))
            say(line(report["resizes"][-1]))
        steady_since = time.perf_counter()
    await asyncio.sleep(arguments.settle)
    status = await in_thread(client.status)
    if status["data_parallel_size"] == arguments.sequence[0]:
        run.after = await in_thread(footprint.counts)


def targets(arguments: argparse.Namespace) -> Iterator[int]:
    """The sizes to go to. Random ones end with the first size, so that what is left over can be compared."""
    first = last = arguments.sequence[0]
    if not arguments.random_minutes:
        yield from arguments.sequence[1:]
        return
    source = random.Random(f"sizes {arguments.seed}")
    until = time.perf_counter() + 60 * arguments.random_minutes
    while time.perf_counter() < until:
        last = source.choice([size for size in range(1, arguments.largest + 1) if size != last])
        yield last
    yield first


async def one(
    client: ElasticClient, target: int, steady: tuple[float, float], footprint: Footprint, arguments: argparse.Namespace
) -> Resize | None:
    """One resize and what follows it, or None if the size is there already. A failure is a result, too."""
    operation: dict[str, Any] = {}
    error = ""
    from_size = target
    before = await in_thread(footprint.replayed)
    asked = time.perf_counter()
    try:
        from_size = (await in_thread(client.status))["data_parallel_size"]
        if from_size == target:
            return None
        asked = time.perf_counter()
        if arguments.deploy:
            operation = await in_thread(partial(declare, client, target, arguments))
        else:
            operation = await operate(client, target, arguments.drain_timeout, arguments.operation_timeout)
    except RolledBack as failure:
        operation, error = failure.operation, failure.cause
    except (ElasticError, TimeoutError) as failure:
        error = str(failure)
    seconds = time.perf_counter() - asked
    await asyncio.sleep(AFTER_S)
    over = time.perf_counter()
    after = await in_thread(footprint.replayed)
    replayed = sum(max(0.0, count - before.get(address, 0.0)) for address, count in after.items()) if after else None
    return Resize(from_size, target, steady, asked, seconds, over, operation, replayed, error)


async def operate(client: ElasticClient, target: int, drain_s: float | None, limit_s: float) -> dict[str, Any]:
    """The operation that was carried out. Raises ElasticError, and TimeoutError if it neither ends nor is cancelled."""
    id_ = f"bench-{uuid.uuid4().hex[:12]}"
    task = asyncio.create_task(in_thread(lambda: client.scale_elastic_ep(target, drain_s, operation_id=id_)))
    done, _ = await asyncio.wait({task}, timeout=limit_s)
    if not done:
        with contextlib.suppress(ElasticError):
            await in_thread(lambda: client.cancel(id_))
        done, _ = await asyncio.wait({task}, timeout=CANCEL_S)
    if not done:
        task.cancel()
        raise TimeoutError(f"not done after {limit_s:g} s, and could not be cancelled within {CANCEL_S:g} s more")
    operation: dict[str, Any] = task.result()["operation"]
    return operation


def declare(client: ElasticClient, target: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """As ``operate``, by what ``serve deploy`` of the same file with another size does."""
    before = client.status()["operation_id"]
    deploy(arguments.dashboard, target)
    until = time.monotonic() + arguments.operation_timeout
    while time.monotonic() < until:
        time.sleep(arguments.poll)
        status = client.status()
        operation: dict[str, Any] = status["operation"] or {}
        if status["operation_id"] != before and operation["done"]:
            if operation["error"]:
                raise RolledBack(operation["error"], operation)
            return operation
    raise TimeoutError(f"not done after {arguments.operation_timeout:g} s")


async def in_thread(call: Callable[[], Result]) -> Result:
    """The call's result, out of a thread that holds up nobody's end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def tell(method: Callable[[Any], None], outcome: Any) -> None:
        if not future.done():
            method(outcome)

    def work() -> None:
        try:
            outcome: tuple[Any, ...] = (future.set_result, call())
        except Exception as error:
            outcome = (future.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, *outcome)

    threading.Thread(target=work, daemon=True).start()
    return await future


def transformers_says(model: Path, cases: Sequence[Case]) -> list[Said]:
    """What transformers says to the cases, greedily and in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    from app.tokenizer import Tokenizer

    say(f"==> {len(cases)} prompts with transformers")
    tokenizer = Tokenizer(str(model))
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    answers = []
    for case in cases:
        given, past, ids = torch.tensor([case.prompt.ids]), None, []
        for _ in range(case.tokens):
            with torch.inference_mode():
                output = network(given, past_key_values=past, use_cache=True)
            past = output.past_key_values
            ids.append(int(output.logits[0, -1].argmax()))
            given = torch.tensor([ids[-1:]])
        answers.append(Said("", tuple(map(tokenizer.token_text, ids))))
    return answers


def say(text: str) -> None:
    print(text, flush=True)


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    def sizes(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    root = contenders.ROOT
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument("--url", help="a running server, instead of one of our own")
    parser.add_argument("--dashboard", default=DASHBOARD, help="Ray's, of the running server")
    parser.add_argument("--admin-key-file", type=Path, help="the running server's http.admin_key_file")
    parser.add_argument("--sequence", type=sizes, default=[2, 3, 2, 1, 2, 4, 2], help="sizes; starts with the first")
    parser.add_argument("--random-minutes", type=float, default=0.0, help="random sizes for so long, instead")
    parser.add_argument("--largest", type=int, default=4, help="largest random size")
    parser.add_argument("--deploy", action="store_true", help="resize by deploying a changed file, not over HTTP")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of prompts and random sizes")
    parser.add_argument("--settle", type=float, default=10.0, help="seconds of steady load before each resize")
    parser.add_argument("--replicas", type=int, help="HTTP front-ends; those of --config if not given")
    parser.add_argument("--drain-timeout", type=float, help="seconds; the server's own if not given")
    parser.add_argument("--operation-timeout", type=float, default=300.0, help="a resize is cancelled later, seconds")
    parser.add_argument("--request-timeout", type=float, default=120.0, help="a request has failed later, seconds")
    parser.add_argument("--poll", type=float, default=0.2, help="how often an operation is asked for, seconds")
    parser.add_argument("--transformers", action="store_true", help="also compare with transformers' own tokens")
    parser.add_argument("--model", type=Path, default=root / "models" / "demo")
    parser.add_argument("--config", type=Path, default=root / "configs" / "demo-cpu.yaml", help="to begin with")
    parser.add_argument("--start-timeout", type=float, default=600.0, help="longest wait for the server, seconds")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args(given)
    if min(arguments.sequence) < 1:
        parser.error("--sequence has sizes of 1 or more")
    if arguments.random_minutes and arguments.largest < 2:
        parser.error("--largest must be 2 or more, or there is nothing to resize to")
    if not arguments.random_minutes and len(arguments.sequence) < 2:
        parser.error("--sequence names at least two sizes")
    if (not arguments.url or arguments.transformers) and not (arguments.model / "config.json").is_file():
        parser.error(f"--model {arguments.model} has no config.json: run scripts/build_demo_model.py {arguments.model}")
    return arguments


if __name__ == "__main__":
    # A TERM ends like Ctrl-C does: through the finally that ends the server.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
