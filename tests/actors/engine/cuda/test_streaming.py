"""Checkpoints streamed to the device: the same weights as memory-mapped ones, whatever the sizes of the pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from actors.engine.checkpoint import Checkpoint
from actors.engine.cuda import upload as uploading
from actors.engine.cuda.streaming import StreamingLoader
from actors.engine.cuda.upload import Upload, upload
from actors.engine.experts.map import EMPTY_SLOT
from actors.engine.experts.slots import StackedSlots
from actors.engine.model import MoEModel
from actors.engine.weights import WeightLoader, open_loader

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tensors of a test take several pieces, the last one not whole."""
    monkeypatch.setattr(uploading, "PIECE", 1000)


def with_stacked_slots(path: Path, dtype: str, num_slots: int, device: torch.device = DEVICE) -> MoEModel:
    model = MoEModel(path, dtype)
    model.allocate_slots(num_slots, device, 16, 1)
    for layer, name in enumerate(model.experts_names):
        module = model.module.get_submodule(name)
        if not isinstance(model.experts.layers[layer], StackedSlots):
            model.experts.layers[layer] = StackedSlots(module, num_slots, device)
        for parameter in module.parameters():
            parameter.fill_(float("nan"))
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_weights_are_those_of_the_mapped_file(family: str, dtype: str, directory: Path) -> None:
    path = tiny_models.build(family, directory)
    model, other = with_stacked_slots(path, dtype, 3), with_stacked_slots(path, dtype, 3, torch.device("cpu"))
    streaming, mapped = StreamingLoader(model, DEVICE), WeightLoader(other, torch.device("cpu"))
    slots = [[5, EMPTY_SLOT, 2]] * model.summary.num_moe_layers
    for loader in (streaming, mapped):
        with torch.inference_mode():
            loader.load_dense()
            loader.load_experts(slots)
    assert streaming.bytes_read == mapped.bytes_read
    expected = dict(other.module.named_parameters()) | dict(other.module.named_buffers())
    found = dict(model.module.named_parameters()) | dict(model.module.named_buffers())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].device.type == DEVICE.type
        assert found[name].dtype == tensor.dtype
        if name.rpartition(".")[0] in model.experts_names:
            assert found[name][1].isnan().all(), "an empty slot was written"
            torch.testing.assert_close(found[name].cpu()[[0, 2]], tensor[[0, 2]], rtol=0, atol=0)
        else:
            torch.testing.assert_close(found[name].cpu(), tensor, rtol=0, atol=0)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_an_expert_made_beside_the_loop_is_what_loading_gives(family: str, load_format: str, directory: Path) -> None:
    path = tiny_models.build(family, directory)
    model = with_stacked_slots(path, "bfloat16", 2)
    loader = StreamingLoader(model, DEVICE) if load_format == "auto" else open_loader(model, DEVICE, load_format)
    with torch.inference_mode():
        loader.load_expert(1, 4, 0)
    requests = [loader.request_expert(1, expert) for expert in (3, 4)]
    made = [request.result(timeout=60) for request in requests]
    with torch.inference_mode():
        model.experts.layers[1].put(1, made[1])
    for parameter in model.module.get_submodule(model.experts_names[1]).parameters():
        assert parameter[0].isfinite().all()
        assert torch.equal(parameter[0], parameter[1])


@pytest.mark.parametrize("load_format", ["auto", "dummy", "mapped"])
def test_progress_ends_at_the_bytes_of_weights_on_the_device(load_format: str, directory: Path) -> None:
    path = tiny_models.build("qwen2_moe", directory)
    model = with_stacked_slots(path, "bfloat16", 2)
    if load_format == "dummy":
        loader = open_loader(model, DEVICE, load_format)
    else:
        loader = (StreamingLoader if load_format == "auto" else WeightLoader)(model, DEVICE)
    told: list[tuple[int, int]] = []
    slots = [[0, 1], [3, EMPTY_SLOT]]
    loader.watch(lambda done, total: told.append((done, total)), slots)
    with torch.inference_mode():
        loader.load_dense()
        dense_done = told[-1] if told else (0, 0)
        loader.load_experts(slots)
    parameters = dict(model.module.named_parameters())
    sizes = {name: parameter.numel() * parameter.element_size() for name, parameter in parameters.items()}
    experts = [name for name in sizes if name.rpartition(".")[0] in model.experts_names]
    expected = sum(sizes.values()) - sum(sizes[name] // 2 for name in experts if ".3." in name)
    assert told[-1] == (expected, expected)
    assert dense_done[0] < expected
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {total for _, total in told} == {expected}


def test_a_file_cut_short_is_named(directory: Path, tmp_path: Path) -> None:
    whole = next(iter(sorted(tiny_models.build("mixtral", directory).glob("*.safetensors"))))
    key = next(iter(load_file(whole)))
    (tmp_path / "model.safetensors").write_bytes(whole.read_bytes()[:-100_000])
    checkpoint = Checkpoint(tmp_path)
    regions = [checkpoint.region(key) for key in checkpoint.keys()]  # noqa: SIM118
    items = [Upload(region, torch.empty(region.shape, dtype=region.dtype, device=DEVICE)) for region in regions]
    assert key in checkpoint.keys()  # noqa: SIM118
    with pytest.raises(OSError, match=r"model\.safetensors ends at byte \d+, in the middle of a tensor"):
        upload(items, DEVICE, lambda size: None)


def test_a_conversion_runs_on_the_device_and_nothing_is_nothing(directory: Path) -> None:
    upload([], DEVICE, lambda size: None)
    checkpoint = Checkpoint(tiny_models.build("llama", directory))
    key = "model.norm.weight"
    twice = torch.full((64,), float("nan"), device=DEVICE)

    def finish(raw: torch.Tensor) -> None:
        assert raw.device.type == DEVICE.type
        twice.copy_(raw * 2)

    upload([Upload(checkpoint.region(key), twice, finish)], DEVICE, lambda size: None)
    assert torch.equal(twice.cpu(), checkpoint.read(key) * 2)
