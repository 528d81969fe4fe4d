"""Paged attention with torch's own operators: any device, any dtype.

Decodes (slices of one token) run together: their blocks are gathered into padded keys and values, and two batched
products serve all of them, the query heads of one KV head forming one small matrix. Other slices run one by one
through scaled-dot-product attention. Indices and masks are built once per step, not per layer.

Padding is masked, but a mask multiplies by zero, and zero times NaN is NaN: so a block is cleared when its first
token is written and its last is not, lest a request that produced NaN live on in whoever gets its blocks.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import scaled_dot_product_attention

from actors.engine.attention.base import KVShape
from actors.engine.batch import Batch

# Padded tokens of one group of decodes: this bounds the buffers, and a CPU reads them back from its caches.
GROUP_TOKENS = 2048


@dataclass
class Decode:
    """A slice of one token: its row in the packed batch, its sequence's blocks and length with it."""

    row: int
    blocks: list[int]
    length: int


@dataclass
class _Decodes:
    """Decodes of similar length. ``blocks [B * n]`` is padded by each sequence's own first block."""

    rows: torch.Tensor | slice  # of the packed batch
    blocks: torch.Tensor
    lengths: torch.Tensor
    width: int  # padded tokens per sequence
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)
    gathers: dict[int, torch.Tensor] = field(default_factory=dict)  # by KV heads


@dataclass
class _Chunk:
    """One sequence's slice of several tokens: rows ``first .. first + count - 1``, positions from ``start``."""

    first: int
    count: int
    start: int
    blocks: torch.Tensor
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)


def untouched(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in memory that the system gives a page at a time, when each is first written.

    Small pages: the first block of a pool shall not have to wait for megabytes. What reads blocks gains a tenth from
    large ones at most.
    """
    room = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    room.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(room, dtype=dtype).view(*shape)


class TorchPagedAttention:
    """See ``PagedAttention``; for any device and dtype.

    KV pools are ``[kv_heads, num_blocks, block_size, width]`` per layer.
    """

    def __init__(
        self, shapes: Sequence[KVShape], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.device = device

        def pool(heads: int, width: int) -> torch.Tensor:
            shape = heads, num_blocks, block_size, width
            return untouched(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)

        self.keys = [pool(shape.heads, shape.key_width) for shape in shapes]
        self.values = [pool(shape.heads, shape.value_width) for shape in shapes]
        # Reused by all layers: fresh memory of this size would cost a page fault every 4 KiB.
        self._buffers = [torch.empty(0, dtype=dtype, device=device) for _ in range(2)]

    def begin(self, step: Batch) -> None:
        size = self.block_size
        targets: list[int] = []
        begun: list[int] = []
        decodes: list[Decode] = []
        self._chunks: list[_Chunk] = []
        row = 0
        for part in step.slices:
            start, end = part.start, part.start + len(part.tokens)
            targets += [part.blocks[p // size] * size + p % size for p in range(start, end)]
            needed = part.blocks[: (end + size - 1) // size]
            if end % size and start <= end // size * size:
                begun.append(needed[-1])
            if end - start == 1:
                decodes.append(Decode(row, needed, end))
            else:
                self._chunks.append(_Chunk(row, end - start, start, self._index(needed)))
            row += end - start
        self._targets = self._index(targets)
        self._begun = self._index(begun) if begun else None
        self._tokens = row
        self._groups = [self._group(group) for group in _by_length(decodes, size)]

    def _index(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def _rows(self, rows: list[int]) -> torch.Tensor | slice:
        """An index of these rows. A prompt's last token may stand alone behind chunks, so they may have gaps."""
        contiguous = rows == list(range(rows[0], rows[0] + len(rows)))
        return slice(rows[0], rows[0] + len(rows)) if contiguous else self._index(rows)

    def _group(self, group: list[Decode]) -> _Decodes:
        width = max(len(decode.blocks) for decode in group)
        table = [block for d in group for block in d.blocks + d.blocks[:1] * (width - len(d.blocks))]
        return _Decodes(
            rows=self._rows([decode.row for decode in group]),
            blocks=self._index(table),
            lengths=self._index([decode.length for decode in group]),
            width=width * self.block_size,
        )

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
        self._store(layer, key, value)
        if len(self._groups) == 1 and not self._chunks:
            return self._decode(layer, self._groups[0], query[0], scaling, window, sinks)[None]
        keys, values = self.keys[layer], self.values[layer]
        out = query.new_empty(self._tokens, query.shape[1], value.shape[3])
        for group in self._groups:
            out[group.rows] = self._decode(layer, group, query[0, :, group.rows], scaling, window, sinks)
        for chunk in self._chunks:
            span = slice(chunk.first, chunk.first + chunk.count)
            own = (key[:, :, span], value[:, :, span]) if chunk.start == 0 else None
            result = self._prefill(chunk, query[:, :, span], keys, values, own, scaling, window, sinks)
            out[span] = result[0].transpose(0, 1)
        return out[None]

    def _store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        keys, values = self.keys[layer], self.values[layer]
        if self._begun is not None:
            keys.index_fill_(1, self._begun, 0)
            values.index_fill_(1, self._begun, 0)
        keys.flatten(1, 2).index_copy_(1, self._targets, key[0])
        values.flatten(1, 2).index_copy_(1, self._targets, value[0])

    def _decode(
        self,
        layer: int,
        group: _Decodes,
        query: torch.Tensor,
        scaling: float,
        window: int | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """``query [heads, B, key_width]`` to ``[B, heads, value_width]``."""
        keys, values = self.keys[layer], self.values[layer]
        heads, count, _ = query.shape
        kv_heads = keys.shape[0]
        shared = heads // kv_heads
        seen_keys = self._gather(group, keys, 0)  # [kv_heads * B, width, key_width]
        seen_values = self._gather(group, values, 1)
        mask = group.masks.get(window)
        if mask is None:
            position = torch.arange(group.width, device=self.device)
            visible = position < group.lengths[:, None]
            if window is not None:
                visible &= position >= group.lengths[:, None] - window
            mask = group.masks[window] = _additive(visible, self.dtype)[:, None].repeat(kv_heads, 1, 1)
        packed = query.view(kv_heads, shared, count, -1).transpose(1, 2).reshape(kv_heads * count, shared, -1)
        scores = torch.baddbmm(mask, packed, seen_keys.transpose(1, 2), alpha=scaling)
        if sinks is not None:
            sinks = sinks.view(kv_heads, 1, shared, 1).expand(-1, count, -1, -1).reshape(-1, shared, 1)
        out = torch.bmm(_softmax(scores, sinks), seen_values)
        return out.view(kv_heads, count, shared, -1).transpose(0, 1).reshape(count, heads, -1)

    def _gather(self, group: _Decodes, pool: torch.Tensor, buffer: int) -> torch.Tensor:
        heads, width = pool.shape[0], pool.shape[3]
        index = group.gathers.get(heads)
        if index is None:
            first = torch.arange(heads, device=self.device)[:, None] * self.num_blocks
            index = group.gathers[heads] = (first + group.blocks).view(-1)
        flat = pool.view(heads * self.num_blocks, -1)
        if self._buffers[buffer].numel() < len(index) * flat.shape[1]:
            self._buffers[buffer] = flat.new_empty(len(index) * flat.shape[1])
        gathered = self._buffers[buffer][: len(index) * flat.shape[1]].view(len(index), -1)
        torch.index_select(flat, 0, index, out=gathered)
        return gathered.view(heads * len(group.lengths), group.width, width)

    def _prefill(
        self,
        chunk: _Chunk,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        own: tuple[torch.Tensor, torch.Tensor] | None,
        scaling: float,
        window: int | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """``[1, heads, count, value_width]``. ``own``: this step's keys and values, when they are all there is."""
        context = chunk.start + chunk.count
        if own is not None:
            seen_keys, seen_values = own
        else:
            seen_keys = keys.index_select(1, chunk.blocks).flatten(1, 2)[None, :, :context]
            seen_values = values.index_select(1, chunk.blocks).flatten(1, 2)[None, :, :context]
        shared = query.shape[1] // seen_keys.shape[1]
        windowed = window is not None and context > window
        if own is not None and not windowed and sinks is None:
            return scaled_dot_product_attention(
                query, seen_keys, seen_values, is_causal=True, scale=scaling, enable_gqa=shared > 1
            )
        mask = chunk.masks.get(window)
        if mask is None:
            position = torch.arange(context, device=self.device)
            own_position = position[chunk.start :, None]
            visible = position <= own_position
            if window is not None:
                visible &= position > own_position - window
            mask = chunk.masks[window] = _additive(visible, self.dtype)
        if sinks is None:
            return scaled_dot_product_attention(
                query, seen_keys, seen_values, attn_mask=mask, scale=scaling, enable_gqa=shared > 1
            )
        seen_keys, seen_values = (seen.repeat_interleave(shared, dim=1) for seen in (seen_keys, seen_values))
        scores = torch.matmul(query, seen_keys.transpose(2, 3)) * scaling + mask
        return torch.matmul(_softmax(scores, sinks.view(1, -1, 1, 1).expand(-1, -1, chunk.count, -1)), seen_values)


def _by_length(decodes: list[Decode], block_size: int) -> list[list[Decode]]:
    """Groups in which padding at most doubles a sequence, of at most ``GROUP_TOKENS`` tokens with padding."""
    groups: list[list[Decode]] = []
    if decodes and max(len(d.blocks) for d in decodes) > 2 * min(len(d.blocks) for d in decodes):
        decodes = sorted(decodes, key=lambda decode: len(decode.blocks))
    shortest = longest = 0
    for decode in decodes:
        blocks = len(decode.blocks)
        shortest, longest = min(shortest, blocks), max(longest, blocks)
        if groups and longest <= 2 * shortest and (len(groups[-1]) + 1) * longest * block_size <= GROUP_TOKENS:
            groups[-1].append(decode)
        else:
            groups.append([decode])
            shortest = longest = blocks
    return groups


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Over the last axis, in float32. ``sinks [..., 1]``: a logit that takes probability and gives nothing."""
    if sinks is None:
        return torch.softmax(scores, -1, dtype=torch.float32).to(scores.dtype)
    scores = torch.cat([scores, sinks.to(scores.dtype)], -1)
    return torch.softmax(scores, -1, dtype=torch.float32)[..., :-1].to(scores.dtype)


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
