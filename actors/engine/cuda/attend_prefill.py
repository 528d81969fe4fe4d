"""Attention of sequences with several new tokens each, over the KV blocks of all they have, in one launch.

The query heads of one KV head are packed into the rows of a tile (token by token, head by head), so that a short
chunk fills its tiles too. (FlashAttention-2: Dao, 2023.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from actors.engine.cuda.attend_tile import LOG2E, Tiles, attend_tile, finish, precision
from actors.engine.cuda.paged import inner_contiguous, power


@triton.jit(do_not_specialize=["first_sequence", "count", "window"])
def _prefill(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    tables,
    starts,
    lengths,
    span,
    sinks,
    out,
    scale,
    window,
    first_sequence,
    count,
    q_row,
    q_head,
    table_row,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    KD: tl.constexpr,
    VD: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0) % KV_HEADS
    tile = tl.program_id(0) // KV_HEADS
    # In a captured step only the device knows which they are.
    end = tl.minimum(first_sequence + count, tl.load(span + 1))
    first_sequence = tl.maximum(first_sequence, tl.load(span))
    count = end - first_sequence
    if count <= 0:
        return
    # Tiles are dealt out by packed rows: sequence i of these has those from (rows before it) // M + i on, which leaves
    # it as many as it needs or one more.
    origin = tl.load(starts + first_sequence)
    below, above = 0, count
    while above - below > 1:
        middle = (below + above) // 2
        start = (tl.load(starts + first_sequence + middle) - origin) * GROUP // M + middle
        below, above = tl.where(start <= tile, middle, below), tl.where(start <= tile, above, middle)
    sequence = first_sequence + below
    row = tl.load(starts + sequence)
    rows = tl.load(starts + sequence + 1) - row
    index = tile - ((row - origin) * GROUP // M + below)
    needed = tl.cdiv(rows * GROUP, M)
    if index >= needed:
        return
    index = needed - 1 - index  # those that see most run first

    packed = index * M + tl.arange(0, M)
    token, heads = packed // GROUP, head * GROUP + packed % GROUP
    real = token < rows
    length = tl.load(lengths + sequence)
    position = length - rows + token
    k, v = tl.arange(0, KD), tl.arange(0, VD)
    at = (row + token).to(tl.int64)[:, None]
    q_mask = real[:, None] & (k < KEY_WIDTH)[None, :]
    q = tl.load(query + at * q_row + heads[:, None] * q_head + k[None, :], mask=q_mask, other=0.0)
    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    result = tl.zeros([M, VD], tl.float32)
    table = tables + sequence * table_row

    earliest = length - rows + index * M // GROUP
    high = tl.minimum(length - rows + (index * M + M - 1) // GROUP + 1, length)
    low = 0
    whole = (earliest + 1) // N * N  # every row sees all tokens below this
    if window is not None:
        low = tl.maximum(earliest - window + 1, 0)
        whole = low // N * N
    else:
        for first in tl.range(0, whole, N, num_stages=STAGES):
            peak, total, result = attend_tile(
                q, keys, values, table, head, first, low, high, position, window, scale, peak, total, result,
                KV_HEADS, KEY_WIDTH, VALUE_WIDTH, PAGE, N, KD, VD, False, PRECISION,
            )  # fmt: skip
    for first in tl.range(whole, high, N, num_stages=STAGES):
        peak, total, result = attend_tile(
            q, keys, values, table, head, first, low, high, position, window, scale, peak, total, result,
            KV_HEADS, KEY_WIDTH, VALUE_WIDTH, PAGE, N, KD, VD, True, PRECISION,
        )  # fmt: skip
    result = finish(peak, total, result, sinks, heads, real)
    out_mask = real[:, None] & (v < VALUE_WIDTH)[None, :]
    out_at = out + (at * KV_HEADS * GROUP + heads[:, None]) * VALUE_WIDTH + v[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=out_mask)


def prefill_tiles(dtype: torch.dtype, width: int) -> Tiles:
    if dtype == torch.float32:
        return Tiles(16, 32 if width <= 128 else 16, 4, 1)
    return Tiles(128, 64, 8, 5) if width <= 128 else Tiles(128, 32, 8, 2)


def prefill(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    span: torch.Tensor,
    sequences: range,
    rows: int,
    out: torch.Tensor,
    scaling: float,
    window: int | None,
    sinks: torch.Tensor | None,
    tiles: Tiles | None = None,
) -> None:
    """``query [T, heads, key_width]`` to ``out [T, heads, value_width]``: rows of those ``sequences`` in ``span``.

    ``tables``, ``starts``, ``lengths`` and ``span`` (``chunk_span``) as in ``StepInputs``; ``out`` is contiguous. There
    are at most ``rows`` of them. They see their own sequence up to themselves; its keys and values stand in the pools.
    """
    query = inner_contiguous(query)
    _, heads, key_width = query.shape
    _, kv_heads, page, value_width = values.shape
    group = heads // kv_heads
    if not rows:
        return
    padded = power(key_width), power(value_width)
    tiles = tiles or prefill_tiles(query.dtype, max(padded))
    _prefill[((rows * group // tiles.rows + len(sequences)) * kv_heads,)](
        query, keys, values, tables, starts, lengths, span, sinks, out, scaling * LOG2E, window,
        sequences.start, len(sequences), query.stride(0), query.stride(1), tables.stride(0),
        KV_HEADS=kv_heads, GROUP=group, KEY_WIDTH=key_width, VALUE_WIDTH=value_width, PAGE=page,
        M=tiles.rows, N=tiles.tokens, KD=padded[0], VD=padded[1], STAGES=tiles.stages,
        PRECISION=precision(query.dtype), num_warps=tiles.warps,
    )  # fmt: skip
