"""Whole prompts by FlashAttention 4 on Hopper GPUs, where that is installed (package ``flash-attn-4``; Dao et al.).

Neighbouring prompts go together, packed as they stand. Its kernels are compiled when first called with a dtype, widths,
query heads per KV head, and a window and sinks or none, whatever their values and however many prompts of whatever
length there are (up to 256 of them, and from one tile of rows on). So a largest step compiles what later ones need.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import logging
import os
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from actors.engine.attention.base import KVShape
from actors.engine.cuda.inputs import Chunk
from actors.engine.cuda.paged import inner_contiguous, power

logger = logging.getLogger(__name__)

# Rows of a prompt that goes here, and of all of them in a step. With fewer a step is over before the host has launched
# it, and here is more to launch: measured on an H100 with 48 layers, 2026-11-27, 50 to 58 ms of the host's in place of
# 32; a step of 4,096 rows takes the GPU 60 ms.
LEAST_ROWS, LEAST_IN_STEP = 512, 4096

_CACHE = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
_CACHE_DIRECTORY = "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"

# ``flash_attn_varlen_func``.
Varlen = Callable[..., Any]


def load(dtype: torch.dtype, device: torch.device) -> Varlen | None:
    """FlashAttention 4 for packed sequences; None where it is not installed, not made for these, or does not load.

    Only the last is logged. Importing it takes seconds, and is done here.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    if torch.cuda.get_device_capability(device)[0] != 9:
        return None
    try:
        importlib.metadata.version("flash-attn-4")  # FlashAttention 2 has a flash_attn.cute too, an older one
    except importlib.metadata.PackageNotFoundError:
        return None
    _keep_compiled()
    try:
        from flash_attn.cute.interface import flash_attn_varlen_func
    except Exception as error:  # it loads libraries and asks for the device: that may go wrong in any way
        logger.warning("FlashAttention 4 is installed but does not load, so torch's attention is used: %r", error)
        return None
    varlen: Varlen = flash_attn_varlen_func
    return varlen


def prepare(dtype: torch.dtype, device: torch.device, heads: Collection[tuple[int, KVShape]]) -> threading.Thread:
    """Loads it in a thread, and compiles what whole prompts need, for layers of so many query heads and these shapes.

    Both take seconds, in which others have much to wait for. Layers with windows or sinks compile when they first run.
    """

    def run() -> None:
        varlen = load(dtype, device)
        if varlen is None:
            return
        with FakeTensorMode():  # with such tensors it compiles, and runs nothing
            borders = torch.empty(2, dtype=torch.int32, device=device)
            for queries, shape in heads:
                if not fits(shape.key_width, shape.value_width):
                    continue
                sizes = (queries, shape.key_width), (shape.heads, shape.key_width), (shape.heads, shape.value_width)
                query, key, value = (torch.empty(LEAST_ROWS, *size, dtype=dtype, device=device) for size in sizes)
                _call(varlen, query, key, value, borders, LEAST_ROWS, 1.0, None, None)

    thread = threading.Thread(target=run, name="FlashAttention 4", daemon=True)
    thread.start()
    return thread


def _keep_compiled() -> None:
    """Has kernels kept on disk, which its authors leave to the environment: else every rank compiles, seconds for each.

    They keep them under /tmp by default, where anybody may have put something.
    """
    if _CACHE in os.environ:
        return
    try:
        own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "accordion" / "flash-attention"
        directory = Path(os.environ.setdefault(_CACHE_DIRECTORY, str(own)))
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "lock").open("a") as file:  # what it does itself; where it can't, its first call would fail
            fcntl.flock(file, fcntl.LOCK_SH)
    except (OSError, RuntimeError) as error:  # no home, or one that can't be written to
        logger.info("FlashAttention 4's kernels are not kept: %r", error)
        return
    os.environ[_CACHE] = "1"


def suits(prompt: Chunk) -> bool:
    """Whether it is whole, and long enough."""
    return not prompt.start and prompt.count >= LEAST_ROWS


def fits(key_width: int, value_width: int) -> bool:
    """Whether it has kernels for heads of these widths: those for narrow keys have no registers for wide values."""
    return value_width <= key_width <= 256 and key_width % 8 == 0 and value_width % 8 == 0


def attend(
    varlen: Varlen,
    prompts: Sequence[Chunk],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    scaling: float,
    window: int | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """``query [T, heads, key_width]`` to ``[T, heads, value_width]``, of which only rows of ``prompts`` are written.

    ``prompts`` are whole and neighbours, ``key`` and ``value [T, kv_heads, .]`` the step's own, which may be changed
    where a value is infinite or NaN, ``starts`` as in ``StepInputs``; the rest is as in ``PagedAttention``. ``varlen``
    is what ``load`` gave, and ``fits`` the widths.
    """
    first, last = prompts[0], prompts[-1]
    end = last.first + last.count
    key, value = inner_contiguous(key)[:end], inner_contiguous(value)[:end]  # a tile reads zeros beyond
    confine(key[first.first :], value[first.first :])
    borders = starts[first.sequence : last.sequence + 2]
    longest = max(prompt.count for prompt in prompts)
    return _call(varlen, query, key, value, borders, longest, scaling, window, sinks)


def _call(
    varlen: Varlen,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    longest: int,
    scaling: float,
    window: int | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    out: torch.Tensor
    out, _ = varlen(
        query, key, value, cu_seqlens_q=borders, cu_seqlens_k=borders, max_seqlen_q=longest, max_seqlen_k=longest,
        softmax_scale=scaling, causal=True, window_size=(None, None) if window is None else (window - 1, 0),
        learnable_sink=sinks,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows"])
def _confine(  # type: ignore[no-untyped-def]
    keys, values, rows, key_row, key_head, value_row, value_head, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head, v = tl.program_id(1), tl.arange(0, BLOCK)[None, :]
    at = values + row[:, None] * value_row + head * value_head + v
    mask = (row < rows)[:, None] & (v < WIDTH)
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    bad = tl.max(tl.where(tl.abs(value) < float("inf"), 0, 1), 1)
    tl.store(at, tl.zeros_like(value).to(values.dtype.element_ty), mask=mask & (bad[:, None] > 0))
    nan = tl.full([ROWS], float("nan"), tl.float32).to(keys.dtype.element_ty)
    tl.store(keys + row * key_row + head * key_head, nan, mask=(row < rows) & (bad > 0))


def confine(key: torch.Tensor, value: torch.Tensor) -> None:
    """Where a value is infinite or NaN it becomes zeros, and its key NaN: ``[n, kv_heads, .]``, rows contiguous.

    A prompt's last tile reaches into the next prompt. Scores there are masked, so NaN in keys does no harm, but values
    are multiplied by zero; this keeps what one request did to itself away from its neighbour.
    """
    rows, heads, width = value.shape
    block = power(width)
    tile = max(1, 4096 // block)
    _confine[(triton.cdiv(rows, tile), heads)](
        key, value, rows, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        WIDTH=width, ROWS=tile, BLOCK=block,
    )  # fmt: skip
