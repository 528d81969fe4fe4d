"""What one step reads: tokens, positions, where keys and values go, what each sequence sees.

All of it stands in one device buffer that never moves, so that a captured graph finds each step's values in the same
place; one copy from pinned memory fills what a step reads of it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from actors.engine.batch import Batch, Slice

_FOLLOWERS = 256


@triton.jit
def _follow(ids, follows, drawn, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(follows + row, mask=row < count, other=-1)
    token = tl.load(drawn + number, mask=number >= 0)
    tl.store(ids + row, token.to(tl.int32), mask=number >= 0)


class Chunk(NamedTuple):
    """A sequence with several rows in this step: rows ``first .. first + count - 1``, positions from ``start``."""

    first: int
    count: int  # type: ignore[assignment]  # not the tuple's method
    start: int
    sequence: int


class Padded(NamedTuple):
    """Sizes that a captured step has: of decodes, as many rows as sequences; of any others, more rows."""

    rows: int
    sequences: int


class StepInputs:
    """Room for a step of ``max_rows`` tokens in ``max_sequences`` sequences of ``max_blocks`` KV blocks each.

    Device tensors, int32, of which the first ``rows`` or ``sequences`` count: ``ids``, ``positions``, ``targets`` (flat
    KV slot of a row, -1 where nothing is stored) are ``[max_rows]``; ``lengths`` (tokens a sequence sees, this step's
    included; 0 for padding), ``last`` (the row that samples, or any row) and ``tables [max_sequences, max_blocks]``
    are by sequence; ``starts [max_sequences + 1]`` is each sequence's first row; ``count [1]`` the rows that count and
    ``sequence_count [1]`` the sequences; ``follows [max_sequences]`` is, by row, the number of the token among those
    drawn last that belongs there, or -1. Sequences of one row come first, the decodes: ``decode_lengths`` are their
    lengths, and 0 for others. ``chunks`` are those that follow (a prompt's last token behind another chunk is a chunk
    of one row), in ``chunk_span [2]`` from the first of these numbers to before the second.

    ``decodes`` is how many decodes there may be. In a step padded to more rows than sequences that is all of them, and
    ``chunks`` is None: a graph of it takes any, and what is what only the device knows.
    """

    def __init__(
        self, max_rows: int, max_sequences: int, max_blocks: int, block_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.max_rows, self.max_sequences, self.max_blocks = max_rows, max_sequences, max_blocks
        sizes = [3] + [max_rows] * 3 + [max_sequences] * 4 + [max_sequences + 1, max_sequences * max_blocks]
        borders = np.cumsum([0, *(-(-size // 4) * 4 for size in sizes)])  # 16-byte borders, for wide loads
        self._host = torch.zeros(int(borders[-1]), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros_like(self._host, device=device)

        def views(of: torch.Tensor) -> list[torch.Tensor]:
            return [of[start : start + size] for start, size in zip(borders, sizes, strict=False)]

        counts, self.ids, self.positions, self.targets, *by_sequence, self.starts, flat = views(self._device)
        self.lengths, self.decode_lengths, self.last, self.follows = by_sequence
        self.count, self.chunk_span, self.sequence_count = counts[:1], counts[1:3], counts[2:3]
        self.tables = flat.view(max_sequences, max_blocks)
        host = [view.numpy() for view in views(self._host)]
        self._counts, self._ids, self._positions, self._targets, self._lengths, self._decode_lengths = host[:6]
        self._last, self._follows, self._starts = host[6:9]
        self._tables = host[9].reshape(max_sequences, max_blocks)
        self._first_table = int(borders[-2])
        self._copied: torch.cuda.Event | None = torch.cuda.Event() if device.type == "cuda" else None
        # By sequence: the list of blocks that was put into its table last, and how many of it.
        self._known: list[tuple[list[int], int]] = [([], 0)] * max_sequences
        self.rows = self.sequences = self.decodes = 0
        self.chunks: list[Chunk] | None = []

    def fill(self, batch: Batch, padded: Padded | None = None, drawn: torch.Tensor | None = None) -> None:
        """Describe ``batch``, ``padded`` if that is given: with as many sequences as rows, it is of decodes.

        ``drawn``, int64, on the device: the tokens that slices follow. Returns once the host's side may be written
        again; the copy to the device is in the stream's order.
        """
        if self._copied is not None:
            self._copied.synchronize()  # the last copy has left the pinned buffer
        slices = batch.slices
        decodes = next((i for i, part in enumerate(slices) if len(part.tokens) > 1), len(slices))
        for sequence, part in enumerate(slices):
            self._table(sequence, part)
        starts = np.array([part.start for part in slices[:decodes]], dtype=np.int32)
        self._ids[:decodes] = [part.tokens[0] for part in slices[:decodes]]
        following = [-1 if part.follows is None else part.follows for part in slices[:decodes]]
        self._follows[:decodes] = following
        self._positions[:decodes] = starts
        self._targets[:decodes] = self._slots(np.arange(decodes), starts)
        self._lengths[:decodes] = starts + 1
        self._last[:decodes] = self._starts[:decodes] = np.arange(decodes)
        row, chunks = decodes, []
        for sequence, part in enumerate(slices[decodes:], decodes):
            count, start = len(part.tokens), part.start
            span, positions = slice(row, row + count), np.arange(start, start + count, dtype=np.int32)
            chunks.append(Chunk(row, count, start, sequence))
            self._ids[span], self._positions[span] = part.tokens, positions
            self._targets[span] = self._slots(sequence, positions)
            self._lengths[sequence] = start + count
            self._starts[sequence], self._last[sequence] = row, row + count - 1
            row += count
        sequences = len(slices)
        self._decode_lengths[:decodes] = starts + 1
        self._counts[:] = row, decodes, sequences
        self.rows, self.sequences, self.decodes, self.chunks = row, sequences, decodes, chunks
        if padded is not None:
            self._pad(padded)
        self._decode_lengths[decodes : self.sequences] = 0
        self._starts[sequences : self.sequences + 1] = row
        # Tables stand last. Those of sequences that are not there, nobody reads; padding is as long as 0 tokens.
        used = self._first_table + len(slices) * self.max_blocks
        self._device[:used].copy_(self._host[:used], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        if drawn is not None and max(following, default=-1) >= 0:
            _follow[(triton.cdiv(decodes, _FOLLOWERS),)](self.ids, self.follows, drawn, decodes, BLOCK=_FOLLOWERS)

    def _pad(self, padded: Padded) -> None:
        rows, sequences = slice(self.rows, padded.rows), slice(self.sequences, padded.sequences)
        if padded.rows > padded.sequences:
            self.chunks = None
        elif self.chunks:
            raise ValueError(f"a step with prompts was to be padded as one of {padded.rows} decodes")
        self._ids[rows] = self._positions[rows] = 0
        self._targets[rows] = -1
        self._lengths[sequences] = self._last[sequences] = 0
        self.rows, self.sequences = padded
        self.decodes = padded.sequences

    def _table(self, sequence: int, part: Slice) -> None:
        """Put the blocks of ``part`` into its row. A running request's list only grows, so the old ones stand there."""
        blocks, known = self._known[sequence]
        needed = -(-(part.start + len(part.tokens)) // self.block_size)
        if blocks is not part.blocks:
            known = 0
        if known < needed:
            self._tables[sequence, known:needed] = part.blocks[known:needed]
            self._known[sequence] = part.blocks, needed

    def _slots(self, sequence: int | np.ndarray, positions: np.ndarray) -> np.ndarray:
        size = self.block_size
        slots: np.ndarray = self._tables[sequence, positions // size] * size + positions % size
        return slots
