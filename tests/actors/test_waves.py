"""The wave protocol, one known race at a time. All interleavings together: test_wave_model.py."""

from __future__ import annotations

import pytest

from actors.membership import Epoch, Member
from actors.waves import PAUSED, RUNNING, EngineWaves, GroupWaves, Standing
from actors.wire import Announce, FirstRequest, StartWave, WaveComplete


def epoch_of(number: int, *ranks: int) -> Epoch:
    return Epoch(number, tuple(Member(rank, f"tcp://dp_rank_{rank}", "node") for rank in ranks))


def paused_group(*ranks: int, wave: int) -> GroupWaves:
    return GroupWaves(1, frozenset(ranks), wave, PAUSED, frozenset(ranks))


def starts(wave: int, *ranks: int, epoch: int = 1) -> list[StartWave]:
    return [StartWave(epoch, rank, wave) for rank in ranks]


class TestOneWave:
    def test_a_request_at_a_paused_rank_wakes_every_rank(self) -> None:
        engine, reports = EngineWaves(1, 0, wave=3).submitted()
        assert engine.running
        assert reports == [StartWave(1, 0, 3)]

        group, told = paused_group(0, 1, 2, wave=3).receive(reports[0])
        assert (group.wave, group.running) == (3, RUNNING)
        assert told == starts(3, 0, 1, 2)

        sleeper, reports = EngineWaves(1, 2, wave=3).told(told[2])
        assert (sleeper.wave, sleeper.running, reports) == (3, RUNNING, [])

    def test_a_request_at_a_running_rank_needs_no_message(self) -> None:
        engine = EngineWaves(1, 0, wave=3, running=RUNNING)
        assert engine.submitted() == (engine, [])

    def test_all_ranks_count_the_same_steps_and_leave_together(self) -> None:
        engine = EngineWaves(1, 1, wave=3, running=RUNNING)
        for step in (1, 2):
            engine, reports = engine.synced(work=True)
            assert (engine.wave, engine.step, reports) == (3, step, [])
        engine, reports = engine.synced(work=False)
        assert (engine.wave, engine.step, engine.running) == (4, 0, PAUSED)
        assert reports == [WaveComplete(1, 1, 3)]

    def test_the_first_report_of_an_end_counts_and_the_others_change_nothing(self) -> None:
        group = GroupWaves(1, frozenset({0, 1}), 3, RUNNING, frozenset({0, 1}))
        group, told = group.receive(WaveComplete(1, 1, 3))
        assert (group.wave, group.running, told) == (4, PAUSED, [])
        assert group.receive(WaveComplete(1, 0, 3)) == (group, [])

    def test_a_paused_rank_in_a_sync_is_an_error_that_names_it(self) -> None:
        with pytest.raises(RuntimeError, match="rank 2 is paused before wave 5"):
            EngineWaves(1, 2, wave=5).synced(work=True)


class TestKnownRaces:
    def test_a_stale_start_after_a_pause_wakes_nobody(self) -> None:
        engine = EngineWaves(1, 0, wave=4)
        assert engine.told(StartWave(1, 0, 3)) == (engine, [])

    def test_a_start_that_comes_while_the_wave_before_still_runs_is_kept(self) -> None:
        """Another rank has left wave 3, woken again, and the broadcast is faster than this rank's own sync."""
        engine, _ = EngineWaves(1, 0, wave=3, running=RUNNING).told(StartWave(1, 0, 4))
        assert (engine.wave, engine.running) == (3, RUNNING)
        engine, reports = engine.synced(work=False)
        assert (engine.wave, engine.running) == (4, RUNNING)
        assert reports == [WaveComplete(1, 0, 3)]
        engine, _ = engine.synced(work=False)
        assert (engine.wave, engine.running) == (5, PAUSED)

    def test_the_start_of_the_next_wave_overtakes_the_end_of_this_one(self) -> None:
        group = GroupWaves(1, frozenset({0, 1}), 3, RUNNING, frozenset({0, 1}))
        group, told = group.receive(StartWave(1, 1, 4))
        assert (group.wave, group.running) == (4, RUNNING)
        assert told == starts(4, 0, 1)
        assert group.receive(WaveComplete(1, 0, 3)) == (group, [])

    def test_two_ranks_start_the_same_wave(self) -> None:
        group, told = paused_group(0, 1, 2, wave=3).receive(StartWave(1, 0, 3))
        assert told == starts(3, 0, 1, 2)
        assert group.receive(StartWave(1, 1, 3)) == (group, [])
        awake = EngineWaves(1, 1, wave=3, running=RUNNING, step=2)
        assert awake.told(told[1]) == (awake, [])

    def test_a_joiner_with_wave_0_adopts_the_group_s(self) -> None:
        epoch = epoch_of(2, 0, 1, 2)
        standings = [Standing(7, 0, PAUSED), Standing(7, 0, PAUSED), Standing(0, 0, PAUSED)]
        joiner, reports = EngineWaves(rank=2).joined(epoch, 2, standings)
        assert joiner == EngineWaves(2, 2, wave=7)
        assert reports == [Announce(2, 2, 7, PAUSED)]
        # So its own first crossing speaks of the wave that the coordinator waits for.
        _, reports = joiner.submitted()
        assert reports == [StartWave(2, 2, 7)]

    def test_a_joiner_runs_if_the_group_runs_and_counts_its_steps(self) -> None:
        standings = [Standing(7, 41, RUNNING), Standing(0, 0, PAUSED)]
        joiner, _ = EngineWaves(rank=1).joined(epoch_of(2, 0, 1), 1, standings)
        assert joiner.standing == Standing(7, 41, RUNNING)

    def test_survivors_of_a_broken_sync_go_forward_not_back(self) -> None:
        """One survivor saw wave 7 end, the other's collective broke in it."""
        standings = [Standing(8, 0, PAUSED), Standing(7, 41, RUNNING)]
        for rank in (0, 1):
            engine, _ = EngineWaves(1, rank).joined(epoch_of(2, 0, 1), rank, standings)
            assert engine.standing == Standing(8, 0, RUNNING)

    def test_the_notice_and_the_rank_s_own_crossing_in_either_order(self) -> None:
        crossing, notice = StartWave(1, 1, 3), FirstRequest(1, 1, 3)
        for first, second in ((crossing, notice), (notice, crossing)):
            group, told = paused_group(0, 1, wave=3).receive(first)
            assert told == starts(3, 0, 1)
            assert group.receive(second) == (group, [])

    @pytest.mark.parametrize("believed", [0, 2, 3, 9])
    def test_a_notice_wakes_the_target_too_whatever_wave_its_sender_believes_in(self, believed: int) -> None:
        """The request may never arrive, or the rank may know another wave than the front-end."""
        group, told = paused_group(0, 1, wave=3).receive(FirstRequest(1, 1, believed))
        assert told == starts(3, 0, 1)
        assert group.wave == 3

    def test_the_coordinator_is_replaced_between_a_start_and_its_broadcast(self) -> None:
        """Rank 0 woke and waits in the collective, where it can say nothing; its report died with the coordinator."""
        group, told = GroupWaves().formed(epoch_of(1, 0, 1))
        assert told == starts(0, 0, 1)  # nobody is connected yet: these go nowhere
        group, told = group.receive(Announce(1, 1, 3, PAUSED))
        assert StartWave(1, 1, 3) in told
        # Rank 1 joins the collective and frees rank 0, which leaves the wave too and announces itself.
        group, told = group.receive(WaveComplete(1, 1, 3))
        assert StartWave(1, 1, 4) in told, "rank 0 may wait in wave 4 already: not all have been heard"
        group, told = group.receive(Announce(1, 0, 4, PAUSED))
        assert StartWave(1, 0, 4) in told
        group, told = group.receive(WaveComplete(1, 0, 4))
        assert (group.wave, group.running, told) == (5, PAUSED, [])

    def test_ranks_announce_themselves_before_the_coordinator_knows_the_group(self) -> None:
        group = GroupWaves()
        for message in (Announce(4, 0, 6, PAUSED), Announce(4, 1, 6, PAUSED), StartWave(4, 1, 6)):
            group, told = group.receive(message)
            assert told == []
        group, told = group.formed(epoch_of(4, 0, 1))
        assert (group.wave, group.running, group.heard) == (6, RUNNING, {0, 1})
        assert told == starts(6, 0, 1, epoch=4)

    @pytest.mark.parametrize("leaver", [0, 1])
    def test_a_rank_that_leaves_after_the_last_sync_takes_no_report_with_it(self, leaver: int) -> None:
        group = GroupWaves(1, frozenset({0, 1}), 3, RUNNING, frozenset({0, 1}))
        group, _ = group.receive(WaveComplete(1, 1 - leaver, 3))
        assert (group.wave, group.running) == (4, PAUSED)

    def test_even_with_every_report_of_an_end_lost_the_next_start_wakes_all(self) -> None:
        group = GroupWaves(1, frozenset({0, 1}), 3, RUNNING, frozenset({0, 1}))
        _, told = group.receive(StartWave(1, 1, 4))
        assert told == starts(4, 0, 1)


class TestEpochs:
    def test_older_epochs_are_dropped_on_both_sides(self) -> None:
        group = GroupWaves(2, frozenset({0, 1}), 3, PAUSED, frozenset({0, 1}))
        for message in (StartWave(1, 0, 3), WaveComplete(1, 0, 3), FirstRequest(1, 0, 3), Announce(1, 0, 3, RUNNING)):
            assert group.receive(message) == (group, [])
        engine = EngineWaves(2, 0, wave=3)
        assert engine.told(StartWave(1, 0, 3)) == (engine, [])

    def test_a_rank_ignores_a_start_of_an_epoch_it_has_not_joined(self) -> None:
        engine = EngineWaves(2, 0, wave=3)
        assert engine.told(StartWave(3, 0, 3)) == (engine, [])

    def test_a_new_epoch_keeps_the_wave_and_runs_until_all_members_were_heard(self) -> None:
        group, told = paused_group(0, 1, wave=5).formed(epoch_of(2, 0, 2))
        assert (group.wave, group.running, group.heard) == (5, RUNNING, frozenset())
        assert told == starts(5, 0, 2, epoch=2)
        group, _ = group.receive(Announce(2, 0, 5, PAUSED))
        group, told = group.receive(WaveComplete(2, 0, 5))
        assert (group.wave, group.running) == (6, RUNNING)
        group, _ = group.receive(Announce(2, 2, 6, PAUSED))
        group, _ = group.receive(WaveComplete(2, 2, 6))
        assert (group.wave, group.running) == (7, PAUSED)

    def test_strangers_are_ignored(self) -> None:
        group = paused_group(0, 1, wave=5)
        assert group.receive(StartWave(1, 9, 5)) == (group, [])

    def test_the_same_epoch_again_changes_nothing(self) -> None:
        group, _ = GroupWaves().formed(epoch_of(3, 0, 1))
        assert group.formed(epoch_of(3, 0, 1)) == (group, [])

    @pytest.mark.parametrize("epoch", [epoch_of(2, 0, 1), epoch_of(3, 0, 1, 2)])
    def test_an_epoch_that_does_not_follow_is_refused(self, epoch: Epoch) -> None:
        group, _ = GroupWaves().formed(epoch_of(3, 0, 1))
        with pytest.raises(ValueError, match="does not follow the current epoch 3"):
            group.formed(epoch)
