"""Which experts a row goes to: scores, the best k of them, their weights, in one kernel after the router's product.

Or with it: for few rows, where a kernel more costs as much as the product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from actors.engine.cuda.elementwise import rounded
from actors.engine.cuda.linear import FEW_ROWS, arrived_last, fetch_weights, lines_ahead, multiply_few
from actors.engine.cuda.one_row import Row, load_columns, load_row, share, suits_row
from actors.engine.cuda.overlap import await_previous, begin, fetch_ahead, late, launch, let_next_start

MAX_EXPERTS, MAX_CHOSEN = 1024, 32
# How few rows' product is shared: experts and inner elements at a time of a program, parts of the inner axis.
_COLUMNS, _INNER, _SPLITS = 16, 256, 8
# Experts of a program where there is one row.
_ROW_COLUMNS = 4
# Of a single row, up to so many experts are each compared with each; of many rows that is more work than it saves.
_COMPARED = 128


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
def _choose(  # type: ignore[no-untyped-def]
    logits, row, there, correction_pointer, weights_pointer, ids_pointer, factor,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    SIGMOID: tl.constexpr, NORMALISED: tl.constexpr, CORRECTED: tl.constexpr,
    GROUPS: tl.constexpr, KEPT_GROUPS: tl.constexpr, COMPARED: tl.constexpr,
):  # fmt: skip
    """``logits [ROWS, BLOCK]``, float32, of rows ``row [ROWS]``, to weights and ids of those that are ``there``."""
    expert = tl.arange(0, BLOCK)[None, :]
    inside = expert < EXPERTS
    lowest = float("-inf")
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        logits = tl.where(inside, logits, lowest)
        powers = tl.exp(logits - tl.max(logits, 1)[:, None])
        scores = powers / tl.sum(powers, 1)[:, None]
    ranked = scores
    if CORRECTED:
        ranked += tl.load(correction_pointer + expert, inside, 0.0).to(tl.float32)
    # Not a number: the weights will say so, but the ids must be experts.
    ranked = tl.where(inside, tl.where(ranked == ranked, ranked, -1e38), lowest)
    if KEPT_GROUPS < GROUPS:
        size: tl.constexpr = EXPERTS // GROUPS
        group = expert // size
        worth = tl.full(logits.shape, lowest, tl.float32)
        for g in tl.static_range(GROUPS):
            own = tl.where(group == g, ranked, lowest)
            best, place = tl.max(own, 1, return_indices=True)
            second = tl.max(tl.where(expert == place[:, None], lowest, own), 1)
            worth = tl.where(expert == g, (best + second)[:, None], worth)
        kept = tl.zeros(logits.shape, tl.int32)
        for _ in tl.static_range(KEPT_GROUPS):
            _best, place = tl.max(worth, 1, return_indices=True)
            kept = tl.where(group == place[:, None], 1, kept)
            worth = tl.where(expert == place[:, None], lowest, worth)
        ranked = tl.where(kept == 1, ranked, lowest)
    slot = tl.arange(0, SLOTS)[None, :]
    if COMPARED:
        # How many come before each: all at once, where one maximum after the other waits for shuffles and barriers.
        number = tl.arange(0, BLOCK)
        others, own = ranked[:, None, :], ranked[:, :, None]
        first = number[None, None, :] < number[None, :, None]
        rank = tl.sum(tl.where(first, others >= own, others > own).to(tl.int32), 2)
        here = (rank[:, :, None] == slot[:, None, :]) & (slot < TOP_K)[:, None, :]
        ids = tl.sum(tl.where(here, expert[:, :, None], 0), 1)
        weights = tl.sum(tl.where(here, scores[:, :, None], 0.0), 1)
    else:
        ids = tl.zeros((logits.shape[0], SLOTS), tl.int32)
        weights = tl.zeros((logits.shape[0], SLOTS), tl.float32)
        for k in tl.static_range(TOP_K):
            _best, place = tl.max(ranked, 1, return_indices=True)
            taken = expert == place[:, None]
            ids = tl.where(slot == k, place[:, None], ids)
            weights = tl.where(slot == k, tl.sum(tl.where(taken, scores, 0.0), 1)[:, None], weights)
            ranked = tl.where(taken, lowest, ranked)
    if NORMALISED:
        weights /= tl.sum(weights, 1)[:, None] + 1e-20  # sigmoids may all be zero
    dtype = weights_pointer.dtype.element_ty
    weights = rounded(weights, dtype) * factor
    place = row[:, None] * TOP_K + slot
    inside = there[:, None] & (slot < TOP_K)
    tl.store(weights_pointer + place, weights.to(dtype), inside)
    tl.store(ids_pointer + place, ids.to(ids_pointer.dtype.element_ty), inside)


@triton.jit
def _route(  # type: ignore[no-untyped-def]
    logits_pointer, correction_pointer, weights_pointer, ids_pointer, factor, rows,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    SIGMOID: tl.constexpr, NORMALISED: tl.constexpr, CORRECTED: tl.constexpr,
    GROUPS: tl.constexpr, KEPT_GROUPS: tl.constexpr, COMPARED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (expert < EXPERTS)
    logits = tl.load(logits_pointer + row[:, None] * EXPERTS + expert, inside, 0.0).to(tl.float32)
    _choose(
        logits, row, row < rows, correction_pointer, weights_pointer, ids_pointer, factor,
        EXPERTS, BLOCK, TOP_K, SLOTS, SIGMOID, NORMALISED, CORRECTED, GROUPS, KEPT_GROUPS, COMPARED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _score_and_route(  # type: ignore[no-untyped-def]
    x_pointer, weight_pointer, bias_pointer, parts_pointer, counter_pointer, logits_pointer,
    correction_pointer, weights_pointer, ids_pointer, factor, rows,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    STEPS: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    SIGMOID: tl.constexpr, NORMALISED: tl.constexpr, CORRECTED: tl.constexpr,
    GROUPS: tl.constexpr, KEPT_GROUPS: tl.constexpr, COMPARED: tl.constexpr, LINES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs share the product by expert and along the inner axis; the last to finish adds up and chooses."""
    split = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tile_row = tl.arange(0, TILE)
    if OVERLAP and LINES > 0:
        fetch_weights(weight_pointer, column, EXPERTS, split * STEPS, WIDTH, INNER, STEPS, LINES)
    begin(OVERLAP)
    total = multiply_few(
        x_pointer, weight_pointer, tile_row < rows, column, column < EXPERTS, split * STEPS,
        WIDTH, TILE, COLUMNS, INNER, STEPS, 3,
    )  # fmt: skip
    place = (split * rows + tile_row)[:, None] * EXPERTS + column[None, :]
    tl.store(parts_pointer + place, total, (tile_row < rows)[:, None] & (column < EXPERTS)[None, :])
    if arrived_last(counter_pointer, tl.num_programs(0) * SPLITS):
        row, expert = tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :]
        there = row < rows
        inside = there[:, None] & (expert < EXPERTS)
        logits = tl.zeros((ROWS, BLOCK), tl.float32)
        for part in tl.static_range(SPLITS):
            source = parts_pointer + (part * rows + row)[:, None] * EXPERTS + expert
            logits += tl.load(source, inside, 0.0, cache_modifier=".cg")
        if BIAS:
            logits += tl.load(bias_pointer + expert, expert < EXPERTS, 0.0).to(tl.float32)
        dtype = logits_pointer.dtype.element_ty
        tl.store(logits_pointer + row[:, None] * EXPERTS + expert, logits.to(dtype), inside)
        _choose(
            rounded(logits, dtype), row, there, correction_pointer, weights_pointer, ids_pointer, factor,
            EXPERTS, BLOCK, TOP_K, SLOTS, SIGMOID, NORMALISED, CORRECTED, GROUPS, KEPT_GROUPS, COMPARED,
        )  # fmt: skip


@triton.jit
def _route_row(  # type: ignore[no-untyped-def]
    x_pointer, delta_pointer, norm_pointer, total_pointer, normed_pointer, weight_pointer, bias_pointer,
    scores_pointer, counter_pointer, logits_pointer, correction_pointer, weights_pointer, ids_pointer,
    epsilon, factor,
    WIDTH: tl.constexpr, ROW: tl.constexpr, COLUMNS: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr,
    ROUND_BEFORE_SCALE: tl.constexpr, BIAS: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    SIGMOID: tl.constexpr, NORMALISED: tl.constexpr, CORRECTED: tl.constexpr,
    GROUPS: tl.constexpr, KEPT_GROUPS: tl.constexpr, COMPARED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """As ``multiply_row`` does it; the last program to finish chooses."""
    let_next_start(OVERLAP)
    program = tl.program_id(0)
    column = program * COLUMNS + tl.arange(0, COLUMNS)
    if OVERLAP:
        fetch_ahead(counter_pointer + tl.arange(0, 1))
    weight = load_columns(weight_pointer, column, EXPERTS, WIDTH, ROW)
    k = tl.arange(0, ROW)
    norm = tl.load(norm_pointer + k, k < WIDTH, 0.0) if NORM else 0.0
    await_previous(OVERLAP)
    weight = late(weight, OVERLAP)
    x = load_row(
        x_pointer, delta_pointer, norm, total_pointer, normed_pointer, epsilon, program == 0,
        WIDTH, ROW, ADD, NORM, ROUND_BEFORE_SCALE, True,
    )  # fmt: skip
    score = tl.sum(weight.to(tl.float32) * x[None, :], 1)
    if BIAS:
        score += tl.load(bias_pointer + column, column < EXPERTS, 0.0).to(tl.float32)
    tl.store(scores_pointer + column, score, column < EXPERTS)
    if arrived_last(counter_pointer, tl.num_programs(0)):
        expert = tl.arange(0, BLOCK)[None, :]
        logits = tl.load(scores_pointer + expert, expert < EXPERTS, 0.0, cache_modifier=".cg")
        dtype = logits_pointer.dtype.element_ty
        tl.store(logits_pointer + expert, logits.to(dtype), expert < EXPERTS)
        row = tl.zeros([1], tl.int32)
        _choose(
            rounded(logits, dtype), row, row == 0, correction_pointer, weights_pointer, ids_pointer, factor,
            EXPERTS, BLOCK, TOP_K, SLOTS, SIGMOID, NORMALISED, CORRECTED, GROUPS, KEPT_GROUPS, COMPARED,
        )  # fmt: skip


def route(logits: torch.Tensor, choice: Choice) -> tuple[torch.Tensor, torch.Tensor]:
    """``logits [T, E]``, contiguous, to weights ``[T, k]`` of ``choice.dtype`` and ids ``[T, k]``, int64, best first.

    Computes in float32. At most ``MAX_EXPERTS`` experts and ``MAX_CHOSEN`` chosen.
    """
    rows, experts = logits.shape
    weights, ids = _room(rows, choice, logits.device)
    if rows:
        tile = 1 if rows <= 64 else 4
        _route[(triton.cdiv(rows, tile),)](
            logits, logits if choice.correction is None else choice.correction, weights, ids, choice.factor, rows,
            ROWS=tile, **_constants(choice, experts, False), num_warps=1 if experts <= 256 else 4,
            **launch(logits.device, rows),
        )  # fmt: skip
    return weights, ids


def _room(rows: int, choice: Choice, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.empty(rows, choice.top_k, dtype=choice.dtype, device=device)
    return weights, torch.empty(rows, choice.top_k, dtype=torch.int64, device=device)


def _constants(choice: Choice, experts: int, alone: bool) -> dict[str, Any]:
    """``alone``: there is one row."""
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
        "COMPARED": alone and experts <= _COMPARED,
    }


class Router:
    """The forward of a router: ``x [..., H]`` to logits ``[T, E]``, weights ``[T, k]`` and ids ``[T, k]``.

    ``weight [E, H]`` and ``bias [E]`` give the logits, in their dtype or, with ``wide``, in float32. Few rows of 16-bit
    weights take one kernel. One stream at a time may use it.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, choice: Choice, wide: bool = False) -> None:
        self.weight, self.bias, self.choice = weight, bias, choice
        self.wide = wide and weight.dtype != torch.float32
        self._counter = torch.zeros(1, dtype=torch.int32, device=weight.device)

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        if 0 < len(x) <= FEW_ROWS and self.weight.dtype != torch.float32:
            return self._few(x)
        weight, bias = self.weight, self.bias
        if self.wide:
            x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
        logits = torch.nn.functional.linear(x, weight, bias)
        return logits, *route(logits, self.choice)

    @property
    def takes_row(self) -> bool:
        return suits_row(self.weight.dtype, self.weight.shape[1])

    def of_row(self, row: Row) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """``row`` before its norm and after it, and what routing gives for it; if this router ``takes_row``."""
        x, (experts, width), choice = row.x, self.weight.shape, self.choice
        total, normed = x if row.delta is None else torch.empty_like(x), torch.empty_like(x)
        logits = torch.empty(1, experts, dtype=torch.float32 if self.wide else x.dtype, device=x.device)
        scores = torch.empty(1, experts, dtype=torch.float32, device=x.device)
        weights, ids = _room(1, choice, x.device)
        block = triton.next_power_of_2(width)
        columns, warps = share(block, _ROW_COLUMNS)
        warps = max(warps, 4) if experts <= _COMPARED else warps
        _route_row[(triton.cdiv(experts, columns),)](
            x, x if row.delta is None else row.delta, x if row.norm is None else row.norm, total, normed,
            self.weight, self.weight if self.bias is None else self.bias, scores, self._counter, logits,
            logits if choice.correction is None else choice.correction, weights, ids, row.epsilon, choice.factor,
            WIDTH=width, ROW=block, COLUMNS=columns, ADD=row.delta is not None, NORM=row.norm is not None,
            ROUND_BEFORE_SCALE=row.round_before_scale, BIAS=self.bias is not None,
            **_constants(choice, experts, True), num_warps=warps, **launch(x.device, 1),
        )  # fmt: skip
        return total, normed, (logits, weights, ids)

    def _few(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        (rows, inner), experts, choice = x.shape, len(self.weight), self.choice
        tile = 1 if rows == 1 else 4 if rows <= 4 else FEW_ROWS
        dtype, steps = torch.float32 if self.wide else x.dtype, triton.cdiv(inner, _SPLITS * _INNER)
        logits = torch.empty(rows, experts, dtype=dtype, device=x.device)
        parts = torch.empty(_SPLITS, rows, experts, dtype=torch.float32, device=x.device)
        weights, ids = _room(rows, choice, x.device)
        _score_and_route[(triton.cdiv(experts, _COLUMNS), _SPLITS)](
            x, self.weight, self.weight if self.bias is None else self.bias, parts, self._counter, logits,
            logits if choice.correction is None else choice.correction, weights, ids, choice.factor, rows,
            WIDTH=inner, BIAS=self.bias is not None, TILE=FEW_ROWS, COLUMNS=_COLUMNS, INNER=_INNER,
            STEPS=steps, SPLITS=_SPLITS, LINES=lines_ahead(self.weight, steps * _INNER),
            ROWS=tile, **_constants(choice, experts, rows == 1), num_warps=4, **launch(x.device, rows),
        )  # fmt: skip
        return logits, weights, ids
