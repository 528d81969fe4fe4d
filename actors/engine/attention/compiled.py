"""Paged attention on CPUs in float32: keys and values are read where they stand, without gathering them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from actors.engine.attention.base import KVShape
from actors.engine.attention.torch_sdpa import untouched
from actors.engine.batch import Batch
from actors.engine.cpu import kernels, threads
from actors.engine.cpu.attend import SLACK, Plan, attention, tokens_at_once


class CompiledPagedAttention:
    """See ``PagedAttention``.

    Pools are ``[kv_heads, num_blocks, key_width, block_size]`` of keys, ``[kv_heads, num_blocks, block_size,
    value_width]`` of values, per layer.
    """

    def __init__(self, shapes: Sequence[KVShape], num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.keys = [_pool(shape.heads, num_blocks, shape.key_width, block_size) for shape in shapes]
        self.values = [_pool(shape.heads, num_blocks, block_size, shape.value_width) for shape in shapes]

        self._plans: dict[int, Plan] = {}

    def begin(self, step: Batch) -> None:
        size = self.block_size
        targets: list[int] = []
        table: list[int] = []
        self._spans: list[tuple[int, int, int, int]] = []
        row = 0
        for part in step.slices:
            targets += [part.blocks[p // size] * size + p % size for p in range(part.start, part.end)]
            self._spans.append((row, len(part.tokens), part.start, len(table)))
            table += part.blocks[: (part.end + size - 1) // size]
            row += len(part.tokens)
        self._targets, self._table = torch.tensor(targets), torch.tensor(table)
        self._longest = max((part.end for part in step.slices), default=0)
        for at_once, plan in self._plans.items():
            self._set(plan, at_once)

    def plan(self, heads: int, layer: int) -> Plan:
        """The present step's, of a layer with so many query heads; every ``begin`` sets it anew."""
        at_once = tokens_at_once(heads, len(self.keys[layer]))
        if at_once not in self._plans:
            self._plans[at_once] = Plan()
            self._set(self._plans[at_once], at_once)
        return self._plans[at_once]

    def _set(self, plan: Plan, at_once: int) -> None:
        pieces = [
            (row + i, min(at_once, count - i), start + i, offset)
            for row, count, start, offset in self._spans
            for i in range(0, count, at_once)
        ]
        plan.set(self._table, torch.tensor(pieces), self._targets, self._longest)

    def forward(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        pools = self.keys[layer], self.values[layer]
        queries, new_keys, new_values = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
        kernels.store(*pools, new_keys, new_values, self._targets)
        logits = None if sinks is None else sinks.float().contiguous()
        tokens, heads, _ = queries.shape
        plan, out = self.plan(heads, layer), query.new_empty(1, tokens, heads, value.shape[3])
        work, arguments = attention(
            queries.data_ptr(), pools, plan, out.data_ptr(), tokens, heads, scaling, window or 0, logits
        )
        threads.run(work, plan.count * len(pools[0]), arguments)
        return out


def _pool(*shape: int) -> torch.Tensor:
    size = math.prod(shape)
    return untouched((size + SLACK,), torch.float32)[:size].view(*shape)
