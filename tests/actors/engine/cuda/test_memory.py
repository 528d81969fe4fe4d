"""The memory plan: its parts sum up, the KV cache gets what is left, and advice works when it is followed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.engine.cuda import fp8
from actors.engine.cuda.experts import CudaExperts
from actors.engine.cuda.memory import Cache, Weights, check, plan, weights_of
from actors.engine.experts.slots import Fp8Slots
from actors.engine.model import MoEModel
from actors.engine.quantization import Blocks
from actors.engine.weights import open_loader

GIB = 2**30
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

weights_strategy = st.builds(
    Weights,
    dense=st.integers(1, 20 * GIB),
    slot=st.integers(1, GIB),
    slots=st.integers(1, 256),
    experts=st.integers(1, 256),
)
cache_strategy = st.builds(
    Cache,
    block_bytes=st.integers(1, 2**22),
    block_size=st.sampled_from([1, 16, 64]),
    needed=st.integers(1, 2**14),
    blocks=st.none() | st.integers(1, 2**16),
    fraction=st.floats(0.01, 1.0),
)


def tried(weights: Weights, cache: Cache, total: int, free: int, min_ranks: int, **sizes: int):
    return plan(
        weights, cache, total=total, free=free, step_tokens=512, min_ranks=min_ranks,
        activations=sizes.get("activations", 0), graphs=sizes.get("graphs", 0),
    )  # fmt: skip


def test_a_plan_says_where_everything_goes() -> None:
    weights = Weights(dense=3 * GIB, slot=int(0.421875 * GIB), slots=128, experts=128)
    cache = Cache(block_bytes=16 * 98304, block_size=16, needed=2560, blocks=None, fraction=0.9)
    total, free = int(79.1 * GIB), int(21.5 * GIB)
    made = plan(
        weights, cache, total=total, free=free, activations=int(1.8 * GIB), step_tokens=8192, graphs=int(0.9 * GIB),
        min_ranks=1,
    )  # fmt: skip
    assert str(made) == (
        "79.1 GiB on the device; weights 57.0, activations 1.8 (a step of 8,192 tokens), graphs 0.9, other 0.6, "
        "reserve 1.9; KV 16.9 GiB = 11,550 blocks of 16 tokens = 184,800 tokens"
    )


@given(weights_strategy, cache_strategy, st.data())
def test_parts_sum_up_and_the_cache_gets_what_is_left(weights: Weights, cache: Cache, data: st.DataObject) -> None:
    free = data.draw(st.integers(0, 80 * GIB))
    total = free + weights.total + data.draw(st.integers(0, GIB))
    activations, graphs = data.draw(st.integers(0, 4 * GIB)), data.draw(st.integers(0, GIB))
    left = free - activations - graphs
    try:
        made = tried(weights, cache, total, free, 1, activations=activations, graphs=graphs)
    except ValueError:
        if cache.blocks is None:
            assert cache.needed * cache.block_bytes > left * cache.fraction - 1
        else:
            assert cache.blocks < cache.needed or cache.blocks * cache.block_bytes > left
        return
    parts = made.weights + made.activations + made.graphs + made.other + made.reserve + made.kv
    assert parts == made.total == total
    assert min(made.other, made.reserve) >= 0
    assert made.blocks >= cache.needed
    if cache.blocks is None:
        assert made.kv <= left * cache.fraction < made.kv + cache.block_bytes + 1
    else:
        assert made.blocks == cache.blocks


@given(weights_strategy, cache_strategy, st.integers(1, 8), st.data())
def test_advice_works_when_followed(weights: Weights, cache: Cache, min_ranks: int, data: st.DataObject) -> None:
    """The slots it names leave the cache enough, the ranks it names hold all experts in so many slots."""
    cache = replace(cache, blocks=cache.blocks and max(cache.blocks, cache.needed))
    free = data.draw(st.integers(0, 2 * GIB))
    total = free + weights.total
    try:
        tried(weights, cache, total, free, min_ranks)
        return
    except ValueError as refused:
        message = str(refused)
    found = re.search(r"with (\d+) expert slots per rank instead of (\d+)", message)
    if found is None:
        gib = re.search(r"would need ([-.e\d]+) GiB more", message)
        assert gib is not None
        assert float(gib[1]) > 0
        return
    slots, now = map(int, found.groups())
    assert now == weights.slots > slots >= 1
    better = replace(weights, slots=slots)
    tried(better, cache, total, total - better.total, min_ranks)
    ranks = re.search(r"set min_data_parallel_size to (\d+)", message)
    assert -(-weights.experts // (int(ranks[1]) if ranks else min_ranks)) <= slots


@given(weights_strategy, st.integers(0, 100 * GIB), st.integers(1, 8))
def test_weights_that_do_not_fit_are_refused_before_they_are_allocated(
    weights: Weights, free: int, min_ranks: int
) -> None:
    if weights.total <= free:
        check(weights, free, min_ranks)
        return
    with pytest.raises(ValueError, match="weights need") as refused:
        check(weights, free, min_ranks)
    found = re.search(r"with (\d+) expert slots", str(refused.value))
    if found:
        assert replace(weights, slots=int(found[1])).total <= free < replace(weights, slots=int(found[1]) + 1).total
    else:
        assert weights.dense + weights.slot > free


def test_a_model_too_large_is_refused_with_the_size_that_would_fit() -> None:
    qwen = Weights(dense=3 * GIB, slot=int(0.421875 * GIB), slots=128, experts=128)
    with pytest.raises(ValueError) as refused:
        check(qwen, 24 * GIB, 1)
    assert str(refused.value) == (
        "the model's weights need 57.0 GiB (3.0 GiB dense and 128 expert slots of 0.4 GiB), but the device has "
        "24.0 GiB free; with 49 expert slots per rank instead of 128, each 0.4 GiB, it would fit: set "
        "min_data_parallel_size to 3 or more (now 1), and leave out expert_slots"
    )
    with pytest.raises(ValueError, match=r"would need 7\.0 GiB more, on however many ranks"):
        check(Weights(dense=15 * GIB, slot=0, slots=0, experts=0), 8 * GIB, 1)
    cache = Cache(block_bytes=2**20, block_size=16, needed=64, blocks=32, fraction=0.9)
    with pytest.raises(ValueError, match=r"kv_blocks=32 hold 512 tokens.*raise it to 64, or lower max_model_len"):
        tried(qwen, cache, 80 * GIB, 20 * GIB, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_weights_counted_are_those_that_stand_there(family: str, dtype: str, tmp_path: Path) -> None:
    tiny_models.FAMILIES[family]().save_pretrained(tmp_path)
    model = MoEModel(tmp_path, dtype)
    counted = weights_of(model, 3, 16)
    model.allocate_slots(3, DEVICE, 16, 1)
    with torch.inference_mode():
        open_loader(model, DEVICE, "dummy").load_dense()
    dense = {
        id(p): p for name, p in model.module.named_parameters() if name.rpartition(".")[0] not in model.experts_names
    }
    assert counted.dense == sum(p.numel() * p.element_size() for p in dense.values())
    shapes = [shape[1:] for shapes in model.experts_shapes for shape in shapes.values()]
    assert counted.slot == sum(torch.Size(shape).numel() for shape in shapes) * model.dtype.itemsize
    assert (counted.slots, counted.experts) == ((3, model.summary.num_experts) if shapes else (0, 0))


def test_experts_that_stay_in_fp8_are_counted_with_their_scales(tmp_path: Path) -> None:
    config = tiny_models.FAMILIES["qwen3_moe"]()
    config.hidden_size, config.moe_intermediate_size = 384, 256
    config.save_pretrained(tmp_path)
    model = MoEModel(tmp_path, "bfloat16")
    each = 3 * 384 * 256 + 4 * 3 * (3 * 2)
    assert weights_of(model, 5, 16, Blocks(128, 128)).slot == len(model.experts_names) * each
    assert weights_of(model, 5, 16, Blocks(64, 128)).slot == weights_of(model, 5, 16).slot  # no kernels for those


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_room_for_one_layers_widened_weights_is_counted_where_there_is_one(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands before a step is rehearsed, so activations are without it."""
    config = tiny_models.FAMILIES["qwen3_moe"]()
    config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok = 384, 256, 2
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(fp8, "_WIDENED", 8)
    for max_rows in (11, 12):
        model = MoEModel(tmp_path, dtype)
        counted = weights_of(model, 3, max_rows, Blocks(128, 128))
        layers: Any = [
            Fp8Slots(model.module.get_submodule(name), 3, DEVICE, Blocks(128, 128)) for name in model.experts_names
        ]
        figures = model.summary
        experts = CudaExperts(
            layers, figures.num_experts, 2, figures.hidden_size, model.dtype, DEVICE, max_rows, max_ranks=2
        )
        assert (experts._room is not None) == (dtype == "bfloat16" and max_rows == 12)
        stored = sum(parameter.nbytes for layer in layers for parameter in layer.module.parameters())
        assert counted.total - counted.dense == stored + (0 if experts._room is None else experts._room.nbytes)
