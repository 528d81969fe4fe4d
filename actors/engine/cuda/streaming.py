"""From a checkpoint to the device without a stop: all that is wanted is queued, then streamed in by several readers.

An expert's parts are written where they belong in its slot; nothing is put together on the way. Into slots in FP8 they
go as they are stored, scales beside.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from actors.engine.checkpoint import Region
from actors.engine.cuda.upload import Reader, Upload, upload
from actors.engine.experts.map import EMPTY_SLOT
from actors.engine.experts.slots import StackedSlots
from actors.engine.model import MoEModel
from actors.engine.quantization import SCALE, dequantize
from actors.engine.weights import WeightLoader


class StreamingLoader(WeightLoader):
    """Loads from the model's checkpoint to a device whose expert slots are stacked.

    ``make_expert`` may be called from any thread, while steps run: it reads into pinned memory and copies on a stream
    of its own.
    """

    def __init__(self, model: MoEModel, device: torch.device) -> None:
        super().__init__(model, device)
        self._queue: list[Upload] = []
        self._reader = Reader(device)
        self._reading = threading.Lock()

    def load_experts(self, slots: Sequence[Sequence[int]]) -> None:
        for layer, row in enumerate(slots):
            for slot, expert in enumerate(row):
                if expert != EMPTY_SLOT:
                    self._queue += self._uploads(layer, expert, self._slots(layer).rows(slot))
        self._flush()
        self._finish()

    def make_expert(self, layer: int, expert: int) -> Any:
        with self._reading, torch.cuda.stream(self._reader.stream):
            return super().make_expert(layer, expert)

    def _parameter(self, names: Sequence[str], dtype: torch.dtype) -> torch.Tensor:
        return self._put_off(self._key(names), dtype)

    def _buffer(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        key = self._dense[name]
        own = self.checkpoint.region(key).dtype
        return self._put_off(key, dtype if own.is_floating_point else own)

    def _expert(self, layer: int, expert: int) -> Mapping[str, torch.Tensor]:
        weights = self._slots(layer).room()
        for item in self._uploads(layer, expert, weights):
            self._reader.upload(item)
        return weights

    def _slots(self, layer: int) -> StackedSlots:
        slots = self.model.experts.layers[layer]
        assert isinstance(slots, StackedSlots)
        return slots

    def _uploads(self, layer: int, expert: int, targets: Mapping[str, torch.Tensor]) -> list[Upload]:
        """An expert's parts, each with its share of the rows of ``targets``, which are by stacked parameter.

        Raises ValueError for numbers where the slots are quantised.
        """
        items = []
        for leaf, (row, keys) in self._sources(layer, expert).items():
            for part, key in enumerate(keys):
                target = targets[leaf].chunk(len(keys))[part]
                items.append(self._upload(key, row, target))
                if target.dtype == torch.float8_e4m3fn:
                    scale = targets[leaf + SCALE].chunk(len(keys))[part]
                    items.append(self._upload(self._scales[key], row, scale))
        return items

    def _put_off(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        target = torch.empty(self.checkpoint.shape(key), dtype=dtype, device=self.device)
        self._queue.append(self._upload(key, None, target))
        return target

    def _upload(self, key: str, row: int | None, target: torch.Tensor) -> Upload:
        region = self._region(key, row)
        scales = self._scales.get(key)
        if target.dtype == torch.float8_e4m3fn and scales is None:
            raise ValueError(
                f"{key} is {region.dtype} in a checkpoint whose configuration says it is in fp8: set "
                "quantization=dequantize, so that all experts are kept in the model's dtype"
            )
        if scales is None or target.dtype == torch.float8_e4m3fn:
            return Upload(region, target)
        self._region(scales, row)

        def finish(raw: torch.Tensor) -> None:
            assert self._blocks is not None
            scale = self.checkpoint.view(scales, row).to(self.device)
            target.copy_(dequantize(raw, scale, self._blocks, target.dtype))

        return Upload(region, target, finish)

    def _region(self, key: str, row: int | None) -> Region:
        """Where a tensor or a row of it lies; counted as read."""
        whole = self.checkpoint.region(key)
        region = whole if row is None else whole.row(row)
        self.checkpoint.bytes_read += region.nbytes
        return region

    def _flush(self) -> None:
        upload(self._queue, self.device, self._advance)
        self._queue = []
