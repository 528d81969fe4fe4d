"""The manager of ``epoch_model.py``: what ``Change`` does around ``Operation``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from epoch_coordinator import form
from epoch_world import LEFT, LOOP, NONE, STALLED, World, dead, put, settled, taken
from explorer import Move, Violation

from actors.transition import UNDOABLE, Ballot, Event, Phase

if TYPE_CHECKING:
    from epoch_model import Model


def manager_moves(model: Model, world: World) -> Iterator[Move[World]]:
    manager, phase = world.manager, world.manager.phase
    if phase is Phase.IDLE:
        if manager.attempt + 1 < len(model.memberships):
            yield from begin_moves(model, world)
        return
    number = manager.number + 1
    old, new = set(model.memberships[manager.known]), set(model.memberships[manager.attempt])
    joiners = [p for p in new - old if world.procs[p].place[0] != "dead"]
    if phase in (Phase.ARMED, Phase.ABORTING) and world.failures:
        fewer = world._replace(failures=world.failures - 1)
        for p in joiners:
            place = world.procs[p].place
            if place == LOOP and world.procs[p].group == NONE:
                stalled = put(fewer, p, world.procs[p]._replace(place=STALLED, calls=()))
                yield Move(f"joiner {p} stalls", stalled, forced=False)
            if world.procs[p].group == NONE:
                begun = place[1] if place[0] == "in" else NONE
                yield Move(f"joiner {p} dies", put(fewer, p, dead(world.procs[p], begun)), forced=False)
        if phase is Phase.ARMED:
            yield Move("the caller cancels", undo(model, fewer, set_up=True), forced=False)
    if phase is Phase.ARMED:
        switched = [world.procs[p].group in (manager.attempt, LEFT) for p in old | new]
        if all(switched):
            yield Move("all have switched", taken(world, Event.DONE))
        if len(joiners) < len(new - old) or any(world.procs[p].place == STALLED for p in joiners):
            yield Move("the manager gives up on the joiner", undo(model, world, set_up=True))
    elif phase is Phase.ABORTING:
        answers = [world.procs[p].answer for p in old]
        if enough(answers):
            if number in answers:
                yield Move("a member has switched already", taken(world, Event.SWITCHED))
            else:
                yield Move("the manager ends the joiner", undone(model, world, joiners))
    elif phase is Phase.COMMITTED:
        yield Move("the coordinator is told of the new epoch", published(model, world))
    elif phase is Phase.RETIRING:
        yield Move("the manager ends who left", retired(model, world))


def begin_moves(model: Model, world: World) -> Iterator[Move[World]]:
    """From ``idle`` to ``armed``, or to a failure on the way and whatever had been done until then."""
    manager = world.manager
    attempt, number = manager.attempt + 1, manager.number + 1
    old, new = model.memberships[manager.known], model.memberships[attempt]
    if model.retry and manager.known != 0:
        return
    begun = taken(world._replace(manager=manager._replace(attempt=attempt)), Event.BEGIN)
    launched = begun
    for p in set(new) - set(old):
        launched = put(launched, p, world.procs[p]._replace(place=LOOP))

    def prepared(by: Sequence[int]) -> World:
        after = launched
        for p in by:
            after = put(after, p, after.procs[p]._replace(standby=(attempt, number)))
        return after

    ready = prepared(sorted({*old, *new}))
    if world.failures:
        partly = [prepared(by) for n in range(len(old) + 1) for by in itertools.combinations(old, n)]
        ways = {Phase.PLACING: [begun], Phase.LAUNCHING: [begun, launched], Phase.JOINING: partly}
        phase = begun
        while phase.manager.phase is not Phase.ARMED:
            name = phase.manager.phase
            for n, way in enumerate(ways.get(name, [ready])):
                failed = way._replace(manager=phase.manager, failures=world.failures - 1)
                after = undo(model, failed, set_up=name not in (Phase.PLACING, Phase.LAUNCHING))
                yield Move(f"an operation to {new} fails while {name.value} ({n})", after, forced=False)
            phase = taken(phase, Event.DONE)
    while ready.manager.phase is not Phase.ARMED:
        ready = taken(ready, Event.DONE)
    armed = ready
    for p in {*old, *new}:
        call = ("arm" if p in old else "begin", number)
        armed = put(armed, p, armed.procs[p]._replace(calls=(*armed.procs[p].calls, call), answer=NONE))
    yield Move(f"an operation to {new} arms", armed, forced=False)


def undo(model: Model, world: World, set_up: bool) -> World:
    """``set_up``: members may have been prepared, and are told to disarm."""
    assert world.manager.phase in UNDOABLE
    manager = world.manager
    for p in model.memberships[manager.known]:
        proc = world.procs[p]
        calls = (*proc.calls, ("disarm", manager.number + 1)) if set_up else proc.calls
        world = put(world, p, proc._replace(calls=calls, answer=NONE if set_up else manager.number))
    return taken(world, Event.FAILED)


def undone(model: Model, world: World, joiners: list[int]) -> World:
    for p in joiners:
        world = put(world, p, dead(world.procs[p]))
    nothing_left(model, world)
    return settled(taken(world, Event.DONE))


def published(model: Model, world: World) -> World:
    manager = world.manager._replace(known=world.manager.attempt, number=world.manager.number + 1)
    world = form(model, world, manager.known, manager.number)
    return taken(world._replace(manager=manager), Event.DONE)


def retired(model: Model, world: World) -> World:
    members = model.memberships[world.manager.known]
    for p, proc in enumerate(world.procs):
        if p not in members and proc.place[0] not in ("absent", "dead"):
            world = put(world, p, dead(proc))
    nothing_left(model, world)
    if world.coordinator.epoch not in (0, world.manager.number):  # 0: replaced since, and told soon
        raise Violation(f"the operation is done, and the coordinator is in epoch {world.coordinator.epoch}")
    return settled(taken(world, Event.DONE))


def nothing_left(model: Model, world: World) -> None:
    """When an operation ends, its members are in the epoch that it left, and ready for none other."""
    for p in model.memberships[world.manager.known]:
        proc = world.procs[p]
        if (proc.standby, proc.ballot, proc.group) != (None, Ballot(world.manager.number), world.manager.known):
            raise Violation(f"an operation has ended, and process {p} is left with {proc}")


# --- decisions that tests replace by wrong ones -------------------------------------------------------------------


def enough(answers: list[int]) -> bool:
    """Whether the manager knows enough to undo, or not to: one answer would do, but all have to let go."""
    return NONE not in answers
