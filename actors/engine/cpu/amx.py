"""Intel's matrix units (AMX) for Numba, and what they need to multiply float32.

They multiply bfloat16 and add in float32. A float32 number is the sum of three bfloat16 (8 bits of mantissa each, 24
together). Of the nine products of the pieces of two numbers the six largest are summed; what is left out is smaller
than float32's own rounding (G. Henry, P. Tang and A. Heinecke, "Leveraging the bfloat16 Artificial Intelligence
Datatype For Higher-Precision Computations", 2019). Infinity becomes NaN, its pieces being infinity and what that
leaves of itself.

Nothing is compiled until it is used: these are instructions that other processors do not have.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

TILE = 16
"""Rows of a tile; each is a line of 16 float32 or of 16 pairs of bfloat16."""
STEP = 2 * TILE
"""Of depth in a tile: a pair's numbers are 16 apart."""
LINE = 64
"""Bytes."""
PIECES = 3
# Pairs of pieces (of x, of weights; 0 is the largest), so that each needs only one other than the pair before.
_PAIRS = ((2, 0), (1, 0), (1, 1), (0, 1), (0, 2), (0, 0))


@functools.cache
def available() -> bool:
    """Whether this process may use the units; asks the system for them, once for all threads."""
    features = cpu_target.target_context.codegen().magic_tuple()[2]
    if "+amx-bf16" not in features or "+avx512f" not in features:
        return False
    try:
        # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): Linux, Documentation/arch/x86/xstate.rst.
        return bool(ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0)
    except (AttributeError, OSError):
        return False


_INT, _BYTE = ir.IntType(64), ir.IntType(8)
_POINTER = _BYTE.as_pointer()
_OURS, _THEIRS = (4, 5), (6, 7)  # tiles of x, of weights; those before hold the sums


def _call(builder: Any, name: str, *arguments: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(builder.module.declare_intrinsic(f"llvm.x86.{name}", (), kind), arguments)


def _at(builder: Any, address: Any, offset: Any) -> Any:
    return builder.inttoptr(builder.add(address, offset), _POINTER)


def _move_sums(name: str, rows: int) -> Any:
    """Loads or stores ``rows x 2`` tiles of sums, by the address of the first and the bytes between two rows."""

    @intrinsic
    def move(typing: Any, address: Any, step: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, step = arguments
            for tile in range(2 * rows):
                offset = builder.add(builder.mul(step, _INT(TILE * (tile // 2))), _INT(tile % 2 * LINE))
                _call(builder, name, _BYTE(tile), _at(builder, address, offset), step)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return move


def _add_step(rows: int) -> Any:
    """Adds the product of ``rows`` tiles of x, one below the other, and two of weights, to the sums."""

    @intrinsic
    def add(typing: Any, x: Any, x_step: Any, weights: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, x_step, weights = arguments
            before = (-1, -1)
            for pair in _PAIRS:
                if pair[0] != before[0]:
                    for row in range(rows):
                        offset = builder.add(builder.mul(x_step, _INT(TILE * row)), _INT(pair[0] * LINE))
                        _call(builder, "tileloadd64", _BYTE(_OURS[row]), _at(builder, x, offset), x_step)
                if pair[1] != before[1]:
                    for half in range(2):
                        place = _at(builder, weights, _INT((half * PIECES + pair[1]) * TILE * LINE))
                        _call(builder, "tileloadd64", _BYTE(_THEIRS[half]), place, _INT(LINE))
                before = pair
                for tile in range(2 * rows):
                    parts = _BYTE(_OURS[tile // 2]), _BYTE(_THEIRS[tile % 2])
                    _call(builder, "tdpbf16ps", _BYTE(tile), *parts)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), generate

    return add


load_one, load_two = _move_sums("tileloadd64", 1), _move_sums("tileloadd64", 2)
store_one, store_two = _move_sums("tilestored64", 1), _move_sums("tilestored64", 2)
add_one, add_two = _add_step(1), _add_step(2)


@intrinsic
def configure(typing: Any, settings: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "ldtilecfg", builder.inttoptr(arguments[0], _POINTER))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def release(typing: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def split(typing: Any, low: Any, high: Any, target: Any, distance: Any) -> Any:
    """Takes 16 float32 at ``low`` and as many at ``high`` to pieces.

    Gives a line for each piece, ``distance`` bytes apart, of 16 pairs: of a number at ``low`` and the one at ``high``.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        low, high, target, distance = arguments
        numbers, bits = ir.VectorType(ir.FloatType(), TILE), ir.VectorType(ir.IntType(32), TILE)

        def all_of(number: int) -> ir.Constant:
            return ir.Constant(bits, [number] * TILE)

        def load(address: Any) -> Any:
            return builder.load(builder.inttoptr(address, numbers.as_pointer()), align=4)

        def rounded(number: Any) -> Any:
            """Its bits as bfloat16's, half away from zero: what is left of the number then is exact."""
            return builder.and_(builder.add(builder.bitcast(number, bits), all_of(0x8000)), all_of(0xFFFF0000))

        rests = [load(low), load(high)]
        for piece in range(PIECES):
            last = piece == PIECES - 1  # it has no more bits than it may, unless it is NaN
            parts = [builder.bitcast(rest, bits) if last else rounded(rest) for rest in rests]
            pairs = builder.or_(builder.lshr(parts[0], all_of(16)), builder.and_(parts[1], all_of(0xFFFF0000)))
            place = builder.add(target, builder.mul(distance, _INT(piece)))
            builder.store(pairs, builder.inttoptr(place, bits.as_pointer()), align=LINE)
            rests = [
                builder.fsub(rest, builder.bitcast(part, numbers)) for rest, part in zip(rests, parts, strict=True)
            ]
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate
