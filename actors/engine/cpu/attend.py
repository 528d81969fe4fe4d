"""Attention of decodes over paged keys and values, which are read where they stand: float32, on torch's threads."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, cfunc, njit

from actors.engine.cpu.kernels import FLAGS, LOG2_E, LOWEST, ZERO, exp2
from actors.engine.cpu.threads import as_integer, floats, integers, read_ahead, run, take


@njit(fastmath=FLAGS, error_model="numpy")
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
        whole += exp2(max((sinks[head] - largest) * LOG2_E, LOWEST))
    for i in range(len(scores)):
        scores[i] = exp2(max((scores[i] - largest) * LOG2_E, LOWEST))
        whole += scores[i]
    for i in range(len(scores)):
        scores[i] /= whole


@njit(fastmath=FLAGS, error_model="numpy")
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


@njit
def _ask_for(block, part, parts):  # type: ignore[no-untyped-def]
    """Blocks stand anywhere in memory: while one is computed with, parts of the next are asked for."""
    start, lines = block.ctypes.data, block.size * 4 // 64
    for line in range(lines * part // parts, lines * (part + 1) // parts):
        read_ahead(start + 64 * line)


@njit(fastmath=FLAGS, error_model="numpy")
def _attend_one(query, keys, values, blocks, start, end, scaling, sinks, first_head, weights, out):  # type: ignore[no-untyped-def]
    """The query heads ``query [g, w]`` of a KV head, ``keys [blocks, size, w]``; ``weights [g, n]`` is room."""
    size, group = keys.shape[1], query.shape[0]
    past = (end + size - 1) // size
    for index in range(start // size, past):
        block = keys[blocks[index]]
        following = keys[blocks[index + 1]] if index + 1 < past else values[blocks[start // size]]
        for i in range(min(size, end - index * size)):
            _ask_for(following, i, size)
            k = block[i]
            for member in range(group):
                q = query[member]
                score = ZERO
                for j in range(k.shape[0]):
                    score += q[j] * k[j]
                weights[member, index * size + i] = score
    for member in range(group):
        _softmax(weights[member, start:end], scaling, sinks, first_head + member)
        target = out[member]
        for j in range(target.shape[0]):
            target[j] = ZERO
    for index in range(start // size, past):
        first, last = max(start, index * size), min(end, (index + 1) * size)
        block = values[blocks[index], first - index * size : last - index * size]
        for member in range(group):
            if index + 1 < past:
                _ask_for(values[blocks[index + 1]], member, group)
            _add_weighted(block, weights[member, first:last], out[member])


@cfunc("void(CPointer(int64))", fastmath=FLAGS, error_model="numpy", cache=True)
def _attend(task):  # type: ignore[no-untyped-def]
    """See ``attend``. A task is a sequence and a KV head with its query heads."""
    _, query_at, keys_at, values_at, table_at, lengths_at, sinks_at, out_at = carray(task, 8)
    sizes = carray(task, 19)[8:]
    batch, heads, shared, blocks, size, width, value_width, columns, window, num_sinks, scaling_bits = sizes
    query, out = carray(floats(query_at), (batch, heads, width)), carray(floats(out_at), (batch, heads, value_width))
    keys = carray(floats(keys_at), (shared, blocks, size, width))
    values = carray(floats(values_at), (shared, blocks, size, value_width))
    table, lengths = carray(integers(table_at), (batch, columns)), carray(integers(lengths_at), batch)
    sinks = carray(floats(sinks_at), num_sinks)
    scaling = np.float32(np.int64(scaling_bits).view(np.float64))
    group = heads // shared
    weights = np.empty((group, columns * size), np.float32)
    while True:
        index = take(task)
        if index >= batch * shared:
            return
        sequence, head = index // shared, index % shared
        first, last = head * group, (head + 1) * group
        end = lengths[sequence]
        start = max(0, end - window) if window > 0 else 0
        _attend_one(
            query[sequence, first:last], keys[head], values[head], table[sequence], start, end, scaling,
            sinks, first, weights, out[sequence, first:last],
        )  # fmt: skip


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    window: int,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Each row of ``query [B, h, w]`` attends to the last ``window`` (0: all) of ``lengths[b]`` cached tokens.

    ``keys [k, blocks, size, w]`` and ``values [k, blocks, size, v]`` are pools; ``table [B, n]`` and ``lengths [B]``,
    int64, each sequence's blocks and tokens; ``sinks [h]``: one more logit of each head, without a value. All are
    contiguous. Gives ``[B, h, v]``.
    """
    batch, heads, width = query.shape
    shared, blocks, size, value_width = values.shape
    out = torch.empty(batch, heads, value_width)
    parts = (query, keys, values, table, lengths, query if sinks is None else sinks, out)
    addresses = (part.data_ptr() for part in parts)
    sizes = (batch, heads, shared, blocks, size, width, value_width, table.shape[1])
    num_sinks = 0 if sinks is None else len(sinks)
    run(_attend, batch * shared, [*addresses, *sizes, window, num_sinks, as_integer(scaling)])
    return out
