"""The actor manager: makes the expert-parallel group, resizes it, keeps its lease, and takes it down.

A Serve deployment-scoped actor: Serve starts it, checks its health, recreates it and ends it with the application. What
it makes (placement groups, engine actors) is detached and leased, so that a recreated manager finds the running group
and adopts it, and nothing outlives an application that is gone by more than the lease. Whatever changes the group, the
first start included, is a transition (``transition.py``, carried out by ``change.py``), one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

import msgspec
import numpy as np
import ray

from actors import logs
from actors.change import Change, Resources
from actors.coordination import Coordination
from actors.engines import Engine, EngineSet, GroupError
from actors.expert_load import LoadWindow, imbalance
from actors.group import Contact, Group, Totals
from actors.legacy import Legacy
from actors.operations import Operations, impossible, outside, refusal, shown
from actors.settings import GroupSettings, Memo
from actors.siblings import Siblings
from actors.sockets import Keys
from actors.transition import Operation
from placement import groups

logger = logging.getLogger(__name__)

# A rank that ends takes its peers' collectives with it: wait this long for the first cause to show among the others.
ROOT_CAUSE_S = 0.5
# A group that breaks more than ``max_restarts`` times within this is given up.
RESTART_WINDOW_S = 600.0


class EngineManager:
    """``settings`` is a ``GroupSettings`` as builtins, because Serve shows an actor's arguments as JSON."""

    def __init__(self, settings: dict[str, Any], siblings: Siblings | None = None) -> None:
        logs.begin("manager")
        self._settings = msgspec.convert(settings, GroupSettings)
        self._siblings = siblings or Siblings.of_this_deployment()
        self._engines = EngineSet(self._settings, self._siblings.namespace)
        self._group = Group()
        self._coordination = Coordination(self._siblings)
        self._resources = Resources(
            self._settings, self._siblings.namespace, Keys.new(), self._engines, self._coordination, self._group
        )
        self._memo = Memo()
        self._refused = ""
        self._operations = Operations()
        self._work: asyncio.Task[None] | None = None
        self._repair: asyncio.Task[None] | None = None
        self._totals = Totals()
        self._upkeep: list[asyncio.Task[None]] = []
        self._followed: tuple[str, str] | None = None
        self._load = LoadWindow(self._engines, self._group)
        self._imbalance: float | None = None
        self._losses: list[float] = []
        self._recovering = asyncio.Lock()
        self._recovered = False

    def __repr__(self) -> str:
        return f"manager({self._siblings.application})"

    # --- what front-ends ask ---------------------------------------------------------------------------------------

    async def declare(self, data_parallel_size: int) -> None:
        """The declared size of the group. Makes the group, or resizes it; returns at once, and the last one wins.

        What was declared before is no news: a front-end that starts again does not undo what was asked for otherwise.
        A size outside the bounds never disturbs a running group: it is refused in ``status``.
        """
        await self._recover()
        self._refused = self._outside(data_parallel_size)
        if self._refused:
            logger.error("%s", self._refused)
            if self._group.phase == "idle":
                self._group.set("failed", cause=self._refused)
            return
        if self._group.phase == "serving" and data_parallel_size == self._memo.declared:
            return
        self._memo = Memo(data_parallel_size, data_parallel_size)
        self._pursue()

    async def scale_elastic_ep(
        self,
        size: int,
        drain_timeout_s: float | None = None,
        operation_id: str | None = None,
        retire: list[int] | None = None,
    ) -> dict[str, Any]:
        """Resizes the group to ``size`` ranks, without those of ``retire`` if named, else without the highest.

        Returns the operation's state at once; with ``refused`` (``busy``, ``invalid``, ``unavailable``) and ``message``
        when it was not admitted. A known ``operation_id`` gives that operation, whatever else is asked.
        """
        await self._recover()
        if known := self._operations.of(operation_id):
            return shown(known)
        if refused := self._not_now():
            return refused
        ranks = [engine.rank for engine in self._engines]
        if unfit := self._outside(size):
            return refusal("invalid", unfit)
        if refused := impossible(size, ranks, retire or ()):
            return refused
        leaving = tuple(sorted(set(retire))) if retire else tuple(ranks[size:])
        self._memo = Memo(self._memo.declared, size)
        operation = self._operation("scale", size, leaving, drain_timeout_s, operation_id)
        self._begin(operation)
        return shown(operation)

    async def rebalance_experts(self, operation_id: str | None = None) -> dict[str, Any]:
        """Places the experts by the load measured lately; otherwise like ``scale_elastic_ep``."""
        await self._recover()
        if known := self._operations.of(operation_id):
            return shown(known)
        tokens = await self._load.read()
        if refused := self._not_now():
            return refused
        if tokens is None:
            return refusal("invalid", "no expert was chosen lately, so there is no load to balance by: send requests")
        operation = self._operation("rebalance", len(self._engines), (), None, operation_id)
        self._begin(operation, tokens)
        return shown(operation)

    async def cancel(self, operation_id: str) -> dict[str, Any]:
        """Rolls an operation back, if it can be. Like ``scale_elastic_ep``."""
        return self._operations.cancel(operation_id)

    async def contact(self) -> Contact:
        """How to reach the group, once it serves. Raises GroupError with the root cause if it can't be made."""
        await self._recover()
        while True:
            group, addresses = self._group, self._coordination.addresses
            if group.phase in ("failed", "lost"):
                raise GroupError(group.cause)
            if group.phase == "serving" and addresses is not None:
                return Contact(self._resources.keys, *addresses)
            await group.changed.wait()

    async def watch(self, version: int, timeout_s: float = 10.0) -> dict[str, Any]:
        """``status()`` as soon as the state is newer than ``version``, or after ``timeout_s``."""
        await self._recover()
        if self._group.version == version:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._group.changed.wait(), timeout_s)
        return await self.status()

    async def status(self) -> dict[str, Any]:
        group = self._group
        newest = self._operations.newest
        return {
            "phase": group.phase,
            "cause": group.cause,
            "detail": group.detail,
            "version": group.version,
            "epoch": group.epoch.number,
            "data_parallel_size": len(group.epoch.members) if group.phase == "serving" else len(self._engines),
            "wanted_data_parallel_size": self._memo.wanted,
            "refused": self._refused,
            "imbalance": self._imbalance,
            "operation": None if newest is None else shown(newest),
            "totals": asdict(self._totals),
            "ranks": [
                {"rank": e.rank, "node_id": e.group.node_id, "local_rank": e.group.local_rank}
                | (
                    {"address": e.ready.address, "kv_blocks": e.ready.kv_blocks, "load_s": e.ready.load_s}
                    if e.ready
                    else {}
                )
                for e in self._engines
            ],
        }

    async def stop(self) -> None:
        """Removes everything that was made. Does nothing the second time."""
        if self._repair is not None:
            self._repair.cancel()
        await self._interrupt("the application ends")
        for task in self._upkeep:
            task.cancel()
        self._upkeep = []
        await self._tear_down()
        if self._group.phase != "idle":
            self._group.set("idle")

    # --- admitting -------------------------------------------------------------------------------------------------

    def _outside(self, size: int) -> str:
        return outside(size, self._settings.min_size, self._settings.max_size)

    def _not_now(self) -> dict[str, Any] | None:
        if busy := self._operations.busy():
            return busy
        if self._group.phase != "serving" or self._work is not None or self._repair is not None:
            cause = f": {self._group.cause}" if self._group.cause else ""
            return refusal("unavailable", f"the group is {self._group.phase}{cause}; it must serve to be changed")
        return None

    def _operation(
        self, kind: str, size: int, retire: tuple[int, ...], drain_timeout_s: float | None, id_: str | None = None
    ) -> Operation:
        return Operation(
            id=id_ or f"{kind}-{uuid.uuid4().hex[:12]}",
            kind=kind,
            from_size=len(self._engines),
            to_size=size,
            retire=retire,
            drain_timeout_s=self._settings.drain_timeout_s if drain_timeout_s is None else drain_timeout_s,
        )

    # --- carrying out ----------------------------------------------------------------------------------------------

    def _pursue(self) -> None:
        """Goes after the wanted size, unless something is under way; that does it again at its end."""
        wanted, phase = self._memo.wanted, self._group.phase
        if self._work is not None or self._repair is not None:
            return
        if phase in ("idle", "failed", "lost"):
            self._begin(self._operation("start", wanted, (), None))
        elif phase == "serving" and wanted != len(self._engines):
            ranks = [engine.rank for engine in self._engines]
            self._begin(self._operation("scale", wanted, tuple(ranks[wanted:]), None))

    def _begin(self, operation: Operation, load: np.ndarray | None = None) -> None:
        change = self._operations.running = Change(operation, self._resources, load)
        self._work = asyncio.create_task(self._carry_out(change))

    async def _carry_out(self, change: Change) -> None:
        self._keep_up()
        wanted = self._memo.wanted
        try:
            operation = await change.run()
        finally:
            self._work = None
            self._operations.end()
        self._totals.add(operation)
        if operation.error:
            self._roll_back(operation, wanted)
        else:
            for engine in self._engines:
                self._watch(engine)
            self._group.set("serving", f"{len(self._engines)} ranks in epoch {operation.epoch}")
        if not operation.error or self._memo.wanted != wanted:
            self._pursue()

    def _roll_back(self, operation: Operation, wanted: int) -> None:
        if operation.kind == "start":
            self._group.set("failed", cause=operation.error)
            return
        if self._memo.wanted == wanted:  # else something else was declared meanwhile
            self._refused = (
                f"{operation.kind} to {operation.to_size} ranks: {operation.failed_phase}: {operation.error}"
            )
            self._memo = Memo(self._memo.declared, len(self._engines))
        self._group.touch()

    async def _interrupt(self, why: str) -> None:
        """Ends what is under way, whatever it is."""
        if self._operations.running is not None:
            self._operations.running.cancel(why)
        if self._work is not None and self._work is not asyncio.current_task():
            with contextlib.suppress(Exception):
                await self._work

    # --- a successor -----------------------------------------------------------------------------------------------

    async def _recover(self) -> None:
        """Once, before anything else is answered: adopts the group that a former manager left, or removes it."""
        async with self._recovering:
            if not self._recovered:
                await self._adopt_or_remove()
                self._recovered = True

    async def _adopt_or_remove(self) -> None:
        left = await Legacy.find(self._siblings)
        self._engines.adopt(left.engines)
        if not left.whole:
            if left.engines:
                logger.warning("removing what a former manager left of an unfinished group: ranks %s", left.epoch.ranks)
            await self._tear_down()
            return
        self._resources.keys, self._memo = left.keys, left.memo
        self._group.epoch, self._group.layout = left.epoch, left.layout
        self._keep_up()  # what follows may wait for a coordinator, which leases don't
        # Ranks that had left, or were about to join.
        await self._engines.end(left.strangers)
        await asyncio.to_thread(self._remove_groups, {engine.group.id for engine in self._engines})
        await self._coordination.open(left.keys)
        await self._coordination.set_epoch(left.epoch)
        await self._follow_coordinator()
        for engine in self._engines:
            self._watch(engine)
        logger.info("adopted the running group of epoch %d with ranks %s", left.epoch.number, left.epoch.ranks)
        self._group.set("serving", f"{len(self._engines)} ranks in epoch {left.epoch.number}")

    # --- while it serves -------------------------------------------------------------------------------------------

    def _keep_up(self) -> None:
        if not self._upkeep:
            # Leases are renewed whoever else is waited for: following waits while there is no coordinator.
            self._upkeep = [asyncio.create_task(self._keep(work)) for work in (self._renew, self._follow)]
            self._upkeep.append(asyncio.create_task(self._weigh()))

    async def _keep(self, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except Exception:
                logger.exception("upkeep failed; trying again")
            await asyncio.sleep(min(1.0, self._settings.lease_s / 4))

    async def _renew(self) -> None:
        self._engines.renew(self._memo)

    async def _follow(self) -> None:
        if self._group.phase == "serving":
            await self._follow_coordinator()

    async def _follow_coordinator(self) -> None:
        """Whoever noticed first that it was replaced, all ranks are told, those included that are about to join."""
        addresses = await self._coordination.open(self._resources.keys)
        if addresses != self._followed:
            self._followed = addresses
            logger.info("the coordinator is at %s", addresses[0])
            for engine in self._engines:
                engine.handle.follow_coordinator.remote(addresses[0])
            self._group.touch()

    async def _weigh(self) -> None:
        """Measures which experts are chosen, and re-places them when one rank has too many of the popular ones."""
        threshold = self._settings.rebalance_threshold
        while True:
            await asyncio.sleep(self._settings.rebalance_interval_s)
            if self._group.phase != "serving":
                continue
            tokens = await self._load.read()
            self._load.turn()
            self._imbalance = imbalance(self._group.layout, tokens)
            if threshold is not None and self._imbalance is not None and self._imbalance > threshold:
                logger.info("the experts' load is %.2f times the mean on the busiest rank", self._imbalance)
                if self._not_now() is None:
                    self._begin(self._operation("rebalance", len(self._engines), (), None), tokens)

    def _watch(self, engine: Engine) -> None:
        """Has the group made anew when this rank ends; once for each."""
        if engine.rank in self._group.epoch.ranks and not engine.guarded:
            engine.guarded = True
            engine.watch = engine.watch or asyncio.create_task(engine.ended())
            engine.watch.add_done_callback(lambda watch: self._lost(engine, watch))

    def _lost(self, engine: Engine, watch: asyncio.Task[str]) -> None:
        if not watch.cancelled() and self._group.phase == "serving" and self._repair is None:
            self._repair = asyncio.create_task(self._replace_group(engine))

    async def _replace_group(self, lost: Engine) -> None:
        """A rank is gone and its peers can't step without it: makes the group anew, unless that happened too often.

        Clients keep their requests meanwhile, and continue them in the new epoch with the tokens they have.
        """
        # A survivor of a broken collective only knows that a peer is gone: give the peer's own death time to show.
        await asyncio.sleep(ROOT_CAUSE_S)
        causes = {engine.rank: engine.cause for engine in [lost, *self._engines] if engine.cause is not None}
        first = next((rank for rank, cause in causes.items() if "PeerLost" not in cause), lost.rank)
        cause = f"dp_rank_{first} ended: {causes[first]}"
        logger.error("the group broke: %s", cause)
        now = asyncio.get_running_loop().time()
        self._losses = [loss for loss in self._losses if now - loss < RESTART_WINDOW_S] + [now]
        again = len(self._losses) <= self._settings.max_restarts
        self._group.set("restarting" if again else "lost", cause=cause)
        await self._interrupt(f"the group broke: {cause}")
        await self._tear_down()
        self._repair = None
        if again:
            self._begin(self._operation("start", self._memo.wanted, (), None))

    # --- the end ---------------------------------------------------------------------------------------------------

    async def _tear_down(self) -> None:
        """Ends all engines and removes the groups we own."""
        self._load.clear()
        self._group.layout = self._followed = None
        await self._engines.end(list(self._engines))
        # By their owner's mark, so that groups whose engine was never launched go too.
        await asyncio.to_thread(self._remove_groups, set())

    def _remove_groups(self, held: set[str]) -> None:
        groups.remove_all(group.id for group in groups.find(self._siblings.namespace) if group.id not in held)


Manager = ray.remote(EngineManager)
