"""The experts of all MoE layers as one rank runs them: route rows to slots, compute what stands here, combine.

Per layer and step: every rank learns all ranks' rows and the experts chosen for them (dispatch), computes those rows
whose expert stands in one of its slots, returns the results to the rows' home ranks (combine), and there each
token's k results are weighted and summed in k order, so that the sum does not depend on where the experts stand.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from actors.engine.experts.exchange import Exchange
from actors.engine.experts.map import EMPTY_SLOT
from actors.engine.experts.mesh import MeshExchange
from actors.engine.experts.routing import Routing
from actors.engine.experts.slots import ExpertSlots

# Expert ids travel bit-cast in trailing columns of the hidden rows, so one collective carries both.
_ID_DTYPE = {4: torch.int32, 2: torch.int16}


class ExpertsBroken(RuntimeError):
    """This rank failed while it computed peers' rows: their results cannot be delivered, so the rank is lost."""


class Experts:
    """All MoE layers' experts of one rank, and the one place that knows membership and map.

    ``adopt`` swaps map, rank index and exchange between steps; the model is not touched. In a step every layer runs
    exactly once, in order, on every rank: ``begin``, then ``forward`` per layer; ``finish`` runs the layers that are
    left with no rows of this rank (all of them when the rank is idle).

    ``chosen [layers, experts]`` counts how often this rank's tokens chose each expert, and ``computed`` the rows that
    this rank's experts computed, for whatever rank: both since the start.
    """

    def __init__(
        self,
        layers: Sequence[ExpertSlots],
        num_experts: int,
        top_k: int,
        hidden: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers = list(layers)
        self.num_experts = num_experts
        self.device = device
        self.hidden = hidden
        self.top_k = top_k
        self.dtype = dtype
        self.chosen = np.zeros((len(self.layers), num_experts), dtype=np.int64)
        self.computed = 0
        self._next = len(self.layers)

    def suits(self, exchange: Exchange) -> bool:
        """Whether rows can travel by ``exchange`` from here."""
        return self.device.type != "cuda" or isinstance(exchange, MeshExchange)

    def adopt(self, routing: Routing, exchange: Exchange) -> None:
        """Use another map, or another epoch's exchange, from the next step on. Raises ValueError when it is of
        another model."""
        expert_map = routing.map
        if expert_map.num_layers != len(self.layers):
            raise ValueError(f"expert map has {expert_map.num_layers} layers, the model {len(self.layers)} MoE layers")
        if self.layers and expert_map.num_experts != self.num_experts:
            raise ValueError(f"expert map is of {expert_map.num_experts} experts, the model has {self.num_experts}")
        self.routing = routing
        self.rank_index = routing.rank_index
        self.exchange = exchange
        self._num_slots = routing.num_slots

    def reset_counts(self) -> None:
        """Forget what was chosen and computed so far."""
        self.chosen[:] = self.computed = 0

    def begin(self, tokens_per_rank: Sequence[int]) -> None:
        """Start a step in which rank index ``i`` has ``tokens_per_rank[i]`` tokens.

        Raises ValueError when list, exchange and expert map are not of one number of ranks.
        """
        if self.layers and not len(tokens_per_rank) == self.exchange.size == self.routing.num_ranks:
            raise ValueError(
                f"a step of {len(tokens_per_rank)} ranks, an exchange of {self.exchange.size}, "
                f"an expert map of {self.routing.num_ranks}: adopt an exchange and a map of the same epoch"
            )
        self._tokens = list(tokens_per_rank)
        self._own = self._tokens[self.rank_index]
        self._source = np.repeat(np.arange(len(self._tokens)), self._tokens)
        # Borders of the ranks' shares in the flat list of (token, k) pairs.
        self._borders = np.cumsum([0, *self._tokens]) * self.top_k
        self._next = 0

    def forward(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Routed experts of ``layer``: ``hidden [T, H]``, ``ids [T, k]``, ``weights [T, k]`` to ``[T, H]``.

        Raises PeerLost (the step is void), ExpertsBroken (this rank is lost), ValueError (called out of turn or with
        a number of rows other than announced; the step can still be finished).
        """
        self._expect(layer, len(hidden))
        rows = self._exchange(layer, hidden, ids)
        return torch.bmm(weights.to(rows.dtype).unsqueeze(1), rows).squeeze(1)

    def finish(self) -> None:
        """Run the layers of this step that have not run, contributing no rows. Raises PeerLost, ExpertsBroken."""
        hidden = torch.zeros(self._own, self.hidden, dtype=self.dtype, device=self.device)
        ids = torch.full((self._own, self.top_k), EMPTY_SLOT, device=self.device)
        for layer in range(self._next, len(self.layers)):
            self._exchange(layer, hidden, ids)

    def run_elsewhere(self, rows: int) -> None:
        """All layers of this step run at once, outside, with ``rows``; whoever runs them counts in ``chosen``.

        Raises ValueError as ``forward`` does.
        """
        self._expect(0, rows)
        self.computed += len(self.layers) * rows * self.top_k
        self._next = len(self.layers)

    def _expect(self, layer: int, rows: int) -> None:
        if layer != self._next or rows != self._own:
            raise ValueError(
                f"MoE layer {layer} ran with {rows} rows; layer {self._next} with {self._own} was announced"
            )

    def _exchange(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Unweighted results ``[T, k, H]`` of this rank's rows (``[0, k, H]`` where no row has an expert)."""
        table = self.routing.table[layer]
        local = self.routing.local[layer]
        low = self.rank_index * self._num_slots
        if local:
            own_ids = ids.reshape(-1).cpu().numpy()
            everyone, slots = hidden, table[self.rank_index][own_ids]
        else:
            gathered = self.exchange.dispatch(self._pack(hidden, ids), self._tokens)
            everyone = gathered[:, : self.hidden]
            all_ids = gathered[:, self.hidden :].view(_ID_DTYPE[self.dtype.itemsize]).cpu().numpy()
            slots = table[self._source[:, None], all_ids].reshape(-1)
            own_ids = all_ids.reshape(-1)[self._borders[self.rank_index] : self._borders[self.rank_index + 1]]
        try:
            self._count(layer, own_ids)
            # The flat pairs that stand here, in flat order: grouped by home rank as the ranks' rows are.
            mine = np.flatnonzero((slots >= low) & (slots < low + self._num_slots))
            self.computed += len(mine)
            results = self._compute(layer, everyone, mine // self.top_k, slots[mine] - low)
        except Exception as error:
            raise ExpertsBroken(f"rank index {self.rank_index} failed in the experts of MoE layer {layer}") from error
        if local:
            self._next = layer + 1
            return results.view(-1, self.top_k, self.hidden)
        send = np.diff(np.searchsorted(mine, self._borders)).tolist()
        own = slots[self._borders[self.rank_index] : self._borders[self.rank_index + 1]]
        executing = own // self._num_slots
        receive = np.bincount(executing[own >= 0], minlength=self.exchange.size).tolist()
        returned = self.exchange.combine(results, send, receive)
        self._next = layer + 1
        # Pairs come back by executing rank, within it in flat order; undo that.
        order = np.argsort(executing, kind="stable")
        if len(returned) != len(order):  # finishing a failed step: our rows had no experts
            return returned.new_empty(0, self.top_k, self.hidden)
        return returned.index_select(0, self._index(_inverse(order))).view(-1, self.top_k, self.hidden)

    def _count(self, layer: int, ids: np.ndarray) -> None:
        self.chosen[layer] += np.bincount(ids[ids >= 0], minlength=self.num_experts)

    def _pack(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        payload = torch.empty(self._own, self.hidden + self.top_k, dtype=self.dtype, device=self.device)
        payload[:, : self.hidden] = hidden
        payload[:, self.hidden :].view(_ID_DTYPE[self.dtype.itemsize]).copy_(ids)
        return payload

    def _compute(self, layer: int, rows: torch.Tensor, tokens: np.ndarray, slots: np.ndarray) -> torch.Tensor:
        """``[n, H]``: result ``i`` is the expert in ``slots[i]`` applied to ``rows[tokens[i]]``."""
        if not len(slots):
            return rows.new_empty(0, self.hidden)
        order = np.argsort(slots, kind="stable")
        borders = np.searchsorted(slots[order], np.arange(self._num_slots + 1)).tolist()
        groups = [(start, end, slot) for slot, (start, end) in enumerate(itertools.pairwise(borders)) if start < end]
        results = self.layers[layer].compute(rows.index_select(0, self._index(tokens[order])), groups)
        return results.index_select(0, self._index(_inverse(order)))

    def _index(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)


def _inverse(order: np.ndarray) -> np.ndarray:
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return inverse
