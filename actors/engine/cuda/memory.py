"""What a GPU's memory is used for: whether the weights fit, and how many KV blocks the rest holds. Pure arithmetic.

``weights_of`` and ``check`` come before anything is allocated; ``plan`` after a rehearsal of the largest step, which
says what activations take. What stands before that, as weights do, is no activation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from actors.engine import library
from actors.engine.cuda import fp8
from actors.engine.experts.slots import stays_quantized
from actors.engine.model import MoEModel
from actors.engine.quantization import Blocks

_GIB = 2**30


@dataclass(frozen=True)
class Weights:
    """Bytes of one rank's weights: ``dense``, and ``slots`` times ``slot``, which is one slot of every MoE layer.

    And its part of the room in which one layer's weights are widened, if there is one (see ``fp8.py``).
    ``experts`` is how many each MoE layer has in all; 0, as are ``slots`` and ``slot``, for a dense model.
    """

    dense: int
    slot: int
    slots: int
    experts: int

    @property
    def total(self) -> int:
        return self.dense + self.slot * self.slots


@dataclass(frozen=True)
class Cache:
    """The KV cache that is wanted: blocks of ``block_bytes`` that hold ``block_size`` tokens each.

    ``blocks`` of them, or when None what ``fraction`` of the memory left holds; in any case ``needed`` at least, for
    one request of the greatest length.
    """

    block_bytes: int
    block_size: int
    needed: int
    blocks: int | None
    fraction: float


@dataclass(frozen=True)
class MemoryPlan:
    """Where a device's ``total`` bytes go; the parts sum up to it.

    ``other`` is what was in use besides the weights (the driver, libraries, other processes), ``reserve`` is left free.
    """

    total: int
    weights: int
    activations: int
    step_tokens: int
    graphs: int
    other: int
    reserve: int
    kv: int
    blocks: int
    block_size: int

    def __str__(self) -> str:
        return (
            f"{_gib(self.total)} on the device; weights {_amount(self.weights)}, activations "
            f"{_amount(self.activations)} (a step of {self.step_tokens:,} tokens), graphs {_amount(self.graphs)}, "
            f"other {_amount(self.other)}, reserve {_amount(self.reserve)}; KV {_gib(self.kv)} = {self.blocks:,} "
            f"blocks of {self.block_size} tokens = {self.blocks * self.block_size:,} tokens"
        )


def weights_of(model: MoEModel, num_slots: int, max_rows: int, blocks: Blocks | None = None) -> Weights:
    """Of a model on the meta device, with ``num_slots`` expert slots in each MoE layer and steps of ``max_rows`` rows.

    With ``blocks`` experts stay in FP8 where the kernels can compute with them, as ``slots.allocate`` has it.
    """
    seen: dict[int, int] = {}
    for name, parameter in model.module.named_parameters(remove_duplicate=False):
        if name.rpartition(".")[0] not in model.experts_names:
            seen[id(parameter)] = parameter.numel() * library.dtype_of(model.module, name, model.dtype).itemsize
    slot = widest = 0
    for name, shapes in zip(model.experts_names, model.experts_shapes, strict=True):
        stays = blocks is not None and stays_quantized(model.module.get_submodule(name), torch.device("cuda"), blocks)
        for _, *shape in shapes.values():
            if blocks is not None and stays:
                slot += math.prod(shape) + 4 * math.prod(blocks.grid(shape))
                widest = max(widest, math.prod(shape))
            else:
                slot += math.prod(shape) * model.dtype.itemsize
    if widest and fp8.widens(model.dtype, max_rows * model.summary.top_k / num_slots):
        slot += widest * model.dtype.itemsize
    return Weights(
        dense=sum(seen.values()),
        slot=slot,
        slots=num_slots if model.experts_names else 0,
        experts=model.summary.num_experts,
    )


def check(weights: Weights, free: int, min_ranks: int) -> None:
    """Raises ValueError, saying what would help, where ``free`` bytes can't even hold the weights."""
    if weights.total > free:
        raise ValueError(
            f"the model's weights need {_parts(weights)}, but the device has {_gib(free)} free; "
            + _advice(weights, free - weights.dense, min_ranks, weights.total - free)
        )


def plan(
    weights: Weights,
    cache: Cache,
    *,
    total: int,
    free: int,
    activations: int,
    step_tokens: int,
    graphs: int,
    min_ranks: int,
) -> MemoryPlan:
    """The plan for a device of ``total`` bytes, ``free`` of them with the weights in place and nothing else running.

    ``activations`` are the bytes that a step of ``step_tokens``, the largest, takes on top; ``graphs`` what captured
    steps will take. Raises ValueError, saying what would help, when the KV cache gets too little.
    """
    left = free - activations - graphs
    room = int(max(0, left) * cache.fraction)
    blocks = room // cache.block_bytes if cache.blocks is None else cache.blocks
    limit = room if cache.blocks is None else left
    made = MemoryPlan(
        total=total,
        weights=weights.total,
        activations=activations,
        step_tokens=step_tokens,
        graphs=graphs,
        other=total - free - weights.total,
        reserve=left - blocks * cache.block_bytes,
        kv=blocks * cache.block_bytes,
        blocks=blocks,
        block_size=cache.block_size,
    )
    if blocks < cache.needed and cache.blocks is not None:
        raise ValueError(
            f"kv_blocks={blocks} hold {blocks * cache.block_size:,} tokens, less than one request of max_model_len may "
            f"have: raise it to {cache.needed}, or lower max_model_len"
        )
    wanted = max(blocks, cache.needed) * cache.block_bytes
    if wanted > limit:
        share = cache.fraction if cache.blocks is None else 1.0
        missing = math.ceil(wanted / share) + 1 - left
        what = f"kv_blocks={blocks}" if cache.blocks is not None else "one request of max_model_len"
        advice = _advice(weights, weights.slots * weights.slot - missing, min_ranks, missing)
        tokens = max(0, limit // cache.block_bytes) * cache.block_size
        raise ValueError(
            f"the KV cache can have {_gib(max(0, limit))} ({tokens:,} tokens), but {what} needs {_gib(wanted)} "
            f"({made}). Lower max_model_len, kv_blocks or max_num_batched_tokens; or, {advice}"
        )
    return made


def _advice(weights: Weights, room: int, min_ranks: int, missing: int) -> str:
    """What would help a rank with ``room`` bytes for expert slots, short of ``missing`` bytes."""
    slots = room // weights.slot if weights.slot else 0
    if slots < 1:
        return f"the device would need {_gib(missing)} more, on however many ranks"
    it = f"with {slots} expert slots per rank instead of {weights.slots}, each {_gib(weights.slot)}, it would fit: "
    ranks = -(-weights.experts // slots)
    if ranks <= min_ranks:
        return it + f"set expert_slots to {slots}, or leave it out"
    return it + f"set min_data_parallel_size to {ranks} or more (now {min_ranks}), and leave out expert_slots"


def _parts(weights: Weights) -> str:
    experts = f" and {weights.slots} expert slots of {_gib(weights.slot)}" if weights.slots else ""
    return f"{_gib(weights.total)} ({_gib(weights.dense)} dense{experts})"


def _gib(size: int) -> str:
    return f"{_amount(size)} GiB"


def _amount(size: int) -> str:
    """In GiB; small amounts with more digits, so that they are not 0.0."""
    value = size / _GIB
    return f"{value:.1f}" if abs(value) >= 0.1 or not size else f"{value:.2g}"
