"""Transitions as who drives one sees them: operations through their phases, and a member's ballot."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.transition import TRANSITIONS, UNDOABLE, Ballot, Effect, Event, Operation, Phase

FORWARD = [
    (Phase.PLACING, Effect.PLACE),
    (Phase.LAUNCHING, Effect.LAUNCH),
    (Phase.JOINING, Effect.JOIN),
    (Phase.PREFETCHING, Effect.PREFETCH),
    (Phase.DRAINING, Effect.DRAIN),
    (Phase.ARMED, Effect.ARM),
    (Phase.COMMITTED, Effect.PUBLISH),
    (Phase.RETIRING, Effect.RETIRE),
    (Phase.IDLE, None),
]


def _new() -> Operation:
    return Operation("resize-1", "scale", from_size=2, to_size=3)


def _in(phase: Phase) -> Operation:
    """A new operation, brought to ``phase`` without a failure."""
    operation, _ = _new().take(Event.BEGIN, 0.0)
    while operation.phase is not phase:
        operation, _ = operation.take(Event.DONE, 0.0)
    return operation


# --- the operation ------------------------------------------------------------------------------------------------


def test_an_operation_that_goes_well_takes_every_phase_in_turn() -> None:
    operation, passed = _new(), []
    event = Event.BEGIN
    while not operation.done:
        operation, effect = operation.take(event, 0.0)
        passed.append((operation.phase, effect))
        event = Event.DONE
    assert passed == FORWARD
    assert (operation.error, operation.failed_phase) == ("", "")


def test_every_phase_can_be_reached_and_left() -> None:
    assert {phase for phase, _ in TRANSITIONS} == {phase for phase, _ in TRANSITIONS.values()} == set(Phase)


def test_the_phases_before_the_switch_are_those_that_can_be_undone() -> None:
    assert {phase for phase, _ in FORWARD[:6]} == UNDOABLE


@pytest.mark.parametrize("phase", sorted(UNDOABLE, key=lambda phase: phase.value))
def test_a_failure_is_undone_and_remembered(phase: Phase) -> None:
    failed, effect = _in(phase).take(Event.FAILED, 1.0, "no room")
    assert (failed.phase, effect, failed.done) == (Phase.ABORTING, Effect.UNDO, False)
    assert (failed.error, failed.failed_phase) == ("no room", phase.value)
    ended, effect = failed.take(Event.DONE, 2.0)
    assert (ended.phase, effect, ended.done) == (Phase.IDLE, None, True)
    assert (ended.error, ended.failed_phase) == ("no room", phase.value)


def test_an_operation_whose_members_have_switched_already_ends_well() -> None:
    failed, _ = _in(Phase.ARMED).take(Event.FAILED, 1.0, "it was cancelled")
    operation, effect = failed.take(Event.SWITCHED, 2.0)
    assert (operation.phase, effect) == (Phase.COMMITTED, Effect.PUBLISH)
    assert (operation.error, operation.failed_phase) == ("", "")


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("event", Event)
def test_an_event_out_of_order_is_refused_and_changes_nothing(phase: Phase, event: Event) -> None:
    if (phase, event) in TRANSITIONS:
        return
    operation = Operation("resize-1", "scale", 2, 3, phase=phase)
    with pytest.raises(ValueError, match=f"operation resize-1 is {phase.value}"):
        operation.take(event, 1.0)
    assert operation == Operation("resize-1", "scale", 2, 3, phase=phase)


def test_what_is_shown_belongs_to_its_phase() -> None:
    operation = _in(Phase.LAUNCHING).shown("1 of 2 ranks")
    assert operation.progress == "1 of 2 ranks"
    assert operation.take(Event.DONE, 0.0)[0].progress == ""


waits = st.floats(0, 1000)


@given(st.data())
def test_whatever_happens_an_operation_ends_idle_and_its_seconds_add_up(data: st.DataObject) -> None:
    begun = now = data.draw(waits)
    operation, effect = _new().take(Event.BEGIN, now)
    steps = 0
    while effect is not None:
        now += data.draw(waits)
        event = data.draw(st.sampled_from([event for phase, event in TRANSITIONS if phase is operation.phase]))
        operation, effect = operation.take(event, now, "it failed" if event is Event.FAILED else "")
        steps += 1
        assert steps <= 2 * len(Phase), "an operation may go through each phase once, and roll back once"
    assert (operation.phase, operation.done) == (Phase.IDLE, True)
    assert bool(operation.error) == bool(operation.failed_phase)
    assert ("committed" in operation.seconds) == (not operation.error)
    assert sum(operation.seconds.values()) == pytest.approx(now - begun, abs=0.01)


# --- the ballot ---------------------------------------------------------------------------------------------------

epochs = st.integers(1, 5)
orders = st.lists(st.tuples(st.sampled_from(["arm", "disarm"]), epochs), max_size=8)


def _after(ballot: Ballot, calls: list[tuple[str, int]]) -> Ballot:
    for name, epoch in calls:
        ballot = getattr(ballot, name)(epoch)
    return ballot


@given(epochs, orders)
def test_a_member_is_ready_for_what_is_to_come_or_for_nothing(present: int, calls: list[tuple[str, int]]) -> None:
    ballot = _after(Ballot(present), calls)
    assert ballot.epoch == present
    assert ballot.armed == 0 or ballot.armed > present


@given(epochs, orders, epochs)
def test_who_was_disarmed_votes_for_that_epoch_no_more(present: int, calls: list[tuple[str, int]], epoch: int) -> None:
    assert _after(Ballot(present), calls).disarm(epoch).vote(joiners_here=True) != epoch


@given(epochs, orders)
def test_nobody_votes_before_the_joiners_are_here(present: int, calls: list[tuple[str, int]]) -> None:
    ballot = _after(Ballot(present), calls)
    assert ballot.vote(joiners_here=False) == 0
    assert ballot.vote(joiners_here=True) == ballot.armed


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_all_members_decide_alike_and_only_when_all_have_voted_for_the_same(votes: list[int]) -> None:
    decisions = {Ballot(1, vote).switches(votes) for vote in votes}
    assert decisions == {set(votes) in ({1}, {2}, {3})}


@given(epochs, orders)
def test_who_has_switched_is_in_the_epoch_that_it_voted_for(present: int, calls: list[tuple[str, int]]) -> None:
    ballot = _after(Ballot(present), calls)
    if ballot.armed:
        assert ballot.switched() == Ballot(ballot.armed)


def test_disarming_the_present_epoch_changes_nothing() -> None:
    assert Ballot(1).arm(2).switched().disarm(2) == Ballot(2)
