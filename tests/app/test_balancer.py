from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.membership import Member
from actors.wire import Load, View
from app.balancer import SCAN_LIMIT, Balancer, UnknownRank


def view(epoch, ranks, loads=(), where="a", leaving=()):
    members = [Member(rank, f"tcp://{where}:{rank}", "node") for rank in ranks]
    return View(epoch, members, 1, True, list(loads), list(leaving))


def load(rank, waiting=0, running=0, step=1, wave=1):
    return Load(rank, wave, step, waiting, running, 0, 100)


def balancer(ranks, offset=0, loads=()):
    it = Balancer(offset)
    it.observe(view(1, ranks, loads))
    for rank in ranks:
        it.offer(rank)
    return it


def test_a_waiting_request_weighs_as_much_as_four_running_ones():
    it = balancer([0, 1], loads=[load(0, waiting=1), load(1, running=3)])
    assert it.assign("a") == 1  # 4 against 3
    assert it.assign("b") == 0  # 4 against 3 + 4


def test_the_scan_starts_at_the_clients_own_offset():
    assert [balancer(range(4), offset).assign("a") for offset in range(6)] == [0, 1, 2, 3, 0, 1]


def test_requests_on_an_idle_group_spread_evenly():
    it = balancer(range(4), offset=2)
    assert Counter(it.assign(str(i)) for i in range(40)) == dict.fromkeys(range(4), 10)


def test_a_snapshot_from_before_a_submit_does_not_erase_it():
    it = balancer([0, 1])
    assert it.assign("a") == 0
    it.observe(view(1, [0, 1], [load(0, step=50), load(1, step=50)]))
    assert it.assign("b") == 1  # "a" has shown no output: the snapshot can't be known to cover it
    it.seen("a", 1, 60)
    it.seen("b", 1, 60)
    it.observe(view(1, [0, 1], [load(0, step=59), load(1, step=60, running=1)]))
    assert it.assign("c") == 0  # both score 1: "a" still its own increment, "b" in the load
    it.observe(view(1, [0, 1], [load(0, step=61, running=0), load(1, step=61, running=1)]))
    it.ended("c")
    assert it.assign("d") == 0  # now the load speaks for rank 0 alone


def test_a_request_may_name_its_rank():
    it = balancer([0, 1], loads=[load(1, waiting=100)])
    assert it.assign("a", rank=1) == 1
    with pytest.raises(UnknownRank, match=r"rank 7 .* \[0, 1\]"):
        it.assign("b", rank=7)


def test_only_offered_ranks_are_chosen():
    it = Balancer(0)
    it.observe(view(1, [0, 1]))
    assert it.assign("a") is None and it.assign("a", rank=1) is None
    it.offer(1)
    assert it.assign("a") == 1 and it.assign("b") == 1
    it.withhold(1)
    assert it.assign("c") is None


def test_a_leaving_rank_gets_nothing_new_not_even_when_named_and_keeps_what_it_has():
    it = balancer([0, 1], loads=[load(0, waiting=9), load(1)])
    assert it.assign("a") == 1
    it.observe(view(1, [0, 1], leaving=[1]))
    it.offer(1)  # its echoes go on
    assert it.leaving == (1,)
    assert it.assign("b") == 0 and it.assign("c", rank=1) == 0
    it.observe(view(1, [0, 1]))  # rolled back
    it.ended("b")
    it.ended("c")
    assert it.assign("d") == 1 and it.assign("e", rank=1) == 1


def test_when_all_ranks_are_leaving_requests_wait_for_the_next_epoch():
    it = balancer([0, 1])
    it.observe(view(1, [0, 1], leaving=[0, 1]))
    assert it.assign("a") is None and it.assign("a", rank=0) is None
    it.observe(view(2, [0, 2]))
    assert it.leaving == () and it.assign("a") == 0


def test_a_late_view_does_not_revive_a_rank_that_left():
    it = balancer([0, 1])
    assert it.observe(view(2, [0]))
    assert not it.observe(view(1, [0, 1], [load(1)]))
    it.offer(1)
    assert it.ranks == (0,)
    assert {it.assign(str(i)) for i in range(8)} == {0}


def test_a_survivor_keeps_its_load_and_its_requests_into_the_next_epoch():
    it = balancer([0, 1], loads=[load(0, waiting=3), load(1)])
    it.assign("a", rank=1)
    it.observe(view(2, [0, 1, 2]))
    it.offer(2)
    assert [it.assign("b"), it.assign("c")] == [2, 1]


def test_the_same_number_at_another_address_is_another_engine():
    it = balancer([0, 1], loads=[load(0, waiting=9, step=99), load(1)])
    it.assign("a", rank=0)
    it.observe(view(2, [0, 1], [load(0, step=1)], where="b"))
    assert it.assign("b") is None  # neither is connected yet
    it.offer(0)
    it.ended("a")
    assert it.assign("c") == 0 and it.loads[0].waiting == 0


def test_a_large_group_is_sampled_and_the_better_of_two_taken():
    ranks = range(SCAN_LIMIT + 36)
    it = balancer(ranks)
    counts = Counter(it.assign(str(i)) for i in range(10 * len(ranks)))
    assert len(counts) == len(ranks)
    assert max(counts.values()) <= 10 + 6  # one random choice would reach about 20


events = st.lists(
    st.one_of(
        st.tuples(st.just("assign"), st.integers(0, 30)),
        st.tuples(st.just("seen"), st.integers(0, 30)),
        st.tuples(st.just("ended"), st.integers(0, 30)),
        st.tuples(st.just("load"), st.integers(0, 3), st.integers(0, 5), st.integers(0, 5)),
        st.tuples(st.just("old"), st.integers(0, 3)),
        st.tuples(st.just("epoch"), st.sets(st.integers(0, 3), min_size=1)),
        st.tuples(st.just("leaving"), st.sets(st.integers(0, 3))),
    ),
    max_size=60,
)


@given(events, st.integers(0, 7))
def test_scores_are_never_below_what_the_client_knows_and_choices_are_minimal(steps, offset):
    """Against a plain model: every own request is counted until it ends or a load at or after its output arrives."""
    it = balancer([0, 1, 2, 3], offset)
    epoch, members, clock = 1, [0, 1, 2, 3], 1
    loads = dict.fromkeys(members, (0, 0))
    leaving: set[int] = set()
    own: dict[str, tuple[int, int | None]] = {}

    def score(rank):
        unseen = sum(where == rank and shown is None for where, shown in own.values())
        seen = sum(where == rank and shown is not None for where, shown in own.values())
        return 4 * (loads[rank][0] + unseen) + loads[rank][1] + seen

    for kind, *args in steps:
        clock += 1
        if kind == "assign" and str(args[0]) not in own:
            rank = it.assign(str(args[0]))
            open_ = [member for member in members if member not in leaving]
            scan = [open_[(offset + place) % len(open_)] for place in range(len(open_))]
            assert rank == min(scan, key=score, default=None)
            if rank is not None:
                own[str(args[0])] = (rank, None)
        elif kind == "seen" and own.get(str(args[0]), (0, 0))[1] is None:
            it.seen(str(args[0]), 1, clock)
            own[str(args[0])] = (own[str(args[0])][0], clock)
        elif kind == "ended":
            it.ended(str(args[0]))
            own.pop(str(args[0]), None)
        elif kind == "load" and args[0] in members:
            rank, waiting, running = args
            it.observe(view(epoch, members, [load(rank, waiting, running, step=clock)], leaving=leaving))
            loads[rank] = (waiting, running)
            own = {request: (where, shown) for request, (where, shown) in own.items() if where != rank or shown is None}
        elif kind == "old" and args[0] in members:
            it.observe(
                view(epoch, members, [load(args[0], 99, 99, step=0)], leaving=leaving)
                if clock > 2 and loads[args[0]] != (0, 0)
                else view(epoch - 1, [0, 1, 2, 3])
            )
        elif kind == "epoch":
            epoch, members, leaving = epoch + 1, sorted(args[0]), set()
            it.observe(view(epoch, members))
            for rank in members:
                it.offer(rank)
            loads = {rank: loads.get(rank, (0, 0)) for rank in members}
            own = {request: (where, shown) for request, (where, shown) in own.items() if where in members}
        elif kind == "leaving":
            leaving = args[0] & set(members)
            it.observe(view(epoch, members, leaving=leaving))
        assert it.ranks == tuple(members)
        assert it.leaving == tuple(sorted(leaving))
