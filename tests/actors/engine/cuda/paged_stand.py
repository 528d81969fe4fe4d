"""Sequences with keys and values, steps of a ``TritonPagedAttention`` over them, and what these should give."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from actors.engine.attention.base import KVShape
from actors.engine.attention.triton_paged import TritonPagedAttention
from actors.engine.batch import Batch, Slice
from actors.engine.cuda.inputs import Padded, StepInputs
from actors.wire import SamplingParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALE = 0.3
# Relative error of a result, by rounding of its inputs and of the probabilities.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass
class Made:
    """A sequence: keys and values ``[heads, tokens, width]``, and its blocks."""

    keys: torch.Tensor
    values: torch.Tensor
    blocks: list[int]


class Stand:
    """Sequences of these lengths, an attention whose pools are NaN, and steps over them."""

    def __init__(
        self, shape: KVShape, heads: int, lengths: Sequence[int], dtype: torch.dtype, block_size: int = 4, seed: int = 0
    ) -> None:
        torch.manual_seed(seed)
        free = list(range(sum(-(-length // block_size) for length in lengths) + 1))
        random.Random(seed).shuffle(free)
        self.heads, self.dtype = heads, dtype
        self.attention = TritonPagedAttention([shape], len(free), block_size, dtype, DEVICE)
        for pool in (*self.attention.keys, *self.attention.values):
            pool.fill_(torch.nan)
        self.made = [
            Made(
                torch.randn(shape.heads, length, shape.key_width).to(DEVICE, dtype),
                torch.randn(shape.heads, length, shape.value_width).to(DEVICE, dtype),
                [free.pop() for _ in range(-(-length // block_size))],
            )
            for length in lengths
        ]
        self.width = shape.key_width
        rows = sum(lengths) + 8
        self.inputs = StepInputs(rows, len(lengths) + 8, max(len(m.blocks) for m in self.made), block_size, DEVICE)

    def query(self, rows: int) -> torch.Tensor:
        return torch.randn(self.heads, rows, self.width).to(DEVICE, self.dtype)

    def step(
        self,
        spans: dict[int, tuple[int, int]],
        query: torch.Tensor,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
        padded: Padded | None = None,
    ) -> torch.Tensor:
        """Sequence ``i`` computes positions ``spans[i]``; ``[T, heads, value_width]``, rows of padding included."""
        parts = [
            Slice(str(i), [0] * (b - a), a, self.made[i].blocks, True, [], [], SamplingParams(max_tokens=1))
            for i, (a, b) in spans.items()
        ]
        self.inputs.fill(Batch(tuple(parts)), padded)
        self.attention.begin(self.inputs)
        keys, values = (
            torch.cat([getattr(self.made[i], name)[:, a:b] for i, (a, b) in spans.items()], 1)
            for name in ("keys", "values")
        )
        if padded is not None:
            room = (0, 0, 0, padded.rows - query.shape[1])
            query, keys, values = (
                torch.nn.functional.pad(part, room, value=torch.nan) for part in (query, keys, values)
            )
        return self.attention.forward(0, query[None], keys[None], values[None], SCALE, window, sinks)[0]

    def expected(
        self,
        spans: dict[int, tuple[int, int]],
        query: torch.Tensor,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows: list[torch.Tensor] = []
        for i, (start, end) in spans.items():
            made = self.made[i]
            shared = self.heads // len(made.keys)
            for position in range(start, end):
                first = 0 if window is None else max(0, position - window + 1)
                seen = slice(first, position + 1)
                keys, values = (
                    part[:, seen].double().repeat_interleave(shared, 0) for part in (made.keys, made.values)
                )
                scores = (keys @ query[:, len(rows), :, None].double())[..., 0] * SCALE
                if sinks is not None:
                    scores = torch.cat([scores, sinks[:, None].double()], 1)
                weights = torch.softmax(scores, -1)[:, : keys.shape[1]]
                rows.append((weights[:, None] @ values)[:, 0])
        return torch.stack(rows)

    def check(self, output: torch.Tensor, expected: torch.Tensor) -> None:
        assert output.dtype == self.dtype and output.shape == expected.shape
        error = (output.double() - expected).norm() / expected.norm()
        assert error < TOLERANCE[self.dtype]  # NaN is not
