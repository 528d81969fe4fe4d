"""Regions of files to the device: several threads read into pinned memory, each copies on a stream of its own.

Reading with ``pread`` instead of through a mapping spares a page fault every 4 KiB, and the copy to the device of one
piece runs while the next is read. On a device without streams (tests on a CPU) the same code copies at once.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import torch

from actors.engine.checkpoint import Region

READERS = 8
PIECE = 8 * 2**20
"""Bytes that are read before they are copied; every reader has two such pieces of pinned memory."""
REPORT_S = 0.25


class Upload(NamedTuple):
    """The tensor in ``source`` goes to ``target``, on the device, converted if its dtype is another one.

    With ``finish``, which gets a device tensor of the source's shape and dtype, ``target`` is that function's business.
    """

    source: Region
    target: torch.Tensor
    finish: Callable[[torch.Tensor], None] | None = None


class Reader:
    """Two pieces of pinned memory and a stream. One thread at a time uses it; ``stream`` is None off CUDA."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.device = device
        self.stream = torch.cuda.Stream(device) if cuda else None
        self._pieces = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=cuda) for _ in range(2)]
        self._views = [memoryview(piece.numpy()) for piece in self._pieces]  # type: ignore[arg-type]
        self._copied = [torch.cuda.Event() for _ in self._pieces] if cuda else None
        self._turn = 0

    def upload(self, item: Upload) -> None:
        """Reads and copies; returns when all is read and its copying stands in the stream.

        Raises OSError naming the file when it cannot be read or is too short.
        """
        if self.stream is None:
            self._upload(item)
        else:
            with torch.cuda.stream(self.stream):
                self._upload(item)

    @torch.inference_mode()
    def _upload(self, item: Upload) -> None:
        source, target = item.source, item.target
        direct = item.finish is None and target.dtype == source.dtype and target.is_contiguous()
        landing = target if direct else torch.empty(source.shape, dtype=source.dtype, device=self.device)
        flat = landing.view(-1).view(torch.uint8)
        with open(source.file, "rb", buffering=0) as file:  # noqa: PTH123
            for start in range(0, source.nbytes, PIECE):
                size = min(PIECE, source.nbytes - start)
                turn = self._turn
                self._turn = 1 - turn
                if self._copied is not None:
                    self._copied[turn].synchronize()
                _read(file, self._views[turn][:size], source.offset + start)
                flat[start : start + size].copy_(self._pieces[turn][:size], non_blocking=True)
                if self._copied is not None:
                    self._copied[turn].record()
        if item.finish is not None:
            item.finish(landing)
        elif not direct:
            target.copy_(landing)


def upload(items: list[Upload], device: torch.device, moved: Callable[[int], None]) -> None:
    """Uploads all; what the current stream does next sees the targets filled.

    ``moved(bytes of targets)`` is called now and then, from this thread. Raises OSError on the first file that cannot
    be read.
    """
    todo = deque(sorted(items, key=lambda item: (item.source.file, item.source.offset)))
    arrived: deque[int] = deque()
    readers = [Reader(device) for _ in range(min(READERS, os.cpu_count() or 1, len(items)))]
    if device.type == "cuda":
        for reader in readers:  # the targets' memory may have been used by work that is still queued
            reader.stream.wait_stream(torch.cuda.current_stream(device))  # type: ignore[union-attr]

    def take() -> Upload | None:
        try:
            return todo.popleft()
        except IndexError:
            return None

    def work(reader: Reader) -> None:
        try:
            while (item := take()) is not None:
                reader.upload(item)
                arrived.append(item.target.numel() * item.target.element_size())
        except BaseException:
            todo.clear()  # nobody needs the rest
            raise

    with ThreadPoolExecutor(max(1, len(readers)), thread_name_prefix="weights") as pool:
        working = {pool.submit(work, reader) for reader in readers}
        while working:
            done, working = wait(working, timeout=REPORT_S)
            moved(sum(arrived.popleft() for _ in range(len(arrived))))
            for future in done:
                future.result()
    for reader in readers:
        if reader.stream is not None:
            torch.cuda.current_stream(device).wait_stream(reader.stream)


def _read(file: Any, into: memoryview, offset: int) -> None:
    filled = 0
    while filled < len(into):
        count = os.preadv(file.fileno(), [into[filled:]], offset + filled)
        if not count:
            raise OSError(f"{file.name} ends at byte {offset + filled}, in the middle of a tensor: copy it again")
        filled += count
