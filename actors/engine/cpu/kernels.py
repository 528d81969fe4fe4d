"""Loops that torch has no single operator for, compiled by Numba: float32, one thread, the GIL released.

Decoding computes a few rows at a time, and then a step is hundreds of operators whose arithmetic takes less time than
calling them. Numba is LLVM in a wheel, so it needs no compiler on the user's machine; what it compiled is kept on disk,
so only the first start pays.

Sums may be reordered, which makes them vector code, but NaN and infinity keep their meaning: a request that produced
NaN must be found out.
"""

from __future__ import annotations

import numpy as np
from numba import njit

FLAGS = {"reassoc", "contract", "nsz", "arcp", "afn"}
LOG2_E = np.float32(1.4426950408889634)
ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
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


@njit(
    "void(float32[:, ::1], float32[::1], float32, float32[:, ::1])",
    fastmath=FLAGS,
    error_model="numpy",
    nogil=True,
    cache=True,
)
def rms_norm(x, weight, epsilon, out):  # type: ignore[no-untyped-def]
    """Rows of ``x [n, w]`` over their root mean square, times ``weight [w]``."""
    rows, width = x.shape
    for row in range(rows):
        source, target = x[row], out[row]
        square = ZERO
        for i in range(width):
            square += source[i] * source[i]
        scale = ONE / np.sqrt(square / np.float32(width) + epsilon)
        for i in range(width):
            target[i] = weight[i] * (source[i] * scale)


@njit("void(float32[:, ::1], float32[:, ::1])", fastmath=True, error_model="numpy", nogil=True, cache=True)
def silu_and_mul(x, out):  # type: ignore[no-untyped-def]
    """``silu(x[:, :w]) * x[:, w:]`` of ``x [n, 2 * w]``, into ``out [n, w]``."""
    rows, width = out.shape
    for row in range(rows):
        gate, up, target = x[row, :width], x[row, width:], out[row]
        for i in range(width):
            power = min(max(-gate[i] * LOG2_E, LOWEST), -LOWEST)  # fast: any NaN comes back with the product
            target[i] = gate[i] / (ONE + exp2(power)) * up[i]


@njit(
    "void(float32[:, ::1], float32[:, ::1], float32[:, ::1],"
    " float32[:, :, ::1], float32[:, :, ::1], float32[:, :, ::1])",
    fastmath=FLAGS,
    error_model="numpy",
    nogil=True,
    cache=True,
)
def split_and_rotate(joined, cosine, sine, query, key, value):  # type: ignore[no-untyped-def]
    """Rotary embedding (RoFormer, arXiv 2104.09864, in halves as in GPT-NeoX) of queries and keys side by side.

    ``joined [T, (h + 2 * k) * d]`` holds a row's queries, keys and values; ``cosine`` and ``sine`` are ``[T, r]`` with
    ``r <= d`` (the rest of a head is not rotated). Fills ``query [T, h, d]``, ``key [T, k, d]``, ``value [T, k, d]``.
    """
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


@njit(
    "void(float32[:, :, ::1], float32[:, :, ::1], int64[::1])",
    fastmath=FLAGS,
    error_model="numpy",
    nogil=True,
    cache=True,
)
def store(pool, new, targets):  # type: ignore[no-untyped-def]
    """``pool[:, targets[t]] = new[t]``: ``pool [heads, slots, w]``, ``new [T, heads, w]``."""
    for token in range(len(targets)):
        for head in range(pool.shape[0]):
            source, target = new[token, head], pool[head, targets[token]]
            for i in range(pool.shape[2]):
                target[i] = source[i]
