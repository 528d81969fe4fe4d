#!/usr/bin/env python3
"""The experts' products on a GPU, weights by tensor descriptors beside the present kernels: right, then how fast.

    python scripts/bench/cuda_wide.py [--rows 8192,64] [--seconds 75]

One MoE layer of Qwen3-30B-A3B in bfloat16; graphs of layers with weights of their own, as in ``cuda_experts.py``. Of
each way the whole layer and its kernels, in microseconds, and the rates of both products, of pairs that count. The
table comes last.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from ceilings import copy_bandwidth, matrix_rate
from cuda_experts import EXPERTS, HIDDEN, INNER, TOP_K, Block, Gated, draw, error, make, repeats, time_of, whole
from triton.tools.tensor_descriptor import TensorDescriptor

from actors.engine.cuda import gemm_wide
from actors.engine.cuda.experts import MOST_ROWS, CudaExperts
from actors.engine.cuda.gemm import _find, _tiles
from actors.engine.cuda.gemm_wide import Shape, described
from actors.engine.cuda.overlap import launch
from actors.engine.experts.exchange import SoloExchange

PRESENT = CudaExperts._multiply
# rows, columns, depth, warps, stages, programs a processor, halves; of the second product: rows by descriptor, one
# loop.
EXPAND = {
    8192: [
        (128, 128, 64, 8, 3, 1, False), (128, 128, 64, 8, 3, 1, True), (128, 128, 64, 8, 4, 1, True),
        (128, 64, 64, 4, 3, 2, True), (128, 64, 64, 4, 3, 2, False), (64, 128, 64, 4, 4, 1, False),
        (128, 128, 128, 8, 2, 1, True), (256, 64, 64, 8, 3, 1, True),
    ],
    512: [
        (32, 64, 128, 4, 3, 2, False), (64, 64, 128, 4, 3, 1, False), (64, 64, 64, 4, 4, 2, False),
        (64, 128, 64, 4, 4, 1, False), (64, 64, 64, 4, 3, 3, False),
    ],
    64: [
        (16, 32, 128, 4, 4, 3, False), (16, 32, 128, 4, 3, 4, False), (16, 64, 64, 4, 5, 3, False),
        (16, 32, 256, 4, 3, 2, False), (16, 16, 256, 4, 3, 4, False), (16, 64, 128, 4, 3, 2, False),
    ],
}  # fmt: skip
CONTRACT = {
    8192: [
        (128, 128, 64, 4, 3, 2, True, True, False), (128, 128, 64, 4, 3, 2, True, False, False),
        (128, 128, 64, 4, 3, 2, False, True, False), (128, 256, 64, 8, 3, 1, False, True, True),
        (128, 256, 64, 8, 4, 1, False, True, True), (128, 256, 64, 8, 4, 1, True, True, False),
        (64, 256, 64, 4, 2, 2, False, True, False), (128, 128, 64, 4, 3, 2, False, True, True),
    ],
    512: [
        (64, 128, 64, 4, 4, 2, False, False, False), (64, 128, 64, 4, 4, 2, False, True, False),
        (64, 256, 64, 8, 4, 1, False, False, False), (64, 64, 64, 4, 4, 4, False, False, False),
        (64, 128, 64, 4, 3, 3, False, False, False),
    ],
    64: [
        (16, 64, 128, 4, 4, 3, False, False, False), (16, 64, 128, 4, 3, 4, False, False, False),
        (16, 64, 256, 4, 3, 2, False, False, False), (16, 32, 256, 4, 3, 4, False, False, False),
        (16, 128, 64, 4, 4, 3, False, False, False), (16, 128, 128, 4, 3, 2, False, False, False),
    ],
}  # fmt: skip
SORTED = [(128, 128, 64, 8, 3, 1, False), (128, 128, 64, 8, 3, 1, True), (128, 128, 64, 8, 4, 1, True)]


@triton.jit
def expand_sorted(  # type: ignore[no-untyped-def]
    rows, weight, inner, count, num_slots,
    N: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """What the first product would take if the pairs' rows stood sorted, so that the copy engine brought them too."""
    slot, pairs, before, ends = _tiles(count, num_slots, BM, SLOTS)
    columns: tl.constexpr = N // 2 // BN
    for work in tl.range(tl.program_id(0), tl.max(ends, 0) * columns, tl.num_programs(0), flatten=FLAT):
        number, block, _pair, left, place = _find(work, columns, slot, pairs, before, ends, BM)
        total = tl.zeros([BM, 2 * BN], tl.float32)
        for at in range(0, K, BK):
            a = rows.load([place, at])
            b = tl.trans(tl.reshape(weight.load([number, 0, block * BN, at]), [2 * BN, BK]))
            total = tl.dot(a, b, total)
        gate, other = tl.split(tl.permute(tl.reshape(total, [BM, 2, BN]), [0, 2, 1]))
        root = tl.rsqrt(1 + tl.exp(-gate))
        total = gate * root * (root * other)
        row = tl.arange(0, BM)
        there = inner + (place + row).to(tl.int64)[:, None] * (N // 2) + (block * BN + tl.arange(0, BN))[None, :]
        tl.store(there, total.to(inner.dtype.element_ty), mask=(row < left)[:, None])


def time_sorted(experts: CudaExperts, rows: int) -> list[str]:
    """Microseconds of ``expand_sorted``, each slot having as many pairs, in several tiles; see there."""
    pairs = torch.randn(rows * TOP_K, HIDDEN, dtype=torch.bfloat16, device=experts.device)
    chosen = draw(rows, HIDDEN, torch.bfloat16, experts.device, 7)[1]
    count = torch.bincount(chosen.reshape(-1), minlength=EXPERTS).to(torch.int32)
    lines = []
    for bm, bn, bk, warps, stages, per, flat in SORTED:
        taken = []
        for products in experts._products:
            run = partial(
                expand_sorted[(experts.processors * per,)],
                TensorDescriptor.from_tensor(pairs, [bm, bk]), described(products.up, 2, 2 * bn, bk, False),
                experts._inner, count, EXPERTS, N=2 * INNER, K=HIDDEN, SLOTS=EXPERTS,
                BM=bm, BN=bn, BK=bk, FLAT=flat, num_warps=warps, num_stages=stages,
            )  # fmt: skip
            taken.append(time_of(run, 5) * 1e3)
        us = statistics.median(taken)
        rate = 4 * rows * TOP_K * HIDDEN * INNER / us / 1e6
        lines.append(f"{us:8.1f} us  expand of sorted rows {bm, bn, bk, warps, stages, per, flat}  TFLOP/s {rate:4.0f}")
    return lines


def multiply(expand: tuple[Any, ...], contract: tuple[Any, ...]) -> Callable[[Any, int, torch.Tensor], None]:
    """What takes the place of ``CudaExperts._multiply``, with tiles as in the tables above."""
    tables: dict[tuple[Any, ...], Any] = {}

    def table(tensor: torch.Tensor, parts: int, span: int, depth: int, transposed: bool) -> Any:
        key = tensor.data_ptr(), span, depth
        if key not in tables:
            tables[key] = described(tensor, parts, span, depth, transposed)
        return tables[key]

    def run(self: Any, layer: int, hidden: torch.Tensor) -> None:
        products, slots = self._products[layer], max(1, self._num_slots)
        up, (*shape, by_descriptor, flat) = Shape(*expand), contract
        down, turned, gate = Shape(*shape), products.transposed, products.gate
        tables_ = (
            table(products.up, 2 if gate == 1 else 1, up.columns * (2 if gate else 1), up.depth, turned),
            table(products.down, 1, down.columns, down.depth, turned),
        )
        common = {
            "TOP_K": self.top_k, "SLOTS": triton.next_power_of_2(slots), "TRANSPOSED": turned,
            "BIASED": products.biased, "PRECISION": "ieee" if self.dtype == torch.float32 else "tf32",
            **launch(self.device, len(hidden), MOST_ROWS),
        }  # fmt: skip
        inner = self._inner
        if not gate:
            inner = hidden.new_empty(max(1, sum(self._tokens) * self.top_k), products.up_columns)
        gemm_wide.expand[(self.processors * up.per_processor,)](
            hidden, self.window.received, tables_[0] or products.up, products.up_beside,
            inner, self._count, self._index, self._members, self._local, self._turn, self._computed,
            layer, self._num_slots, self._capacity, self.max_rows, products.limit, products.alpha,
            N=products.up_columns, K=self.hidden, GATE=gate, DESCRIBED=tables_[0] is not None, **common,
            BM=up.rows, BN=up.columns, BK=up.depth, HALVES=up.halves, num_warps=up.warps, num_stages=up.stages,
        )  # fmt: skip
        inner = (inner if gate else products.activate(inner)).view(-1, products.activated)
        by_descriptor = by_descriptor and inner.stride(0) * inner.element_size() % 16 == 0
        rows = TensorDescriptor.from_tensor(inner, [down.rows, down.depth]) if by_descriptor else inner
        gemm_wide.contract[(self.processors * down.per_processor,)](
            inner, rows, tables_[1] or products.down, products.down_beside,
            self.window.results, self._count, self._index, self._members, self._windows,
            self._num_slots, self._capacity, self.max_rows,
            N=self.hidden, K=products.activated, DESCRIBED=tables_[1] is not None, **common,
            BM=down.rows, BN=down.columns, BK=down.depth, HALVES=down.halves, ROWS=by_descriptor, FLAT=flat,
            num_warps=down.warps, num_stages=down.stages,
        )  # fmt: skip

    return run


def ways(rows: int) -> list[tuple[str, Any]]:
    size = min(EXPAND, key=lambda size: abs(size - rows))
    expand, contract = EXPAND[size], CONTRACT[size]
    found = [(f"expand {tile}", multiply(tile, contract[0])) for tile in expand]
    return found + [(f"contract {tile}", multiply(expand[0], tile)) for tile in contract[1:]]


def setup(layers: int, rows: int) -> CudaExperts:
    modules = [Gated(EXPERTS, HIDDEN, INNER, torch.bfloat16, torch.device("cuda")) for _ in range(layers)]
    for module in modules:
        for parameter in module.parameters():
            parameter.normal_().mul_(parameter.shape[2] ** -0.5)
    experts = make(modules, rows, max_ranks=1)
    experts.adopt(whole(layers), SoloExchange())
    return experts


def compile_part(sizes: list[int], part: int, parts: int) -> None:
    """Fills Triton's cache with every so-manieth way, in a process of its own."""
    experts = setup(1, max(sizes))
    everything = [(rows, way) for rows in sizes for _, way in [*ways(rows), ("now", PRESENT)]]
    for rows, way in everything[part::parts]:
        CudaExperts._multiply = way  # type: ignore[method-assign]
        experts.own_rows.fill_(rows)
        experts.begin([rows])
        try:
            experts.forward(0, *draw(rows, HIDDEN, torch.bfloat16, experts.device, 1))
        except Exception as failure:
            print(f"{failure.__cause__ or failure}"[:200], flush=True)
            experts.adopt(whole(1), SoloExchange())
    torch.cuda.synchronize()


def compile_ahead(sizes: list[int]) -> None:
    context = multiprocessing.get_context("spawn")
    parts = min(14, max(1, (os.cpu_count() or 2) - 1))
    processes = [context.Process(target=compile_part, args=(sizes, part, parts)) for part in range(parts)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="8192,512,64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=80, help="after which no other way is begun")
    arguments = parser.parse_args()
    began, sizes = time.monotonic(), [int(rows) for rows in arguments.rows.split(",")]
    compile_ahead(sizes)
    print(f"[{time.monotonic() - began:5.1f} s] compiled", flush=True)
    rate, bandwidth = matrix_rate(), copy_bandwidth()
    experts, lines = setup(arguments.layers, max(sizes)), []
    reference: Any = experts._products[0].module
    for rows in sizes:
        lines.append(f"{rows} rows:")
        tensors = draw(rows, HIDDEN, torch.bfloat16, experts.device, 7)
        truth = reference.reference(*tensors)
        up, down = (2 * rows * TOP_K * HIDDEN * INNER * factor for factor in (2, 1))
        for name, way in [("now", PRESENT), *ways(rows), ("now again", PRESENT)]:
            if time.monotonic() - began > arguments.seconds:
                lines.append(f"{name}: no time left")
                continue
            CudaExperts._multiply = way  # type: ignore[method-assign]
            try:
                experts._inner.fill_(float("nan"))
                experts.window.results.fill_(float("nan"))
                experts.own_rows.fill_(rows)
                experts.begin([rows])
                off = error(experts.forward(0, *tensors), truth)
                experts.adopt(whole(arguments.layers), SoloExchange())
                block = Block(experts, rows)
                taken, parts = block.time(repeats(rows)), block.kernels()
                rates = [work / max(parts[part], 1e-3) / 1e6 for part, work in (("expand", up), ("contract", down))]
                each = "  ".join(f"{part} {us:6.1f}" for part, us in parts.items())
                lines.append(f"{taken:8.1f} us  {each}  TFLOP/s {rates[0]:4.0f} {rates[1]:4.0f}  {off:.1e}  {name}")
                if not off < 1e-2:
                    lines.append("  WRONG")
            except Exception as failure:
                lines.append(f"  FAILED  {name}: {str(failure.__cause__ or failure)[:150]}")
                torch.cuda.synchronize()
                experts.adopt(whole(arguments.layers), SoloExchange())
            print(f"[{time.monotonic() - began:5.1f} s] {lines[-1]}", flush=True)
        if rows >= 4096:
            try:
                lines += time_sorted(experts, rows)
            except Exception as failure:
                lines.append(f"  FAILED  sorted: {str(failure)[:150]}")
    print("\n".join(["", *lines]))
    print(
        f"copy {bandwidth / 1e12:.2f} TB/s, products {rate / 1e12:.0f} TFLOP/s, {torch.cuda.get_device_name()};"
        f" {time.monotonic() - began:.0f} s in all"
    )


if __name__ == "__main__":
    main()
