"""Carries out one transition: each effect of ``transition.TRANSITIONS``, on Ray's actors and placement groups."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.exceptions import RayError

from actors.coordination import Coordination
from actors.engine.experts import planner as experts
from actors.engines import Engine, EngineSet, GroupError, all_of, each, root_cause
from actors.group import Group
from actors.handshake import Handshake, Hello
from actors.membership import Epoch
from actors.settings import GroupSettings
from actors.sockets import Keys
from actors.transition import UNDOABLE, Effect, Event, Operation
from placement import groups, planner, snapshot

logger = logging.getLogger(__name__)

PROGRESS_S = 2.0
POLL_S = 0.05
# How long ranks that left wait for their front-ends to take the requests away.
PARTING_S = 2.0


@dataclass
class Resources:
    """What transitions of one group work with. ``owner`` marks its placement groups."""

    settings: GroupSettings
    owner: str
    keys: Keys
    engines: EngineSet
    coordination: Coordination
    group: Group


class Change:
    """One transition of ``resources.group``. ``load`` (tokens, float ``[layers, experts]``) re-places experts by it."""

    def __init__(self, operation: Operation, resources: Resources, load: np.ndarray | None = None) -> None:
        self.operation = operation
        self._settings = resources.settings
        self._resources = resources
        self._engines = resources.engines
        self._group = resources.group
        self._load = load
        self._cancelled: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._leaving = [engine for engine in self._engines if engine.rank in operation.retire]
        self._staying = [engine for engine in self._engines if engine.rank not in operation.retire]
        self._placed: list[groups.RankGroup] = []
        self._joiners: list[Engine] = []
        self._epoch = Epoch(self._group.epoch.number, ())
        self._layout: experts.Layout | None = None
        self._effects: dict[Effect, tuple[Callable[[], Awaitable[Event]], str | None]] = {
            # With the name of the setting that bounds it, if it is not bounded by itself.
            Effect.PLACE: (self._place, None),
            Effect.LAUNCH: (self._launch, "start_timeout_s"),
            Effect.JOIN: (self._join, "start_timeout_s"),
            Effect.PREFETCH: (self._prefetch, "start_timeout_s"),
            Effect.DRAIN: (self._drain, None),
            Effect.ARM: (self._arm, "switch_timeout_s"),
            Effect.PUBLISH: (self._publish, None),
            Effect.RETIRE: (self._retire, None),
            Effect.UNDO: (self._undo, None),
        }

    async def run(self) -> Operation:
        """To the end, whichever it is."""
        effect = self._take(Event.BEGIN)
        while effect is not None:
            event, error = await self._attempt(effect)
            effect = self._take(event, error)
        return self.operation

    def cancel(self, why: str) -> bool:
        """Rolls back; False when it is too late for that."""
        if self.operation.phase not in UNDOABLE or self._cancelled.done():
            return False
        self._cancelled.set_result(why)
        return True

    # --- one effect after the other --------------------------------------------------------------------------------

    def _take(self, event: Event, error: str = "") -> Effect | None:
        before = self.operation
        self.operation, effect = before.take(event, time.monotonic(), error)
        if error:
            logger.error("operation %s failed while %s: %s", before.id, before.phase.value, error)
        logger.info("operation %s: %s", before.id, self.operation.phase.value)
        self._show("")
        return effect

    def _show(self, progress: str) -> None:
        self.operation = self.operation.shown(progress)
        if self.operation.kind == "start" and not self.operation.done:
            self._group.set(self.operation.phase.value, progress)
        else:
            self._group.touch()

    async def _attempt(self, effect: Effect) -> tuple[Event, str]:
        """Carries out ``effect``, unless it takes too long, a joiner ends, or the caller cancels."""
        run, limit = self._effects[effect]
        task = asyncio.ensure_future(run())
        waits: list[asyncio.Future[Any]] = [task]
        if self.operation.phase in UNDOABLE:
            waits.append(self._cancelled)
            waits += [engine.watch for engine in self._joiners if engine.watch is not None]
        timeout_s = None if limit is None else getattr(self._settings, limit)
        try:
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result(), ""
            if self._cancelled.done():
                return Event.FAILED, self._cancelled.result()
            for engine in self._joiners:
                if engine.watch is not None and engine.watch.done():
                    return Event.FAILED, f"dp_rank_{engine.rank} ended: {engine.watch.result()}"
            progress = f", {self.operation.progress}" if self.operation.progress else ""
            return Event.FAILED, (
                f"not done after {limit}={timeout_s:g}: {self.operation.phase.value}{progress}; raise {limit} or see "
                "the ranks' logs"
            )
        except Exception as error:
            if self.operation.phase not in UNDOABLE:
                logger.exception("%s failed", effect.value)  # nothing is left to be undone: go on
                return Event.DONE, ""
            return Event.FAILED, root_cause(error)
        finally:
            task.cancel()
            await asyncio.wait([task])

    # --- making --------------------------------------------------------------------------------------------------

    async def _place(self) -> Event:
        if self._leaving:
            await self._resources.coordination.set_leaving(self.operation.retire)
        count = self.operation.to_size - len(self._staying)
        self._show(f"{count} ranks")
        if count:
            placing = asyncio.ensure_future(asyncio.to_thread(self._place_groups, count))
            try:
                self._placed = await asyncio.shield(placing)
            except asyncio.CancelledError:
                # The thread goes on; what it makes must be there to be removed. It ends by placement_timeout_s.
                await asyncio.wait([placing])
                raise
        return Event.DONE

    def _place_groups(self, count: int) -> list[groups.RankGroup]:
        """The joiners' placement groups: the caller's where it handed in some, else our own."""
        settings = self._settings
        existing = [engine.group.placed for engine in self._engines]
        request = settings.placement.with_size(len(existing) + count, existing)
        if settings.placement_groups is not None:
            used = {engine.group.id for engine in self._engines}
            handed = [(groups.handle(id_), rank) for id_, rank in settings.placement_groups.items() if id_ not in used]
            return groups.adopt(handed, request, settings.placement_timeout_s)
        plan = planner.plan(snapshot.take(), request)
        if isinstance(plan, planner.NoFit):
            raise GroupError(str(plan))
        return groups.apply(plan, settings.placement_timeout_s, self._resources.owner)

    async def _launch(self) -> Event:
        ranks = [engine.rank for engine in self._staying] + [group.rank for group in self._placed]
        if not self._placed:
            await self._plan_experts(sorted(ranks), await self._shape_of_group())
            return Event.DONE
        self._show(f"{len(self._placed)} ranks")
        self._joiners = self._engines.launch(self._placed, self._resources.keys, meekly=bool(self._staying))
        for engine in self._joiners:
            engine.watch = asyncio.create_task(engine.ended())
        shake = Handshake.expecting([(g.rank, g.node_id, g.local_rank) for g in self._placed])
        watching = asyncio.create_task(self._report_progress(shake))
        try:
            hellos: list[Hello] = await all_of(self._joiners, lambda e: e.handle.hello.remote(), "starting its process")
            for hello in hellos:
                shake.hello(hello)
            self._show(shake.progress())
            await self._plan_experts(sorted(ranks), await self._shape_of_group())
            assert self._layout is not None
            order, expert_map = self._layout
            loading = each(self._joiners, lambda e: e.handle.load.remote(order.index(e.rank), expert_map), "loading")
            async for ready in loading:
                shake.ready(ready)
                self._engines.of(ready.rank).ready = ready
                self._show(shake.progress())
        finally:
            watching.cancel()
        return Event.DONE

    async def _shape_of_group(self) -> experts.Shape:
        """That of the group that is there; for a first one, joiners read the model's configuration."""
        if self._group.layout is not None:
            expert_map = self._group.layout[1]
            return experts.Shape(expert_map.num_layers, expert_map.num_experts, expert_map.num_slots)
        shapes = await all_of(self._joiners, lambda e: e.handle.inspect.remote(), "reading the model's config")
        shape: experts.Shape = shapes[0]
        return shape

    async def _plan_experts(self, ranks: list[int], shape: experts.Shape) -> None:
        expert_map = await asyncio.to_thread(experts.plan, shape, ranks, self._group.layout, self._load)
        self._layout = (tuple(ranks), expert_map)

    async def _report_progress(self, shake: Handshake) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            for engine in self._joiners:
                try:
                    shake.ranks[engine.rank].doing = await engine.handle.progress.remote()
                except RayError:
                    continue  # its death ends the phase
            self._show(shake.progress())

    # --- getting ready beside the serving group ----------------------------------------------------------------------

    async def _join(self) -> Event:
        assert self._layout is not None
        members = sorted([*self._staying, *self._joiners], key=lambda engine: engine.rank)
        self._epoch = epoch = Epoch(self._group.epoch.number + 1, tuple(engine.member for engine in members))
        expert_map = self._layout[1]
        store = await self._engines.of(epoch.founder).handle.open_store.remote()
        await all_of(
            [*members, *self._leaving],
            lambda engine: engine.handle.prepare.remote(epoch, expert_map, store),
            "joining the next epoch's exchange",
        )
        return Event.DONE

    async def _prefetch(self) -> Event:
        timeout_s = self._settings.start_timeout_s
        moved = await all_of(self._staying, lambda e: e.handle.prefetch.remote(timeout_s), "reading experts")
        before = self._group.layout
        assert self._layout is not None
        planned = len(experts.moves(before, self._layout))
        self.operation = self.operation.counted(experts_moved=planned if before else 0)
        self._show(f"{sum(moved)} experts read by ranks that stay")
        return Event.DONE

    async def _drain(self) -> Event:
        timeout_s = self.operation.drain_timeout_s
        until = time.monotonic() + timeout_s
        while left := await self._requests_of(self._leaving):
            if time.monotonic() > until:
                logger.info("%d requests move to other ranks after drain_timeout_s=%g", left, timeout_s)
                break
            self._show(f"{left} requests on leaving ranks")
            await asyncio.sleep(POLL_S)
        return Event.DONE

    async def _requests_of(self, engines: list[Engine]) -> int:
        statuses = await all_of(engines, lambda e: e.handle.status.remote(), "draining")
        return sum(status["requests_running"] + status["requests_waiting"] for status in statuses)

    # --- the switch ------------------------------------------------------------------------------------------------

    async def _arm(self) -> Event:
        coordination, timeout_s = self._resources.coordination, self._settings.switch_timeout_s
        await coordination.open(self._resources.keys)
        while await self._connect_joiners() != coordination.addresses:
            pass  # it was replaced meanwhile
        if not self._staying:  # a first epoch: nobody is waiting for the coordinator to learn of it
            await coordination.set_epoch(self._epoch)
        pauses = await all_of(
            [*self._joiners, *self._staying, *self._leaving],
            lambda engine: engine.handle.arm.remote(self._epoch.number, timeout_s),
            "switching",
        )
        self.operation = self.operation.counted(pause_s=max(pauses))
        return Event.DONE

    async def _connect_joiners(self) -> tuple[str, str] | None:
        addresses = self._resources.coordination.addresses
        assert addresses is not None
        await all_of(self._joiners, lambda e: e.handle.connect_coordinator.remote(addresses[0]), "connecting")
        return addresses

    async def _publish(self) -> Event:
        await self._resources.coordination.set_epoch(self._epoch)
        self._group.epoch, self._group.layout = self._epoch, self._layout
        self.operation = self.operation.counted(epoch=self._epoch.number)
        return Event.DONE

    async def _retire(self) -> Event:
        until = time.monotonic() + PARTING_S
        try:
            while time.monotonic() < until and await self._requests_of(self._leaving):
                await asyncio.sleep(POLL_S)
        except GroupError as error:
            logger.warning("a rank that left did not wait to be ended: %s", error)
        await self._end(self._leaving)
        return Event.DONE

    # --- back to the old epoch ---------------------------------------------------------------------------------------

    async def _undo(self) -> Event:
        if self._epoch.members and self._staying and self._epoch.number in await self._disarm():
            return Event.SWITCHED
        try:
            if self._leaving:
                await self._resources.coordination.set_leaving(())
        finally:
            await self._end(self._joiners)
        return Event.DONE

    async def _disarm(self) -> list[int]:
        """The epochs that the members are in, once none of them votes any more; empty when the group breaks.

        A member that is slow to answer may be in the step that decides: silence is no answer.
        """
        members, epoch = [*self._staying, *self._leaving], self._epoch.number
        asked = asyncio.ensure_future(
            all_of(members, lambda engine: engine.handle.disarm.remote(epoch), "going back to the old epoch")
        )
        ends = [engine.watch for engine in members if engine.watch is not None]
        try:
            await asyncio.wait([asked, *ends], return_when=asyncio.FIRST_COMPLETED)
            return asked.result() if asked.done() else []
        except GroupError as error:
            logger.warning("a member did not go back, so the group will be made anew: %s", error)
            return []
        finally:
            asked.cancel()

    async def _end(self, engines: list[Engine]) -> None:
        """Ends engines, and removes all placement groups that no other engine holds."""
        await self._engines.end(engines)
        held = {engine.group.id for engine in self._engines}
        await asyncio.to_thread(self._remove_groups, held)

    def _remove_groups(self, held: set[str]) -> None:
        groups.remove_all(group.id for group in groups.find(self._resources.owner) if group.id not in held)
