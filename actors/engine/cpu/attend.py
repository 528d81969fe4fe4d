"""Causal attention over paged keys and values, which are read where they stand: float32, on torch's threads.

Keys stand transposed in their block, ``[width, size]``, so that both products, with keys and with values, are ``outer``
tiles whose rows are the query heads of a KV head: of one token in decoding, of a few neighbours in a prompt. A token's
sums are the same in either, whatever stands beside it.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, cfunc, njit

from actors.engine.cpu.kernels import FLAGS, LOG2_E, LOWEST, ONE, ZERO, Work, exp2
from actors.engine.cpu.outer import COLUMNS, LANES, ROWS, SIZE, tile
from actors.engine.cpu.threads import as_integer, floats, integers, take

SLACK = COLUMNS
"""Elements behind a pool that may be read, whatever they are: the last vectors of a block may reach beyond it."""
_HALF = LANES * SIZE


# Vector code, for which numbers have to be taken for such: whoever calls these knows whether they are.
@njit(fastmath=True, error_model="numpy")
def _largest(scores, lanes):  # type: ignore[no-untyped-def]
    """``lanes [LANES]`` is room: LLVM makes no vectors of a maximum over a loop."""
    whole = len(scores) // LANES * LANES
    for j in range(LANES):
        lanes[j] = scores[0]
    for i in range(0, whole, LANES):
        for j in range(LANES):
            lanes[j] = max(lanes[j], scores[i + j])
    for i in range(whole, len(scores)):
        lanes[0] = max(lanes[0], scores[i])
    largest = lanes[0]
    for j in range(LANES):
        largest = max(largest, lanes[j])
    return largest


@njit(fastmath=True, error_model="numpy")
def _weigh(scores, largest):  # type: ignore[no-untyped-def]
    whole = ZERO
    for i in range(len(scores)):
        scores[i] = exp2(max((scores[i] - largest) * LOG2_E, LOWEST))
        whole += scores[i]
    return whole


@njit(fastmath=FLAGS, error_model="numpy")
def _softmax(scores, scaling, sinks, head, lanes):  # type: ignore[no-untyped-def]
    check = ZERO
    for i in range(len(scores)):
        scores[i] *= scaling
        check += scores[i]
    largest, whole = _largest(scores, lanes), ZERO
    if sinks.shape[0]:
        largest = max(largest, sinks[head])
        whole = exp2(max((sinks[head] - largest) * LOG2_E, LOWEST))
    whole += _weigh(scores, largest)
    if not np.isfinite(check):
        whole = np.float32(np.nan)
    share = ONE / whole
    for i in range(len(scores)):
        scores[i] *= share


@njit(error_model="numpy")
def _multiply(rows, weights, half, weights_step, depth, x, x_step, out, out_half, out_step, start, start_step, ahead, ahead_step):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """A tile of any number of rows."""
    for row in range(0, rows, ROWS):
        tile(
            min(ROWS, rows - row), weights, half, weights_step, depth, x + row * x_step, x_step,
            out + row * out_step, out_half, out_step, start + row * start_step, start_step, ahead, ahead_step,
        )  # fmt: skip


@njit(error_model="numpy")
def _score(query, rows, width, keys, size, blocks, first, past, end, zeros, out, out_step, then):  # type: ignore[no-untyped-def]
    """``out[r, k] = query[r] . key k`` for keys in blocks ``first .. past - 1``; up to ``COLUMNS`` more are written.

    A tile's two vectors are of keys that follow each other, in one block or in two. ``then`` is read next.
    """
    pieces = (size + LANES - 1) // LANES
    whole = (past - first - 1) * pieces + (end - (past - 1) * size + LANES - 1) // LANES
    for piece in range(0, whole, 2):
        near, far = first * pieces + piece, first * pieces + min(piece + 1, whole - 1)
        low = near // pieces * size + near % pieces * LANES
        high = far // pieces * size + far % pieces * LANES
        place = keys + (blocks[near // pieces] * width * size + near % pieces * LANES) * SIZE
        half = keys + (blocks[far // pieces] * width * size + far % pieces * LANES) * SIZE - place
        ahead = then
        if piece + 2 < whole:
            ahead = keys + blocks[(near + 2) // pieces] * width * size * SIZE
        _multiply(
            rows, place, half, size * SIZE, width, query, width * SIZE,
            out + low * SIZE, (high - low) * SIZE, out_step, zeros, 0, ahead, size * SIZE,
        )  # fmt: skip


@njit(error_model="numpy")
def _gather(weights, weights_step, rows, values, size, width, blocks, first, past, end, zeros, out, out_step):  # type: ignore[no-untyped-def]
    """``out[r] = sum of weights[r, k] * value k``; rows of ``out`` are whole tiles wide."""
    for index in range(first, past):
        place = values + blocks[index] * width * size * SIZE
        following = values + blocks[min(index + 1, past - 1)] * width * size * SIZE
        count = min(size, end - index * size)
        for column in range(0, width, COLUMNS):
            target = out + column * SIZE
            _multiply(
                rows, place + column * SIZE, _HALF, width * SIZE, count, weights + index * size * SIZE, weights_step,
                target, _HALF, out_step, zeros if index == first else target, 0 if index == first else out_step,
                following + column * size * SIZE, 2 * _HALF,
            )  # fmt: skip


@cfunc("void(CPointer(int64))", fastmath=FLAGS, error_model="numpy", cache=True)
def _attend(task):  # type: ignore[no-untyped-def]
    """See ``attention``. A task is a piece of a sequence and a KV head with its query heads."""
    _, query_at, keys_at, values_at, plan_at, sinks_at, out_at = carray(task, 7)
    tokens, heads, shared, blocks, size, width, value_width, window, num_sinks, scaling_bits = carray(task, 17)[7:]
    count, longest, table_at, pieces_at, _ = carray(integers(plan_at), 5)
    query, out = carray(floats(query_at), (tokens, heads, width)), carray(floats(out_at), (tokens, heads, value_width))
    pieces, sinks = carray(integers(pieces_at), (count, 4)), carray(floats(sinks_at), num_sinks)
    scaling = np.float32(np.int64(scaling_bits).view(np.float64))
    group = heads // shared
    most = max(ROWS, group)
    scores = np.empty((most, longest + 2 * COLUMNS), np.float32)
    sums = np.empty((most, (value_width + COLUMNS - 1) // COLUMNS * COLUMNS), np.float32)
    packed = np.empty((most, width), np.float32)
    zeros, lanes = np.zeros(COLUMNS, np.float32), np.empty(LANES, np.float32)
    while True:
        index = take(task)
        if index >= count * shared:
            return
        number, head = index // shared, index % shared
        row, some, start, offset = pieces[number]
        end = start + some
        table = carray(integers(table_at + offset * 8), (end + size - 1) // size)
        low = max(0, start + 1 - window) if window > 0 else 0
        first, past, rows = low // size, len(table), some * group
        for i in range(rows):
            source = query[row + i // group, head * group + i % group]
            for j in range(width):
                packed[i, j] = source[j]
        keys = keys_at + head * blocks * size * width * SIZE
        values = values_at + head * blocks * size * value_width * SIZE
        _score(
            packed.ctypes.data, rows, width, keys, size, table, first, past, end, zeros.ctypes.data,
            scores.ctypes.data, scores.shape[1] * SIZE, values + table[first] * value_width * size * SIZE,
        )  # fmt: skip
        for i in range(rows):
            seen = start + i // group + 1
            begin = max(0, seen - window) if window > 0 else 0
            _softmax(scores[i, begin:seen], scaling, sinks, head * group + i % group, lanes)
            scores[i, first * size : begin] = ZERO
            scores[i, seen:end] = ZERO
        _gather(
            scores.ctypes.data, scores.shape[1] * SIZE, rows, values, size, value_width, table, first, past, end,
            zeros.ctypes.data, sums.ctypes.data, sums.shape[1] * SIZE,
        )  # fmt: skip
        for i in range(rows):
            target = out[row + i // group, head * group + i % group]
            for j in range(value_width):
                target[j] = sums[i, j]


def tokens_at_once(heads: int, shared: int) -> int:
    """Tokens of a prompt that a task of ``attention`` best takes, with so many query heads to so many KV heads."""
    return max(1, ROWS // (heads // shared))


class Plan:
    """Which tokens a step has: ``address`` stays as it is, what stands there is that of the last ``set``.

    ``pieces [n, 4]`` are runs of tokens that follow each other: the first row, how many (``tokens_at_once`` at most),
    the position of the first, and where in ``table`` its sequence's blocks begin. Keys and values of row ``t`` go to
    place ``targets[t]``, ``block * size + index``. No sequence reaches beyond ``longest`` tokens. All are int64.
    """

    def __init__(self) -> None:
        self._numbers = torch.zeros(5, dtype=torch.int64)
        self.address = self._numbers.data_ptr()

    def set(self, table: torch.Tensor, pieces: torch.Tensor, targets: torch.Tensor, longest: int) -> None:
        self._parts = table, pieces, targets
        self.count = len(pieces)
        self._numbers.copy_(torch.tensor([self.count, longest, *(part.data_ptr() for part in self._parts)]))


def attention(
    query: int,
    pools: tuple[torch.Tensor, torch.Tensor],
    plan: Plan,
    out: int,
    tokens: int,
    heads: int,
    scaling: float,
    window: int = 0,
    sinks: torch.Tensor | None = None,
) -> Work:
    """Each row of ``query [T, h, w]`` attends to the last ``window`` (0: all) tokens of its sequence up to itself.

    ``pools`` are keys ``[k, blocks, w, size]`` and values ``[k, blocks, size, v]`` with ``SLACK`` behind them, in which
    all these tokens stand. ``sinks [h]``: one more logit of each head, without a value; it must be kept. All are
    contiguous. ``out`` gets ``[T, h, v]``; like ``query``, it is an address.
    """
    keys, values = pools
    width, (shared, blocks, size, value_width) = keys.shape[2], values.shape
    logits, num_sinks = (0, 0) if sinks is None else (sinks.data_ptr(), len(sinks))
    sizes = tokens, heads, shared, blocks, size, width, value_width, window, num_sinks, as_integer(scaling)
    return _attend, [query, keys.data_ptr(), values.data_ptr(), plan.address, logits, out, *sizes]
