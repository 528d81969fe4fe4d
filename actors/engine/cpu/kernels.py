"""Loops that torch has no single operator for, compiled by Numba: float32, the GIL released.

Decoding computes a few rows at a time, and then a step is hundreds of operators whose arithmetic takes less time than
calling them. Numba is LLVM in a wheel, so it needs no compiler on the user's machine; what it compiled is kept on disk,
so only the first start pays.

Sums may be reordered, which makes them vector code, but NaN and infinity keep their meaning: a request that produced
NaN must be found out.

Rows are independent of each other: where there are many, torch's threads share them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit

from actors.engine.cpu.threads import as_integer, floats, integers, run, take

FLAGS = {"reassoc", "contract", "nsz", "arcp", "afn"}
LOG2_E = np.float32(1.4426950408889634)
Work = tuple[Any, list[int]]
"""For ``threads.Program``, and its arguments."""
ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
# Elements below which waking a thread costs more than it saves.
_FEW = 32768
_SHARES = 4  # tasks per thread: the cores of a shared machine are not equally fast
# Below this a power of two leaves float32's normal numbers; it weighs nothing in a softmax.
LOWEST = np.float32(-126)


@njit(fastmath=FLAGS, inline="always")
def exp2(x):  # type: ignore[no-untyped-def]
    """2 to the ``x``, for ``x`` in -126 .. 126: the polynomial of exp2f in the Cephes library (S. Moshier)."""
    whole = np.floor(x + HALF)
    part = x - whole
    value = np.float32(1.535336188319500e-4)
    value = value * part + np.float32(1.339887440266574e-3)
    value = value * part + np.float32(9.618437357674640e-3)
    value = value * part + np.float32(5.550332471162809e-2)
    value = value * part + np.float32(2.402264791363012e-1)
    value = value * part + np.float32(6.931472028550421e-1)
    value = value * part + ONE
    return value * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(fastmath=FLAGS, error_model="numpy")
def _norm(x, weight, epsilon, out):  # type: ignore[no-untyped-def]
    rows, width = x.shape
    for row in range(rows):
        source, target = x[row], out[row]
        square = ZERO
        for i in range(width):
            square += source[i] * source[i]
        scale = ONE / np.sqrt(square / np.float32(width) + epsilon)
        for i in range(width):
            target[i] = weight[i] * (source[i] * scale)


@cfunc("void(CPointer(int64))", fastmath=FLAGS, error_model="numpy", cache=True)
def _rms_norm(task):  # type: ignore[no-untyped-def]
    _, x_at, delta_at, weight_at, out_at, rows, width, shares, epsilon = carray(task, 9)
    x, out = carray(floats(x_at), (rows, width)), carray(floats(out_at), (rows, width))
    delta, weight = carray(floats(delta_at), (rows, width)), carray(floats(weight_at), width)
    while True:
        share = take(task)
        if share >= shares:
            return
        some = slice(rows * share // shares, rows * (share + 1) // shares)
        if delta_at != 0:
            for row in range(some.start, some.stop):
                for i in range(width):
                    x[row, i] += delta[row, i]
        _norm(x[some], weight, np.float32(np.int64(epsilon).view(np.float64)), out[some])


def norm(x: int, delta: int, weight: int, out: int, rows: int, width: int, epsilon: float) -> Work:
    """``x += delta`` if that is not 0, then ``out = rms_norm(x)``: addresses of rows of ``width``."""
    return _rms_norm, [x, delta, weight, out, rows, width, as_shares(rows, width), as_integer(epsilon)]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Rows of ``x [..., w]`` over their root mean square, times ``weight [w]``, which is contiguous."""
    x = x.contiguous()
    out = torch.empty_like(x)
    rows, width = x.numel() // len(weight), len(weight)
    work, arguments = norm(x.data_ptr(), 0, weight.data_ptr(), out.data_ptr(), rows, width, epsilon)
    run(work, as_shares(rows, width), arguments)
    return out


@njit(fastmath=True, error_model="numpy")
def _gate(x, out):  # type: ignore[no-untyped-def]
    rows, width = out.shape
    for row in range(rows):
        gate, up, target = x[row, :width], x[row, width : 2 * width], out[row]
        for i in range(width):
            power = min(max(-gate[i] * LOG2_E, LOWEST), -LOWEST)  # fast: any NaN comes back with the product
            target[i] = gate[i] / (ONE + exp2(power)) * up[i]


@cfunc("void(CPointer(int64))", fastmath=True, error_model="numpy", cache=True)
def _silu_and_mul(task):  # type: ignore[no-untyped-def]
    _, x_at, room, out_at, rows, width, shares = carray(task, 7)
    x, out = carray(floats(x_at), (rows, room)), carray(floats(out_at), (rows, width))
    while True:
        share = take(task)
        if share >= shares:
            return
        some = slice(rows * share // shares, rows * (share + 1) // shares)
        _gate(x[some], out[some])


def gate(x: int, room: int, out: int, rows: int, width: int) -> Work:
    """``silu_and_mul`` of ``rows`` of ``2 * width``, ``room`` float32 apart, at address ``x``, to ``out``."""
    return _silu_and_mul, [x, room, out, rows, width, as_shares(rows, 2 * width)]


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``[..., 2 * w] -> [..., w]``: SiLU of the first half times the second."""
    width = x.shape[-1] // 2
    joined = x.reshape(-1, 2 * width)
    if joined.stride(1) != 1:
        joined = joined.contiguous()
    out = torch.empty(*x.shape[:-1], width)
    rows = len(joined)
    work, arguments = gate(joined.data_ptr(), joined.stride(0), out.data_ptr(), rows, width)
    run(work, as_shares(rows, 2 * width), arguments)
    return out


@njit(fastmath=FLAGS, error_model="numpy")
def _split(joined, cosine, sine, query, key, value):  # type: ignore[no-untyped-def]
    tokens, heads, width = query.shape
    shared = key.shape[1]
    half = cosine.shape[1] // 2
    for token in range(tokens):
        for head in range(heads + shared):
            source = joined[token, head * width : (head + 1) * width]
            target = query[token, head] if head < heads else key[token, head - heads]
            for i in range(half):
                first, second = source[i], source[i + half]
                target[i] = first * cosine[token, i] - second * sine[token, i]
                target[i + half] = second * cosine[token, i + half] + first * sine[token, i + half]
            for i in range(2 * half, width):
                target[i] = source[i]
        for head in range(shared):
            start = (heads + shared + head) * width
            for i in range(width):
                value[token, head, i] = joined[token, start + i]


@cfunc("void(CPointer(int64))", fastmath=FLAGS, error_model="numpy", cache=True)
def _split_and_rotate(task):  # type: ignore[no-untyped-def]
    _, joined_at, cosine_at, sine_at, query_at, key_at, value_at, tokens, heads, shared, width, turned, shares = carray(
        task, 13
    )
    joined = carray(floats(joined_at), (tokens, (heads + 2 * shared) * width))
    cosine, sine = carray(floats(cosine_at), (tokens, turned)), carray(floats(sine_at), (tokens, turned))
    query = carray(floats(query_at), (tokens, heads, width))
    key, value = carray(floats(key_at), (tokens, shared, width)), carray(floats(value_at), (tokens, shared, width))
    while True:
        share = take(task)
        if share >= shares:
            return
        some = slice(tokens * share // shares, tokens * (share + 1) // shares)
        _split(joined[some], cosine[some], sine[some], query[some], key[some], value[some])


def split_and_rotate(
    joined: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, heads: int, shared: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotary embedding (RoFormer, arXiv 2104.09864, in halves as in GPT-NeoX) of queries and keys side by side.

    ``joined [T, (heads + 2 * shared) * d]`` holds a row's queries, keys and values; ``cosine`` and ``sine`` are
    ``[T, r]`` with ``r <= d`` (the rest of a head is not rotated). Gives queries ``[T, heads, d]``, and keys and values
    ``[T, shared, d]``.
    """
    joined, cosine, sine = joined.contiguous(), cosine.contiguous(), sine.contiguous()
    tokens, width = len(joined), joined.shape[1] // (heads + 2 * shared)
    query, key, value = (torch.empty(tokens, count, width) for count in (heads, shared, shared))
    shares = as_shares(tokens, joined.shape[1])
    addresses = _addresses(joined, cosine, sine, query, key, value)
    run(_split_and_rotate, shares, [*addresses, tokens, heads, shared, width, cosine.shape[1], shares])
    return query, key, value


def _addresses(*parts: torch.Tensor) -> list[int]:
    return [part.data_ptr() for part in parts]


def as_shares(rows: int, width: int) -> int:
    """In how many tasks so many rows are done."""
    return 1 if rows * width < _FEW else min(rows, _SHARES * torch.get_num_threads())


@njit(error_model="numpy")
def put(keys, values, key, value, target):  # type: ignore[no-untyped-def]
    """A token's ``key [heads, w]`` and ``value [heads, v]`` to place ``target`` of the pools: see ``store``."""
    block, place = target // keys.shape[3], target % keys.shape[3]
    for head in range(keys.shape[0]):
        for i in range(keys.shape[2]):
            keys[head, block, i, place] = key[head, i]
        for i in range(values.shape[3]):
            values[head, block, place, i] = value[head, i]


@cfunc("void(CPointer(int64))", error_model="numpy", cache=True)
def _store(task):  # type: ignore[no-untyped-def]
    _, keys_at, values_at, key_at, value_at, targets_at, tokens, heads, blocks, size, width, value_width, shares = (
        carray(task, 13)
    )
    keys = carray(floats(keys_at), (heads, blocks, width, size))
    values = carray(floats(values_at), (heads, blocks, size, value_width))
    key, value = carray(floats(key_at), (tokens, heads, width)), carray(floats(value_at), (tokens, heads, value_width))
    targets = carray(integers(targets_at), tokens)
    while True:
        share = take(task)
        if share >= shares:
            return
        for token in range(tokens * share // shares, tokens * (share + 1) // shares):
            put(keys, values, key[token], value[token], targets[token])


def store(
    keys: torch.Tensor, values: torch.Tensor, key: torch.Tensor, value: torch.Tensor, targets: torch.Tensor
) -> None:
    """Writes ``key [T, heads, w]`` and ``value [T, heads, v]`` to places ``targets [T]``, int64, of two pools.

    ``keys [heads, blocks, w, size]``, ``values [heads, blocks, size, v]``; a place is ``block * size + index``.
    """
    heads, blocks, width, size = keys.shape
    tokens, value_width = len(targets), value.shape[2]
    shares = as_shares(tokens, heads * (width + value_width))
    sizes = (tokens, heads, blocks, size, width, value_width, shares)
    run(_store, shares, [*_addresses(keys, values, key, value, targets), *sizes])


@cfunc("void(CPointer(int64))", fastmath=FLAGS, error_model="numpy", cache=True)
def _rotate_and_store(task):  # type: ignore[no-untyped-def]
    _, joined_at, cosine_at, sine_at, query_at, keys_at, values_at, plan_at = carray(task, 8)
    tokens, heads, shared, width, turned, blocks, size, shares = carray(task, 16)[8:]
    joined = carray(floats(joined_at), (tokens, (heads + 2 * shared) * width))
    cosine, sine = carray(floats(cosine_at), (tokens, turned)), carray(floats(sine_at), (tokens, turned))
    query = carray(floats(query_at), (tokens, heads, width))
    keys = carray(floats(keys_at), (shared, blocks, width, size))
    values = carray(floats(values_at), (shared, blocks, size, width))
    targets = carray(integers(integers(plan_at)[4]), tokens)
    key, value = np.empty((1, shared, width), np.float32), np.empty((1, shared, width), np.float32)
    while True:
        share = take(task)
        if share >= shares:
            return
        for token in range(tokens * share // shares, tokens * (share + 1) // shares):
            one = slice(token, token + 1)
            _split(joined[one], cosine[one], sine[one], query[one], key, value)
            put(keys, values, key[0], value[0], targets[token])


def rotate_and_store(
    joined: int, cosine: int, sine: int, query: int, pools: tuple[torch.Tensor, torch.Tensor], plan: int,
    tokens: int, heads: int, turned: int,
) -> Work:  # fmt: skip
    """``split_and_rotate`` with keys and values to where ``plan``, an ``attend.Plan``, says; all else are addresses."""
    shared, blocks, width, size = pools[0].shape
    shares = as_shares(tokens, (heads + 2 * shared) * width)
    sizes = tokens, heads, shared, width, turned, blocks, size, shares
    return _rotate_and_store, [joined, cosine, sine, query, *_addresses(*pools), plan, *sizes]
