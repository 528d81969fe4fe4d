#!/usr/bin/env python3
"""One MoE layer's experts in FP8 on a GPU, by each way of computing them, beside bfloat16; the table comes last.

    python scripts/bench/cuda_fp8.py [--tune]

Times are those of ``cuda_experts.py``: of a graph of six layers with weights of their own, divided by six, medians.
Relative errors are against float64. ``chosen`` is what the engine does, ``tiles`` converts weights in the products,
``widened`` a layer's weights before them; the floor is reading the chosen experts in FP8. ``--tune`` tries other tiles.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from ceilings import copy_bandwidth
from cuda_experts import (  # type: ignore[import-not-found]
    EXPERTS,
    HIDDEN,
    INNER,
    LAYERS,
    MAX_ROWS,
    TOP_K,
    Block,
    Gated,
    draw,
    error,
    make,
    repeats,
    time_of,
    whole,
)  # fmt: skip

from actors.engine.cuda import experts as cuda_experts
from actors.engine.cuda import fp8
from actors.engine.cuda.experts import CudaExperts
from actors.engine.experts.exchange import SoloExchange
from actors.engine.quantization import SCALE, Blocks, dequantize, quantize

BLOCKS = Blocks(fp8.BLOCK, fp8.BLOCK)
TOKENS = (1, 8, 64, 128, 512, 2048, 4096, 8192)
# From how many rows per slot on weights are widened, and whether one row goes pair by pair.
WAYS = {"chosen": (fp8._WIDENED, True), "tiles": (float("inf"), False), "widened": (0, False)}
# Columns and programs tried for one row.
CUTS = {
    "_EXPAND_FP8": ((2, 16), (4, 6), (4, 8), (4, 12), (4, 16), (8, 4), (8, 6), (8, 8), (8, 12)),
    "_CONTRACT_FP8": ((4, 16), (4, 24), (4, 32), (8, 8), (8, 12), (8, 16), (8, 24), (16, 8), (16, 12)),
}
SHAPES = [
    (16, 64, 128, 4, 3, 3), (16, 64, 128, 4, 4, 2), (16, 64, 128, 4, 4, 3), (16, 128, 128, 8, 3, 2),
    (16, 128, 128, 4, 3, 1), (32, 64, 128, 4, 3, 2), (32, 64, 128, 4, 4, 2), (32, 128, 128, 8, 3, 2),
    (64, 64, 128, 4, 3, 2), (64, 128, 128, 8, 3, 1), (64, 128, 128, 4, 3, 1), (64, 128, 64, 8, 4, 1),
    (128, 128, 64, 8, 3, 1), (128, 128, 128, 8, 2, 1), (128, 64, 64, 4, 4, 1),
]  # fmt: skip


class Quantized(torch.nn.Module):
    """``Gated`` experts in FP8; the given ones become the numbers that they stand for, rounded."""

    is_transposed = has_bias = False
    has_gate = True

    def __init__(self, module: Gated) -> None:
        super().__init__()
        self._apply_gate = module._apply_gate
        for leaf, parameter in list(module.named_parameters()):
            made = [quantize(expert, BLOCKS) for expert in parameter]
            for name, tensors in zip((leaf, leaf + SCALE), zip(*made, strict=True), strict=True):
                setattr(self, name, torch.nn.Parameter(torch.stack(tensors), requires_grad=False))
            for expert, (weight, scale) in zip(parameter, made, strict=True):
                expert.copy_(dequantize(weight, scale, BLOCKS, parameter.dtype))


@contextlib.contextmanager
def forced(experts: CudaExperts, way: str) -> Iterator[None]:
    """Steps within are computed, or captured, that way."""
    before = fp8._WIDENED
    fp8._WIDENED, pairs = WAYS[way]
    for products in experts._products:
        products.pairwise = pairs
    try:
        yield
    finally:
        fp8._WIDENED = before
        for products in experts._products:
            products.pairwise = True


def wrong(experts: CudaExperts, way: str, tensors: list[torch.Tensor], exact: torch.Tensor) -> float:
    """The relative error of the first layer, over poisoned memory."""
    rows = len(exact)
    for left in (experts._inner, experts.window.results, experts._room):
        left.fill_(float("nan"))
    with forced(experts, way):
        experts.begin([rows])
        experts.own_rows.fill_(rows)
        found = error(experts.forward(0, *tensors), exact)
        experts.finish()
    assert found < 1e-2, (way, rows, found)
    return found


def time_to_widen(experts: CudaExperts) -> float:
    """Microseconds for all weights of a layer."""

    def work() -> None:
        for products in experts._products:
            for weight, scale in ((products.up, products.up_beside), (products.down, products.down_beside)):
                fp8.widened(weight, scale, experts._room, EXPERTS)

    return time_of(work, 10) * 1e3 / LAYERS


def cut(experts: CudaExperts) -> list[str]:
    """One row with other columns and programs: of the layer, and of the kernel."""
    lines = []
    for name, cuts in CUTS.items():
        present, found = getattr(cuda_experts, name), []
        for candidate in cuts:
            setattr(cuda_experts, name, candidate)
            block = Block(experts, 1)
            kernel = block.kernels()["expand" if name.startswith("_EXPAND") else "contract"]
            found.append((block.time(repeats(1)), kernel, candidate))
        setattr(cuda_experts, name, present)
        tried = "  ".join(f"{candidate} {layer:.1f} ({kernel:.1f})" for layer, kernel, candidate in sorted(found))
        lines.append(f"one row, {name} now {present}: {tried}")
        print(lines[-1], flush=True)
    return lines


def tune(experts: CudaExperts) -> list[str]:
    """The best tiles of those tried, by rows."""
    present, lines = fp8.shape, []
    for rows in TOKENS:
        found = []
        for candidate in SHAPES:
            if (candidate[0] > 16 and rows < 64) or (candidate[0] < 32 and rows > 512):
                continue
            fp8.shape = lambda dtype, expected, product, candidate=candidate: fp8.Shape(*candidate)
            try:
                with forced(experts, "tiles"):
                    found.append((Block(experts, rows).time(repeats(rows) // 2), candidate))
            except Exception as failure:  # too much shared memory, most likely
                print(f"  {candidate}: {type(failure).__name__} {str(failure)[:80]}", flush=True)
                experts.adopt(whole(LAYERS), SoloExchange())
        fp8.shape = present
        lines.append(f"tiles, {rows} rows: " + "  ".join(f"{shape} {us:.1f}" for us, shape in sorted(found)[:3]))
        print(lines[-1], flush=True)
    return lines


@torch.inference_mode()
def in_fp8(device: torch.device, tuned: bool = False) -> list[str]:
    rate = copy_bandwidth()
    plain = [
        Gated(EXPERTS, HIDDEN, INNER, torch.bfloat16, device).fill(layer, range(EXPERTS)) for layer in range(LAYERS)
    ]
    stored: list[Any] = [SimpleNamespace(module=Quantized(module)) for module in plain]
    quantized = CudaExperts(stored, EXPERTS, TOP_K, HIDDEN, torch.bfloat16, device, MAX_ROWS, 2)
    same = make(plain, MAX_ROWS)
    for experts in (quantized, same):
        experts.adopt(whole(LAYERS), SoloExchange())
    exact = Gated(EXPERTS, HIDDEN, INNER, torch.float32, device)
    for leaf, parameter in exact.named_parameters():
        for slot, expert in enumerate(parameter):
            weight, scale = (getattr(stored[0].module, name)[slot] for name in (leaf, leaf + SCALE))
            expert.copy_(dequantize(weight, scale, BLOCKS, torch.float32))
    lines = [" rows  rows/slot   bf16 us" + "".join(f"{way:>11} us   error" for way in WAYS) + "   floor us"]
    for rows in TOKENS:
        tensors = draw(rows, HIDDEN, torch.bfloat16, device, rows)
        reference = exact.reference(*tensors)
        bf16 = Block(same, rows)
        line = f"{rows:5} {rows * TOP_K / EXPERTS:10.1f} {bf16.time(repeats(rows)):9.1f}"
        for way in WAYS:
            off = wrong(quantized, way, tensors, reference)
            with forced(quantized, way):
                line += f"{Block(quantized, rows).time(repeats(rows)):14.1f} {off:7.1e}"
        lines.append(f"{line} {1e6 * bf16.distinct * 3 * HIDDEN * INNER / rate:10.1f}")
        print(lines[-1], flush=True)
    taken = time_to_widen(quantized)
    moved = 3 * EXPERTS * 3 * HIDDEN * INNER  # read as one byte, written as two
    lines.append(f"widening a layer: {taken:.1f} us, {moved / taken / 1e6:.2f} TB/s; a copy has {rate / 1e12:.2f}")
    return lines + cut(quantized) + (tune(quantized) if tuned else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    arguments = parser.parse_args()
    print("\n".join([torch.cuda.get_device_name(), *in_fp8(torch.device("cuda"), arguments.tune)]), flush=True)


if __name__ == "__main__":
    main()
