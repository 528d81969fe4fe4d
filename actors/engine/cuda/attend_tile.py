"""One tile of flash attention over KV blocks: some query rows, some tokens, softmax carried along in float32.

Logits are kept in base two (the scale has log2(e) in it), so that each probability is one exp2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from actors.engine.cuda.paged import pool_rows

LOG2E = 1.4426950408889634


class Tiles(NamedTuple):
    """How a kernel is cut: query rows and tokens of a tile, warps of a program, stages of its pipeline."""

    rows: int
    tokens: int
    warps: int
    stages: int


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of matrix products: float32 stays float32, for greedy output like the reference's."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def load_part(pool, rows, read, WIDTH: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """``[N, D]``: a pool's ``rows [N, 1]``, zeros beyond ``WIDTH``; with MASKED those that are to be ``read``."""
    d = tl.arange(0, D)[None, :]
    if MASKED:
        return tl.load(pool + rows * WIDTH + d, mask=read[:, None] & (d < WIDTH), other=0.0)
    if D == WIDTH:
        return tl.load(pool + rows * WIDTH + d)
    return tl.load(pool + rows * WIDTH + d, mask=d < WIDTH, other=0.0)


@triton.jit
def weigh(  # type: ignore[no-untyped-def]
    q, key, tokens, position, window, scale, peak, total, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """Of ``key [N, KD]``: ``peak`` and ``total`` with these tokens, their weights ``[M, N]``, and by what the result so
    far shrinks; see ``attend_tile``."""
    scores = tl.dot(q, tl.trans(key), input_precision=PRECISION)
    if MASKED:
        visible = tokens[None, :] <= position[:, None]
        if window is not None:
            visible = visible & (tokens[None, :] > position[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1) * scale)
    origin = higher
    if MASKED:  # a row may see nothing of its first tiles
        origin = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores * scale - origin[:, None])
    shrink = tl.exp2(peak - origin)
    return higher, total * shrink + tl.sum(weights, 1), weights, shrink


@triton.jit
def attend_tile(  # type: ignore[no-untyped-def]
    q,
    keys,
    values,
    table,
    head,
    first,
    low,
    high,
    position,
    window,
    scale,
    peak,
    total,
    result,
    KV_HEADS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    N: tl.constexpr,
    KD: tl.constexpr,
    VD: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take tokens ``first .. first + N - 1`` of a sequence into ``peak``, ``total [M]`` and ``result [M, VD]``.

    Row ``i`` of ``q [M, KD]`` sees tokens up to ``position[i]``, the last ``window`` of them if that is not None; of
    tokens outside ``low .. high - 1`` nothing is read, whatever stands there. Without MASKED all rows see all tokens.
    """
    tokens = first + tl.arange(0, N)
    read = (tokens >= low) & (tokens < high)
    blocks = tl.load(table + tokens // PAGE, mask=read, other=0) if MASKED else tl.load(table + tokens // PAGE)
    rows = pool_rows(blocks, tokens % PAGE, head, KV_HEADS, PAGE)[:, None]
    key = load_part(keys, rows, read, KEY_WIDTH, KD, MASKED)
    peak, total, weights, shrink = weigh(q, key, tokens, position, window, scale, peak, total, MASKED, PRECISION)
    value = load_part(values, rows, read, VALUE_WIDTH, VD, MASKED)
    result = tl.dot(weights.to(value.dtype), value, result * shrink[:, None], input_precision=PRECISION)
    return peak, total, result


@triton.jit
def finish(peak, total, result, sinks, heads, mask):  # type: ignore[no-untyped-def]
    """``result`` over the softmax's sum, to which a sink adds one logit; zeros for rows that saw nothing."""
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=mask, other=0.0).to(tl.float32) * 1.4426950408889634
        higher = tl.maximum(peak, sink)
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.exp2(sink - higher)
        result = result * shrink[:, None]
    return result / tl.where(total == 0, 1.0, total)[:, None]
