"""Windows, who may open them, and groups of ranks that compute through them what one rank computes."""

from __future__ import annotations

import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from expert_modules import Module, slots
from rank_group import Rank, SharedMemory, run, shared

from actors.engine.cuda import peers as peers_module
from actors.engine.cuda.experts import CudaExperts
from actors.engine.cuda.peers import NoPeerAccess, PeerWindows
from actors.engine.cuda.window import PADS, Layout, Window
from actors.engine.experts.exchange import Exchange, PeerLost, SoloExchange
from actors.engine.experts.map import ExpertMap
from actors.engine.experts.mesh import MeshExchange
from actors.engine.experts.routing import Routing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HIDDEN, INNER, EXPERTS, TOP_K, MAX_ROWS, LAYERS = 32, 24, 6, 2, 8, 3
LAYOUT = Layout(4, MAX_ROWS, TOP_K, HIDDEN, torch.float32)

# By number of ranks. The second layer's experts all stand on every rank, or nearly; -1 is a slot with nothing in it.
MAPS = {
    1: ExpertMap(EXPERTS, (((0, 1, 2, 3, 4, 5),),) * LAYERS),
    2: ExpertMap(
        EXPERTS,
        (
            ((0, 1, 2, 5, -1, -1), (3, -1, 4, 5, 0, -1)),
            ((0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0)),
            ((5, 3, 1, -1, -1, -1), (-1, 4, 2, 0, 1, -1)),
        ),
    ),
    3: ExpertMap(
        EXPERTS,
        (
            ((0, 1, -1, -1, -1, -1), (3, -1, 4, 5, 0, -1), (2, 1, 5, -1, -1, -1)),
            ((0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (0, 2, 1, 3, 4, 5)),
            ((-1, -1, -1, -1, -1, 5), (4, 2, 0, 1, -1, -1), (3, 2, -1, -1, -1, -1)),
        ),
    ),
}
# Tokens by step and rank of a group; ranks of an epoch, by step.
STEPS = {
    2: [([3, 5], [0, 1]), ([0, 4], [0, 1]), ([2, 2], [0, 1]), ([6], [1]), ([1, 8], [1, 0])],
    3: [([2, 3], [0, 2]), ([3, 0, 1], [0, 1, 2]), ([1, 4, 2], [0, 1, 2]), ([5, 2], [2, 0])],
}


@functools.cache
def modules(dtype: torch.dtype = torch.float32) -> list[Module]:
    return [Module("silu", EXPERTS, HIDDEN, INNER, dtype, seed) for seed in range(LAYERS)]


def draw(rows: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    return [torch.randn(rows, HIDDEN, generator=generator), ids, torch.rand(rows, TOP_K, generator=generator)]


class Model:
    """The experts of one rank, filled anew for each map. Steps have ``padding`` rows besides."""

    def __init__(
        self,
        device: torch.device,
        window: Window | None = None,
        dtype: torch.dtype = torch.float32,
        padding: int = 1,
    ) -> None:
        self.device, self.dtype, self.padding = device, dtype, padding
        self.modules = [module.of([-1] * EXPERTS) for module in modules(dtype)]
        layers = [slots(module, device) for module in self.modules]
        self.experts = CudaExperts(layers, EXPERTS, TOP_K, HIDDEN, dtype, device, MAX_ROWS, LAYOUT.max_ranks, window)
        self.experts._inner.fill_(float("nan"))

    def adopt(self, routing: Routing, exchange: Exchange) -> None:
        for module, full, held in zip(self.modules, modules(self.dtype), routing.own_slots, strict=True):
            module.load_state_dict(full.of(list(held)).state_dict())
        self.experts.adopt(routing, exchange)

    def check(self) -> None:
        verdict = self.experts.verdict()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.experts.check(verdict)

    def step(self, tokens: list[int], own: int, seeds: list[int], few: int = 0) -> torch.Tensor:
        """Layers one after the other, ``[rows, HIDDEN]`` of the rank that has ``tokens[own]``.

        The last one has only the first ``few`` rows, if so many are given.
        """
        experts, rows = self.experts, tokens[own]
        experts.begin(tokens)
        experts.own_rows.fill_(rows)
        if not rows:
            experts.finish()
            return torch.empty(0, HIDDEN)
        padded = min(rows + self.padding, MAX_ROWS)
        hidden = torch.zeros(padded, HIDDEN, device=self.device, dtype=self.dtype)
        for layer, seed in enumerate(seeds):
            if few and layer == LAYERS - 1:
                experts.narrow(few, torch.full_like(experts.own_rows, few))
                rows, padded, hidden = few, few, hidden[:few]
            fresh, ids, weights = draw(rows, seed + 97 * own)
            hidden[:rows] += fresh.to(self.device)
            hidden[rows:] = float("nan")
            ids = torch.cat([ids, torch.full((padded - rows, TOP_K), 12345)])
            weights = torch.cat([weights, torch.full((padded - rows, TOP_K), float("nan"))])
            hidden = experts.forward(layer, hidden, ids.to(self.device), weights.to(self.device))
        return hidden[:rows].cpu()


def seeds_of(step: int) -> list[int]:
    return [1000 * step + layer for layer in range(LAYERS)]


def work(size: int, rank: Rank, number: int) -> list[torch.Tensor]:
    """Rank ``number`` through all steps; it sits out those of epochs that it is not in."""
    model = Model(rank.device, rank.window)
    results: list[torch.Tensor] = []
    former: list[int] = []
    exchange: Exchange = SoloExchange()
    for step, (tokens, members) in enumerate(STEPS[size]):
        if number not in members:
            continue
        own = members.index(number)
        if members != former:
            joined: Exchange = rank.join(step, own, len(members)) if len(members) > 1 else SoloExchange()
            model.adopt(Routing(MAPS[len(members)], own), joined)
            joined.sync([0])
            exchange.close()
            exchange, former = joined, members
        results.append(model.step(tokens, own, seeds_of(step)))
        model.check()
    return results


@pytest.mark.parametrize("size", [2, 3])
def test_a_group_computes_bit_for_bit_what_one_rank_does(size: int) -> None:
    """Through several epochs, with replicas, empty slots, an idle rank, local layers and a rank by itself."""
    got = run(functools.partial(work, size), size, LAYOUT)
    model = Model(DEVICE)
    model.adopt(Routing(MAPS[1], 0), SoloExchange())
    for step, (tokens, members) in enumerate(STEPS[size]):
        for own, number in enumerate(members):
            result = got[number].pop(0)
            if tokens[own]:
                # The same rows by themselves: the seed tells the ranks apart, so it is shifted along.
                alone = model.step([tokens[own]], 0, [seed + 97 * own for seed in seeds_of(step)])
                assert torch.equal(result, alone), (step, own)


# Tokens by rank, and how many of them the last layer has where they are fewer.
NARROWED = [([7, 5], [2, 1]), ([8, 3], [3, 0]), ([0, 6], [0, 4]), ([1, 4], [0, 2]), ([3, 3], [0, 0])]


def narrowed(rank: Rank, index: int) -> list[torch.Tensor]:
    model = Model(rank.device, rank.window)
    exchange = rank.join(0, index, 2)
    model.adopt(Routing(MAPS[2], index), exchange)
    exchange.sync([0])
    results = []
    for step, (tokens, few) in enumerate(NARROWED):
        results.append(model.step(tokens, index, seeds_of(step), few[index]))
        model.check()
    return results


def test_each_rank_may_have_fewer_rows_in_the_last_layer() -> None:
    got = run(narrowed, 2, LAYOUT)
    model = Model(DEVICE)
    model.adopt(Routing(MAPS[1], 0), SoloExchange())
    for step, (tokens, few) in enumerate(NARROWED):
        for index, rows in enumerate(tokens):
            if rows:
                alone = model.step([rows], 0, [seed + 97 * index for seed in seeds_of(step)], few[index])
                assert len(alone) == (few[index] or rows) and torch.equal(got[index][step], alone), (step, index)


# Tokens by rank, and whether the products are pair by pair, rank by rank.
SINGLE = [([1, 1], (True, True)), ([1, 0], (True, False)), ([2, 1], (False, False)), ([1, 1], (True, True))]


def single(rank: Rank, index: int) -> list[torch.Tensor]:
    model = Model(rank.device, rank.window, torch.float16, padding=0)
    calls: list[int] = []
    own = model.experts._multiply_pairs
    model.experts._multiply_pairs = lambda layer, *rest: (calls.append(layer), own(layer, *rest))  # type: ignore
    exchange = rank.join(0, index, 2)
    model.adopt(Routing(MAPS[2], index), exchange)
    exchange.sync([0])
    results = []
    for step, (tokens, pairwise) in enumerate(SINGLE):
        results.append(model.step(tokens, index, seeds_of(step)))
        model.experts.check(model.experts.verdict())
        assert calls == list(range(LAYERS)) * pairwise[index]
        calls.clear()
    return results


def test_ranks_of_one_row_compute_pair_by_pair_and_only_if_none_has_more() -> None:
    got = run(single, 2, Layout(4, MAX_ROWS, TOP_K, HIDDEN, torch.float16))
    model = Model(DEVICE)
    model.adopt(Routing(MAPS[1], 0), SoloExchange())
    for step, (tokens, _) in enumerate(SINGLE):
        for index, rows in enumerate(tokens):
            if rows:
                exact = model.step([rows], 0, [seed + 97 * index for seed in seeds_of(step)])
                difference = (got[index][step].float() - exact).norm()
                assert float(difference) < 4e-3 * float(exact.norm()), (step, index)


def break_off(rank: Rank, index: int) -> list[Any]:
    """Rank 1 never takes part in the step; the host of rank 0 breaks off."""
    model = Model(rank.device, rank.window)
    # Loads the kernels. Loading one beside another that waits would wait for it, and let nobody else at the driver.
    model.adopt(Routing(MAPS[1], 0), SoloExchange())
    model.step([2], 0, seeds_of(0))
    model.check()
    exchange = rank.join(1, index, 2)
    model.adopt(Routing(MAPS[2], index), exchange)
    exchange.sync([0])
    if index == 1:
        exchange.sync([1])
        # Its own waits end too: it was told by rank 0, not by its host.
        model.step([2, 3], 1, seeds_of(0))
        with pytest.raises(PeerLost, match="void"):
            model.check()
        return []
    timer = threading.Timer(1.0, exchange.break_off)
    timer.start()
    model.step([2, 3], 0, seeds_of(0))
    with pytest.raises(PeerLost, match="void"):
        model.check()
    exchange.sync([1])
    # The next epoch knows nothing of it.
    model.adopt(Routing(MAPS[1], 0), SoloExchange())
    result = model.step([4], 0, seeds_of(1))
    model.check()
    return [result]


def test_a_wait_that_is_broken_off_makes_the_step_void_on_all_ranks() -> None:
    (result,), _ = run(break_off, 2, LAYOUT)
    model = Model(DEVICE)
    model.adopt(Routing(MAPS[1], 0), SoloExchange())
    assert torch.equal(result, model.step([4], 0, seeds_of(1)))


def lose(rank: Rank, index: int) -> list[Any]:
    """Rank 1 leaves when it is to compute; rank 0 launches more steps than the driver has room for."""
    model = Model(rank.device, rank.window)
    model.adopt(Routing(MAPS[1], 0), SoloExchange())
    model.step([2], 0, seeds_of(0))
    exchange = rank.join(1, index, 2)
    model.adopt(Routing(MAPS[2], index), exchange)
    exchange.sync([0])
    if index == 0:
        for _ in range(200 if rank.device.type == "cuda" else 1):
            model.step([2, 3], 0, seeds_of(0))
        with pytest.raises(PeerLost, match="void"):
            model.check()
    exchange.close()
    return []


def test_who_launches_behind_a_wait_for_a_lost_peer_is_not_stuck() -> None:
    """Interpreted kernels wait in the thread that launches them."""
    run(lose, 2, LAYOUT)


class _Done:
    """An event that happens once the host broke off, or ``after`` seconds."""

    def __init__(self, window: Window, pad: int, after: float = 60.0) -> None:
        self._window, self._pad = window, pad
        self._due = time.monotonic() + after

    def query(self) -> bool:
        return self._window.broken.item() == self._pad or time.monotonic() > self._due


def group(size: int, layout: Layout = LAYOUT) -> tuple[list[PeerWindows], Any]:
    """Windows of ranks that are threads, and ``connect(epoch, members) -> what each of them gets or raises``."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pieces = [shared(layout.nbytes) for _ in range(size)]
    windows = [PeerWindows(Window(layout, SharedMemory(pieces, index))) for index in range(size)]

    def connect(epoch: int, members: list[int]) -> list[Any]:
        def one(number: int) -> Any:
            store = dist.PrefixStore(f"{epoch}", dist.TCPStore("127.0.0.1", server.port, is_master=False))
            try:
                mesh = MeshExchange(store, members.index(number), len(members), 20, "127.0.0.1")
                return windows[number].connect(mesh, store, epoch, 20)
            except (PeerLost, NoPeerAccess) as error:
                return error

        with ThreadPoolExecutor(len(members)) as pool:
            return list(pool.map(one, members))

    return windows, connect


def test_regions_follow_each_other_and_epochs_have_flags_of_their_own() -> None:
    layout = Layout(3, 5, 2, 7, torch.bfloat16)
    assert layout.ids >= 3 * 5 * 7 * 2
    assert layout.counts - layout.ids >= 3 * 5 * 2 * 4
    assert layout.results - layout.counts >= 3 * 4
    assert layout.pads - layout.results >= 5 * 2 * 7 * 2
    assert layout.pad(1) - layout.pad(0) >= (2 * 3 + 1) * 4
    assert layout.pad(1) + (2 * 3 + 1) * 4 <= layout.pad(2)
    assert layout.pad(PADS) == layout.pad(0)
    assert layout.pad(PADS - 1) + layout.pad_words * 4 <= layout.nbytes
    with pytest.raises(ValueError, match="too many pairs"):
        Layout(64, 2**22, 8, 64, torch.float32)


def test_a_peer_that_stays_is_opened_once_and_one_that_left_is_closed() -> None:
    windows, connect = group(3)
    first = connect(1, [0, 1])
    second = connect(2, [1, 0, 2])
    assert second[0].addresses == [windows[number].window.address for number in (1, 0, 2)]
    assert second[0].pad != first[0].pad
    for peers in (*first, *second):
        peers.close()
    connect(3, [0, 1])
    closed = windows[0].window.memory.closed
    assert sorted(closed) == sorted(windows[number].window.address for number in (1, 2))


def test_a_peer_that_left_is_closed_although_nobody_comes() -> None:
    windows, connect = group(2)
    first, second = connect(1, [0, 1])
    second.close()
    first.close()
    for number, other in ((0, 1), (1, 0)):
        deadline = time.monotonic() + 20
        while windows[number].window.memory.closed != [windows[other].window.address]:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_peer_still_in_use_stays_open() -> None:
    windows, connect = group(3)
    connect(1, [0, 1])
    second = connect(2, [0, 1, 2])
    for peers in second:
        peers.close()
    connect(3, [0, 2])
    assert windows[0].window.memory.closed == [windows[2].window.address]


def test_all_members_hear_who_cannot_reach_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    windows, connect = group(3)

    def refuse(handle: bytes) -> int:
        raise OSError("peer access is not supported")

    monkeypatch.setattr(windows[2].window.memory, "open", refuse)
    for error in connect(1, [0, 1, 2]):
        assert isinstance(error, NoPeerAccess)
        assert "rank index 2 can't reach the memory of rank index 0: peer access is not supported" in str(error)


def test_ranks_on_other_machines_are_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    _, connect = group(2)
    names = iter(["one", "two"])
    monkeypatch.setattr(peers_module, "_machine", lambda: next(names))
    assert all(isinstance(error, NoPeerAccess) and "is on machine" in str(error) for error in connect(1, [0, 1]))


def test_a_member_that_does_not_tell_its_window_is_lost() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    windows = PeerWindows(Window(LAYOUT, SharedMemory([shared(LAYOUT.nbytes)], 0)))

    class Mesh:
        rank_index, size = 0, 2

    abandoned = threading.Event()
    threading.Timer(0.2, abandoned.set).start()
    with pytest.raises(PeerLost, match="rank index 1 did not tell rank index 0 its window: the epoch was abandoned"):
        windows.connect(Mesh(), server, 1, 20, abandoned)  # type: ignore[arg-type]
    with pytest.raises(PeerLost, match="too late"):
        windows.connect(Mesh(), server, 1, 0.1)  # type: ignore[arg-type]


def test_a_broken_connection_or_a_timeout_breaks_the_step_off() -> None:
    windows, connect = group(2)
    first, second = connect(1, [0, 1])
    first.wait(_Done(windows[0].window, first.pad, after=0.2), 20)
    second.close()
    started = time.monotonic()
    first.wait(_Done(windows[0].window, first.pad), 20)  # ends, since it is broken off
    assert time.monotonic() - started < 15
    first, second = connect(2, [0, 1])
    assert not _Done(windows[0].window, first.pad).query()  # that was another epoch
    first.wait(_Done(windows[0].window, first.pad), 0.2)
    assert not _Done(windows[1].window, second.pad).query()  # whose kernels hear of it from those of the first
    never = type("Never", (), {"query": lambda self: False})()
    with pytest.raises(PeerLost, match="did not end"):
        first.wait(never, 0.1)
