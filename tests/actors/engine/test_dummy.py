"""Random weights: without a checkpoint, the same wherever they are drawn, and tame enough to run a model on."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch

from actors.engine.attention.torch_sdpa import TorchPagedAttention
from actors.engine.batch import Batch, Slice
from actors.engine.experts.exchange import SoloExchange
from actors.engine.experts.planner import Shape, plan
from actors.engine.experts.routing import Routing
from actors.engine.model import MoEModel
from actors.engine.weights import open_loader
from actors.wire import SamplingParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = 32


def with_config_only(family: str, directory: Path, **changes) -> Path:
    path = directory / family
    config = tiny_models.FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    config.save_pretrained(path)
    return path


def drawn(path: Path, num_slots: int, seed: int = 0, dtype: str = "float32"):
    model = MoEModel(path, dtype)
    model.allocate_slots(num_slots or model.summary.num_experts, DEVICE, ROWS, 1)
    loader = open_loader(model, DEVICE, "dummy", seed)
    with torch.inference_mode():
        loader.load_dense()
    return model, loader


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_weight_is_drawn_and_no_checkpoint_is_needed(family: str, dtype: str, tmp_path: Path) -> None:
    model, _ = drawn(with_config_only(family, tmp_path), 1, dtype=dtype)
    for name, tensor in (*model.module.named_parameters(), *model.module.named_buffers()):
        if name.rpartition(".")[0] not in model.experts_names:
            assert tensor.device.type == DEVICE.type, name
            assert tensor.float().isfinite().all(), name


def test_an_expert_is_the_same_on_every_rank_and_differs_from_others_and_by_seed(tmp_path: Path) -> None:
    path = with_config_only("qwen3_moe", tmp_path)
    (_, one), (_, two), (_, other) = drawn(path, 2), drawn(path, 4), drawn(path, 2, seed=1)
    two._expert(0, 7)  # what was drawn before makes no difference
    first, second, elsewhere = one._expert(1, 3), two._expert(1, 3), other._expert(1, 3)
    assert first.keys() == second.keys() == {"gate_up_proj", "down_proj"}
    for leaf, tensor in first.items():
        assert torch.equal(tensor, second[leaf])
        for different in (elsewhere, one._expert(1, 4), one._expert(2, 3)):
            assert not torch.equal(tensor, different[leaf])


def test_dense_weights_are_the_same_on_every_rank(tmp_path: Path) -> None:
    path = with_config_only("qwen3", tmp_path)
    (one, _), (two, _) = drawn(path, 0), drawn(path, 0)
    for name, tensor in one.module.named_parameters():
        assert torch.equal(tensor, two.module.get_parameter(name)), name
    assert one.module.lm_head.weight is one.module.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_logits_of_a_deep_model_are_finite_and_spread(family: str, tmp_path: Path) -> None:
    layers = 24
    changes = {"num_hidden_layers": layers} | ({"layer_types": None} if family == "gpt_oss" else {})
    model, loader = drawn(with_config_only(family, tmp_path, **changes), 0)
    figures = model.summary
    assert figures.num_moe_layers > layers // 2
    routing = Routing(plan(Shape(figures.num_moe_layers, figures.num_experts), (0,)), 0)
    model.experts.adopt(routing, SoloExchange())
    model.attention = TorchPagedAttention(model.kv_shapes, 2, 16, model.dtype, DEVICE)
    tokens = list(range(1, ROWS + 1))
    part = Slice("a", tokens, 0, [0, 1], True, tokens, [], SamplingParams(max_tokens=1))
    with torch.inference_mode():
        loader.load_experts(routing.own_slots)
        model.attention.begin(Batch((part,)))
        model.experts.begin([len(tokens)])
        if DEVICE.type == "cuda":
            model.experts.own_rows.fill_(len(tokens))
        ids = torch.tensor([tokens], device=DEVICE)
        positions = torch.arange(len(tokens), device=DEVICE)[None]
        logits = model.module(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert logits.isfinite().all()
    assert 1 < logits.std() < 10


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="load_format 'gguf' is not one of auto, dummy"):
        open_loader(MoEModel(with_config_only("llama", tmp_path), "float32"), DEVICE, "gguf")
