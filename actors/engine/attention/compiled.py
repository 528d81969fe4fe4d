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


@dataclass
class _Table:
    """All decodes of a step. ``blocks [B, n]``, of which a row uses as many as its length needs."""

    rows: torch.Tensor | slice
    blocks: np.ndarray
    lengths: np.ndarray


class CompiledPagedAttention(TorchPagedAttention):
    """See ``PagedAttention``. Slices of several tokens run as in the base class.

    One thread does it, whatever torch uses: it waits for memory, and a second one was no faster.
    """

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
        return [_Table(self._rows(rows), blocks, np.array([decode.length for decode in decodes]))]

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
        keys, values = self._pools[layer]
        queries = query.transpose(0, 1).contiguous()
        out = torch.empty(*queries.shape[:2], values.shape[3])
        logits = kernels.NONE if sinks is None else sinks.float().contiguous().numpy()
        kernels.attend(
            queries.numpy(), keys, values, group.blocks, group.lengths, scaling, window or 0, logits, out.numpy()
        )
        return out
