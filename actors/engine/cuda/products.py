"""The weights of one MoE layer on a GPU, as the kernels of its two products take them."""

from __future__ import annotations

from typing import Any

import torch

from actors.engine.cuda import fp8, gemm
from actors.engine.cuda.one_row import suits_row
from actors.engine.quantization import SCALE


class Products:
    """One layer's weights for rows of ``dtype``, and what its module does between the products.

    ``up_columns`` are those of the first product, ``activated`` those of the second one's input. ``gate`` is the kind
    that ``gemm.expand`` applies, with ``limit`` and ``alpha``; 0: the module does it, in ``activate``. ``pairwise``:
    whether ``gemv.py`` can compute both. ``quantized``: weights are in FP8, and may be widened for a step into a room
    of ``widest`` numbers, which all layers may share.
    """

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        if getattr(module, "has_post_expert_norm", False):
            raise ValueError(f"{type(module).__name__} has a norm behind its experts, which ours lack")
        self.module = module
        self.transposed, self.biased = bool(module.is_transposed), bool(module.has_bias)
        name = "gate_up_proj" if module.has_gate else "up_proj"
        self.up, self.down = getattr(module, name), module.down_proj
        self.quantized = self.up.dtype == torch.float8_e4m3fn
        self.widest = max(self.up.numel(), self.down.numel()) if self.quantized else 0
        # Weights in FP8 have scales where others may have a bias.
        beside = SCALE if self.quantized else "_bias"
        self.up_beside: Any = getattr(module, name + beside, None)
        self.down_beside: Any = getattr(module, "down_proj" + beside, None)
        self.up_columns = self.up.shape[2 if self.transposed else 1]
        self.activated = self.down.shape[1 if self.transposed else 2]
        self.limit, self.alpha = float(getattr(module, "limit", 0.0)), float(getattr(module, "alpha", 0.0))
        self.gate = self._recognise()
        self._tables: dict[tuple[int, torch.Size, gemm.Shape], Any] = {}
        # float32 takes tiles always, so that a result does not depend on how many others there are.
        narrow = all(suits_row(dtype, weight.shape[2]) for weight in (self.up, self.down))
        self.pairwise = narrow and self.gate == gemm.SILU and not self.transposed

    def activate(self, inner: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.module._apply_gate(inner) if self.module.has_gate else self.module.act_fn(inner)
        return output.contiguous()

    def first(self, shape: gemm.Shape, room: torch.Tensor | None, slots: int) -> tuple[Any, dict[str, bool]]:
        """How ``expand`` gets its weights in tiles of this shape: those of ``slots`` widened if there is ``room``."""
        if self.quantized and room is None:
            return self.up, {}
        weight = self.up if room is None else fp8.widened(self.up, self.up_beside, room, slots)
        table = self._described(weight, self.gate, shape)
        return table or weight, {"DESCRIBED": table is not None}

    def second(
        self, inner: torch.Tensor, shape: gemm.Shape, room: torch.Tensor | None, slots: int
    ) -> tuple[Any, Any, dict[str, bool]]:
        """How ``contract`` gets its rows, which stand in ``inner``, and its weights, likewise."""
        if self.quantized and room is None:
            return inner, self.down, {}
        weight = self.down if room is None else fp8.widened(self.down, self.down_beside, room, slots)
        table = self._described(weight, 0, shape)
        whole = inner.view(-1)[: inner.numel() // self.activated * self.activated].view(-1, self.activated)
        rows = table and gemm.described_rows(whole, shape)
        if rows is None:
            return inner, weight, {"DESCRIBED": False}
        return rows, table, {"DESCRIBED": True}

    def _described(self, weight: torch.Tensor, gate: int, shape: gemm.Shape) -> Any:
        """None where it can't or need not be; neither weights nor room ever move, so a descriptor stays good."""
        if not shape.described:
            return None
        key = weight.data_ptr(), weight.shape, shape
        if key not in self._tables:
            self._tables[key] = gemm.described_weights(weight, gate, shape, self.transposed)
        return self._tables[key]

    def _recognise(self) -> int:
        """The kind of gate that gives what the module's own gives, on random input; 0 if none does."""
        if not self.module.has_gate:
            return 0
        sample = 10 * torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).to(self.up.device)
        own = self.module._apply_gate(sample)
        first, second = sample.chunk(2, dim=-1)
        silu = torch.nn.functional.silu(first) * second
        gate, other = sample[:, ::2].clamp(max=self.limit), sample[:, 1::2].clamp(-self.limit, self.limit)
        clamped = gate * torch.sigmoid(self.alpha * gate) * (other + 1)
        for kind, result in ((gemm.SILU, silu), (gemm.CLAMPED, clamped)):
            if own.shape == result.shape and bool((own - result).abs().max() <= 1e-5 * own.abs().max()):
                return kind
        return 0
