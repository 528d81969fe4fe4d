#!/usr/bin/env python3
"""The experts' products of a long prompt on a GPU in several ways: right, then how fast; the table comes last.

python scripts/bench/cuda_wide.py [--rows 8192] [--seconds 60]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from typing import Any

import torch
import triton
from ceilings import matrix_rate
from cuda_experts import EXPERTS, HIDDEN, INNER, TOP_K, Block, Gated, draw, error, make, whole
from triton.tools.tensor_descriptor import TensorDescriptor

from actors.engine.cuda import gemm, gemm_wide
from actors.engine.cuda.experts import CudaExperts
from actors.engine.experts.exchange import SoloExchange

LAYERS = 3
PRESENT = CudaExperts._multiply
# rows, columns, depth, warps, stages, programs a processor; weights by descriptor, half tiles, (rows too, flat)
EXPAND = [
    (128, 128, 64, 8, 3, 1, False, False), (128, 128, 64, 8, 3, 1, False, True), (128, 128, 64, 8, 3, 1, True, False),
    (128, 128, 64, 8, 4, 1, True, False), (128, 128, 64, 8, 3, 1, True, True), (128, 128, 64, 8, 4, 1, True, True),
    (128, 64, 64, 4, 3, 2, True, False), (128, 64, 64, 4, 3, 2, True, True), (128, 64, 64, 4, 3, 2, False, True),
    (128, 128, 128, 8, 2, 1, True, False), (128, 64, 64, 8, 3, 2, True, True), (256, 64, 64, 8, 3, 1, True, True),
    (64, 128, 64, 4, 4, 1, True, False), (64, 128, 64, 8, 4, 1, True, False),
]  # fmt: skip
CONTRACT = [
    (128, 256, 64, 8, 3, 1, False, False, False, False), (128, 256, 64, 8, 3, 1, False, True, False, False),
    (128, 256, 64, 8, 3, 1, True, False, False, False), (128, 256, 64, 8, 3, 1, True, False, True, False),
    (128, 256, 64, 8, 4, 1, True, False, True, False), (128, 256, 64, 8, 3, 1, True, True, True, False),
    (128, 256, 64, 8, 4, 1, True, True, True, False), (128, 256, 64, 8, 3, 1, True, False, True, True),
    (128, 256, 64, 8, 4, 1, True, False, True, True), (128, 128, 64, 4, 3, 2, True, False, True, False),
    (128, 128, 64, 4, 3, 2, True, True, True, False), (128, 128, 64, 4, 3, 2, False, True, False, False),
    (128, 128, 64, 8, 3, 2, True, True, True, False), (128, 256, 128, 8, 2, 1, True, False, True, False),
    (64, 256, 64, 4, 4, 1, True, False, True, False), (64, 256, 64, 8, 4, 1, True, False, True, False),
]  # fmt: skip


def multiply(expand: tuple[Any, ...], contract: tuple[Any, ...]) -> Any:
    tables: dict[tuple[int, ...], Any] = {}

    def table(tensor: torch.Tensor, rows: int, depth: int) -> Any:
        key = tensor.data_ptr(), rows, depth
        if key not in tables:
            tables[key] = TensorDescriptor.from_tensor(tensor, [rows, depth])
        return tables[key]

    def run(self: Any, layer: int, hidden: torch.Tensor) -> None:
        products = self._products[layer]
        common = {"TOP_K": self.top_k, "SLOTS": triton.next_power_of_2(self._num_slots)}
        bm, bn, bk, warps, stages, per, described, half = expand
        up, down = (w.view(-1, w.shape[2]) for w in (products.up, products.down))
        inner = self._inner.view(-1, products.activated)
        gemm_wide.expand[(self.processors * per,)](
            hidden, self.window.received, up, table(up, bn, bk) if described else up, inner, self._count,
            self._index, self._members, self._local, self._turn, self._computed,
            layer, self._num_slots, self._capacity, self.max_rows,
            N=products.up_columns, K=self.hidden, **common,
            BM=bm, BN=bn, BK=bk, TMA=described, HALF=half, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        bm, bn, bk, warps, stages, per, described, half, rows, flat = contract
        gemm_wide.contract[(self.processors * per,)](
            inner, table(inner, bm, bk) if rows else inner, down, table(down, bn, bk) if described else down,
            self.window.results, self._count, self._index, self._members, self._windows,
            self._num_slots, self._capacity, self.max_rows,
            N=self.hidden, K=products.activated, **common,
            BM=bm, BN=bn, BK=bk, TMA=described, ROWS=rows, HALF=half, FLAT=flat, num_warps=warps, num_stages=stages,
        )  # fmt: skip

    return run


def ways() -> list[tuple[str, Any]]:
    found = [("now", PRESENT)]
    found += [(f"expand {expand}", multiply(expand, CONTRACT[0])) for expand in EXPAND]
    return found + [(f"contract {contract}", multiply(EXPAND[0], contract)) for contract in CONTRACT]


def setup(layers: int, rows: int) -> CudaExperts:
    modules = [Gated(EXPERTS, HIDDEN, INNER, torch.bfloat16, torch.device("cuda")) for _ in range(layers)]
    for module in modules:
        for parameter in module.parameters():
            parameter.normal_().mul_(parameter.shape[2] ** -0.5)
    experts = make(modules, rows, max_ranks=1)
    experts.adopt(whole(layers), SoloExchange())
    return experts


def compile_part(part: int, parts: int) -> None:
    experts = setup(1, 256)
    for _, way in ways()[part::parts]:
        CudaExperts._multiply = way  # type: ignore[method-assign]
        experts.own_rows.fill_(256)
        experts.begin([256])
        try:
            experts.forward(0, *draw(256, HIDDEN, torch.bfloat16, torch.device("cuda"), 1))
        except Exception as failure:
            print(f"{failure.__cause__ or failure}"[:200], flush=True)
            experts.adopt(whole(1), SoloExchange())
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=80, help="after which no other way is begun")
    arguments = parser.parse_args()
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    parts = min(14, max(1, (os.cpu_count() or 2) - 1))
    processes = [context.Process(target=compile_part, args=(part, parts)) for part in range(parts)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    print(f"[{time.monotonic() - began:5.1f} s] compiled", flush=True)
    rate, rows, lines, expected = matrix_rate(), arguments.rows, [], None
    experts = setup(LAYERS, rows)
    up, down = (2 * rows * TOP_K * HIDDEN * INNER * factor for factor in (2, 1))
    for name, way in [*ways(), ("now", PRESENT)]:
        if time.monotonic() - began > arguments.seconds:
            lines.append(f"{name}: no time left")
            continue
        CudaExperts._multiply = way  # type: ignore[method-assign]
        try:
            experts._inner.fill_(float("nan"))
            experts.window.results.fill_(float("nan"))
            experts.own_rows.fill_(rows)
            experts.begin([rows])
            found = experts.forward(0, *draw(rows, HIDDEN, torch.bfloat16, experts.device, 7))
            expected = found.double() if expected is None else expected
            off = error(found, expected)
            experts.adopt(whole(LAYERS), SoloExchange())
            block = Block(experts, rows)
            taken, parts_taken = block.time(8), block.kernels()
            rates = [work / parts_taken[part] / 1e6 for part, work in (("expand", up), ("contract", down))]
            each = "  ".join(f"{part} {us:6.1f}" for part, us in parts_taken.items())
            lines.append(f"{taken:8.1f} us  {each}  TFLOP/s {rates[0]:4.0f} {rates[1]:4.0f}  off {off:.0e}  {name}")
        except Exception as failure:
            lines.append(f"  FAILED  {name}: {str(failure.__cause__ or failure)[:150]}")
            torch.cuda.synchronize()
            experts.adopt(whole(LAYERS), SoloExchange())
        print(f"[{time.monotonic() - began:5.1f} s] {lines[-1]}", flush=True)
    print(
        "\n".join(["", f"{rows} rows, {rate / 1e12:.0f} TFLOP/s, {torch.cuda.get_device_name()}", *lines]), flush=True
    )
    print(f"{time.monotonic() - began:.0f} s in all; tiles of gemm.py: {gemm._SHAPES}")


if __name__ == "__main__":
    main()
