"""The wave protocol as a model: real protocol values, and everything that lies between them.

A state holds the engines' and the coordinator's values, and what is on its way between them: every channel is first in
first out, and delivers whenever it likes. A rank's step is a contribution to the group's sync, a wait, and the reading
of the result, which another rank may have read long before. In the wait the rank hears nothing; or, if its loop
overlaps steps, it takes messages then too. The environment may send requests to any rank, with or without a notice to
the coordinator; kill the client, so that any tail of what it sent is lost, and abort what arrived; and restart the
coordinator, so that all it was sent is lost, and some of what it sent.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from explorer import Move, Search, Violation, explore

from actors.membership import Epoch, Member
from actors.waves import PAUSED, EngineWaves, GroupWaves, Report, StartWave
from actors.wire import FirstRequest

EPOCH = 1

# Where a rank is: between steps, in a sync that waits for others, or in one that is complete and not read yet.
LOOP = ("loop",)


class World(NamedTuple):
    """Tuples of one entry per rank, unless said otherwise."""

    engines: tuple[EngineWaves, ...]
    queues: tuple[int, ...]  # requests at the rank
    places: tuple[tuple, ...]  # LOOP, ("in", (wave, step), own work) or ("out", own work, the group's work)
    submits: tuple[int, ...]  # requests on their way
    up: tuple[tuple[Report, ...], ...]  # to the coordinator
    down: tuple[tuple[StartWave, ...], ...]  # from it
    notices: tuple[FirstRequest, ...]  # from the client to the coordinator
    linked: tuple[bool, ...]  # connected to the coordinator that lives now
    routed: frozenset[int]  # ranks the coordinator can reach
    coordinator: GroupWaves
    requests: int  # the client may still send
    deaths: int  # of the client
    restarts: int  # of the coordinator
    overlap: bool  # whether ranks take messages while they wait in a sync


def group(size: int) -> Epoch:
    return Epoch(EPOCH, tuple(Member(rank, f"tcp://dp_rank_{rank}", "node") for rank in range(size)))


def quiet(size: int, requests: int, deaths: int = 0, restarts: int = 0, overlap: bool = False) -> World:
    """A group that has run its first waves and is paused, known to all."""
    wave = 1
    return World(
        engines=tuple(EngineWaves(EPOCH, rank, wave) for rank in range(size)),
        queues=(0,) * size,
        places=(LOOP,) * size,
        submits=(0,) * size,
        up=((),) * size,
        down=((),) * size,
        notices=(),
        linked=(True,) * size,
        routed=frozenset(range(size)),
        coordinator=GroupWaves(EPOCH, frozenset(range(size)), wave, PAUSED, frozenset(range(size))),
        requests=requests,
        deaths=deaths,
        restarts=restarts,
        overlap=overlap,
    )


def launched(size: int, requests: int) -> World:
    """A group whose ranks stand and whose coordinator knows of nothing yet."""
    ranks = tuple(range(size))
    return quiet(size, requests)._replace(
        engines=tuple(EngineWaves(EPOCH, rank) for rank in ranks),
        linked=(False,) * size,
        routed=frozenset(),
        coordinator=GroupWaves(),
    )


def search(start: World, limit: int = 5_000_000) -> Search:
    return explore(start, moves, wrong_at_rest, limit)


def wrong_at_rest(world: World) -> str | None:
    """What is wrong with a state in which nothing is on its way any more."""
    for rank, engine in enumerate(world.engines):
        if world.places[rank] != LOOP:
            return f"rank {rank} waits in a collective of wave {engine.wave}, and nobody will come"
        if world.queues[rank]:
            return f"a request waits at rank {rank}, and nobody will wake it"
    if len({engine.wave for engine in world.engines}) > 1:
        return f"paused before different waves: {[engine.wave for engine in world.engines]}"
    if world.coordinator.running or world.coordinator.wave != world.engines[0].wave:
        return f"the coordinator holds {world.coordinator} for the truth, and the group is paused"
    return None


def moves(world: World) -> Iterator[Move[World]]:
    for rank in range(len(world.engines)):
        yield from _rank_moves(world, rank)
    yield from _coordinator_moves(world)
    yield from _client_moves(world)
    if world.restarts:
        yield from _restarts(world)


def _rank_moves(world: World, rank: int) -> Iterator[Move[World]]:
    engine, place, queue = world.engines[rank], world.places[rank], world.queues[rank]
    if place[0] == "out":
        yield Move(f"rank {rank} reads: work={place[2]}", _read(world, rank))
    if place != LOOP and not world.overlap:
        return
    if world.submits[rank]:
        taken = _set(world, submits=(rank, world.submits[rank] - 1), queues=(rank, queue + 1))
        yield Move(f"rank {rank} takes a request", _step(taken, rank, engine.submitted()))
    if world.down[rank]:
        first, *rest = world.down[rank]
        yield Move(
            f"rank {rank} is told to run wave {first.wave}",
            _step(_set(world, down=(rank, tuple(rest))), rank, engine.told(first)),
        )
    if place != LOOP:
        return
    if engine.running:
        yield Move(f"rank {rank} enters a step of wave {engine.wave}", _enter(world, rank))
    if not world.linked[rank]:
        linked = _set(world, linked=(rank, True), down=(rank, ()), up=(rank, (engine.announce(),)))
        yield Move(f"rank {rank} announces itself: wave {engine.wave}, running={engine.running}", linked)
    if queue and world.deaths < 0:
        yield Move(f"rank {rank} aborts a request", _set(world, queues=(rank, queue - 1)), forced=False)


def _enter(world: World, rank: int) -> World:
    engine = world.engines[rank]
    world = _set(world, places=(rank, ("in", (engine.wave, engine.step), world.queues[rank] > 0)))
    if any(place[0] != "in" for place in world.places):
        return world
    if len({place[1] for place in world.places}) > 1:
        raise Violation(
            f"ranks of different (wave, step) meet in one collective: {[place[1] for place in world.places]}"
        )
    work = any(place[2] for place in world.places)
    return world._replace(places=tuple(("out", place[2], work) for place in world.places))


def _read(world: World, rank: int) -> World:
    """A request ends in the step that it was contributed to; a rank with others, come since, wakes up again."""
    _, served, work = world.places[rank]
    queue = world.queues[rank] - served
    world = _set(world, places=(rank, LOOP), queues=(rank, queue))
    world = _step(world, rank, world.engines[rank].synced(work))
    return _step(world, rank, world.engines[rank].submitted()) if queue else world


def _coordinator_moves(world: World) -> Iterator[Move[World]]:
    coordinator = world.coordinator
    if coordinator.epoch != EPOCH:
        formed = coordinator.formed(group(len(world.engines)))
        yield Move("the coordinator is told of the group", _told(world, formed))
    for rank, channel in enumerate(world.up):
        if channel:
            first, *rest = channel
            heard = _set(world, up=(rank, tuple(rest)))._replace(routed=world.routed | {rank})
            yield Move(f"the coordinator hears {first}", _told(heard, coordinator.receive(first)))
    if world.notices:
        first, *rest = world.notices
        yield Move(
            "the coordinator hears the client's notice",
            _told(world._replace(notices=tuple(rest)), coordinator.receive(first)),
        )


def _client_moves(world: World) -> Iterator[Move[World]]:
    if world.requests:
        for rank in range(len(world.engines)):
            sent = _set(world, submits=(rank, world.submits[rank] + 1))._replace(requests=world.requests - 1)
            yield Move(f"the client sends a request to rank {rank}", sent, forced=False)
            notice = FirstRequest(EPOCH, rank, world.coordinator.wave)
            noticed = sent._replace(notices=(*world.notices, notice))
            yield Move(f"the client sends a request to rank {rank}, with notice", noticed, forced=False)
    if world.deaths > 0:
        arriving = [range(count + 1) for count in world.submits]
        for *submits, notices in itertools.product(*arriving, range(len(world.notices) + 1)):
            dead = world._replace(submits=tuple(submits), notices=world.notices[:notices], requests=0, deaths=-1)
            yield Move(f"the client dies; still to arrive: requests {submits}, notices {notices}", dead, forced=False)


def _restarts(world: World) -> Iterator[Move[World]]:
    size = len(world.engines)
    fresh = world._replace(
        up=((),) * size,
        notices=(),
        linked=(False,) * size,
        routed=frozenset(),
        coordinator=GroupWaves(),
        restarts=world.restarts - 1,
    )
    for arriving in itertools.product(*(range(len(channel) + 1) for channel in world.down)):
        down = tuple(channel[:count] for channel, count in zip(world.down, arriving, strict=True))
        yield Move(f"the coordinator is replaced; still to arrive: {arriving}", fresh._replace(down=down), forced=False)


def _step(world: World, rank: int, transition: tuple[EngineWaves, list[Report]]) -> World:
    engine, reports = transition
    world = _set(world, engines=(rank, engine))
    return _set(world, up=(rank, (*world.up[rank], *reports))) if reports and world.linked[rank] else world


def _told(world: World, transition: tuple[GroupWaves, list[StartWave]]) -> World:
    coordinator, starts = transition
    down = list(world.down)
    for start in starts:
        if start.rank in world.routed:
            down[start.rank] = (*down[start.rank], start)
    return world._replace(coordinator=coordinator, down=tuple(down))


def _set(world: World, **entries: tuple[int, object]) -> World:
    """``world`` with entry ``rank`` of each named tuple replaced."""
    changed = {}
    for name, (rank, entry) in entries.items():
        old = getattr(world, name)
        changed[name] = (*old[:rank], entry, *old[rank + 1 :])
    return world._replace(**changed)
