"""Expert slots that keep an FP8 checkpoint's weights as they are stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from actors.engine import cpu
from actors.engine.attention.torch_sdpa import TorchPagedAttention
from actors.engine.batch import Batch, Slice
from actors.engine.cuda import fp8
from actors.engine.cuda.experts import CudaExperts
from actors.engine.cuda.streaming import StreamingLoader
from actors.engine.experts import slots
from actors.engine.experts.exchange import SoloExchange
from actors.engine.experts.planner import Shape, plan
from actors.engine.experts.routing import Routing
from actors.engine.experts.slots import Fp8Slots, StackedSlots
from actors.engine.model import MoEModel
from actors.engine.quantization import Blocks, dequantize
from actors.engine.weights import Loader, open_loader
from actors.wire import SamplingParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCKS = Blocks(fp8.BLOCK, fp8.BLOCK)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """In FP8 and the same numbers unquantised, of sizes that are whole blocks."""
    path = tmp_path_factory.mktemp("models")
    config = tiny_models.FAMILIES["qwen3_moe"]()
    config.hidden_size, config.moe_intermediate_size, config.num_hidden_layers, config.num_experts = 256, 128, 3, 4
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tiny_models._fill(model, 0)
    model.save_pretrained(path / "wide")
    return tiny_models.quantized(path / "wide", path, fp8.BLOCK)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots are of the kinds that GPUs have, wherever this runs."""
    monkeypatch.setattr(cpu, "supported", lambda dtype, device: False)
    monkeypatch.setattr(slots, "stays_quantized", lambda module, device, blocks: True)


def with_slots(path: Path, dtype: str, quantized: bool, num_slots: int = 3) -> MoEModel:
    model = MoEModel(path, dtype)
    model.allocate_slots(num_slots, DEVICE, 24, 1, BLOCKS if quantized else None)
    assert {type(layer) for layer in model.experts.layers} == {Fp8Slots if quantized else StackedSlots}
    return model


def loader_of(model: MoEModel, load_format: str = "auto") -> Loader:
    return StreamingLoader(model, DEVICE) if load_format == "auto" else open_loader(model, DEVICE, load_format)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_slots_hold_what_is_stored_and_compute_with_its_numbers(dtype: str, checkpoints: tuple[Path, Path]) -> None:
    stored, same = (with_slots(path, dtype, path is checkpoints[0]) for path in checkpoints)
    for model in (stored, same):
        loader = loader_of(model)
        with torch.inference_mode():
            loader.load_experts([[3, -1, 0]] * model.summary.num_moe_layers)
            model.experts.layers[1].put(1, loader.make_expert(1, 2))
    tensors = load_file(checkpoints[0] / "model.safetensors")
    module = stored.experts.layers[1].module
    prefix = stored.experts_names[1]
    for slot, expert in enumerate((3, 2, 0)):
        for leaf, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            for suffix in ("", "_scale_inv"):
                expected = torch.cat([tensors[f"{prefix}.{expert}.{part}.weight{suffix}"] for part in parts])
                found = getattr(module, leaf + suffix)[slot].cpu()
                assert found.dtype == expected.dtype
                assert torch.equal(found.float(), expected.float())
    rows = torch.randn(5, 256, dtype=stored.dtype, device=DEVICE)
    groups = [(0, 2, 2), (2, 5, 1)]
    results = [model.experts.layers[1].compute(rows, groups) for model in (stored, same)]
    assert torch.equal(*results)


def test_dummy_weights_are_those_drawn_rounded_to_fp8(checkpoints: tuple[Path, Path]) -> None:
    stored, plain = with_slots(checkpoints[0], "bfloat16", True), with_slots(checkpoints[0], "bfloat16", False)
    made = []
    for model in (stored, plain):
        loader = loader_of(model, "dummy")
        with torch.inference_mode():
            loader.load_expert(1, 3, 0)
            model.experts.layers[1].put(1, loader.request_expert(1, 3).result(timeout=60))
        made.append(model.experts.layers[1].module)
    for leaf in ("gate_up_proj", "down_proj"):
        weight, scale = getattr(made[0], leaf), getattr(made[0], f"{leaf}_scale_inv")
        numbers, drawn = dequantize(weight[:2], scale[:2], BLOCKS, torch.float32), getattr(made[1], leaf)[:2].float()
        assert torch.equal(numbers[0], numbers[1])
        assert 0 < (numbers - drawn).norm() / drawn.norm() < 0.04


def test_progress_counts_what_stands_in_the_slots(checkpoints: tuple[Path, Path]) -> None:
    model = with_slots(checkpoints[0], "bfloat16", True)
    loader = loader_of(model)
    told: list[tuple[int, int]] = []
    loader.watch(lambda done, total: told.append((done, total)), [[3, -1, 0]] * model.summary.num_moe_layers)
    with torch.inference_mode():
        loader.load_dense()
        loader.load_experts([[3, -1, 0]] * model.summary.num_moe_layers)
    experts = [p for name in model.experts_names for p in model.module.get_submodule(name).parameters()]
    dense = {id(p): p for p in model.module.parameters()}.keys() - {id(p) for p in experts}
    size = sum(p.nbytes for p in model.module.parameters() if id(p) in dense) + sum(p[:2].nbytes for p in experts)
    assert told[-1] == (size, size)
    assert loader._done == size


def test_numbers_among_what_should_be_quantized_are_refused(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    tensors, plain = (load_file(path / "model.safetensors") for path in checkpoints)
    key = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[key] = plain[key]
    del tensors[f"{key}_scale_inv"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoints[0] / "config.json").read_bytes())
    loader = loader_of(with_slots(tmp_path, "bfloat16", True))
    with pytest.raises(ValueError, match=r"experts\.2\.up_proj\.weight is torch\.float32.*set quantization=dequantize"):
        loader.load_experts([[0, 1, 2]] * 2)


def test_only_plain_gates_of_whole_blocks_suit() -> None:
    for family, changes, suits in (
        ("qwen3_moe", {"hidden_size": 256, "moe_intermediate_size": 128}, True),
        ("qwen3_moe", {"hidden_size": 256, "moe_intermediate_size": 96}, False),
        ("gpt_oss", {"hidden_size": 256, "intermediate_size": 128}, False),
    ):
        config = tiny_models.FAMILIES[family]()
        for name, value in changes.items():
            setattr(config, name, value)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        experts = next(module for name, module in model.named_modules() if name.endswith(".experts"))
        assert fp8.suits(experts) is suits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_models_logits_are_those_of_the_unquantized_checkpoint(dtype: str, checkpoints: tuple[Path, Path]) -> None:
    """Through the kernels, all of the model: the experts' products differ only in where they round."""
    logits = []
    for path in checkpoints:
        model = with_slots(path, dtype, path is checkpoints[0], 4)
        figures = model.summary
        model.experts = CudaExperts(
            model.experts.layers, 4, figures.top_k, figures.hidden_size, model.dtype, DEVICE, max_rows=24, max_ranks=1
        )
        loader = loader_of(model)
        routing = Routing(plan(Shape(figures.num_moe_layers, 4), (0,)), 0)
        model.experts.adopt(routing, SoloExchange())
        model.attention = TorchPagedAttention(model.kv_shapes, 2, 16, model.dtype, DEVICE)
        part = Slice("a", list(range(1, 24)), 0, [0, 1], True, [], [], SamplingParams(max_tokens=1))
        with torch.inference_mode():
            loader.load_dense()
            loader.load_experts(routing.own_slots)
            model.attention.begin(Batch((part,)))
            model.experts.begin([23])
            model.experts.own_rows.fill_(23)
            ids = torch.tensor([part.tokens], device=DEVICE)
            positions = torch.arange(23, device=DEVICE)[None]
            logits.append(model.module(input_ids=ids, position_ids=positions, use_cache=False).logits[0].double())
    found, expected = logits
    assert found.isfinite().all()
    assert (found - expected).norm() / expected.norm() < (1e-5 if dtype == "float32" else 3e-2)
