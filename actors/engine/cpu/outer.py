"""The innermost loop of float32 products: sums of outer products that stay in vector registers.

``out = start + x @ weights`` for up to ``ROWS`` rows of ``x`` and ``COLUMNS`` columns of ``weights``, two vectors of
them: each vector of weights serves all rows, each element of ``x`` all columns. A sum goes along the depth in fused
multiply-adds, so it depends neither on the rows beside it nor on their number.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.core.registry import cpu_target
from numba.extending import intrinsic

# What Numba compiles for; its cache on disk tells processors apart by the same.
_FEATURES: str = cpu_target.target_context.codegen().magic_tuple()[2]
_X86 = platform.machine().lower() in ("x86_64", "amd64")
_FUSED = not _X86 or "+fma" in _FEATURES
LANES = 16 if "+avx512f" in _FEATURES else 8 if "+avx" in _FEATURES else 4
"""Elements of a vector."""
COLUMNS = 2 * LANES
ROWS = 12 if "+avx512f" in _FEATURES or not _X86 else 6
"""Most rows: their sums take 24 of 32 vector registers, or 12 of 16."""
SIZE = 4
"""Bytes of a float32."""
_PER_LINE = 16  # float32 in a line of cache
_FEW_SETS = 32  # rows a multiple of so many lines apart have two of 64 sets, or one

_INT, _FLOAT = ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_ARGUMENTS = 13


def _write(module: ir.Module, rows: int) -> ir.Function:
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_INT] * _ARGUMENTS), f"accordion_tile_{rows}")
    function.linkage = "internal"
    function.attributes.add("noinline")
    weights, half, weights_step, depth, x, x_step, out, out_half, out_step, start, start_step, ahead, ahead_step = (
        function.args
    )
    entry, loop, end = (function.append_basic_block() for _ in range(3))
    builder = ir.IRBuilder(entry)

    def at(address: ir.Value, offset: ir.Value, kind: ir.Type) -> ir.Value:
        return builder.inttoptr(builder.add(address, offset), kind.as_pointer())

    def add_product(element: ir.Value, weight: ir.Value, so_far: ir.Value) -> ir.Value:
        if not _FUSED:
            return builder.fadd(builder.fmul(element, weight), so_far)
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        fma = get_or_insert_function(module, kind, f"llvm.fma.v{LANES}f32")
        return builder.call(fma, [element, weight, so_far])

    byte, small = ir.IntType(8), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), small, small, small])
    prefetch = module.declare_intrinsic("llvm.prefetch", [byte.as_pointer()], kind)
    sources = [builder.add(x, builder.mul(x_step, _INT(row))) for row in range(rows)]
    builder.branch(loop)

    builder.position_at_end(loop)
    index = builder.phi(_INT)
    sums = [[builder.phi(_VECTOR) for _ in range(2)] for _ in range(rows)]
    place = builder.add(weights, builder.mul(index, weights_step))
    vectors = [builder.load(at(place, offset, _VECTOR), align=SIZE) for offset in (_INT(0), half)]
    wanted = builder.add(ahead, builder.mul(index, ahead_step))
    for offset in (_INT(0), half):
        builder.call(prefetch, [at(wanted, offset, byte), small(0), small(2), small(1)])  # to read, near, as data
    results = []
    for source, so_far in zip(sources, sums, strict=True):
        scalar = builder.load(at(source, builder.mul(index, _INT(SIZE)), _FLOAT), align=SIZE)
        element = builder.insert_element(_VECTOR(ir.Undefined), scalar, small(0))
        element = builder.shuffle_vector(element, _VECTOR(ir.Undefined), ir.VectorType(small, LANES)(None))
        results.append([add_product(element, *pair) for pair in zip(vectors, so_far, strict=True)])
    following = builder.add(index, _INT(1))
    builder.cbranch(builder.icmp_signed("<", following, depth), loop, end)
    index.add_incoming(_INT(0), entry)
    index.add_incoming(following, loop)
    for row in range(rows):
        for part in range(2):
            sums[row][part].add_incoming(_VECTOR(None), entry)
            sums[row][part].add_incoming(results[row][part], loop)

    builder.position_at_end(end)
    for row in range(rows):
        target = builder.add(out, builder.mul(out_step, _INT(row)))
        before = builder.add(start, builder.mul(start_step, _INT(row)))
        for part, offset in enumerate((_INT(0), out_half)):
            so_far = builder.load(at(before, _INT(part * LANES * SIZE), _VECTOR), align=SIZE)
            builder.store(builder.fadd(so_far, results[row][part]), at(target, offset, _VECTOR), align=SIZE)
    builder.ret_void()
    return function


def row_width(width: int) -> int:
    """In how much room a row of ``width`` float32 best stands: so that neighbours share no lines of the first cache."""
    lines = -(-width // _PER_LINE)
    return width if lines % _FEW_SETS else (lines + 1) * _PER_LINE


def rows(count: int, width: int) -> torch.Tensor:
    """Empty ``[count, width]``, a ``row_width`` apart."""
    return torch.empty(count, row_width(width))[:, :width]


@intrinsic
def tile(
    typing: Any,
    rows: Any,
    weights: Any,
    half: Any,
    weights_step: Any,
    depth: Any,
    x: Any,
    x_step: Any,
    out: Any,
    out_half: Any,
    out_step: Any,
    start: Any,
    start_step: Any,
    ahead: Any,
    ahead_step: Any,
) -> Any:
    """``out = start + x @ weights`` for 1 to ``ROWS`` rows; all are int64: addresses, and bytes.

    The second vector of a row of ``weights`` stands ``half`` behind the first, of a row of ``out`` ``out_half``, of a
    row of ``start`` right behind it; a ``_step`` leads to the next row. ``depth`` is at least 1. For each step along
    it the lines at ``ahead`` and ``half`` behind that are asked for into the second cache, and ``ahead`` moves on by
    ``ahead_step``; it may be any address.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        end = builder.append_basic_block()
        choice = builder.switch(arguments[0], end)
        for count in range(1, ROWS + 1):
            block = builder.append_basic_block()
            choice.add_case(_INT(count), block)
            builder.position_at_end(block)
            name = f"accordion_tile_{count}"
            function = builder.module.globals.get(name) or _write(builder.module, count)
            builder.call(function, arguments[1:])
            builder.branch(end)
        builder.position_at_end(end)

    return types.void(*[types.int64] * (_ARGUMENTS + 1)), generate
