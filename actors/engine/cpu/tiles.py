"""float32 products of many rows on Intel's matrix units: see ``amx``. Imported only where they are available.

Weights stand in panels of float32, as in ``panels``. While the matrix units are busy with one panel, the vector units
beside them take the next one to pieces: so a panel comes from memory once for up to ``_BLOCK`` rows.

Any row is summed in the same order, so its result depends neither on the rows beside it nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import carray, cfunc, njit

from actors.engine.cpu import outer, threads
from actors.engine.cpu.amx import (
    LINE,
    PIECES,
    STEP,
    TILE,
    add_one,
    add_two,
    configure,
    load_one,
    load_two,
    release,
    split,
    store_one,
    store_two,
)
from actors.engine.cpu.threads import floats, read_ahead, take

COLUMNS = 2 * TILE
"""Of a panel."""
_SPLITS = 2 * TILE  # of a step of a panel: 16 pairs of rows, each in two halves
_BLOCK = 256  # rows, and
_DEEPEST = 24
_SHARES = 4  # tasks per thread: the cores of a shared machine are not equally fast
_AHEAD = 8192  # bytes of weights that are asked for before they are taken to pieces


@njit(error_model="numpy")
def _split_panel(panel, depth, zeros, pieces, first, last):  # type: ignore[no-untyped-def]
    """Of ``panel [depth, 32]``, splits ``first .. last - 1`` into ``pieces [steps, 2, 3, 16]`` lines, zeros below."""
    for index in range(first, last):
        step, row, half = index // _SPLITS, index // 2 % TILE, index % 2
        low = panel + ((step * STEP + row) * 2 + half) * LINE
        high = low + TILE * 2 * LINE
        read_ahead(low + _AHEAD)
        read_ahead(high + _AHEAD)
        missing = step * STEP + row + TILE - depth
        target = pieces + ((step * 2 + half) * PIECES * TILE + row) * LINE
        split(zeros if missing >= TILE else low, zeros if missing >= 0 else high, target, TILE * LINE)


@cfunc("void(CPointer(int64))", error_model="numpy", cache=True)
def _split_rows(task):  # type: ignore[no-untyped-def]
    """``x [rows, depth]`` into rows of ``[steps, 3]`` lines."""
    _, x, x_step, pieces, step, rows, depth, shares = carray(task, 8)
    whole = depth // STEP
    rest = np.zeros(STEP, np.float32)
    while True:
        share = take(task)
        if share >= shares:
            return
        for row in range(rows * share // shares, rows * (share + 1) // shares):
            target = pieces + row * step
            for index in range(whole):
                source = x + row * x_step + index * 2 * LINE
                split(source, source + LINE, target + index * PIECES * LINE, LINE)
            if depth > whole * STEP:
                rest[: depth - whole * STEP] = carray(floats(x + row * x_step), depth)[whole * STEP :]
                source = rest.ctypes.data
                split(source, source + LINE, target + whole * PIECES * LINE, LINE)


@njit
def _round(number, steps, slabs, start, end, blocks, first, past):  # type: ignore[no-untyped-def]
    """What one of a task's rounds computes: steps and rows, from .. to, and the panel."""
    outer, panel = number // (past - first), first + number % (past - first)
    slab, block = outer // blocks, outer % blocks
    low, high = start + (end - start) * block // blocks, start + (end - start) * (block + 1) // blocks
    return steps * slab // slabs, steps * (slab + 1) // slabs, low, high, panel


@cfunc("void(CPointer(int64))", error_model="numpy", cache=True)
def _multiply(task):  # type: ignore[no-untyped-def]
    """See ``multiply``. A task is ``chunk`` panels of a group's weight for all rows of the group."""
    _, panels, biases, x, x_step, out, out_step, depth, per_weight, chunk, groups = carray(task, 11)
    spans = carray(task, 11 + 3 * groups)[11:]
    width = per_weight * COLUMNS
    chunks = (per_weight + chunk - 1) // chunk
    steps = (depth + STEP - 1) // STEP
    slabs = (steps + _DEEPEST - 1) // _DEEPEST
    settings = np.zeros(LINE, np.uint8)
    settings[0] = 1  # the palette of eight tiles of 1 KiB
    settings[16:32:2] = LINE  # bytes of their rows
    settings[48:56] = TILE  # rows
    configure(settings.ctypes.data)
    zeros = np.zeros(TILE, np.float32)
    room = np.empty((2 * _DEEPEST * PIECES * 2 + 2 * 2) * TILE * LINE + LINE, np.uint8)
    rest = (room.ctypes.data + LINE - 1) // LINE * LINE
    pieces = rest + 2 * 2 * TILE * LINE
    others = pieces + _DEEPEST * PIECES * 2 * TILE * LINE
    while True:
        index = take(task)
        if index >= groups * chunks:
            break
        group, first = index // chunks, index % chunks * chunk
        past = min(first + chunk, per_weight)
        start, end, weight = spans[3 * group], spans[3 * group + 1], spans[3 * group + 2]
        blocks = (end - start + _BLOCK - 1) // _BLOCK
        rounds = slabs * blocks * (past - first)
        above, below, low, high, panel = _round(0, steps, slabs, start, end, blocks, first, past)
        place = panels + ((weight * per_weight + panel) * depth + above * STEP) * COLUMNS * 4
        deep = min(depth, below * STEP) - above * STEP
        _split_panel(place, deep, zeros.ctypes.data, pieces, 0, (below - above) * _SPLITS)
        for number in range(rounds):
            above, below, low, high, panel = _round(number, steps, slabs, start, end, blocks, first, past)
            after = _round(min(number + 1, rounds - 1), steps, slabs, start, end, blocks, first, past)
            place = panels + ((weight * per_weight + after[4]) * depth + after[0] * STEP) * COLUMNS * 4
            deep = min(depth, after[1] * STEP) - after[0] * STEP
            more = (after[1] - after[0]) * _SPLITS if number + 1 < rounds else 0
            turns, turn = (high - low + 2 * TILE - 1) // (2 * TILE) * (below - above), 0
            for row in range(low, high, 2 * TILE):
                source = x + row * x_step + above * PIECES * LINE
                target = out + row * out_step + panel * COLUMNS * 4
                begin = target if above else biases + (weight * width + panel * COLUMNS) * 4
                begin_step = out_step if above else 0
                two = high - row > TILE
                if two:
                    load_two(begin, begin_step)
                else:
                    load_one(begin, begin_step)
                for step in range(below - above):
                    ours, theirs = source + step * PIECES * LINE, pieces + step * PIECES * 2 * TILE * LINE
                    if two:
                        add_two(ours, x_step, theirs)
                    else:
                        add_one(ours, x_step, theirs)
                    done = more * turn // turns
                    turn += 1
                    _split_panel(place, deep, zeros.ctypes.data, others, done, more * turn // turns)
                if high - row >= 2 * TILE:
                    store_two(target, out_step)
                    continue
                if two:
                    store_two(rest, COLUMNS * 4)
                else:
                    store_one(rest, COLUMNS * 4)
                sums = carray(floats(rest), (high - row, COLUMNS))
                for i in range(high - row):
                    some = carray(floats(target + i * out_step), COLUMNS)
                    for j in range(COLUMNS):
                        some[j] = sums[i, j]
            pieces, others = others, pieces
    release()


def multiply(
    panels: torch.Tensor, biases: torch.Tensor, x: torch.Tensor, groups: Sequence[tuple[int, int, int]]
) -> torch.Tensor:
    """``x [n, depth]`` to ``[n, p * 32]``, as ``Panels.multiply`` does, each of whose rows is contiguous.

    ``panels [weights, p, depth, 32]``, ``biases [weights, p * 32]``; all float32. Only where ``available``.
    """
    _, per_weight, depth, _ = panels.shape
    rows = len(x)
    step = (-(-depth // STEP) * PIECES | 1) * LINE  # odd numbers of lines: a tile's rows use all of the cache's sets
    # A group's last tiles go on behind its rows; what they give is dropped.
    pieces = torch.empty((rows + 2 * TILE) * step + LINE, dtype=torch.uint8)
    pieces_at = -(-pieces.data_ptr() // LINE) * LINE
    out = outer.rows(rows + 2 * TILE, per_weight * COLUMNS)[:rows]
    tasks = _SHARES * torch.get_num_threads()
    shares = min(rows, tasks)
    threads.run(_split_rows, shares, [x.data_ptr(), x.stride(0) * 4, pieces_at, step, rows, depth, shares])
    chunk = min(-(-per_weight * len(groups) // tasks), per_weight)
    addresses = panels.data_ptr(), biases.data_ptr(), pieces_at, step, out.data_ptr(), out.stride(0) * 4
    spans = [number for group in groups for number in group]
    threads.run(
        _multiply,
        -(-per_weight // chunk) * len(groups),
        [*addresses, depth, per_weight, chunk, len(groups), *spans],
    )
    return out
