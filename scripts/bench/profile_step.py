#!/usr/bin/env python3
"""Where the time of a step goes, by kind of layer: one rank or several, without HTTP, Ray or sockets.

    python scripts/bench/profile_step.py --json build/bench/profile.json

For each group (ranks x threads) and number of sequences: a decode step of all of them at the given context, and a
prefill step of four prompts of 128 tokens (of each rank). Real scheduler, model runner, sampler; ranks are processes
that exchange over the loopback, and rank 0's clock is shown, so its ``exchange`` includes waiting for the
others. Every kind is counted without what it calls (exclusive time), the median over steps; largest first.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import random
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from actors.engine import sampler
from actors.engine.blocks import BlockPool
from actors.engine.config import EngineConfig
from actors.engine.cpu import threads
from actors.engine.cpu.threads import Program
from actors.engine.experts.exchange import Exchange, SoloExchange
from actors.engine.experts.mesh import MeshExchange
from actors.engine.experts.planner import Shape, plan
from actors.engine.experts.routing import Routing
from actors.engine.model import summarize
from actors.engine.request import Request
from actors.engine.runner import ModelRunner
from actors.engine.scheduler import Scheduler
from actors.wire import SamplingParams

PREFILL_PROMPTS, PREFILL_LENGTH = 4, 128
REST = "rest of the model"
# Works of a program, by the name of the function.
WORKS = {
    "_rms_norm": "norms",
    "_attend": "attention: over the cache",
    "_rotate_and_store": "attention: projections, rope",
    "_route": "experts: routing",
    "_group": "experts: routing",
    "_combine": "experts: routing",
}
MANY = 2  # tasks: all threads take part


class Clock:
    """Exclusive wall time by kind, in seconds, since ``reset``."""

    def __init__(self) -> None:
        self._stack: list[str] = []
        self.reset()

    def reset(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._mark = time.perf_counter()

    @contextmanager
    def of(self, kind: str) -> Iterator[None]:
        self._turn()
        self._stack.append(kind)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()

    def around(self, owner: Any, name: str, kind: str) -> None:
        """Count calls of ``owner.name`` as ``kind``."""
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            self._turn()
            self._stack.append(kind)
            try:
                return inner(*arguments, **named)
            finally:
                self._turn()
                self._stack.pop()

        setattr(owner, name, timed)

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self.spent[self._stack[-1]] += now - self._mark
        self._mark = now


def kind_of(name: str, module: torch.nn.Module) -> str | None:
    """The kind a module's own time counts as; None: whatever its caller's does."""
    leaf, type_name = name.rpartition(".")[2], type(module).__name__
    if leaf == "lm_head":
        return "output head"
    if isinstance(module, torch.nn.Linear):
        return "attention: projections, rope" if "attn" in name else "MLP, dense and shared"
    if "Norm" in type_name:
        return "norms"
    if "Rotary" in type_name or leaf.endswith("attn"):
        return "attention: projections, rope"
    if "Router" in type_name:
        return "experts: routing"
    if leaf in ("mlp", "shared_expert", "shared_experts"):
        return "MLP, dense and shared"
    return None


def instrument(runner: ModelRunner, exchange: Exchange, clock: Clock) -> None:
    model = runner.model
    for name, module in model.module.named_modules():
        kind = kind_of(name, module)
        if kind is not None:
            clock.around(module, "forward", kind)
    for method in ("begin", "forward"):
        clock.around(model.attention, method, "attention: over the cache")
    for method in ("begin", "forward", "finish"):
        clock.around(model.experts, method, "experts: routing")
    for slots in model.experts.layers:
        clock.around(slots, "compute", "experts: products")
    for method in ("sync", "dispatch", "combine"):
        clock.around(exchange, method, "exchange")
    for method in ("step", "dummy_step"):
        clock.around(runner, method, REST)

    Program.run = lambda program: run_by_kind(program, clock)  # type: ignore[method-assign]


def run_by_kind(program: Program, clock: Clock) -> None:
    """One work at a time, as the program runs them, but for what each call costs."""
    names = [work.__wrapped__.__name__ for work, _ in program.works]
    of_experts = 0
    for (work, arguments), name, before, after in zip(
        program.works, names, ["", *names[:-1]], [*names[1:], ""], strict=True
    ):
        kind = WORKS.get(name, "MLP, dense and shared")
        if name == "_group":
            of_experts = 2
        elif name == "_multiply" and of_experts:
            kind, of_experts = "experts: products", of_experts - 1
        elif before == "_attend" or after == "_rotate_and_store":
            kind = WORKS["_rotate_and_store"]
        with clock.of(kind):
            threads.run(work, MANY, arguments)


@dataclass
class Rank:
    """One rank's engine without its sockets."""

    runner: ModelRunner
    exchange: Exchange
    clock: Clock
    scheduler: Scheduler
    source: random.Random
    count: int = 0

    def add(self, prompts: int, length: int, tokens: int) -> None:
        for _ in range(prompts):
            self.count += 1
            prompt = self.source.choices(range(100, self.runner.summary.vocab_size), k=length)
            sampling = SamplingParams(max_tokens=tokens, temperature=0.0)
            refused = self.scheduler.add(Request(str(self.count), b"", prompt, sampling))
            if refused is not None:
                raise RuntimeError(str(refused.delta.failure))

    def step(self) -> dict[str, float]:
        """One lockstep step, as the engine's loop makes it; its seconds by kind."""
        self.clock.reset()
        with self.clock.of("scheduler"):
            batch = self.scheduler.schedule()
        tokens = [vector[0] for vector in self.exchange.sync([batch.num_tokens])]
        if batch.slices:
            logits = self.runner.step(batch, tokens)
            with self.clock.of("sampling"):
                results = sampler.sample(logits, batch.sampling_slices)
            with self.clock.of("scheduler"):
                self.scheduler.commit(batch, results)
        elif any(tokens):
            self.runner.dummy_step(tokens)
        return self.clock.spent

    def drop_all(self) -> None:
        for request_id in self.scheduler.of_client(b""):
            self.scheduler.abort(request_id)


def serve_rank(index: int, size: int, threads: int, port: int, arguments: argparse.Namespace, results: Any) -> None:
    """One process of a group: every workload in turn; rank 0 puts ``{workload: [kinds of a step]}`` in ``results``."""
    share = os.sched_getaffinity(0)
    if len(share) >= size * threads:
        os.sched_setaffinity(0, sorted(share)[index * threads : (index + 1) * threads])
    most = max(*arguments.sequences, PREFILL_PROMPTS)
    per_sequence = -(-(arguments.context + arguments.steps) // 16) + 1
    config = EngineConfig(
        model=str(arguments.model.resolve()), threads=threads, kv_blocks=max(most * per_sequence, 128), max_num_seqs=64
    )
    shape = summarize(config.model)
    expert_map = plan(Shape(shape.num_moe_layers, shape.num_experts), range(size))
    exchange: Exchange = SoloExchange()
    if size > 1:
        store = dist.TCPStore("127.0.0.1", port, is_master=index == 0, timeout=timedelta(seconds=120))
        exchange = MeshExchange(dist.PrefixStore("profile", store), index, size, 120.0, "127.0.0.1")
    runner = ModelRunner(config, Routing(expert_map, index), exchange)
    clock = Clock()
    instrument(runner, exchange, clock)
    scheduler = Scheduler(
        BlockPool(runner.num_kv_blocks, config.block_size),
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_queue=1024,
        vocab_size=runner.summary.vocab_size,
    )
    rank = Rank(runner, exchange, clock, scheduler, random.Random(index))
    found: dict[str, list[dict[str, float]]] = {}
    for sequences in arguments.sequences:
        # The context is as asked in the middle of the measured steps.
        length = arguments.context - arguments.steps // 2
        rank.add(sequences // size + (index < sequences % size), length, arguments.steps + 100)
        largest = -(-sequences // size)
        for _ in range(math.ceil(largest * length / config.max_num_batched_tokens) + 3):
            rank.step()
        found[f"decode {sequences}"] = [rank.step() for _ in range(arguments.steps)]
        rank.drop_all()
    prefills = []
    for _ in range(max(3, arguments.steps // 4)):
        rank.add(PREFILL_PROMPTS, PREFILL_LENGTH, 1)
        prefills.append(rank.step())
    found[f"prefill {PREFILL_PROMPTS}x{PREFILL_LENGTH}"] = prefills[1:]
    if index == 0:
        results.put(found)
    exchange.sync([0])  # nobody leaves before all are done


def measure(ranks: int, threads: int, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """``{workload: {kind: milliseconds}}`` with ``total``, medians over steps."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    port = 0
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    processes = [
        context.Process(target=serve_rank, args=(i, ranks, threads, port, arguments, results), daemon=True)
        for i in range(ranks)
    ]
    for process in processes:
        process.start()
    while True:
        try:
            found = results.get(timeout=1)
            break
        except queue.Empty:
            if any(process.exitcode for process in processes):
                raise SystemExit(f"a rank of the group {ranks}x{threads} died; its error is above") from None
    for process in processes:
        process.join(30)
    medians = {}
    for workload, steps in found.items():
        kinds = {kind for step in steps for kind in step}
        medians[workload] = {k: 1000 * statistics.median(step.get(k, 0.0) for step in steps) for k in kinds}
        medians[workload]["total"] = 1000 * statistics.median(sum(step.values()) for step in steps)
    return medians


def table(group: str, measured: dict[str, dict[str, float]]) -> str:
    workloads = list(measured)
    kinds = {kind for medians in measured.values() for kind in medians}
    # Each workload weighs the same, whatever its length.
    weight = {k: sum(m.get(k, 0.0) / m["total"] for m in measured.values()) for k in kinds}
    lines = [f"\n{group} (ranks x threads), ms per step\n", f"| kind | {' | '.join(workloads)} |"]
    lines.append("|---" * (len(workloads) + 1) + "|")
    for kind in sorted(kinds, key=lambda kind: -weight[kind]):
        cells = [f"{m.get(kind, 0.0):.2f} ({m.get(kind, 0.0) / m['total']:.0%})" for m in measured.values()]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=root / "models" / "demo")
    parser.add_argument("--groups", default="1x1,1x2,2x1", help="ranks x threads")
    parser.add_argument("--sequences", type=lambda t: [int(n) for n in t.split(",")], default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=192, help="tokens in the cache of every sequence")
    parser.add_argument("--steps", type=int, default=40, help="decode steps measured")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.steps // 2 >= arguments.context:
        parser.error(f"--steps {arguments.steps} needs a --context above {arguments.steps // 2}")
    report = {}
    for group in arguments.groups.split(","):
        ranks, threads = map(int, group.split("x"))
        report[group] = measure(ranks, threads, arguments)
        print(table(group, report[group]), flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {"model": arguments.model.name, "context": arguments.context, "steps": arguments.steps}
        arguments.json.write_text(json.dumps({**settings, "ms_per_step": report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
