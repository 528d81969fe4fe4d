"""The busy loop of one engine: drain the inbox, schedule, agree with the peers, step, emit.

Everything it decides is decided by pure objects: the scheduler (what to compute), the wave table (whether the group
runs). The loop only moves messages between them, the model runner and the sockets. While the group is paused the loop
sleeps in poll; while it runs, every iteration is one lockstep step of the whole group.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from actors import wire
from actors.engine import sampler
from actors.engine.batch import Batch, Sampled, Slice
from actors.engine.blocks import BlockPool
from actors.engine.config import EngineConfig
from actors.engine.experts.exchange import Exchange, SoloExchange
from actors.engine.experts.map import ExpertMap
from actors.engine.experts.mesh import MeshExchange
from actors.engine.experts.planner import Shape, plan
from actors.engine.mailbox import Mailbox
from actors.engine.model import summarize
from actors.engine.request import Request
from actors.engine.runner import ModelRunner, StepFailed
from actors.engine.scheduler import Output, Scheduler
from actors.membership import NO_EPOCH, Epoch
from actors.sockets import Keys
from actors.waves import EngineWaves, Report, Standing

logger = logging.getLogger(__name__)

# How often the loop looks for clients that fell silent, and the longest sleep of a paused engine, seconds.
HOUSEKEEPING_S = 1.0


class EngineCore:
    """One DP rank: ``run`` serves until ``stop``. Raises from ``run`` when the group's lockstep broke (PeerLost)."""

    def __init__(
        self, rank: int, config: EngineConfig, runner: ModelRunner, expert_map: ExpertMap, mailbox: Mailbox
    ) -> None:
        self.mailbox = mailbox
        self.kv_blocks = runner.num_kv_blocks
        self._rank = rank
        self._config = config
        self._runner = runner
        self._expert_map = expert_map
        self._exchange: Exchange = SoloExchange()
        self._epoch = NO_EPOCH
        self._waves = EngineWaves(rank=rank)
        self._last_stats: tuple[int, int, int] | None = None
        self._heard: dict[bytes, float] = {}
        self._salvage: Salvage | None = None
        self._stopping = False
        self._counters = {"steps": 0, "dummy_steps": 0, "step_failures": 0}
        self._scheduler = Scheduler(
            BlockPool(runner.num_kv_blocks, config.block_size),
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_queue=config.max_queue,
            vocab_size=runner.summary.vocab_size,
        )

    @classmethod
    def build(
        cls,
        rank: int,
        index: int,
        size: int,
        config: EngineConfig,
        ip: str,
        keys: Keys,
        report: Callable[[str], None],
    ) -> EngineCore:
        """Reads the weights that member ``index`` of ``size`` holds and binds the sockets on ``ip``.

        ``report`` is told what is being done. Raises ValueError on a checkpoint or configuration that can't work.
        """
        report("reading the model's configuration")
        shape = summarize(config.model)
        slots = config.expert_slots or -(-shape.num_experts // config.min_data_parallel_size)
        expert_map = plan(Shape(shape.num_moe_layers, shape.num_experts, slots), range(size))
        report(f"loading weights of {config.model}")
        runner = ModelRunner(config, expert_map, index, SoloExchange())
        return cls(rank, config, runner, expert_map, Mailbox(ip, keys))

    # --- before the loop -------------------------------------------------------------------------------------------

    def join(self, epoch: Epoch, store: str) -> None:
        """Forms ``epoch``'s process group through the store at ``ip:port``; blocks until all members have come.

        Raises PeerLost when one does not.
        """
        index = epoch.ranks.index(self._rank)
        if len(epoch.members) > 1:
            host, port = store.rsplit(":", 1)
            timeout = timedelta(seconds=self._config.collective_timeout_s)
            client = dist.TCPStore(host, int(port), is_master=False, timeout=timeout)
            own_ip = self.mailbox.address.removeprefix("tcp://").rsplit(":", 1)[0]
            self._exchange = MeshExchange(
                dist.PrefixStore(f"epoch{epoch.number}", client),
                index,
                len(epoch.members),
                self._config.collective_timeout_s,
                own_ip,
            )
        self._runner.adopt(self._expert_map, index, self._exchange)
        self._epoch = epoch
        own = self._waves.standing
        standings = [
            Standing(wave, step, bool(running))
            for wave, step, running in self._exchange.sync([own.wave, own.step, int(own.running)])
        ]
        self._take(self._waves.joined(epoch, self._rank, standings))

    def announce_to(self, coordinator: str) -> None:
        """Connects to the coordinator at this address and says where this rank stands."""
        self.mailbox.connect_coordinator(coordinator)
        self.mailbox.report(self._waves.announce())

    # --- from any thread -------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        return {
            "wave": self._waves.wave,
            "running": self._waves.running,
            "step": self._waves.step,
            "requests_running": self._scheduler.running,
            "requests_waiting": self._scheduler.waiting,
            "preemptions": self._scheduler.preemptions,
            "prefix_hits": self._scheduler.pool.hits,
            "kv_used": self._scheduler.pool.used,
            "malformed": self.mailbox.malformed,
        } | self._counters

    def stop(self) -> None:
        """From any thread: ends ``run`` after the step under way."""

        def end() -> None:
            self._stopping = True

        self.mailbox.post(end)

    # --- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        due = time.monotonic() + HOUSEKEEPING_S
        while not self._stopping:
            self._drain(0 if self._waves.running else int(HOUSEKEEPING_S * 1000))
            if time.monotonic() > due:
                self._abort_silent_clients()
                due = time.monotonic() + HOUSEKEEPING_S
            if self._waves.running:
                self._lockstep()
            self._publish_stats()
        self._exchange.close()
        self.mailbox.close()

    def _drain(self, timeout_ms: int) -> None:
        requests, starts = self.mailbox.drain(timeout_ms)
        for client, message in requests:
            self._heard[client] = time.monotonic()
            match message:
                case wire.Submit():
                    self._submit(client, message)
                case wire.Abort(request_ids=ids):
                    for request_id in ids:
                        self._emit([self._scheduler.abort(request_id)])
                case wire.Beat():
                    self.mailbox.send(client, wire.Beat(self._epoch.number))
                case wire.Attach():
                    self.mailbox.send(
                        client,
                        wire.Attached(self._epoch.number, self._rank, self._waves.wave, self._waves.running),
                    )
        for start in starts:
            self._take(self._waves.told(start))

    def _submit(self, client: bytes, message: wire.Submit) -> None:
        if message.epoch != self._epoch.number:
            failure = wire.Failure("stale_epoch", f"sent in epoch {message.epoch}, this is {self._epoch.number}")
            delta = wire.Delta(message.request_id, len(message.generated), [], finish="error", failure=failure)
            self._emit([Output(client, delta)])
            return
        request = Request(
            message.request_id, client, message.prompt, message.sampling, generated=list(message.generated)
        )
        refused = self._scheduler.add(request)
        if refused is not None:
            self._emit([refused])
            return
        self._take(self._waves.submitted())

    def _lockstep(self) -> None:
        """One step of the whole group: every member is in this method at the same step of the same wave."""
        salvage = self._salvage
        batch = salvage.next() if salvage is not None else self._scheduler.schedule()
        has_work = self._scheduler.has_work or bool(batch.slices)
        vectors = self._exchange.sync([int(has_work), batch.num_tokens])
        work = any(vector[0] for vector in vectors)
        self._take(self._waves.synced(work))
        if not work:
            return
        tokens = [vector[1] for vector in vectors]
        if not batch.slices:
            self._counters["dummy_steps"] += 1
            if any(tokens):
                self._runner.dummy_step(tokens)
            return
        self._counters["steps"] += 1
        try:
            results: list[Sampled | wire.Failure] = self._compute(batch, tokens)
        except StepFailed as error:
            self._counters["step_failures"] += 1
            self._failed(batch, error)
            return
        if salvage is not None:
            salvage.take(results)
            self._finish_salvage()
        else:
            self._emit(self._scheduler.commit(batch, results))

    def _compute(self, batch: Batch, tokens: list[int]) -> list[Sampled | wire.Failure]:
        logits = self._runner.step(batch, tokens)
        return sampler.sample(logits, batch.sampling_slices)

    # --- a request that makes the model raise ----------------------------------------------------------------------

    def _failed(self, batch: Batch, error: StepFailed) -> None:
        """The model raised: the slices of the batch run alone, one a step, until the culprit is found."""
        if self._salvage is None:
            logger.warning("the model raised on a step of %d requests; running them one by one", len(batch.slices))
            self._salvage = Salvage(batch)
            if len(batch.slices) > 1:
                return
            self._salvage.next()
        (culprit,) = batch.slices
        logger.error("request %s makes the model raise: %s", culprit.request_id, error)
        failure = wire.Failure("model_error", f"the model raised on this request: {error}")
        self._emit([self._scheduler.fail(culprit.request_id, failure)])
        self._salvage.take([failure] if culprit.samples else [])
        self._finish_salvage()

    def _finish_salvage(self) -> None:
        if self._salvage is not None and self._salvage.done:
            self._emit(self._scheduler.commit(self._salvage.batch, self._salvage.results))
            self._salvage = None

    # --- out -------------------------------------------------------------------------------------------------------

    def _emit(self, outputs: list[Output] | list[Output | None]) -> None:
        by_client: dict[bytes, list[wire.Delta]] = {}
        for output in outputs:
            if output is not None:
                by_client.setdefault(output.client, []).append(output.delta)
        for client, deltas in by_client.items():
            self.mailbox.send(
                client, wire.Outputs(self._epoch.number, self._rank, self._waves.wave, self._waves.step, deltas)
            )

    def _take(self, transition: tuple[EngineWaves, list[Report]]) -> None:
        self._waves, reports = transition
        for report in reports:
            self.mailbox.report(report)

    def _publish_stats(self) -> None:
        """Tells the coordinator this rank's load, if it changed."""
        pool = self._scheduler.pool
        now = (self._scheduler.waiting, self._scheduler.running, pool.used)
        if now != self._last_stats:
            self._last_stats = now
            self.mailbox.report(
                wire.Stats(
                    self._epoch.number, self._rank, self._waves.wave, self._waves.step, *now, kv_total=pool.total
                )
            )

    def _abort_silent_clients(self) -> None:
        limit = time.monotonic() - self._config.client_timeout_s
        for client in [client for client, heard in self._heard.items() if heard < limit]:
            del self._heard[client]
            ids = self._scheduler.of_client(client)
            if ids:
                logger.warning(
                    "a client fell silent for %.0f s: aborting its %d requests", self._config.client_timeout_s, len(ids)
                )
            for request_id in ids:
                self._scheduler.abort(request_id)


class Salvage:
    """A batch the model raised on, run one slice a step; ``results`` are those of its sampling slices so far."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.results: list[Sampled | wire.Failure] = []
        self._left: list[Slice] = list(batch.slices)

    def next(self) -> Batch:
        return Batch((self._left.pop(0),))

    def take(self, results: list[Sampled | wire.Failure]) -> None:
        self.results += results

    @property
    def done(self) -> bool:
        return not self._left
