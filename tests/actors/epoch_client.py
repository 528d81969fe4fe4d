"""The clients of ``epoch_model.py``: requests that are placed, refused, moved, finished and aborted.

All clients hold the same view, which may be late. They may place a request on any member of it, so what the balancer
prefers, and what it is told of leaving ranks, is one of the histories. What a rank had sent before a client dropped its
connection is taken or lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from epoch_world import ABORTED, DONE, NEW, SENT, WAITING, Request, World, put
from explorer import Move, Violation

from actors.wire import FirstRequest

if TYPE_CHECKING:
    from epoch_model import Model


def client_moves(model: Model, world: World) -> Iterator[Move[World]]:
    membership, epoch = world.view
    for number, request in enumerate(world.requests):
        # Requests are alike: the first one is sent first.
        first = number == 0 or world.requests[number - 1].state != NEW
        if (request.state == NEW and first) or (request.state == WAITING and request.min_epoch <= epoch):
            new = request.state == NEW
            for p in model.memberships[membership]:
                sent = _sent(world, number, p)
                yield Move(f"request {number} is sent to process {p} in epoch {epoch}", sent, forced=not new)
                if model.notices:
                    noticed = sent._replace(notices=(*sent.notices, FirstRequest(epoch, model.ranks[p], 0)))
                    yield Move(f"request {number} is sent to process {p}, with notice", noticed, forced=False)
        if request.state == SENT and world.aborts:
            message = ("abort", number, request.attempt, epoch)
            gone = _deliver(_set(world, number, Request(ABORTED)), request.at, message)
            yield Move(f"request {number} is aborted", gone._replace(aborts=world.aborts - 1), forced=False)
    for p, proc in enumerate(world.procs):
        if proc.outbox:
            yield Move(f"the client takes {proc.outbox[0]} of process {p}", _take(world, p))
    if world.coordinator.epoch > epoch:
        yield Move(f"clients learn of epoch {world.coordinator.epoch}", _observe(model, world))


def _sent(world: World, number: int, p: int) -> World:
    request = world.requests[number]
    world = _set(world, number, Request(SENT, request.attempt + 1, p))
    return _deliver(world, p, ("submit", number, request.attempt + 1, world.view[1]))


def _deliver(world: World, p: int, message: tuple) -> World:
    proc = world.procs[p]
    if proc.place[0] == "dead":
        return world
    return put(world, p, proc._replace(inbox=(*proc.inbox, message)))


def _take(world: World, p: int) -> World:
    proc = world.procs[p]
    (kind, number, attempt, epoch), *rest = proc.outbox
    world = put(world, p, proc._replace(outbox=tuple(rest)))
    request = world.requests[number]
    if (request.at, request.attempt) != (p, attempt):
        return world  # of an attempt that was given up
    if request.state == DONE:
        raise Violation(f"request {number} is finished twice")
    if kind == "finish":
        return _set(world, number, request._replace(state=DONE))
    return _set(world, number, request._replace(state=WAITING, min_epoch=max(epoch, world.view[1])))


def _observe(model: Model, world: World) -> World:
    """A newer view: requests on processes that are no members any more move; their connections are dropped."""
    members = model.memberships[world.formed]
    world = world._replace(view=(world.formed, world.coordinator.epoch))
    for p, proc in enumerate(world.procs):
        if p not in members and proc.outbox:
            world = put(world, p, proc._replace(outbox=()))
    for number, request in enumerate(world.requests):
        if request.state == SENT and request.at not in members:
            world = _set(world, number, request._replace(state=WAITING, at=-1))
    return world


def _set(world: World, number: int, request: Request) -> World:
    return world._replace(requests=(*world.requests[:number], request, *world.requests[number + 1 :]))
