"""Exhaustive search over the states of a model: breadth first, so that the history of what it finds is the shortest."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

State = TypeVar("State", bound=Hashable)


class Move(NamedTuple, Generic[State]):
    """``forced`` moves happen sooner or later; the others are the environment's choice and may never happen."""

    name: str
    after: State
    forced: bool = True


class Violation(Exception):
    """Raised by a model for a move that must not be possible; its text says what is wrong with it."""


@dataclass(frozen=True)
class Finding:
    """What is wrong, and the moves that lead there."""

    wrong: str
    history: tuple[str, ...]

    def __str__(self) -> str:
        return "\n  ".join([self.wrong, *self.history])


@dataclass(frozen=True)
class Search:
    states: int
    moves: int
    resting: int
    finding: Finding | None


def explore(
    start: State,
    moves: Callable[[State], Iterable[Move[State]]],
    wrong_at_rest: Callable[[State], str | None],
    limit: int = 1_000_000,
    fair: bool = False,
) -> Search:
    """All states reachable from ``start``, up to the first finding.

    Findings are: a move that raises ``Violation``; a state without forced moves of which ``wrong_at_rest`` has
    something to say; a history that never ends (the moves form a cycle); more than ``limit`` states. In a ``fair``
    world a history may go in circles for as long as it likes, if forced moves can still end it: the finding then is
    a state from which they lead to no rest.
    """
    ids: dict[State, int] = {start: 0}
    parents: list[tuple[int, str]] = [(0, "")]
    todo = deque([start])
    sources, targets, by_force = array("I"), array("I"), bytearray()
    rests = array("I")

    def finding(wrong: str, state: int) -> Search:
        history = []
        while state:
            state, name = parents[state]
            history.append(name)
        return Search(len(ids), len(sources), len(rests), Finding(wrong, tuple(reversed(history))))

    while todo:
        state = todo.popleft()
        here = ids[state]
        at_rest = True
        try:
            for name, after, forced in moves(state):
                at_rest = at_rest and not forced
                there = ids.get(after)
                if there is None:
                    there = ids[after] = len(ids)
                    parents.append((here, name))
                    todo.append(after)
                sources.append(here)
                targets.append(there)
                by_force.append(forced)
        except Violation as violation:
            return finding(str(violation), here)
        if at_rest:
            rests.append(here)
            wrong = wrong_at_rest(state)
            if wrong is not None:
                return finding(wrong, here)
        if len(ids) > limit:
            return finding(f"more than {limit} states", here)

    if fair:
        endless = _without_rest(len(ids), sources, targets, by_force, rests)
    else:
        endless = _on_a_cycle(len(ids), sources, targets)
    if endless is not None:
        return finding("this can go on for ever", endless)
    return Search(len(ids), len(sources), len(rests), None)


def _on_a_cycle(states: int, sources: array[int], targets: array[int]) -> int | None:
    """A state that is on a cycle or leads to one only, if there is any: what Kahn's algorithm leaves over."""
    entering = array("I", bytes(4 * states))
    first = array("I", bytes(4 * (states + 1)))  # breadth first: moves are grouped by their source, in order
    for source, target in zip(sources, targets, strict=True):
        entering[target] += 1
        first[source + 1] += 1
    for state in range(states):
        first[state + 1] += first[state]
    ready = [state for state in range(states) if not entering[state]]
    removed = 0
    while ready:
        state = ready.pop()
        removed += 1
        for target in targets[first[state] : first[state + 1]]:
            entering[target] -= 1
            if not entering[target]:
                ready.append(target)
    return None if removed == states else next(state for state in range(states) if entering[state])


def _without_rest(
    states: int, sources: array[int], targets: array[int], by_force: bytearray, rests: array[int]
) -> int | None:
    """The first state from which forced moves lead to none of ``rests``, if there is any."""
    first = array("I", bytes(4 * (states + 1)))
    for target, forced in zip(targets, by_force, strict=True):
        first[target + 1] += forced
    for state in range(states):
        first[state + 1] += first[state]
    free = array("I", first)
    entries = array("I", bytes(4 * first[states]))  # the sources of forced moves, grouped by their target
    for source, target, forced in zip(sources, targets, by_force, strict=True):
        if forced:
            entries[free[target]] = source
            free[target] += 1
    reached = bytearray(states)
    todo = list(rests)
    for state in todo:
        reached[state] = 1
    while todo:
        state = todo.pop()
        for source in entries[first[state] : first[state + 1]]:
            if not reached[source]:
                reached[source] = 1
                todo.append(source)
    endless = reached.find(0)
    return None if endless < 0 else endless
