#!/usr/bin/env python3
"""One MoE layer on GPUs: first whether it is right, then its times beside their floors; the table comes last.

    python scripts/bench/cuda_experts.py [--json OUT] [--only check,times,tune,pair]

The layer is Qwen3-30B-A3B's in bfloat16. Times are of CUDA graphs of six layers with weights of their own, so that none
stand in the cache, divided by six; medians. A floor is the weights of the chosen experts over the copy bandwidth, or
the products over the matrix rate, both measured in the same run, whichever is longer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from ceilings import copy_bandwidth, matrix_rate

from actors.engine.cuda import experts as cuda_experts
from actors.engine.cuda import gemm
from actors.engine.cuda.experts import CudaExperts
from actors.engine.cuda.gemm import Shape
from actors.engine.experts.exchange import SoloExchange
from actors.engine.experts.map import ExpertMap
from actors.engine.experts.routing import Routing

HIDDEN, INNER, EXPERTS, TOP_K, MAX_ROWS = 2048, 768, 128, 8, 8192
LAYERS = 6
TOKENS = (1, 8, 64, 128, 512, 2048, 8192)
KERNELS = ("dispatch", "expand", "contract", "combine")

# Shapes tried: rows, columns, depth, warps, stages, programs a processor, and whether by tensor descriptors.
SMALL = {
    "expand": [
        (16, 16, 128, 4, 4, 3), (16, 16, 256, 4, 3, 3), (16, 32, 64, 4, 5, 4), (16, 32, 128, 4, 3, 4),
        (16, 32, 128, 4, 4, 3), (16, 32, 128, 8, 4, 3), (16, 64, 64, 4, 5, 2), (16, 64, 128, 8, 3, 2),
    ],
    "contract": [
        (16, 16, 256, 4, 3, 4), (16, 32, 128, 4, 3, 6), (16, 32, 256, 4, 3, 3), (16, 64, 64, 4, 5, 4),
        (16, 64, 128, 4, 3, 4), (16, 64, 128, 4, 4, 3), (16, 128, 64, 4, 4, 2), (16, 128, 128, 8, 3, 2),
    ],
}  # fmt: skip
MIDDLE = {
    "expand": [
        (32, 32, 128, 4, 4, 2), (32, 64, 64, 4, 4, 3), (32, 64, 128, 4, 3, 2), (64, 64, 64, 4, 4, 3),
        (64, 64, 128, 4, 3, 1), (64, 128, 64, 4, 4, 1), (64, 64, 64, 4, 3, 3, True), (64, 128, 64, 4, 4, 1, True),
    ],
    "contract": [
        (32, 64, 128, 4, 4, 2), (32, 128, 64, 4, 4, 2), (64, 64, 64, 4, 4, 4), (64, 128, 64, 4, 4, 2),
        (64, 128, 64, 4, 4, 2, True), (64, 256, 64, 8, 3, 1),
    ],
}  # fmt: skip
LARGE = {
    "expand": [
        (128, 128, 64, 8, 3, 1), (128, 128, 64, 8, 4, 1), (128, 128, 64, 8, 3, 1, True), (128, 64, 64, 4, 3, 2, True),
        (64, 128, 64, 4, 4, 1, True),
    ],
    "contract": [
        (128, 128, 64, 4, 3, 2), (128, 256, 64, 8, 3, 1), (128, 256, 64, 8, 4, 1), (128, 128, 64, 4, 3, 2, True),
        (64, 128, 64, 4, 4, 2, True),
    ],
}  # fmt: skip
# One row goes pair by pair, without tiles.
TUNED = {
    8: SMALL,
    64: SMALL,
    128: SMALL,
    512: MIDDLE,
    2048: {p: MIDDLE[p] + LARGE[p] for p in MIDDLE},
    8192: LARGE,
}


class Gated(torch.nn.Module):
    """Experts as most families have them, random weights of a seed."""

    is_transposed = has_bias = False
    has_gate = True

    def __init__(self, experts: int, hidden: int, inner: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        for name, shape in (("gate_up_proj", (2 * inner, hidden)), ("down_proj", (hidden, inner))):
            weight = torch.empty(experts, *shape, dtype=dtype, device=device)
            setattr(self, name, torch.nn.Parameter(weight, requires_grad=False))

    def fill(self, seed: int, slots: Sequence[int]) -> Gated:
        """Slot ``i`` gets expert ``slots[i]``, whose weights depend on it and the seed only."""
        for parameter in self.parameters():
            for slot, expert in enumerate(slots):
                generator = torch.Generator(parameter.device).manual_seed(1000 * seed + expert)
                parameter[slot].normal_(generator=generator).mul_(parameter.shape[2] ** -0.5)
        return self

    def _apply_gate(self, inner: torch.Tensor) -> torch.Tensor:
        gate, up = inner.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def reference(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """In float64."""
        output = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
        for expert in ids.unique().tolist():
            row, k = (ids == expert).nonzero(as_tuple=True)
            inner = self._apply_gate(hidden[row].double() @ self.gate_up_proj[expert].double().t())
            output.index_add_(0, row, weights[row, k, None].double() * (inner @ self.down_proj[expert].double().t()))
        return output


def make(
    modules: Sequence[Gated], max_rows: int, max_ranks: int = 2, top_k: int = TOP_K, experts: int = EXPERTS
) -> CudaExperts:
    weight = modules[0].down_proj
    layers: Any = [SimpleNamespace(module=module) for module in modules]
    return CudaExperts(layers, experts, top_k, weight.shape[1], weight.dtype, weight.device, max_rows, max_ranks)


def whole(layers: int, experts: int = EXPERTS) -> Routing:
    return Routing(ExpertMap(experts, ((tuple(range(experts)),),) * layers), 0)


def halves(layers: int, index: int, experts: int = EXPERTS) -> Routing:
    rows = tuple(tuple(range(rank, experts, 2)) for rank in range(2))
    return Routing(ExpertMap(experts, (rows,) * layers), index)


def draw(
    rows: int,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    top_k: int = TOP_K,
    experts: int = EXPERTS,
) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.rand(rows, experts, generator=generator, device=device).argsort(1)[:, :top_k]
    weights = torch.rand(rows, top_k, generator=generator, device=device)
    states = torch.randn(rows, hidden, generator=generator, device=device)
    return [states.to(dtype), ids, weights / weights.sum(1, keepdim=True)]


def error(result: torch.Tensor, reference: torch.Tensor) -> float:
    return float((result.double() - reference).norm() / reference.norm())


def check(device: torch.device) -> None:
    """Every number of rows for which tiles differ, against float64; poisoned memory; raises AssertionError."""
    for dtype, hidden, inner, limit in ((torch.bfloat16, HIDDEN, INNER, 1e-2), (torch.float32, 200, 72, 1e-5)):
        module = Gated(EXPERTS, hidden, inner, dtype, device).fill(1, range(EXPERTS))
        experts = make([module], MAX_ROWS)
        experts.adopt(whole(1), SoloExchange())
        for rows in (1, 3, 8, 64, 128, 300, 512, 1500, 2048, 8192):
            if dtype == torch.float32 and rows > 512:
                continue
            experts._inner.fill_(float("nan"))
            experts.window.results.fill_(float("nan"))
            tensors = draw(rows, hidden, dtype, device, rows)
            experts.begin([rows])
            experts.own_rows.fill_(rows)
            result = experts.forward(0, *tensors)
            wrong = error(result, module.reference(*tensors))
            print(f"  {dtype} {rows} rows: relative error {wrong:.1e}")
            assert wrong < limit, (dtype, rows, wrong)
        assert experts.chosen.sum() == experts.computed


def time_of(work: Callable[[], Any], repeat: int) -> float:
    """Median milliseconds."""
    for _ in range(3):
        work()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeat + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(second) for first, second in itertools.pairwise(events))


class Block:
    """A graph of all layers over inputs of their own for ``rows`` rows."""

    def __init__(self, experts: CudaExperts, rows: int, seed: int = 0) -> None:
        layers, device = len(experts.layers), experts.device
        self.experts, self.rows = experts, rows
        self.inputs = [draw(rows, HIDDEN, torch.bfloat16, device, 97 * seed + rows + layer) for layer in range(layers)]
        self.distinct = statistics.mean(len(ids.unique()) for _, ids, _ in self.inputs)
        experts.own_rows.fill_(rows)
        self._run()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._run()

    def _run(self) -> None:
        self.experts.begin([self.rows] * self.experts.exchange.size)
        for layer, tensors in enumerate(self.inputs):
            self.experts.forward(layer, *tensors)

    def time(self, repeat: int) -> float:
        """Microseconds a layer."""
        return time_of(self.graph.replay, repeat) * 1e3 / len(self.inputs)

    def kernels(self) -> dict[str, float]:
        """Median microseconds of each kernel of a layer."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(4):
                self.graph.replay()
            torch.cuda.synchronize()
        durations: dict[str, list[float]] = {}
        for event in profiler.events():
            durations.setdefault(event.name, []).append(event.time_range.elapsed_us())
        return {name: statistics.median(durations.get(name, [0.0])) for name in KERNELS}


def floor(rows: int, distinct: float, rates: tuple[float, float]) -> float:
    """Microseconds."""
    copy, matrix = rates
    return 1e6 * max(distinct * 3 * HIDDEN * INNER * 2 / copy, rows * TOP_K * 6 * HIDDEN * INNER / matrix)


def repeats(rows: int) -> int:
    return 30 if rows <= 512 else 8


def grouped(block: Block) -> dict[str, float]:
    """Microseconds of torch's grouped product for each of the two, its rows sorted beforehand."""
    took = {}
    for name, weight in (("torch expand", "gate_up_proj"), ("torch contract", "down_proj")):
        layers = []
        for (_, ids, _), layer in zip(block.inputs, block.experts.layers, strict=True):
            weights = layer.module.get_parameter(weight).transpose(1, 2)
            offsets = torch.bincount(ids.reshape(-1), minlength=EXPERTS).cumsum(0).to(torch.int32)
            rows = torch.randn(ids.numel(), weights.shape[1], dtype=weights.dtype, device=weights.device)
            layers.append((rows, weights, offsets))

        def work(layers: list[Any] = layers) -> None:
            for rows, weights, offsets in layers:
                torch.nn.functional.grouped_mm(rows, weights, offs=offsets)

        took[name] = time_of(work, repeats(block.rows)) * 1e3 / len(layers)
    return took


def times(experts: CudaExperts, rates: tuple[float, float]) -> list[dict[str, Any]]:
    results = []
    for rows in TOKENS:
        block = Block(experts, rows)
        result = {"rows": rows, "floor": floor(rows, block.distinct, rates), "block": block.time(repeats(rows))}
        if rows <= (most := cuda_experts.MOST_ROWS):
            cuda_experts.MOST_ROWS = -1
            result["no overlap"] = Block(experts, rows).time(repeats(rows))
            cuda_experts.MOST_ROWS = most
        results.append(result | block.kernels() | grouped(block))
    return results


def tune(experts: CudaExperts) -> list[str]:
    """The best shape of each product by number of rows, the other product's being the present one."""
    present, lines = gemm.shape, []
    for rows, candidates in TUNED.items():
        for product in candidates:
            found = []
            now = {name: present(torch.bfloat16, rows * TOP_K / EXPERTS, name) for name in candidates}
            for candidate in dict.fromkeys([tuple(now[product]), *candidates[product]]):
                chosen = {**now, product: Shape(*candidate)}
                gemm.shape = lambda dtype, expected, name, chosen=chosen: chosen[name]
                try:
                    found.append((Block(experts, rows).time(repeats(rows) // 2), candidate))
                except Exception as failure:  # too much shared memory, most likely
                    print(f"  {product} {candidate}: {failure.__cause__ or failure}"[:120])
                    experts.adopt(whole(LAYERS), SoloExchange())
            present_time = found[0][0]
            best = "  ".join(f"{tuple(shape)} {us:.1f}" for us, shape in sorted(found)[:3])
            lines.append(f"{rows:5} rows {product:8} now {tuple(now[product])} {present_time:.1f} us; best: {best}")
            gemm.shape = present
    return lines


def compile_all(part: int, parts: int) -> None:
    """Fills Triton's cache with this part of the shapes to try, in a process of its own."""
    device = torch.device("cuda")
    experts = make([Gated(EXPERTS, HIDDEN, INNER, torch.bfloat16, device)], MAX_ROWS)
    experts.adopt(whole(1), SoloExchange())
    tensors = draw(1, HIDDEN, torch.bfloat16, device, 0)
    tables = SMALL, MIDDLE, LARGE
    everything = [(product, shape) for table in tables for product, shapes in table.items() for shape in shapes]
    plain = {product: Shape(*SMALL[product][0]) for product in SMALL}
    experts.own_rows.fill_(1)
    for product, shape in everything[part::parts]:
        chosen = {**plain, product: Shape(*shape)}
        gemm.shape = lambda dtype, expected, name, chosen=chosen: chosen[name]
        experts.begin([1])
        try:
            experts.forward(0, *tensors)
        except Exception:
            experts.adopt(whole(1), SoloExchange())
    torch.cuda.synchronize()


def compile_ahead(work: Callable[[int, int], None]) -> None:
    """Runs ``work(part, parts)`` for all parts, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    parts = min(14, max(1, (os.cpu_count() or 2) - 1))
    processes = [context.Process(target=work, args=(part, parts)) for part in range(parts)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="check,times,tune,pair")
    arguments = parser.parse_args()
    only, started = arguments.only.split(","), time.monotonic()

    def stage(name: str) -> None:
        print(f"[{time.monotonic() - started:5.1f} s] {name}", flush=True)

    device = torch.device("cuda:0")
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    lines = []
    if "tune" in only:
        stage("compiling")
        compile_ahead(compile_all)
    if "check" in only:
        stage("checking")
        check(device)
    if "times" in only or "tune" in only:
        stage("rates")
        rates = copy_bandwidth(), matrix_rate()
        report["copy"], report["matrix"] = rates
        modules = [Gated(EXPERTS, HIDDEN, INNER, torch.bfloat16, device).fill(i, range(EXPERTS)) for i in range(LAYERS)]
        experts = make(modules, MAX_ROWS)
        experts.adopt(whole(LAYERS), SoloExchange())
        stage("times")
        report["one"] = times(experts, rates) if "times" in only else []
        if "tune" in only:
            stage("tuning")
            lines = report["tuned"] = tune(experts)
        del experts, modules
        torch.cuda.empty_cache()
    if "pair" in only and torch.cuda.device_count() > 1:
        stage("two ranks")
        from cuda_experts_pair import pair

        report["two"] = pair()
    stage("done")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(lines))
    for title, key in (("one rank", "one"), ("two ranks, rows of each", "two")):
        rows = report.get(key) or []
        if rows:
            print(f"\n{title}, us a layer\n" + "".join(f"{name:>15}" for name in rows[0]))
        for row in rows:
            print("".join(f"{row[name]:15.1f}" if name in row else f"{'-':>15}" for name in rows[0]))
    if "copy" in report:
        copy, matrix = report["copy"] / 1e12, report["matrix"] / 1e12
        print(f"copy {copy:.2f} TB/s read and written, bf16 products {matrix:.0f} TFLOP/s, {report['device']}")


if __name__ == "__main__":
    main()
