"""Which experts a row goes to: scores, the best k of them, their weights, in one kernel after the router's product."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from actors.engine.cuda.elementwise import rounded
from actors.engine.cuda.linear import FEW_ROWS, FewRows

MAX_EXPERTS, MAX_CHOSEN = 1024, 32


class Choice(NamedTuple):
    """How logits become chosen experts and weights.

    Scores are the softmax or the ``sigmoid`` of the logits. The best ``top_k`` by score, plus ``correction [E]`` where
    there is one, are chosen (the lowest id among equals), of the best ``kept_groups`` of ``groups`` equal groups of
    neighbours only; a group counts as much as its two best. The weights are their scores, divided by their sum when
    ``normalised``, rounded to ``dtype`` and times ``factor``.
    """

    top_k: int
    sigmoid: bool
    normalised: bool
    dtype: torch.dtype
    correction: torch.Tensor | None = None
    groups: int = 1
    kept_groups: int = 1
    factor: float = 1.0


@triton.jit
def choose(  # type: ignore[no-untyped-def]
    logits, correction_pointer, row, weights_pointer, ids_pointer, factor,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    SIGMOID: tl.constexpr, NORMALISED: tl.constexpr, CORRECTED: tl.constexpr,
    GROUPS: tl.constexpr, KEPT_GROUPS: tl.constexpr,
):  # fmt: skip
    """``logits [BLOCK]`` of one row, float32, to the row's weights and ids ``[TOP_K]``."""
    expert = tl.arange(0, BLOCK)
    inside = expert < EXPERTS
    lowest = float("-inf")
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        logits = tl.where(inside, logits, lowest)
        powers = tl.exp(logits - tl.max(logits, 0))
        scores = powers / tl.sum(powers, 0)
    ranked = scores
    if CORRECTED:
        ranked += tl.load(correction_pointer + expert, inside, 0.0).to(tl.float32)
    # Not a number: the weights will say so, but the ids must be experts.
    ranked = tl.where(inside, tl.where(ranked == ranked, ranked, -1e38), lowest)
    if KEPT_GROUPS < GROUPS:
        size: tl.constexpr = EXPERTS // GROUPS
        group = expert // size
        worth = tl.full((BLOCK,), lowest, tl.float32)
        for g in tl.static_range(GROUPS):
            own = tl.where(group == g, ranked, lowest)
            best, place = tl.max(own, 0, return_indices=True)
            second = tl.max(tl.where(expert == place, lowest, own), 0)
            worth = tl.where(expert == g, best + second, worth)
        kept = tl.zeros((BLOCK,), tl.int32)
        for _ in tl.static_range(KEPT_GROUPS):
            _best, place = tl.max(worth, 0, return_indices=True)
            kept = tl.where(group == place, 1, kept)
            worth = tl.where(expert == place, lowest, worth)
        ranked = tl.where(kept == 1, ranked, lowest)
    slot = tl.arange(0, SLOTS)
    ids = tl.zeros((SLOTS,), tl.int32)
    weights = tl.zeros((SLOTS,), tl.float32)
    for k in tl.static_range(TOP_K):
        _best, place = tl.max(ranked, 0, return_indices=True)
        taken = expert == place
        ids = tl.where(slot == k, place, ids)
        weights = tl.where(slot == k, tl.sum(tl.where(taken, scores, 0.0), 0), weights)
        ranked = tl.where(taken, lowest, ranked)
    if NORMALISED:
        weights /= tl.sum(weights, 0) + 1e-20  # sigmoids may all be zero
    dtype = weights_pointer.dtype.element_ty
    weights = rounded(weights, dtype) * factor
    tl.store(weights_pointer + row * TOP_K + slot, weights.to(dtype), slot < TOP_K)
    tl.store(ids_pointer + row * TOP_K + slot, ids.to(ids_pointer.dtype.element_ty), slot < TOP_K)


@triton.jit
def _route(  # type: ignore[no-untyped-def]
    logits_pointer, correction_pointer, weights_pointer, ids_pointer, factor,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    SIGMOID: tl.constexpr, NORMALISED: tl.constexpr, CORRECTED: tl.constexpr,
    GROUPS: tl.constexpr, KEPT_GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    logits = tl.load(logits_pointer + row * EXPERTS + expert, expert < EXPERTS, 0.0).to(tl.float32)
    choose(
        logits, correction_pointer, row, weights_pointer, ids_pointer, factor,
        EXPERTS, BLOCK, TOP_K, SLOTS, SIGMOID, NORMALISED, CORRECTED, GROUPS, KEPT_GROUPS,
    )  # fmt: skip


def route(logits: torch.Tensor, choice: Choice) -> tuple[torch.Tensor, torch.Tensor]:
    """``logits [T, E]``, contiguous, to weights ``[T, k]`` of ``choice.dtype`` and ids ``[T, k]``, int64, best first.

    Computes in float32. At most ``MAX_EXPERTS`` experts and ``MAX_CHOSEN`` chosen.
    """
    rows, experts = logits.shape
    weights = torch.empty(rows, choice.top_k, dtype=choice.dtype, device=logits.device)
    ids = torch.empty(rows, choice.top_k, dtype=torch.int64, device=logits.device)
    if rows:
        _route[(rows,)](
            logits, logits if choice.correction is None else choice.correction, weights, ids,
            choice.factor, **constants(choice, experts), num_warps=1 if experts <= 256 else 4,
        )  # fmt: skip
    return weights, ids


def constants(choice: Choice, experts: int) -> dict[str, int | bool]:
    """What the kernels are compiled for."""
    return {
        "EXPERTS": experts,
        "BLOCK": triton.next_power_of_2(experts),
        "TOP_K": choice.top_k,
        "SLOTS": triton.next_power_of_2(choice.top_k),
        "SIGMOID": choice.sigmoid,
        "NORMALISED": choice.normalised,
        "CORRECTED": choice.correction is not None,
        "GROUPS": choice.groups,
        "KEPT_GROUPS": choice.kept_groups,
    }


class Router:
    """The forward of a router: ``x [..., H]`` to logits ``[T, E]``, weights ``[T, k]`` and ids ``[T, k]``.

    ``weight [E, H]`` and ``bias [E]`` give the logits, in their dtype or, with ``wide``, in float32.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, choice: Choice, wide: bool = False) -> None:
        self.weight, self.bias, self.choice = weight, bias, choice
        self.wide = wide and weight.dtype != torch.float32
        self._few = None
        if weight.dtype != torch.float32:
            self._few = FewRows(weight, bias, torch.float32 if wide else weight.dtype)

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = self.logits(hidden_states.reshape(-1, hidden_states.shape[-1]))
        return logits, *route(logits, self.choice)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        if self._few is not None and 0 < len(x) <= FEW_ROWS:
            return self._few(x)
        weight, bias = self.weight, self.bias
        if self.wide:
            x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
        return torch.nn.functional.linear(x, weight, bias)
