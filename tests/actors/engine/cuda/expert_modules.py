"""Experts modules of the kinds that transformers has, with random weights, and their results in float64."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from actors.engine.quantization import SCALE, Blocks, dequantize, quantize


class Module(torch.nn.Module):
    """``count`` experts. ``kind`` is one of ``KINDS``."""

    def __init__(self, kind: str, count: int, hidden: int, inner: int, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        self.is_transposed = kind in ("gpt-oss", "transposed")
        self.has_bias = kind in ("gpt-oss", "biased")
        self.has_gate = kind != "ungated"
        self.kind = kind
        if kind == "gpt-oss":
            self.limit, self.alpha = 1.5, 1.702
        generator = torch.Generator().manual_seed(seed)
        columns = inner if kind == "ungated" else 2 * inner
        for name, out, into in (
            ("gate_up_proj" if self.has_gate else "up_proj", columns, hidden),
            ("down_proj", hidden, inner),
        ):
            weight = torch.randn(count, out, into, generator=generator) / into**0.5
            weight = weight.transpose(1, 2).contiguous() if self.is_transposed else weight
            setattr(self, name, torch.nn.Parameter(weight.to(dtype), requires_grad=False))
            if self.has_bias:
                bias = torch.randn(count, out, generator=generator)
                setattr(self, f"{name}_bias", torch.nn.Parameter(bias.to(dtype), requires_grad=False))

    def _apply_gate(self, inner: torch.Tensor) -> torch.Tensor:
        if self.kind == "gpt-oss":
            gate, up = inner[..., ::2].clamp(max=self.limit), inner[..., 1::2].clamp(-self.limit, self.limit)
            return (up + 1) * gate * torch.sigmoid(self.alpha * gate)
        gate, up = inner.chunk(2, dim=-1)
        return (torch.nn.functional.gelu(gate) if self.kind == "gelu" else torch.nn.functional.silu(gate)) * up

    def act_fn(self, inner: torch.Tensor) -> torch.Tensor:
        return torch.relu(inner).square()

    def of(self, experts: list[int]) -> Module:
        """These experts only, NaN for -1."""
        other = Module(self.kind, len(experts), self.down_proj.shape[1], 1, self.down_proj.dtype)
        for name, parameter in list(self.named_parameters()):
            rows = parameter[experts].clone()
            rows[[expert < 0 for expert in experts]] = float("nan")
            setattr(other, name, torch.nn.Parameter(rows, requires_grad=False))
        return other

    def reference(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Float64 ``[T, H]``; an id of -1 counts for nothing."""
        output = torch.zeros(hidden.shape, dtype=torch.float64)
        for row, (chosen, factors) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
            for expert, factor in zip(chosen, factors, strict=True):
                if expert >= 0:
                    inner = self._linear("gate_up_proj" if self.has_gate else "up_proj", expert, hidden[row].double())
                    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
                    output[row] += factor * self._linear("down_proj", expert, inner)
        return output

    def _linear(self, name: str, expert: int, row: torch.Tensor) -> torch.Tensor:
        weight = getattr(self, name)[expert].double()
        result: torch.Tensor = (weight.t() if self.is_transposed else weight) @ row
        return result + getattr(self, f"{name}_bias")[expert].double() if self.has_bias else result


class Quantized(Module):
    """Experts of kind ``silu`` in FP8, blocks of different scales; ``hidden`` and ``inner`` are whole blocks."""

    BLOCKS = Blocks(128, 128)

    def __init__(self, count: int, hidden: int, inner: int, seed: int = 0) -> None:
        super().__init__("silu", count, hidden, inner, torch.float32, seed)
        for name, parameter in list(self.named_parameters()):
            outputs, width = parameter.shape[1:]
            spread = torch.logspace(-0.5, 0.5, outputs)[:, None] * torch.logspace(0.5, -0.5, width)
            for leaf, tensor in zip((name, name + SCALE), quantize(parameter * spread, self.BLOCKS), strict=True):
                setattr(self, leaf, torch.nn.Parameter(tensor, requires_grad=False))

    def put(self, other: Quantized, experts: Sequence[int]) -> None:
        """Slot by slot those of ``other``, NaN for -1."""
        for name, parameter in self.named_parameters():
            for slot, expert in enumerate(experts):
                nothing = torch.full_like(parameter[slot], float("nan"), dtype=torch.float32)
                parameter[slot].copy_(getattr(other, name)[expert] if expert >= 0 else nothing)

    def _linear(self, name: str, expert: int, row: torch.Tensor) -> torch.Tensor:
        weight, scale = (getattr(self, leaf)[expert] for leaf in (name, name + SCALE))
        return dequantize(weight, scale, self.BLOCKS, torch.float64) @ row


KINDS = ("silu", "gpt-oss", "transposed", "biased", "ungated", "gelu")


def slots(module: Any, device: torch.device) -> Any:
    """What ``CudaExperts`` wants of a layer's slots."""
    return SimpleNamespace(module=module.to(device))
