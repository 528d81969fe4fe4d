"""Whole models on a GPU: logits of prefill and decode against ``transformers``, in two dtypes, captured or not."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from actors.engine.batch import Batch, Slice
from actors.engine.config import EngineConfig
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


@pytest.mark.parametrize("graphs", [(1, 2), ()], ids=["captured", "eager"])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_logits_are_those_of_transformers(family: str, dtype: str, graphs: tuple[int, ...], tmp_path: Path) -> None:
    path = tiny_models.build(family, tmp_path)
    draw = random.Random(11)
    sequences = [[draw.randrange(tiny_models.VOCAB) for _ in range(PROMPT + DECODES)] for _ in range(PROMPTS)]
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).cuda()
    theirs = torch.cat([says(reference, tokens) for tokens in sequences])
    reference = reference.float()  # the same weights, as they were rounded
    expected = torch.cat([says(reference, tokens) for tokens in sequences])
    figures = summarize(path)
    config = EngineConfig(
        model=str(path), dtype=dtype, device="cuda", block_size=BLOCK, kv_blocks=24, max_model_len=96, max_num_seqs=2,
        max_num_batched_tokens=64, cuda_graphs=graphs,
    )  # fmt: skip
    slots = plan(Shape(figures.num_moe_layers, figures.num_experts), (0,))
    runner = ModelRunner(config, Routing(slots, 0), SoloExchange())
    runner.warm_up()
    rows = []
    for tokens in sequences:
        blocks = draw.sample(range(24), 5)
        for start, end in pairwise([0, *range(PROMPT, PROMPT + DECODES + 1)]):
            part = Slice("x", tokens[start:end], start, blocks, True, [], [], SamplingParams(max_tokens=1))
            rows.append(runner.step(Batch((part,)), [end - start]).double().clone())
    got = torch.cat(rows)
    assert got.shape == expected.shape
    error, own = (float(((one - expected).norm(dim=1) / expected.norm(dim=1)).median()) for one in (got, theirs))
    print(f"{family} {dtype}: relative error {error:.1e}, of transformers {own:.1e}")
    assert error < max(LIMITS[dtype], 1.1 * own)


def says(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """Logits of the last prompt token and all after it."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens], device="cuda")).logits[0, PROMPT - 1 :].double()
    return logits
