"""The actor manager: makes the expert-parallel group, keeps its lease, and takes it down.

A Serve deployment-scoped actor: Serve starts it, checks its health, recreates it and ends it with the application. What
it makes (placement groups, engine actors) is detached and leased, so that a recreated manager finds the running group
and adopts it, and nothing outlives an application that is gone by more than the lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field
from typing import Any

import msgspec
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.engine_actor import Description
from actors.engines import Engine, EngineSet, GroupError, root_cause
from actors.handshake import Handshake, Hello
from actors.membership import NO_EPOCH, Epoch
from actors.settings import GroupSettings
from actors.siblings import Siblings
from actors.sockets import Keys
from placement import groups, planner, snapshot

logger = logging.getLogger(__name__)

PROGRESS_S = 2.0
# A rank that ends takes its peers' collectives with it: wait this long for the first cause to show among the others.
ROOT_CAUSE_S = 0.5
# A group that breaks more than ``max_restarts`` times within this is given up.
RESTART_WINDOW_S = 600.0


@dataclass(frozen=True)
class Contact:
    """What a front-end needs to reach the group."""

    keys: Keys
    router: str
    publisher: str


@dataclass
class Group:
    """The state front-ends watch. ``version`` grows with each change; ``phase`` is one of ``idle``, ``placing``,
    ``launching``, ``loading``, ``joining``, ``serving``, ``restarting`` (a rank ended), and, with ``cause``, ``failed``
    (it could not be made) and ``lost`` (it broke too often)."""

    phase: str = "idle"
    cause: str = ""
    detail: str = ""
    version: int = 0
    epoch: Epoch = NO_EPOCH
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class EngineManager:
    """``settings`` is a ``GroupSettings`` as builtins, because Serve shows an actor's arguments as JSON."""

    def __init__(self, settings: dict[str, Any], siblings: Siblings | None = None) -> None:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s manager: %(message)s", force=True)
        self._settings = msgspec.convert(settings, GroupSettings)
        self._siblings = siblings or Siblings.of_this_deployment()
        self._keys = Keys.new()
        self._engines = EngineSet(self._settings, self._siblings.namespace)
        self._group = Group()
        self._coordinator: ActorHandle | None = None
        self._contact: tuple[str, str] | None = None
        self._wanted = 0
        self._refused = ""
        self._starting: asyncio.Task[None] | None = None
        self._upkeep: asyncio.Task[None] | None = None
        self._recovered = False
        self._losses: list[float] = []
        # Making and removing a group never overlap: both use the ranks' names.
        self._making = asyncio.Lock()

    def __repr__(self) -> str:
        return f"manager({self._siblings.application})"

    # --- what front-ends ask ---------------------------------------------------------------------------------------

    async def declare(self, data_parallel_size: int) -> None:
        """The declared size of the group. Starts the group if there is none; returns at once.

        A size outside the bounds never disturbs a running group: it is refused in ``status``.
        """
        await self._recover()
        smallest, largest = self._settings.min_size, self._settings.max_size
        if data_parallel_size < smallest or (largest is not None and data_parallel_size > largest):
            self._refused = (
                f"data_parallel_size={data_parallel_size} is outside {smallest} .. {largest or 'any'}: choose a size "
                "inside min_data_parallel_size .. max_data_parallel_size, or widen them"
            )
            logger.error("%s", self._refused)
            if self._group.phase == "idle":
                self._set("failed", cause=self._refused)
            return
        self._refused = ""
        if self._group.phase == "serving" and data_parallel_size != len(self._engines):
            self._refused = (
                f"data_parallel_size={data_parallel_size} differs from the running {len(self._engines)} ranks: "
                "resizing a running group is not built yet; deploy the application anew"
            )
            logger.error("%s", self._refused)
            return
        self._wanted = data_parallel_size
        if self._group.phase in ("idle", "failed", "lost") and self._starting is None:
            self._starting = asyncio.create_task(self._start(data_parallel_size))

    async def contact(self) -> Contact:
        """How to reach the group, once it serves. Raises GroupError with the root cause if it can't be made."""
        await self._recover()
        while True:
            group = self._group
            if group.phase in ("failed", "lost"):
                raise GroupError(group.cause)
            if group.phase == "serving" and self._contact is not None:
                return Contact(self._keys, *self._contact)
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
        return {
            "phase": group.phase,
            "cause": group.cause,
            "detail": group.detail,
            "version": group.version,
            "epoch": group.epoch.number,
            "data_parallel_size": len(self._engines),
            "wanted_data_parallel_size": self._wanted,
            "refused": self._refused,
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
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
        async with self._making:
            await self._tear_down()
        if self._group.phase != "idle":
            self._set("idle")

    # --- the start -------------------------------------------------------------------------------------------------

    async def _start(self, size: int) -> None:
        async with self._making:
            await self._start_or_fail(size)

    async def _start_or_fail(self, size: int) -> None:
        try:
            await asyncio.wait_for(self._start_group(size), self._settings.start_timeout_s)
        except asyncio.TimeoutError:
            await self._fail(
                f"the group was not ready after start_timeout_s={self._settings.start_timeout_s}: "
                f"{self._group.phase}, {self._group.detail}; raise start_timeout_s or see the ranks' logs"
            )
        except asyncio.CancelledError:
            await self._tear_down()
            raise
        except Exception as error:
            await self._fail(root_cause(error))
        finally:
            self._starting = None

    async def _fail(self, cause: str) -> None:
        logger.error("the group could not be started: %s", cause)
        await self._tear_down()
        self._set("failed", cause=cause)

    async def _start_group(self, size: int) -> None:
        self._set("placing", f"{size} ranks")
        placing = asyncio.ensure_future(asyncio.to_thread(self._place, size))
        try:
            placed = await asyncio.shield(placing)
        except asyncio.CancelledError:
            # The thread goes on; what it makes must be there to be removed. It ends by placement_timeout_s.
            await asyncio.wait([placing])
            raise

        self._set("launching", f"{size} ranks")
        self._engines.launch(placed, self._keys)
        self._upkeep = self._upkeep or asyncio.create_task(self._keep())
        shake = Handshake.expecting([(g.rank, g.node_id, g.local_rank) for g in placed])
        watching = asyncio.create_task(self._report_progress(shake))
        try:
            hellos: list[Hello] = await self._engines.all(lambda e: e.handle.hello.remote(), "starting its process")
            for hello in hellos:
                shake.hello(hello)
            self._set("loading", shake.progress())
            order = {engine.rank: index for index, engine in enumerate(self._engines)}
            async for ready in self._engines.each(lambda e: e.handle.load.remote(order[e.rank], size), "loading"):
                shake.ready(ready)
                self._engines.of(ready.rank).ready = ready
                logger.info("%s", shake.progress())
        finally:
            watching.cancel()

        self._set("joining", "process group")
        epoch = Epoch(number=self._group.epoch.number + 1, members=self._engines.members())
        store = await self._engines.of(epoch.founder).handle.open_store.remote()
        router, publisher = await self._open_coordinator(epoch)
        await self._engines.all(lambda e: e.handle.join.remote(epoch, store, router), "joining the process group")
        self._serve(epoch, (router, publisher))

    def _place(self, size: int) -> list[groups.RankGroup]:
        """The ranks' placement groups: the caller's where it handed in some, else our own."""
        settings = self._settings
        request = settings.placement.with_size(size)
        if settings.placement_groups is not None:
            handed = [(groups.handle(id_), local_rank) for id_, local_rank in settings.placement_groups.items()]
            return groups.adopt(handed, request, settings.placement_timeout_s)
        plan = planner.plan(snapshot.take(), request)
        if isinstance(plan, planner.NoFit):
            raise GroupError(str(plan))
        return groups.apply(plan, settings.placement_timeout_s, self._siblings.namespace)

    def _serve(self, epoch: Epoch, contact: tuple[str, str]) -> None:
        for engine in self._engines:
            engine.watch = asyncio.create_task(self._watch_rank(engine))
        self._contact = contact
        self._group.epoch = epoch
        self._set("serving", f"{len(self._engines)} ranks in epoch {epoch.number}")

    async def _open_coordinator(self, epoch: Epoch) -> tuple[str, str]:
        """The coordinator's (router, publisher) addresses, after it took over ``epoch``."""
        self._coordinator = await self._siblings.coordinator()
        addresses: tuple[str, str] = await self._coordinator.open.remote(self._keys)
        await self._coordinator.set_epoch.remote(epoch)
        return addresses

    async def _report_progress(self, shake: Handshake) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            for engine in list(self._engines):
                try:
                    shake.ranks[engine.rank].doing = await engine.handle.progress.remote()
                except RayError:
                    continue  # its death ends the start through the call that waits for it
            self._group.detail = shake.progress()
            logger.info("%s", shake.progress())

    # --- a successor -----------------------------------------------------------------------------------------------

    async def _recover(self) -> None:
        """Once, before anything else is answered: adopts the group that a former manager left, or removes it."""
        async with self._making:
            if not self._recovered:
                await self._adopt_or_remove()
                self._recovered = True

    async def _adopt_or_remove(self) -> None:
        found: list[tuple[ActorHandle, Description]] = []
        for handle in self._siblings.engines():
            try:
                found.append((handle, await asyncio.wait_for(handle.describe.remote(), 5.0)))
            except (RayError, asyncio.TimeoutError):
                ray.kill(handle)
        self._engines.adopt(Engine(word.rank, handle, word.group, word.ready) for handle, word in found)
        held = {word.group.id for _, word in found}
        placed = await asyncio.to_thread(groups.find, self._siblings.namespace)
        await asyncio.to_thread(groups.remove_all, [group.id for group in placed if group.id not in held])
        if not found:
            return
        epoch = max((word.epoch for _, word in found), key=lambda epoch: epoch.number)
        if epoch.number == 0 or {word.epoch for _, word in found} != {epoch} or len(found) != len(epoch.members):
            logger.warning(
                "removing what a former manager left of an unfinished group: ranks %s",
                [engine.rank for engine in self._engines],
            )
            await self._tear_down()
            return
        self._keys = found[0][1].keys
        self._wanted = len(found)
        self._upkeep = asyncio.create_task(self._keep())
        addresses = await self._open_coordinator(epoch)
        for engine in self._engines:
            await engine.handle.connect_coordinator.remote(addresses[0])
        logger.info("adopted the running group of epoch %d with ranks %s", epoch.number, epoch.ranks)
        self._serve(epoch, addresses)

    # --- while it serves -------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Renews the ranks' leases and follows a coordinator that Serve recreated."""
        while True:
            try:
                self._engines.renew()
                if self._group.phase == "serving":
                    await self._follow_coordinator()
            except Exception:
                logger.exception("upkeep failed; trying again")
            await asyncio.sleep(min(1.0, self._settings.lease_s / 4))

    async def _follow_coordinator(self) -> None:
        assert self._coordinator is not None
        try:
            addresses = await self._coordinator.open.remote(self._keys)
        except RayError:
            addresses = await self._open_coordinator(self._group.epoch)
        if addresses != self._contact:
            logger.info("the coordinator moved to %s", addresses[0])
            self._contact = addresses
            for engine in self._engines:
                engine.handle.connect_coordinator.remote(addresses[0])
            self._set("serving", self._group.detail)

    async def _watch_rank(self, engine: Engine) -> None:
        """Waits for the end of a rank, then declares the group lost with the cause that came first."""
        try:
            cause = None
            while cause is None:
                cause = await engine.handle.wait.remote(30.0)
            # A survivor of a broken collective only knows that a peer is gone: give the peer's own death time to show.
            await asyncio.sleep(ROOT_CAUSE_S)
        except RayError as error:
            cause = root_cause(error)
        if self._group.phase == "serving":
            self._starting = asyncio.create_task(self._replace_group(f"dp_rank_{engine.rank} ended: {cause}"))

    async def _replace_group(self, cause: str) -> None:
        """A rank is gone and its peers can't step without it: makes the group anew, unless that happened too often.

        Clients keep their requests meanwhile, and continue them in the new epoch with the tokens they have.
        """
        logger.error("the group broke: %s", cause)
        now = asyncio.get_running_loop().time()
        self._losses = [loss for loss in self._losses if now - loss < RESTART_WINDOW_S] + [now]
        again = len(self._losses) <= self._settings.max_restarts
        self._set("restarting" if again else "lost", cause=cause)
        async with self._making:
            await self._tear_down()
            if again:
                await self._start_or_fail(self._wanted)
        self._starting = None

    def _set(self, phase: str, detail: str = "", cause: str = "") -> None:
        group = self._group
        group.phase, group.detail, group.cause = phase, detail, cause
        group.version += 1
        group.changed.set()
        group.changed = asyncio.Event()
        logger.info("%s %s", phase, detail or cause)

    # --- the end ---------------------------------------------------------------------------------------------------

    async def _tear_down(self) -> None:
        """Ends all engines and removes the groups we own."""
        self._contact = None
        await self._engines.end()
        # By their owner's mark, so that groups whose engine was never launched go too.
        await asyncio.to_thread(self._remove_groups)

    def _remove_groups(self) -> None:
        groups.remove_all(group.id for group in groups.find(self._siblings.namespace))


Manager = ray.remote(EngineManager)
