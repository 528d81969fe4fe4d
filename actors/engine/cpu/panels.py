"""float32 products ``x @ weight.T`` with weights in panels: few rows at the speed of memory, many at that of FMA.

A panel holds ``COLUMNS`` of a weight's outputs, ``[in, COLUMNS]``. A tile, up to ``ROWS`` rows of ``x`` by one panel,
is summed in vector registers alone (outer products, as in K. Goto and R. van de Geijn, "Anatomy of High-Performance
Matrix Multiplication", 2008): each vector of weights serves all its rows, each element of ``x`` all its columns. So a
panel comes from memory once, in order, and from the core's cache for the tiles after the first.

Reading ahead is asked for: otherwise a core waits for memory at every page of a weight, and computes only in between.

Any tile sums an output in the same order, fused multiply-adds along ``in``: a row's result depends neither on the rows
beside it nor on the number of threads. Where a processor has matrix units, products of many rows run on those
(``tiles``), and may differ by rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from numba import carray, cfunc

from actors.engine.cpu import amx, outer, pages, threads
from actors.engine.cpu.kernels import Work
from actors.engine.cpu.outer import ROWS, SIZE, tile
from actors.engine.cpu.threads import integers

if amx.available():  # compiled by its import, before the first request
    from actors.engine.cpu import tiles

COLUMNS = outer.COLUMNS
"""Outputs in a panel."""
_ROW = COLUMNS * SIZE  # bytes of a panel's
# Steps along ``in`` summed on their own: that much of a panel stays in the first cache from one tile to the next, and
# rounding errors grow with the length of a sum.
_DEEPEST = 256
# Rows of x that all panels of a task serve before the next ones come: they stay in the second cache meanwhile.
_BLOCK = 4 * ROWS
# Rows of x a multiple of this apart would share a few lines of the first cache, so they are moved apart.
_PAGE = 4096
# How far ahead, in bytes, weights are asked for, into the second cache. The tiles that share a part of a panel each ask
# for their share of the next: with it all asked for by the first, the others would leave the memory idle.
_AHEAD = _DEEPEST * _ROW
# Rows of a group from which the matrix units are faster, where there are such.
_MANY = 64
_SHARES = 4  # tasks per thread: the cores of a shared machine are not equally fast


@cfunc("void(CPointer(int64))", error_model="numpy", cache=True)
def _multiply(task):  # type: ignore[no-untyped-def]
    """See ``Panels.multiply``. A task is ``chunk`` panels of a group's weight for all rows of the group."""
    _, panels, biases, x, x_step, out, out_step, depth, per_weight, shares, groups_at = carray(task, 11)
    groups = integers(groups_at)[0]
    spans = carray(integers(groups_at), 1 + 3 * groups)[1:]
    chunk = min((per_weight * groups + shares - 1) // shares, per_weight)
    chunks = (per_weight + chunk - 1) // chunk
    while True:
        index = threads.take(task)
        if index >= groups * chunks:
            return
        group, first = index // chunks, index % chunks * chunk
        start, end, weight = spans[3 * group], spans[3 * group + 1], spans[3 * group + 2]
        blocks = (end - start + _BLOCK - 1) // _BLOCK
        for block in range(blocks):
            low = start + (end - start) * block // blocks
            high = start + (end - start) * (block + 1) // blocks
            tiles = (high - low + ROWS - 1) // ROWS
            for panel in range(first, min(first + chunk, per_weight)):
                place = weight * per_weight + panel
                bias = biases + place * _ROW
                for below in range(0, depth, _DEEPEST):
                    row, deep = low, min(_DEEPEST, depth - below)
                    weights = panels + (place * depth + below) * _ROW
                    ahead = weights + _AHEAD
                    for number in range(1, tiles + 1):
                        following = low + (high - low) * number // tiles  # blocks and tiles as even as can be
                        target = out + row * out_step + panel * _ROW
                        tile(
                            following - row,
                            weights,
                            _ROW // 2,
                            _ROW,
                            deep,
                            x + row * x_step + below * SIZE,
                            x_step,
                            target,
                            _ROW // 2,
                            out_step,
                            target if below else bias,
                            out_step if below else 0,
                            ahead,
                            _ROW // tiles,
                        )
                        row = following
                        ahead += _ROW // tiles * deep


class Panels:
    """``count`` weights ``[width, depth]`` with biases ``[width]`` of zeros, in panels. Empty at first."""

    def __init__(self, count: int, width: int, depth: int) -> None:
        self._count, self._width, self._depth = count, width, depth
        self._per_weight = -(-width // COLUMNS)
        self._panels = pages.zeros(count, self._per_weight, depth, COLUMNS)
        self._biases = torch.zeros(count, self._per_weight * COLUMNS)

    def fill(self, index: int, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Copy ``weight [width, depth]`` and ``bias [width]`` to ``index``."""
        panels, whole = self._panels[index], self._width // COLUMNS
        panels[:whole] = weight[: whole * COLUMNS].view(whole, COLUMNS, self._depth).transpose(1, 2)
        if whole < self._per_weight:
            rest = self._width - whole * COLUMNS
            panels[whole, :, :rest] = weight[whole * COLUMNS :].t()
            panels[whole, :, rest:] = 0
        if bias is not None:
            self._biases[index, : self._width] = bias

    def put(self, index: int, other: Panels) -> None:
        """Copy the only weight of ``other``, of the same shape, to ``index``."""
        self._panels[index] = other._panels[0]
        self._biases[index] = other._biases[0]

    def multiply(self, x: torch.Tensor, groups: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        """``x [n, depth]`` to ``[n, width]``, whose rows may stand apart.

        Rows ``start .. end - 1`` are multiplied by weight ``i`` for each ``(start, end, i)``; groups cover all rows.
        """
        if len(x) >= _MANY * len(groups) and amx.available():
            out = tiles.multiply(self._panels, self._biases, x.contiguous(), groups)
            return out if out.shape[1] == self._width else out[:, : self._width].contiguous()
        x = _apart(x) if len(x) > 1 and self._depth * SIZE % _PAGE == 0 else x.contiguous()
        out = outer.rows(len(x), self._per_weight * COLUMNS)
        plan = torch.tensor([len(groups), *(number for group in groups for number in group)])
        work, arguments = self.product(
            x.data_ptr(), x.stride(0) * SIZE, out.data_ptr(), out.stride(0) * SIZE, plan.data_ptr()
        )
        threads.run(work, self._per_weight * len(groups), arguments)
        return out if out.shape[1] == self._width else out[:, : self._width].contiguous()

    @property
    def shape(self) -> tuple[int, int]:
        """``(width, depth)``."""
        return self._width, self._depth

    def product(self, x: int, x_step: int, out: int, out_step: int, groups: int) -> Work:
        """``multiply`` as a work of ``threads``, by addresses.

        A ``_step``, in bytes, leads from one row to the next; those of ``out`` have room for whole panels. At
        ``groups`` stand, as int64, their number and the three of each.
        """
        shares = _SHARES * torch.get_num_threads()
        parts = self._panels.data_ptr(), self._biases.data_ptr()
        return _multiply, [*parts, x, x_step, out, out_step, self._depth, self._per_weight, shares, groups]


def _apart(x: torch.Tensor) -> torch.Tensor:
    """``x`` with the room of a cache line, 64 bytes, after every row."""
    room = x.new_empty(len(x), x.shape[1] + 16)[:, : x.shape[1]]
    return room.copy_(x)
