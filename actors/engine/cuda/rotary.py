"""From the joint projection of queries, keys and values to what attention reads, in one kernel.

Heads of queries and keys may be normalised, and are rotated; keys and values go to where they are kept, which may be
the paged pools themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from actors.engine.cuda.elementwise import rounded
from actors.engine.cuda.overlap import begin, launch


class Heads(NamedTuple):
    """How an attention module's joint projection ``[T, (query + 2 * shared) * width]`` becomes heads.

    ``query_norm`` and ``key_norm`` are the weights ``[width]`` of per-head RMS norms, or both None. The first
    ``rotated`` elements of a head turn, element ``i`` with ``i + rotated / 2``; cosines and sines are ``[T, rotated]``
    or, as both halves are the same, ``[T, rotated / 2]``.
    """

    query: int
    shared: int
    width: int
    rotated: int
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    epsilon: float = 0.0
    round_before_scale: bool = True


@triton.jit
def partner(column, ROTATED: tl.constexpr):  # type: ignore[no-untyped-def]
    """With which element of its head each one turns; itself beyond ``ROTATED``."""
    half: tl.constexpr = ROTATED // 2
    return tl.where(column < ROTATED, tl.where(column < half, column + half, column - half), column)


@triton.jit
def scaled(x, other, epsilon, dtype: tl.constexpr, WIDTH: tl.constexpr, ROUND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Heads ``x [heads, BLOCK]`` and their partners, by the root of the mean square; float32, to ROUND as ``dtype``."""
    scale = tl.rsqrt(tl.sum(x * x, 1)[:, None] / WIDTH + epsilon)
    x, other = x * scale, other * scale
    if ROUND:
        x, other = rounded(x, dtype), rounded(other, dtype)
    return x, other


@triton.jit
def rotated(x, other, cosine, sine, column, dtype: tl.constexpr, ROTATED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Heads ``x [heads, BLOCK]`` turned with their partners ``other``; float32, rounded as ``dtype`` in between."""
    other = tl.where(column < ROTATED // 2, -other, other)
    return tl.where(column < ROTATED, rounded(x * cosine, dtype) + rounded(other * sine, dtype), x)


@triton.jit
def _split(  # type: ignore[no-untyped-def]
    joint_pointer, joint_stride, cosine_pointer, sine_pointer, angle_stride, query_norm_pointer, key_norm_pointer,
    epsilon, query_pointer,
    key_pointer, key_block, key_offset, key_head, value_pointer, value_block, value_offset, value_head,
    targets_pointer, block_size,
    QUERY: tl.constexpr, SHARED: tl.constexpr, WIDTH: tl.constexpr, ROTATED: tl.constexpr, ANGLES: tl.constexpr,
    NORM: tl.constexpr, ROUND_BEFORE_SCALE: tl.constexpr, PAGED: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    dtype = query_pointer.dtype.element_ty
    inside = (head < QUERY + 2 * SHARED) & (column < WIDTH)
    is_query, is_value = head < QUERY, head >= QUERY + SHARED
    turns = column < ROTATED
    beside = partner(column, ROTATED)
    source = joint_pointer + row * joint_stride + head * WIDTH
    value = tl.load(source + column, inside, 0.0).to(tl.float32)
    other = tl.load(source + beside, inside, 0.0).to(tl.float32)
    x = value
    if NORM:
        x, other = scaled(x, other, epsilon, dtype, WIDTH, ROUND_BEFORE_SCALE)
        within = column < WIDTH
        for_query, for_key = query_norm_pointer, key_norm_pointer
        weight = tl.where(
            is_query,
            tl.load(for_query + column, within, 0.0).to(tl.float32),
            tl.load(for_key + column, within, 0.0).to(tl.float32),
        )
        weight_of_other = tl.where(
            is_query,
            tl.load(for_query + beside, within, 0.0).to(tl.float32),
            tl.load(for_key + beside, within, 0.0).to(tl.float32),
        )
        x, other = rounded(x * weight, dtype), rounded(other * weight_of_other, dtype)
    angle = row * angle_stride + column % ANGLES
    cosine = tl.load(cosine_pointer + angle, turns, 1.0).to(tl.float32)
    sine = tl.load(sine_pointer + angle, turns, 0.0).to(tl.float32)
    x = rotated(x, other, cosine, sine, column, dtype, ROTATED)
    x = tl.where(is_value, value, x).to(dtype)
    tl.store(query_pointer + (row * QUERY + head) * WIDTH + column, x, inside & is_query)
    slot = row
    if PAGED:
        slot = tl.load(targets_pointer + row).to(tl.int64)
    block, offset = slot // block_size, slot % block_size
    kept = inside & (slot >= 0)
    key = key_pointer + block * key_block + offset * key_offset + (head - QUERY) * key_head
    tl.store(key + column, x, kept & (head >= QUERY) & (head < QUERY + SHARED))
    to = value_pointer + block * value_block + offset * value_offset + (head - QUERY - SHARED) * value_head
    tl.store(to + column, x, kept & is_value)


def split_and_rotate(
    joint: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    heads: Heads,
    keys: torch.Tensor,
    values: torch.Tensor,
    targets: torch.Tensor | None,
) -> torch.Tensor:
    """Queries ``[T, heads, width]``; keys and values go to their pools, row ``i`` to slot ``targets[i]``.

    ``joint [T, ...]`` as ``Heads`` says; ``cosine`` and ``sine [T, ...]``; all of one dtype. The pools are
    ``[num_blocks, shared, block_size, width]``, slot ``s`` at ``[s // block_size, :, s % block_size]``. ``targets
    [>= T]``, integers, are -1 where nothing is stored; None: row ``i`` to slot ``i``.
    """
    rows = len(joint)
    query = torch.empty(rows, heads.query, heads.width, dtype=joint.dtype, device=joint.device)
    if rows:
        block = triton.next_power_of_2(heads.width)
        total = heads.query + 2 * heads.shared
        tile = max(1, min(triton.next_power_of_2(total), 1024 // block))
        weights = heads.query_norm, heads.key_norm
        query_norm, key_norm = (joint if weight is None else weight for weight in weights)
        _split[(rows, triton.cdiv(total, tile))](
            joint, joint.stride(0), cosine, sine, cosine.stride(0), query_norm, key_norm, heads.epsilon, query,
            keys, keys.stride(0), keys.stride(2), keys.stride(1),
            values, values.stride(0), values.stride(2), values.stride(1),
            query if targets is None else targets, keys.shape[2],
            QUERY=heads.query, SHARED=heads.shared, WIDTH=heads.width, ROTATED=heads.rotated,
            ANGLES=cosine.shape[-1], NORM=heads.query_norm is not None,
            ROUND_BEFORE_SCALE=heads.round_before_scale, PAGED=targets is not None, HEADS=tile, BLOCK=block,
            num_warps=4 if rows < 512 else 1, **launch(joint.device, rows),
        )  # fmt: skip
    return query


def split_and_keep(
    joint: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, heads: Heads
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``split_and_rotate``, with keys and values as tensors ``[T, shared, width]`` of their own."""
    shape = len(joint), heads.shared, 1, heads.width
    key, value = (torch.empty(shape, dtype=joint.dtype, device=joint.device) for _ in range(2))
    return split_and_rotate(joint, cosine, sine, heads, key, value, None), key.squeeze(2), value.squeeze(2)
