"""The way from tokens to logits without transformers' forwards: where it is taken, and that it changes no bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from test_fuse import load, logits_of
from transformers import PreTrainedConfig

from actors.engine.cuda.body import _Body
from actors.engine.cuda.fuse import fuse


@pytest.fixture(autouse=True)
def two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first dense, the second with experts where the family has any."""

    def cut(family: str) -> PreTrainedConfig:
        config = own[family]()
        config.num_hidden_layers = 2
        return config

    own = dict(tiny_models.FAMILIES)
    for family in own:
        monkeypatch.setitem(tiny_models.FAMILIES, family, functools.partial(cut, family))


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("deepseek_v2", marks=pytest.mark.slow)])
def test_logits_are_the_same_to_the_bit(family: str, tmp_path: Path) -> None:
    model = load(tiny_models.build(family, tmp_path), "float32")
    fuse(model, 64)
    assert isinstance(model.module.forward, _Body)
    found = logits_of(model)
    del model.module.forward  # what remains is the class's own
    assert torch.equal(found, logits_of(model))


def scaled_embedding(module: Any) -> None:
    """As some families have it, in the body's forward and not in a module."""
    own, embed = module.model.forward, module.model.embed_tokens

    def forward(input_ids: torch.Tensor, **rest: Any) -> Any:
        return own(**rest | {"inputs_embeds": embed(input_ids) * 2})

    module.model.forward = forward


def scaled_logits(module: Any) -> None:
    own = module.forward

    def forward(**arguments: Any) -> Any:
        output = own(**arguments)
        output.logits = output.logits / 2
        return output

    module.forward = forward


def other_positions(module: Any) -> None:
    own = module.model.forward
    module.model.forward = lambda position_ids, **rest: own(position_ids=position_ids + 1, **rest)


def a_hook(module: Any) -> None:
    def zero(_: Any, arguments: Any, named: dict[str, Any]) -> Any:
        return arguments, named | {"input_ids": named["input_ids"] * 0}

    module.model.register_forward_pre_hook(zero, with_kwargs=True)


@pytest.mark.parametrize("change", [scaled_embedding, scaled_logits, other_positions, a_hook])
def test_a_model_that_does_more_is_left_alone(change: Callable[[Any], None], tmp_path: Path) -> None:
    model = load(tiny_models.build("llama", tmp_path), "float32")
    change(model.module)
    expected = logits_of(model)
    fuse(model, 64)
    assert not isinstance(model.module.forward, _Body)
    assert float((logits_of(model) - expected).norm() / expected.norm()) < 1e-5
