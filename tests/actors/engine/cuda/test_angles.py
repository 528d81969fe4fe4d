"""Tables of rotary angles against the modules of transformers that they are made of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from actors.engine.cuda.angles import Angles, tabulate
from actors.engine.cuda.trial import Trial

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ORIGINAL, MOST = 256, 1024
SCALED = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LONG = {"long_factor": [2.0] * 16, "short_factor": [1.0] * 16}


def trial(dtype: torch.dtype) -> Trial:
    module = torch.nn.Linear(1, 1, device=DEVICE)
    return Trial(SimpleNamespace(module=module, dtype=dtype))  # type: ignore[arg-type]


def rotary(kind: str, **parameters: Any) -> Any:
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=MOST,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **parameters},
    )  # fmt: skip
    return LlamaRotaryEmbedding(config).to(DEVICE)


def check(table: Angles | None, module: Any, dtype: torch.dtype, below: int) -> None:
    assert table is not None
    for count in (1, 3, 300):
        positions = torch.randint(below, (1, count), dtype=torch.int32, device=DEVICE)
        own = module(torch.empty(1, count, 64, dtype=dtype, device=DEVICE), positions)
        found = table(torch.empty(0), positions)
        for one, other in zip(found, own, strict=True):
            assert one.dtype == other.dtype and one.is_contiguous() and torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_angles_that_depend_on_positions_only(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.engine.cuda.angles._AT_ONCE", 100)
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    modules = [
        rotary("default"), rotary("linear", factor=2.0), rotary("yarn", **SCALED), rotary("llama3", **SCALED, **llama3),
        GptOssRotaryEmbedding(GptOssConfig(head_dim=16)).to(DEVICE),
    ]  # fmt: skip
    for module in modules:
        check(tabulate(module, MOST, trial(dtype)), module, dtype, MOST)


@pytest.mark.parametrize("at_once", [100, ORIGINAL, 8192])
def test_angles_that_change_with_the_largest_position(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the length of the first training they do not, nor, of the dynamic kind, within the longest sequence."""
    monkeypatch.setattr("actors.engine.cuda.angles._AT_ONCE", at_once)
    for module, border in ((rotary("longrope", **SCALED, **LONG), ORIGINAL), (rotary("dynamic", **SCALED), MOST)):
        for positions in (border + 1, border + 40, 4 * border):
            assert tabulate(module, positions, trial(torch.float32)) is None
        check(tabulate(module, border, trial(torch.float32)), module, torch.float32, border)


def test_modules_of_another_kind() -> None:
    def complex_numbers(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return torch.polar(torch.ones(1, positions.shape[1], 4), positions[..., None].float().expand(-1, -1, 4))

    def of_widths(x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x.repeat(1, 1, 2)

    def by_layer(x: torch.Tensor, positions: torch.Tensor, layer_type: str) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x

    for module in (complex_numbers, of_widths, by_layer):
        assert tabulate(module, 64, trial(torch.float32)) is None
