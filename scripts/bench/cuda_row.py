#!/usr/bin/env python3
"""A decode step's layers at one row on a GPU, in several ways: right, then how fast, side by side.

    python scripts/bench/cuda_row.py [--layers 12] [--seconds 90]

Each way is some layers of Qwen3-30B-A3B in bfloat16 with weights of their own in one CUDA graph, at a context of 1,024,
by the kernels that the engine takes; microseconds are medians of replays over the number of layers. Before the table,
which comes last, stands a timeline of a layer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from ceilings import copy_bandwidth
from cuda_experts import EXPERTS, HIDDEN, INNER, TOP_K, Gated, compile_ahead, make, whole

from actors.engine.attention.base import KVShape
from actors.engine.attention.triton_paged import TritonPagedAttention
from actors.engine.batch import Batch
from actors.engine.cuda import experts as cuda_experts
from actors.engine.cuda.inputs import Padded, StepInputs
from actors.engine.cuda.one_row import Row, multiply_row
from actors.engine.cuda.rotary import Heads
from actors.engine.cuda.router import Choice, Router
from actors.engine.experts.exchange import SoloExchange
from actors.engine.steps import rehearsal

HEADS, SHARED, WIDTH, CONTEXT, BLOCK = 32, 4, 128, 1024, 16
DTYPE, DEVICE, SCALE, EPSILON = torch.bfloat16, torch.device("cuda"), 128**-0.5, 1e-6

# What a way sets: how experts' products are cut into columns and programs.
Way = dict[str, tuple[int, int]]
NOW: Way = {"_EXPAND": cuda_experts._EXPAND, "_CONTRACT": cuda_experts._CONTRACT}


def ways() -> list[tuple[str, Way]]:
    found: list[tuple[str, Way]] = [("now", NOW)]
    found += [(f"expand {cut}", {"_EXPAND": cut}) for cut in ((2, 16), (4, 6), (4, 10), (4, 12), (8, 4))]
    found += [(f"contract {cut}", {"_CONTRACT": cut}) for cut in ((2, 32), (4, 12), (4, 20), (4, 24), (8, 8), (16, 5))]
    return [*found, ("now, again", NOW)]


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.empty(shape, dtype=DTYPE, device=DEVICE).normal_().mul_(scale)


class Layers:
    def __init__(self, count: int) -> None:
        self.count = count
        modules = [Gated(EXPERTS, HIDDEN, INNER, DTYPE, DEVICE) for _ in range(count)]
        for module in modules:
            for parameter in module.parameters():
                parameter.normal_().mul_(parameter.shape[2] ** -0.5)
        self.experts = make(modules, 64)
        self.experts.adopt(whole(count), SoloExchange())
        self.experts.own_rows.fill_(1)
        outputs = (HEADS + 2 * SHARED) * WIDTH
        self.qkv = [random(outputs, HIDDEN, scale=HIDDEN**-0.5) for _ in range(count)]
        self.o = [random(HIDDEN, HEADS * WIDTH, scale=(HEADS * WIDTH) ** -0.5) for _ in range(count)]
        self.norms = [[1 + random(HIDDEN, scale=0.1) for _ in range(2)] for _ in range(count)]
        weights = [[1 + random(WIDTH, scale=0.1) for _ in range(2)] for _ in range(count)]
        self.heads = [Heads(HEADS, SHARED, WIDTH, WIDTH, *pair, EPSILON) for pair in weights]
        choice = Choice(TOP_K, False, True, DTYPE)
        self.routers = [Router(random(EXPERTS, HIDDEN, scale=2 * HIDDEN**-0.5), None, choice) for _ in range(count)]
        self.attention = TritonPagedAttention([KVShape(SHARED, WIDTH, WIDTH)] * count, 256, BLOCK, DTYPE, DEVICE)
        for pool in (*self.attention.keys, *self.attention.values):
            pool.normal_()
        self.inputs = StepInputs(64, 64, CONTEXT // BLOCK + 1, BLOCK, DEVICE)
        blocks = torch.randperm(256)[: CONTEXT // BLOCK].tolist()
        self.inputs.fill(Batch((rehearsal([0], CONTEXT - 1, blocks),)), Padded(1, 1))
        self.attention.begin(self.inputs)
        angle = (torch.rand(1, WIDTH // 2, device=DEVICE) * 6).repeat(1, 2)
        self.cosine, self.sine = angle.cos().to(DTYPE), angle.sin().to(DTYPE)
        self.x, self.delta = random(1, HIDDEN), random(1, HIDDEN)

    @staticmethod
    def take(way: Way) -> None:
        for name, value in (NOW | way).items():
            setattr(cuda_experts, name, value)

    def run(self, way: Way) -> torch.Tensor:
        """The last layer's output ``[1, hidden]``."""
        self.take(way)
        x, delta = self.x, self.delta
        self.experts.begin([1])
        for layer in range(self.count):
            norms = self.norms[layer]
            joint, x = multiply_row(Row(x, delta, norms[0], EPSILON), self.qkv[layer], None)
            out = self.attention.attend_joint(
                layer, joint, self.cosine, self.sine, self.heads[layer], SCALE, None, None
            )
            delta = multiply_row(Row(out.view(1, -1)), self.o[layer], None)[0]
            x, normed, (_, weights, ids) = self.routers[layer].of_row(Row(x, delta, norms[1], EPSILON))
            delta = self.experts.forward(layer, normed, ids, weights)
        return x + delta


def time_of(run: Callable[[], torch.Tensor], seconds: float = 0.4) -> tuple[float, torch.Tensor, torch.cuda.CUDAGraph]:
    """Median microseconds of a replay, what the last one gave, and the graph."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    times, began = [], time.perf_counter()
    while time.perf_counter() - began < seconds and len(times) < 300:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        graph.replay()
        events[1].record()
        events[1].synchronize()
        times.append(events[0].elapsed_time(events[1]) * 1e3)
    return statistics.median(times[3:]), result.clone(), graph


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def check(layers: Layers) -> list[str]:
    """The experts of a few layers in all ways beside their own module's."""
    experts, worst = layers.experts, 0.0
    for layer in range(min(4, layers.count)):
        module: Any = experts._products[layer].module
        x = random(1, HIDDEN)
        ids = torch.rand(1, EXPERTS, device=DEVICE).argsort(1)[:, :TOP_K]
        weights = torch.rand(1, TOP_K, device=DEVICE)
        truth = module.reference(x, ids, weights)
        for _, way in ways():
            layers.take(way)
            experts._inner.fill_(float("nan"))
            experts.window.results.fill_(float("nan"))
            experts.begin([1])
            experts._next = layer
            worst = max(worst, error(experts.forward(layer, x, ids, weights), truth))
    return [f"experts: error {worst:.1e}", *(["WRONG"] if not worst < 1e-2 else [])]


def timeline(graph: torch.cuda.CUDAGraph, count: int) -> list[str]:
    """Of a layer in the middle: each kernel's start and duration, as the profiler sees them."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as recorded:
        graph.replay()
        torch.cuda.synchronize()
    events = sorted(
        (e.time_range.start, e.time_range.elapsed_us(), e.name)
        for e in recorded.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    )
    per = len(events) // count
    part = events[len(events) // 2 // per * per :][: per + 2]
    return [f"    at {start - part[0][0]:6.1f} for {long:5.1f} us: {name[:60]}" for start, long, name in part]


def compile_part(part: int, parts: int) -> None:
    """Fills Triton's cache with what every so-manieth way needs, in a process of its own."""
    with torch.inference_mode():
        layers = Layers(1)
        for _, way in ways()[part::parts]:
            try:
                layers.run(way)
            except Exception:
                layers.experts.adopt(whole(1), SoloExchange())
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=90, help="after which no other way is begun")
    arguments = parser.parse_args()
    began = time.monotonic()
    torch.manual_seed(0)
    compile_ahead(compile_part)
    print(f"[{time.monotonic() - began:5.1f} s] compiled", flush=True)
    with torch.inference_mode():
        bandwidth = copy_bandwidth()
        layers = Layers(arguments.layers)
        lines = check(layers)
        print("\n".join(lines), flush=True)
        read = (HEADS + 2 * SHARED) * WIDTH * HIDDEN + HIDDEN * HEADS * WIDTH + EXPERTS * HIDDEN
        read += TOP_K * 3 * HIDDEN * INNER + 2 * CONTEXT * SHARED * WIDTH
        lines.append(f"floor {2e6 * read / bandwidth:.1f} us a layer at {bandwidth / 1e12:.2f} TB/s")
        steps: list[str] = []
        expected = None
        for name, way in ways():
            if time.monotonic() - began > arguments.seconds:
                lines.append(f"{name}: no time left")
                continue
            try:
                taken, result, graph = time_of(lambda way=way: layers.run(way))  # type: ignore[misc]
                expected = result if expected is None else expected
                lines.append(f"{taken / layers.count:7.2f} us  {name}  (differs by {error(result, expected):.1e})")
                steps = steps or timeline(graph, layers.count)
            except Exception as failure:
                lines.append(f"   FAILED   {name}: {type(failure).__name__}: {str(failure.__cause__ or failure)[:150]}")
                torch.cuda.synchronize()
                layers.experts.adopt(whole(layers.count), SoloExchange())
            print(f"[{time.monotonic() - began:5.1f} s] {lines[-1]}", flush=True)
        print("\n".join(["a layer, now:", *steps]))
    print("\n".join(["", f"{torch.cuda.get_device_name()}, torch {torch.__version__}", *lines]), flush=True)
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
