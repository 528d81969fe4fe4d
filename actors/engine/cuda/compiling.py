"""Kernels compiled before they run, several at a time.

Triton compiles a kernel when it is first launched, one after the other, and builds a launcher for it: half a second for
each on a machine that has none of them in its cache. Most of that is spent outside of Python, so threads share it well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

_THREADS = 8


class _Compilers(ThreadPoolExecutor):
    """Kernels are loaded into the current GPU, too, which builds their launchers."""

    def __init__(self) -> None:
        super().__init__(_THREADS, initializer=torch.cuda.set_device, initargs=(torch.cuda.current_device(),))

    def submit(self, compile_kernel: Callable[[], Any], /, *_: Any, **__: Any) -> Future[Any]:
        def compile_and_load() -> Any:
            kernel = compile_kernel()
            kernel._init_handles()
            return kernel

        return super().submit(compile_and_load)


@contextlib.contextmanager
def only_compiling() -> Iterator[None]:
    """Triton's kernels that are launched within are compiled for the current GPU, and don't run.

    What they would have written is anything. Leaving waits for all of them. One that can't be compiled raises when it
    is launched to run. One thread of a process may be in here, and the others launch nothing meanwhile.
    """
    run = JITFunction.run

    def compile_only(function: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(function, *arguments, grid=grid, warmup=True, **options)
        if isinstance(kernel, triton.FutureKernel) and kernel.future.done():
            kernel.result(ignore_errors=True)  # the next launch finds it at once
        return kernel

    with _Compilers() as compilers, triton.AsyncCompileMode(compilers, ignore_errors=True):
        JITFunction.run = compile_only
        try:
            yield
        finally:
            JITFunction.run = run
