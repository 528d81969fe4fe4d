"""Compiled work on torch's own threads: a second pool beside it would fight it for the cores.

Torch's wheels for Linux compute on an OpenMP runtime whose entry point is ``GOMP_parallel`` (GCC's libgomp; LLVM's and
Intel's runtimes have it too). Where it is not to be found work runs on the calling thread.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, types
from numba.extending import intrinsic


def _address(name: str) -> int | None:
    """Of a function of the OpenMP runtime: in the process, where torch has loaded it for all."""
    try:
        return ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None


def _find() -> Any:
    if _address("GOMP_parallel") is None:
        return None
    entry = ctypes.CDLL(None).GOMP_parallel  # as a function, for which ctypes releases the GIL
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


_barrier = _address("GOMP_barrier")


class Program:
    """Works in order, each shared by all threads: one call, and between two works a thread waits but does not sleep.

    A work is what ``run`` takes, with arguments that stay as they are. ``works`` are those that were added.
    """

    def __init__(self) -> None:
        self.works: list[tuple[Any, Sequence[int]]] = []
        self._kept: list[torch.Tensor] = []
        self._sealed: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def keep(self, part: torch.Tensor) -> int:
        """Its address, for arguments; it is kept as long as the program."""
        self._kept.append(part)
        return part.data_ptr()

    def add(self, work: Any, arguments: Sequence[int]) -> None:
        """Behind the others, before the first ``run``."""
        self.works.append((work, arguments))

    def run(self) -> None:
        """All works, in the order in which they were added. The GIL is released."""
        if self._sealed is None:
            data = np.array([number for _, arguments in self.works for number in (0, *arguments)], np.int64)
            starts = np.cumsum([0, *(1 + len(arguments) for _, arguments in self.works)])[:-1]
            places = (work.address for work, _ in self.works), (data.ctypes.data + 8 * starts).tolist()
            self._sealed = data, np.array(list(zip(*places, strict=True)), np.int64), starts
        data, table, starts = self._sealed
        data[starts] = 0
        threads = torch.get_num_threads()
        barrier = 0 if _parallel is None or threads == 1 else _barrier or 0
        arguments = (ctypes.c_int64 * 3)(len(table), table.ctypes.data, barrier)
        if barrier == 0:
            _in_order.ctypes(arguments)
        else:
            _parallel(_in_order.address, arguments, threads, 0)


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


def _call_of(arity: int) -> Any:
    """Calls the function at an address with ``arity`` (0 or 1) addresses."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        from llvmlite import ir

        given = arguments[1:]
        kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in given])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), given)
        return context.get_dummy_value()

    if arity:

        @intrinsic
        def call_with(typing: Any, function: Any, argument: Any) -> Any:
            return types.void(types.int64, types.int64), generate

        return call_with

    @intrinsic
    def call(typing: Any, function: Any) -> Any:
        return types.void(types.int64), generate

    return call


_call, _call_with = _call_of(0), _call_of(1)


@cfunc("void(CPointer(int64))", cache=True)
def _in_order(task):  # type: ignore[no-untyped-def]
    """Every thread is here. OpenMP's barrier is that of the parallel region, with as many threads as it has."""
    count, table, barrier = carray(task, 3)
    works = carray(integers(table), (count, 2))
    for index in range(count):
        if index > 0 and barrier != 0:
            _call(barrier)
        _call_with(works[index, 0], works[index, 1])
