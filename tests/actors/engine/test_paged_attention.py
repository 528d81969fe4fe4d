"""Paged attention against a plain softmax over each sequence's own keys and values."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from actors.engine.attention.base import KVShape, bytes_per_block
from actors.engine.attention.compiled import CompiledPagedAttention
from actors.engine.attention.torch_sdpa import TorchPagedAttention
from actors.engine.batch import Batch, Slice
from actors.wire import SamplingParams

Kind = TorchPagedAttention | CompiledPagedAttention

BLOCK = 4
BLOCKS = 700
SCALE = 0.3
CPU = torch.device("cpu")


@dataclass
class Sequence:
    """Keys and values of a whole sequence, ``[heads, tokens, width]``, and its blocks."""

    keys: torch.Tensor
    values: torch.Tensor
    blocks: list[int]


def make(kind: type[Kind], shape: KVShape) -> Kind:
    if kind is CompiledPagedAttention:
        return CompiledPagedAttention([shape], BLOCKS, BLOCK)
    return TorchPagedAttention([shape], BLOCKS, BLOCK, torch.float32, CPU)


both_kinds = pytest.mark.parametrize("kind", [TorchPagedAttention, CompiledPagedAttention])


def sequences(shape: KVShape, lengths: list[int], seed: int = 0) -> list[Sequence]:
    free = list(range(BLOCKS))
    random.Random(seed).shuffle(free)
    torch.manual_seed(seed)
    return [
        Sequence(
            torch.randn(shape.heads, length, shape.key_width),
            torch.randn(shape.heads, length, shape.value_width),
            [free.pop() for _ in range(-(-length // BLOCK))],
        )
        for length in lengths
    ]


def step(
    attention: Kind,
    made: list[Sequence],
    spans: list[tuple[int, int]],
    query: torch.Tensor,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One step in which sequence ``i`` computes positions ``spans[i]``; ``[T, heads, value_width]``."""
    parts = [
        Slice(str(i), [0] * (end - start), start, sequence.blocks, True, [], [], SamplingParams(max_tokens=1))
        for i, (sequence, (start, end)) in enumerate(zip(made, spans, strict=True))
    ]
    attention.begin(Batch(tuple(parts)))
    keys = torch.cat([sequence.keys[:, a:b] for sequence, (a, b) in zip(made, spans, strict=True)], dim=1)
    values = torch.cat([sequence.values[:, a:b] for sequence, (a, b) in zip(made, spans, strict=True)], dim=1)
    return attention.forward(0, query[None], keys[None], values[None], SCALE, window, sinks)[0]


def by_hand(
    made: list[Sequence],
    spans: list[tuple[int, int]],
    query: torch.Tensor,
    window: int | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    rows = []
    heads, row = query.shape[0], 0
    for sequence, (start, end) in zip(made, spans, strict=True):
        shared = heads // len(sequence.keys)
        for position in range(start, end):
            first = 0 if window is None else max(0, position - window + 1)
            keys = sequence.keys[:, first : position + 1].repeat_interleave(shared, 0)
            values = sequence.values[:, first : position + 1].repeat_interleave(shared, 0)
            scores = (keys @ query[:, row, :, None])[..., 0] * SCALE
            if sinks is not None:
                scores = torch.cat([scores, sinks[:, None]], 1)
            weights = torch.softmax(scores, -1)[:, : keys.shape[1]]
            rows.append((weights[:, None] @ values)[:, 0])
            row += 1
    return torch.stack(rows)


@both_kinds
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 6, 1000])
@pytest.mark.parametrize(
    ("shape", "heads"), [(KVShape(2, 8, 8), 6), (KVShape(4, 12, 5), 4), (KVShape(1, 8, 8), 3)], ids=str
)
def test_chunks_and_decodes_see_what_they_should(
    shape: KVShape, heads: int, window: int | None, sinks: bool, kind: type[Kind]
) -> None:
    """Every sequence is prefilled in chunks of any size (whole, cut inside a block, of one token), then decoded, in
    batches whose sequences differ a lot in length."""
    lengths = [1, 3, 4, 17, 40, 41, 130]
    made = sequences(shape, lengths)
    attention = make(kind, shape)
    logits = torch.randn(heads) if sinks else None
    draw = random.Random(1)
    done = [0] * len(made)
    steps = 0
    while any(have < length for have, length in zip(done, lengths, strict=True)):
        spans = {}
        for i, length in enumerate(lengths):
            if done[i] < length:
                size = 1 if done[i] > length // 2 else draw.choice([1, 2, 5, 16, length])
                spans[i] = (done[i], min(done[i] + size, length))
        order = list(spans)  # slices of one token between longer ones, as a scheduler may give them
        random.Random(steps).shuffle(order)
        batch, cuts = [made[i] for i in order], [spans[i] for i in order]
        query = torch.randn(heads, sum(b - a for a, b in cuts), shape.key_width)
        output = step(attention, batch, cuts, query, window, logits)
        torch.testing.assert_close(output, by_hand(batch, cuts, query, window, logits), rtol=1e-4, atol=1e-5)
        for i in order:
            done[i] = spans[i][1]
        steps += 1
    assert steps > 20


@both_kinds
def test_many_decodes_at_once(kind: type[Kind]) -> None:
    shape = KVShape(2, 8, 8)
    lengths = [60 + i % 7 for i in range(39)] + [9]
    made = sequences(shape, lengths)
    attention = make(kind, shape)
    for sequence, length in zip(made, lengths, strict=True):
        step(attention, [sequence], [(0, length - 1)], torch.randn(4, length - 1, 8))
    query = torch.randn(4, len(made), 8)
    spans = [(length - 1, length) for length in lengths]
    output = step(attention, made, spans, query)
    torch.testing.assert_close(output, by_hand(made, spans, query, None, None), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", [1, 4, 6])
@both_kinds
def test_nan_left_in_a_block_by_its_last_owner_does_not_reach_the_next(kind: type[Kind], first: int) -> None:
    shape = KVShape(2, 8, 8)
    (made,) = sequences(shape, [10])
    attention = make(kind, shape)
    poisoned = Sequence(torch.full((2, 12, 8), torch.nan), torch.full((2, 12, 8), torch.nan), made.blocks)
    step(attention, [poisoned], [(0, 12)], torch.randn(4, 12, 8))
    for start, end in [(0, first)] + [(position, position + 1) for position in range(first, 10)]:
        query = torch.randn(4, end - start, 8)
        output = step(attention, [made], [(start, end)], query)
        torch.testing.assert_close(output, by_hand([made], [(start, end)], query, None, None), rtol=1e-4, atol=1e-5)


@both_kinds
@pytest.mark.parametrize("bad", ["key", "value", "query"])
def test_nan_shows_in_its_own_sequence_and_no_other(kind: type[Kind], bad: str) -> None:
    shape = KVShape(2, 8, 8)
    made = sequences(shape, [10, 10])
    attention = make(kind, shape)
    if bad != "query":
        (made[0].keys if bad == "key" else made[0].values)[:, 3] = torch.nan
    step(attention, made, [(0, 9), (0, 9)], torch.randn(4, 18, 8))
    query = torch.randn(4, 2, 8)
    if bad == "query":
        query[:, 0] = torch.nan
    output = step(attention, made, [(9, 10), (9, 10)], query)
    assert output[0].isnan().all() and output[1].isfinite().all()


def test_a_block_counts_all_layers_keys_and_values() -> None:
    shapes = [KVShape(2, 8, 4), KVShape(1, 6, 6)]
    assert bytes_per_block(shapes, 16, torch.bfloat16) == 16 * 2 * (2 * 12 + 12)
