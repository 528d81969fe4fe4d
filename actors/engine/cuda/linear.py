"""Linear layers on GPUs: projections of the same input as one product, and products of few rows by a kernel of our own.

A product of few rows reads each weight once and does next to nothing with it, so what counts is that enough reads are
under way on every multiprocessor. Our kernel gives each program a few output columns and pipelines its reads; where
the columns are too few to occupy the GPU the inner axis is split too, and the last program of a column tile to finish
sums the parts, in their order. A single row has a kernel of its own, see ``one_row.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from actors.engine.cuda.one_row import Row, multiply_row, suits_row
from actors.engine.cuda.overlap import MOST_AHEAD, begin, fetch_ahead, launch
from actors.engine.turns import take_turns

# The most rows of a layer that our kernel takes: one tile of the matrix units. More go through torch's product.
FEW_ROWS = 16
# From so many outputs on reads are under way all the time, and a single row is one of few.
_MANY_OUTPUTS = 16384


class Tiles(NamedTuple):
    """How our kernel cuts a product: output columns and inner elements per program, parts of the inner axis.

    A program takes all rows, at most ``rows``: 16, 32 or 64.
    """

    columns: int
    inner: int
    splits: int
    stages: int
    warps: int
    rows: int = FEW_ROWS


def tiles(outputs: int, inner: int) -> Tiles:
    """Tiles for weights ``[outputs, inner]``, as measured on an H100 (scripts/bench/cuda_fuse.py, 2026-11-25).

    More than two programs for each of its 132 multiprocessors, each of which reads its columns in four steps.
    """
    if outputs >= _MANY_OUTPUTS:
        return Tiles(64, 128, 1, 6, 4)
    splits = 1
    while outputs // 16 * splits < 320 and inner // (2 * splits) >= 256:
        splits *= 2
    step = 512 if inner // splits >= 2048 else 256
    return Tiles(16, step, splits, 3 if step == 512 else 4, 4)


@triton.jit
def arrived_last(counter_pointer, count):  # type: ignore[no-untyped-def]
    """Whether this program is the last of ``count`` to come here, so that it sees what the others stored before.

    The counter is zero before and after.
    """
    tl.debug_barrier()  # all threads' stores come before the announcement
    last = tl.atomic_add(counter_pointer, 1, sem="acq_rel") == count - 1
    if last:
        tl.atomic_xchg(counter_pointer, 0)
    tl.debug_barrier()
    return last


@triton.jit
def multiply_few(  # type: ignore[no-untyped-def]
    x_pointer, weight_pointer, row_inside, column, column_inside, first_step,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """``[ROWS, COLUMNS]``, float32: ``STEPS`` steps of ``INNER`` elements of the inner axis, from ``first_step`` on."""
    xs = x_pointer + tl.arange(0, ROWS)[:, None] * WIDTH
    weights = weight_pointer + column.to(tl.int64)[:, None] * WIDTH
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        k = ((first_step + step) * INNER + tl.arange(0, INNER))[None, :]
        weight = tl.load(weights + k, column_inside[:, None] & (k < WIDTH), 0.0)
        x = tl.load(xs + k, row_inside[:, None] & (k < WIDTH), 0.0)
        total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
    return total


@triton.jit
def fetch_weights(  # type: ignore[no-untyped-def]
    weight_pointer, column, outputs, first_step,
    WIDTH: tl.constexpr, INNER: tl.constexpr, STEPS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Ask ahead for what ``multiply_few`` will read, which is at most ``LINES`` lines of 128 bytes a column."""
    per_line: tl.constexpr = 1024 // weight_pointer.dtype.element_ty.primitive_bitwidth
    k = first_step * INNER + tl.minimum(tl.arange(0, LINES) * per_line, STEPS * INNER - 1)
    rows = weight_pointer + tl.minimum(column, outputs - 1).to(tl.int64)[:, None] * WIDTH
    fetch_ahead(rows + tl.minimum(k, WIDTH - 1)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _few_rows(  # type: ignore[no-untyped-def]
    x_pointer, weight_pointer, bias_pointer, output_pointer, parts_pointer, counter_pointer,
    rows, outputs,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    SPLITS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, LINES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, ROWS)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    if OVERLAP and LINES > 0:
        fetch_weights(weight_pointer, column, outputs, split * STEPS, WIDTH, INNER, STEPS, LINES)
    begin(OVERLAP)
    total = multiply_few(
        x_pointer, weight_pointer, row < rows, column, column < outputs, split * STEPS,
        WIDTH, ROWS, COLUMNS, INNER, STEPS, STAGES,
    )  # fmt: skip
    place = row[:, None] * outputs + column[None, :]
    inside = (row < rows)[:, None] & (column < outputs)[None, :]
    last = True
    if SPLITS > 1:
        tl.store(parts_pointer + split * rows * outputs + place, total, inside)
        last = arrived_last(counter_pointer + tile, SPLITS)
    if last:
        if SPLITS > 1:
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            for part in tl.range(SPLITS):
                total += tl.load(parts_pointer + part * rows * outputs + place, inside, 0.0, cache_modifier=".cg")
        if BIAS:
            total += tl.load(bias_pointer + column, column < outputs, 0.0).to(tl.float32)[None, :]
        tl.store(output_pointer + place, total.to(output_pointer.dtype.element_ty), inside)


def lines_ahead(weight: torch.Tensor, inner: int) -> int:
    """``LINES`` of ``fetch_weights`` for programs that read ``inner`` elements of each of their columns."""
    if weight.numel() * weight.element_size() > MOST_AHEAD:
        return 0
    return int(triton.next_power_of_2(triton.cdiv(inner * weight.element_size(), 128)))


class FewRows:
    """``x [n, in] -> [n, out]`` for ``n <= cut.rows``, ``weight [out, in]``, ``bias [out]`` or None; of one dtype.

    Sums in float32, in an order that does not depend on ``n``; gives ``dtype``, by default that of ``x``. One stream
    at a time may use it.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype | None = None,
        cut: Tiles | None = None,
    ) -> None:
        self.weight, self.bias, self.dtype = weight, bias, dtype
        self.cut = cut or tiles(*weight.shape)
        self._grid = (triton.cdiv(len(weight), self.cut.columns), self.cut.splits)
        self._steps = triton.cdiv(weight.shape[1], self.cut.splits * self.cut.inner)
        self._lines = lines_ahead(weight, self._steps * self.cut.inner)
        self._counters = torch.zeros(self._grid[0], dtype=torch.int32, device=weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        (rows, inner), outputs, cut = x.shape, len(self.weight), self.cut
        output = torch.empty(rows, outputs, dtype=self.dtype or x.dtype, device=x.device)
        parts = output
        if cut.splits > 1:
            parts = torch.empty(cut.splits, rows, outputs, dtype=torch.float32, device=x.device)
        _few_rows[self._grid](
            x, self.weight, self.weight if self.bias is None else self.bias, output, parts, self._counters,
            rows, outputs,
            WIDTH=inner, BIAS=self.bias is not None, ROWS=cut.rows, COLUMNS=cut.columns, INNER=cut.inner,
            SPLITS=cut.splits, STEPS=self._steps, STAGES=cut.stages, LINES=self._lines,
            num_warps=cut.warps, **launch(x.device, rows),
        )  # fmt: skip
        return output


class Linear:
    """``x [..., in] -> [..., out]``, where the weights ``[out_i, in]`` of ``layers`` stand one below the other.

    The layers' own weights and biases become views of the joined ones, so that memory holds them once.
    """

    def __init__(self, layers: Sequence[torch.nn.Linear]) -> None:
        self.sizes = [layer.out_features for layer in layers]
        self.weight, self.bias = layers[0].weight.detach(), _bias(layers)
        if len(layers) > 1:
            self.weight = torch.cat([layer.weight.detach() for layer in layers])
            parts = self.weight.split(self.sizes)
            biases = [None] * len(layers) if self.bias is None else self.bias.split(self.sizes)
            for layer, weight, bias in zip(layers, parts, biases, strict=True):
                layer.weight = torch.nn.Parameter(weight, requires_grad=False)
                if layer.bias is not None:
                    layer.bias = torch.nn.Parameter(bias, requires_grad=False)
        # float32 stays with torch, whose product is exact as long as TF32 is off (the default).
        self._few = FewRows(self.weight, self.bias) if self.weight.dtype != torch.float32 else None
        self.takes_row = suits_row(self.weight.dtype, self.weight.shape[1]) and len(self.weight) < _MANY_OUTPUTS

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.takes_row and len(rows) == 1:
            output = self.of_row(Row(rows))[0]
        elif self._few is not None and 0 < len(rows) <= FEW_ROWS:
            output = self._few(rows)
        else:
            output = torch.nn.functional.linear(rows, self.weight, self.bias)
        return output.view(*x.shape[:-1], len(self.weight))

    def of_row(self, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
        """``[1, out]`` of ``row``, and the row before its norm; if this layer ``takes_row``."""
        return multiply_row(row, self.weight, self.bias)


def _bias(layers: Sequence[torch.nn.Linear]) -> torch.Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    parts = [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
    return torch.cat([part.detach() for part in parts]) if len(layers) > 1 else parts[0].detach()


def join(groups: Iterable[Sequence[torch.nn.Linear]]) -> dict[tuple[torch.nn.Linear, ...], Linear]:
    """Let the linear layers of each group compute as one; gives what computes for each group.

    The layers of a group are called in this order and with the same tensor. Layers that share a weight with another,
    or differ in dtype, are each a group of its own.
    """
    groups = [list(group) for group in groups]
    uses = Counter(id(layer.weight) for group in groups for layer in group)
    joined = {}
    for group in groups:
        alone = any(uses[id(layer.weight)] > 1 for layer in group) or len({layer.weight.dtype for layer in group}) > 1
        for layers in [[layer] for layer in group] if alone else [group]:
            linear = Linear(layers)
            take_turns(layers, linear)
            joined[tuple(layers)] = linear
    return joined
