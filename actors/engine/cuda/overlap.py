"""Kernels that start while the one before them ends (programmatic dependent launch, Hopper and later).

A kernel launched so waits in ``begin`` until all before it is complete; it also lets the next one start. Before that it
writes nothing and reads only what stands there already, as weights do: into registers, or as a mere hint into the L2
cache.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

# Weights larger than this are not asked for ahead: they would push each other out of the L2 cache (50 MB on H100).
MOST_AHEAD = 2**25
# Over more rows, kernels that start early take the place of those that still work.
MOST_ROWS = 64


@triton.jit
def let_next_start(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The next kernel may start once all programs of this one have come here."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def await_previous(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """All kernels before this one are complete."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def late(x, OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """``x``, of 8 or 16 bits, for which nobody waits before this point, though it was asked for earlier."""
    if OVERLAP:
        pack: tl.constexpr = 32 // x.dtype.primitive_bitwidth
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=pack)
    return x


@triton.jit
def begin(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Before this, a kernel may compute addresses and ``fetch_ahead``."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def begin_in_turn(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """As ``begin``, but the next kernel starts only when all before this one is complete: no third one is resident."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def fetch_ahead(pointers):  # type: ignore[no-untyped-def]
    """Ask for the 128-byte lines of these addresses, which must be valid, to come to the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


def launch(device: torch.device, rows: int, most: int = MOST_ROWS) -> dict[str, bool]:
    """What a kernel over ``rows`` rows that has ``OVERLAP``, and begins as it must, is launched with.

    It starts early up to ``most`` rows, where the device can do that.
    """
    return {"OVERLAP": True, "launch_pdl": True} if rows <= most and _supported(device) else {"OVERLAP": False}


@cache
def _supported(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
