"""All interleavings of the wave protocol in small groups; and the proof that the search finds what it is for.

Slow-marked searches are the same in larger worlds.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
import pytest
import wave_model
from explorer import Move, Violation, explore

from actors import waves
from actors.waves import COORDINATOR, ENGINE, PAUSED, RUNNING, EngineWaves, Event, GroupWaves, Order, Report
from actors.wire import Announce, FirstRequest, StartWave, WaveComplete

SMALL = {
    "two ranks, two requests": (wave_model.quiet(2, 2), 20_000),
    "two ranks that overlap steps, two requests": (wave_model.quiet(2, 2, overlap=True), 50_000),
    "two ranks, a client that may die, a coordinator that may": (wave_model.quiet(2, 1, deaths=1, restarts=1), 20_000),
    "two ranks that overlap steps, the same": (wave_model.quiet(2, 1, 1, 1, overlap=True), 30_000),
    "three ranks, a client that may die": (wave_model.quiet(3, 1, deaths=1), 8_000),
    "three ranks, launched": (wave_model.launched(3, 1), 25_000),
}
LARGE = {
    "two requests, a coordinator that may die": (wave_model.quiet(2, 2, restarts=1), 250_000),
    "two requests, both may die": (wave_model.quiet(2, 2, deaths=1, restarts=1), 600_000),
    "a coordinator that may die twice": (wave_model.quiet(2, 1, restarts=2), 30_000),
    "three ranks, two requests": (wave_model.quiet(3, 2), 300_000),
    "three ranks, both may die": (wave_model.quiet(3, 1, deaths=1, restarts=1), 300_000),
}


@pytest.mark.parametrize("name", SMALL)
def test_no_interleaving_leaves_a_request_or_a_rank_waiting(name: str) -> None:
    _covers(*SMALL[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_no_interleaving_leaves_a_request_or_a_rank_waiting_in_larger_worlds(name: str) -> None:
    _covers(*LARGE[name])


def _covers(start: wave_model.World, at_least: int) -> None:
    search = wave_model.search(start)
    assert search.finding is None, str(search.finding)
    print(f"{search.states} states, {search.moves} moves, {search.resting} at rest")
    assert search.states > at_least


@pytest.mark.parametrize("seed", range(100))
def test_random_walks_in_a_group_of_six_come_to_rest(seed: int) -> None:
    draw = random.Random(seed)
    world = wave_model.quiet(6, requests=8, deaths=draw.randrange(2), restarts=3, overlap=draw.random() < 0.5)
    for _ in range(5_000):
        moves = list(wave_model.moves(world))
        if not any(move.forced for move in moves) and (not moves or draw.random() < 0.2):
            break
        # Every move of the environment's, of which there may be very many, together as likely as one forced move.
        forced = [move for move in moves if move.forced]
        free = [move for move in moves if not move.forced]
        index = draw.randrange(len(forced) + bool(free))
        world = (forced[index] if index < len(forced) else draw.choice(free)).after
    assert not any(move.forced for move in wave_model.moves(world)), "still busy"
    assert wave_model.wrong_at_rest(world) is None


# --- without a safeguard ------------------------------------------------------------------------------------------


def _wake_silently(e: EngineWaves, wave: int) -> tuple[EngineWaves, list[Report]]:
    return waves.run(e, wave)


def _one_reporter(e: EngineWaves, wave: int) -> tuple[EngineWaves, list[Report]]:
    after, reports = waves.leave(e, wave)
    return after, reports if e.rank == 0 else []


def _pause_undoubting(g: GroupWaves, wave: int) -> tuple[GroupWaves, set[int]]:
    return msgspec.structs.replace(g, wave=wave + 1, running=PAUSED), set()


_receive = GroupWaves.receive


def _notice_without_target(g: GroupWaves, message: Report | FirstRequest) -> tuple[GroupWaves, list[StartWave]]:
    after, told = _receive(g, message)
    if isinstance(message, FirstRequest):
        told = [start for start in told if start.rank != message.rank]
    return after, told


def _deaf_to_announcements(g: GroupWaves, message: Report | FirstRequest) -> tuple[GroupWaves, list[StartWave]]:
    return (g, []) if isinstance(message, Announce) else _receive(g, message)


Patch = Callable[[pytest.MonkeyPatch], None]


def _cell(table: dict, key: tuple[bool, Event, Order], action: Callable) -> Patch:
    return lambda patch: patch.setitem(table, key, action)


def _undoubting(patch: pytest.MonkeyPatch) -> None:
    for phase in (PAUSED, RUNNING):
        for order in (Order.SAME, Order.AHEAD):
            patch.setitem(COORDINATOR, (phase, Event.END, order), _pause_undoubting)


WITHOUT: dict[str, tuple[Patch, wave_model.World]] = {
    "a rank reports that it wakes": (
        _cell(ENGINE, (PAUSED, Event.SUBMIT, Order.NONE), _wake_silently),
        wave_model.quiet(2, 1),
    ),
    "a paused rank ignores starts of older waves": (
        _cell(ENGINE, (PAUSED, Event.START, Order.BEHIND), waves.run),
        wave_model.quiet(2, 2),
    ),
    "a running rank ignores starts of older waves": (
        _cell(ENGINE, (RUNNING, Event.START, Order.BEHIND), waves.run),
        wave_model.quiet(2, 2),
    ),
    "a running rank remembers starts of newer waves": (
        _cell(ENGINE, (RUNNING, Event.START, Order.AHEAD), waves.ignore),
        wave_model.quiet(2, 2, overlap=True),
    ),
    "a running rank does not jump to newer waves": (
        _cell(ENGINE, (RUNNING, Event.START, Order.AHEAD), waves.run),
        wave_model.quiet(2, 2, overlap=True),
    ),
    "steps are counted": (
        _cell(ENGINE, (RUNNING, Event.START, Order.SAME), waves.run),
        wave_model.quiet(2, 2),
    ),
    "every rank reports the end of a wave": (
        _cell(ENGINE, (RUNNING, Event.IDLE, Order.NONE), _one_reporter),
        wave_model.quiet(2, 1, restarts=1),
    ),
    "a start is broadcast": (
        _cell(COORDINATOR, (PAUSED, Event.START, Order.SAME), waves.tell),
        wave_model.quiet(2, 1),
    ),
    "a start that overtakes the end of the wave before is broadcast": (
        _cell(COORDINATOR, (RUNNING, Event.START, Order.AHEAD), waves.nothing),
        wave_model.quiet(2, 1, restarts=1),
    ),
    "late ends of older waves are ignored": (
        _cell(COORDINATOR, (RUNNING, Event.END, Order.BEHIND), waves.pause),
        wave_model.quiet(2, 1, restarts=1),
    ),
    "ends that others report too count once": (
        _cell(COORDINATOR, (PAUSED, Event.END, Order.BEHIND), waves.wake),
        wave_model.quiet(2, 1),
    ),
    "a notice wakes its target too": (
        lambda patch: patch.setattr(GroupWaves, "receive", _notice_without_target),
        wave_model.quiet(2, 1, deaths=1),
    ),
    "announcements rebuild the coordinator": (
        lambda patch: patch.setattr(GroupWaves, "receive", _deaf_to_announcements),
        wave_model.quiet(2, 1, restarts=1),
    ),
    "who announces itself is told of the wave that runs": (
        _cell(COORDINATOR, (RUNNING, Event.HELLO, Order.NONE), waves.nothing),
        wave_model.quiet(2, 1, restarts=1),
    ),
    "the group runs until all have been heard": (_undoubting, wave_model.quiet(2, 2, restarts=1)),
    "words from an epoch to come are kept": (
        lambda patch: patch.setattr(GroupWaves, "_keep", lambda g, message: g),
        wave_model.quiet(2, 1, restarts=1),
    ),
}


@pytest.mark.parametrize("safeguard", WITHOUT)
def test_the_search_finds_what_goes_wrong_without(safeguard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remove, start = WITHOUT[safeguard]
    remove(monkeypatch)
    search = wave_model.search(start, limit=100_000)
    assert search.finding is not None
    assert "states" not in search.finding.wrong, "it should find more than that there is no end"
    print(search.finding)


def test_a_request_gets_through_without_any_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing depends on the front-end's word: it only saves a hop."""
    monkeypatch.setitem(COORDINATOR, (PAUSED, Event.NOTICE, Order.NONE), waves.nothing)
    assert wave_model.search(wave_model.quiet(2, 1, deaths=1, restarts=1)).finding is None


def test_the_tables_know_every_event_in_both_phases() -> None:
    starts_and_ends = {(phase, order) for phase in (PAUSED, RUNNING) for order in Order if order is not Order.NONE}
    for table, event in ((ENGINE, Event.START), (COORDINATOR, Event.START), (COORDINATOR, Event.END)):
        assert {(phase, order) for phase, known, order in table if known is event} == starts_and_ends


# --- the search itself --------------------------------------------------------------------------------------------


def _counter(to: int, *, back: bool = False, bad: int | None = None) -> Callable[[int], list[Move[int]]]:
    def moves(state: int) -> list[Move[int]]:
        if state == bad:
            raise Violation("bad state")
        up = [Move("up", state + 1)] if state < to else []
        return up + ([Move("back", 0)] if back and state == to else [])

    return moves


def test_the_search_gives_the_shortest_history() -> None:
    search = explore(0, _counter(5), lambda state: f"rests at {state}")
    assert search.finding is not None
    assert search.finding.wrong == "rests at 5"
    assert search.finding.history == ("up",) * 5
    assert (search.states, search.moves, search.resting) == (6, 5, 1)


def test_the_search_finds_what_never_ends_and_what_must_not_happen() -> None:
    endless = explore(0, _counter(5, back=True), lambda state: None)
    assert endless.finding is not None and endless.finding.wrong == "this can go on for ever"
    bad = explore(0, _counter(5, bad=3), lambda state: None)
    assert bad.finding is not None and bad.finding.history == ("up",) * 3
    assert explore(0, _counter(5), lambda state: None).finding is None


def test_a_fair_search_finds_what_forced_moves_can_t_end() -> None:
    def moves(state: int) -> list[Move[int]]:
        """0 and 1 are a circle with a way out of it, to 2; 3 and 4 are one that only the environment can end."""
        ways = {0: [1, 3], 1: [0, 2], 3: [4], 4: [3]}.get(state, [])
        if start == 0:
            ways = [way for way in ways if way != 3]
        return [Move(str(way), way) for way in ways] + ([Move("2", 2, forced=False)] if state == 4 else [])

    start = 0
    assert explore(start, moves, lambda state: None, fair=True).finding is None
    start = 3
    endless = explore(start, moves, lambda state: None, fair=True).finding
    assert endless is not None and endless.wrong == "this can go on for ever"


def test_messages_of_the_model_are_the_protocol_s_own() -> None:
    """Engines say three things; were a fourth added, the model would have to learn it."""
    assert set(Report.__args__) == {Announce, StartWave, WaveComplete}
