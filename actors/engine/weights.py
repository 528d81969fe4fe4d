"""From safetensors into a model built on the meta device: dense weights shared, experts only where they stand.

A large dense tensor whose device and dtype match stays a view of the memory-mapped file. Experts are copied into
physical slots, and a rank reads only those it holds. Quantised weights become numbers of the model's dtype.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from actors.engine import library
from actors.engine.checkpoint import Checkpoint
from actors.engine.dummy import DummyLoader
from actors.engine.library import Target
from actors.engine.loader import Loader
from actors.engine.model import MoEModel
from actors.engine.quantization import SCALE, blocks_of, dequantize

# A smaller tensor is copied: as a view it would keep the whole of its file mapped. Bytes.
_WORTH_MAPPING = 2**20


class WeightLoader(Loader):
    """Fills ``model`` from its checkpoint.

    Building it checks every key and shape, and raises ValueError naming those missing, unexpected or mismatched.
    """

    def __init__(self, model: MoEModel, device: torch.device) -> None:
        super().__init__(model, device)
        self.checkpoint = Checkpoint(model.directory)
        self._blocks = blocks_of(model.directory)
        keys = set(self.checkpoint.keys())
        scales = {key for key in keys if self._blocks and key.endswith(SCALE) and key.removesuffix(SCALE) in keys}
        targets, unexpected = library.targets(model.module, sorted(keys - scales))
        # By key of a quantised weight, that of its scales.
        self._scales = {key: key + SCALE for key in targets if key + SCALE in scales}
        layer_of = {name: layer for layer, name in enumerate(model.experts_names)}
        self._dense: dict[str, str] = {}
        # Per layer: parameter name within the experts module, and its pieces as (key, target).
        self._experts: list[dict[str, list[tuple[str, Target]]]] = [defaultdict(list) for _ in layer_of]
        for key, target in targets.items():
            owner, _, leaf = target.parameter.rpartition(".")
            if owner in layer_of:
                self._experts[layer_of[owner]][leaf].append((key, target))
            else:
                self._dense[target.parameter] = key
        self._check(unexpected)

    @property
    def bytes_read(self) -> int:  # type: ignore[override]
        return self.checkpoint.bytes_read

    def close(self) -> None:
        self.checkpoint.close()

    def _parameter(self, names: Sequence[str], dtype: torch.dtype) -> torch.Tensor:
        return self._to_device(self._read(self._key(names), dtype), dtype)

    def _buffer(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        tensor = self._read(self._dense[name], dtype)
        return self._to_device(tensor, dtype if tensor.is_floating_point() else tensor.dtype)

    def _expert(self, layer: int, expert: int) -> Mapping[str, torch.Tensor]:
        weights = {}
        for leaf, (row, keys) in self._sources(layer, expert).items():
            parts = [self._read(key, self.model.dtype, row) for key in keys]
            # What is one piece stays a view of the file.
            weights[leaf] = self._to_device(torch.cat(parts) if len(parts) > 1 else parts[0], self.model.dtype)
        return weights

    def _read(self, key: str, dtype: torch.dtype, row: int | None = None) -> torch.Tensor:
        """A tensor, or a row of it, as it is; of a quantised one the numbers, in ``dtype``."""
        tensor = self.checkpoint.read(key, row)
        if key not in self._scales:
            return tensor
        assert self._blocks is not None
        return dequantize(tensor, self.checkpoint.read(self._scales[key], row), self._blocks, dtype)

    def _key(self, names: Sequence[str]) -> str:
        return next(self._dense[name] for name in names if name in self._dense)

    def _sources(self, layer: int, expert: int) -> dict[str, tuple[int | None, list[str]]]:
        """Per stacked parameter what an expert's rows are: ``row`` of a key's tensor, or the keys' tensors in order."""
        sources: dict[str, tuple[int | None, list[str]]] = {}
        for leaf, pieces in self._experts[layer].items():
            if pieces[0][1].expert is None:
                sources[leaf] = expert, [pieces[0][0]]
            else:
                own = {target.part: key for key, target in pieces if target.expert == expert}
                sources[leaf] = None, [own[part] for part in sorted(own)]
        return sources

    def _to_device(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        copy = tensor.numel() * tensor.element_size() < _WORTH_MAPPING
        tensor = tensor.to(device=self.device, dtype=dtype, copy=copy)
        self._advance(tensor.numel() * tensor.element_size())
        return tensor

    def _check(self, unexpected: list[str]) -> None:
        module = self.model.module
        missing = [names[0] for names in self._tied_parameters() if not any(name in self._dense for name in names)]
        missing += [name for name in self._persistent_buffers() if name not in self._dense]
        mismatched = []
        shapes = {name: list(tensor.shape) for name, tensor in module.named_parameters(remove_duplicate=False)}
        shapes |= {name: list(tensor.shape) for name, tensor in module.named_buffers()}
        for name, key in self._dense.items():
            if self.checkpoint.shape(key) != shapes[name]:
                mismatched.append(f"{key} is {self.checkpoint.shape(key)}, the model has {shapes[name]}")
        names, shapes_of = self.model.experts_names, self.model.experts_shapes
        for owner, stacked, leaves in zip(names, shapes_of, self._experts, strict=True):
            for leaf, shape in stacked.items():
                absent, wrong = self._check_stacked(f"{owner}.{leaf}", shape, leaves[leaf])
                missing += absent
                mismatched += wrong
        stacked_keys = (key for leaves in self._experts for pieces in leaves.values() for key, _ in pieces)
        for key in (*self._dense.values(), *stacked_keys):
            mismatched += self._check_scale(key)
        problems = [
            f"{len(keys)} {what}: {', '.join(sorted(keys)[:8])}{' ...' if len(keys) > 8 else ''}"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("mismatched", mismatched))
            if keys
        ]
        if problems:
            raise ValueError(
                f"the checkpoint in {self.checkpoint.directory} does not fit {type(module).__name__}: "
                + "; ".join(problems)
            )

    def _check_scale(self, key: str) -> list[str]:
        region, scale = self.checkpoint.region(key), self._scales.get(key)
        if (scale is not None) != (region.dtype == torch.float8_e4m3fn):
            return [f"{key} is {region.dtype} {'without' if scale is None else 'but with'} scales"]
        if scale is None or self._blocks is None:
            return []
        shape, grid = self.checkpoint.shape(scale), self._blocks.grid(region.shape)
        return [] if shape == grid else [f"{scale} is {shape}, blocks of {list(self._blocks)} need {grid}"]

    def _check_stacked(
        self, name: str, stacked: list[int], pieces: list[tuple[str, Target]]
    ) -> tuple[list[str], list[str]]:
        """Missing and mismatched pieces of a parameter of shape ``stacked``, ``[experts, ...]``."""
        if len(pieces) == 1 and pieces[0][1].expert is None:
            shape = self.checkpoint.shape(pieces[0][0])
            return [], [] if shape == stacked else [f"{pieces[0][0]} is {shape}, the model has {stacked}"]
        parts = pieces[0][1].parts if pieces else 1
        expected = [stacked[1] // parts, *stacked[2:]]
        found = {(target.expert, target.part): key for key, target in pieces}
        missing = [
            f"{name} of expert {expert}, part {part + 1} of {parts}"
            for expert in range(stacked[0])
            for part in range(parts)
            if (expert, part) not in found
        ]
        wrong = [
            f"{key} is {self.checkpoint.shape(key)}, the model has {expected}"
            for key in found.values()
            if self.checkpoint.shape(key) != expected
        ]
        return missing, wrong


def open_loader(model: MoEModel, device: torch.device, load_format: str = "auto", seed: int = 0) -> Loader:
    """The loader for ``load_format``: ``auto``, the model's checkpoint, or ``dummy``, random weights by ``seed``.

    Raises ValueError on another format, and on a checkpoint that does not fit the model.
    """
    if load_format == "auto" and device.type == "cuda":
        from actors.engine.cuda.streaming import StreamingLoader

        return StreamingLoader(model, device)
    if load_format == "auto":
        return WeightLoader(model, device)
    if load_format == "dummy":
        return DummyLoader(model, device, seed)
    raise ValueError(f"load_format {load_format!r} is not one of auto, dummy")
