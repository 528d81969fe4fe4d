"""Compiled work on torch's own threads: a second pool beside it would fight it for the cores.

Torch's wheels for Linux compute on an OpenMP runtime whose entry point is ``GOMP_parallel`` (GCC's libgomp; LLVM's and
Intel's runtimes have it too). Where it is not to be found work runs on the calling thread.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import torch
from numba import types
from numba.extending import intrinsic


def _find() -> Any:
    try:
        entry = ctypes.CDLL(None).GOMP_parallel  # in the process: torch has loaded it for all
    except (AttributeError, OSError, TypeError):
        return None
    # void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags)
    entry.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    entry.restype = None
    return entry


_parallel = _find()


def run(work: Any, tasks: int, arguments: Sequence[int]) -> None:
    """Call ``work``, a Numba cfunc ``void(CPointer(int64))``, with ``[0, *arguments]`` on torch's number of threads.

    The leading 0 is for ``take``, by which the threads share ``tasks`` tasks. The GIL is released.
    """
    data = (ctypes.c_int64 * (len(arguments) + 1))(0, *arguments)
    threads = torch.get_num_threads()
    if _parallel is None or threads == 1 or tasks == 1:
        work.ctypes(data)
    else:
        _parallel(work.address, data, threads, 0)


def as_integer(number: float) -> int:
    """The bits of a float64 as one of ``run``'s arguments; ``np.int64(argument).view(np.float64)`` is the number."""
    bits: int = struct.unpack("q", struct.pack("d", number))[0]
    return bits


def _pointer_to(kind: Any) -> Any:
    @intrinsic
    def pointer(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate

    return pointer


# An address, int64, as a pointer.
floats, integers = _pointer_to(types.float32), _pointer_to(types.int64)


@intrinsic
def take(typing: Any, counter: Any) -> Any:
    """The next of the numbers 0, 1, 2, ... that ``counter``, a pointer to int64, has not given to any thread yet."""
    from llvmlite import ir

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", arguments[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.CPointer(types.int64)), generate


@intrinsic
def read_ahead(typing: Any, address: Any) -> Any:
    """Asks for the line of memory at ``address`` into the second cache. Never fails, wherever that is."""
    from llvmlite import ir

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, small = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, small, small, small])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        builder.call(prefetch, [builder.inttoptr(arguments[0], byte), small(0), small(2), small(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate
