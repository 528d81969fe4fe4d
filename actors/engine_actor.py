"""The Ray actor around one engine: a DP rank as the manager sees it.

Everything here is control; requests and tokens never pass through actor calls. Three kinds of method, each in a
concurrency group of its own, so that a long one never delays another: ``load`` (making the model ready), ``wait``
(all that waits for others: death notices, the next epoch) and ``control`` (everything short). torch is imported by
``inspect`` or ``load``, whichever comes first, so that the process answers ``hello`` at once.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from actors import logs, priority
from actors.engine.config import EngineConfig
from actors.engine.experts.map import ExpertMap
from actors.engine.experts.planner import Shape
from actors.handshake import Hello, Ready
from actors.membership import NO_EPOCH, Epoch
from actors.settings import Memo
from actors.sockets import Keys
from placement import groups

if TYPE_CHECKING:
    from actors.engine.core import EngineCore
    from actors.engine.runner import ModelRunner

logger = logging.getLogger(__name__)

CONCURRENCY = {"load": 1, "wait": 8, "control": 4}
IMPORTING = "importing torch and transformers"


@dataclass(frozen=True)
class Description:
    """What a manager that finds this engine needs to adopt it; ``memo`` is what its predecessor gave to ``renew``."""

    rank: int
    epoch: Epoch
    expert_map: ExpertMap | None
    memo: Memo
    hello: Hello
    ready: Ready | None
    keys: Keys
    group: groups.RankGroup


class EngineActor:
    """One DP rank. ``lease_s`` seconds after the last ``renew`` it removes all groups of ``owner`` and ends itself.

    With ``meekly`` it loads at a lower priority than others compute with, since it joins a group that serves.
    """

    def __init__(
        self,
        group: groups.RankGroup,
        owner: str,
        config: EngineConfig,
        keys: Keys,
        lease_s: float,
        meekly: bool = False,
    ) -> None:
        rank = group.rank
        logs.begin(f"dp_rank_{rank}")
        self._rank = rank
        self._group = group
        self._owner = owner
        self._config = config
        self._keys = keys
        self._doing = "connected"
        self._ready: Ready | None = None
        self._core: EngineCore | None = None
        # One thread for all of torch: OpenMP keeps a pool of workers for each thread that ever computed, and lets the
        # workers sleep at every barrier when there are more of them than cores.
        self._thread = ThreadPoolExecutor(1, "engine")
        self._loader = ThreadPoolExecutor(1, "loader", priority.stand_back) if meekly else self._thread
        self._memo = Memo()
        self._ended = threading.Event()
        self._cause = ""
        self._lease_s, self._lease_until = lease_s, time.monotonic() + lease_s
        # What is imported stays: to look through it for garbage, time and again, is a quarter of what importing costs.
        gc.disable()
        threading.Thread(target=self._end_with_lease, name="lease", daemon=True).start()

    def __repr__(self) -> str:
        return f"dp_rank_{self._rank}"

    # --- start-up --------------------------------------------------------------------------------------------------

    @ray.method(concurrency_group="control")
    def hello(self) -> Hello:
        return self._hello()

    def _hello(self) -> Hello:
        context = ray.get_runtime_context()
        devices = context.get_accelerator_ids().get("GPU", [])
        return Hello(
            rank=self._rank,
            node_id=context.get_node_id(),
            ip=ray.util.get_node_ip_address(),
            pid=os.getpid(),
            devices=tuple(devices),
        )

    @ray.method(concurrency_group="control")
    def progress(self) -> str:
        """What the engine is doing now, for people."""
        return self._doing

    @ray.method(concurrency_group="load")
    def inspect(self) -> Shape:
        """The model's MoE layers and experts, and the slots that a rank has for them. Reads no weights."""
        return self._loader.submit(self._inspect).result()

    def _inspect(self) -> Shape:
        self._report(IMPORTING)
        from actors.engine.model import summarize

        self._report("reading the model's configuration")
        summary = summarize(self._config.model)
        slots = self._config.expert_slots or -(-summary.num_experts // self._config.min_data_parallel_size)
        return Shape(summary.num_moe_layers, summary.num_experts, slots)

    @ray.method(concurrency_group="load")
    def load(self, index: int, expert_map: ExpertMap) -> Ready:
        """Reads the weights of member ``index`` by ``expert_map``, allocates the KV cache, binds the sockets."""
        started = time.monotonic()
        runner = self._loader.submit(self._load, index, expert_map).result()
        # Its threads for torch go with it.
        if self._loader is not self._thread:
            self._loader.shutdown()
        gc.freeze()
        gc.enable()
        self._core = self._thread.submit(self._open, runner).result()
        self._ready = Ready(
            rank=self._rank,
            address=self._core.mailbox.address,
            kv_blocks=self._core.kv_blocks,
            block_size=self._config.block_size,
            max_model_len=self._config.max_model_len,
            load_s=time.monotonic() - started,
        )
        self._report("ready")
        return self._ready

    def _load(self, index: int, expert_map: ExpertMap) -> ModelRunner:
        if "torch" not in sys.modules:
            self._report(IMPORTING)
        from actors.engine.runner import ready

        return ready(index, expert_map, self._config, self._report)

    def _open(self, runner: ModelRunner) -> EngineCore:
        from actors.engine.core import EngineCore
        from actors.engine.mailbox import Mailbox

        # Not while loading: threads, those of ZeroMQ too, have the priority of the thread that started them.
        return EngineCore(self._rank, self._config, runner, Mailbox(ray.util.get_node_ip_address(), self._keys))

    @ray.method(concurrency_group="load")
    def connect_coordinator(self, address: str) -> None:
        """Connects a rank that does not serve yet."""
        self._loaded().mailbox.connect_coordinator(address)

    # --- the next epoch --------------------------------------------------------------------------------------------

    @ray.method(concurrency_group="control")
    def open_store(self) -> str:
        """Hosts the rendezvous of the next epoch's exchange; returns ``ip:port``. The former one's ends."""
        from torch.distributed import TCPStore

        ip = ray.util.get_node_ip_address()
        # Bound before anybody is told of it, on a port the kernel chose.
        self._store = TCPStore(ip, 0, is_master=True, wait_for_workers=False)
        return f"{ip}:{self._store.port}"

    @ray.method(concurrency_group="wait")
    def prepare(self, epoch: Epoch, expert_map: ExpertMap, store: str) -> None:
        """See ``EngineCore.prepare``: connects the exchange of the epoch that comes next, while this one goes on."""
        self._loaded().prepare(epoch, expert_map, store)

    @ray.method(concurrency_group="wait")
    def prefetch(self, timeout_s: float) -> int:
        """Reads the experts that the prepared epoch wants here; how many. Raises TimeoutError after ``timeout_s``."""
        loaded: Future[int] = Future()
        self._loaded().prefetch(loaded.set_result)
        return loaded.result(timeout_s)

    @ray.method(concurrency_group="wait")
    def arm(self, epoch: int, timeout_s: float) -> float:
        """Votes for the prepared ``epoch`` (a joiner begins it); after the switch, the seconds this rank stood still.

        Raises TimeoutError when there was none within ``timeout_s``.
        """
        core = self._loaded()
        switched: Future[float] = Future()
        if core.epoch == NO_EPOCH:
            self._thread.submit(self._run, epoch, switched)
        else:
            core.arm(epoch, switched.set_result)
        return switched.result(timeout_s)

    @ray.method(concurrency_group="wait")
    def disarm(self, epoch: int) -> int:
        """Votes for ``epoch`` no more, and drops what was prepared; the number of the epoch this rank is in then."""
        core = self._loaded()
        self._disarm(core, epoch)
        return core.epoch.number

    @staticmethod
    def _disarm(core: EngineCore, epoch: int) -> None:
        withdrawn: Future[None] = Future()
        core.disarm(epoch, lambda: withdrawn.set_result(None))
        withdrawn.result()

    def _report(self, doing: str) -> None:
        self._doing = doing
        logger.info("%s", doing)

    def _loaded(self) -> EngineCore:
        if self._core is None:
            raise RuntimeError(f"dp_rank_{self._rank} has not loaded its model: call load first")
        return self._core

    # --- serving ---------------------------------------------------------------------------------------------------

    def _run(self, epoch: int, entered: Future[float]) -> None:
        try:
            core = self._loaded()
            core.enter(epoch)
            entered.set_result(0.0)
            core.run()
            self._cause = "stopped"
        except Exception as error:
            logger.exception("the engine's loop ended")
            self._cause = f"{type(error).__name__}: {error}"
        self._ended.set()

    @ray.method(concurrency_group="wait")
    def wait(self, timeout_s: float) -> str | None:
        """Why the engine's loop ended; None if it has not within ``timeout_s``. A dead process raises instead."""
        return self._cause if self._ended.wait(timeout_s) else None

    @ray.method(concurrency_group="control")
    def follow_coordinator(self, address: str) -> None:
        """Moves to a coordinator that replaced the former one, and tells it where this rank stands."""
        core = self._core
        if core is not None:  # else it will be connected before it joins
            core.mailbox.post(lambda: core.announce_to(address))

    @ray.method(concurrency_group="control")
    def renew(self, lease_s: float, memo: Memo) -> None:
        """Extends the lease: it runs out ``lease_s`` from now. ``memo`` is kept for the manager's successor."""
        self._lease_s, self._lease_until = lease_s, time.monotonic() + lease_s
        self._memo = memo

    @ray.method(concurrency_group="wait")
    def describe(self) -> Description:
        """Where this rank stands, for a manager that finds it. What its predecessor had prepared is dropped first."""
        core = self._core
        if core is not None and core.epoch != NO_EPOCH:
            self._disarm(core, core.epoch.number + 1)
        return Description(
            rank=self._rank,
            epoch=NO_EPOCH if core is None else core.epoch,
            expert_map=None if core is None else core.expert_map,
            memo=self._memo,
            hello=self._hello(),
            ready=self._ready,
            keys=self._keys,
            group=self._group,
        )

    @ray.method(concurrency_group="control")
    def chosen(self) -> list[list[int]]:
        """How often this rank's tokens chose each expert of each MoE layer, since its start."""
        return self._loaded().chosen()

    @ray.method(concurrency_group="control")
    def status(self) -> dict[str, object]:
        """The engine's counters, for people and tests."""
        core = self._core
        return {"rank": self._rank, "doing": self._doing} | (
            {"epoch": core.epoch.number} | core.status() if core is not None else {"epoch": 0}
        )

    # --- the end ---------------------------------------------------------------------------------------------------

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Ends the loop and the process; what the engine holds is given back by the process's own end."""
        threading.Thread(target=self._exit, name="exit", daemon=True).start()

    def _exit(self) -> None:
        if self._core is not None:
            self._core.stop()
            self._ended.wait(2.0)
        # The actor's answer to ``stop`` must be on its way before the process goes.
        time.sleep(0.1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def _end_with_lease(self) -> None:
        doomed: list[str] | None = None
        while (left := self._lease_until - time.monotonic()) > 0:
            if left > self._lease_s / 2:
                doomed = None
            elif doomed is None:
                # All groups of the owner, so that one whose engine is gone already is removed as well; but none of a
                # manager that comes while the lease runs out, and makes new ones.
                doomed = [group.id for group in groups.find(self._owner)]
            time.sleep(min(0.5, self._lease_s / 8))
        logger.warning("the lease ran out: no manager renewed it; removing the placement groups of %s", self._owner)
        try:
            groups.remove_all(doomed or [])
        finally:
            os._exit(0)
