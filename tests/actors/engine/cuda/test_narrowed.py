"""Steps with prompts, padded or not, whose last layer computes only the rows that are read: as those without that."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from rank_group import Rank, run
from transformers import PreTrainedConfig

from actors.engine.attention.triton_paged import TritonPagedAttention
from actors.engine.batch import EMPTY, Batch, Slice
from actors.engine.cuda.decoder import Narrowed
from actors.engine.cuda.experts import CudaExperts
from actors.engine.cuda.fuse import fuse
from actors.engine.cuda.inputs import Padded, StepInputs
from actors.engine.cuda.steps import CudaSteps
from actors.engine.cuda.window import Layout, Window
from actors.engine.experts.exchange import SoloExchange
from actors.engine.experts.planner import Shape, plan
from actors.engine.experts.routing import Routing
from actors.engine.experts.slots import StackedSlots
from actors.engine.model import MoEModel, summarize
from actors.engine.weights import WeightLoader
from actors.wire import SamplingParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK, BLOCKS, MAX_ROWS = 4, 64, 40
PADDED = Padded(12, 5)
# Of models this small rounding alone makes others, by up to a twentieth.
TOLERANCE = {"float32": 1e-5, "bfloat16": 6e-2}


def qwen3_moe() -> PreTrainedConfig:
    """A dense layer and two with experts, of which the last one is narrowed."""
    config = tiny_models.qwen3_moe()
    config.num_hidden_layers = 3
    return config


def dense_end() -> PreTrainedConfig:
    """Experts, but none in the last layer."""
    config = qwen3_moe()
    config.mlp_only_layers = [0, 2]
    return config


def narrow_window() -> PreTrainedConfig:
    """Every other layer sees fewer tokens than there are, the last one too."""
    config = tiny_models.gpt_oss()
    config.sliding_window, config.layer_types = 3, config.layer_types[::-1]
    return config


class Stand:
    """A model of one rank of ``size``, fused, and its steps; those of a GPU without their sizing and their graphs."""

    def __init__(
        self, path: Path, dtype: str, device: torch.device, index: int = 0, size: int = 1, window: Window | None = None
    ) -> None:
        self.model = model = MoEModel(path, dtype)
        figures = model.summary
        slots = plan(Shape(figures.num_moe_layers, figures.num_experts), range(size))
        self.routing = Routing(slots, index)
        modules = [model.module.get_submodule(name) for name in model.experts_names]
        model._layers = layers = [StackedSlots(module, self.routing.num_slots, device) for module in modules]  # type: ignore
        sizes = figures.num_experts, figures.top_k, figures.hidden_size
        self.experts = model.experts = CudaExperts(layers, *sizes, model.dtype, device, MAX_ROWS, 2, window)
        self.experts._inner.fill_(torch.nan)
        loader = WeightLoader(model, device)
        with torch.inference_mode():
            loader.load_dense()
            self.narrowed = fuse(model, 64)
            loader.load_experts(self.routing.own_slots)
        model.attention = self.attention = TritonPagedAttention(model.kv_shapes, BLOCKS, BLOCK, model.dtype, device)
        self.steps = steps = object.__new__(CudaSteps)
        steps.model, steps._experts, steps._narrowed, steps._idle = model, self.experts, self.narrowed, {}
        steps.sizes, steps.prompt_sizes, steps._graphs = [], [], {}
        steps.inputs = StepInputs(MAX_ROWS, 8, 12, BLOCK, device)
        self.experts.own_rows = steps.inputs.count
        # By step: how many rows each layer's experts got.
        self.rows: list[list[int]] = []
        own = self.experts.forward
        self.experts.forward = lambda layer, x, *rest: (self.rows[-1].append(len(x)), own(layer, x, *rest))[1]  # type: ignore

    @torch.inference_mode()
    def run(self, batch: Batch, tokens: list[int] | None = None) -> torch.Tensor:
        self.rows.append([])
        self.experts.begin(tokens or [batch.num_tokens])
        if not batch.slices:
            self.steps.idle()
            return torch.empty(0)
        return self.steps.run(batch).float().cpu()


def part(name: int, start: int, end: int, samples: bool = True) -> Slice:
    """Tokens of sequence ``name``, which has blocks of its own."""
    tokens = [(31 * name + 7 * position + position**2) % tiny_models.VOCAB for position in range(start, end)]
    blocks = [name + 8 * (5 * i % 8) for i in range(-(-end // BLOCK))]
    return Slice(str(name), tokens, start, blocks, samples, [], [], SamplingParams(max_tokens=1))


# Whole prompts and pieces of others, which do not sample; these beside decodes; a piece of one row behind another; one
# by itself; decodes by themselves. By step also how many rows the last layer has.
STEPS = [
    (Batch((part(0, 0, 7), part(1, 0, 3, False))), 2),
    (Batch((part(0, 7, 8), part(1, 3, 6, False), part(2, 0, 2))), 3),
    (Batch((part(0, 8, 9), part(1, 6, 8), part(3, 0, 1, False))), 3),
    (Batch((part(3, 1, 5, False),)), 1),
    (Batch((part(0, 9, 10), part(1, 8, 9))), 2),
]
FAMILIES = ("qwen3_moe", "dense_end", "deepseek_v2", "qwen3", "narrow_window", "olmoe", "qwen2_moe")
WITHOUT_EXPERTS_AT_THE_END = ("dense_end", "qwen3")


def cases() -> Iterator[Any]:
    """Every family in every dtype; interpreted, one takes half a minute, and two in bfloat16."""
    for family, dtype in itertools.product(FAMILIES, ("float32", "bfloat16")):
        marks = [] if (family, dtype) == ("qwen3_moe", "float32") else [pytest.mark.slow]
        if dtype == "bfloat16" and family != "qwen3_moe" and not torch.cuda.is_available():
            marks = [pytest.mark.skip(reason="not run: takes minutes without a GPU")]
        yield pytest.param(family, dtype, marks=marks)


@pytest.mark.parametrize(("family", "dtype"), list(cases()))
def test_logits_keys_and_values_are_the_same(
    family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Head norms, norms over all heads, windows and sinks, MLA; experts beside dense layers, or none."""
    for made in (qwen3_moe, dense_end, narrow_window):
        monkeypatch.setitem(tiny_models.FAMILIES, made.__name__, made)
    stand = Stand(tiny_models.build(family, tmp_path), dtype, DEVICE)
    stand.experts.adopt(stand.routing, SoloExchange())
    pools = [*stand.attention.keys, *stand.attention.values]

    def played(narrowed: Narrowed | None, *sizes: Padded) -> list[torch.Tensor]:
        """Logits by step, what is kept, and how often experts were chosen, which is the last one."""
        stand.steps._narrowed, stand.steps.prompt_sizes, stand.rows = narrowed, list(sizes), []
        stand.experts.reset_counts()
        for pool in pools:
            pool.zero_()
        logits = [stand.run(batch) for batch, _ in STEPS]
        return [*logits, *(pool.clone() for pool in pools), stand.experts.chosen.clone()]

    def rows_of_layers(rows: int, last: int) -> list[int]:
        count = len(stand.experts.layers)
        return [rows] * count if family in WITHOUT_EXPERTS_AT_THE_END else [rows] * (count - 1) + [last]

    assert stand.narrowed is not None
    expected = played(None)
    assert stand.rows == [rows_of_layers(batch.num_tokens, batch.num_tokens) for batch, _ in STEPS]
    found = played(stand.narrowed)
    assert stand.rows == [rows_of_layers(batch.num_tokens, few) for batch, few in STEPS]
    padded = played(stand.narrowed, PADDED)
    assert stand.rows == [rows_of_layers(*PADDED)] * len(STEPS)
    for step, (batch, _) in enumerate(STEPS):
        for logits in (found[step], padded[step]):
            assert logits.shape == (len(batch.sampling_slices), tiny_models.VOCAB)
            assert_near(logits, expected[step], dtype)
    assert all(map(torch.equal, found[len(STEPS) : -1], expected[len(STEPS) : -1]))
    for kept, own in zip(padded[len(STEPS) : -1], expected[len(STEPS) : -1], strict=True):
        assert_near(kept, own, dtype)
    assert torch.equal(padded[-1], found[-1])


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: str) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= TOLERANCE[dtype] * float(expected.norm())


# By step, what each rank has: both narrow, each by itself, beside decodes, beside a rank that is idle.
GROUP_STEPS = [
    (Batch((part(0, 0, 6), part(1, 0, 3))), Batch((part(2, 0, 4),))),
    (Batch((part(0, 6, 7), part(1, 3, 4))), Batch((part(2, 4, 5), part(3, 0, 7, False)))),
    (EMPTY, Batch((part(3, 7, 10),))),
    (Batch((part(0, 7, 8), part(4, 0, 5))), Batch((part(2, 5, 6), part(3, 10, 11)))),
    (Batch((part(0, 8, 9),)), Batch((part(2, 6, 7),))),
]


def member(path: Path, rank: Rank, index: int) -> tuple[list[torch.Tensor], list[list[int]]]:
    stand = Stand(path, "float32", rank.device, index, 2, rank.window)
    exchange = rank.join(0, index, 2)
    stand.experts.adopt(stand.routing, exchange)
    exchange.sync([0])
    logits = []
    for batches in GROUP_STEPS:
        logits.append(stand.run(batches[index], [batch.num_tokens for batch in batches]))
        verdict = stand.experts.verdict()
        if rank.device.type == "cuda":
            torch.cuda.synchronize()
        stand.experts.check(verdict)
    return logits, stand.rows


@pytest.mark.slow  # interpreted; test_window.py has the experts by themselves
def test_ranks_of_a_group_narrow_each_by_itself(tmp_path: Path) -> None:
    path = tiny_models.build("qwen3_moe", tmp_path)
    figures = summarize(path)
    layout = Layout(2, MAX_ROWS, figures.top_k, figures.hidden_size, torch.float32)
    got = run(functools.partial(member, path), 2, layout)
    for index, (logits, rows) in enumerate(got):
        alone = Stand(path, "float32", DEVICE)
        alone.experts.adopt(alone.routing, SoloExchange())
        alone.steps._narrowed = None
        for step, batches in enumerate(GROUP_STEPS):
            batch = batches[index]
            assert rows[step] == ([batch.num_tokens] * 2 + [len(batch.slices)] if batch.slices else [])
            assert_near(logits[step], alone.run(batch), "float32")


def test_a_model_that_looks_at_other_rows_is_not_narrowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_models.qwen3()
    config.num_hidden_layers, config.layer_types = 1, config.layer_types[:1]
    monkeypatch.setitem(tiny_models.FAMILIES, "qwen3", lambda: config)
    path = tiny_models.build("qwen3", tmp_path)
    assert Stand(path, "float32", DEVICE).narrowed is not None
    own = MoEModel.__init__

    def mixing(model: Any, *arguments: Any) -> None:
        own(model, *arguments)
        model.module.model.norm.register_forward_hook(lambda module, given, output: output.cumsum(1))

    monkeypatch.setattr(MoEModel, "__init__", mixing)
    assert Stand(path, "float32", DEVICE).narrowed is None
