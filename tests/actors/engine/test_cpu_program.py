"""Works in order on all threads, and the works of routed experts."""

from __future__ import annotations

import pytest
import torch

from actors.engine.cpu import kernels, pages, route
from actors.engine.cpu.threads import Program

ROWS, WIDTH, EXPERTS, TOP_K = 5, 24, 6, 2


pytestmark = pytest.mark.usefixtures("thread_pool")


def test_each_work_sees_all_of_the_one_before_and_a_program_runs_again() -> None:
    rows, width = 300, 256  # enough for several shares
    x, weight = torch.randn(rows, width), torch.randn(width)
    delta, out = torch.randn(rows, width), torch.empty(rows, width)
    program, expected = Program(), x.clone()
    addresses = (x.data_ptr(), delta.data_ptr(), weight.data_ptr(), out.data_ptr())
    for _ in range(20):
        program.add(*kernels.norm(*addresses, rows, width, 1e-6))
    for _ in range(3):
        program.run()
        for _ in range(20):
            expected += delta
        assert torch.equal(x, expected)
        torch.testing.assert_close(out, torch.nn.functional.rms_norm(x, (width,), weight, 1e-6))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_routing_is_that_of_a_softmax(normalize: bool, gated: bool) -> None:
    x, router, gate = torch.randn(ROWS, WIDTH), torch.randn(EXPERTS, WIDTH), torch.randn(WIDTH)
    ids, weights = torch.full((ROWS, TOP_K), -1), torch.empty(ROWS, TOP_K + 1)
    program = Program()
    parts = [part.data_ptr() for part in (x, router, gate, ids, weights)]
    parts[2] *= gated
    program.add(*route.route(*parts, ROWS, WIDTH, EXPERTS, TOP_K, normalize))
    program.run()
    chosen = torch.softmax(x @ router.t(), -1).topk(TOP_K)
    assert torch.equal(ids, chosen.indices)
    values = chosen.values / chosen.values.sum(-1, keepdim=True) if normalize else chosen.values
    torch.testing.assert_close(weights[:, :TOP_K], values)
    torch.testing.assert_close(weights[:, TOP_K], torch.sigmoid(x @ gate) if gated else torch.ones(ROWS))


def test_rows_with_nan_are_routed_somewhere_and_stay_nan() -> None:
    x, router = torch.randn(ROWS, WIDTH), torch.randn(EXPERTS, WIDTH)
    x[1] = float("nan")
    ids, weights = torch.full((ROWS, TOP_K), -1), torch.empty(ROWS, TOP_K + 1)
    program = Program()
    parts = x.data_ptr(), router.data_ptr(), 0, ids.data_ptr(), weights.data_ptr()
    program.add(*route.route(*parts, ROWS, WIDTH, EXPERTS, TOP_K, True))
    program.run()
    assert len({*ids[1].tolist()}) == TOP_K
    assert 0 <= ids.min() <= ids.max() < EXPERTS
    assert weights[1, :TOP_K].isnan().all()
    assert weights[[0, 2, 3, 4]].isfinite().all()


def test_rows_go_to_the_slots_of_their_experts_and_come_back() -> None:
    x, shared = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(ROWS)])
    slots = torch.tensor([7, 0, 3, 1, 6, 2])  # of 8
    gathered, out = torch.empty(ROWS * TOP_K, WIDTH), torch.empty(ROWS, WIDTH)
    places, groups = torch.empty(ROWS, TOP_K, dtype=torch.int64), torch.empty(1 + 3 * 8, dtype=torch.int64)
    chosen, weights = torch.zeros(EXPERTS, dtype=torch.int64), torch.randn(ROWS, TOP_K + 1)
    sizes = ROWS, WIDTH, EXPERTS, TOP_K, 8
    program = Program()
    parts = (x, ids, slots, gathered, places, groups, chosen)
    program.add(*route.group(*(part.data_ptr() for part in parts), *sizes))
    parts = (gathered, places, weights, shared, out)
    program.add(*route.combine(*(part.data_ptr() for part in parts), ROWS, WIDTH, TOP_K))
    program.run()
    assert torch.equal(gathered[places], x[:, None].expand(-1, TOP_K, -1))
    spans = groups[1 : 1 + 3 * groups[0]].view(-1, 3).tolist()
    rows = sorted((int(slots[expert]), int(places[row, k])) for row in range(ROWS) for k, expert in enumerate(ids[row]))
    assert [(slot, place) for start, end, slot in spans for place in range(start, end)] == rows
    assert torch.equal(chosen, torch.bincount(ids.flatten(), minlength=EXPERTS))
    torch.testing.assert_close(out, x * weights[:, :TOP_K].sum(-1, keepdim=True) + shared * weights[:, TOP_K:])


def test_rooms_are_zero_and_apart() -> None:
    rooms = [pages.zeros(*shape) for shape in ((3, 5), (1 << 20,), (7,), (9 << 20,), (2, 2))]
    for number, room in enumerate(rooms):
        assert room.data_ptr() % 64 == 0
        assert not room.any()
        room.fill_(number + 1)
    assert all((room == number + 1).all() for number, room in enumerate(rooms))
