"""Whole models on a GPU: logits of prefill and decode against ``transformers``, in two dtypes, captured or not."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import tiny_models
import torch
from rank_group import Rank, run
from transformers import AutoModelForCausalLM

from actors.engine.batch import Batch, Slice
from actors.engine.config import EngineConfig
from actors.engine.cuda.peers import CudaPeers
from actors.engine.cuda.window import Layout
from actors.engine.experts.exchange import SoloExchange
from actors.engine.experts.planner import Shape, plan
from actors.engine.experts.routing import Routing
from actors.engine.model import summarize
from actors.engine.runner import ModelRunner
from actors.wire import SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PROMPT, DECODES, BLOCK, PROMPTS = 29, 8, 8, 6
# Of a row's norm, at the median over all rows: in bfloat16 a router that nearly draws may choose another expert, and
# then the row is another one, in transformers as here. Rounding alone can be more than the limit, these models are
# tiny: then ours may be no worse than transformers' own.
LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}


@dataclass
class Case:
    """A tiny checkpoint, sequences, and the logits that follow each prompt: ``exact`` ones of the same weights in
    float32, and ``theirs`` of ``transformers`` in the dtype."""

    path: Path
    dtype: str
    sequences: list[list[int]]
    exact: torch.Tensor
    theirs: torch.Tensor

    def check(self, found: torch.Tensor, what: str) -> None:
        assert found.shape == self.exact.shape
        error, own = (
            float(((one - self.exact).norm(dim=1) / self.exact.norm(dim=1)).median()) for one in (found, self.theirs)
        )
        print(f"{what} {self.dtype}: relative error {error:.1e}, of transformers {own:.1e}")
        assert error < max(LIMITS[self.dtype], 1.1 * own), what


def case(family: str, dtype: str, directory: Path) -> Case:
    path = tiny_models.build(family, directory)
    draw = random.Random(11)
    sequences = [[draw.randrange(tiny_models.VOCAB) for _ in range(PROMPT + DECODES)] for _ in range(PROMPTS)]
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).cuda()
    theirs = torch.cat([says(reference, tokens) for tokens in sequences])
    reference = reference.float()  # the same weights, as they were rounded
    return Case(path, dtype, sequences, torch.cat([says(reference, tokens) for tokens in sequences]), theirs)


def runner_of(
    path: Path, dtype: str, graphs: tuple[int, ...], index: int = 0, size: int = 1, device: str = "cuda"
) -> ModelRunner:
    figures = summarize(path)
    config = EngineConfig(
        model=str(path), dtype=dtype, device=device, block_size=BLOCK, kv_blocks=24, max_model_len=96, max_num_seqs=2,
        max_num_batched_tokens=64, cuda_graphs=graphs, min_data_parallel_size=size,
    )  # fmt: skip
    slots = plan(Shape(figures.num_moe_layers, figures.num_experts), range(size))
    runner = ModelRunner(config, Routing(slots, index), SoloExchange())
    runner.warm_up()
    return runner


def logits_of(runner: ModelRunner, sequences: list[list[int]], size: int = 1) -> torch.Tensor:
    """One sequence after the other, a prompt and then token by token; the other ranks do the same with theirs."""
    draw, rows = random.Random(12), []
    for tokens in sequences:
        blocks = draw.sample(range(24), 5)
        for start, end in pairwise([0, *range(PROMPT, PROMPT + DECODES + 1)]):
            part = Slice("x", tokens[start:end], start, blocks, True, [], [], SamplingParams(max_tokens=1))
            rows.append(runner.step(Batch((part,)), [end - start] * size).double().clone())
            runner.wait(runner.mark())
    return torch.cat(rows)


@pytest.mark.parametrize("graphs", [(1, 2), ()], ids=["captured", "eager"])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_logits_are_those_of_transformers(family: str, dtype: str, graphs: tuple[int, ...], tmp_path: Path) -> None:
    made = case(family, dtype, tmp_path)
    made.check(logits_of(runner_of(made.path, dtype, graphs), made.sequences), family)


def test_logits_of_two_ranks_are_those_of_transformers(tmp_path: Path) -> None:
    """In bfloat16; test_equality.py compares groups in float32. All families in the same two processes, which share a
    GPU where there is one only."""
    cases = {family: case(family, "bfloat16", tmp_path / family) for family in tiny_models.MOE_FAMILIES}
    given = [(made.path, made.sequences) for made in cases.values()]
    halves = run(functools.partial(member, given), 2, Layout(2, 1, 1, 1, torch.bfloat16))
    wrong = []
    for (family, made), *parts in zip(cases.items(), *halves, strict=True):
        rows = torch.stack([part.unflatten(0, (PROMPTS // 2, DECODES + 1)) for part in parts], 1)
        try:
            made.check(rows.flatten(0, 2).cuda(), family)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong


def member(given: list[tuple[Path, list[list[int]]]], rank: Rank, index: int) -> list[torch.Tensor]:
    """Logits of every second sequence, from ``index`` on, for each checkpoint, in a group with the other rank."""
    found = []
    for epoch, (path, sequences) in enumerate(given):
        runner = runner_of(path, "bfloat16", (1, 2), index, 2, str(rank.device))
        store, mesh = rank.meet(epoch, index, 2)
        exchange = runner.exchange(mesh, store, epoch)
        assert isinstance(exchange, CudaPeers)
        runner.adopt(runner.model.experts.routing, exchange)
        exchange.sync([0])
        found.append(logits_of(runner, sequences[index::2], 2).cpu())
        exchange.sync([0])  # the other one is done with this rank's memory
    return found


def says(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """Logits of the last prompt token and all after it."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens], device="cuda")).logits[0, PROMPT - 1 :].double()
    return logits
