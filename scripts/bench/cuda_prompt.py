#!/usr/bin/env python3
"""Where a layer's time goes at a long prompt on a GPU: each kernel by itself beside its floor, and some cut otherwise.

    python scripts/bench/cuda_prompt.py [--rows 8192]

Qwen3-30B-A3B in bfloat16, all but the experts' products (``cuda_wide.py``). A floor is the bytes read and written over
the copy bandwidth, or the operations over the matrix rate, both measured in the same run. Inputs rotate through more
memory than a cache holds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from ceilings import copy_bandwidth, matrix_rate
from cuda_experts import EXPERTS, HIDDEN, INNER, TOP_K, Block, Gated, make, time_of, whole
from torch.nn.functional import linear

from actors.engine.cuda import elementwise, rotary, route
from actors.engine.cuda import router as cuda_router
from actors.engine.cuda.elementwise import add_rms_norm
from actors.engine.cuda.rotary import Heads, split_and_rotate
from actors.engine.cuda.router import Choice
from actors.engine.experts.exchange import SoloExchange

HEADS, SHARED, WIDTH, PAGE, SETS = 32, 4, 128, 16, 4
DTYPE, DEVICE = torch.bfloat16, torch.device("cuda")


def random(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=DTYPE, device=DEVICE).normal_()


def us(calls: list[Callable[[], Any]]) -> float:
    """Of one of ``calls``, which are made in turn."""

    def run() -> None:
        for call in calls:
            call()

    return time_of(run, 8) * 1e3 / len(calls)


def norms(rows: int) -> dict[str, float]:
    pairs = [(random(rows, HIDDEN), random(rows, HIDDEN), random(HIDDEN)) for _ in range(SETS)]
    found = {"sum and norm": us([lambda p=p: add_rms_norm(*p, 1e-6) for p in pairs])}
    total, output = torch.empty_like(pairs[0][0]), torch.empty_like(pairs[0][0])
    for warps in (1, 2, 4, 16):

        def call(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, warps: int = warps) -> None:
            elementwise._norm[(rows,)](
                x, HIDDEN, delta, HIDDEN, weight, total, output, HIDDEN, 1e-6, HIDDEN,
                ADD=True, ROUND_BEFORE_SCALE=True, BLOCK=HIDDEN, OVERLAP=False, num_warps=warps,
            )  # fmt: skip

        found[f"sum and norm, {warps} warps"] = us([lambda p=p, call=call: call(*p) for p in pairs])
    return found


def splits(rows: int) -> dict[str, float]:
    heads = Heads(HEADS, SHARED, WIDTH, WIDTH, random(WIDTH), random(WIDTH), 1e-6)
    angle = (torch.rand(rows, WIDTH // 2, device=DEVICE) * 6).repeat(1, 2)
    cosine, sine = angle.cos().to(DTYPE), angle.sin().to(DTYPE)
    joints = [random(rows, (HEADS + 2 * SHARED) * WIDTH) for _ in range(SETS)]
    pools = [torch.empty(rows // PAGE, SHARED, PAGE, WIDTH, dtype=DTYPE, device=DEVICE) for _ in range(2)]
    targets = torch.arange(rows, dtype=torch.int32, device=DEVICE)
    found = {"rotate": us([lambda j=j: split_and_rotate(j, cosine, sine, heads, *pools, targets) for j in joints])}
    query, total = random(rows, HEADS, WIDTH), HEADS + 2 * SHARED
    keys, values = pools
    for tile, warps in ((8, 1), (8, 4), (16, 4), (32, 8), (64, 8)):

        def call(joint: torch.Tensor, tile: int = tile, warps: int = warps) -> None:
            rotary._split[(rows, triton.cdiv(total, tile))](
                joint, joint.stride(0), cosine, sine, cosine.stride(0), heads.query_norm, heads.key_norm, 1e-6, query,
                keys, keys.stride(0), keys.stride(2), keys.stride(1),
                values, values.stride(0), values.stride(2), values.stride(1), targets, PAGE,
                QUERY=HEADS, SHARED=SHARED, WIDTH=WIDTH, ROTATED=WIDTH, ANGLES=WIDTH, NORM=True,
                ROUND_BEFORE_SCALE=True, PAGED=True, HEADS=tile, BLOCK=WIDTH, OVERLAP=False, num_warps=warps,
            )  # fmt: skip

        found[f"rotate, {tile} heads, {warps} warps"] = us([lambda j=j, call=call: call(j) for j in joints])
    return found


def routing(rows: int) -> dict[str, float]:
    found, logits = {}, [random(rows, EXPERTS) for _ in range(SETS)]
    for cuda_router.COMPARED in (0, 256):
        name = "choose, compared" if cuda_router.COMPARED else "choose"
        choice = Choice(TOP_K, False, True, DTYPE)
        found[name] = us([lambda x=x, choice=choice: cuda_router.route(x, choice) for x in logits])
    cuda_router.COMPARED = 0
    return found


def products(rows: int) -> dict[str, float]:
    found = {}
    for name, outputs, inner in (
        ("q, k, v", (HEADS + 2 * SHARED) * WIDTH, HIDDEN),
        ("o", HIDDEN, HEADS * WIDTH),
        ("router", EXPERTS, HIDDEN),
    ):
        pairs = [(random(rows, inner), random(outputs, inner)) for _ in range(SETS)]
        found[name] = us([lambda p=p: linear(*p) for p in pairs])
    return found


def exchange(rows: int) -> dict[str, float]:
    """The experts' kernels around their products, and the combination with other columns to a program."""
    modules = [Gated(EXPERTS, HIDDEN, INNER, DTYPE, DEVICE) for _ in range(2)]
    for module in modules:
        for parameter in module.parameters():
            parameter.normal_().mul_(parameter.shape[2] ** -0.5)
    experts = make(modules, rows, max_ranks=1)
    experts.adopt(whole(2), SoloExchange())
    block = Block(experts, rows)
    found = {name: took for name, took in block.kernels().items() if name in ("dispatch", "combine")}
    _, ids, weights = block.inputs[0]
    output = torch.empty(rows, HIDDEN, dtype=DTYPE, device=DEVICE)
    for width, warps in ((256, 1), (512, 2), (1024, 4), (2048, 4), (2048, 8)):

        def call(width: int = width, warps: int = warps) -> None:
            route.combine[(min(32 * 132, rows * HIDDEN // width),)](
                ids, weights, experts.window.results, output, experts.own_rows, experts._table, experts._local,
                *experts._group, experts._arrived, experts._count, experts._void, 0, rows, EXPERTS,
                **experts._sizes, SLOTS=EXPERTS, WIDTH=width, EAGER=False, OVERLAP=False, num_warps=warps,
            )  # fmt: skip

        found[f"combine, {width} columns, {warps} warps"] = us([call])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    rows, began = parser.parse_args().rows, time.monotonic()
    copy, matrix = copy_bandwidth(), matrix_rate()
    joint, row = (HEADS + 2 * SHARED) * WIDTH, 2 * HIDDEN
    floors = {
        "sum and norm": 4 * rows * row / copy,
        "rotate": 2 * rows * joint * 2 / copy,
        "choose": rows * (2 * EXPERTS + 10 * TOP_K) / copy,
        "q, k, v": 2 * rows * HIDDEN * joint / matrix,
        "o": 2 * rows * HIDDEN * HEADS * WIDTH / matrix,
        "router": rows * (row + 2 * EXPERTS) / copy,
        "dispatch": rows * TOP_K * 12 / copy,
        "combine": rows * row * (TOP_K + 1) / copy,
    }
    found: dict[str, float] = {}
    with torch.inference_mode():
        for part in (norms, splits, routing, products, exchange):
            try:
                found |= part(rows)
            except Exception as failure:
                print(f"FAILED {part.__name__}: {type(failure).__name__} {str(failure)[:200]}")
            print(f"[{time.monotonic() - began:5.1f} s] {part.__name__}", flush=True)
    print(f"\n{rows} rows, us a layer:")
    for name, took in found.items():
        floor = floors.get(name.split(", ")[0] if name not in floors else name, 0.0) * 1e6
        print(f"{took:9.1f}  {took / floor if floor else 0:5.2f} times the floor of {floor:7.1f}  {name}")
    print(f"copy {copy / 1e12:.2f} TB/s, products {matrix / 1e12:.0f} TFLOP/s, {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    main()
