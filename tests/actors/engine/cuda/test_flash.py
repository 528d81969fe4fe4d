"""Whole prompts by FlashAttention 4: by the package on a Hopper GPU that has it, by a stand-in everywhere."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paged_stand import DEVICE, Stand

from actors.engine.attention.base import KVShape
from actors.engine.attention.triton_paged import TritonPagedAttention
from actors.engine.cuda import flash
from actors.engine.cuda.inputs import Chunk

INSTALLED = flash.load(torch.bfloat16, DEVICE)
needs_package = pytest.mark.skipif(INSTALLED is None, reason="not run: needs flash-attn-4 and a Hopper GPU")
WIDTHS = [(64, 8, 2), (128, 8, 2), (64, 4, 4), (128, 4, 4)]


def stand_in(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, causal: bool,
    window_size: tuple[int | None, int | None], learnable_sink: torch.Tensor | None,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """What the package's function does, its reading of 16 rows beyond a sequence's end included."""
    assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
    out = torch.full((len(query), query.shape[1], value.shape[2]), torch.nan, dtype=query.dtype, device=query.device)
    borders = cu_seqlens_q.tolist()
    lengths = [b - a for a, b in pairwise(borders)]
    assert max(lengths) == max_seqlen_q == max_seqlen_k
    for a, b in pairwise(borders):
        group = query.shape[1] // key.shape[1]
        keys, values = (part[a : b + 16].double().repeat_interleave(group, 1).transpose(0, 1) for part in (key, value))
        scores = query[a:b].double().transpose(0, 1) @ keys.transpose(1, 2) * softmax_scale
        row, column = torch.arange(b - a)[:, None], torch.arange(keys.shape[1])
        hidden = column > row
        left, right = window_size
        if left is not None:
            assert right == 0
            hidden |= column < row - left
        scores.masked_fill_(hidden.to(scores.device), float("-inf"))
        if learnable_sink is not None:
            scores = torch.cat([scores, learnable_sink.double()[:, None, None].expand(-1, b - a, 1)], 2)
        weights = torch.softmax(scores, 2)[..., : keys.shape[1]]
        out[a:b] = (weights @ values).transpose(0, 1).to(out.dtype)
    return out, None


class Recorder:
    """Calls ``varlen``, and keeps the borders of each call."""

    def __init__(self, varlen: flash.Varlen) -> None:
        self.varlen = varlen
        self.borders: list[list[int]] = []

    def __call__(self, *parts: torch.Tensor, **settings: Any) -> Any:
        self.borders.append(settings["cu_seqlens_q"].tolist())
        return self.varlen(*parts, **settings)


def check_steps(
    varlen: flash.Varlen, shape: KVShape, heads: int, unit: int, monkeypatch: pytest.MonkeyPatch,
    window: int | None = None, sinks: bool = False, dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    """Prompts of ``unit`` rows and more: alone, together, and among decodes, later chunks and shorter prompts."""
    recorder = Recorder(varlen)
    monkeypatch.setattr(flash, "LEAST_ROWS", unit)
    monkeypatch.setattr(flash, "LEAST_IN_STEP", unit)
    lengths = [unit // 2, 2 * unit, unit + 1, unit, unit - 1, 2 * unit + 3]
    # Sequence: its positions. Decode, two prompts, a later chunk and a short one, a prompt, one after a short one.
    mixed = {0: (unit // 2 - 1, unit // 2), 1: (0, 2 * unit), 2: (0, unit + 1), 3: (unit // 2, unit), 4: (0, unit - 1)}
    mixed[5] = 0, 2 * unit + 3
    before = {0: (0, unit // 2 - 1), 3: (0, unit // 2)}
    logits = torch.randn(heads, device=DEVICE).to(dtype) if sinks else None
    outputs = []
    for used in (recorder, None):
        monkeypatch.setattr(flash, "load", lambda *_, used=used: used)
        stand = Stand(shape, heads, lengths, dtype)
        for spans in (before, mixed, {1: (0, 2 * unit), 2: (0, unit + 1)}, {2: (0, unit + 1)}):
            query = stand.query(sum(b - a for a, b in spans.values()))
            outputs.append(stand.step(spans, query, window, logits))
            stand.check(outputs[-1], stand.expected(spans, query, window, logits))
    half = len(outputs) // 2
    for one, other in zip(outputs[:half], outputs[half:], strict=True):
        stand.check(one, other.double())
    later = 1 + 2 * unit + unit + 1 + (unit - unit // 2) + unit - 1
    assert recorder.borders == [
        [1, 2 * unit + 1, 3 * unit + 2],
        [later, later + 2 * unit + 3],
        [0, 2 * unit, 3 * unit + 1],
        [0, unit + 1],
    ]


@pytest.mark.parametrize(
    ("shape", "heads", "window", "sinks", "dtype"),
    [
        (KVShape(2, 16, 16), 6, None, False, torch.bfloat16),
        (KVShape(2, 24, 16), 2, None, False, torch.float16),
        (KVShape(1, 16, 16), 4, 7, True, torch.bfloat16),
    ],
    ids=str,
)
def test_steps_by_a_stand_in(
    shape: KVShape, heads: int, window: int | None, sinks: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_steps(stand_in, shape, heads, 12, monkeypatch, window, sinks, dtype)


@needs_package
@pytest.mark.parametrize(
    ("width", "heads", "kv_heads", "value_width", "window", "sinks"),
    [(width, heads, kv_heads, width, None, False) for width, heads, kv_heads in WIDTHS]
    + [
        (128, 6, 2, 128, None, False),  # tiles that hold no whole number of a KV head's rows
        (192, 2, 2, 128, None, False),
        (64, 8, 1, 64, 128, True),
        (64, 8, 1, 64, None, True),
        (128, 4, 4, 128, 1, False),
        (128, 8, 2, 128, 300, False),
    ],
)
def test_steps_by_the_package(
    width: int, heads: int, kv_heads: int, value_width: int, window: int | None, sinks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert INSTALLED is not None
    check_steps(INSTALLED, KVShape(kv_heads, width, value_width), heads, 520, monkeypatch, window, sinks)


@pytest.mark.parametrize("bad", ["keys", "values"])
@pytest.mark.parametrize(
    ("varlen", "unit"), [(stand_in, 12), pytest.param(INSTALLED, 520, marks=needs_package)], ids=["stand-in", "package"]
)
def test_nan_shows_in_its_own_prompt_and_no_other(
    varlen: flash.Varlen, unit: int, bad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "LEAST_ROWS", unit)
    monkeypatch.setattr(flash, "LEAST_IN_STEP", unit)
    monkeypatch.setattr(flash, "load", lambda *_: varlen)
    width = 16 if varlen is stand_in else 64
    stand = Stand(KVShape(2, width, width), 4, [unit, unit + 1, unit], torch.bfloat16)
    getattr(stand.made[1], bad)[1, 3, 2] = torch.nan  # of the second KV head
    output = stand.step({i: (0, len(made.keys[0])) for i, made in enumerate(stand.made)}, stand.query(3 * unit + 1))
    own = slice(unit, 2 * unit + 1)
    assert output[own][3:, 2:].isnan().flatten(1).any(1).all()
    clean = torch.cat([output[:unit], output[own][:3], output[2 * unit + 1 :]])
    assert clean.isfinite().all() and output[:, :2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_confined(dtype: torch.dtype) -> None:
    joint = torch.randn(300, 3 * (24 + 40)).to(DEVICE, dtype)  # rows of both, as they come out of one projection
    key, value = joint[:, : 3 * 24].view(300, 3, 24), joint[:, 3 * 24 :].view(300, 3, 40)
    for row, head, column, to in ((0, 0, 0, "nan"), (299, 2, 39, "inf"), (150, 1, 7, "-inf")):
        value[row, head, column] = float(to)
    bad = ~value.isfinite().all(2)
    expected_key, expected_value = key.clone(), value.clone()
    expected_key[..., 0][bad] = torch.nan
    expected_value[bad] = 0
    flash.confine(key, value)
    assert bad.sum() == 3 and torch.equal(value, expected_value)
    torch.testing.assert_close(key, expected_key, rtol=0, atol=0, equal_nan=True)


# --- what goes there -------------------------------------------------------------------------------------------------


def attention(varlen: flash.Varlen | None, shape: KVShape, monkeypatch: pytest.MonkeyPatch) -> TritonPagedAttention:
    monkeypatch.setattr(flash, "load", lambda *_: varlen)
    made = TritonPagedAttention([shape], 1, 16, torch.bfloat16, DEVICE)
    chunks = [Chunk(3, 512, 0, 3), Chunk(515, 5000, 0, 4), Chunk(5515, 511, 0, 5), Chunk(6026, 9000, 16, 6)]
    made.begin(SimpleNamespace(chunks=[*chunks, Chunk(15026, 4096, 0, 7), Chunk(19122, 4096, 0, 8)]))  # type: ignore[arg-type]
    return made


def runs(made: TritonPagedAttention, *settings: object) -> list[tuple[bool, list[int]]]:
    """Which sequences go together, and whether by keys and values as they come."""
    found = made._runs(0, *settings, True)  # type: ignore[arg-type]
    assert all(run.rows == sum(chunk.count for chunk in run.chunks) for run in found)
    return [(run.dense, list(run.sequences)) for run in found]


def test_neighbouring_whole_prompts_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    made = attention(stand_in, KVShape(2, 128, 128), monkeypatch)
    for window, sinks in ((None, None), (100, torch.zeros(2))):
        assert runs(made, window, sinks) == [(True, [3, 4]), (False, [5, 6]), (True, [7, 8])]


def test_a_step_of_few_rows_has_no_time_for_more_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    made = attention(stand_in, KVShape(2, 128, 128), monkeypatch)
    made.begin(SimpleNamespace(chunks=[Chunk(0, 2048, 0, 0), Chunk(2048, 2047, 0, 1)]))  # type: ignore[arg-type]
    assert runs(made, None, None) == [(False, [0, 1])]
    made.begin(SimpleNamespace(chunks=[Chunk(0, 2048, 0, 0), Chunk(2048, 2048, 0, 1)]))  # type: ignore[arg-type]
    assert runs(made, None, None) == [(True, [0, 1])]


def test_torch_takes_long_prompts_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonPagedAttention, "_plain", lambda *_: True)
    for varlen, shape in ((None, KVShape(2, 128, 128)), (stand_in, KVShape(2, 64, 128))):
        made = attention(varlen, shape, monkeypatch)
        expected = [(False, [3]), (True, [4]), (False, [5, 6]), (True, [7]), (True, [8])]
        assert runs(made, None, None) == expected
        assert runs(made, 100, None) == [(False, [3, 4, 5, 6, 7, 8])]


def test_which_widths_fit() -> None:
    assert all(flash.fits(*widths) for widths in ((8, 8), (64, 64), (128, 128), (192, 128), (256, 256)))
    assert not any(flash.fits(*widths) for widths in ((64, 256), (264, 128), (60, 60), (64, 60)))


# --- whether it is there ---------------------------------------------------------------------------------------------

GPU = torch.device("cuda")
MODULE = "flash_attn.cute.interface"


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A Hopper GPU with the package, which is ``stand_in``; the user's caches are here."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "4.0.0b36")
    monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": str(tmp_path)})
    for name in ("flash_attn", "flash_attn.cute", MODULE):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(flash_attn_varlen_func=stand_in))
    return tmp_path


def test_it_is_found_and_its_kernels_are_kept(hopper: Path) -> None:
    assert flash.load(torch.float16, GPU) is flash.load(torch.bfloat16, GPU) is stand_in
    assert os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] == "1"
    assert os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"] == str(hopper / "accordion" / "flash-attention")


def test_what_the_environment_says_stays(hopper: Path) -> None:
    os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"] = own = str(hopper / "own")
    assert flash.load(torch.bfloat16, GPU) is stand_in
    assert os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"] == own and Path(own).is_dir()
    os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] = "0"
    assert flash.load(torch.bfloat16, GPU) is stand_in
    assert os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] == "0"


def test_without_a_directory_its_kernels_are_not_kept(hopper: Path) -> None:
    (hopper / "accordion").touch()
    assert flash.load(torch.bfloat16, GPU) is stand_in
    assert "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED" not in os.environ


def test_it_is_not_for_other_dtypes_and_devices(hopper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert flash.load(torch.float32, GPU) is None
    assert flash.load(torch.bfloat16, torch.device("cpu")) is None
    for other in ((8, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, other=other: other)
        assert flash.load(torch.bfloat16, GPU) is None


def test_only_a_package_that_does_not_load_is_reported(
    hopper: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, MODULE, None)
    with caplog.at_level(logging.WARNING):
        assert flash.load(torch.bfloat16, GPU) is None
        assert "does not load" in caplog.text and MODULE in caplog.text
        caplog.clear()

        def absent(name: str) -> str:
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "version", absent)
        assert flash.load(torch.bfloat16, GPU) is None
        assert not caplog.records
