"""The model runner of a group of one. What ranks do together is in test_equality.py."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tiny_models
import torch

from actors.engine.batch import Batch, Slice
from actors.engine.config import EngineConfig
from actors.engine.experts.exchange import SoloExchange
from actors.engine.experts.planner import Shape, plan
from actors.engine.experts.routing import Routing
from actors.engine.runner import ModelRunner, StepFailed
from actors.wire import SamplingParams


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    path = tiny_models.build("mixtral", tmp_path_factory.mktemp("models"))
    return EngineConfig(model=str(path), kv_blocks=20, block_size=8, max_model_len=64)


def runner(config: EngineConfig) -> ModelRunner:
    return ModelRunner(config, Routing(plan(Shape(3, 8), (0,)), 0), SoloExchange())


def piece(tokens: list[int], start: int, samples: bool, first_block: int = 0) -> Slice:
    blocks = list(range(first_block, first_block + 4))
    return Slice(str(first_block), tokens, start, blocks, samples, [], [], SamplingParams(max_tokens=1))


def test_only_slices_that_sample_get_logits(config: EngineConfig) -> None:
    made = runner(config)
    batch = Batch((piece([7], 0, True), piece([1, 2, 3], 0, False, 4), piece([5, 6], 0, True, 8)))
    logits = made.step(batch, [6])
    assert (logits.shape, logits.dtype) == ((2, tiny_models.VOCAB), torch.float32)
    alone = made.step(Batch((piece([5, 6], 0, True, 8),)), [2])
    torch.testing.assert_close(logits[1:], alone, rtol=1e-4, atol=1e-4)
    assert made.step(Batch((piece([1, 2, 3], 0, False),)), [3]).shape == (0, tiny_models.VOCAB)


def test_logits_do_not_depend_on_how_a_prompt_is_cut(config: EngineConfig) -> None:
    made = runner(config)
    prompt = list(range(100, 120))
    whole = made.step(Batch((piece(prompt, 0, True),)), [20])
    for start, end in ((0, 7), (7, 8), (8, 19)):
        made.step(Batch((piece(prompt[start:end], start, False, 4),)), [end - start])
    torch.testing.assert_close(made.step(Batch((piece(prompt[19:], 19, True, 4),)), [1]), whole, rtol=1e-4, atol=1e-4)


def test_a_model_that_raises_fails_the_step_and_the_next_one_works(config: EngineConfig) -> None:
    made = runner(config)
    good = Batch((piece([1, 2, 3], 0, True),))
    before = made.step(good, [3])
    bad = Batch((dataclasses.replace(good.slices[0], tokens=[1, tiny_models.VOCAB + 5, 3]),))
    with pytest.raises(StepFailed, match="IndexError"):
        made.step(bad, [3])
    torch.testing.assert_close(made.step(good, [3]), before, rtol=0, atol=0)


def test_announcing_another_number_of_tokens_fails_the_step(config: EngineConfig) -> None:
    with pytest.raises(StepFailed, match="3 rows; layer 0 with 4 was announced"):
        runner(config).step(Batch((piece([1, 2, 3], 0, True),)), [4])


def test_a_step_of_another_group_is_refused(config: EngineConfig) -> None:
    with pytest.raises(ValueError, match="a step of 2 ranks, an exchange of 1"):
        runner(config).step(Batch((piece([1], 0, True),)), [1, 0])


def changed(config: EngineConfig, **fields: Any) -> EngineConfig:
    return msgspec.structs.replace(config, **fields)


def test_a_cache_too_small_for_one_request_is_refused_with_the_fix(config: EngineConfig) -> None:
    with pytest.raises(ValueError, match=r"has 5 blocks .* max_model_len 64 needs 8; lower max_model_len, or raise"):
        runner(changed(config, kv_blocks=5))


def test_the_cache_takes_its_share_of_free_memory_and_says_so(
    config: EngineConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    made = runner(changed(config, kv_blocks=None, memory_fraction=0.001))
    assert made.num_kv_blocks > 8
    # 3 layers of 2 heads of 16, keys and values, float32, 8 tokens.
    assert f"0% of {_logged_free(caplog)} MiB free: {made.num_kv_blocks} blocks of 8 tokens, 6144 bytes" in caplog.text


def _logged_free(caplog: pytest.LogCaptureFixture) -> str:
    return caplog.text.partition("0% of ")[2].partition(" MiB")[0]


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [("dtype", "float64", "float64.*is not one of float32, bfloat16, float16"), ("max_model_len", 5000, "4096")],
)
def test_settings_the_model_cannot_have_are_refused(
    config: EngineConfig, field: str, value: Any, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        runner(changed(config, **{field: value}, kv_blocks=700))


def test_a_map_for_another_model_is_refused(config: EngineConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expert map has 2 layers, the model 3 MoE layers"):
        ModelRunner(config, Routing(plan(Shape(2, 8), (0,)), 0), SoloExchange())
    with pytest.raises(ValueError, match="expert map is of 6 experts, the model has 8"):
        ModelRunner(config, Routing(plan(Shape(3, 6), (0,)), 0), SoloExchange())
