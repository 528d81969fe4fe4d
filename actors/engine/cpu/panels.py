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

import platform
from collections.abc import Sequence
from typing import Any

import torch
from llvmlite import ir
from numba import carray, cfunc, types
from numba.core.cgutils import get_or_insert_function
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from actors.engine.cpu import amx, pages, threads

if amx.available():  # compiled by its import, before the first request
    from actors.engine.cpu import tiles

# What Numba compiles for; its cache on disk tells processors apart by the same.
_FEATURES: str = cpu_target.target_context.codegen().magic_tuple()[2]
_X86 = platform.machine().lower() in ("x86_64", "amd64")
_FUSED = not _X86 or "+fma" in _FEATURES
_LANES = 16 if "+avx512f" in _FEATURES else 8 if "+avx" in _FEATURES else 4
COLUMNS = 2 * _LANES
"""Outputs in a panel: two vectors."""
ROWS = 12 if "+avx512f" in _FEATURES or not _X86 else 6
"""Most rows of a tile: its sums take 24 of 32 vector registers, or 12 of 16."""
_SIZE = 4  # bytes of a float32
_ROW = COLUMNS * _SIZE  # of a panel
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
_LINE = 64
# Rows of a group from which the matrix units are faster, where there are such.
_MANY = 64
_SHARES = 4  # tasks per thread: the cores of a shared machine are not equally fast

_INT, _FLOAT = ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, _LANES)


def _write_tile(module: ir.Module, rows: int) -> ir.Function:
    """``void(panel, depth, x, x_step, out, out_step, start, start_step, ahead, ahead_step)``: ``out = start + x @ panel``.

    These are addresses, and the bytes from one row to the next; ``depth`` is at least 1. For each row of the panel,
    ``ahead_step`` bytes, up to two lines, are asked for from ``ahead`` on.
    """
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_INT] * 10), f"accordion_tile_{rows}")
    function.linkage = "internal"
    function.attributes.add("noinline")
    panel, depth, x, x_step, out, out_step, start, start_step, ahead, ahead_step = function.args
    entry, loop, end = (function.append_basic_block() for _ in range(3))
    builder = ir.IRBuilder(entry)

    def at(address: ir.Value, offset: ir.Value, kind: ir.Type) -> ir.Value:
        return builder.inttoptr(builder.add(address, offset), kind.as_pointer())

    def halves(address: ir.Value) -> list[ir.Value]:
        return [at(address, _INT(half * _LANES * _SIZE), _VECTOR) for half in range(2)]

    def load(address: ir.Value) -> list[ir.Value]:
        return [builder.load(place, align=_SIZE) for place in halves(address)]

    def add_product(element: ir.Value, weight: ir.Value, so_far: ir.Value) -> ir.Value:
        if not _FUSED:
            return builder.fadd(builder.fmul(element, weight), so_far)
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        fma = get_or_insert_function(module, kind, f"llvm.fma.v{_LANES}f32")
        return builder.call(fma, [element, weight, so_far])

    byte, small = ir.IntType(8), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), small, small, small])
    prefetch = module.declare_intrinsic("llvm.prefetch", [byte.as_pointer()], kind)
    sources = [builder.add(x, builder.mul(x_step, _INT(row))) for row in range(rows)]
    builder.branch(loop)

    builder.position_at_end(loop)
    index = builder.phi(_INT)
    sums = [[builder.phi(_VECTOR) for _ in range(2)] for _ in range(rows)]
    place = builder.add(panel, builder.mul(index, _INT(_ROW)))
    weights = load(place)
    wanted = builder.add(ahead, builder.mul(index, ahead_step))
    for line in range(0, _ROW, _LINE):
        builder.call(prefetch, [at(wanted, _INT(line), byte), small(0), small(2), small(1)])  # to read, near, as data
    results = []
    for source, so_far in zip(sources, sums, strict=True):
        scalar = builder.load(at(source, builder.mul(index, _INT(_SIZE)), _FLOAT), align=_SIZE)
        element = builder.insert_element(_VECTOR(ir.Undefined), scalar, small(0))
        element = builder.shuffle_vector(element, _VECTOR(ir.Undefined), ir.VectorType(small, _LANES)(None))
        results.append([add_product(element, *pair) for pair in zip(weights, so_far, strict=True)])
    following = builder.add(index, _INT(1))
    builder.cbranch(builder.icmp_signed("<", following, depth), loop, end)
    index.add_incoming(_INT(0), entry)
    index.add_incoming(following, loop)
    for row in range(rows):
        for half in range(2):
            sums[row][half].add_incoming(_VECTOR(None), entry)
            sums[row][half].add_incoming(results[row][half], loop)

    builder.position_at_end(end)
    for row in range(rows):
        target = builder.add(out, builder.mul(out_step, _INT(row)))
        before = load(builder.add(start, builder.mul(start_step, _INT(row))))
        for place, *parts in zip(halves(target), before, results[row], strict=True):
            builder.store(builder.fadd(*parts), place, align=_SIZE)
    builder.ret_void()
    return function


@intrinsic
def _tile(
    typing: Any,
    rows: Any,
    panel: Any,
    depth: Any,
    x: Any,
    x_step: Any,
    out: Any,
    out_step: Any,
    start: Any,
    start_step: Any,
    ahead: Any,
    ahead_step: Any,
) -> Any:
    """The tile of ``rows`` (1 to ROWS) rows; the other arguments are those of ``_write_tile``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        end = builder.append_basic_block()
        choice = builder.switch(arguments[0], end)
        for count in range(1, ROWS + 1):
            block = builder.append_basic_block()
            choice.add_case(_INT(count), block)
            builder.position_at_end(block)
            builder.call(_write_tile(builder.module, count), arguments[1:])
            builder.branch(end)
        builder.position_at_end(end)

    return types.void(*[types.int64] * 11), generate


@cfunc("void(CPointer(int64))", error_model="numpy", cache=True)
def _multiply(task):  # type: ignore[no-untyped-def]
    """See ``Panels.multiply``. A task is ``chunk`` panels of a group's weight for all rows of the group."""
    _, panels, biases, x, x_step, out, depth, per_weight, chunk, groups = carray(task, 10)
    spans = carray(task, 10 + 3 * groups)[10:]
    out_step = per_weight * _ROW
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
                        _tile(
                            following - row,
                            weights,
                            deep,
                            x + row * x_step + below * _SIZE,
                            x_step,
                            target,
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
        """``x [n, depth]`` to ``[n, width]``: rows ``start .. end - 1`` by weight ``i`` for each ``(start, end, i)``.

        The groups cover all rows.
        """
        if len(x) >= _MANY * len(groups) and amx.available():
            out = tiles.multiply(self._panels, self._biases, x.contiguous(), groups)
            return out if out.shape[1] == self._width else out[:, : self._width].contiguous()
        x = _apart(x) if len(x) > 1 and self._depth * _SIZE % _PAGE == 0 else x.contiguous()
        out = torch.empty(len(x), self._per_weight * COLUMNS)
        chunk = -(-self._per_weight * len(groups) // (_SHARES * torch.get_num_threads()))
        chunk = min(chunk, self._per_weight)
        threads.run(
            _multiply,
            -(-self._per_weight // chunk) * len(groups),
            [
                self._panels.data_ptr(),
                self._biases.data_ptr(),
                x.data_ptr(),
                x.stride(0) * _SIZE,
                out.data_ptr(),
                self._depth,
                self._per_weight,
                chunk,
                len(groups),
                *(number for group in groups for number in group),
            ],
        )
        return out if out.shape[1] == self._width else out[:, : self._width].contiguous()


def _apart(x: torch.Tensor) -> torch.Tensor:
    """``x`` with the room of a cache line, 64 bytes, after every row."""
    room = x.new_empty(len(x), x.shape[1] + 16)[:, : x.shape[1]]
    return room.copy_(x)
