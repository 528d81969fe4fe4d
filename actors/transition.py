"""Transitions: how a group that serves becomes another one, between two steps.

Theory of operation
-------------------
A transition turns (members, expert map) into (members', map'). Growing, shrinking, moving experts and the first start
are the same thing. All that takes time is done beside the serving group, and can be undone without a trace; the change
itself is one decision that all members take at the same step. The manager drives it through the phases of
``TRANSITIONS``; each has one effect, which ends with ``DONE`` or ``FAILED``:

    placing      placement groups for the joiners; leaving ranks get nothing new from here on
    launching    the joiners' processes, their weights
    joining      the next epoch's exchange, connected beside the present one
    prefetching  experts that the new map wants where they do not stand yet, one between two steps
    draining     requests on leaving ranks may end, for a bounded time
    armed        all members vote; then they switch
    committed    the coordinator, and through it the front-ends, learn of the new epoch
    retiring     what is no longer needed ends
    aborting     what was made is removed; the old epoch never stopped

*The decision.* Each member of the old epoch puts a vote, the number of the epoch it is ready for, into the vector that
ranks exchange in every step (``Ballot``). When one sync shows the same number from all, each of them, at the end of
that step, leaves the old epoch for the new one. A sync is all or nothing, so the decision is too, and no message can
overtake it. A member that is armed counts as one with work, so that a paused group wakes up, by the ordinary rules of
waves, and cannot fall asleep before it has switched.

*Joiners.* A joiner that is armed begins the first collective of the new epoch and waits in it. Members vote only once
they have its first bytes at hand: nobody switches into an epoch in which a joiner is missing, and a joiner that hangs
or dies before that costs nobody a wait. In that collective members tell each other where they stand, and the joiner
adopts the largest (wave, step) and whether the group runs (see ``waves.py``).

*Undoing.* Until it is armed a transition is undone by dropping things. Afterwards members are asked to disarm. A
member takes that word between two steps. If it is still in the old epoch then, its vote is gone, no later sync can show
all votes, and no earlier one did, or it would have switched: so nobody has. If it is in the new one, all will be, and
the transition goes on as committed. One answer therefore decides for all.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import msgspec


class Ballot(msgspec.Struct, frozen=True):
    """One member's side: ``epoch`` is the one it is in, ``armed`` the one it is ready to switch to (0: none)."""

    epoch: int = 0
    armed: int = 0

    def arm(self, epoch: int) -> Ballot:
        """Be ready for ``epoch``; nothing changes when that is history."""
        return msgspec.structs.replace(self, armed=epoch) if epoch > self.epoch else self

    def disarm(self, epoch: int) -> Ballot:
        """Be ready for ``epoch`` no more; nothing changes when it is the present one."""
        return msgspec.structs.replace(self, armed=0) if self.armed == epoch else self

    def vote(self, joiners_here: bool) -> int:
        """What to put into a sync."""
        return self.armed if joiners_here else 0

    def switches(self, votes: Sequence[int]) -> bool:
        """Whether a sync that showed these votes of all members is the last one of this epoch."""
        return votes[0] != 0 and len(set(votes)) == 1

    def switched(self) -> Ballot:
        return Ballot(self.armed)


# --- the manager's side ------------------------------------------------------------------------------------------


class Phase(enum.Enum):
    IDLE = "idle"
    PLACING = "placing"
    LAUNCHING = "launching"
    JOINING = "joining"
    PREFETCHING = "prefetching"
    DRAINING = "draining"
    ARMED = "armed"
    COMMITTED = "committed"
    RETIRING = "retiring"
    ABORTING = "aborting"


class Event(enum.Enum):
    BEGIN = "the operation was admitted"
    DONE = "the phase's effect was carried out"
    FAILED = "it could not be, or the caller cancelled"
    SWITCHED = "a member that was to disarm is in the new epoch already"


class Effect(enum.Enum):
    PLACE = "place"
    LAUNCH = "launch"
    JOIN = "join"
    PREFETCH = "prefetch"
    DRAIN = "drain"
    ARM = "arm"
    PUBLISH = "publish"
    RETIRE = "retire"
    UNDO = "undo"


TRANSITIONS: dict[tuple[Phase, Event], tuple[Phase, Effect | None]] = {
    (Phase.IDLE, Event.BEGIN): (Phase.PLACING, Effect.PLACE),
    (Phase.PLACING, Event.DONE): (Phase.LAUNCHING, Effect.LAUNCH),
    (Phase.LAUNCHING, Event.DONE): (Phase.JOINING, Effect.JOIN),
    (Phase.JOINING, Event.DONE): (Phase.PREFETCHING, Effect.PREFETCH),
    (Phase.PREFETCHING, Event.DONE): (Phase.DRAINING, Effect.DRAIN),
    (Phase.DRAINING, Event.DONE): (Phase.ARMED, Effect.ARM),
    (Phase.ARMED, Event.DONE): (Phase.COMMITTED, Effect.PUBLISH),
    (Phase.COMMITTED, Event.DONE): (Phase.RETIRING, Effect.RETIRE),
    (Phase.RETIRING, Event.DONE): (Phase.IDLE, None),
    (Phase.PLACING, Event.FAILED): (Phase.ABORTING, Effect.UNDO),
    (Phase.LAUNCHING, Event.FAILED): (Phase.ABORTING, Effect.UNDO),
    (Phase.JOINING, Event.FAILED): (Phase.ABORTING, Effect.UNDO),
    (Phase.PREFETCHING, Event.FAILED): (Phase.ABORTING, Effect.UNDO),
    (Phase.DRAINING, Event.FAILED): (Phase.ABORTING, Effect.UNDO),
    (Phase.ARMED, Event.FAILED): (Phase.ABORTING, Effect.UNDO),
    (Phase.ABORTING, Event.SWITCHED): (Phase.COMMITTED, Effect.PUBLISH),  # the votes were complete a moment before
    (Phase.ABORTING, Event.DONE): (Phase.IDLE, None),
}

UNDOABLE = frozenset(phase for phase, event in TRANSITIONS if event is Event.FAILED)
"""Phases in which an operation can be cancelled, and in which the loss of a joiner ends it."""


class Operation(msgspec.Struct, frozen=True):
    """One transition as its caller sees it; a value, ``take`` gives the next one.

    ``kind`` is ``start``, ``scale`` or ``rebalance``; ``retire`` are the ranks that leave. ``seconds`` are those spent
    by phase. ``error`` says why it was rolled back, out of ``failed_phase``; empty when it went well.
    ``drain_timeout_s`` bounds the phase of that name; ``pause_s`` is the longest time that a staying rank stood still
    at the switch, ``experts_moved`` counts all experts that any rank had to read.
    """

    id: str
    kind: str
    from_size: int
    to_size: int
    retire: tuple[int, ...] = ()
    phase: Phase = Phase.IDLE
    progress: str = ""
    epoch: int = 0
    done: bool = False
    error: str = ""
    failed_phase: str = ""
    seconds: dict[str, float] = {}
    drain_timeout_s: float = 0.0
    pause_s: float = 0.0
    experts_moved: int = 0
    since: float = 0.0

    def take(self, event: Event, now: float, error: str = "") -> tuple[Operation, Effect | None]:
        """The operation after ``event`` at time ``now`` (seconds, of any clock), and what to do next.

        ``error`` belongs to ``FAILED``. Raises ValueError for an event that can't happen in this phase.
        """
        following = TRANSITIONS.get((self.phase, event))
        if following is None:
            raise ValueError(f"operation {self.id} is {self.phase.value}: {event.name} can't happen now")
        phase, effect = following
        changes: dict[str, object] = {"phase": phase, "since": now, "progress": "", "done": phase is Phase.IDLE}
        if self.phase is not Phase.IDLE:
            spent = self.seconds.get(self.phase.value, 0.0) + now - self.since
            changes["seconds"] = self.seconds | {self.phase.value: round(spent, 3)}
        if event is Event.FAILED:
            changes |= {"error": error, "failed_phase": self.phase.value}
        elif event is Event.SWITCHED:
            changes |= {"error": "", "failed_phase": ""}
        return msgspec.structs.replace(self, **changes), effect

    def shown(self, progress: str) -> Operation:
        return msgspec.structs.replace(self, progress=progress)

    def counted(self, **results: float) -> Operation:
        """With ``epoch``, ``pause_s`` or ``experts_moved``, once known."""
        return msgspec.structs.replace(self, **results)
