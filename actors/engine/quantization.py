"""Block-scaled FP8 checkpoints, as DeepSeek-V3 and Qwen3 are published: what their configuration says, and the numbers.

A weight ``[rows, columns]`` is stored as ``float8_e4m3fn``; beside ``<key>`` stands ``<key>_scale_inv``, float32
``[ceil(rows / block rows), ceil(columns / block columns)]``, and a number is the product of both (DeepSeek-V3 technical
report, arXiv 2412.19437, section 3.3; the name's "inv" means that it multiplies). Stacked experts have an axis more.
Weights without a scale beside them are not quantised.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

SCALE = "_scale_inv"


class Blocks(NamedTuple):
    """The block of a weight that has one scale."""

    rows: int
    columns: int

    def grid(self, shape: tuple[int, ...] | list[int]) -> list[int]:
        """Shape of the scales of a weight of ``shape``, ``[..., rows, columns]``."""
        *stacked, rows, columns = shape
        return [*stacked, -(-rows // self.rows), -(-columns // self.columns)]


def blocks_of(directory: str | Path) -> Blocks | None:
    """How the checkpoint in ``directory`` is quantised, None if it is not. Raises ValueError for another scheme."""
    config = json.loads(Path(directory, "config.json").read_text())
    given: dict[str, Any] | None = config.get("quantization_config") or config.get("text_config", {}).get(
        "quantization_config"
    )
    if given is None:
        return None
    shape = given.get("weight_block_size")
    known = given.get("quant_method") == "fp8" and given.get("fmt", "e4m3") == "e4m3"
    if not known or not isinstance(shape, list) or len(shape) != 2 or given.get("activation_scheme") == "static":
        raise ValueError(
            f"{directory} is quantized by quant_method={given.get('quant_method')!r}, weight_block_size={shape!r}, "
            f"activation_scheme={given.get('activation_scheme')!r}; of quantized checkpoints those in fp8 with block "
            "scales and dynamic activations can be served, or one in bfloat16, float16 or float32"
        )
    return Blocks(*shape)


def dequantize(weight: torch.Tensor, scale: torch.Tensor, blocks: Blocks, dtype: torch.dtype) -> torch.Tensor:
    """``weight [..., rows, columns]`` times its blocks' ``scale``, computed in float32, rounded to ``dtype`` once."""
    rows, columns = weight.shape[-2:]
    spread = scale.float().repeat_interleave(blocks.columns, -1)[..., :columns]
    spread = spread.repeat_interleave(blocks.rows, -2)[..., :rows, :]
    return spread.mul_(weight.float()).to(dtype)


def quantize(weight: torch.Tensor, blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest ``(weight, scale)`` in FP8: a block's largest magnitude becomes the largest number there is."""
    import torch  # whoever only asks how a checkpoint is quantised does without

    rows, columns = weight.shape[-2:]
    grid = blocks.grid(weight.shape)
    padded = weight.new_zeros(
        *weight.shape[:-2], grid[-2] * blocks.rows, grid[-1] * blocks.columns, dtype=torch.float32
    )
    padded[..., :rows, :columns] = weight
    tiles = padded.unflatten(-1, (grid[-1], blocks.columns)).unflatten(-3, (grid[-2], blocks.rows))
    scale = tiles.abs().amax((-3, -1)) / torch.finfo(torch.float8_e4m3fn).max
    scale = torch.where(scale > 0, scale, 1.0)
    scaled = (tiles / scale[..., :, None, :, None]).flatten(-4, -3).flatten(-2, -1)[..., :rows, :columns]
    return scaled.to(torch.float8_e4m3fn).contiguous(), scale
