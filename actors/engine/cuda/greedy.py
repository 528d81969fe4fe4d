"""The largest logit of each row by one kernel; its programs take tiles of rows, and a row's last one compares them."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from actors.engine.cuda.linear import arrived_last

# Columns of a program: enough programs that a single row of a large vocabulary is read by many multiprocessors.
_TILE = 4096


@triton.jit
def _first_of(value, place, none):  # type: ignore[no-untyped-def]
    """The largest ``value`` and the least ``place`` where it stands; NaN, and any place, if there is a NaN."""
    bad = tl.max((value != value).to(tl.int32), 0) > 0
    value = tl.where(value != value, float("-inf"), value)
    largest = tl.max(value, 0)
    first = tl.min(tl.where(value == largest, place, none), 0)
    return tl.where(bad, float("nan"), largest), first


@triton.jit(do_not_specialize=["rows"])
def _largest(  # type: ignore[no-untyped-def]
    x_pointer, stride, width, values_pointer, places_pointer, arrivals_pointer, found_pointer, rows, tiles,
    TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    tile, row = tl.program_id(0), tl.program_id(1)
    column = tile * TILE + tl.arange(0, TILE)
    x = tl.load(x_pointer + row.to(tl.int64) * stride + column, column < width, float("-inf")).to(tl.float32)
    value, place = _first_of(x, column, width)
    part = row * tiles
    tl.store(values_pointer + part + tile, value)
    tl.store(places_pointer + part + tile, place)
    if arrived_last(arrivals_pointer + row, tiles):
        other = tl.arange(0, TILES)
        there = other < tiles
        values = tl.load(values_pointer + part + other, there, float("-inf"), cache_modifier=".cg")
        places = tl.load(places_pointer + part + other, there, width, cache_modifier=".cg")
        value, place = _first_of(values, places, width)
        tl.store(found_pointer + row, tl.minimum(place, width - 1).to(tl.int64))
        tl.store(found_pointer + rows + row, value.to(tl.float64).to(tl.int64, bitcast=True))


def largest(x: torch.Tensor) -> torch.Tensor:
    """Where the first largest element of each row of ``x [R, V]`` stands, and its value: int64 ``[2, R]``.

    The values are the bits of float64, so that one transfer takes both. A row with NaN has NaN for its value, and any
    of its places. ``x`` is of any floating dtype that float32 holds, its rows contiguous. One stream at a time.
    """
    rows, width = x.shape
    found = torch.empty(2, rows, dtype=torch.int64, device=x.device)
    if not rows:
        return found
    tiles = triton.cdiv(width, _TILE)
    values = torch.empty(rows, tiles, dtype=torch.float32, device=x.device)
    places = torch.empty(rows, tiles, dtype=torch.int32, device=x.device)
    arrivals = _arrivals(x.device, triton.next_power_of_2(rows))
    _largest[(tiles, rows)](
        x, x.stride(0), width, values, places, arrivals, found, rows, tiles,
        TILE=_TILE, TILES=triton.next_power_of_2(tiles), num_warps=8,
    )  # fmt: skip
    return found


@cache
def _arrivals(device: torch.device, rows: int) -> torch.Tensor:
    """Zeros, before a launch and after."""
    return torch.zeros(rows, dtype=torch.int32, device=device)
