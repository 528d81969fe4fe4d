"""Filling a model that was built on the meta device; where the numbers come from is a subclass's business."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from actors.engine import library
from actors.engine.experts.map import EMPTY_SLOT
from actors.engine.experts.slots import StackedSlots
from actors.engine.model import MoEModel

Progress = Callable[[int, int], None]
_TELL_S = 1.0


class Loader(ABC):
    """Gives ``model`` its weights on ``device``: what is dense whole, of the experts those that are asked for.

    First ``load_dense``, then ``load_experts``; then ``make_expert`` may be called between steps, ``request_expert`` at
    any time. ``bytes_read`` counts the bytes that were handed out, in the dtype of their source.
    """

    bytes_read: int = 0

    def __init__(self, model: MoEModel, device: torch.device) -> None:
        self.model = model
        self.device = device
        self._progress: Progress | None = None
        self._done = self._total = 0
        self._told = 0.0
        self._worker: ThreadPoolExecutor | None = None

    def watch(self, progress: Progress, slots: Sequence[Sequence[int]]) -> None:
        """From now on ``progress(done, total)`` is told the bytes in their places, once a second and at the end.

        ``total`` is what ``load_dense`` and ``load_experts(slots)`` fill together.
        """
        module = self.model.module
        total = 0
        for names in self._tied_parameters():
            itemsize = library.dtype_of(module, names[0], self.model.dtype).itemsize
            total += module.get_parameter(names[0]).numel() * itemsize
        for row, stacked, shapes in zip(slots, self.model.experts.layers, self.model.experts_shapes, strict=True):
            if isinstance(stacked, StackedSlots):
                each = stacked.slot_bytes
            else:
                each = sum(math.prod(shape[1:]) for shape in shapes.values()) * self.model.dtype.itemsize
            total += each * sum(expert != EMPTY_SLOT for expert in row)
        self._progress, self._done, self._total = progress, 0, total

    def load_dense(self) -> None:
        """Load every parameter and buffer outside the experts, and compute the buffers no checkpoint holds."""
        module = self.model.module
        for names in self._tied_parameters():
            tensor = self._parameter(names, library.dtype_of(module, names[0], self.model.dtype))
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            for name in names:
                owner, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(owner), leaf, parameter)
        for name in self._persistent_buffers():
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = self._buffer(
                name, library.dtype_of(module, name, self.model.dtype)
            )
        self._flush()
        library.initialise_buffers(module, self.device)

    def load_experts(self, slots: Sequence[Sequence[int]]) -> None:
        """Load ``slots[layer][slot]``, one rank's share of an expert map."""
        for layer, row in enumerate(slots):
            for slot, expert in enumerate(row):
                if expert != EMPTY_SLOT:
                    self.load_expert(layer, expert, slot)
        self._finish()

    def load_expert(self, layer: int, expert: int, slot: int) -> None:
        """Load one expert of one MoE layer into one physical slot."""
        self.model.experts.layers[layer].put(slot, self.make_expert(layer, expert))

    def make_expert(self, layer: int, expert: int) -> Any:
        """One expert of one MoE layer, ready to be put into a slot."""
        return self.model.experts.layers[layer].make(self._expert(layer, expert))

    def request_expert(self, layer: int, expert: int) -> Future[Any]:
        """``make_expert`` in a thread beside this one; one at a time, in the order of the requests.

        What a device needs for it is queued on a stream of its own, so a step that runs meanwhile does not wait. On a
        CPU, whose cores such a thread would take from the step, it is done when this returns.
        """

        def make() -> Any:
            with torch.inference_mode():
                return self.make_expert(layer, expert)

        if self.device.type == "cpu":
            made: Future[Any] = Future()
            made.set_result(make())
            return made
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="experts")
        return self._worker.submit(make)

    def close(self) -> None:  # noqa: B027 (not every source has files)
        """Let go of files, as far as no tensor views them. They are opened again when needed."""

    def _flush(self) -> None:  # noqa: B027 (not every loader puts off)
        """Read what has been put off."""

    def _advance(self, size: int) -> None:
        """``size`` bytes more stand in their places."""
        self._done += size
        now = time.monotonic()
        if self._progress is not None and now - self._told > _TELL_S:
            self._told = now
            self._progress(min(self._done, self._total), self._total)

    def _finish(self) -> None:
        if self._progress is not None:
            self._progress(self._total, self._total)
            self._progress = None

    @abstractmethod
    def _parameter(self, names: Sequence[str], dtype: torch.dtype) -> torch.Tensor:
        """The dense parameter known by all of ``names``, on the device."""

    @abstractmethod
    def _buffer(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A persistent buffer, on the device; in ``dtype`` if it holds floating-point numbers."""

    @abstractmethod
    def _expert(self, layer: int, expert: int) -> Mapping[str, torch.Tensor]:
        """An expert's rows of the stacked parameters, by their names, on the device in the model's dtype."""

    def _tied_parameters(self) -> list[list[str]]:
        """Names of dense parameters, those of one tensor together."""
        names: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self.model.module.named_parameters(remove_duplicate=False):
            if name.rpartition(".")[0] not in self.model.experts_names:
                names[id(parameter)].append(name)
        return list(names.values())

    def _persistent_buffers(self) -> list[str]:
        temporary = {
            f"{name}.{buffer}" if name else buffer
            for name, module in self.model.module.named_modules()
            for buffer in module._non_persistent_buffers_set
        }
        return [name for name, _ in self.model.module.named_buffers() if name not in temporary]
