"""FP8 checkpoints: the same numbers as a checkpoint that holds them unquantised, in every tensor and in the logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.engine.cuda.streaming import StreamingLoader
from actors.engine.experts.slots import StackedSlots
from actors.engine.model import MoEModel
from actors.engine.quantization import Blocks, blocks_of, dequantize, quantize
from actors.engine.weights import WeightLoader

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32))
def test_a_number_is_its_blocks_scale_times_what_is_stored(
    rows: int, columns: int, height: int, width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = Blocks(height, width)
    weight = torch.randn(2, rows, columns, generator=generator) * 10 ** torch.randn(2, rows, 1, generator=generator)
    stored, scale = quantize(weight, blocks)
    assert list(scale.shape) == blocks.grid(weight.shape)
    numbers = dequantize(stored, scale, blocks, torch.float64)
    for _ in range(5):
        e, i, j = (int(torch.randint(size, (), generator=generator)) for size in weight.shape)
        expected = stored[e, i, j].float() * scale[e, i // height, j // width]
        assert numbers[e, i, j] == expected
        largest = weight[e, i // height * height :][:height, j // width * width :][:, :width].abs().max()
        # e4m3 has 3 bits behind the point: half a unit of the last is 1/16; below 2^-6 of 448 its steps are even.
        assert abs(numbers[e, i, j] - weight[e, i, j]) <= max(abs(weight[e, i, j]) / 16, largest * 2**-10 / 448) * 1.001


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3"])
@pytest.mark.parametrize("kind", ["mapped", "streamed"])
def test_every_weight_is_that_of_the_unquantized_checkpoint(
    kind: str, family: str, dtype: str, directory: Path, tmp_path: Path
) -> None:
    stored, same = tiny_models.quantized(tiny_models.build(family, directory), tmp_path)
    assert blocks_of(stored) == Blocks(32, 32)
    assert blocks_of(same) is None
    device = DEVICE if kind == "streamed" else CPU
    loaded = []
    for path, where, loader in (
        (stored, device, StreamingLoader if kind == "streamed" else WeightLoader),
        (same, CPU, WeightLoader),
    ):
        model = MoEModel(path, dtype)
        model.allocate_slots(2, where, 16, 1)
        for layer, name in enumerate(model.experts_names):
            if not isinstance(model.experts.layers[layer], StackedSlots):
                model.experts.layers[layer] = StackedSlots(model.module.get_submodule(name), 2, where)
        made = loader(model, where)
        with torch.inference_mode():
            made.load_dense()
            made.load_experts([[3, 1]] * model.summary.num_moe_layers)
            for layer in range(model.summary.num_moe_layers):
                model.experts.layers[layer].put(0, made.make_expert(layer, 2))
        loaded.append(dict(model.module.named_parameters()))
    found, expected = loaded
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].to(CPU), tensor), name
