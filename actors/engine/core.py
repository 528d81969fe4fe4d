"""The busy loop of one engine: drain the inbox, schedule, agree with the peers, step, emit.

Everything it decides is decided by pure objects: the scheduler (what to compute), the wave table (whether the group
runs). The loop only moves messages between them, the model runner and the sockets. While the group is paused the loop
sleeps in poll; while it runs, every iteration is one lockstep step of the whole group. Ranks that need nothing of each
other for a step (each holds every expert, or there are none) keep to the lockstep of syncs, and don't wait in it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from actors import wire
from actors.engine.batch import Batch
from actors.engine.blocks import BlockPool
from actors.engine.config import EngineConfig
from actors.engine.experts.exchange import Exchange, SoloExchange
from actors.engine.experts.map import ExpertMap
from actors.engine.mailbox import Mailbox
from actors.engine.pipeline import Pipeline
from actors.engine.request import Request
from actors.engine.runner import ModelRunner, StepFailed
from actors.engine.salvage import Salvage
from actors.engine.scheduler import Output, Scheduler
from actors.engine.standby import Standby
from actors.membership import NO_EPOCH, Epoch
from actors.transition import Ballot
from actors.waves import EngineWaves, Report, Standing

logger = logging.getLogger(__name__)

# How often the loop looks for clients that fell silent, and the longest sleep of a paused engine, seconds.
HOUSEKEEPING_S = 1.0
# A group that runs only because it waits to switch has nothing to compute.
IDLE_STEP_S = 0.001


class EngineCore:
    """One DP rank: ``run`` serves until ``stop``. Raises from ``run`` when the group's lockstep broke (PeerLost)."""

    def __init__(self, rank: int, config: EngineConfig, runner: ModelRunner, mailbox: Mailbox) -> None:
        self.mailbox = mailbox
        self.kv_blocks = runner.num_kv_blocks
        self._rank = rank
        self._config = config
        self._runner = runner
        self._pipeline = Pipeline(runner)
        self._exchange: Exchange = SoloExchange()
        self.epoch = NO_EPOCH
        self._ballot = Ballot()
        self._standby: Standby | None = None
        self._on_prefetched: Callable[[int], None] | None = None
        self._on_switched: Callable[[float], None] | None = None
        self._waves = EngineWaves(rank=rank)
        self._last_stats: tuple[int, int, int] | None = None
        self._salvage: Salvage | None = None
        self._held: list[Output] = []  # of the last step: sent beside the next one, where there is one
        self._others_compute = False  # in the last step, for which this rank waited
        self._stopping = False
        self._syncing = False
        self._counters = {"steps": 0, "dummy_steps": 0, "step_failures": 0}
        self._scheduler = Scheduler(
            BlockPool(runner.num_kv_blocks, config.block_size),
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            prefill_chunk=config.prefill_chunk,
            max_queue=config.max_queue,
            vocab_size=runner.summary.vocab_size,
        )

    # --- the next epoch, from any thread ---------------------------------------------------------------------------

    @property
    def expert_map(self) -> ExpertMap:
        return self._runner.model.experts.routing.map

    def prepare(self, epoch: Epoch, expert_map: ExpertMap, store: str) -> None:
        """Connects the exchange of ``epoch``, which comes next, through the store at ``ip:port``.

        Blocks until all its members have come, while the loop serves on. Raises PeerLost when one does not.
        """
        self.abandon()
        standby = Standby(self._rank, epoch, expert_map, self.epoch, self.expert_map)
        self._standby = standby
        if standby.index is not None:
            address = self.mailbox.address.removeprefix("tcp://").rsplit(":", 1)[0]
            standby.connect(store, address, self._config.collective_timeout_s, self._runner)

    def prefetch(self, done: Callable[[int], None]) -> None:
        """Has the loop read, one between two steps, the experts that the next epoch wants here; ``done(how many)``."""

        def begin() -> None:
            if self._standby is not None:
                self._on_prefetched = done
                self._report_prefetched()

        self.mailbox.post(begin)

    def arm(self, epoch: int, done: Callable[[float], None]) -> None:
        """Votes for ``epoch``, the prepared one, from the next step on; ``done(seconds this rank stood still)``."""

        def vote() -> None:
            if self._standby is not None and self._standby.epoch.number == epoch:
                self._on_switched = done
                self._ballot = self._ballot.arm(epoch)
                self._take(self._waves.submitted())

        self.mailbox.post(vote)

    def disarm(self, epoch: int, done: Callable[[], None]) -> None:
        """Votes for ``epoch`` no more, and drops it unless it is the present one by then; ``done()`` at last."""

        def withdraw() -> None:
            self._ballot = self._ballot.disarm(epoch)
            if self.epoch.number != epoch:
                self.abandon()
            done()

        self.mailbox.post(withdraw)

    def abandon(self) -> None:
        """Drops what was prepared."""
        standby, self._standby = self._standby, None
        if standby is not None:
            standby.abandon()
        self._on_prefetched = self._on_switched = None

    def enter(self, epoch: int) -> None:
        """A joiner's first act: begins the first collective of ``epoch`` and waits there for the others.

        Instead of a vote; on the loop's thread, before ``run``. Raises PeerLost when they do not come.
        """
        self._prepared()
        self._ballot = self._ballot.arm(epoch)
        self._switch()

    def _prepared(self) -> Standby:
        if self._standby is None:
            raise RuntimeError(f"dp_rank_{self._rank} has no next epoch: call prepare first")
        return self._standby

    def announce_to(self, coordinator: str) -> None:
        """Connects to the coordinator at this address and says where this rank stands."""
        self.mailbox.connect_coordinator(coordinator)
        if self._rank in self.epoch.ranks:  # one that has left has nothing to say, and its number may be another's
            self.mailbox.report(self._waves.announce())

    # --- from any thread -------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        experts = self._runner.model.experts
        return {
            "rows_computed": experts.computed,
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

    def chosen(self) -> list[list[int]]:
        """How often this rank's tokens chose each expert of each MoE layer, since its start."""
        chosen: list[list[int]] = self._runner.model.experts.chosen.tolist()
        return chosen

    def stop(self) -> None:
        """From any thread: ends ``run`` after the step under way."""

        def end() -> None:
            self._stopping = True

        self.mailbox.post(end)

    # --- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        due = time.monotonic() + HOUSEKEEPING_S
        while not self._stopping:
            busy = self._waves.running or self._on_prefetched is not None
            self._drain(0 if busy else int(HOUSEKEEPING_S * 1000))
            if time.monotonic() > due:
                self._abort_silent_clients()
                due = time.monotonic() + HOUSEKEEPING_S
            if self._waves.running:
                self._lockstep()
            if self._on_prefetched is not None:
                if not self._prepared().load_next(self._runner) and not self._waves.running:
                    time.sleep(IDLE_STEP_S)  # it is being read beside
                self._report_prefetched()
            self._publish_stats()
        self._settle()
        self.abandon()
        self._exchange.close()
        self.mailbox.close()

    def _drain(self, timeout_ms: int) -> None:
        requests, starts = self.mailbox.drain(timeout_ms)
        self._hear(requests)
        self._wake()
        for start in starts:
            self._take(self._waves.told(start))

    def _wake(self) -> None:
        """Requests may be heard during a sync, but the waves are told of them between two."""
        if self._scheduler.has_work:
            self._take(self._waves.submitted())

    def _hear(self, requests: list[tuple[bytes, wire.ToEngine]]) -> None:
        for client, message in requests:
            match message:
                case wire.Submit():
                    self._submit(client, message)
                case wire.Abort(request_ids=ids):
                    for request_id in ids:
                        self._emit([self._scheduler.abort(request_id)])
                case wire.Beat():
                    self.mailbox.send(client, wire.Beat(self.epoch.number))
                case wire.Attach():
                    waves = self._waves
                    self.mailbox.send(client, wire.Attached(self.epoch.number, self._rank, waves.wave, waves.running))

    def _submit(self, client: bytes, message: wire.Submit) -> None:
        if message.epoch != self.epoch.number:
            failure = wire.Failure("stale_epoch", f"sent in epoch {message.epoch}, this is {self.epoch.number}")
            delta = wire.Delta(message.request_id, len(message.generated), [], finish="error", failure=failure)
            self._emit([Output(client, delta)])
            return
        request = Request(
            message.request_id, client, message.prompt, message.sampling, generated=list(message.generated)
        )
        refused = self._scheduler.add(request)
        if refused is not None:
            self._emit([refused])

    def _lockstep(self) -> None:
        """One sync of the group and its step: every member is in this method at the same step of the same wave."""
        batch = self._next_batch()
        armed = self._ballot.armed > 0
        has_work = self._scheduler.has_work or bool(batch.slices) or armed
        vote = self._ballot.vote(armed and self._prepared().joiners_here)
        self._exchange.offer([int(has_work), batch.num_tokens, vote])
        alone = self._runner.independent
        if alone:
            self._syncing = True
            self._step_alone(batch)
            self._syncing = False
        vectors = self._exchange.gather()
        self._others_compute = not alone and sum(vector[1] for vector in vectors) > batch.num_tokens
        work = any(vector[0] for vector in vectors)
        self._take(self._waves.synced(work))
        self._wake()
        if not work:
            self._flush()
            return
        tokens = [vector[1] for vector in vectors]
        if not any(tokens):
            time.sleep(IDLE_STEP_S)
        elif not alone:
            self._step(batch, tokens)
        if self._ballot.switches([vector[2] for vector in vectors]):
            self._settle()
            self._switch()

    def _step_alone(self, batch: Batch) -> None:
        """Where no rank needs another for a step: steps of this rank until all others have answered the sync."""
        tokens = [0] * self._exchange.size
        while True:
            if batch.slices:
                tokens[self._exchange.rank_index] = batch.num_tokens
                self._step(batch, tokens)
            awaited = self._exchange.awaited()
            if not awaited:
                return
            if not batch.slices:
                self._flush()
                self.mailbox.wait(awaited, int(HOUSEKEEPING_S * 1000))
            self._hear(self.mailbox.requests())
            batch = self._next_batch()

    def _next_batch(self) -> Batch:
        if self._salvage is not None:
            return self._salvage.next()
        batch = self._scheduler.schedule(self._others_compute)
        if not batch.slices and self._pipeline:
            self._land()  # there is nothing to run ahead with
            batch = self._scheduler.schedule(self._others_compute)
        return batch

    def _step(self, batch: Batch, tokens: list[int]) -> None:
        if not batch.slices:
            self._flush()
            self._counters["dummy_steps"] += 1
            self._runner.dummy_step(tokens)
            self._runner.wait(self._runner.mark())
            return
        self._counters["steps"] += 1
        try:
            self._pipeline.launch(batch, tokens)
        except StepFailed as error:
            self._counters["step_failures"] += 1
            self._failed(batch, error)
            return
        self._flush()  # a GPU is busy with the step meanwhile
        if self._salvage is not None:
            self._salvage.take(self._pipeline.land()[1])
            self._finish_salvage()
        elif not self._runner.asynchronous:
            self._settle()
        elif len(self._pipeline) > 1:
            self._land()
            self._flush()

    def _land(self) -> None:
        """Takes the tokens of the earlier step that is under way."""
        self._held += self._scheduler.commit(*self._pipeline.land())

    def _settle(self) -> None:
        """Nothing is under way any more, and all that is known is told."""
        while self._pipeline:
            self._land()
        self._flush()

    def _flush(self) -> None:
        """Tells the clients what steps gave."""
        held, self._held = self._held, []
        self._emit(held)

    def _switch(self) -> None:
        """Leaves the present epoch for the prepared one: all its members are in this method at the same step."""
        self._runner.wait(self._runner.mark())  # nothing of the old epoch may still be under way on a device
        started = time.monotonic()
        standby, former = self._prepared(), self._exchange
        self._standby = None
        self._ballot = self._ballot.switched()
        self.epoch = standby.epoch
        exchange = standby.switch(self._runner)
        if exchange is None:
            self._exchange = SoloExchange()
            self._waves = EngineWaves(standby.epoch.number, self._rank)
        else:
            self._exchange = exchange
            own = self._waves.standing
            standings = [
                Standing(wave, step, bool(running))
                for wave, step, running in exchange.sync([own.wave, own.step, int(own.running)])
            ]
            self._take(self._waves.joined(standby.epoch, self._rank, standings))
            self._last_stats = None
        former.close()
        done, self._on_switched = self._on_switched, None
        if done is not None:
            done(time.monotonic() - started)

    def _report_prefetched(self) -> None:
        standby, done = self._prepared(), self._on_prefetched
        if standby.complete and done is not None:
            self._on_prefetched = None
            done(standby.loaded)

    # --- a request that makes the model raise ----------------------------------------------------------------------

    def _failed(self, batch: Batch, error: StepFailed) -> None:
        """The model raised: the slices of the batch run alone, one a step, until the culprit is found."""
        if self._pipeline:
            self._settle()
            self._scheduler.void(batch)  # and again, with the tokens known that it followed
            return
        self._flush()
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
        # Numbered as the load that is reported after them, so that a front-end sees whether that contains them.
        step = self._waves.step + self._syncing
        for client, deltas in by_client.items():
            self.mailbox.send(client, wire.Outputs(self.epoch.number, self._rank, self._waves.wave, step, deltas))

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
                wire.Stats(self.epoch.number, self._rank, self._waves.wave, self._waves.step, *now, kv_total=pool.total)
            )

    def _abort_silent_clients(self) -> None:
        timeout_s = self._config.client_timeout_s
        for client in self.mailbox.fallen_silent(timeout_s):
            ids = self._scheduler.of_client(client)
            if ids:
                logger.warning("a client fell silent for %.0f s: aborting its %d requests", timeout_s, len(ids))
            for request_id in ids:
                self._scheduler.abort(request_id)
