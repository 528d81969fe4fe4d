"""Ranks that exchange rows through each other's windows: one process each, on GPUs or interpreted."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from actors.engine.cuda.peers import CudaPeers, PeerWindows
from actors.engine.cuda.window import Layout, Window
from actors.engine.experts.mesh import MeshExchange

GPUS = torch.cuda.device_count()


class SharedMemory:
    """Memory of several ranks that are forked from the process that made it: so it has the same addresses in all."""

    def __init__(self, pieces: Sequence[torch.Tensor], index: int) -> None:
        self.data = pieces[index]
        self._pieces = pieces
        self._index = index
        self.closed: list[int] = []

    def handle(self) -> bytes:
        return bytes([self._index])

    def open(self, handle: bytes) -> int:
        return self._pieces[handle[0]].data_ptr()

    def close(self, address: int) -> None:
        self.closed.append(address)

    def write(self, address: int, value: int, words: int = 1) -> None:
        (ctypes.c_int32 * words).from_address(address)[:] = [value] * words


def shared(nbytes: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)


class Rank:
    """One rank's process: its window, and how it joins an epoch."""

    def __init__(self, device: torch.device, window: Window, port: int) -> None:
        self.device = device
        self.window = window
        self.windows = PeerWindows(window)
        self._port = port

    def meet(self, epoch: int, index: int, size: int, timeout_s: float = 60) -> tuple[dist.Store, MeshExchange]:
        store = dist.PrefixStore(f"epoch{epoch}", dist.TCPStore("127.0.0.1", self._port, is_master=False))
        return store, MeshExchange(store, index, size, timeout_s, "127.0.0.1")

    def join(self, epoch: int, index: int, size: int, timeout_s: float = 60) -> CudaPeers:
        store, mesh = self.meet(epoch, index, size, timeout_s)
        return self.windows.connect(mesh, store, epoch, timeout_s)


def run(work: Callable[[Rank, int], Any], size: int, layout: Layout) -> list[Any]:
    """What ``work(rank, index)`` returns in each of ``size`` processes; tensors come back on the CPU."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pieces = [] if GPUS else [shared(layout.nbytes) for _ in range(size)]
    context = multiprocessing.get_context("spawn" if GPUS else "fork")
    pipes, processes = [], []
    for index in range(size):
        ours, theirs = context.Pipe()
        process = context.Process(target=_main, args=(theirs, work, index, layout, server.port, pieces), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    try:
        results = [pipe.recv() if pipe.poll(250) else "no answer within 250 s" for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    for result in results:
        assert not isinstance(result, str), result
    return results


def _main(pipe: Any, work: Callable[[Rank, int], Any], index: int, layout: Layout, port: int, pieces: Any) -> None:
    torch.set_num_threads(1)
    try:
        device = torch.device(f"cuda:{index % GPUS}" if GPUS else "cpu")
        if GPUS:
            torch.cuda.set_device(device)
            window = Window.allocate(layout, device)
        else:
            _wait_politely()
            window = Window(layout, SharedMemory(pieces, index))
        pipe.send(work(Rank(device, window, port), index))
    except BaseException:
        pipe.send(traceback.format_exc())
    pipe.recv()  # peers may still read this rank's memory


def _wait_politely() -> None:
    """A kernel that is interpreted and waits leaves the processor to those it waits for."""
    from triton.runtime.interpreter import InterpreterBuilder

    load = InterpreterBuilder.create_masked_load

    def load_or_sleep(self: Any, *given: Any) -> Any:
        if given[-1]:  # volatile
            time.sleep(0.0005)
        return load(self, *given)

    InterpreterBuilder.create_masked_load = load_or_sleep
