from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from actors.engine.checkpoint import Checkpoint
from actors.engine.model import MoEModel
from actors.engine.weights import WeightLoader

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def edited(source: Path, target: Path, change) -> Path:
    """A copy of a checkpoint in one file, its tensors changed by ``change(tensors)``."""
    target.mkdir()
    shutil.copy(source / "config.json", target)
    tensors = {key: tensor for file in source.glob("*.safetensors") for key, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def loaded(path: Path, dtype: str, num_slots: int) -> tuple[MoEModel, WeightLoader]:
    model = MoEModel(path, dtype)
    model.allocate_slots(num_slots, CPU)
    loader = WeightLoader(model, CPU)
    loader.load_dense()
    return model, loader


def expert_by_hand(module, rows: torch.Tensor, expert: int) -> torch.Tensor:
    """One expert of a module that holds all of them, as its family defines it."""

    def linear(rows: torch.Tensor, name: str) -> torch.Tensor:
        weight = getattr(module, name)[expert]
        bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
        return torch.nn.functional.linear(rows, weight.t() if module.is_transposed else weight, bias)

    return linear(module._apply_gate(linear(rows, "gate_up_proj")), "down_proj")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_dense_tensor_is_what_transformers_loads(family: str, dtype: str, directory: Path) -> None:
    path = tiny_models.build(family, directory)
    model, _ = loaded(path, dtype, 1)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=model.dtype)
    ours = dict(model.module.named_parameters()) | dict(model.module.named_buffers())
    theirs = dict(reference.named_parameters()) | dict(reference.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if ".experts." not in name:
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name


# float16 has no packed products, so its slots are stacked as they are on other devices.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-2), ("bfloat16", 6e-2)])
@pytest.mark.parametrize("family", tiny_models.MOE_FAMILIES)
def test_an_expert_in_a_slot_computes_what_it_does_in_transformers(
    family: str, dtype: str, tolerance: float, directory: Path
) -> None:
    path = tiny_models.build(family, directory)
    model, loader = loaded(path, dtype, 2)
    for slot, expert in ((1, 3), (0, 5), (1, 2)):
        before = loader.checkpoint.bytes_read
        loader.load_expert(1, expert, slot)
        read = loader.checkpoint.bytes_read - before
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=model.dtype)
    module = reference.get_submodule(model.experts_names[1])
    for count in (1, 7):
        rows = torch.randn(count, 64, dtype=model.dtype)
        for slot, expert in ((0, 5), (1, 2)):
            expected = expert_by_hand(module, rows, expert)
            torch.testing.assert_close(
                model.experts.layers[1].compute(rows, [(0, count, slot)]), expected, rtol=tolerance, atol=tolerance
            )
    assert read == sum(parameter[0].numel() * 4 for parameter in module.parameters())


def test_a_large_dense_weight_of_the_same_dtype_stays_in_the_mapped_file(directory: Path, tmp_path: Path) -> None:
    wide_name = "model.embed_tokens.weight"
    wide = {wide_name: torch.randn(8192, 64), "lm_head.weight": torch.randn(8192, 64)}
    path = edited(tiny_models.build("llama", directory), tmp_path / "wide", lambda tensors: tensors.update(wide))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": len(wide[wide_name])}))
    for dtype, mapped in (("float32", True), ("bfloat16", False)):
        model, loader = loaded(path, dtype, 0)
        same = model.module.get_parameter(wide_name).data_ptr() == loader.checkpoint.read(wide_name).data_ptr()
        assert same is mapped


def test_a_tied_head_is_the_embedding(directory: Path) -> None:
    model, _ = loaded(tiny_models.build("qwen3", directory), "float32", 0)
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight


def test_missing_keys_are_named(directory: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.self_attn.q_proj.weight"]
        del tensors["model.layers.1.mlp.experts.4.up_proj.weight"]

    path = edited(tiny_models.build("qwen2_moe", directory), tmp_path / "bad", change)
    with pytest.raises(ValueError, match=r"2 missing: model\.layers\.0\.self_attn\.q_proj\.weight") as caught:
        WeightLoader(MoEModel(path, "float32"), CPU)
    assert "model.layers.1.mlp.experts.gate_up_proj of expert 4, part 2 of 2" in str(caught.value)


def test_unexpected_and_mismatched_keys_are_named(directory: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.surprise.weight"] = torch.zeros(1)
        tensors["model.norm.weight"] = torch.zeros(63)
        tensors["model.layers.1.mlp.experts.4.up_proj.weight"] = torch.zeros(2, 64)

    path = edited(tiny_models.build("qwen2_moe", directory), tmp_path / "bad", change)
    with pytest.raises(ValueError, match=r"1 unexpected: model\.layers\.0\.surprise\.weight") as caught:
        WeightLoader(MoEModel(path, "float32"), CPU)
    assert "model.norm.weight is [63], the model has [64]" in str(caught.value)
    assert "model.layers.1.mlp.experts.4.up_proj.weight is [2, 64], the model has [48, 64]" in str(caught.value)


@pytest.mark.parametrize(
    "scheme",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"},
    ],
)
def test_a_checkpoint_quantized_in_another_way_is_refused(scheme, directory: Path, tmp_path: Path) -> None:
    path = edited(tiny_models.build("llama", directory), tmp_path / "bad", lambda tensors: None)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))
    with pytest.raises(
        ValueError, match=rf"quantized by quant_method='{scheme['quant_method']}'.*fp8 with block scales"
    ):
        WeightLoader(MoEModel(path, "float32"), CPU)


def test_scales_that_do_not_fit_are_named(directory: Path, tmp_path: Path) -> None:
    path = tiny_models.quantized(tiny_models.build("qwen2_moe", directory), tmp_path)[0]
    scale, alone = "model.layers.1.mlp.experts.2.up_proj.weight_scale_inv", "model.layers.0.self_attn.q_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[scale] = tensors[scale][:1]
        del tensors[f"{alone}_scale_inv"]
        tensors["model.layers.1.nonsense_scale_inv"] = torch.ones(1)

    with pytest.raises(ValueError, match=r"1 unexpected: model\.layers\.1\.nonsense_scale_inv") as caught:
        WeightLoader(MoEModel(edited(path, tmp_path / "bad", change), "float32"), CPU)
    assert f"{scale} is [1, 2], blocks of [32, 32] need [2, 2]" in str(caught.value)
    assert f"{alone} is torch.float8_e4m3fn without scales" in str(caught.value)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        Checkpoint(tmp_path)
