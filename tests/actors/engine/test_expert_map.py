from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engine.experts.map import EMPTY_SLOT, ExpertMap, shares


@st.composite
def maps(draw: st.DrawFn) -> ExpertMap:
    """Any valid map: experts scattered over ranks and slots, some of them replicated, some slots empty."""
    experts, ranks = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        holders = [draw(st.sets(st.integers(0, ranks - 1), min_size=1)) for _ in range(experts)]
        layers.append([[expert for expert in range(experts) if rank in holders[expert]] for rank in range(ranks)])
    slots = max(len(row) for layer in layers for row in layer) + draw(st.integers(0, 2))
    rows = [
        [tuple(draw(st.permutations(row + [EMPTY_SLOT] * (slots - len(row))))) for row in layer] for layer in layers
    ]
    return ExpertMap(experts, tuple(tuple(layer) for layer in rows))


@given(maps())
def test_routes_lead_to_the_expert_and_stay_at_home_where_they_can(made: ExpertMap) -> None:
    made.validate()
    routes = made.routes()
    for layer, ranks in enumerate(made.slots):
        for source in range(made.num_ranks):
            assert routes[layer, source, -1] == EMPTY_SLOT
            for expert in range(made.num_experts):
                rank, slot = divmod(int(routes[layer, source, expert]), made.num_slots)
                assert ranks[rank][slot] == expert
                assert rank == source or expert not in ranks[source]


@given(maps())
def test_all_copies_of_an_expert_are_used_when_no_source_has_its_own(made: ExpertMap) -> None:
    routes = made.routes()
    for layer, ranks in enumerate(made.slots):
        for expert in range(made.num_experts):
            holders = {rank for rank, row in enumerate(ranks) if expert in row}
            used = {int(place) // made.num_slots for place in routes[layer, :, expert]}
            assert used == holders


@given(maps())
def test_sources_without_a_copy_spread_evenly_over_the_copies(made: ExpertMap) -> None:
    routes = made.routes()
    for layer, ranks in enumerate(made.slots):
        for expert in range(made.num_experts):
            holders = [rank for rank, row in enumerate(ranks) if expert in row]
            others = [rank for rank in range(made.num_ranks) if rank not in holders]
            sent = np.bincount(routes[layer, others, expert] // made.num_slots, minlength=made.num_ranks)[holders]
            assert sent.max() - sent.min() <= 1


@given(maps())
def test_shares_are_what_the_routes_give_each_rank(made: ExpertMap) -> None:
    experts = np.arange(made.num_experts)
    for layer, routes in enumerate(made.routes()):
        ranks = routes[:, :-1] // made.num_slots
        counted = [np.bincount(ranks[:, expert], minlength=made.num_ranks) / made.num_ranks for expert in experts]
        assert np.allclose(shares(made.holds()[layer], experts), counted)


@pytest.mark.parametrize(
    ("slots", "complaint"),
    [
        ((((0,), (0,)),), "lacks experts \\[1\\]"),
        ((((0, 1), (1, 2)),), "names experts \\[2\\]"),
        ((((0, 0), (1, -1)),), "holds an expert twice"),
        ((((0, 1), (1,)),), "has 1 slots, expected 2"),
        ((((0,), (1,)), ((0, 1),)), "has 1 ranks, layer 0 has 2"),
    ],
)
def test_a_bad_map_is_refused_with_its_place(slots: tuple, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ExpertMap(2, slots).validate()


def test_a_map_without_layers_is_that_of_a_dense_model() -> None:
    made = ExpertMap(0, ())
    made.validate()
    assert (made.num_layers, made.num_slots) == (0, 0)
    assert made.of_rank(2) == ()
    assert made.routes().shape[0] == made.holds().shape[0] == made.array().shape[0] == 0
