"""The physical expert slots of one MoE layer: room for weights, and their product with rows.

``module`` is the model's experts module. It keeps its settings and its activation; its stacked parameters stay on the
meta device, or become the slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.functional import linear

from actors.engine import cpu
from actors.engine.quantization import SCALE, Blocks, dequantize, quantize

Group = tuple[int, int, int]
"""Rows ``start .. end - 1`` belong to a slot: ``(start, end, slot)``."""


class ExpertSlots(Protocol):
    def make(self, weights: Mapping[str, torch.Tensor]) -> Any:
        """One expert, ready to be put into a slot: its rows of the stacked parameters, by their names."""

    def put(self, slot: int, expert: Any) -> None:
        """Put what ``make`` made into ``slot``, between two steps; takes next to no time."""

    def compute(self, rows: torch.Tensor, groups: Sequence[Group]) -> torch.Tensor:
        """The experts in their slots applied to ``rows [n, hidden]``; ``[n, hidden]``.

        ``groups`` cover the rows in order, at least one row each. Raises LookupError if one's slot is empty.
        """


def allocate(
    module: torch.nn.Module, num_slots: int, dtype: torch.dtype, device: torch.device, blocks: Blocks | None = None
) -> ExpertSlots:
    """Empty slots of the kind that suits the device.

    With ``blocks``, those of an FP8 checkpoint, weights stay as they are stored, if the device can compute with them.
    """
    if blocks is not None and stays_quantized(module, device, blocks):
        return Fp8Slots(module, num_slots, device, blocks)
    if not cpu.supported(dtype, device):
        return StackedSlots(module, num_slots, device)
    return PanelSlots(module, num_slots) if dtype == torch.float32 else PackedSlots(module, num_slots)


class Made(NamedTuple):
    """An expert's rows on the device; complete once ``written`` has happened (None: already)."""

    weights: Mapping[str, torch.Tensor]
    written: torch.cuda.Event | None


class StackedSlots:
    """The module's parameters with ``num_slots`` rows in place of one per expert. For any device."""

    def __init__(self, module: Any, num_slots: int, device: torch.device) -> None:
        self.module = module
        self._cuda = device.type == "cuda"
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            slots = torch.empty(num_slots, *parameter.shape[1:], dtype=parameter.dtype, device=device)
            setattr(module, leaf, torch.nn.Parameter(slots, requires_grad=False))

    def rows(self, slot: int) -> dict[str, torch.Tensor]:
        """Views of a slot, by parameter: writing them fills it."""
        return {leaf: parameter[slot] for leaf, parameter in self.module.named_parameters(recurse=False)}

    def room(self) -> dict[str, torch.Tensor]:
        """As ``rows``, but new tensors outside the slots, uninitialised."""
        parameters = self.module.named_parameters(recurse=False)
        return {leaf: parameter.new_empty(parameter.shape[1:]) for leaf, parameter in parameters}

    @property
    def slot_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.room().values())

    def make(self, weights: Mapping[str, torch.Tensor]) -> Made:
        """``weights`` may still be being written by the current stream, which need not be the one ``put`` runs on."""
        event = None
        if self._cuda:
            event = torch.cuda.Event()
            event.record()
        return Made(weights, event)

    def put(self, slot: int, expert: Made) -> None:
        if expert.written is not None:
            torch.cuda.current_stream().wait_event(expert.written)
        for leaf, row in self.rows(slot).items():
            tensor = expert.weights[leaf]
            row.copy_(tensor)
            if expert.written is not None:
                tensor.record_stream(torch.cuda.current_stream())  # its memory is free once this copy is done

    def compute(self, rows: torch.Tensor, groups: Sequence[Group]) -> torch.Tensor:
        return torch.cat([self._compute_one(rows[start:end], slot) for start, end, slot in groups])

    def _compute_one(self, rows: torch.Tensor, slot: int) -> torch.Tensor:
        return self._linear(_activate(self.module, self._linear(rows, _up(self.module), slot)), "down_proj", slot)

    def _linear(self, rows: torch.Tensor, name: str, slot: int) -> torch.Tensor:
        weight = getattr(self.module, name)[slot]
        bias = getattr(self.module, f"{name}_bias")[slot] if self.module.has_bias else None
        return linear(rows, weight.t() if self.module.is_transposed else weight, bias)


def stays_quantized(module: torch.nn.Module, device: torch.device, blocks: Blocks) -> bool:
    """Whether ``device`` can compute an experts module with weights in FP8 and a scale for each of ``blocks``."""
    if device.type != "cuda":
        return False
    from actors.engine.cuda import fp8

    return blocks == (fp8.BLOCK, fp8.BLOCK) and fp8.suits(module)


class Fp8Slots(StackedSlots):
    """Stacked slots in FP8: beside each weight parameter ``[slots, rows, columns]`` a float32 one with its scales.

    Sizes are whole blocks, so that the scales of a weight's halves follow each other as the halves do. ``compute`` is
    for steps whose rows the host routes; it dequantises every slot that it uses.
    """

    def __init__(self, module: Any, num_slots: int, device: torch.device, blocks: Blocks) -> None:
        super().__init__(module, 0, device)
        self.blocks = blocks
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            shape = num_slots, *parameter.shape[1:]
            for name, size, dtype in (
                (leaf, shape, torch.float8_e4m3fn),
                (leaf + SCALE, blocks.grid(shape), torch.float32),
            ):
                setattr(module, name, torch.nn.Parameter(torch.empty(size, dtype=dtype, device=device), False))

    def make(self, weights: Mapping[str, torch.Tensor]) -> Made:
        """``weights`` as they are stored, with their scales; or numbers, which are quantised here."""
        stored: dict[str, torch.Tensor] = {}
        for leaf, tensor in weights.items():
            if leaf.endswith(SCALE) or tensor.dtype == torch.float8_e4m3fn:
                stored[leaf] = tensor
            else:
                stored[leaf], stored[leaf + SCALE] = quantize(tensor, self.blocks)
        return super().make(stored)

    def _linear(self, rows: torch.Tensor, name: str, slot: int) -> torch.Tensor:
        weight, scale = (getattr(self.module, leaf)[slot] for leaf in (name, name + SCALE))
        return linear(rows, dequantize(weight, scale, self.blocks, rows.dtype))


class PackedSlots:
    """Two packed layers per slot. For CPUs in bfloat16."""

    def __init__(self, module: Any, num_slots: int) -> None:
        self.module = module
        self._slots: list[tuple[Any, Any] | None] = [None] * num_slots

    def make(self, weights: Mapping[str, torch.Tensor]) -> tuple[Any, Any]:
        from actors.engine.cpu.linear import Linear

        up, down = (_given(self.module, weights, name) for name in (_up(self.module), "down_proj"))
        return Linear([up[0]], [up[1]]), Linear([down[0]], [down[1]])

    def put(self, slot: int, expert: tuple[Any, Any]) -> None:
        self._slots[slot] = expert

    def compute(self, rows: torch.Tensor, groups: Sequence[Group]) -> torch.Tensor:
        return torch.cat([self._compute_one(rows[start:end], slot) for start, end, slot in groups])

    def _compute_one(self, rows: torch.Tensor, slot: int) -> torch.Tensor:
        filled = self._slots[slot]
        if filled is None:
            raise _empty(slot)
        up, down = filled
        output: torch.Tensor = down(_activate(self.module, up(rows)))
        return output


class PanelSlots:
    """All slots' weights side by side, so that one product serves all rows of a layer. For CPUs in float32."""

    def __init__(self, module: Any, num_slots: int) -> None:
        self.module = module
        self._up, self._down = self._room(_up(module), num_slots), self._room("down_proj", num_slots)
        self._filled: set[int] = set()
        self._activate = _activation(module)

    @property
    def panels(self) -> tuple[Any, Any]:
        """What ``compute`` multiplies by before and after the activation."""
        return self._up, self._down

    @property
    def gated(self) -> bool:
        """Whether that activation is the SiLU of the first half times the second."""
        from actors.engine.cpu.kernels import silu_and_mul

        return self._activate is silu_and_mul

    def check(self, slots: Set[int]) -> None:
        """Raises LookupError if one of ``slots`` is empty."""
        for slot in slots - self._filled:
            raise _empty(slot)

    def make(self, weights: Mapping[str, torch.Tensor]) -> tuple[Any, Any]:
        made = self._room(_up(self.module), 1), self._room("down_proj", 1)
        for panels, name in zip(made, (_up(self.module), "down_proj"), strict=True):
            panels.fill(0, *_given(self.module, weights, name))
        return made

    def put(self, slot: int, expert: tuple[Any, Any]) -> None:
        self._up.put(slot, expert[0])
        self._down.put(slot, expert[1])
        self._filled.add(slot)

    def compute(self, rows: torch.Tensor, groups: Sequence[Group]) -> torch.Tensor:
        self.check({slot for _, _, slot in groups})
        return self._down.multiply(self._activate(self._up.multiply(rows, groups)), groups)

    def _room(self, name: str, count: int) -> Any:
        from actors.engine.cpu.panels import Panels

        shape = self.module.get_parameter(name).shape[1:]
        return Panels(count, *(reversed(shape) if self.module.is_transposed else shape))


def _up(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _given(module: Any, weights: Mapping[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An expert's weight ``[out, in]`` and its bias."""
    weight = weights[name].t() if module.is_transposed else weights[name]
    return weight, weights[f"{name}_bias"] if module.has_bias else None


def _empty(slot: int) -> LookupError:
    return LookupError(f"slot {slot} is empty, but the expert map sends rows there")


def _activation(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The module's own, or the compiled SiLU gate when that gives the same."""
    from actors.engine.cpu.fuse import agree
    from actors.engine.cpu.kernels import silu_and_mul

    sample = torch.linspace(-4, 4, 64).view(2, 32)
    if module.has_gate and agree(module._apply_gate(sample), silu_and_mul(sample)):
        return silu_and_mul
    return lambda inner: _activate(module, inner)


def _activate(module: Any, inner: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    return output
