"""The values of ``epoch_model.py``: processes, the manager, and what is on its way between them."""

from __future__ import annotations

from typing import NamedTuple

from actors.transition import Ballot, Effect, Event, Operation, Phase
from actors.waves import EngineWaves, GroupWaves, Report, StartWave
from actors.wire import FirstRequest

# Where a process is: not there yet, between steps, stuck before its first collective, ("in", membership, key, what it
# brought) or ("dead", the membership whose first collective it had begun when it died by itself, else NONE).
ABSENT, LOOP, STALLED, DEAD = ("absent",), ("loop",), ("stalled",), ("dead", -1)
JOIN = ("join",)
NONE, LEFT = -1, -2  # for a membership: none yet; none any more
# A process and the coordinator: never connected, connected to the present one, told of a successor, not even that.
UNLINKED, LINKED, CALLED, LOST_LINK = "unlinked", "linked", "called", "lost"
# A request: not sent yet, given up by its last process, at a process, finished, given up by its client.
NEW, WAITING, SENT, DONE, ABORTED = "new", "waiting", "sent", "done", "aborted"


class Request(NamedTuple):
    """``attempt`` counts submits; ``at`` is the process of the last one; ``min_epoch`` bounds the next."""

    state: str = NEW
    attempt: int = 0
    at: int = NONE
    min_epoch: int = 0


class Proc(NamedTuple):
    """One engine process. ``group`` is the membership it computes in, ``standby`` (membership, epoch) the next."""

    waves: EngineWaves
    ballot: Ballot = Ballot()
    group: int = NONE
    standby: tuple[int, int] | None = None
    place: tuple = ABSENT
    queue: tuple[tuple[int, int], ...] = ()  # (request, attempt)
    inbox: tuple[tuple, ...] = ()  # from clients: (kind, request, attempt, epoch)
    outbox: tuple[tuple, ...] = ()  # to clients: the same
    up: tuple[Report, ...] = ()
    down: tuple[StartWave, ...] = ()
    calls: tuple[tuple, ...] = ()  # from the manager: (kind, epoch)
    answer: int = NONE  # to its last disarm
    link: str = UNLINKED


class Manager(NamedTuple):
    """``attempt`` is the membership that it works on, ``known`` the present one, in epoch ``number``."""

    phase: Phase = Phase.IDLE
    attempt: int = 0
    known: int = 0
    number: int = 1


class World(NamedTuple):
    procs: tuple[Proc, ...]
    coordinator: GroupWaves
    formed: int  # the membership that the coordinator was told of
    routes: frozenset[tuple[int, int, int]]  # (epoch, rank, process)
    manager: Manager
    requests: tuple[Request, ...]
    view: tuple[int, int]  # (membership, epoch) as clients know them
    notices: tuple[FirstRequest, ...]
    failures: int  # of operations, that may still happen
    restarts: int  # of the coordinator
    aborts: int  # by clients
    lost: bool = False  # a member died in the new epoch: the group is made anew, which is another story


def put(world: World, p: int, proc: Proc) -> World:
    return world._replace(procs=(*world.procs[:p], proc, *world.procs[p + 1 :]))


def step(proc: Proc, transition: tuple[EngineWaves, list[Report]]) -> Proc:
    waves, reports = transition
    return proc._replace(waves=waves, up=(*proc.up, *reports) if proc.link == LINKED else proc.up)


def capped(waves: EngineWaves) -> EngineWaves:
    return EngineWaves(waves.epoch, waves.rank, waves.wave, min(waves.step, 1), waves.running, waves.asked)


def dead(proc: Proc, begun: int = NONE) -> Proc:
    """What it had sent to the coordinator may still arrive."""
    return Proc(EngineWaves(rank=proc.waves.rank), place=("dead", begun), up=proc.up)


def taken(world: World, event: Event) -> World:
    """``Operation.take`` with nothing but the phase."""
    operation = Operation("model", "scale", 0, 0, phase=world.manager.phase)
    following, effect = operation.take(event, 0.0)
    phase = following.phase
    assert (effect is None) == (phase is Phase.IDLE)
    assert effect is not Effect.UNDO or phase is Phase.ABORTING
    return world._replace(manager=world.manager._replace(phase=phase))


def settled(world: World) -> World:
    """Forgets answers, so that worlds that differ in nothing else are one."""
    return world._replace(procs=tuple(proc._replace(answer=NONE) for proc in world.procs))


def told(world: World, transition: tuple[GroupWaves, list[StartWave]]) -> World:
    coordinator, starts = transition
    routes = {(epoch, rank): p for epoch, rank, p in world.routes}
    for start in starts:
        p = routes.get((start.epoch, start.rank))
        if p is not None and world.procs[p].place[0] != "dead":
            proc = world.procs[p]
            world = put(world, p, proc._replace(down=(*proc.down, start)))
    return world._replace(coordinator=coordinator)
