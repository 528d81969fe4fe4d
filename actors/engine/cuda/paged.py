"""KV pools on a GPU: how kernels find a token's keys and values, and the kernel that writes them.

A pool of one layer is ``[num_blocks, kv_heads, block_size, width]``, contiguous: what a decode reads of a block, one
head's tokens, is one stretch of memory, and so is a block. Slot ``s`` (block * block_size + offset) of a head is row
``(s // block_size * kv_heads + head) * block_size + s % block_size`` of the pool seen as rows of ``width``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Elements of keys that one program of the store moves.
_STORED = 4096


def power(width: int) -> int:
    """The smallest power of two that holds ``width`` and that the matrix units take."""
    return max(16, triton.next_power_of_2(width))


@triton.jit
def pool_rows(blocks, offsets, head, KV_HEADS: tl.constexpr, PAGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of a pool, int64: pools may have more than 2^31 elements."""
    return (blocks.to(tl.int64) * KV_HEADS + head) * PAGE + offsets


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    new_keys,
    new_values,
    targets,
    keys,
    values,
    key_row,
    key_head,
    value_row,
    value_head,
    KV_HEADS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    KD: tl.constexpr,
    VD: tl.constexpr,
):
    """One program writes HEADS heads of one token."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    if target < 0:
        return
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    k, v = tl.arange(0, KD)[None, :], tl.arange(0, VD)[None, :]
    rows = pool_rows(target // PAGE, target % PAGE, heads, KV_HEADS, PAGE)
    mask = (heads < KV_HEADS) & (k < KEY_WIDTH)
    new = tl.load(new_keys + row * key_row + heads * key_head + k, mask=mask)
    tl.store(keys + rows * KEY_WIDTH + k, new, mask=mask)
    mask = (heads < KV_HEADS) & (v < VALUE_WIDTH)
    new = tl.load(new_values + row * value_row + heads * value_head + v, mask=mask)
    tl.store(values + rows * VALUE_WIDTH + v, new, mask=mask)


def store(
    key: torch.Tensor, value: torch.Tensor, targets: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Write ``key [T, kv_heads, key_width]`` and ``value [T, kv_heads, value_width]`` to the pools of a layer.

    ``targets``, int32, at least T: the slot of each row, -1 where nothing is to be written.
    """
    key, value = inner_contiguous(key), inner_contiguous(value)
    count, kv_heads, key_width = key.shape
    value_width = value.shape[2]
    if not count:
        return
    padded = power(key_width), power(value_width)
    heads = min(triton.next_power_of_2(kv_heads), max(1, _STORED // max(padded)))
    _store[(count, triton.cdiv(kv_heads, heads))](
        key, value, targets, keys, values,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        KV_HEADS=kv_heads, KEY_WIDTH=key_width, VALUE_WIDTH=value_width, PAGE=keys.shape[2],
        HEADS=heads, KD=padded[0], VD=padded[1],
    )  # fmt: skip


def inner_contiguous(x: torch.Tensor) -> torch.Tensor:
    """``x``, copied only where its last dimension is not contiguous: kernels take any other strides."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
