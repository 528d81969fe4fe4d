"""What a paged attention offers the model runner, one implementation per kind of device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch


class KVShape(NamedTuple):
    """What one attention layer caches per token: keys ``[heads, key_width]``, values ``[heads, value_width]``."""

    heads: int
    key_width: int
    value_width: int

    @property
    def elements(self) -> int:
        return self.heads * (self.key_width + self.value_width)


class PagedAttention(Protocol):
    """Attention of all layers over one pool of KV blocks per layer."""

    def begin(self, step: Any) -> None:
        """Build what all layers of this step share: where to write, what each sequence sees.

        ``step`` is the batch, on GPUs the ``StepInputs`` that describe it.
        """

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
        """Write this step's keys and values, then attend causally within each sequence.

        ``query [1, heads, T, key_width]``, ``key [1, kv_heads, T, key_width]``, ``value [1, kv_heads, T, value_width]``
        with T the batch's tokens in packed order; gives ``[1, T, heads, value_width]``. ``window``: a token sees
        itself and the ``window - 1`` before it. ``sinks [heads]``: one more logit per head's softmax, without a value.
        """


def bytes_per_block(shapes: Sequence[KVShape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one KV block over all layers."""
    return sum(shape.elements for shape in shapes) * block_size * dtype.itemsize
