"""The start of a group, rank by rank, as the manager sees it. Pure: events in, a table of states, clear errors out.

    NEW --hello--> CONNECTED --ready--> READY

Anything else is refused with the rank named. A rank that dies is reported with what it was doing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class State(Enum):
    NEW = "new"
    CONNECTED = "connected"
    READY = "ready"


# (state, event) -> next state; what is not here is out of order.
TRANSITIONS = {
    (State.NEW, "hello"): State.CONNECTED,
    (State.CONNECTED, "ready"): State.READY,
}


class HandshakeError(RuntimeError):
    """A rank said something it must not say now; the message names the rank."""


@dataclass(frozen=True)
class Hello:
    """An engine's first word: which rank it is and where it runs. ``devices`` are the ids Ray assigned to it."""

    rank: int
    node_id: str
    ip: str
    pid: int
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Ready:
    """An engine that can serve: where clients reach it and what it holds. ``load_s`` is what loading took, seconds."""

    rank: int
    address: str
    kv_blocks: int
    block_size: int
    max_model_len: int
    load_s: float


@dataclass
class Rank:
    """What is expected of a rank and how far it has come. ``doing`` is the engine's own word on its progress."""

    rank: int
    node_id: str
    local_rank: int
    state: State = State.NEW
    doing: str = "starting its process"
    hello: Hello | None = None
    ready: Ready | None = None


@dataclass
class Handshake:
    """All ranks of a starting group. Built with (rank, node id, local rank) of each as placed."""

    ranks: dict[int, Rank] = field(default_factory=dict)

    @classmethod
    def expecting(cls, placed: list[tuple[int, str, int]]) -> Handshake:
        return cls({rank: Rank(rank, node_id, local_rank) for rank, node_id, local_rank in placed})

    def hello(self, word: Hello) -> None:
        """Raises HandshakeError for an unknown rank, a second hello, a wrong node."""
        rank = self._advance(word.rank, "hello")
        if word.node_id != rank.node_id:
            raise HandshakeError(
                f"dp_rank_{word.rank} was placed on node {rank.node_id} but runs on node {word.node_id} ({word.ip}): "
                "its placement group moved; remove the group and start again"
            )
        rank.hello = word
        rank.doing = "connected"

    def ready(self, word: Ready) -> None:
        """Raises HandshakeError for an unknown rank, one that never said hello, or one whose limits differ."""
        rank = self._advance(word.rank, "ready")
        for other in self.ranks.values():
            if other.ready is not None and other.ready.max_model_len != word.max_model_len:
                raise HandshakeError(
                    f"dp_rank_{word.rank} serves sequences of {word.max_model_len} tokens, dp_rank_{other.rank} of "
                    f"{other.ready.max_model_len}: all nodes must have the same checkpoint and configuration"
                )
        rank.ready = word
        rank.doing = "ready"

    def _advance(self, number: int, event: str) -> Rank:
        rank = self.ranks.get(number)
        if rank is None:
            raise HandshakeError(f"dp_rank_{number} said {event} but is not expected: expected {sorted(self.ranks)}")
        state = TRANSITIONS.get((rank.state, event))
        if state is None:
            raise HandshakeError(f"dp_rank_{number} said {event} while {rank.state.value}: out of order")
        rank.state = state
        return rank

    @property
    def complete(self) -> bool:
        return all(rank.state is State.READY for rank in self.ranks.values())

    def progress(self) -> str:
        """One line for people: how many are connected and ready, and what the slowest is doing."""
        total = len(self.ranks)
        connected = sum(rank.state is not State.NEW for rank in self.ranks.values())
        ready = sum(rank.state is State.READY for rank in self.ranks.values())
        line = f"{connected} of {total} ranks connected, {ready} of {total} ready"
        order = list(State)
        slowest = min(self.ranks.values(), key=lambda rank: (order.index(rank.state), rank.rank), default=None)
        if slowest is not None and slowest.state is not State.READY:
            line += f"; dp_rank_{slowest.rank}: {slowest.doing}"
        return line
