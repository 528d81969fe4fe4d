"""A rank's experts in FP8, by each way of computing them: pair by pair, in tiles, and widened."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expert_modules import Quantized, slots
from rank_group import Rank, run

from actors.engine.cuda import experts as cuda_experts
from actors.engine.cuda import fp8, gemm, gemv
from actors.engine.cuda.experts import CudaExperts
from actors.engine.cuda.window import Layout, Window
from actors.engine.experts.exchange import SoloExchange
from actors.engine.experts.map import ExpertMap
from actors.engine.experts.routing import Routing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
HIDDEN, EXPERTS, TOP_K, MAX_ROWS = 128, 3, 2, 16
# By layer.
WIDTHS = 256, 128
# Rows per slot from which weights are widened here.
MANY = 4


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows are many; programs have more columns where each takes its time to begin."""
    monkeypatch.setattr(fp8, "_WIDENED", MANY)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(cuda_experts, "_EXPAND_FP8", (128, 1))
        monkeypatch.setattr(cuda_experts, "_CONTRACT_FP8", (128, 1))


class Spied:
    """A kernel whose launches are told."""

    def __init__(self, kernel: Any, tell: Callable[[], None]) -> None:
        self._kernel, self._tell = kernel, tell

    def __getitem__(self, grid: Any) -> Any:
        self._tell()
        return self._kernel[grid]


class Stand:
    """Two layers, whose slots are one more than a map has."""

    def __init__(
        self,
        dtype: torch.dtype,
        max_rows: int = MAX_ROWS,
        device: torch.device = DEVICE,
        num_slots: int = EXPERTS,
        window: Window | None = None,
    ) -> None:
        self.dtype, self.device = dtype, device
        self.full = [Quantized(EXPERTS, HIDDEN, width, seed) for seed, width in enumerate(WIDTHS)]
        self.held = [Quantized(num_slots + 1, HIDDEN, width).to(device) for width in WIDTHS]
        layers = [slots(module, device) for module in self.held]
        self.experts = CudaExperts(layers, EXPERTS, TOP_K, HIDDEN, dtype, device, max_rows, 2, window)
        self.experts._inner.fill_(float("nan"))
        if window is None:
            self.experts.window.memory.data.fill_(0xFF)
        self.used: list[str] = []

    def spy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Has ``used`` say which kernels computed."""
        for name, kernels in (("tiles", fp8), ("pairs", gemv), ("wide", gemm)):
            monkeypatch.setattr(kernels, "contract", Spied(kernels.contract, functools.partial(self.used.append, name)))

    def put(self, routing: Routing) -> None:
        for layer, held in enumerate(routing.own_slots):
            self.held[layer].put(self.full[layer], [*held, -1])

    def step(self, tokens: list[int], own: int = 0, padding: int = 0) -> list[torch.Tensor]:
        """By layer what rows of ``own`` become, and in float64."""
        rows, results = tokens[own], []
        self.experts.begin(tokens)
        self.experts.own_rows.fill_(rows)
        if not rows:
            self.experts.finish()
            return []
        for layer, module in enumerate(self.full):
            generator = torch.Generator().manual_seed(100 * rows + 10 * own + layer)
            x = torch.randn(rows + padding, HIDDEN, generator=generator).to(self.dtype)
            ids = torch.rand(rows + padding, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
            weights = torch.rand(rows + padding, TOP_K, generator=generator)
            exact = module.reference(x[:rows], ids[:rows], weights[:rows])
            x[rows:], ids[rows:], weights[rows:] = float("nan"), 2**31 - 1, float("nan")
            found = self.experts.forward(layer, *(tensor.to(self.device) for tensor in (x, ids, weights))).cpu()
            assert not found[rows:].any()
            assert (found[:rows].double() - exact).norm() < TOLERANCE[self.dtype] * exact.norm(), (layer, tokens)
            results.append(found[:rows])
        return results


def whole(order: tuple[int, ...] = (0, 1, 2)) -> Routing:
    return Routing(ExpertMap(EXPERTS, ((order,),) * len(WIDTHS)), 0)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_each_step_computes_as_suits_its_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(dtype)
    experts = stand.experts
    stand.spy(monkeypatch)
    stand.put(whole())
    experts.adopt(whole(), SoloExchange())
    room = experts._room
    assert experts.pairwise and room is not None and room.numel() == 4 * 2 * WIDTHS[0] * HIDDEN
    place = room.data_ptr()
    room.fill_(float("nan"))
    for rows, padding, used in ((1, 0, "pairs"), (0, 1, "pairs"), (2, 0, "tiles"), (1, 2, "tiles"), (4, 2, "wide")):
        stand.used.clear()
        if rows:
            stand.step([rows], padding=padding)
        else:  # as the graph of one row has it in an idle step
            experts.begin([1])
            experts.own_rows.fill_(0)
            nobody = torch.zeros(1, HIDDEN, dtype=dtype, device=DEVICE)
            for layer in range(len(WIDTHS)):
                ids = torch.full((1, TOP_K), 2**31 - 1, device=DEVICE)
                assert not experts.forward(layer, nobody, ids, torch.ones(1, TOP_K, device=DEVICE)).any()
        assert stand.used == [used] * len(WIDTHS)
        assert bool(room.isnan().all()) == (used != "wide")
    # Slots that are filled anew, as a resize does.
    stand.put(whole((2, 0, 1)))
    experts.adopt(whole((2, 0, 1)), SoloExchange())
    stand.step([MANY * EXPERTS // TOP_K])
    assert stand.used[-1] == "wide" and experts._room is room and room.data_ptr() == place


def test_float32_always_takes_the_same_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(torch.float32)
    stand.spy(monkeypatch)
    stand.put(whole())
    stand.experts.adopt(whole(), SoloExchange())
    assert not stand.experts.pairwise and stand.experts._room is None
    for rows in (1, 6):
        stand.step([rows])
    assert stand.used == ["tiles"] * 4


def test_there_is_room_only_where_a_step_may_have_so_many_rows() -> None:
    enough = MANY * (EXPERTS + 1) // TOP_K
    stand = Stand(torch.float16, enough)
    assert stand.experts._room is not None
    stand = Stand(torch.float16, enough - 1)
    assert stand.experts._room is None
    # Of an epoch with fewer slots a step may have so many for each; it goes by tiles.
    stand.put(whole())
    stand.experts.adopt(whole(), SoloExchange())
    stand.step([enough - 1])


LAYOUT = Layout(2, MAX_ROWS, TOP_K, HIDDEN, torch.float16)
# Tokens by rank, the last time many.
STEPS = [[1, 1], [2, 3], [9, 0]]
HALVES = ExpertMap(EXPERTS, (((0, 1), (2, 1)), ((2, -1), (1, 0))))


def member(rank: Rank, index: int) -> None:
    fp8._WIDENED = MANY  # a process of its own
    stand = Stand(torch.float16, MAX_ROWS, rank.device, 2, rank.window)
    exchange = rank.join(0, index, 2)
    stand.put(Routing(HALVES, index))
    stand.experts.adopt(Routing(HALVES, index), exchange)
    exchange.sync([0])
    assert stand.experts._room is not None
    for tokens in STEPS:
        stand.experts._room.fill_(float("nan"))
        stand.step(tokens, index)
        stand.experts.check(stand.experts.verdict())
        wide = not stand.experts._room[: HIDDEN * HIDDEN].isnan().any()
        assert wide == (max(sum(tokens) // 2, tokens[index]) * TOP_K / 2 >= MANY)


@pytest.mark.slow
def test_two_ranks_compute_each_others_rows() -> None:
    """A rank without rows of its own widens for those of its peer."""
    run(member, 2, LAYOUT)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="CUDA graphs need a GPU")
def test_a_graph_widens_what_stands_in_the_slots_when_it_runs() -> None:
    stand = Stand(torch.bfloat16)
    stand.put(whole())
    stand.experts.adopt(whole(), SoloExchange())
    stand.step([12])
    x = torch.randn(12, HIDDEN, dtype=torch.bfloat16, device=DEVICE)
    ids = torch.rand(12, EXPERTS, device=DEVICE).argsort(1)[:, :TOP_K]
    weights = torch.rand(12, TOP_K, device=DEVICE)
    torch.cuda.synchronize()
    stand.experts.begin([12])
    before, graph = torch.cuda.memory_allocated(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = stand.experts.forward(0, x, ids, weights)
    assert torch.cuda.memory_allocated() - before < stand.experts._room.nbytes // 8
    for order in ((0, 1, 2), (1, 2, 0)):
        stand.put(whole(order))
        stand.experts.adopt(whole(order), SoloExchange())
        stand.experts.begin([12])
        stand.experts.own_rows.fill_(12)
        graph.replay()
        exact = stand.full[0].reference(x.cpu(), ids.cpu(), weights.cpu())
        assert (output.cpu().double() - exact).norm() < TOLERANCE[torch.bfloat16] * exact.norm()
