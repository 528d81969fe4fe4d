"""The physical expert slots of one MoE layer: room for weights, and their product with rows.

``module`` is the model's experts module. It keeps its settings and its activation; its stacked parameters stay on the
meta device, or become the slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch.nn.functional import linear

from actors.engine import cpu


class ExpertSlots(Protocol):
    def make(self, weights: Mapping[str, torch.Tensor]) -> Any:
        """One expert, ready to be put into a slot: its rows of the stacked parameters, by their names."""

    def put(self, slot: int, expert: Any) -> None:
        """Put what ``make`` made into ``slot``, between two steps; takes next to no time."""

    def compute(self, rows: torch.Tensor, slot: int) -> torch.Tensor:
        """The expert in ``slot`` applied to ``rows [n, hidden]``; ``[n, hidden]``."""


def allocate(module: torch.nn.Module, num_slots: int, dtype: torch.dtype, device: torch.device) -> ExpertSlots:
    """Empty slots of the kind that suits the device."""
    if cpu.supported(dtype, device):
        return PackedSlots(module, num_slots, dtype)
    return StackedSlots(module, num_slots, device)


class StackedSlots:
    """The module's parameters with ``num_slots`` rows in place of one per expert. For any device."""

    def __init__(self, module: Any, num_slots: int, device: torch.device) -> None:
        self.module = module
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            slots = torch.empty(num_slots, *parameter.shape[1:], dtype=parameter.dtype, device=device)
            setattr(module, leaf, torch.nn.Parameter(slots, requires_grad=False))

    def make(self, weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return weights

    def put(self, slot: int, expert: Mapping[str, torch.Tensor]) -> None:
        for leaf, tensor in expert.items():
            self.module.get_parameter(leaf)[slot].copy_(tensor)

    def compute(self, rows: torch.Tensor, slot: int) -> torch.Tensor:
        up = "gate_up_proj" if self.module.has_gate else "up_proj"
        return self._linear(_activate(self.module, self._linear(rows, up, slot)), "down_proj", slot)

    def _linear(self, rows: torch.Tensor, name: str, slot: int) -> torch.Tensor:
        weight = getattr(self.module, name)[slot]
        bias = getattr(self.module, f"{name}_bias")[slot] if self.module.has_bias else None
        return linear(rows, weight.t() if self.module.is_transposed else weight, bias)


class PackedSlots:
    """Two packed layers per slot. For CPUs."""

    def __init__(self, module: Any, num_slots: int, dtype: torch.dtype) -> None:
        self.module = module
        self._slots: list[tuple[Any, Any] | None] = [None] * num_slots
        self._activate = _activation(module, dtype)

    def make(self, weights: Mapping[str, torch.Tensor]) -> tuple[Any, Any]:
        up = "gate_up_proj" if self.module.has_gate else "up_proj"
        return self._pack(weights, up), self._pack(weights, "down_proj")

    def put(self, slot: int, expert: tuple[Any, Any]) -> None:
        self._slots[slot] = expert

    def compute(self, rows: torch.Tensor, slot: int) -> torch.Tensor:
        filled = self._slots[slot]
        if filled is None:
            raise LookupError(f"slot {slot} is empty, but the expert map sends rows there")
        up, down = filled
        output: torch.Tensor = down(self._activate(up(rows)))
        return output

    def _pack(self, weights: Mapping[str, torch.Tensor], name: str) -> Any:
        from actors.engine.cpu.linear import Linear

        weight = weights[name].t() if self.module.is_transposed else weights[name]
        return Linear([weight], [weights[f"{name}_bias"] if self.module.has_bias else None])


def _activation(module: Any, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """The module's own, or the compiled SiLU gate (of float32) when that gives the same."""
    from actors.engine.cpu.fuse import agree, silu_and_mul

    sample = torch.linspace(-4, 4, 64).view(2, 32)
    if dtype == torch.float32 and module.has_gate and agree(module._apply_gate(sample), silu_and_mul(sample)):
        return silu_and_mul
    return lambda inner: _activate(module, inner)


def _activate(module: Any, inner: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    return output
