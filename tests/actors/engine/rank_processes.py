"""Ranks as processes for the tests of the model runner: each one drives a scheduler and a model runner in lockstep.

Processes are started once and take one job after another; the members of a job form a real group.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from actors.engine.blocks import BlockPool
from actors.engine.config import EngineConfig
from actors.engine.experts.exchange import Exchange, PeerLost, SoloExchange
from actors.engine.experts.map import ExpertMap
from actors.engine.experts.mesh import MeshExchange
from actors.engine.experts.routing import Routing
from actors.engine.pipeline import Pipeline
from actors.engine.request import Request
from actors.engine.runner import ModelRunner, StepFailed
from actors.engine.scheduler import Scheduler
from actors.wire import SamplingParams


@dataclass(frozen=True)
class Job:
    """What one rank does: its place in the group, its prompts, and the faults it meets.

    Prompts are ``(request id, tokens, step at which it arrives)``. ``poison``: the model raises, in the middle of its
    layers, on a batch that holds this token. ``dies_in``: the rank is killed in this step, once the others are told
    that it takes part. ``load`` is the map the weights are read by, when it is not ``map``. ``ahead``: steps are
    launched before the tokens of the one before are taken, as always where steps are asynchronous.
    """

    config: EngineConfig
    map: ExpertMap
    rank_index: int
    size: int
    store: tuple[int, str]
    prompts: list[tuple[str, list[int], int]]
    max_tokens: int
    poison: int | None = None
    dies_in: int | None = None
    load: ExpertMap | None = None
    ahead: bool = False


@dataclass
class Result:
    tokens: dict[str, list[int]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    bytes_read: int = 0
    preemptions: int = 0
    prefix_hits: int = 0
    longest_slice: int = 0
    dummy_steps: int = 0
    followed: int = 0


def run(job: Job) -> Result:
    """Serve the job's prompts greedily until no rank of the group has work."""
    exchange: Exchange = SoloExchange()
    runner = ModelRunner(job.config, Routing(job.load or job.map, job.rank_index), exchange)
    if runner.asynchronous:
        runner.warm_up()  # captures
    try:
        if job.size > 1:
            port, prefix = job.store
            store = dist.PrefixStore(prefix, dist.TCPStore("127.0.0.1", port, is_master=False))
            mesh = MeshExchange(store, job.rank_index, job.size, job.config.collective_timeout_s, "127.0.0.1")
            exchange = mesh
            exchange = runner.exchange(mesh, store, epoch=1)
        runner.adopt(Routing(job.map, job.rank_index), exchange)
        if job.poison is not None:
            _poison(runner, job.poison)
        return _serve(job, runner, exchange)
    finally:
        exchange.close()


def _serve(job: Job, runner: ModelRunner, exchange: Exchange) -> Result:
    config = job.config
    scheduler = Scheduler(
        BlockPool(runner.num_kv_blocks, config.block_size),
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_queue=config.max_queue,
        vocab_size=runner.summary.vocab_size,
    )
    result = Result(tokens={name: [] for name, _, _ in job.prompts})
    pipeline = Pipeline(runner)
    ahead = job.ahead or runner.asynchronous

    def land() -> None:
        for output in scheduler.commit(*pipeline.land()):
            result.tokens[output.delta.request_id] += output.delta.tokens

    arrivals = sorted(job.prompts, key=lambda prompt: prompt[2])
    step = 0
    while True:
        while arrivals and arrivals[0][2] <= step:
            name, prompt, _ = arrivals.pop(0)
            refused = scheduler.add(
                Request(name, b"", prompt, SamplingParams(max_tokens=job.max_tokens, temperature=0.0))
            )
            assert refused is None, refused
        batch = scheduler.schedule()
        if not batch.slices and pipeline:
            land()
            batch = scheduler.schedule()
        vectors = exchange.sync([int(bool(batch.slices or arrivals)), batch.num_tokens])
        if not any(work for work, _ in vectors):
            break
        step += 1
        if step == job.dies_in:
            os.kill(os.getpid(), signal.SIGKILL)
        tokens = [count for _, count in vectors]
        if not batch.slices:
            runner.dummy_step(tokens)
            runner.wait(runner.mark())
            result.dummy_steps += 1
            continue
        result.longest_slice = max(result.longest_slice, *(len(piece.tokens) for piece in batch.slices))
        result.followed += sum(piece.follows is not None for piece in batch.slices)
        try:
            pipeline.launch(batch, tokens)
        except StepFailed:
            if pipeline:
                land()
            scheduler.void(batch)
            for piece in batch.slices:
                if job.poison in piece.tokens:
                    scheduler.abort(piece.request_id)
                    result.failed.append(piece.request_id)
            continue
        if len(pipeline) > ahead:
            land()
    result.bytes_read = runner.loader.bytes_read
    result.preemptions = scheduler.preemptions
    result.prefix_hits = scheduler.pool.hits
    return result


def _poison(runner: ModelRunner, token: int) -> None:
    module: Any = runner.model.module
    seen = {"poisoned": False}

    def look(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen["poisoned"] = bool((inputs[0] == token).any())

    def explode(_module: torch.nn.Module, *_: Any) -> None:
        if seen["poisoned"]:
            raise RuntimeError("bad input")

    module.model.embed_tokens.register_forward_pre_hook(look)
    module.model.layers[2].register_forward_pre_hook(explode)


class RankProcesses:
    """``count`` processes that run jobs. Use as a context manager."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.processes = []
        self.pipes = []
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, number), daemon=True)
            process.start()
            self.processes.append(process)
            self.pipes.append(ours)
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._groups = 0

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()

    def store(self) -> tuple[int, str]:
        """Port and prefix of a store for one more group."""
        self._groups += 1
        return self._store.port, f"group{self._groups}"

    def start(self, jobs: Sequence[Job], first: int = 0, work: Callable[[Job], Any] = run) -> None:
        for process, job in enumerate(jobs, start=first):
            self.pipes[process].send((work, job))

    def results(self, count: int, first: int = 0) -> list[Any]:
        """What the jobs of ``count`` processes returned or raised, the latter as an exception."""
        return [self.pipes[process].recv() for process in range(first, first + count)]

    def run(self, jobs: Sequence[Job], first: int = 0) -> list[Any]:
        self.start(jobs, first)
        return self.results(len(jobs), first)


def _work(pipe: Any, number: int) -> None:
    if gpus := torch.cuda.device_count():
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % gpus)
    torch.set_num_threads(1)
    while True:
        try:
            work, job = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(work(job))
        except PeerLost as error:
            pipe.send(error)
        except Exception as error:
            pipe.send(RuntimeError(f"{error}\n{traceback.format_exc()}"))
