from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engine.experts import planner
from actors.engine.experts.balance import PRICE
from actors.engine.experts.map import EMPTY_SLOT, ExpertMap
from actors.engine.experts.planner import Layout, Shape, imbalance, moves, plan

MOST_RANKS = 8


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Sometimes one rank can hold everything, sometimes only the largest group can."""
    experts = draw(st.integers(1, 14))
    slots = draw(st.integers(-(-experts // MOST_RANKS), experts + 1))
    return Shape(draw(st.integers(1, 3)), experts, slots)


@st.composite
def groups(draw: st.DrawFn, shape: Shape) -> tuple[int, ...]:
    fewest = -(-shape.num_experts // shape.num_slots)
    size = draw(st.integers(fewest, max(fewest, MOST_RANKS)))
    return tuple(draw(st.permutations(range(MOST_RANKS + 3)))[:size])


@st.composite
def loads(draw: st.DrawFn, shape: Shape, skew: float = 1e6) -> np.ndarray:
    some = st.one_of(st.just(0.0), st.integers(1, 9).map(float), st.floats(0, skew))
    count = shape.num_layers * shape.num_experts
    values = draw(st.lists(some, min_size=count, max_size=count))
    return np.array(values).reshape(shape.num_layers, shape.num_experts)


@st.composite
def layouts(draw: st.DrawFn, shape: Shape) -> Layout:
    """Some layout that a chain of resizes and rebalances led to."""
    layout: Layout | None = None
    for _ in range(draw(st.integers(1, 3))):
        ranks = layout[0] if layout and draw(st.booleans()) else draw(groups(shape))
        layout = (ranks, plan(shape, ranks, layout, draw(st.none() | loads(shape))))
    assert layout
    return layout


def held(layout: Layout, rank: int, layer: int) -> set[int]:
    return set(layout[1].slots[layer][layout[0].index(rank)]) - {EMPTY_SLOT}


def check(shape: Shape, before: Layout | None, after: Layout) -> None:
    """What holds of every plan."""
    ranks, made = after
    made.validate()
    assert (made.num_layers, made.num_ranks, made.num_slots) == (shape.num_layers, len(ranks), shape.num_slots)
    listed = {(move.layer, move.rank, move.slot): move for move in moves(before, after)}
    for layer in range(shape.num_layers):
        for index, rank in enumerate(ranks):
            row = made.slots[layer][index]
            # No slot is idle that could hold something.
            assert len(held(after, rank, layer)) == min(shape.num_slots, shape.num_experts)
            old = before[1].slots[layer][before[0].index(rank)] if before and rank in before[0] else None
            old = old or (EMPTY_SLOT,) * shape.num_slots
            for slot, expert in enumerate(row):
                # What stays on a rank stays in its slot, and all else that is there is a move.
                if expert in old and expert != EMPTY_SLOT:
                    assert old[slot] == expert
                move = listed.pop((layer, rank, slot), None)
                assert (move is not None) == (expert not in (EMPTY_SLOT, old[slot]))
                if move:
                    assert (move.expert, move.was_free) == (expert, old[slot] == EMPTY_SLOT)
    assert not listed


@given(st.data())
def test_a_chain_of_changes_keeps_every_plan_sound(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    layout: Layout | None = None
    for _ in range(data.draw(st.integers(1, 5))):
        ranks = layout[0] if layout and data.draw(st.booleans()) else data.draw(groups(shape))
        load = data.draw(st.none() | loads(shape))
        made = plan(shape, ranks, layout, load)
        assert made == plan(shape, list(ranks), layout, load)
        check(shape, layout, (ranks, made))
        layout = (ranks, made)


@given(st.data())
def test_any_map_can_be_planned_on_from(data: st.DataObject) -> None:
    """Also one with empty slots that could hold something, as after a loss."""
    shape = data.draw(shapes())
    ranks, full = data.draw(layouts(shape))
    holes = data.draw(st.sets(st.integers(0, shape.num_slots * len(ranks) - 1)))
    rows = full.array().reshape(shape.num_layers, -1)
    rows[:, sorted(holes)] = EMPTY_SLOT
    rows = rows.reshape(shape.num_layers, len(ranks), shape.num_slots)
    before = (ranks, ExpertMap(shape.num_experts, tuple(tuple(map(tuple, layer)) for layer in rows.tolist())))
    wanted = data.draw(groups(shape))
    check(shape, before, (wanted, plan(shape, wanted, before, data.draw(st.none() | loads(shape)))))


@given(st.data())
def test_growing_makes_no_staying_rank_load_anything(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    before = data.draw(layouts(shape))
    joining = data.draw(st.integers(0, 4))
    ranks = tuple(data.draw(st.permutations([*before[0], *range(100, 100 + joining)])))
    after = (ranks, plan(shape, ranks, before))
    assert all(move.rank >= 100 and move.was_free for move in moves(before, after))


@given(st.data())
def test_a_resize_makes_staying_ranks_load_only_lost_experts_that_joining_ranks_have_no_room_for(
    data: st.DataObject,
) -> None:
    shape = data.draw(shapes())
    before = data.draw(layouts(shape))
    ranks = data.draw(groups(shape))
    after = (ranks, plan(shape, ranks, before))
    staying = set(ranks) & set(before[0])
    loaded = [move for move in moves(before, after) if move.rank in staying]
    for layer in range(shape.num_layers):
        kept = set().union(*(held(before, rank, layer) for rank in staying))
        lost = set(range(shape.num_experts)) - kept
        room = (len(ranks) - len(staying)) * min(shape.num_slots, shape.num_experts)
        experts = [move.expert for move in loaded if move.layer == layer]
        assert len(experts) == len(set(experts)) == max(0, len(lost) - room)
        assert set(experts) <= lost


@given(st.data())
def test_lost_experts_are_spread_evenly_over_the_ranks_with_replicas_to_give_up(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    before = data.draw(layouts(shape))
    fewest = -(-shape.num_experts // shape.num_slots)
    ranks = tuple(data.draw(st.permutations(before[0]))[: data.draw(st.integers(fewest, len(before[0])))])
    after = (ranks, plan(shape, ranks, before))
    loaded = Counter((move.layer, move.rank) for move in moves(before, after))
    for layer, rows in enumerate(after[1].slots):
        copies = Counter(expert for row in rows for expert in row)
        most = max(loaded[layer, rank] for rank in ranks)
        for rank in ranks:
            able = any(copies[expert] > 1 for expert in held(after, rank, layer))
            assert loaded[layer, rank] >= most - 1 or not able


@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 4), st.integers(0, 20))
def test_copies_are_far_apart(slots: int, ranks_per_copy: int, copies: int, start: int) -> None:
    """As many neighbours as can hold all experts do hold them: a node, or the last ranks, can go at no cost."""
    shape, size = Shape(3, slots * ranks_per_copy, slots), ranks_per_copy * copies
    made = plan(shape, range(size)).array()
    start %= size - ranks_per_copy + 1
    for layer in made[:, start : start + ranks_per_copy]:
        assert sorted(layer.reshape(-1)) == list(range(shape.num_experts))


@given(st.data())
def test_a_rebalance_never_makes_it_worse_and_every_load_pays(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    before = data.draw(layouts(shape))
    load = data.draw(loads(shape))
    after = (before[0], plan(shape, before[0], before, load))
    assert imbalance(after[1], load) <= imbalance(before[1], load) + 1e-9
    loaded = Counter(move.layer for move in moves(before, after))
    for layer in range(shape.num_layers):
        alone = [ExpertMap(shape.num_experts, layout.slots[layer : layer + 1]) for layout in (before[1], after[1])]
        was, now = (imbalance(each, load[layer : layer + 1]) for each in alone)
        assert was - now >= PRICE * loaded[layer] / len(before[0]) - 1e-6


@given(st.data())
def test_the_shortcuts_for_large_groups_keep_all_promises(data: st.DataObject) -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(planner, "MANY_RANKS", 2)
    with patch.context():
        test_a_chain_of_changes_keeps_every_plan_sound.hypothesis.inner_test(data)
        test_a_rebalance_never_makes_it_worse_and_every_load_pays.hypothesis.inner_test(data)


@given(st.data())
def test_imbalance_counts_what_the_routes_send(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    _, made = data.draw(layouts(shape))
    load = data.draw(loads(shape))
    load /= load.max() or 1.0
    busiest = total = 0.0
    for layer, routes in enumerate(made.routes()):
        tokens = np.zeros(made.num_ranks)
        for source in range(made.num_ranks):
            np.add.at(tokens, routes[source, :-1] // made.num_slots, load[layer] / made.num_ranks)
        busiest, total = busiest + tokens.max(), total + tokens.mean()
    assert imbalance(made, load) == pytest.approx(busiest / total if total else 1.0)


@pytest.mark.parametrize("size", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("spare", [0, 1, 4])
def test_a_skewed_load_is_evened_out(size: int, spare: int) -> None:
    shape = Shape(4, 64, 64 // size + spare + bool(64 % size))
    rng = np.random.default_rng(size)
    load = np.stack([rng.permutation(1 / np.arange(1, 65) ** 0.7) for _ in range(4)])
    before = (tuple(range(size)), plan(shape, range(size)))
    after = (before[0], plan(shape, range(size), before, load))
    was, now = imbalance(before[1], load), imbalance(after[1], load)
    anew = plan(shape, range(size), load=load)
    fresh = imbalance(anew, load)
    # Without spare slots the hottest expert alone can be more than a rank's share.
    assert 1 < now < max(1.03, 1.02 * fresh) < was
    # A plan made anew would load far more.
    assert len(moves(before, after)) < len(moves(before, (before[0], anew))) / 2


def test_one_hot_expert_gets_copies_where_no_other_can_help() -> None:
    shape = Shape(1, 8, 4)
    before = ((0, 1, 2, 3), plan(shape, range(4)))
    load = np.array([[1000.0, 1, 1, 1, 1, 1, 1, 1]])
    after = (before[0], plan(shape, range(4), before, load))
    assert all(0 in row for row in after[1].slots[0])
    assert [move.expert for move in moves(before, after)] == [0, 0]
    assert imbalance(before[1], load) > 1.9
    assert imbalance(after[1], load) < 1.02


def test_an_even_start_is_perfectly_even() -> None:
    for size, slots in ((1, 8), (2, 4), (4, 2), (4, 4), (6, 4), (8, 1)):
        made = plan(Shape(5, 8, slots), range(size))
        assert imbalance(made, np.ones((5, 8))) == pytest.approx(1)


def test_a_load_without_tokens_moves_nothing() -> None:
    shape = Shape(2, 8, 3)
    before = ((4, 2, 7), plan(shape, (4, 2, 7)))
    assert plan(shape, (4, 2, 7), before, np.zeros((2, 8))) == before[1]
    assert imbalance(before[1], np.zeros((2, 8))) == 1.0


def test_new_experts_take_empty_slots_first_then_those_of_replicas() -> None:
    shape = Shape(1, 5, 3)
    before = ((0, 1, 2), ExpertMap(5, (((0, 1, EMPTY_SLOT), (0, 2, 1), (3, 4, EMPTY_SLOT)),)))
    after = ((0, 1), plan(shape, (0, 1), before))
    found = moves(before, after)
    assert {move.expert for move in found if move.expert > 2} == {3, 4}
    assert [(move.rank, move.slot, move.was_free) for move in found] == [(0, 2, True), (1, found[1].slot, False)]
    assert before[1].slots[0][1][found[1].slot] in (0, 1)


def test_a_rank_that_comes_back_under_its_number_is_told_from_one_that_stays() -> None:
    shape = Shape(1, 4, 2)
    before = ((0, 1), plan(shape, (0, 1)))
    after = ((1, 9), plan(shape, (1, 9), before))
    assert {move.rank for move in moves(before, after)} == {9}
    assert len(moves(None, after)) == 4


def test_no_slots_named_means_as_few_as_suffice_and_later_those_of_the_map_before() -> None:
    first = plan(Shape(1, 8), range(3))
    assert first.num_slots == 3
    assert plan(Shape(1, 8), range(4), (tuple(range(3)), first)).num_slots == 3


def test_a_dense_model_has_an_empty_map() -> None:
    made = plan(Shape(0, 0), range(3))
    made.validate()
    assert made == plan(Shape(0, 0, 5), range(4), ((0, 1, 2), made)) == ExpertMap(0, ())
    assert moves(((0, 1, 2), made), ((0, 1), made)) == []
    assert imbalance(made, np.zeros((0, 0))) == 1.0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((Shape(1, 8, 3), (0, 1)), "2 ranks with 3 expert slots each cannot hold 8 experts; set expert_slots to 4"),
        ((Shape(1, 8, 4), ()), "ranks \\[\\] cannot form a group"),
        ((Shape(1, 8, 4), (0, 1, 0)), "ranks \\[0, 1, 0\\] cannot form a group"),
        ((Shape(1, 8, 4), (0, 1), None, np.ones((1, 7))), "load of shape \\(1, 7\\) for 1 layers of 8 experts"),
        ((Shape(1, 2, 4), (0, 1), None, np.array([[1, -1]])), "negative or not finite"),
        ((Shape(1, 2, 4), (0, 1), None, np.array([[1, np.nan]])), "negative or not finite"),
        ((Shape(1, 2, 4), (0, 1), ((0,), plan(Shape(1, 2, 3), (0,)))), "2 experts, 3 slots, the one to plan 1, 2, 4"),
        ((Shape(1, 2, 4), (0, 1), ((0, 1), plan(Shape(1, 2, 4), (0,)))), "2 ranks were named for a map before of 1"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(arguments: tuple, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        plan(*arguments)


def test_maps_of_other_slots_are_not_compared() -> None:
    with pytest.raises(ValueError, match="slots are fixed at launch"):
        moves(((0,), plan(Shape(1, 2, 3), (0,))), ((0,), plan(Shape(1, 2, 2), (0,))))
