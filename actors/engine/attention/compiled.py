"""Paged attention on CPUs in float32: decodes read keys and values where they stand, without gathering them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from actors.engine.attention.base import KVShape
from actors.engine.attention.torch_sdpa import Decode, TorchPagedAttention
from actors.engine.cpu import kernels
from actors.engine.cpu.attend import attend


@dataclass
class _Table:
    """All decodes of a step. ``blocks [B, n]``, of which a row uses as many as its length needs."""

    rows: torch.Tensor | slice
    blocks: torch.Tensor
    lengths: torch.Tensor


class CompiledPagedAttention(TorchPagedAttention):
    """See ``PagedAttention``. Slices of several tokens run as in the base class."""

    def __init__(self, shapes: Sequence[KVShape], num_blocks: int, block_size: int) -> None:
        super().__init__(shapes, num_blocks, block_size, torch.float32, torch.device("cpu"))
        self._pools = [(k.numpy(), v.numpy()) for k, v in zip(self.keys, self.values, strict=True)]

    def _plan(self, decodes: list[Decode]) -> list[Any]:
        if not decodes:
            return []
        blocks = np.zeros((len(decodes), max(len(decode.blocks) for decode in decodes)), np.int64)
        for row, decode in zip(blocks, decodes, strict=True):
            row[: len(decode.blocks)] = decode.blocks
        rows = [decode.row for decode in decodes]
        lengths = self._index([decode.length for decode in decodes])
        return [_Table(self._rows(rows), torch.from_numpy(blocks), lengths)]

    def _store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        targets = self._targets.numpy()
        for pool, new in zip(self._pools[layer], (key, value), strict=True):
            heads, _, _, width = pool.shape
            kernels.store(pool.reshape(heads, -1, width), new[0].transpose(0, 1).contiguous().numpy(), targets)

    def _decode(
        self,
        layer: int,
        group: _Table,
        query: torch.Tensor,
        scaling: float,
        window: int | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        keys, values = self.keys[layer], self.values[layer]
        queries = query.transpose(0, 1).contiguous()
        logits = None if sinks is None else sinks.float().contiguous()
        return attend(queries, keys, values, group.blocks, group.lengths, scaling, window or 0, logits)
