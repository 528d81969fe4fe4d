"""The coordinator of ``epoch_model.py``: what ``Coordinator`` does around ``GroupWaves``, and its successors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from epoch_world import CALLED, LOST_LINK, NONE, UNLINKED, World, put, told
from explorer import Move

from actors.waves import GroupWaves, Report
from actors.wire import FirstRequest

if TYPE_CHECKING:
    from epoch_model import Model


def coordinator_moves(model: Model, world: World) -> Iterator[Move[World]]:
    manager, coordinator = world.manager, world.coordinator
    if coordinator.epoch == 0:
        formed = form(model, world, manager.known, manager.number)
        yield Move("the new coordinator is told of the group", formed)
    for p, proc in enumerate(world.procs):
        if proc.up:
            first, *rest = proc.up
            heard = hear(model, put(world, p, proc._replace(up=tuple(rest))), p, first)
            yield Move(f"the coordinator hears {first}", heard)
    if world.notices:
        first, *rest = world.notices
        heard = hear(model, world._replace(notices=tuple(rest)), NONE, first)
        yield Move("the coordinator hears a client's notice", heard)


def hear(model: Model, world: World, p: int, message: Report | FirstRequest) -> World:
    """What ``Coordinator._receive`` does."""
    coordinator = world.coordinator
    message = as_heard(coordinator, message)
    if message.epoch < coordinator.epoch:
        return world
    if message.epoch == coordinator.epoch and message.rank not in coordinator.ranks:
        return world
    if p != NONE:
        routes = {route for route in world.routes if route[:2] != (message.epoch, message.rank)}
        world = world._replace(routes=frozenset(routes | {(message.epoch, message.rank, p)}))
    return told(world, coordinator.receive(message))


def form(model: Model, world: World, membership: int, number: int) -> World:
    """What ``Coordinator._form`` does."""
    before = world.coordinator.epoch
    transition = world.coordinator.formed(model.epoch(membership, number))
    routes = {route for route in world.routes if route[0] >= number}
    known = {route[:2] for route in routes}
    kept = set(model.memberships[membership]) & set(model.memberships[world.formed] if world.formed >= 0 else ())
    for epoch, rank, p in world.routes:
        if epoch == before and p in kept and (number, rank) not in known:
            routes.add((number, rank, p))
    return told(world._replace(formed=membership, routes=frozenset(routes)), transition)


def restart_moves(model: Model, world: World) -> Iterator[Move[World]]:
    fresh = world._replace(
        coordinator=GroupWaves(), formed=NONE, routes=frozenset(), notices=(), restarts=world.restarts - 1
    )
    for arriving in itertools.product(*(range(len(proc.down) + 1) for proc in world.procs)):
        procs = []
        for p, (proc, count) in enumerate(zip(world.procs, arriving, strict=True)):
            link = proc.link
            if link != UNLINKED:
                link = CALLED if follows(model, world, p) else LOST_LINK
            procs.append(proc._replace(up=(), down=proc.down[:count], link=link))
        after = fresh._replace(procs=tuple(procs))
        yield Move(f"the coordinator is replaced; still to arrive: {arriving}", after, forced=False)


# --- decisions that tests replace by wrong ones -------------------------------------------------------------------


def as_heard(coordinator: GroupWaves, message: Report | FirstRequest) -> Report | FirstRequest:
    return message


def follows(model: Model, world: World, p: int) -> bool:
    """Whether the process is told of a coordinator that replaced the one it is connected to."""
    return True
