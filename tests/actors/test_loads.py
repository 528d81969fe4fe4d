"""Snapshots of the ranks' loads."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from actors.loads import LoadTable
from actors.wire import Load, Stats

SETTLE_S = 0.1


def stats(rank: int, wave: int, step: int, running: int, epoch: int = 1) -> Stats:
    return Stats(epoch, rank, wave, step, waiting=0, running=running, kv_used=0, kv_total=8)


def table_of(*ranks: int) -> LoadTable:
    table = LoadTable(SETTLE_S)
    table.resize(ranks, kept=())
    return table


def shown(table: LoadTable, now: float) -> dict[int, tuple[int, int, int]]:
    return {load.rank: (load.wave, load.step, load.running) for load in table.snapshot(now)}


def test_a_rank_that_never_reported_is_left_out() -> None:
    table = table_of(0, 1)
    table.report(stats(1, 0, 1, 5), now=0.0)
    assert table.snapshot(now=1.0) == [Load(1, 0, 1, 0, 5, 0, 8)]


def test_a_step_that_all_reported_is_shown_at_once() -> None:
    table = table_of(0, 1)
    for rank in (0, 1):
        assert table.report(stats(rank, 0, 4, 2), now=0.0)
    assert table.settled(now=0.0)
    assert shown(table, now=0.0) == {0: (0, 4, 2), 1: (0, 4, 2)}


def test_a_step_that_only_some_reported_waits_for_the_others() -> None:
    table = table_of(0, 1)
    for rank in (0, 1):
        table.report(stats(rank, 0, 4, 2), now=0.0)
    table.report(stats(0, 0, 5, 3), now=0.05)
    assert not table.settled(now=0.06)
    assert shown(table, now=0.06) == {0: (0, 4, 2), 1: (0, 4, 2)}


def test_a_step_that_others_have_nothing_to_say_of_is_shown_when_it_has_settled() -> None:
    table = table_of(0, 1)
    for rank in (0, 1):
        table.report(stats(rank, 0, 4, 2), now=0.0)
    table.report(stats(0, 0, 5, 0), now=0.05)
    assert shown(table, now=0.16) == {0: (0, 5, 0), 1: (0, 4, 2)}


def test_out_of_order_reports_are_refused_per_rank() -> None:
    table = table_of(0, 1)
    assert table.report(stats(0, 2, 7, 1), now=0.0)
    assert not table.report(stats(0, 2, 6, 9), now=0.0)
    assert not table.report(stats(0, 1, 99, 9), now=0.0)
    assert table.report(stats(1, 2, 6, 4), now=0.0), "another rank's clock is its own"
    assert shown(table, now=1.0) == {0: (2, 7, 1), 1: (2, 6, 4)}


def test_within_a_step_the_last_word_counts() -> None:
    table = table_of(0)
    table.report(stats(0, 1, 0, 1), now=0.0)
    assert table.report(stats(0, 1, 0, 2), now=0.0)
    assert shown(table, now=0.0) == {0: (1, 0, 2)}


def test_a_new_epoch_keeps_stayers_drops_leavers_and_starts_their_clocks_anew() -> None:
    table = table_of(0, 1)
    for rank in (0, 1):
        table.report(stats(rank, 3, 9, 2), now=0.0)
    table.resize((0, 2), kept=(0,))
    assert shown(table, now=1.0) == {0: (3, 9, 2)}
    assert table.report(stats(0, 3, 8, 1, epoch=2), now=1.0), "the step that broke was run again"
    assert table.report(stats(2, 3, 8, 1, epoch=2), now=1.0)
    assert shown(table, now=1.0) == {0: (3, 8, 1), 2: (3, 8, 1)}


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 30))
def test_a_snapshot_under_load_is_the_group_at_one_step(seed: int, size: int, steps: int) -> None:
    """Ranks change at some steps and say so. In whatever order the reports of a step arrive, a snapshot shows every
    rank's last change up to one step common to all."""
    draw = random.Random(seed)
    changes: dict[int, list[int]] = {rank: [0] for rank in range(size)}
    table = table_of(*range(size))
    for rank in range(size):
        table.report(stats(rank, 0, 0, running=0), now=0.0)
    for step in range(1, steps):
        changing = [rank for rank in range(size) if draw.random() < 0.6]
        complete = {rank: changes[rank][-1] for rank in range(size)}
        for rank in draw.sample(changing, len(changing)):
            changes[rank].append(step)
            table.report(stats(rank, 0, step, running=step), now=0.0)
            seen = {rank: step for rank, (_, step, _) in shown(table, now=0.01).items()}
            assert seen in (complete, dict.fromkeys(range(size), step))
