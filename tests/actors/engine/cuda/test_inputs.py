"""What a step reads on the device, over many steps of changing batches, against a buffer that is filled once."""

from __future__ import annotations

import random

import pytest
import torch

from actors.engine.batch import Batch, Slice
from actors.engine.cuda.inputs import Padded, StepInputs
from actors.wire import SamplingParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEQUENCES, BLOCKS, SIZE = 6, 10, 4


def part(blocks: list[int], start: int, count: int) -> Slice:
    return Slice("r", list(range(count)), start, blocks, True, [], [], SamplingParams(max_tokens=1))


@pytest.mark.parametrize("seed", range(5))
def test_steps_of_few_and_of_many_sequences_in_turn(seed: int) -> None:
    """Requests come, grow, change places, go and return with other blocks; some steps are padded."""
    draw = random.Random(seed)
    inputs = StepInputs(64, SEQUENCES, BLOCKS, SIZE, DEVICE)
    running: list[tuple[list[int], int]] = []
    for _ in range(60):
        running = [(blocks, length) for blocks, length in running if draw.random() < 0.9 and length < BLOCKS * SIZE - 8]
        draw.shuffle(running)
        while len(running) < SEQUENCES and draw.random() < 0.5:
            running.append(([], 0))
        chosen = running[: draw.randint(0, len(running))]
        decodes = draw.random() < 0.5
        parts = []
        for i, (blocks, length) in enumerate(chosen):
            count = 1 if decodes else draw.randint(1, 7)
            blocks.extend(draw.randrange(1000) for _ in range(-(-(length + count) // SIZE) - len(blocks)))
            parts.append(part(blocks, length, count))
            running[i] = blocks, length + count
        batch = Batch(tuple(sorted(parts, key=lambda piece: len(piece.tokens) > 1)))
        sequences = draw.randint(len(parts), SEQUENCES)
        padded = Padded(sequences if decodes else draw.randint(max(sequences + 1, batch.num_tokens), 64), sequences)
        padded = padded if decodes or draw.random() < 0.5 else None
        inputs.fill(batch, padded)
        fresh = StepInputs(64, SEQUENCES, BLOCKS, SIZE, DEVICE)
        fresh.fill(batch, padded)
        assert (inputs.rows, inputs.sequences, inputs.chunks) == (fresh.rows, fresh.sequences, fresh.chunks)
        for name, count in (("ids", inputs.rows), ("positions", inputs.rows), ("targets", inputs.rows)):
            assert torch.equal(getattr(inputs, name)[:count], getattr(fresh, name)[:count]), name
        assert inputs.count.tolist() == [batch.num_tokens]
        singles = [piece.end if len(piece.tokens) == 1 else 0 for piece in batch.slices]
        assert inputs.decode_lengths[: len(parts)].tolist() == singles
        assert inputs.chunk_span.tolist() == [sum(map(bool, singles)), inputs.sequence_count.item()]
        assert inputs.sequence_count.tolist() == [len(parts)]
        for name, count in ((name, inputs.sequences) for name in ("lengths", "decode_lengths", "last")):
            assert torch.equal(getattr(inputs, name)[:count], getattr(fresh, name)[:count]), name
        assert torch.equal(inputs.starts[: inputs.sequences + 1], fresh.starts[: inputs.sequences + 1])
        for sequence, piece in enumerate(batch.slices):
            needed = -(-piece.end // SIZE)
            assert inputs.tables[sequence, :needed].tolist() == piece.blocks[:needed]
