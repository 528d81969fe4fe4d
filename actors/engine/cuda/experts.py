"""The experts of all MoE layers on a GPU: what ``experts/layer.py`` does, in four or five kernels a layer and without
the host knowing who is routed where.

Per layer: ``dispatch`` pushes rows into the peers' windows and sorts all ranks' pairs by slot, ``expand`` and
``contract`` are the two matrix products, the latter of which writes results straight home, and ``combine`` sums them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton

from actors.engine.cuda import fp8, gemm, gemv, route
from actors.engine.cuda.one_row import share
from actors.engine.cuda.overlap import launch
from actors.engine.cuda.peers import CudaPeers
from actors.engine.cuda.products import Products
from actors.engine.cuda.window import Layout, Window
from actors.engine.experts.exchange import Exchange, PeerLost, SoloExchange
from actors.engine.experts.layer import ExpertsBroken
from actors.engine.experts.routing import Routing
from actors.engine.experts.slots import StackedSlots

# Pairs that a program of the dispatch enters at a time, and columns that one of the combination sums.
_PAIRS = 256
# The fewest programs that dispatch: peers may have more rows than a graph was captured with.
_PROGRAMS = 8
_COLUMNS = 512
# Up to so many rows kernels start early (see ``overlap.py``); these are in the way sooner than others.
MOST_ROWS = 16
# Of the products pair by pair: columns of a program, at most, and programs per multiprocessor. As measured on an H100
# with the sizes of Qwen3-30B-A3B, 2026-11-27; those for FP8 on an H200 (scripts/bench/cuda_fp8.py, 2026-11-30).
_EXPAND, _CONTRACT = (4, 8), (4, 16)
_EXPAND_FP8, _CONTRACT_FP8 = (8, 6), (4, 24)


class CudaExperts:
    """Has the interface of ``Experts``; besides, rows may be padded, and a step may be a captured graph.

    ``own_rows`` (int32 ``[1]``, on the device) says how many of the rows that ``forward`` gets count; whoever fills the
    step's inputs sets it, or puts a tensor of its own in its place before the first step. A graph of ``forward`` or
    ``finish`` stays good whatever is adopted later and however many rows peers have; ``begin`` belongs outside it. One
    captured with a single row may compute pair by pair (``pairwise``), which is slow where peers have more.

    ``layers`` are this rank's slots by MoE layer; ``max_rows`` the most rows of one rank in one step; ``max_ranks`` the
    size to which the group may grow; ``most_rows`` the most that a rank has in this step, ``mean_rows`` how many they
    have on average. ``chosen [layers, experts]`` (int64, on the device) counts how often this rank's tokens chose each
    expert, ``computed`` the pairs that this rank computed; reading either waits for the device.
    """

    def __init__(
        self,
        layers: Sequence[StackedSlots],
        num_experts: int,
        top_k: int,
        hidden: int,
        dtype: torch.dtype,
        device: torch.device,
        max_rows: int,
        max_ranks: int = 8,
        window: Window | None = None,
    ) -> None:
        self.layers = list(layers)
        self.num_experts = num_experts
        self.top_k = top_k
        self.hidden = hidden
        self.dtype = dtype
        self.device = device
        self.max_rows = max_rows
        self.max_ranks = max_ranks
        count = len(self.layers)
        self.window = window or Window.allocate(Layout(max_ranks, max_rows, top_k, hidden, dtype), device)
        # The interpreter runs one program after the other, and those of a kernel that waits must run together.
        cuda = device.type == "cuda"
        self.processors = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 1
        num_slots = len(self.layers[0].module.down_proj) if self.layers else 0
        # A rank by itself may send all of a token's pairs to one slot (Routing.alone), a group only one of them.
        self._capacity = max_rows * max(max_ranks, top_k)
        self._products = [Products(layer.module, dtype) for layer in self.layers]
        self._pairwise = any(products.pairwise for products in self._products)

        def integers(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        self.own_rows, self._turn, self._arrived = integers(1), integers(1), integers(1)
        self._members, self._windows = integers(2), integers(max_ranks, dtype=torch.int64)
        self._pad = integers(1, dtype=torch.int64)
        self._group = self._members, self._windows, self._pad, self.window.broken, self._turn
        self._sizes = {"TOP_K": top_k, "HIDDEN": hidden, "EXPERTS": num_experts, "MAX_RANKS": max_ranks}
        self._local, self._table = integers(count), integers(count, max_ranks, num_experts + 1)
        self._count, self._index = integers(num_slots), integers(num_slots, self._capacity)
        self.chosen, self._computed = integers(count, num_experts, dtype=torch.int64), integers(1, dtype=torch.int64)
        # On the host, so that whether a step is void is known with its end.
        self._void = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._nobody = torch.zeros(1, max(hidden, 1), dtype=dtype, device=device)
        # All ranks' rows may be for experts that stand here.
        width = max((products.activated for products in self._products if products.gate), default=0)
        self._inner = torch.empty(max_rows * max_ranks * top_k * width, dtype=dtype, device=device)
        # Each product of each layer has this to itself, one after the other, as the stream runs them.
        widest = max((products.widest for products in self._products), default=0)
        widens = widest and fp8.widens(dtype, max_rows * top_k / num_slots)
        self._room = torch.empty(widest, dtype=dtype, device=device) if widens else None
        self._next = count
        self.most_rows = self.mean_rows = 0
        self.exchange: Exchange = SoloExchange()

    @property
    def capturable(self) -> bool:
        """Whether ``forward`` may be captured: not if a module has an activation that the kernels lack."""
        return all(products.gate for products in self._products)

    @property
    def pairwise(self) -> bool:
        """Whether a step in which no rank has more than one row has products of its own here."""
        return self._pairwise

    @property
    def computed(self) -> int:
        return int(self._computed)

    @computed.setter
    def computed(self, value: int) -> None:
        self._computed.fill_(value)

    def suits(self, exchange: Exchange) -> bool:
        """Whether rows can travel by ``exchange`` from here."""
        return isinstance(exchange, SoloExchange | CudaPeers)

    def reset_counts(self) -> None:
        """Forget what was chosen and computed so far."""
        self.chosen.zero_()
        self._computed.zero_()

    def adopt(self, routing: Routing, exchange: Exchange) -> None:
        """Use another map, or another epoch's exchange, from the next step on; in the stream's order, a few copies.

        Raises ValueError when it is of another model, or has more ranks than there is room for, and TypeError when the
        exchange is not one that GPUs can use.
        """
        expert_map = routing.map
        if expert_map.num_layers != len(self.layers):
            raise ValueError(f"expert map has {expert_map.num_layers} layers, the model {len(self.layers)} MoE layers")
        if self.layers and expert_map.num_experts != self.num_experts:
            raise ValueError(f"expert map is of {expert_map.num_experts} experts, the model has {self.num_experts}")
        if routing.num_ranks > self.max_ranks:
            raise ValueError(f"expert map has {routing.num_ranks} ranks; windows were made for {self.max_ranks}")
        if not isinstance(exchange, SoloExchange | CudaPeers):
            raise TypeError(f"experts on GPUs need peers' windows, not a {type(exchange).__name__}")
        if isinstance(self.exchange, CudaPeers):
            self.exchange.turn.copy_(self._turn)
        self.routing = routing
        self.rank_index = routing.rank_index
        self.exchange = exchange
        self._num_slots = routing.num_slots
        addresses = [self.window.address] * self.max_ranks
        if isinstance(exchange, CudaPeers):
            addresses[: exchange.size] = exchange.addresses
            self._turn.copy_(exchange.turn)
            self._pad.fill_(exchange.pad)
        self._windows.copy_(torch.tensor(addresses, dtype=torch.int64))
        self._members.copy_(torch.tensor([routing.num_ranks, routing.rank_index], dtype=torch.int32))
        self._local.copy_(torch.tensor(routing.local, dtype=torch.int32))
        self._table[:, : routing.num_ranks].copy_(torch.from_numpy(routing.table))
        # What a step that failed has left behind.
        for left in (self._void, self._count, self._arrived):
            left.zero_()

    def begin(self, tokens_per_rank: Sequence[int]) -> None:
        """Start a step in which rank index ``i`` has ``tokens_per_rank[i]`` tokens, rows of padding not counted.

        Raises ValueError when list, exchange and expert map are not of one number of ranks, and for too many tokens.
        """
        if self.layers and not len(tokens_per_rank) == self.exchange.size == self.routing.num_ranks:
            raise ValueError(
                f"a step of {len(tokens_per_rank)} ranks, an exchange of {self.exchange.size}, "
                f"an expert map of {self.routing.num_ranks}: adopt an exchange and a map of the same epoch"
            )
        if max(tokens_per_rank) > self.max_rows:
            raise ValueError(
                f"a rank has {max(tokens_per_rank)} tokens in a step; windows were made for {self.max_rows}"
            )
        self._tokens = list(tokens_per_rank)
        self.most_rows, self.mean_rows = max(self._tokens), sum(self._tokens) // len(self._tokens)
        self._next = 0

    def narrow(self, rows: int, count: torch.Tensor) -> None:
        """From here on ``forward`` gets ``rows`` rows in this step, no more than before, of which ``count`` count.

        That is int32 ``[1]``, on the device. Peers need not be told: how many rows they get comes with those, layer by
        layer.
        """
        self._tokens[self.rank_index] = min(rows, self._tokens[self.rank_index])
        self.own_rows.copy_(count)

    def forward(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Routed experts of ``layer``: ``hidden [T, H]``, ``ids [T, k]``, ``weights [T, k]`` to ``[T, H]``.

        Does not wait for the device. Rows of padding come back as zeros. Raises ValueError (called out of turn or with
        fewer rows than announced; the step can still be finished), ExpertsBroken (this rank is lost).
        """
        own = self._tokens[self.rank_index]
        if layer != self._next or not own <= len(hidden) <= self.max_rows:
            raise ValueError(
                f"MoE layer {layer} ran with {len(hidden)} rows; layer {self._next} with {own} was announced"
            )
        output = self._run(layer, hidden.contiguous(), ids.contiguous(), weights.contiguous())
        self._next = layer + 1
        return output

    def finish(self) -> None:
        """Run the layers of this step that have not run, contributing no rows. Raises ExpertsBroken."""
        self.own_rows.zero_()
        ids = self._nobody.new_full((1, self.top_k), -1, dtype=torch.int32)
        for layer in range(self._next, len(self.layers)):
            self._run(layer, self._nobody[:0], ids, self._nobody)
        self._next = len(self.layers)

    def verdict(self) -> torch.Tensor:
        """Whether the steps launched so far are void: on the host, once they are complete. For ``check``."""
        verdict = torch.empty(1, dtype=self._void.dtype, pin_memory=self._void.is_cuda)
        return verdict.copy_(self._void[:1], non_blocking=True)

    def check(self, verdict: torch.Tensor) -> None:
        """Raises PeerLost if a complete step was void."""
        if verdict.item():
            raise PeerLost("the host broke off while the experts waited for a peer's rows: the step is void")

    def _run(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        try:
            output = torch.empty_like(hidden)
            self._dispatch(layer, hidden, ids)
            self._multiply(layer, hidden)
            self._combine(layer, ids, weights, output)
        except Exception as error:
            raise ExpertsBroken(f"rank index {self.rank_index} failed in the experts of MoE layer {layer}") from error
        return output

    def _dispatch(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor) -> None:
        rows = len(hidden) if self.routing.local[layer] else max(len(hidden), *self._tokens)
        route.dispatch[(min(self.processors, max(_PROGRAMS, rows)),)](
            hidden, ids, self.window.received, self.own_rows, self.chosen, self._table, self._local, *self._group,
            self._arrived, self._count, self._index, self._void,
            layer, self._num_slots, self._capacity, self.max_rows, self.window.layout.ids, self.window.layout.counts,
            **self._sizes, BLOCK=_PAIRS, WIDTH=triton.next_power_of_2(self.hidden), EAGER=len(hidden) == 1,
            **launch(self.device, len(hidden), MOST_ROWS),
        )  # fmt: skip

    def _combine(self, layer: int, ids: torch.Tensor, weights: torch.Tensor, output: torch.Tensor) -> None:
        width = min(_COLUMNS, triton.next_power_of_2(self.hidden))
        items = len(output) * triton.cdiv(self.hidden, width)
        route.combine[(min(32 * self.processors, max(1, items)),)](
            ids, weights, self.window.results, output, self.own_rows, self._table, self._local, *self._group,
            self._arrived, self._count, self._void, layer, len(output), self._num_slots,
            **self._sizes, SLOTS=triton.next_power_of_2(max(1, self._num_slots)), WIDTH=width, EAGER=len(output) == 1,
            **launch(self.device, len(output), MOST_ROWS),
        )  # fmt: skip

    def _multiply(self, layer: int, hidden: torch.Tensor) -> None:
        """Both products, for all pairs that stand here."""
        products, slots = self._products[layer], max(1, self._num_slots)
        if products.pairwise and len(hidden) == self.most_rows == 1:
            self._multiply_pairs(layer, hidden, products)
            return
        # Tiles suit the rows that this step has here when they are spread evenly; any others work too.
        rows = max(len(hidden), sum(self._tokens) // len(self._tokens))
        each = rows * self.top_k / slots
        room = self._room if products.quantized and fp8.widens(self.dtype, each) else None
        kernels: Any = fp8 if products.quantized and room is None else gemm
        up, down = (kernels.shape(self.dtype, each, product) for product in ("expand", "contract"))
        common = {
            "TOP_K": self.top_k, "SLOTS": triton.next_power_of_2(slots), "TRANSPOSED": products.transposed,
            "BIASED": products.biased, "PRECISION": "ieee" if self.dtype == torch.float32 else "tf32",
        }  # fmt: skip
        if kernels is gemm:
            common |= launch(self.device, rows, MOST_ROWS)
        inner = self._inner
        if not products.gate:
            if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("these experts' activation can't be captured: run without CUDA graphs")
            rows = max(1, sum(self._tokens) * self.top_k)
            inner = torch.empty(rows, products.up_columns, dtype=self.dtype, device=self.device)
        weight, described = products.first(up, room, slots)
        kernels.expand[(self.processors * up.per_processor,)](
            hidden, self.window.received, weight, products.up_beside, inner, self._count, self._index,
            self._members, self._local, self._turn, self._computed,
            layer, self._num_slots, self._capacity, self.max_rows, products.limit, products.alpha,
            N=products.up_columns, K=self.hidden, GATE=products.gate, **common, **described,
            BM=up.rows, BN=up.columns, BK=up.depth, num_warps=up.warps, num_stages=up.stages,
        )  # fmt: skip
        if not products.gate:
            inner = products.activate(inner)
        inner, weight, described = products.second(inner, down, room, slots)
        kernels.contract[(self.processors * down.per_processor,)](
            inner, weight, products.down_beside, self.window.results, self._count, self._index, self._members,
            self._windows, self._num_slots, self._capacity, self.max_rows,
            N=self.hidden, K=products.activated, **common, **described,
            BM=down.rows, BN=down.columns, BK=down.depth, num_warps=down.warps, num_stages=down.stages,
        )  # fmt: skip

    def _multiply_pairs(self, layer: int, hidden: torch.Tensor, products: Products) -> None:
        common = {
            "TOP_K": self.top_k, "SLOTS": triton.next_power_of_2(max(1, self._num_slots)), "BIASED": products.biased,
            "SCALED": products.quantized, **launch(self.device, len(hidden), MOST_ROWS),
        }  # fmt: skip
        expand, contract = (_EXPAND_FP8, _CONTRACT_FP8) if products.quantized else (_EXPAND, _CONTRACT)
        block, (most, programs) = triton.next_power_of_2(self.hidden), expand
        columns, warps = share(block, most)
        gemv.expand[(self.processors * programs,)](
            hidden, self.window.received, products.up, products.up_beside, self._inner, self._count, self._index,
            self._members, self._local, self._turn, self._computed,
            layer, self._num_slots, self._capacity, self.max_rows,
            N=products.up_columns, K=self.hidden, **common, BN=columns, BK=block, num_warps=warps,
        )  # fmt: skip
        block, (most, programs) = triton.next_power_of_2(products.activated), contract
        columns, warps = share(block, most)
        gemv.contract[(self.processors * programs,)](
            self._inner, products.down, products.down_beside, self.window.results, self._count, self._index,
            self._members, self._windows, self._num_slots, self._capacity, self.max_rows,
            N=self.hidden, K=products.activated, **common, BN=columns, BK=block, num_warps=warps,
        )  # fmt: skip
