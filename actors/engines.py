"""The engine actors of one group, as the manager holds them: launching, asking all at once, renewing, ending."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors import engine_actor, zygote
from actors.engine_actor import EngineActor
from actors.handshake import HandshakeError, Ready
from actors.membership import Member
from actors.settings import GroupSettings, Memo
from actors.sockets import Keys
from placement.groups import PlacementError, RankGroup

END_TIMEOUT_S = 5.0
# Variables with these endings stay where they are: Ray shows an actor's environment to everybody.
SECRETS = ("_KEY", "_TOKEN")
# Read when torch is loaded: huge pages for weights, a tenth of a step of one sequence.
CPU_ENVIRONMENT = {"THP_MEM_ALLOC_ENABLE": "1"}

# Ray takes concurrency groups only here; its types do not know.
_Engine: Any = ray.remote(concurrency_groups=engine_actor.CONCURRENCY)(EngineActor)  # type: ignore[call-overload]


class GroupError(RuntimeError):
    """The group could not be made, or was lost; the message is the root cause."""


@dataclass
class Engine:
    """One rank. ``watch`` waits for its end, and gives the cause; ``guarded``: somebody acts on that."""

    rank: int
    handle: ActorHandle
    group: RankGroup
    ready: Ready | None = None
    watch: asyncio.Task[str] | None = None
    guarded: bool = False

    @property
    def member(self) -> Member:
        """The rank as others reach it, once it is ready."""
        assert self.ready is not None
        return Member(self.rank, self.ready.address, self.group.node_id)

    @property
    def cause(self) -> str | None:
        """Why it ended, once it has."""
        return self.watch.result() if self.watch is not None and self.watch.done() else None

    async def ended(self) -> str:
        """Waits for the end of the engine, and gives its cause."""
        try:
            cause: str | None = None
            while cause is None:
                cause = await self.handle.wait.remote(30.0)
            return cause
        except RayError as error:
            return root_cause(error)


class EngineSet:
    """Engines by rank, iterated in order of rank; named ``dp_rank_<n>`` in ``namespace``."""

    def __init__(self, settings: GroupSettings, namespace: str) -> None:
        self._settings = settings
        self._namespace = namespace
        self._engines: dict[int, Engine] = {}

    def __iter__(self) -> Iterator[Engine]:
        return iter(self._engines.values())

    def __len__(self) -> int:
        return len(self._engines)

    def of(self, rank: int) -> Engine:
        return self._engines[rank]

    def launch(self, groups: Sequence[RankGroup], keys: Keys, meekly: bool) -> list[Engine]:
        """Starts an engine in each group; returns at once. ``meekly``: beside a group that serves."""
        launched = [Engine(group.rank, self._launch(group, keys, meekly), group) for group in groups]
        self.adopt(launched)
        return launched

    def adopt(self, engines: Iterable[Engine]) -> None:
        self._engines.update((engine.rank, engine) for engine in engines)
        self._engines = dict(sorted(self._engines.items()))

    def _launch(self, group: RankGroup, keys: Keys, meekly: bool) -> ActorHandle:
        settings = self._settings
        environment = {
            name: value
            for name, value in os.environ.items()
            if name.startswith(settings.env_prefixes) and not name.endswith(SECRETS)
        }
        environment["OMP_NUM_THREADS"] = str(settings.engine.threads)
        on_cpu = settings.engine.device == "cpu"
        if on_cpu:
            environment = CPU_ENVIRONMENT | environment
        handle: ActorHandle = _Engine.options(
            name=f"dp_rank_{group.rank}",
            namespace=self._namespace,
            lifetime="detached",
            max_restarts=0,
            num_cpus=settings.engine.threads if on_cpu else 1,
            num_gpus=0 if on_cpu else 1,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                group.placement_group, placement_group_bundle_index=group.control_bundle
            ),
            runtime_env={
                "env_vars": environment,
                "py_executable": zygote.command(environment, settings.engine.device, settings.engine.model),
            },
        ).remote(group, self._namespace, settings.engine, keys, settings.lease_s, meekly)
        return handle

    def renew(self, memo: Memo) -> None:
        """Extends every engine's lease, without waiting."""
        for engine in self:
            engine.handle.renew.remote(self._settings.lease_s, memo)

    async def end(self, engines: Sequence[Engine]) -> None:
        """Ends these engines, and forgets them."""
        for engine in engines:
            self._engines.pop(engine.rank, None)
            if engine.watch is not None:
                engine.watch.cancel()
        await asyncio.gather(*(_end(engine.handle) for engine in engines))


async def each(engines: Iterable[Engine], call: Callable[[Engine], Awaitable[Any]], doing: str) -> AsyncIterator[Any]:
    """Calls these engines at once and yields the answers as they come.

    Raises GroupError at the first failure, naming the rank and what it was ``doing``.
    """

    async def one(engine: Engine) -> Any:
        try:
            return await call(engine)
        except Exception as error:
            raise GroupError(f"dp_rank_{engine.rank} failed while {doing}: {root_cause(error)}") from error

    tasks = [asyncio.create_task(one(engine)) for engine in engines]
    try:
        for next_done in asyncio.as_completed(tasks):
            yield await next_done
    finally:
        for task in tasks:
            task.cancel()


async def all_of(engines: Iterable[Engine], call: Callable[[Engine], Awaitable[Any]], doing: str) -> list[Any]:
    """The answers of these engines, in any order; see ``each``."""
    return [answer async for answer in each(engines, call, doing)]


async def _end(handle: ActorHandle) -> None:
    """Asks an engine to end itself (so that its end is no crash in the logs), and kills it if it does not."""

    async def ended() -> None:
        await handle.stop.remote()
        while True:
            await handle.progress.remote()
            await asyncio.sleep(0.1)

    try:
        await asyncio.wait_for(ended(), END_TIMEOUT_S)
    except asyncio.TimeoutError:
        ray.kill(handle)
    except RayError:
        pass


def root_cause(error: BaseException) -> str:
    """The innermost message of a Ray error: what the user must read, without Ray's own framing."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return root_cause(cause)
    if isinstance(error, (GroupError, HandshakeError, PlacementError)):
        return str(error)
    return f"{type(error).__name__}: {error}"
