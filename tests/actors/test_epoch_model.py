"""All interleavings of changes of membership in small groups; and the proof that the search finds what it is for.

Slow-marked searches are the same in larger worlds. With ``-s`` each prints how many states it covers: 430,000 without
the slow ones, 2.3 million in those.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

import epoch_coordinator
import epoch_manager
import epoch_ranks
import msgspec
import pytest
from epoch_model import Model
from epoch_world import DEAD, NONE, Proc, World, put
from explorer import Move, explore

from actors.membership import Epoch
from actors.transition import UNDOABLE, Ballot, Phase
from actors.waves import EngineWaves, GroupWaves, Report, StartWave
from actors.wire import FirstRequest

GROW, SHRINK = [(0,), (0, 1)], [(0, 1), (0,)]
SMALL = {
    "1 to 2, a request, a failure": (Model([(0,), (0, 1)], requests=1, failures=1), 70_000),
    "2 to 1, a request, a failure": (Model([(0, 1), (0,)], requests=1, failures=1), 60_000),
    "2 to 1, a request that may be aborted": (Model([(0, 1), (0,)], requests=1, aborts=1), 50_000),
    "2 to 3": (Model([(0, 1), (0, 1, 2)]), 50_000),
    "3 to 2": (Model([(0, 1, 2), (0, 1)]), 15_000),
    "3 to 1": (Model([(0, 1, 2), (0,)]), 2_500),
    "one of two is replaced, a failure": (Model([(0, 1), (0, 2)], failures=1), 10_000),
    "2 to 1 to 2, the rank number is used again": (Model([(0, 1), (0,), (0, 2)], ranks=(0, 1, 1)), 30_000),
    "1 to 2, again after a failure, calls overtake each other": (
        Model([(0,), (0, 1), (0, 2)], ranks=(0, 1, 1), failures=1, overtaking=True, retry=True),
        15_000,
    ),
    "2 to 1, a failure, calls overtake each other": (Model([(0, 1), (0,)], failures=1, overtaking=True), 2_000),
    "1 to 2, a failure, a coordinator that may die": (Model([(0,), (0, 1)], failures=1, restarts=1), 15_000),
    "2 to 1, a failure, a coordinator that may die": (Model([(0, 1), (0,)], failures=1, restarts=1), 5_000),
}
LARGE = {
    "2 to 3, a failure": (Model([(0, 1), (0, 1, 2)], failures=1), 100_000),
    "1 to 2, two requests": (Model(GROW, requests=2, lag=2), 500_000),
    "2 to 1, two requests": (Model(SHRINK, requests=2, lag=2), 450_000),
    "1 to 2, a request, a coordinator that may die": (Model(GROW, requests=1, restarts=1), 200_000),
    "2 to 1, a request, a coordinator that may die": (Model(SHRINK, requests=1, restarts=1), 180_000),
    "one of two is replaced, a request, a failure": (
        Model([(0, 1), (0, 2)], requests=1, failures=1, lag=2),
        500_000,
    ),
    "1 to 2, a request, again after a failure, calls overtake each other": (
        Model([(0,), (0, 1), (0, 2)], ranks=(0, 1, 1), requests=1, failures=1, overtaking=True, lag=2, retry=True),
        240_000,
    ),
}


def _covers(model: Model, at_least: int) -> None:
    search = model.search()
    assert search.finding is None, str(search.finding)
    print(f"{search.states} states, {search.moves} moves, {search.resting} at rest")
    assert search.states > at_least


@pytest.mark.parametrize("name", SMALL)
def test_no_change_of_membership_leaves_a_request_or_a_rank_waiting(name: str) -> None:
    _covers(*SMALL[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_no_change_of_membership_leaves_a_request_or_a_rank_waiting_in_larger_worlds(name: str) -> None:
    _covers(*LARGE[name])


@pytest.mark.parametrize("memberships", [SHRINK, [(0, 1), (0, 2)]])
def test_one_answer_to_disarm_decides_for_all(memberships: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others only have to let go, at any time; only silence from all says nothing (see below)."""
    monkeypatch.setattr(epoch_manager, "nothing_left", lambda model, world: None)
    monkeypatch.setattr(epoch_manager, "enough", lambda answers: any(answer != NONE for answer in answers))
    _covers(Model(memberships, failures=1), 2_000)


def test_a_late_word_of_a_process_that_left_does_no_harm() -> None:
    _covers(_with_a_late_word(Model([(0, 2)], ranks=(0, 1, 1), requests=1)), 150)


def test_the_searches_pass_through_what_they_are_for() -> None:
    """Else they would find nothing wrong with it for want of trying."""
    names: set[str] = set()
    for model in (Model(GROW, failures=1), Model(SHRINK, requests=1, lag=2), Model(GROW, restarts=1, lag=2)):

        def moves(world: World, model: Model = model) -> Iterator[Move[World]]:
            for move in model.moves(world):
                names.add(re.sub(r"\d+", "#", move.name) + (" and the group is lost" if move.after.lost else ""))
                yield move

        assert explore(model.start, moves, model.wrong_at_rest, fair=True).finding is None
    for phase in UNDOABLE - {Phase.ARMED}:
        assert any(f"fails while {phase.value}" in name for name in names), phase
    assert names >= {
        "process # enters ('step', #, #, #) with vote #",
        "process # enters ('step', #, #, #) with vote # and the group is lost",
        "the caller cancels",
        "joiner # dies",
        "joiner # stalls",
        "the manager gives up on the joiner",
        "the manager ends the joiner",
        "a member has switched already",
        "all have switched",
        "the coordinator is told of the new epoch",
        "the new coordinator is told of the group",
        "the manager ends who left",
        "clients learn of epoch #",
        "request # is sent to process # in epoch #",
        "the client takes ('stale', #, #, #) of process #",
        "the client takes ('finish', #, #, #) of process #",
    }


@pytest.mark.parametrize("seed", range(100))
def test_random_walks_through_many_changes_come_to_rest(seed: int) -> None:
    draw = random.Random(seed)
    model = Model(
        [(0, 1, 2), (0, 1, 2, 3), (1, 3), (1, 3, 4, 5), (1, 3, 4, 5, 6), (3,), (3, 7)],
        ranks=(0, 1, 2, 3, 4, 5, 6, 0),
        requests=6,
        failures=2,
        restarts=2,
        aborts=1,
        overtaking=draw.random() < 0.5,
        notices=True,
        lag=6,
    )
    world = model.start
    for _ in range(20_000):
        moves = list(model.moves(world))
        forced, free = [move for move in moves if move.forced], [move for move in moves if not move.forced]
        if not forced and (not free or draw.random() < 0.05):
            break
        # Every move of the environment's, of which there may be very many, together as likely as one forced move.
        index = draw.randrange(len(forced) + bool(free))
        world = (forced[index] if index < len(forced) else draw.choice(free)).after
    assert not any(move.forced for move in model.moves(world)), "still busy"
    assert model.wrong_at_rest(world) is None


# --- without a safeguard ------------------------------------------------------------------------------------------

_disarmed = epoch_ranks.disarmed
_joined, _told = EngineWaves.joined, EngineWaves.told


def _joiner_s_own(e: EngineWaves, epoch: Epoch, rank: int, standings: list) -> tuple[EngineWaves, list[Report]]:
    return _joined(e, epoch, rank, standings if e.epoch else [e.standing])


def _silent(e: EngineWaves, epoch: Epoch, rank: int, standings: list) -> tuple[EngineWaves, list[Report]]:
    return _joined(e, epoch, rank, standings)[0], []


def _told_in_any_epoch(e: EngineWaves, message: StartWave) -> tuple[EngineWaves, list[Report]]:
    return _told(e, msgspec.structs.replace(message, epoch=e.epoch))


def _heard_in_any_epoch(g: GroupWaves, message: Report | FirstRequest) -> Report | FirstRequest:
    return msgspec.structs.replace(message, epoch=g.epoch) if g.epoch else message


def _heard_of_the_past(g: GroupWaves, message: Report | FirstRequest) -> Report | FirstRequest:
    return msgspec.structs.replace(message, epoch=max(message.epoch, g.epoch))


def _answered_only(proc: Proc, number: int) -> Proc:
    return proc._replace(answer=proc.waves.epoch)


def _answered_old(proc: Proc, number: int) -> Proc:
    return _disarmed(proc, number)._replace(answer=number - 1)


def _members_only(model: Model, world: World, p: int) -> bool:
    return p in model.memberships[world.manager.known]


def _unchecked(patch: pytest.MonkeyPatch) -> None:
    """What is left when an operation ends shows at once; here is what it leads to."""
    patch.setattr(epoch_manager, "nothing_left", lambda model, world: None)


def _with_a_late_word(model: Model) -> Model:
    """The process that had the second one's rank left long ago, and something that it said is still under way."""
    gone = Proc(EngineWaves(rank=1), place=DEAD, up=(StartWave(0, 1, 1),))
    model.start = put(model.start, 1, gone)
    return model


Patch = Callable[[pytest.MonkeyPatch], None]


def _instead(where: object, name: str, variant: object, also: Patch = lambda patch: None) -> Patch:
    def remove(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(where, name, variant)
        also(patch)

    return remove


WITHOUT: dict[str, tuple[Patch, Model]] = {
    "a joiner adopts the maximum": (_instead(EngineWaves, "joined", _joiner_s_own), Model(GROW)),
    "members announce themselves in the new epoch": (_instead(EngineWaves, "joined", _silent), Model(GROW)),
    "ranks drop what the coordinator said in another epoch": (
        _instead(EngineWaves, "told", _told_in_any_epoch),
        Model(SHRINK),
    ),
    "the coordinator drops messages of older epochs": (
        _instead(epoch_coordinator, "as_heard", _heard_of_the_past),
        _with_a_late_word(Model([(0, 2)], ranks=(0, 1, 1), requests=1)),
    ),
    "the coordinator takes no message of an epoch to come for one of its own": (
        _instead(epoch_coordinator, "as_heard", _heard_in_any_epoch),
        Model(GROW),
    ),
    "words from an epoch to come are kept": (
        _instead(GroupWaves, "_keep", lambda g, message: g),
        Model(GROW, restarts=1),
    ),
    "ranks refuse requests of older epochs": (
        _instead(epoch_ranks, "is_stale", lambda proc, epoch: False),
        Model(SHRINK, requests=1),
    ),
    "members vote when they have heard the joiner": (
        _instead(epoch_ranks, "joiners_here", lambda *_: (True,)),
        Model(GROW, failures=1),
    ),
    "an armed rank counts as one with work": (
        _instead(epoch_ranks, "has_work", lambda proc: bool(proc.queue)),
        Model(GROW),
    ),
    "a rank switches when all have voted, not when one has": (
        _instead(Ballot, "switches", lambda ballot, votes: any(votes)),
        Model([(0, 1), (0, 1, 2)]),
    ),
    "a rank switches when all have voted, not when it has": (
        _instead(Ballot, "switches", lambda ballot, votes: ballot.armed in votes and ballot.armed > 0),
        Model([(0, 1), (0, 1, 2)]),
    ),
    "a rank switches when all have voted, not when most have": (
        _instead(Ballot, "switches", lambda ballot, votes: 2 * sum(map(bool, votes)) > len(votes)),
        Model([(0, 1, 2), (0, 1)]),
    ),
    "a rank that is to disarm takes its vote back": (
        _instead(epoch_ranks, "disarmed", _answered_only),
        Model(GROW, failures=1),
    ),
    "a rank that is to disarm takes its vote back, once its joiner is gone": (
        _instead(epoch_ranks, "disarmed", _answered_only, also=_unchecked),
        Model(GROW, failures=1),
    ),
    "a rank that has switched says so": (
        _instead(epoch_ranks, "disarmed", _answered_old),
        Model(GROW, failures=1),
    ),
    "silence does not mean that nobody has switched": (
        _instead(epoch_manager, "enough", lambda answers: True, also=_unchecked),
        Model(SHRINK, failures=1),
    ),
    "silence does not mean that a joiner may be ended": (
        _instead(epoch_manager, "enough", lambda answers: True, also=_unchecked),
        Model(GROW, failures=1),
    ),
    "the manager waits until all have let go": (
        _instead(epoch_manager, "enough", lambda answers: True),
        Model(SHRINK, failures=1),
    ),
    "a joiner does not get the rank of one that leaves in the same operation": (
        lambda patch: None,
        Model([(0, 1), (0, 2)], ranks=(0, 1, 1), restarts=1),
    ),
    "joiners are told of a coordinator that was replaced": (
        _instead(epoch_coordinator, "follows", _members_only),
        Model(GROW, restarts=1),
    ),
}


@pytest.mark.parametrize("safeguard", WITHOUT)
def test_the_search_finds_what_goes_wrong_without(safeguard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remove, model = WITHOUT[safeguard]
    remove(monkeypatch)
    search = model.search(limit=150_000)
    print(f"{search.states} states: {search.finding}")
    assert search.finding is not None
    assert "states" not in search.finding.wrong, "it should find more than that there is no end"
