"""Which modules get a compiled forward, and that it changes nothing."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from actors.engine import steps
from actors.engine.batch import Batch, Slice
from actors.engine.config import EngineConfig
from actors.engine.cpu import fuse
from actors.engine.experts.exchange import SoloExchange
from actors.engine.experts.planner import Shape, plan
from actors.engine.experts.routing import Routing
from actors.engine.model import summarize
from actors.engine.runner import ModelRunner
from actors.wire import SamplingParams

PROMPT = [5, 9, 2, 77, 31]
# Its attention normalises queries and keys, clips, or rotates otherwise; it has experts in every layer.
OTHERWISE = {
    "attentions": ("qwen3_moe", "qwen3", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "glm4_moe"),
    "MLPs": ("mixtral", "olmoe", "gpt_oss"),
}


# All steps of few rows are one program.
WHOLE = ("mixtral", "qwen2_moe", "llama")


def runner(path: Path) -> ModelRunner:
    shape = summarize(path)
    config = EngineConfig(model=str(path), kv_blocks=20, block_size=8, max_model_len=64)
    routing = Routing(plan(Shape(shape.num_moe_layers, shape.num_experts), (0,)), 0)
    return ModelRunner(config, routing, SoloExchange())


@pytest.mark.parametrize("family", [*tiny_models.MOE_FAMILIES, "llama", "qwen3"])
def test_logits_are_those_of_transformers(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tiny_models.build(family, tmp_path)
    caplog.set_level(logging.INFO, fuse.__name__)
    caplog.set_level(logging.INFO, steps.__name__)
    made = runner(path)
    assert ("decoder runs as one program" in caplog.messages) == (family in WHOLE)
    (line,) = [record.getMessage() for record in caplog.records if record.name == fuse.__name__]
    for kind in ("norms", "MLPs", "attentions"):
        assert (kind in line) == (family not in OTHERWISE.get(kind, ())), line
    logits = made.step(Batch((piece(PROMPT, 0),)), [len(PROMPT)])
    for token in (8, 4):  # one row: the other products
        logits = torch.cat([logits, made.step(Batch((piece([token], len(PROMPT) + (token == 4)),)), [1])])
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        expected = reference(torch.tensor([[*PROMPT, 8, 4]])).logits[0, len(PROMPT) - 1 :]
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


def piece(tokens: list[int], start: int) -> Slice:
    return Slice("r", tokens, start, [3, 7, 1], True, [], [], SamplingParams(max_tokens=1))


class GemmaRMSNorm(torch.nn.Module):
    """Adds one to its weight; its name and parts are those of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(16), requires_grad=False)
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (16,), 1 + self.weight, self.eps)


def test_a_norm_that_computes_otherwise_is_left_alone() -> None:
    norm = GemmaRMSNorm()
    x = torch.randn(2, 16)
    before = norm(x)
    assert not fuse._norm(norm, None, {}, torch.Generator())  # type: ignore[arg-type]
    assert torch.equal(norm(x), before)
    norm.forward = lambda x: torch.nn.functional.rms_norm(x, (16,), norm.weight, norm.eps)  # type: ignore[method-assign]
    assert fuse._norm(norm, None, {}, torch.Generator())  # type: ignore[arg-type]
