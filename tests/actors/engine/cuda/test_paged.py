"""The kernels of paged attention against a plain softmax in float64 over each sequence's own keys and values.

Pools are full of NaN where nothing was written, and so are outputs.
"""

from __future__ import annotations

import pytest
import torch
from paged_stand import DEVICE, SCALE, Stand
from torch.nn.attention import SDPBackend

from actors.engine.attention import triton_paged
from actors.engine.attention.base import KVShape
from actors.engine.attention.triton_paged import TritonPagedAttention
from actors.engine.batch import Batch
from actors.engine.cuda import attend_decode, attend_prefill, flash
from actors.engine.cuda.attend_tile import Tiles
from actors.engine.cuda.inputs import Padded


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    new_empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *size: int, **settings: object) -> torch.Tensor:
        made = new_empty(self, *size, **settings)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.mark.parametrize(
    ("shape", "heads", "window", "sinks", "dtype"),
    [
        (KVShape(2, 8, 8), 6, None, False, torch.float32),
        (KVShape(2, 8, 8), 6, 7, True, torch.float32),
        (KVShape(3, 24, 16), 3, None, True, torch.bfloat16),
        (KVShape(3, 24, 16), 3, 1, False, torch.float32),
        (KVShape(1, 16, 40), 20, None, False, torch.float16),
        (KVShape(1, 16, 40), 20, 7, False, torch.bfloat16),
        (KVShape(2, 16, 16), 2, 1000, True, torch.bfloat16),
    ],
    ids=str,
)
def test_chunks_decodes_and_both(
    shape: KVShape, heads: int, window: int | None, sinks: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first chunk of each sequence, then the others, then one token each: whole prompts, cuts in a block, mixed."""
    small = Tiles(16, 16, 4, 1)  # so that there are several
    monkeypatch.setattr(attend_prefill, "prefill_tiles", lambda *_: small)
    lengths = [1, 3, 19, 33, 42]
    stand = Stand(shape, heads, lengths, dtype)
    logits = torch.randn(heads, dtype=dtype, device=DEVICE) if sinks else None
    for spans in (
        {0: (0, 1), 1: (0, 2), 2: (0, 18), 3: (0, 5), 4: (0, 40)},
        {1: (2, 3), 4: (40, 41), 3: (5, 32)},
        {2: (18, 19), 3: (32, 33), 4: (41, 42)},
    ):
        query = stand.query(sum(b - a for a, b in spans.values()))
        stand.check(stand.step(spans, query, window, logits), stand.expected(spans, query, window, logits))


@pytest.mark.parametrize(
    ("splits", "window", "dtype"),
    [
        (1, None, torch.bfloat16),
        (2, 20, torch.float16),
        (3, None, torch.float32),
        (3, 33, torch.bfloat16),
        (32, 1, torch.bfloat16),
    ],
    ids=str,
)
def test_split_decodes_with_padding(
    splits: int, window: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs without work, sequences shorter than a tile, padding: zeros for these, and each split counted once."""
    monkeypatch.setattr(attend_decode, "decode_tiles", lambda *_: Tiles(16, 16, 4, 1))
    monkeypatch.setattr(TritonPagedAttention, "_splits", lambda *_: splits)
    lengths = [50, 1, 17, 33]
    stand = Stand(KVShape(2, 16, 8), 8, lengths, dtype)
    first = {i: (0, length - 1) for i, length in enumerate(lengths) if length > 2}
    stand.step(first, stand.query(sum(end for _, end in first.values())))
    sinks = torch.randn(8, device=DEVICE)
    spans = {i: (length - 1, length) for i, length in enumerate(lengths)}
    for _ in range(2):  # the arrivals of the first are not counted in the second
        query = stand.query(len(spans))
        output = stand.step(spans, query, window, sinks, padded=Padded(6, 6))
        stand.check(output[:4], stand.expected(spans, query, window, sinks))
        assert (output[4:] == 0).all()


@pytest.mark.parametrize("window", [None, 7])
def test_steps_padded_to_any_number_of_decodes_and_chunks(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them, or both; up to as many rows and sequences as there is room for."""
    monkeypatch.setattr(attend_prefill, "prefill_tiles", lambda *_: Tiles(16, 16, 4, 1))
    stand = Stand(KVShape(2, 16, 8), 6, [19, 33, 42, 2, 3], torch.bfloat16)
    for spans, padded in (
        ({0: (0, 17), 1: (0, 5), 2: (0, 41), 3: (0, 1), 4: (0, 1)}, Padded(70, 6)),
        ({0: (17, 18), 3: (1, 2), 1: (5, 30)}, Padded(40, 5)),
        ({0: (18, 19), 1: (30, 31), 2: (41, 42), 4: (1, 2)}, Padded(5, 4)),
        ({4: (2, 3), 1: (31, 33)}, Padded(3, 2)),
    ):
        rows = sum(end - start for start, end in spans.values())
        query = stand.query(rows)
        output = stand.step(spans, query, window, padded=padded)
        assert len(output) == padded.rows
        stand.check(output[:rows], stand.expected(spans, query, window))


def test_long_prompts_by_torch_beside_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded to a step or not, with NaN in the rest of their last block."""
    monkeypatch.setattr(flash, "load", lambda *_: None)
    monkeypatch.setattr(triton_paged, "DENSE_ROWS", 15)
    monkeypatch.setattr(triton_paged, "DENSE_STEP", 8)
    monkeypatch.setattr(TritonPagedAttention, "_plain", lambda *_: True)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(triton_paged, "DENSE_BACKENDS", [SDPBackend.MATH])
    stand = Stand(KVShape(2, 16, 16), 6, [16, 17, 5, 18, 1], torch.bfloat16)
    spans = {4: (0, 1), 0: (0, 16), 1: (0, 17), 2: (0, 5), 3: (0, 18)}
    for those in (spans, {1: (0, 17)}):
        query = stand.query(sum(end for _, end in those.values()))
        stand.check(stand.step(those, query), stand.expected(those, query))


def test_a_block_size_that_is_no_power_of_two() -> None:
    stand = Stand(KVShape(2, 8, 8), 4, [40, 7], torch.float32, block_size=6)
    for spans in ({0: (0, 39), 1: (0, 6)}, {0: (39, 40), 1: (6, 7)}):
        query = stand.query(sum(b - a for a, b in spans.values()))
        stand.check(stand.step(spans, query), stand.expected(spans, query))


@pytest.mark.parametrize("bad", ["keys", "values"])
def test_nan_shows_in_its_own_sequence_and_no_other(bad: str) -> None:
    stand = Stand(KVShape(2, 8, 8), 4, [10, 10], torch.float32)
    getattr(stand.made[0], bad)[:, 3] = torch.nan
    stand.step({0: (0, 9), 1: (0, 9)}, stand.query(18))
    output = stand.step({0: (9, 10), 1: (9, 10)}, stand.query(2))
    assert output[0].isnan().all() and output[1].isfinite().all()


def test_a_float32_result_does_not_depend_on_the_rest_of_the_batch() -> None:
    stand = Stand(KVShape(2, 8, 8), 4, [40, 21], torch.float32)
    stand.step({0: (0, 39), 1: (0, 20)}, stand.query(59))
    query = stand.query(2)
    together = stand.step({0: (39, 40), 1: (20, 21)}, query, padded=Padded(4, 4))
    alone = stand.step({1: (20, 21)}, query[:, 1:2])
    assert torch.equal(together[1], alone[0])


def test_an_empty_step_and_one_of_padding_only() -> None:
    stand = Stand(KVShape(2, 8, 8), 4, [4], torch.float32)
    stand.inputs.fill(Batch(()))
    stand.attention.begin(stand.inputs)
    nothing = [torch.randn(0, heads, 8, device=DEVICE) for heads in (4, 2, 2)]
    assert stand.attention.store_and_attend(0, *nothing, SCALE, None, None).shape == (0, 4, 8)
    stand.inputs.fill(Batch(()), Padded(2, 2))
    padding = [torch.full((2, heads, 8), torch.nan, device=DEVICE) for heads in (4, 2, 2)]
    assert (stand.attention.store_and_attend(0, *padding, SCALE, None, None) == 0).all()


def test_too_many_query_heads_on_a_kv_head_are_refused() -> None:
    stand = Stand(KVShape(1, 8, 8), 129, [4], torch.float32)
    with pytest.raises(ValueError, match="129 query heads"):
        stand.step({0: (0, 1)}, stand.query(1))
