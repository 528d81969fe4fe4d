"""Waves: how ranks that compute in lockstep fall asleep together and wake up together.

Theory of operation
-------------------
The routed experts are spread over all ranks, so every step of a rank is a collective of the group: nobody can step
alone. A **wave** is a period in which all ranks step together; between waves all are **paused** and block on their
sockets. Waves are numbered; a paused rank's number is that of the wave to come. (Ranks that each hold every expert
could step alone. They keep the syncs for what those decide, and compute between offering a sync and gathering it: a
step of the group is then one sync and any number of steps of each rank.) There are two problems to solve.

*Ending a wave.* Each step has one sync, from which every rank sees who has work. When nobody has, every rank leaves
the wave at that same step, by itself: the sync is the agreement, no message is needed. Each rank reports
``WaveComplete``, and the first report counts. One rank's would do for the front-ends to learn of it, but that rank may
be the one that leaves or dies, or the one that a new coordinator has not met yet; and waking a group costs a message
for each rank anyway.

*Starting one.* A request reaches one paused rank, which must not step before the others do; more exactly, it may, and
then waits in its collective until they come, and while it waits it hears nothing. So it must be certain that they
will come. The rule: **a rank that wakes by itself always says so** (``StartWave``, before its first collective), and
the coordinator then tells every rank. A front-end's ``FirstRequest`` says the same a hop earlier; nothing depends on
it, for a front-end may die before it sends it, or before the request it announces arrives. Hence also: the
coordinator tells *every* rank, the one that the request went to included.

Messages of different senders overtake each other, so each carries its wave, and three rules make the order of
arrival irrelevant. A wave's number only grows, and only by a sync that all ranks took part in. What speaks of an
older wave than one's own is history and ignored. What speaks of a newer one is believed: the coordinator adopts it
(a rank's start of wave w+1 proves that wave w is over, whatever happened to its ``WaveComplete``); a rank that still
runs wave w remembers it and enters w+1 the moment w ends. Numbers from front-ends are hints and never adopted.

*The coordinator's memory is soft.* A fresh coordinator (started again, or told of a new epoch) knows nothing, and a
rank may wait in a collective for others whose wake-up died with the old one; that rank can't even say so. Therefore
**until it has heard every member, the coordinator keeps the group running**: whoever announces itself is told to
run, and a wave that ends is followed by another. That frees the rank that waits, which then announces itself too;
then one wave of dummy steps ends and all is known. After that, everything a rank does is reported on a connection
that the coordinator reads. In other words, while the coordinator holds the group for running in wave w, every member
has been told so in this epoch or has said so itself.

*Epochs.* A rank drops messages of any epoch but its own. The coordinator drops older ones, and keeps the last word of
each rank from a newer epoch until it is told of that epoch itself. Members of a new epoch first align: all adopt the
largest (wave, step) among them and run if any of them runs, so that a joiner, which comes with wave 0, neither starts
a wave that is long over nor is told of one it has not reached. (Not the largest (running, wave, step): after a broken
collective one survivor may still run wave w while another has left it for w+1, and waves would go backwards.)

Each side is a frozen value whose methods return the next value and the messages to send. ``ENGINE`` and
``COORDINATOR`` are the whole protocol; ``tests/actors/wave_model.py`` runs them through all interleavings.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec

from actors.membership import Epoch
from actors.wire import Announce, FirstRequest, StartWave, WaveComplete

Report = Announce | StartWave | WaveComplete

PAUSED, RUNNING = False, True


class Event(enum.Enum):
    SUBMIT = "a request arrived at this rank"
    START = "a wave was started"
    WORK = "a sync said that some rank has work"
    IDLE = "a sync said that no rank has work"
    NOTICE = "a front-end sent a request to a group it held for paused"
    END = "a wave ended"
    HELLO = "a rank announced itself"


class Order(enum.Enum):
    """The wave an event speaks of, against the receiver's own; ``NONE`` where an event speaks of none."""

    BEHIND = "older"
    SAME = "the same"
    AHEAD = "newer"
    NONE = "no wave"


def _order(theirs: int, own: int) -> Order:
    return Order.SAME if theirs == own else Order.AHEAD if theirs > own else Order.BEHIND


# --- one rank ----------------------------------------------------------------------------------------------------


class Standing(NamedTuple):
    """Where a rank stands when it joins an epoch."""

    wave: int
    step: int
    running: bool


class EngineWaves(msgspec.Struct, frozen=True):
    """One rank's side.

    ``step`` counts the steps of this wave, equal on all ranks after each sync; ``asked`` is the newest wave that the
    coordinator asked for while an older one ran.

    Every method returns the next value and the messages for the coordinator, to be sent before the next collective.
    Between a rank's contribution to a sync and its ``synced`` it must take no other event (an engine that drains its
    inbox at one place of its loop does so by construction; one that hears requests meanwhile says so afterwards).
    """

    epoch: int = 0
    rank: int = 0
    wave: int = 0
    step: int = 0
    running: bool = PAUSED
    asked: int = 0

    def submitted(self) -> tuple[EngineWaves, list[Report]]:
        """A request was put into this rank's queue."""
        return self._take(Event.SUBMIT, Order.NONE, self.wave)

    def told(self, message: StartWave) -> tuple[EngineWaves, list[Report]]:
        """The coordinator says that a wave runs."""
        if message.epoch != self.epoch:
            return self, []
        return self._take(Event.START, _order(message.wave, self.wave), message.wave)

    def synced(self, work: bool) -> tuple[EngineWaves, list[Report]]:
        """A step's sync completed; ``work`` is true if any rank of the group has work left."""
        return self._take(Event.WORK if work else Event.IDLE, Order.NONE, self.wave)

    def joined(self, epoch: Epoch, rank: int, standings: Iterable[Standing]) -> tuple[EngineWaves, list[Report]]:
        """The rank is a member of ``epoch`` from now on; ``standings`` are those of all its members, its own too."""
        standings = list(standings)
        wave, step = max((s.wave, s.step) for s in standings)
        running = any(s.running for s in standings)
        now = EngineWaves(epoch.number, rank, wave, step, running)
        return now, [now.announce()]

    def announce(self) -> Announce:
        """What to send first on every new connection to a coordinator."""
        return Announce(self.epoch, self.rank, self.wave, self.running)

    @property
    def standing(self) -> Standing:
        return Standing(self.wave, self.step, self.running)

    def _take(self, event: Event, order: Order, wave: int) -> tuple[EngineWaves, list[Report]]:
        action = ENGINE.get((self.running, event, order))
        if action is None:
            raise RuntimeError(f"rank {self.rank} is paused before wave {self.wave}, yet took part in a sync")
        return action(self, wave)


EngineAction = Callable[[EngineWaves, int], tuple[EngineWaves, list[Report]]]


def ignore(e: EngineWaves, wave: int) -> tuple[EngineWaves, list[Report]]:
    return e, []


def run(e: EngineWaves, wave: int) -> tuple[EngineWaves, list[Report]]:
    return msgspec.structs.replace(e, wave=wave, step=0, running=RUNNING), []


def run_and_report(e: EngineWaves, wave: int) -> tuple[EngineWaves, list[Report]]:
    return run(e, wave)[0], [StartWave(e.epoch, e.rank, wave)]


def remember(e: EngineWaves, wave: int) -> tuple[EngineWaves, list[Report]]:
    return msgspec.structs.replace(e, asked=max(e.asked, wave)), []


def go_on(e: EngineWaves, wave: int) -> tuple[EngineWaves, list[Report]]:
    return msgspec.structs.replace(e, step=e.step + 1), []


def leave(e: EngineWaves, wave: int) -> tuple[EngineWaves, list[Report]]:
    after = msgspec.structs.replace(e, wave=wave + 1, step=0, running=e.asked > wave)
    return after, [WaveComplete(e.epoch, e.rank, wave)]


ENGINE: dict[tuple[bool, Event, Order], EngineAction] = {
    (PAUSED, Event.SUBMIT, Order.NONE): run_and_report,
    (PAUSED, Event.START, Order.BEHIND): ignore,  # told of a wave that has ended since
    (PAUSED, Event.START, Order.SAME): run,
    (PAUSED, Event.START, Order.AHEAD): run,
    (RUNNING, Event.SUBMIT, Order.NONE): ignore,  # the next sync will show the work
    (RUNNING, Event.START, Order.BEHIND): ignore,
    (RUNNING, Event.START, Order.SAME): ignore,  # it woke by itself before it was told
    (RUNNING, Event.START, Order.AHEAD): remember,  # others left this wave already, and run the next
    (RUNNING, Event.WORK, Order.NONE): go_on,
    (RUNNING, Event.IDLE, Order.NONE): leave,
}


# --- the coordinator ---------------------------------------------------------------------------------------------


class GroupWaves(msgspec.Struct, frozen=True):
    """The coordinator's side: the group as far as it was told.

    ``heard`` are the members that said anything in this epoch; ``early`` the last words of ranks in epochs
    that the coordinator has not been told of yet. A fresh value holds the group for running: see above.
    """

    epoch: int = 0
    ranks: frozenset[int] = frozenset()
    wave: int = 0
    running: bool = RUNNING
    heard: frozenset[int] = frozenset()
    early: tuple[Announce, ...] = ()

    def formed(self, epoch: Epoch) -> tuple[GroupWaves, list[StartWave]]:
        """The manager says who the group is. Repeating the current epoch changes nothing.

        Raises ``ValueError`` for an older epoch, and for other ranks under the current epoch's number.
        """
        ranks = frozenset(epoch.ranks)
        if epoch.number == self.epoch and ranks == self.ranks:
            return self, []
        if epoch.number <= self.epoch:
            raise ValueError(
                f"epoch {epoch.number} with ranks {sorted(ranks)} does not follow the current epoch {self.epoch} "
                f"with ranks {sorted(self.ranks)}; give the new membership a larger number"
            )
        later = tuple(a for a in self.early if a.epoch > epoch.number)
        group = GroupWaves(epoch.number, ranks, self.wave, early=later)
        for announce in self.early:
            if announce.epoch == epoch.number:
                group, _ = group.receive(announce)
        return group, group._start(group.ranks if group.running else ())

    def receive(self, message: Report | FirstRequest) -> tuple[GroupWaves, list[StartWave]]:
        """Take a message off the wire. Returns the next value and one ``StartWave`` for each rank to be told."""
        if message.epoch > self.epoch:
            return self._keep(message), []
        if message.epoch < self.epoch or message.rank not in self.ranks:
            return self, []
        if isinstance(message, FirstRequest):
            group, told = self._take(Event.NOTICE, self.wave)
            return group, group._start(told)
        group = self
        if message.rank not in self.heard:
            group = msgspec.structs.replace(self, heard=self.heard | {message.rank})
        if isinstance(message, StartWave):
            group, told = group._take(Event.START, message.wave)
        elif isinstance(message, WaveComplete):
            group, told = group._take(Event.END, message.wave)
        else:
            group, told = group._greet(message)
        return group, group._start(told)

    def _greet(self, message: Announce) -> tuple[GroupWaves, set[int]]:
        """A rank that runs wave w says what its ``StartWave`` said; one that is paused before w, that w-1 ended."""
        group, told = self._take(*((Event.START, message.wave) if message.running else (Event.END, message.wave - 1)))
        action = COORDINATOR[group.running, Event.HELLO, Order.NONE]
        return group, told | action(group, message.rank)[1]

    def _take(self, event: Event, wave: int) -> tuple[GroupWaves, set[int]]:
        order = Order.NONE if event is Event.NOTICE else _order(wave, self.wave)
        return COORDINATOR[self.running, event, order](self, wave)

    def _start(self, ranks: Iterable[int]) -> list[StartWave]:
        return [StartWave(self.epoch, rank, self.wave) for rank in sorted(ranks)]

    def _keep(self, message: Report | FirstRequest) -> GroupWaves:
        if isinstance(message, FirstRequest):
            return self  # the rank it speaks of will report by itself
        if isinstance(message, StartWave):
            message = Announce(message.epoch, message.rank, message.wave, RUNNING)
        elif isinstance(message, WaveComplete):
            message = Announce(message.epoch, message.rank, message.wave + 1, PAUSED)
        others = tuple(a for a in self.early if a.rank != message.rank)
        if any(a.rank == message.rank and a.epoch > message.epoch for a in self.early):
            return self
        return msgspec.structs.replace(self, early=(*others, message))


CoordinatorAction = Callable[[GroupWaves, int], tuple[GroupWaves, set[int]]]


def nothing(g: GroupWaves, wave: int) -> tuple[GroupWaves, set[int]]:
    return g, set()


def wake(g: GroupWaves, wave: int) -> tuple[GroupWaves, set[int]]:
    return msgspec.structs.replace(g, wave=wave, running=RUNNING), set(g.ranks)


def pause(g: GroupWaves, wave: int) -> tuple[GroupWaves, set[int]]:
    """Wave ``wave`` is over. While a member has not been heard, that is no proof that nobody waits in the next."""
    if not g.heard.issuperset(g.ranks):
        return wake(g, wave + 1)
    return msgspec.structs.replace(g, wave=wave + 1, running=PAUSED), set()


def tell(g: GroupWaves, rank: int) -> tuple[GroupWaves, set[int]]:
    return g, {rank}


COORDINATOR: dict[tuple[bool, Event, Order], CoordinatorAction] = {
    (PAUSED, Event.NOTICE, Order.NONE): wake,
    (PAUSED, Event.START, Order.BEHIND): nothing,  # that wave's end came first
    (PAUSED, Event.START, Order.SAME): wake,
    (PAUSED, Event.START, Order.AHEAD): wake,  # a start that overtook the end of the wave before
    (PAUSED, Event.END, Order.BEHIND): nothing,
    (PAUSED, Event.END, Order.SAME): pause,
    (PAUSED, Event.END, Order.AHEAD): pause,
    (PAUSED, Event.HELLO, Order.NONE): nothing,
    (RUNNING, Event.NOTICE, Order.NONE): nothing,
    (RUNNING, Event.START, Order.BEHIND): nothing,
    (RUNNING, Event.START, Order.SAME): nothing,  # two ranks woke at once, or a notice came first
    (RUNNING, Event.START, Order.AHEAD): wake,
    (RUNNING, Event.END, Order.BEHIND): nothing,  # overtaken by the start of the wave after
    (RUNNING, Event.END, Order.SAME): pause,
    (RUNNING, Event.END, Order.AHEAD): pause,
    (RUNNING, Event.HELLO, Order.NONE): tell,
}
