"""A directory of safetensors files: what is in it, where in which file, and tensors as views of the mapped files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

# The dtypes of the format (https://huggingface.co/docs/safetensors) that models come in.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Region(NamedTuple):
    """A tensor's bytes: in ``file`` from ``offset`` on, contiguous."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def row(self, index: int) -> Region:
        """One row of the first axis."""
        shape = self.shape[1:]
        return Region(self.file, self.offset + index * math.prod(shape) * self.dtype.itemsize, shape, self.dtype)


class Checkpoint:
    """The tensors of a directory with ``model.safetensors``, or shards and ``model.safetensors.index.json``.

    ``bytes_read`` counts the bytes of all tensors handed out. Raises FileNotFoundError when there is neither.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.bytes_read = 0
        self._open: dict[str, Any] = {}
        self._headers: dict[str, tuple[int, dict[str, Any]]] = {}
        index = self.directory / "model.safetensors.index.json"
        if index.exists():
            self._file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif (self.directory / "model.safetensors").exists():
            keys = self._header("model.safetensors")[1]
            self._file_of = dict.fromkeys(keys, "model.safetensors")
        else:
            raise FileNotFoundError(f"{directory} has neither model.safetensors nor model.safetensors.index.json")

    def close(self) -> None:
        """Unmap the files, as far as no tensor views them. They are opened again when needed."""
        self._open.clear()

    def keys(self) -> list[str]:
        return list(self._file_of)

    def read(self, key: str, row: int | None = None) -> torch.Tensor:
        """A tensor, or one row of its first axis, as a view of the memory-mapped file."""
        tensor = self.view(key, row)
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def view(self, key: str, row: int | None = None) -> torch.Tensor:
        """The same without counting; from any thread."""
        name = self._file_of[key]
        if name not in self._open:
            self._open[name] = safe_open(self.directory / name, framework="pt")
        file = self._open[name]
        tensor: torch.Tensor = file.get_tensor(key) if row is None else file.get_slice(key)[row]
        return tensor

    def region(self, key: str) -> Region:
        """Where a tensor lies. Raises ValueError for a dtype that no model comes in, or an index that lies."""
        name = self._file_of[key]
        start, header = self._header(name)
        if key not in header:
            raise ValueError(f"{self.directory / name} has no tensor {key}, which the checkpoint's index puts there")
        entry = header[key]
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{key} in {self.directory / name} is {entry['dtype']}: not supported")
        offset = start + entry["data_offsets"][0]
        return Region(self.directory / name, offset, tuple(entry["shape"]), _DTYPES[entry["dtype"]])

    def shape(self, key: str) -> list[int]:
        return list(self.region(key).shape)

    def _header(self, name: str) -> tuple[int, dict[str, Any]]:
        """Where the tensors' bytes begin, and per tensor its dtype, shape and offsets from there."""
        if name not in self._headers:
            with (self.directory / name).open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            self._headers[name] = 8 + length, header
        return self._headers[name]
