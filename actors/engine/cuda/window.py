"""The part of a rank's device memory that peers write into: rows on their way to experts, results on their way home.

Every rank of a group lays out its window alike, so a peer's address is its window's plus an offset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

# Flags of this many epochs stand side by side: what a peer left behind still writes never reaches the present one.
PADS = 256
_ALIGNMENT = 256


class Memory(Protocol):
    """A piece of memory that can be opened by other processes of this machine, and theirs by this one.

    ``data`` is all of it, uint8 ``[n]``. All methods may be called from any thread while kernels run.
    """

    data: torch.Tensor

    def handle(self) -> bytes:
        """What another process needs to open it."""

    def open(self, handle: bytes) -> int:
        """The address here of another process's memory. Raises OSError if it can't be reached."""

    def close(self, address: int) -> None:
        """Give up an address that ``open`` gave."""

    def write(self, address: int, value: int, words: int = 1) -> None:
        """Set int32 words here or in opened memory; complete on return, whatever the device is busy with."""


@dataclass(frozen=True)
class Layout:
    """Where things stand in a window, in bytes from its start, and how large it is.

    ``rows [max_ranks, max_rows, hidden]``, ``ids [max_ranks, max_rows, top_k]`` (int32) and ``counts [max_ranks]``
    (int32) are written by the peer whose index comes first, ``results [max_rows * top_k, hidden]`` by whoever computed.
    """

    max_ranks: int
    max_rows: int
    top_k: int
    hidden: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.max_ranks * self.max_rows * self.top_k >= 2**31:
            raise ValueError(
                f"{self.max_ranks} ranks of {self.max_rows} rows and {self.top_k} experts a row are too many pairs; "
                f"lower max_num_batched_tokens"
            )

    @property
    def rows(self) -> int:
        return 0

    @property
    def ids(self) -> int:
        # A group that never grows beyond one rank receives nothing.
        received = self.max_ranks * self.max_rows * self.hidden * self.dtype.itemsize if self.max_ranks > 1 else 0
        return self.rows + _aligned(received)

    @property
    def counts(self) -> int:
        return self.ids + _aligned(self.max_ranks * self.max_rows * self.top_k * 4 if self.max_ranks > 1 else 0)

    @property
    def results(self) -> int:
        return self.counts + _aligned(self.max_ranks * 4)

    @property
    def pads(self) -> int:
        return self.results + _aligned(self.max_rows * self.top_k * self.hidden * self.dtype.itemsize)

    @property
    def pad_words(self) -> int:
        """Flags ``[2, max_ranks]`` (rows have come, results have), and whether a host broke off; int32."""
        return _aligned((2 * self.max_ranks + 1) * 4) // 4

    @property
    def nbytes(self) -> int:
        return self.pads + PADS * self.pad_words * 4

    def pad(self, epoch: int) -> int:
        """Where the flags of this epoch stand."""
        return self.pads + epoch % PADS * self.pad_words * 4


class Window:
    """A rank's window in ``memory``, which has ``layout.nbytes``.

    ``broken`` (int64 ``[1]``, on the host) is the pad of the epoch whose waits are broken off; -1: none was.
    """

    def __init__(self, layout: Layout, memory: Memory) -> None:
        if memory.data.numel() < layout.nbytes:
            raise ValueError(f"a window of {layout.nbytes} bytes does not fit into {memory.data.numel()}")
        self.layout = layout
        self.memory = memory
        self.address = memory.data.data_ptr()
        self.broken = torch.full([1], -1, pin_memory=memory.data.is_cuda)
        self.received = self._view(layout.rows, layout.ids)
        self.results = self._view(layout.results, layout.pads)

    @classmethod
    def allocate(cls, layout: Layout, device: torch.device) -> Window:
        """Raises torch.OutOfMemoryError."""
        from actors.engine.cuda.driver import DeviceMemory, PrivateMemory

        memory: Memory = PrivateMemory(layout.nbytes) if device.type == "cpu" else DeviceMemory(layout.nbytes, device)
        return cls(layout, memory)

    def clear_pad(self, epoch: int) -> None:
        """To be done before peers hear of the epoch. The last one with the same pad is long over."""
        if self.broken[0] == self.layout.pad(epoch):
            self.broken[0] = -1
        self.memory.write(self.address + self.layout.pad(epoch), 0, self.layout.pad_words)

    def _view(self, start: int, end: int) -> torch.Tensor:
        return self.memory.data[start:end].view(self.layout.dtype)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
