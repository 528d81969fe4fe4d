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

NONE = np.empty(0, np.float32)
"""Given for a bias or sinks that are absent."""


@njit(fastmath=FLAGS, inline="always")
def _exp2(x):  # type: ignore[no-untyped-def]
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
            target[i] = gate[i] / (ONE + _exp2(power)) * up[i]


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


@njit(fastmath=FLAGS, error_model="numpy", nogil=True)
def _softmax(scores, scaling, sinks, head):  # type: ignore[no-untyped-def]
    largest, check = -np.float32(np.inf), ZERO
    for i in range(len(scores)):
        scores[i] *= scaling
        check += scores[i]
        largest = max(largest, scores[i])
    whole = ZERO
    if not np.isfinite(check):
        whole = np.float32(np.nan)  # a comparison may have lost it
    if sinks.shape[0]:
        largest = max(largest, sinks[head])
        whole += _exp2(max((sinks[head] - largest) * LOG2_E, LOWEST))
    for i in range(len(scores)):
        scores[i] = _exp2(max((scores[i] - largest) * LOG2_E, LOWEST))
        whole += scores[i]
    for i in range(len(scores)):
        scores[i] /= whole


@njit(fastmath=FLAGS, error_model="numpy", nogil=True)
def _add_weighted(rows, weights, out):  # type: ignore[no-untyped-def]
    """``out [w] += weights [n] @ rows [n, w]``, four rows at a time so that ``out`` is read and written less often."""
    whole = len(weights) // 4 * 4
    for i in range(0, whole, 4):
        r0, r1, r2, r3 = rows[i], rows[i + 1], rows[i + 2], rows[i + 3]
        w0, w1, w2, w3 = weights[i], weights[i + 1], weights[i + 2], weights[i + 3]
        for j in range(len(out)):
            out[j] += w0 * r0[j] + w1 * r1[j] + w2 * r2[j] + w3 * r3[j]
    for i in range(whole, len(weights)):
        row, weight = rows[i], weights[i]
        for j in range(len(out)):
            out[j] += weight * row[j]


@njit(
    "void(float32[:, :, ::1], float32[:, :, :, ::1], float32[:, :, :, ::1], int64[:, ::1], int64[::1], float32, int64,"
    " float32[::1], float32[:, :, ::1])",
    fastmath=FLAGS,
    error_model="numpy",
    nogil=True,
    cache=True,
)
def attend(query, keys, values, table, lengths, scaling, window, sinks, out):  # type: ignore[no-untyped-def]
    """Each row of ``query [B, h, w]`` attends to the last ``window`` (0: all) of ``lengths[b]`` cached tokens.

    ``keys [k, blocks, size, w]`` and ``values [k, blocks, size, v]`` are pools, ``table [B, n]`` each sequence's
    blocks; ``sinks [h]`` (or ``NONE``): one more logit of each head, without a value. Fills ``out [B, h, v]``.
    """
    shared, size = keys.shape[0], keys.shape[2]
    group = query.shape[1] // shared
    weights = np.empty((group, table.shape[1] * size), np.float32)
    for sequence in range(query.shape[0]):
        end = lengths[sequence]
        start = max(0, end - window) if window > 0 else 0
        for head in range(shared):
            for index in range(start // size, (end + size - 1) // size):
                block = keys[head, table[sequence, index]]
                for member in range(group):
                    q = query[sequence, head * group + member]
                    for i in range(min(size, end - index * size)):
                        k = block[i]
                        score = ZERO
                        for j in range(k.shape[0]):
                            score += q[j] * k[j]
                        weights[member, index * size + i] = score
            for member in range(group):
                _softmax(weights[member, start:end], scaling, sinks, head * group + member)
                target = out[sequence, head * group + member]
                for j in range(target.shape[0]):
                    target[j] = ZERO
            for index in range(start // size, (end + size - 1) // size):
                block = values[head, table[sequence, index]]
                first, last = max(start, index * size), min(end, (index + 1) * size)
                for member in range(group):
                    _add_weighted(
                        block[first - index * size : last - index * size],
                        weights[member, first:last],
                        out[sequence, head * group + member],
                    )
