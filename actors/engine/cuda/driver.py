"""Device memory that other processes can open: the few calls of the CUDA driver that torch has no name for."""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

import torch

_LAZY_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * 64)]


class PrivateMemory:
    """Ordinary memory, which nobody else can open: for kernels that are interpreted."""

    def __init__(self, nbytes: int) -> None:
        self.data = torch.zeros(nbytes, dtype=torch.uint8)

    def handle(self) -> bytes:
        raise OSError("this memory can't be shared")

    def open(self, handle: bytes) -> int:
        raise OSError("this memory can't be shared")

    def close(self, address: int) -> None: ...

    def write(self, address: int, value: int, words: int = 1) -> None:
        (ctypes.c_int32 * words).from_address(address)[:] = [value] * words


class DeviceMemory:
    """Memory of one GPU, outside torch's allocator: an IPC handle is of a whole allocation. Zeros at first.

    Raises torch.OutOfMemoryError.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.device = device
        self._lock = threading.Lock()
        torch.zeros(1, device=device)  # torch makes the context, whose memory this is to be
        address = ctypes.c_uint64()
        try:
            self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        except OSError as error:
            free = torch.cuda.mem_get_info(device)[0]
            raise torch.OutOfMemoryError(
                f"no room for a window of {nbytes / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free; lower "
                f"max_num_batched_tokens: {error}"
            ) from error
        self.data: torch.Tensor = torch.as_tensor(Bytes(address.value, nbytes), device=device)
        self.data.zero_()
        self._stream = torch.cuda.Stream(device)
        self._staging = torch.zeros(1024, dtype=torch.int32, pin_memory=True)
        torch.cuda.synchronize(device)

    def handle(self) -> bytes:
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(self.data.data_ptr()))
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        address = ctypes.c_uint64()
        theirs = _Handle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), theirs, ctypes.c_uint(_LAZY_PEER_ACCESS))
        return address.value

    def close(self, address: int) -> None:
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def write(self, address: int, value: int, words: int = 1) -> None:
        # A copy, not a kernel: it goes through while kernels that wait fill the device.
        with self._lock:
            self._staging[:words] = value
            source, stream = ctypes.c_void_p(self._staging.data_ptr()), ctypes.c_void_p(self._stream.cuda_stream)
            self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), source, ctypes.c_size_t(words * 4), stream)
            self._stream.synchronize()

    def _call(self, name: str, *arguments: Any) -> None:
        library, context = _driver(), _context(self.device.index or 0)
        library.cuCtxSetCurrent(context)  # threads other than torch's have none
        code = getattr(library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            library.cuGetErrorString(code, ctypes.byref(text))
            raise OSError(code, f"{name}: {(text.value or b'unknown error').decode()}")


class Bytes:
    """What torch takes for an array of bytes that stand on a device."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3,
        }  # fmt: skip


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _context(index: int) -> ctypes.c_void_p:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    library = _driver()
    code = library.cuDeviceGet(ctypes.byref(device), index)
    code = code or library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    if code:
        raise OSError(code, f"no context on GPU {index}")
    return context
