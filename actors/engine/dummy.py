"""Random weights in place of a checkpoint's, for measurements: a directory with ``config.json`` is enough."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from actors.engine.experts.slots import StackedSlots
from actors.engine.loader import Loader
from actors.engine.model import MoEModel

# Standard deviation of a projection's outputs when its inputs have one of 1. Norms before each projection keep the
# latter, so the residual stream grows with the square root of the depth and nothing overflows.
_GAIN = 1.0
# Logits that far apart let sampling choose as it does among a trained model's.
_HEAD_GAIN = 4.0


class DummyLoader(Loader):
    """Draws each tensor on the device by ``seed``, its name and, for experts, the expert's number.

    So all ranks, and those that join later, draw the same weights whatever slot an expert stands in. This holds on
    devices of one model: a generator's numbers differ between CPU and GPU, and between GPUs of different sizes.
    """

    def __init__(self, model: MoEModel, device: torch.device, seed: int) -> None:
        super().__init__(model, device)
        self.seed = seed
        self._generator = torch.Generator(device)
        self._drawing = threading.Lock()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._head = model.module.get_output_embeddings()
        self._modules: list[Any] = [model.module.get_submodule(name) for name in model.experts_names]

    def load_expert(self, layer: int, expert: int, slot: int) -> None:
        slots = self.model.experts.layers[layer]
        if type(slots) is StackedSlots:  # in place: no copy
            self._fill_expert(layer, expert, slots.rows(slot))
        else:
            slots.put(slot, slots.make(self._expert(layer, expert)))

    def make_expert(self, layer: int, expert: int) -> Any:
        with self._drawing, torch.cuda.stream(self._stream):
            return super().make_expert(layer, expert)

    def _parameter(self, names: Sequence[str], dtype: torch.dtype) -> torch.Tensor:
        name, shape = names[0], self.model.module.get_parameter(names[0]).shape
        owners = [self.model.module.get_submodule(name.rpartition(".")[0]) for name in names]
        if self._head in owners:  # an embedding tied to it included
            return self._draw(name, shape, dtype, 0.0, _HEAD_GAIN * shape[-1] ** -0.5)
        if isinstance(owners[0], torch.nn.Embedding):
            return self._draw(name, shape, dtype, 0.0, 1.0)
        if len(shape) == 1:  # a norm's weight, a bias, sinks
            return self._draw(name, shape, dtype, *((1.0, 0.1) if name.endswith("weight") else (0.0, 0.2)))
        return self._draw(name, shape, dtype, 0.0, _GAIN * shape[-1] ** -0.5)

    def _buffer(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        buffer = self.model.module.get_buffer(name)
        if not buffer.is_floating_point():
            return torch.zeros(buffer.shape, dtype=buffer.dtype, device=self.device)
        return self._draw(name, buffer.shape, dtype, 0.0, 0.2)

    def _expert(self, layer: int, expert: int) -> Mapping[str, torch.Tensor]:
        weights = {
            leaf: torch.empty(shape[1:], dtype=self.model.dtype, device=self.device)
            for leaf, shape in self.model.experts_shapes[layer].items()
        }
        self._fill_expert(layer, expert, weights)
        return weights

    def _fill_expert(self, layer: int, expert: int, weights: Mapping[str, torch.Tensor]) -> None:
        for leaf, tensor in weights.items():
            if tensor.dim() == 1:
                deviation = 0.2
            else:
                deviation = _GAIN * tensor.shape[0 if self._modules[layer].is_transposed else 1] ** -0.5
            self._fill(f"{self.model.experts_names[layer]}.{leaf}[{expert}]", tensor, 0.0, deviation)

    def _draw(self, name: str, shape: torch.Size, dtype: torch.dtype, mean: float, deviation: float) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        self._fill(name, tensor, mean, deviation)
        return tensor

    def _fill(self, name: str, tensor: torch.Tensor, mean: float, deviation: float) -> None:
        """Normal numbers that depend on the seed and ``name``."""
        digest = hashlib.blake2b(f"{self.seed}:{name}".encode(), digest_size=7).digest()
        self._generator.manual_seed(int.from_bytes(digest, "big"))
        tensor.normal_(mean, deviation, generator=self._generator)
        size = tensor.numel() * tensor.element_size()
        self.bytes_read += size
        self._advance(size)
