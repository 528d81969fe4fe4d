"""Memory in large pages (2 MiB) for what a core streams: with pages of 4 KiB it waits for their addresses, too.

A product of a few rows, which is bound by memory, gets half as many bytes a second again from large pages. Rooms are
cut one after the other from pieces of memory that are larger than most of them, so that small ones share pages.
"""

from __future__ import annotations

import math
import mmap
import threading

import torch

_PAGE = 2 << 20
_PIECE = 16 * _PAGE
_LINE = 64
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class _Piece:
    """Memory of which nothing is used yet. Each room keeps the whole of it."""

    def __init__(self, size: int) -> None:
        memory = mmap.mmap(-1, size + _PAGE, flags=_FLAGS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self._rest = whole[-whole.data_ptr() % _PAGE :][:size]

    def cut(self, size: int) -> torch.Tensor | None:
        if size > len(self._rest):
            return None
        room, self._rest = self._rest[:size], self._rest[-(-size // _LINE) * _LINE :]
        return room


_lock = threading.Lock()
_last = _Piece(0)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor in large pages where the system has some. It gives a page when that is first written or read."""
    global _last
    size = math.prod(shape) * dtype.itemsize
    with _lock:
        room = _last.cut(size)
        if room is None:
            _last = _Piece(-(-max(size, _PIECE) // _PAGE) * _PAGE)
            room = _last.cut(size)
    assert room is not None
    return room.view(dtype).view(*shape)
