"""The exchange over a mesh of connections, its members being threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from actors.engine.experts.exchange import PeerLost, SoloExchange
from actors.engine.experts.mesh import MeshExchange


def group(size: int, member: Callable[[MeshExchange], Any], timeout_s: float = 20.0) -> list[Any]:
    """What ``member(exchange)`` returns or raises on each of ``size`` ranks."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def run(index: int) -> Any:
        client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
        exchange = MeshExchange(dist.PrefixStore("epoch1", client), index, size, timeout_s, "127.0.0.1")
        try:
            return member(exchange)
        except Exception as error:
            return error
        finally:
            exchange.close()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


@pytest.mark.parametrize("size", [2, 3])
def test_everyone_sees_all_vectors_in_rank_order(size: int) -> None:
    vectors = [[rank, 2**40 + rank] for rank in range(size)]
    assert group(size, lambda exchange: exchange.sync(vectors[exchange.rank_index])) == [vectors] * size


def test_a_sync_in_halves_tells_whose_answer_is_awaited() -> None:
    asked = threading.Event()

    def member(exchange: MeshExchange) -> Any:
        if exchange.rank_index == 1:
            asked.wait(20)
        exchange.offer([exchange.rank_index])
        early = exchange.awaited()
        asked.set()
        while exchange.awaited():
            pass
        return len(early), exchange.gather()

    first, second = group(2, member)
    assert first == (1, [[0], [1]])
    assert second[1] == [[0], [1]]


def test_a_lost_or_silent_member_is_not_awaited_for_ever_and_shows_in_the_gathering() -> None:
    over = threading.Event()

    def member(exchange: MeshExchange) -> Any:
        exchange.sync([0])
        if exchange.rank_index == 1:
            return None
        if exchange.rank_index == 2:
            return over.wait(20)
        exchange._timeout_s = 0.5
        exchange.offer([1])
        while exchange.awaited():
            pass
        over.set()
        return exchange.gather()

    first, *_ = group(3, member)
    assert isinstance(first, PeerLost)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [[2, 0, 3], [1, 1, 1], [0, 0, 1]])
def test_dispatch_gathers_unequal_shares(tokens: list[int], dtype: torch.dtype) -> None:
    shares = [torch.randn(count, 5).to(dtype) for count in tokens]
    for gathered in group(3, lambda exchange: exchange.dispatch(shares[exchange.rank_index], tokens)):
        assert torch.equal(gathered, torch.cat(shares))


def test_combine_delivers_each_row_to_the_rank_it_is_for() -> None:
    counts = [[1, 0, 2], [3, 1, 0], [0, 0, 0]]  # [from][to]
    rows = [[torch.full((counts[a][b], 2), 10.0 * a + b) for b in range(3)] for a in range(3)]

    def member(exchange: MeshExchange) -> torch.Tensor:
        own = exchange.rank_index
        return exchange.combine(torch.cat(rows[own]), counts[own], [row[own] for row in counts])

    for rank, received in enumerate(group(3, member)):
        assert torch.equal(received, torch.cat([row[rank] for row in rows]))


def test_a_member_that_leaves_is_peer_lost_for_the_others() -> None:
    def member(exchange: MeshExchange) -> Any:
        exchange.sync([0])
        return None if exchange.rank_index == 1 else exchange.sync([1])

    first, left, last = group(3, member)
    assert left is None
    assert isinstance(first, PeerLost)
    assert isinstance(last, PeerLost)


def test_a_member_that_hangs_is_peer_lost_after_the_timeout() -> None:
    over = threading.Event()

    def member(exchange: MeshExchange) -> Any:
        exchange.sync([0])
        if exchange.rank_index == 1:
            return over.wait(20)
        exchange._timeout_s = 0.5  # forming the group has longer, however busy the machine is
        try:
            return exchange.sync([1])
        finally:
            over.set()

    first, hung = group(2, member)
    assert hung is True
    assert isinstance(first, PeerLost)


def test_a_member_that_never_arrives_is_peer_lost() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(PeerLost, match="rank index 0 of 2"):
        MeshExchange(dist.PrefixStore("epoch1", store), 0, 2, 0.5, "127.0.0.1")


def test_a_group_of_one_exchanges_nothing() -> None:
    solo, rows = SoloExchange(), torch.randn(3, 4)
    assert solo.sync([1, 2]) == [[1, 2]]
    solo.offer([3])
    assert solo.awaited() == [] and solo.gather() == [[3]]
    assert solo.dispatch(rows, [3]) is rows
    assert solo.combine(rows, [3], [3]) is rows
