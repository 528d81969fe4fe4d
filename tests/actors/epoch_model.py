"""Changes of membership as a model: the real protocol values of ranks, coordinator and manager, and what lies between.

Like ``wave_model.py``, with processes that join and leave. Every channel is first in first out and delivers whenever it
likes. The manager's operations, each with a membership of its own, may fail in every phase, and so may the joiner: it
dies, or never begins. Clients send in the epoch that they believe in, are refused, move, and abort. The coordinator may
be replaced.

What keeps the number of states small, and why nothing is lost by it:

* The members of a sync read its result, and begin the next epoch's first collective, in the move that completes it: a
  rank takes nothing else in between, and its reading changes nothing that another rank could see before.
* Phases before ``armed`` touch nothing that a step or a message reads, so they are one move, or one for each way to
  fail. Answers of ranks are there at once: the manager may act on them as late as it likes.
* Steps of one wave are numbered 0, 1, 1, ...: a rank that counted anew still differs from the others. A step may end
  a request or not, so requests are of any length; and idle steps of ranks that wait for a joiner give no new states.
* A coordinator that has not heard every member keeps the group running, so waves would go on without end while one
  report is under way: reports may be late by a few waves only.
* Requests are sent in order; a killed process has no state but what it had sent to the coordinator.

``epoch_ranks.py``, ``epoch_manager.py``, ``epoch_coordinator.py`` and ``epoch_client.py`` do what the product does
around the pure values; they end in the decisions that tests replace by wrong ones.

As ranks may step for ever while a joiner takes its time, a history without end is no fault here; a state from which
forced moves lead to no rest is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from epoch_client import client_moves
from epoch_coordinator import coordinator_moves, restart_moves
from epoch_manager import manager_moves
from epoch_ranks import rank_moves
from epoch_world import ABORTED, DONE, LINKED, LOOP, NEW, Manager, Proc, Request, World
from explorer import Move, Search, explore

from actors.membership import Epoch, Member
from actors.transition import Ballot, Phase
from actors.waves import PAUSED, EngineWaves, GroupWaves


class Model:
    """``memberships[0]`` is the present group, the others are what operations want in turn; as process numbers.

    ``ranks`` are the processes' ranks, if not their numbers. ``overtaking`` calls of the manager arrive in any order;
    ``notices`` go with requests. A rank begins no wave while ``lag`` of its reports have not arrived.
    With ``retry`` an operation is tried only after one that failed.
    """

    def __init__(
        self,
        memberships: Sequence[Sequence[int]],
        ranks: Sequence[int] | None = None,
        requests: int = 0,
        failures: int = 0,
        restarts: int = 0,
        aborts: int = 0,
        overtaking: bool = False,
        notices: bool = False,
        lag: int = 3,
        retry: bool = False,
    ) -> None:
        self.memberships = [tuple(members) for members in memberships]
        self.ranks = tuple(ranks or range(1 + max(itertools.chain(*memberships))))
        self.overtaking = overtaking
        self.notices = notices
        self.lag = lag
        self.retry = retry
        self.start = self._quiet(requests, failures, restarts, aborts)

    def search(self, limit: int = 3_000_000) -> Search:
        return explore(self.start, self.moves, self.wrong_at_rest, limit, fair=True)

    def _quiet(self, requests: int, failures: int, restarts: int, aborts: int) -> World:
        """A group that has run its first waves and is paused, known to all."""
        present, wave = self.memberships[0], 1
        ranks = frozenset(self.ranks[p] for p in present)
        procs = []
        for p, rank in enumerate(self.ranks):
            if p in present:
                procs.append(Proc(EngineWaves(1, rank, wave), Ballot(1), 0, place=LOOP, link=LINKED))
            else:
                procs.append(Proc(EngineWaves(rank=rank)))
        return World(
            procs=tuple(procs),
            coordinator=GroupWaves(1, ranks, wave, PAUSED, ranks),
            formed=0,
            routes=frozenset((1, self.ranks[p], p) for p in present),
            manager=Manager(),
            requests=(Request(),) * requests,
            view=(0, 1),
            notices=(),
            failures=failures,
            restarts=restarts,
            aborts=aborts,
        )

    def epoch(self, membership: int, number: int) -> Epoch:
        members = sorted(self.memberships[membership], key=lambda p: self.ranks[p])
        return Epoch(number, tuple(Member(self.ranks[p], f"tcp://process_{p}", "node") for p in members))

    def moves(self, world: World) -> Iterator[Move[World]]:
        if world.lost:
            return
        for p in range(len(world.procs)):
            yield from rank_moves(self, world, p)
        yield from manager_moves(self, world)
        yield from coordinator_moves(self, world)
        yield from client_moves(self, world)
        if world.restarts:
            yield from restart_moves(self, world)

    def wrong_at_rest(self, world: World) -> str | None:
        """What is wrong with a state in which nothing is on its way any more."""
        if world.lost:
            return None
        manager, coordinator = world.manager, world.coordinator
        members = self.memberships[manager.known]
        for p, proc in enumerate(world.procs):
            if proc.place[0] == "in":
                return f"process {p} waits in a collective of membership {proc.place[1]}, and nobody will come"
            if proc.queue:
                return f"a request waits at process {p}, and nobody will wake it"
        if manager.phase is not Phase.IDLE:
            return f"the operation stays {manager.phase.value}"
        for number, request in enumerate(world.requests):
            if request.state not in (NEW, DONE, ABORTED):
                return f"request {number} is never finished: {request}"
        if coordinator.epoch != manager.number or world.view[1] != manager.number:
            return f"epoch {manager.number}, and the coordinator is in {coordinator.epoch}, clients in {world.view[1]}"
        alive = {p for p, proc in enumerate(world.procs) if proc.place[0] not in ("absent", "dead")}
        if alive != set(members):
            return f"processes {sorted(alive)} live, the members are {members}"
        for p in members:
            waves = world.procs[p].waves
            if (waves.epoch, waves.wave, waves.running) != (coordinator.epoch, coordinator.wave, coordinator.running):
                return f"the coordinator holds {coordinator} for the truth, and process {p} has {waves}"
        return None
