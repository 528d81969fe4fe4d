"""The next epoch as one rank has it ready, beside the one it serves in."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from actors.engine.experts.exchange import Exchange, PeerLost, SoloExchange
from actors.engine.experts.map import ExpertMap
from actors.engine.experts.mesh import MeshExchange
from actors.engine.experts.planner import Move, moves
from actors.engine.experts.routing import Routing
from actors.engine.runner import ModelRunner
from actors.membership import Epoch


class Standby:
    """Made and connected in a thread of its own; ``load_next`` and ``switch`` belong to the engine's thread.

    ``routing`` and ``exchange`` are None on a rank that leaves; ``joiners`` are the rank indexes that the epoch adds.
    """

    def __init__(self, rank: int, epoch: Epoch, expert_map: ExpertMap, present: Epoch, present_map: ExpertMap) -> None:
        self.epoch = epoch
        self.index = epoch.ranks.index(rank) if rank in epoch.ranks else None
        self.joiners = tuple(i for i, member in enumerate(epoch.members) if member not in present.members)
        self.routing = None if self.index is None else Routing(expert_map, self.index)
        self.exchange: Exchange | None = None
        self.loaded = 0
        self._abandoned = threading.Event()
        self._todo: deque[Move] = deque()
        if rank in present.ranks and self.index is not None:
            layouts = (present.ranks, present_map), (epoch.ranks, expert_map)
            self._todo.extend(move for move in moves(*layouts) if move.rank == rank)
        self._reading: tuple[Move, Future[Any]] | None = None
        self._made: list[tuple[Move, Any]] = []  # to be put into their slots at the switch

    def connect(self, store: str, address: str, timeout_s: float, runner: ModelRunner) -> None:
        """Forms the epoch's exchange for ``runner`` through the store at ``ip:port``, bound to the IP ``address``.

        Blocks until all members have come. Raises PeerLost when one does not within ``timeout_s``, or when ``abandon``
        is called.
        """
        assert self.index is not None
        size = len(self.epoch.members)
        if size == 1:
            self.exchange = SoloExchange()
            return
        host, port = store.rsplit(":", 1)
        client = dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout_s))
        prefixed = dist.PrefixStore(f"epoch{self.epoch.number}", client)
        mesh = MeshExchange(prefixed, self.index, size, timeout_s, address, self._abandoned)
        try:
            self.exchange = exchange = runner.exchange(mesh, prefixed, self.epoch.number, self._abandoned)
        except PeerLost:
            mesh.close()
            raise
        if self._abandoned.is_set():
            exchange.close()

    @property
    def complete(self) -> bool:
        """Whether all experts are read that the epoch wants here."""
        return not self._todo and self._reading is None

    def load_next(self, runner: ModelRunner) -> bool:
        """Requests an expert, or takes the one requested, if it has come: says whether it has.

        A slot that the present epoch does not use gets it at once, another one at the switch.
        """
        if self._reading is None:
            move = self._todo.popleft()
            self._reading = move, runner.request_expert(move.layer, move.expert)
        move, request = self._reading
        if not request.done():
            return False
        self._reading = None
        if move.was_free:
            runner.put_expert(move.layer, move.slot, request.result())
        else:
            self._made.append((move, request.result()))
        self.loaded += 1
        return True

    @property
    def joiners_here(self) -> bool:
        """Whether every joiner has begun the epoch's first collective. True on a rank that leaves: others can tell."""
        return self.index is None or (self.exchange is not None and self.exchange.heard(self.joiners))

    def switch(self, runner: ModelRunner) -> Exchange | None:
        """Has ``runner`` work in this epoch from the next step on. Gives its exchange; None on a rank that leaves."""
        if self.exchange is None or self.routing is None:
            return None
        for move, made in self._made:
            runner.put_expert(move.layer, move.slot, made)
        runner.adopt(self.routing, self.exchange)
        return self.exchange

    def abandon(self) -> None:
        """From any thread: drops what was made ready."""
        self._abandoned.set()
        if self.exchange is not None:
            self.exchange.close()
