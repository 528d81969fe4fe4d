#!/usr/bin/env python3
"""A decode step's layers at one row on a GPU, in several ways: right, then how fast, side by side.

    python scripts/bench/cuda_layer.py [--layers 12] [--seconds 170]

Each way is some layers of Qwen3-30B-A3B in bfloat16 with weights of their own in one CUDA graph, at a context of 1,024;
microseconds are medians of replays over the number of layers. The table comes last.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from ceilings import copy_bandwidth
from cuda_experts import EXPERTS, HIDDEN, INNER, TOP_K, Gated, make, whole

from actors.engine.attention.base import KVShape
from actors.engine.attention.triton_paged import TritonPagedAttention
from actors.engine.batch import Batch
from actors.engine.cuda import experts as cuda_experts
from actors.engine.cuda import overlap
from actors.engine.cuda.attend_joint import decode_joint
from actors.engine.cuda.attend_tile import Tiles
from actors.engine.cuda.elementwise import add_rms_norm
from actors.engine.cuda.inputs import StepInputs
from actors.engine.cuda.linear import FewRows
from actors.engine.cuda.one_row import OneRow, Row
from actors.engine.cuda.rotary import Heads, split_and_rotate
from actors.engine.cuda.router import Choice, Router
from actors.engine.experts.exchange import SoloExchange
from actors.engine.steps import rehearsal

HEADS, SHARED, WIDTH, CONTEXT, BLOCK = 32, 4, 128, 1024, 16
DTYPE, DEVICE, SCALE, EPSILON = torch.bfloat16, torch.device("cuda"), 128**-0.5, 1e-6

# What each way has: the present kernels, unless said otherwise.
NOW: dict[str, Any] = {
    "qkv": "now", "attend": "now", "o": "now", "route": "now", "experts": "now", "eager": (), "pdl": True,
    "qkv columns": 8, "o columns": 4, "route columns": 4, "tokens": 32, "warps": 4, "stages": 5, "splits": 32,
    "expand": (8, 4, 5), "contract": (16, 4, 5), "ahead": True,
}  # fmt: skip
NEW = NOW | {"qkv": "row", "attend": "joint", "o": "row", "route": "row", "experts": "pairs"}
NEW |= {"eager": ("dispatch", "combine")}


def ways() -> list[tuple[str, dict[str, Any]]]:
    found = [
        ("now", NOW),
        ("now, nothing starts early", NOW | {"pdl": False}),
        ("now, qkv and norm by row", NOW | {"qkv": "row"}),
        ("now, qkv by row behind a norm", NOW | {"qkv": "row, apart"}),
        ("now, attention joint", NOW | {"attend": "joint"}),
        ("now, o by row", NOW | {"o": "row"}),
        ("now, attention joint, o by row", NOW | {"attend": "joint", "o": "row"}),
        ("now, norm and router by row", NOW | {"route": "row"}),
        ("now, experts by pairs", NOW | {"experts": "pairs"}),
        ("now, dispatch and combine eager", NOW | {"eager": ("dispatch", "combine")}),
        ("new", NEW),
        ("new, nothing starts early", NEW | {"pdl": False}),
        ("new, experts in tiles", NEW | {"experts": "now"}),
        ("new, qkv behind a norm", NEW | {"qkv": "row, apart"}),
        ("new, attention in two", NEW | {"attend": "now"}),
        ("new, router behind a norm", NEW | {"route": "now"}),
        ("new, nothing eager", NEW | {"eager": ()}),
        ("new, only dispatch eager", NEW | {"eager": ("dispatch",)}),
        ("new, no KV ahead", NEW | {"ahead": False}),
    ]
    for columns in (4, 16):
        found.append((f"new, qkv columns {columns}", NEW | {"qkv columns": columns}))
    for columns in (2, 8):
        found.append((f"new, o columns {columns}", NEW | {"o columns": columns}))
    for columns in (2, 8):
        found.append((f"new, route columns {columns}", NEW | {"route columns": columns}))
    for tokens, warps, stages, splits in (
        (32, 4, 2, 32),
        (32, 4, 3, 16),
        (64, 4, 3, 16),
        (64, 4, 2, 8),
        (64, 8, 2, 16),
    ):
        change = {"tokens": tokens, "warps": warps, "stages": stages, "splits": splits}
        found.append((f"new, attention {tuple(change.values())}", NEW | change))
    for expand in ((8, 4, 4), (8, 4, 8), (4, 2, 8), (4, 2, 10), (16, 8, 2), (4, 4, 10)):
        found.append((f"new, expand {expand}", NEW | {"expand": expand}))
    for contract in ((16, 4, 4), (16, 4, 8), (8, 2, 8), (8, 4, 8), (32, 8, 2)):
        found.append((f"new, contract {contract}", NEW | {"contract": contract}))
    found.append(("now, once more", NOW))
    found.append(("new, once more", NEW))
    return found


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.empty(shape, dtype=DTYPE, device=DEVICE).normal_().mul_(scale)


class Layers:
    def __init__(self, count: int) -> None:
        self.count = count
        modules = [Gated(EXPERTS, HIDDEN, INNER, DTYPE, DEVICE) for _ in range(count)]
        for module in modules:
            for parameter in module.parameters():
                parameter.normal_().mul_(parameter.shape[2] ** -0.5)
        self.modules = modules
        self.experts = make(modules, 64)
        self.experts.adopt(whole(count), SoloExchange())
        self.experts.own_rows.fill_(1)
        outputs = (HEADS + 2 * SHARED) * WIDTH
        self.qkv = [random(outputs, HIDDEN, scale=HIDDEN**-0.5) for _ in range(count)]
        self.o = [random(HIDDEN, HEADS * WIDTH, scale=(HEADS * WIDTH) ** -0.5) for _ in range(count)]
        self.norms = [[1 + random(HIDDEN, scale=0.1) for _ in range(2)] for _ in range(count)]
        self.heads = [
            Heads(HEADS, SHARED, WIDTH, WIDTH, 1 + random(WIDTH, scale=0.1), 1 + random(WIDTH, scale=0.1), EPSILON)
            for _ in range(count)
        ]
        choice = Choice(TOP_K, False, True, DTYPE)
        self.routers = [Router(random(EXPERTS, HIDDEN, scale=2 * HIDDEN**-0.5), None, choice) for _ in range(count)]
        self.attention = TritonPagedAttention([KVShape(SHARED, WIDTH, WIDTH)] * count, 256, BLOCK, DTYPE, DEVICE)
        for pool in (*self.attention.keys, *self.attention.values):
            pool.normal_()
        self.inputs = StepInputs(64, 64, CONTEXT // BLOCK + 1, BLOCK, DEVICE)
        blocks = torch.randperm(256)[: CONTEXT // BLOCK].tolist()
        self.inputs.fill(Batch((rehearsal([0], CONTEXT - 1, blocks),)), 1)
        self.attention.begin(self.inputs)
        angle = (torch.rand(1, WIDTH // 2, device=DEVICE) * 6).repeat(1, 2)
        self.cosine, self.sine = angle.cos().to(DTYPE), angle.sin().to(DTYPE)
        self.x, self.delta = random(1, HIDDEN), random(1, HIDDEN)
        self.few = [(FewRows(a, None), FewRows(b, None)) for a, b in zip(self.qkv, self.o, strict=True)]

    def project(self, layer: int, x: Any, delta: Any, way: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        norm = self.norms[layer][0]
        if way["qkv"] == "row":
            return OneRow(self.qkv[layer], None, way["qkv columns"])(Row(x, delta, norm, EPSILON))
        total, normed = add_rms_norm(x, delta, norm, EPSILON)
        if way["qkv"] == "row, apart":
            return OneRow(self.qkv[layer], None, way["qkv columns"])(Row(normed))[0], total
        return self.few[layer][0](normed), total

    def attend(self, layer: int, joint: torch.Tensor, way: dict[str, Any]) -> torch.Tensor:
        attention, heads, inputs = self.attention, self.heads[layer], self.inputs
        keys, values = attention.keys[layer], attention.values[layer]
        if way["attend"] == "now":
            query = split_and_rotate(joint, self.cosine, self.sine, heads, keys, values, inputs.targets)
            return attention.attend(layer, query, SCALE, None, None).view(1, -1)
        out = joint.new_empty(1, HEADS, WIDTH)
        decode_joint(
            joint, self.cosine, self.sine, heads, keys, values, inputs.targets, inputs.tables, inputs.lengths, out,
            SCALE, None, None, way["splits"], attention._arrivals,
            Tiles(16, way["tokens"], way["warps"], way["stages"]), way["ahead"],
        )  # fmt: skip
        return out.view(1, -1)

    def output(self, layer: int, x: torch.Tensor, way: dict[str, Any]) -> torch.Tensor:
        if way["o"] == "row":
            return OneRow(self.o[layer], None, way["o columns"])(Row(x))[0]
        return self.few[layer][1](x)

    def route(self, layer: int, x: torch.Tensor, delta: torch.Tensor, way: dict[str, Any]) -> Any:
        router, norm = self.routers[layer], self.norms[layer][1]
        if way["route"] == "row":
            return router.of_row(Row(x, delta, norm, EPSILON), way["route columns"])
        total, normed = add_rms_norm(x, delta, norm, EPSILON)
        return total, normed, router(normed)

    def run(self, way: dict[str, Any]) -> torch.Tensor:
        overlap._supported = (lambda device: True) if way["pdl"] else (lambda device: False)  # type: ignore[assignment]
        cuda_experts.PAIRWISE_ROWS = 1 if way["experts"] == "pairs" else 0
        cuda_experts.EAGER = set(way["eager"])
        cuda_experts.GEMV = {"expand": way["expand"], "contract": way["contract"]}
        x, delta = self.x, self.delta
        self.experts.begin([1])
        for layer in range(self.count):
            joint, x = self.project(layer, x, delta, way)
            delta = self.output(layer, self.attend(layer, joint, way), way)
            x, normed, (_, weights, ids) = self.route(layer, x, delta, way)
            delta = self.experts.forward(layer, normed, ids, weights)
        return x + delta


def time_of(run: Callable[[], Any], seconds: float = 0.5) -> tuple[float, Any, torch.cuda.CUDAGraph]:
    """Median microseconds of a replay, what the last one gave, and the graph."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    times, began = [], time.perf_counter()
    while time.perf_counter() - began < seconds and len(times) < 200:
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
    """Each stage on the same input, both ways, beside float64 where that is simple."""
    lines = []

    def stage(name: str, work: Callable[[], str]) -> None:
        try:
            lines.append(f"{name}: {work()}")
        except Exception as failure:
            traceback.print_exc()
            lines.append(f"{name}: FAILED {type(failure).__name__} {str(failure)[:150]}")

    def product() -> str:
        new, total = layers.project(0, layers.x, layers.delta, NEW)
        old, expected_total = layers.project(0, layers.x, layers.delta, NOW)
        wide = add_rms_norm(layers.x, layers.delta, layers.norms[0][0], EPSILON)[1].double()
        truth = wide @ layers.qkv[0].double().T
        same = torch.equal(total, expected_total)
        return f"error {error(new, truth):.1e} (now {error(old, truth):.1e}), sums equal {same}"

    def attention() -> str:
        joint = layers.project(0, layers.x, layers.delta, NOW)[0]
        found = []
        slot = int(layers.inputs.targets[0])
        for way in (NOW, NEW, NEW | {"tokens": 64, "splits": 8, "stages": 2}):
            key = layers.attention.keys[0][slot // BLOCK, :, slot % BLOCK]
            value = layers.attention.values[0][slot // BLOCK, :, slot % BLOCK]
            key.fill_(torch.nan), value.fill_(torch.nan)
            out = layers.attend(0, joint, way).clone()
            found.append((out, key.clone(), value.clone()))
        kept = all(torch.equal(found[0][i], each[i]) for each in found[1:] for i in (1, 2))
        again = all(torch.equal(found[1][0], layers.attend(0, joint, NEW)) for _ in range(20))
        off = [f"{error(each[0], found[0][0]):.1e}" for each in found[1:]]
        return f"differs from now by {off}, keys and values equal {kept}, repeatable {again}"

    def output() -> str:
        x = random(1, HEADS * WIDTH)
        truth = x.double() @ layers.o[0].double().T
        return f"error {error(layers.output(0, x, NEW), truth):.1e} (now {error(layers.output(0, x, NOW), truth):.1e})"

    def routing() -> str:
        equal, off = [], 0.0
        for layer in range(layers.count):
            total, normed, (_, weights, ids) = layers.route(layer, layers.x, layers.delta, NOW)
            total2, normed2, (_, weights2, ids2) = layers.route(layer, layers.x, layers.delta, NEW)
            equal.append(torch.equal(total, total2) and torch.equal(ids.sort().values, ids2.sort().values))
            off = max(off, error(weights2, weights), error(normed2, normed))
        return f"sums and chosen experts equal in {sum(equal)} of {len(equal)} layers, rest differs by {off:.1e}"

    def pairs() -> str:
        cuda_experts.EAGER = set(NEW["eager"])
        errors = []
        for rows in (1, 3, 8):
            for most in (0, 8):
                cuda_experts.PAIRWISE_ROWS = most
                layers.experts._inner.fill_(float("nan"))
                layers.experts.window.results.fill_(float("nan"))
                x = random(rows, HIDDEN)
                ids = torch.rand(rows, EXPERTS, device=DEVICE).argsort(1)[:, :TOP_K]
                weights = torch.rand(rows, TOP_K, device=DEVICE)
                layers.experts.own_rows.fill_(rows)
                layers.experts.begin([rows])
                found = layers.experts.forward(0, x, ids, weights)
                errors.append(f"{error(found, layers.modules[0].reference(x, ids, weights)):.1e}")
        layers.experts.own_rows.fill_(1)
        return f"errors at 1, 3 and 8 rows, now and by pairs: {errors}"

    for name, work in (
        ("qkv", product),
        ("attention", attention),
        ("o", output),
        ("router", routing),
        ("experts", pairs),
    ):
        stage(name, work)
    return lines


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


def compile_ahead() -> None:
    context = multiprocessing.get_context("spawn")
    parts = min(14, max(1, (os.cpu_count() or 2) - 1))
    processes = [context.Process(target=compile_part, args=(part, parts)) for part in range(parts)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=170, help="after which no other way is begun")
    arguments = parser.parse_args()
    began = time.monotonic()
    torch.manual_seed(0)
    lines: list[str] = []
    compile_ahead()
    print(f"[{time.monotonic() - began:5.1f} s] compiled", flush=True)
    with torch.inference_mode():
        bandwidth = copy_bandwidth()
        layers = Layers(arguments.layers)
        torch.cuda.synchronize()
        print(f"[{time.monotonic() - began:5.1f} s] weights", flush=True)
        lines += check(layers)
        print("\n".join(lines), flush=True)
        print(f"[{time.monotonic() - began:5.1f} s] checked", flush=True)
        read = (HEADS + 2 * SHARED) * WIDTH * HIDDEN + HIDDEN * HEADS * WIDTH + EXPERTS * HIDDEN
        read += TOP_K * 3 * HIDDEN * INNER + 2 * CONTEXT * SHARED * WIDTH
        lines.append(f"floor {2e6 * read / bandwidth:.1f} us a layer at {bandwidth / 1e12:.2f} TB/s")
        graphs = {}
        expected = None
        for name, way in ways():
            if time.monotonic() - began > arguments.seconds:
                lines.append(f"{name}: no time left")
                continue
            try:
                taken, result, graph = time_of(lambda way=way: layers.run(way))  # type: ignore[misc]
                expected = result if expected is None else expected
                lines.append(f"{taken / layers.count:7.2f} us  {name}  (differs by {error(result, expected):.1e})")
                if name in ("now", "new"):
                    graphs[name] = graph
            except Exception as failure:
                lines.append(f"   FAILED   {name}: {type(failure).__name__}: {str(failure.__cause__ or failure)[:150]}")
                torch.cuda.synchronize()
                layers.experts.adopt(whole(layers.count), SoloExchange())
            print(f"[{time.monotonic() - began:5.1f} s] {lines[-1]}", flush=True)
        for name, graph in graphs.items():
            try:
                lines += [f"a layer, {name}:", *timeline(graph, layers.count)]
            except Exception as failure:
                lines.append(f"no timeline: {failure}")
    print("\n".join(["", f"{torch.cuda.get_device_name()}, torch {torch.__version__}", *lines]), flush=True)
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
