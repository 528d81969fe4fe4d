"""The ranks of ``epoch_model.py``: what ``EngineCore`` does around the pure values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from epoch_world import CALLED, JOIN, LEFT, LINKED, LOOP, Proc, World, capped, put, step
from explorer import Move, Violation

from actors.waves import EngineWaves, Standing

if TYPE_CHECKING:
    from epoch_model import Model


def rank_moves(model: Model, world: World, p: int) -> Iterator[Move[World]]:
    proc = world.procs[p]
    if proc.place != LOOP:
        return
    for index in range(len(proc.calls) if model.overtaking else min(1, len(proc.calls))):
        call = proc.calls[index]
        left = proc._replace(calls=proc.calls[:index] + proc.calls[index + 1 :])
        yield Move(f"process {p} is to {call[0]} epoch {call[1]}", called(model, world, p, left, call))
    if proc.inbox:
        yield Move(f"process {p} takes {proc.inbox[0]}", put(world, p, received(proc)))
    if proc.down:
        first, *rest = proc.down
        told = step(proc._replace(down=tuple(rest)), proc.waves.told(first))
        yield Move(f"process {p} is told to run wave {first.wave} of epoch {first.epoch}", put(world, p, told))
    if proc.link == CALLED:
        up = (proc.waves.announce(),)
        yield Move(f"process {p} announces itself", put(world, p, proc._replace(link=LINKED, up=up, down=())))
    if proc.waves.running and (proc.waves.step or len(proc.up) < model.lag):
        if proc.group == LEFT:
            raise Violation(f"process {p} has left the group, and computes")
        for here in joiners_here(model, world, p):
            vote = proc.ballot.vote(here)
            key = ("step", proc.waves.epoch, proc.waves.wave, proc.waves.step)
            place = ("in", proc.group, key, (has_work(proc), vote))
            entered = put(world, p, proc._replace(place=place))
            for n, after in enumerate(complete(model, entered, proc.group)):
                yield Move(f"process {p} enters {key} with vote {vote}" + (f" ({n})" if n else ""), after)


def joiners_here(model: Model, world: World, p: int) -> tuple[bool, ...]:
    """What the rank may see: the joiners' bytes may be under way, and a joiner's death may not have shown."""
    standby = world.procs[p].standby
    if standby is None or p not in model.memberships[standby[0]]:
        return (True,)
    joiners = set(model.memberships[standby[0]]) - set(model.memberships[world.procs[p].group])
    begun = all(world.procs[j].place[1:2] == standby[:1] for j in joiners)
    return ((True, False) if begun else (False,)) if joiners else (True,)


def called(model: Model, world: World, p: int, proc: Proc, call: tuple) -> World:
    """The manager's call is carried out, which is no longer in the channel of ``proc``."""
    kind, number = call
    if kind == "begin":
        assert proc.standby is not None
        membership = proc.standby[0]
        place = ("in", membership, JOIN, proc.waves.standing)
        ballot = proc.ballot.arm(number).switched()
        begun = proc._replace(place=place, ballot=ballot, standby=None, link=LINKED)
        return next(complete(model, put(world, p, begun), membership))
    if kind == "disarm":
        return put(world, p, disarmed(proc, number))
    if proc.standby is not None and proc.standby[1] == number:
        proc = step(proc._replace(ballot=proc.ballot.arm(number)), proc.waves.submitted())
    return put(world, p, proc)


def complete(model: Model, world: World, membership: int) -> Iterator[World]:
    """The world after a rank entered a collective: with several ends if requests may end or go on."""
    members = model.memberships[membership]
    places = [world.procs[p].place for p in members]
    stayed = set(members) & set(model.memberships[world.manager.known])
    if ("dead", membership) in places and any(world.procs[p].place[:2] == ("in", membership) for p in stayed):
        yield world._replace(lost=True)
        return
    if any(place[:2] != ("in", membership) for place in places):
        yield world
        return
    if len({place[2] for place in places}) > 1:
        raise Violation(f"ranks meet in one collective from {[place[2] for place in places]}")
    brought = [place[3] for place in places]
    if places[0][2] == JOIN:
        yield joined(model, world, membership, brought)
        return
    work, votes = any(has_work for has_work, _ in brought), [vote for _, vote in brought]
    served = [(p, what) for p, (here, _) in zip(members, brought, strict=True) if here for what in world.procs[p].queue]
    for ends in itertools.product((True, False), repeat=len(served)):
        after = world
        for p in members:
            done = [what for (q, what), end in zip(served, ends, strict=True) if q == p and end]
            after = put(after, p, read(model, p, world.procs[p], work, votes, done))
        begun = {proc.place[1] for proc in after.procs if proc.place[0] == "in"} - {membership}
        for following in begun:
            after = next(complete(model, after, following))
        yield after


def read(model: Model, p: int, proc: Proc, work: bool, votes: list[int], done: list) -> Proc:
    """A member reads a sync, and ends its step; ``done`` are the requests that end with it."""
    proc = step(proc._replace(place=LOOP), proc.waves.synced(work))
    if not work:
        return proc
    proc = proc._replace(
        waves=capped(proc.waves),
        queue=tuple(what for what in proc.queue if what not in done),
        outbox=proc.outbox + tuple(("finish", *what, proc.waves.epoch) for what in done),
    )
    if not proc.ballot.switches(votes):
        return proc
    if proc.standby is None:
        raise Violation(f"process {p} switches, and has nothing to switch to")
    (membership, number), ballot = proc.standby, proc.ballot.switched()
    if p in model.memberships[membership]:
        place = ("in", membership, JOIN, proc.waves.standing)
        return proc._replace(place=place, standby=None, ballot=ballot)
    return proc._replace(waves=EngineWaves(number, proc.waves.rank), group=LEFT, standby=None, ballot=ballot)


def joined(model: Model, world: World, membership: int, standings: list[Standing]) -> World:
    """The first collective of a membership is complete."""
    for p in model.memberships[membership]:
        proc = world.procs[p]
        epoch = model.epoch(membership, proc.ballot.epoch)
        proc = proc._replace(place=LOOP, group=membership)
        world = put(world, p, step(proc, proc.waves.joined(epoch, model.ranks[p], standings)))
    return world


# --- decisions that tests replace by wrong ones -------------------------------------------------------------------


def has_work(proc: Proc) -> bool:
    return bool(proc.queue) or proc.ballot.armed > 0


def disarmed(proc: Proc, number: int) -> Proc:
    standby = proc.standby if proc.waves.epoch == number else None
    return proc._replace(ballot=proc.ballot.disarm(number), standby=standby, answer=proc.waves.epoch)


def is_stale(proc: Proc, epoch: int) -> bool:
    return epoch != proc.waves.epoch


def received(proc: Proc) -> Proc:
    """The rank takes the first message from clients."""
    (kind, request, attempt, epoch), *rest = proc.inbox
    proc = proc._replace(inbox=tuple(rest))
    if kind == "abort":
        return proc._replace(queue=tuple(what for what in proc.queue if what != (request, attempt)))
    if epoch > proc.waves.epoch:
        raise Violation(f"a rank in epoch {proc.waves.epoch} is given load of epoch {epoch}")
    if is_stale(proc, epoch):
        return proc._replace(outbox=(*proc.outbox, ("stale", request, attempt, proc.waves.epoch)))
    queue = tuple(sorted((*proc.queue, (request, attempt))))
    return step(proc._replace(queue=queue), proc.waves.submitted())
