"""Attention of sequences with one new token each, from the joint projection of queries, keys and values on.

One kernel does what ``rotary`` and ``attend_decode`` do in two: every program turns the queries that it needs, and the
one that has a sequence's last tokens turns, stores and counts in the new key and value besides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from actors.engine.cuda.attend_decode import MAX_GROUP, combine
from actors.engine.cuda.attend_tile import LOG2E, Tiles, attend_tile, finish, load_part, precision, weigh
from actors.engine.cuda.elementwise import rounded
from actors.engine.cuda.overlap import await_previous, fetch_ahead, late, launch, let_next_start
from actors.engine.cuda.paged import pool_rows, power
from actors.engine.cuda.rotary import Heads, partner, rotated, scaled


@triton.jit
def _turned(  # type: ignore[no-untyped-def]
    source, inside, cosines, sines, norm, epsilon, dtype: tl.constexpr,
    WIDTH: tl.constexpr, ROTATED: tl.constexpr, ANGLES: tl.constexpr, NORM: tl.constexpr,
    ROUND_BEFORE_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Heads whose elements begin at ``source [heads, 1]``, normalised and rotated: ``[heads, BLOCK]``, float32."""
    column = tl.arange(0, BLOCK)[None, :]
    turns, beside = column < ROTATED, partner(column, ROTATED)
    x = tl.load(source + column, inside, 0.0).to(tl.float32)
    other = tl.load(source + beside, inside, 0.0).to(tl.float32)
    if NORM:
        x, other = scaled(x, other, epsilon, dtype, WIDTH, ROUND_BEFORE_SCALE)
        within = column < WIDTH
        x = rounded(x * tl.load(norm + column, within, 0.0).to(tl.float32), dtype)
        other = rounded(other * tl.load(norm + beside, within, 0.0).to(tl.float32), dtype)
    angle = column % ANGLES
    cosine = tl.load(cosines + angle, turns, 1.0).to(tl.float32)
    sine = tl.load(sines + angle, turns, 0.0).to(tl.float32)
    return rotated(x, other, cosine, sine, column, dtype, ROTATED)


@triton.jit(do_not_specialize=["splits", "window"])
def _decode(  # type: ignore[no-untyped-def]
    joint, joint_row, cosine, sine, angle_row, query_norm, key_norm, epsilon,
    keys, values, targets, tables, lengths, sinks, out, partial, sums, arrivals, scale, window, splits, table_row,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, ROTATED: tl.constexpr, ANGLES: tl.constexpr,
    NORM: tl.constexpr, ROUND_BEFORE_SCALE: tl.constexpr, PAGE: tl.constexpr, UNROLL: tl.constexpr,
    G: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    split, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    low = 0
    if window is not None:
        low = tl.maximum(length - window, 0)
    base = low // N * N
    share = tl.maximum(tl.cdiv(tl.cdiv(length - base, splits), N), 1) * N
    active = tl.cdiv(length - base, share)  # 0 for padding
    if split >= tl.maximum(active, 1):
        return

    begin = base + split * share
    end = tl.minimum(begin + share, length - 1)  # the new token is not read
    table = tables + sequence * table_row
    # What earlier steps left in the pools stands there before this kernel's turn. A request is for 32 bytes.
    tokens = begin + tl.arange(0, N)
    read = (tokens >= low) & (tokens < end)
    rows = pool_rows(tl.load(table + tokens // PAGE, mask=read, other=0), tokens % PAGE, head, KV_HEADS, PAGE)[:, None]
    first_key = load_part(keys, rows, read, WIDTH, D, True)
    first_value = load_part(values, rows, read, WIDTH, D, True)
    if OVERLAP:
        ahead = begin + tl.arange(0, 2 * N)
        there = (ahead >= low) & (ahead < end)
        blocks = tl.load(table + ahead // PAGE, mask=there, other=0)
        lines = pool_rows(blocks, tl.where(there, ahead % PAGE, 0), head, KV_HEADS, PAGE)[:, None] * WIDTH
        sector: tl.constexpr = 256 // keys.dtype.element_ty.primitive_bitwidth
        sectors = tl.minimum(tl.arange(0, D // sector) * sector, WIDTH - 1)[None, :]
        fetch_ahead(keys + lines + sectors)
        fetch_ahead(values + lines + sectors)
        # Since the last step, or layer, many weights have been through the cache.
        column = tl.minimum(tl.arange(0, D), WIDTH - 1)
        if NORM:
            fetch_ahead(query_norm + column)
            fetch_ahead(key_norm + column)
        angle = sequence.to(tl.int64) * angle_row + tl.minimum(column, ANGLES - 1)
        fetch_ahead(cosine + angle)
        fetch_ahead(sine + angle)
        fetch_ahead(arrivals + sequence * KV_HEADS + head + tl.arange(0, 1))
    await_previous(OVERLAP)
    first_key, first_value = late(first_key, OVERLAP), late(first_value, OVERLAP)

    dtype = joint.dtype.element_ty
    members, d = tl.arange(0, M), tl.arange(0, D)
    heads = head * GROUP + members
    real = members < GROUP
    row = sequence.to(tl.int64)
    source = joint + row * joint_row
    cosines, sines = cosine + row * angle_row, sine + row * angle_row
    inside = (d < WIDTH)[None, :]
    q = _turned(
        source + heads[:, None] * WIDTH, real[:, None] & inside, cosines, sines, query_norm, epsilon, dtype,
        WIDTH, ROTATED, ANGLES, NORM, ROUND_BEFORE_SCALE, D,
    ).to(dtype)  # fmt: skip
    # In tiles only what came before the new token is seen.
    position = tl.full([M], 0, tl.int32) + length - 2
    rest = window
    if window is not None:
        rest = window - 1
    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    peak, total, weights, _shrink = weigh(
        q, first_key, tokens, position, rest, scale, peak, total, True, PRECISION
    )  # fmt: skip
    result = tl.dot(weights.to(dtype), first_value, input_precision=PRECISION)
    for first in tl.range(begin + N, end, N, num_stages=STAGES):
        peak, total, result = attend_tile(
            q, keys, values, table, head, first, low, length - 1, position, rest, scale, peak, total, result,
            KV_HEADS, WIDTH, WIDTH, PAGE, N, D, D, True, PRECISION,
        )  # fmt: skip
    if split == active - 1:
        one = tl.zeros([1, 1], tl.int32)
        key = _turned(
            source + (KV_HEADS * GROUP + head) * WIDTH + one, inside, cosines, sines, key_norm, epsilon, dtype,
            WIDTH, ROTATED, ANGLES, NORM, ROUND_BEFORE_SCALE, D,
        ).to(dtype)  # fmt: skip
        value = tl.load(source + (KV_HEADS * (GROUP + 1) + head) * WIDTH + d[None, :], inside, 0.0)
        target = tl.load(targets + sequence)
        place = pool_rows(target // PAGE, target % PAGE, head, KV_HEADS, PAGE) * WIDTH + d[None, :]
        tl.store(keys + place, key, inside & (target >= 0))
        tl.store(values + place, value, inside & (target >= 0))
        score = tl.sum(q.to(tl.float32) * key.to(tl.float32), 1) * scale
        higher = tl.maximum(peak, score)
        shrink, weight = tl.exp2(peak - higher), tl.exp2(score - higher)
        peak = higher
        total = total * shrink + weight
        result = result * shrink[:, None] + weight[:, None] * value.to(tl.float32)

    out_at = out + (row * KV_HEADS * GROUP + heads[:, None]) * WIDTH + d[None, :]
    out_mask = real[:, None] & inside
    if active <= 1:
        tl.store(out_at, finish(peak, total, result, sinks, heads, real).to(out.dtype.element_ty), mask=out_mask)
        return

    place = sequence * KV_HEADS + head
    slot = (place * splits + split) * GROUP + members
    tl.store(partial + slot[:, None] * WIDTH + d[None, :], result, mask=out_mask)
    tl.store(sums + slot * 2, peak, mask=real)
    tl.store(sums + slot * 2 + 1, total, mask=real)
    tl.debug_barrier()  # all threads' stores, then one thread's release
    if tl.atomic_add(arrivals + place, 1, sem="acq_rel") < active - 1:
        return
    tl.store(arrivals + place, 0)  # for the next layer
    peak, total, result = combine(partial, sums, place, splits, active, GROUP, WIDTH, G, D, UNROLL)
    all_heads, all_real = head * GROUP + tl.arange(0, G), tl.arange(0, G) < GROUP
    result = finish(peak, total, result, sinks, all_heads, all_real).to(out.dtype.element_ty)
    all_at = out + (row * KV_HEADS * GROUP + all_heads[:, None]) * WIDTH + d[None, :]
    tl.store(all_at, result, mask=all_real[:, None] & inside)


def joint_tiles(group: int, width: int) -> Tiles:
    """As measured on an H100 with the heads of Qwen3-30B-A3B at one sequence of 1,024 tokens, 2026-11-25."""
    return Tiles(power(group), 64 if width <= 128 else 32, 8, 2)


def decode_joint(
    joint: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    heads: Heads,
    keys: torch.Tensor,
    values: torch.Tensor,
    targets: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    scaling: float,
    window: int | None,
    sinks: torch.Tensor | None,
    splits: int,
    arrivals: torch.Tensor,
    tiles: Tiles | None = None,
) -> None:
    """``joint [S, (query + 2 * shared) * width]`` to ``out [S, query, width]``; see ``Heads`` and ``decode``.

    Of 16 bits. The new keys and values go to slots ``targets [S or more]`` of the pools, -1: nowhere.
    """
    count = len(joint)
    _, kv_heads, page, width = values.shape
    group = heads.query // kv_heads
    if group > MAX_GROUP:
        raise ValueError(f"{group} query heads share a KV head, but the decode kernel takes {MAX_GROUP} at most")
    if not count:
        return
    padded = power(width)
    tiles = tiles or joint_tiles(group, padded)
    members = triton.next_power_of_2(group)
    shared = count * splits * heads.query if splits > 1 else 0
    partial = torch.empty(shared * width, dtype=torch.float32, device=joint.device)
    sums = torch.empty(shared * 2, dtype=torch.float32, device=joint.device)
    query_norm, key_norm = (joint if weight is None else weight for weight in (heads.query_norm, heads.key_norm))
    _decode[(splits, kv_heads, count)](
        joint, joint.stride(0), cosine, sine, cosine.stride(0), query_norm, key_norm, heads.epsilon,
        keys, values, targets, tables, lengths, sinks, out, partial, sums, arrivals,
        scaling * LOG2E, window, splits, tables.stride(0),
        KV_HEADS=kv_heads, GROUP=group, WIDTH=width, ROTATED=heads.rotated, ANGLES=cosine.shape[-1],
        NORM=heads.query_norm is not None, ROUND_BEFORE_SCALE=heads.round_before_scale, PAGE=page,
        UNROLL=max(1, min(16, 16384 // (members * padded))), G=members, M=tiles.rows, N=tiles.tokens, D=padded,
        STAGES=tiles.stages, PRECISION=precision(joint.dtype),
        num_warps=tiles.warps, **launch(joint.device, count),
    )  # fmt: skip
