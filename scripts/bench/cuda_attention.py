#!/usr/bin/env python3
"""Paged attention on a GPU: right, then how fast, and which tile sizes are best.

    python scripts/bench/cuda_attention.py [--only check,decode,prefill] [--no-sweep]

Checks every kernel against float64 over pools full of NaN, then times one layer of Qwen3-30B-A3B (32 query heads, 4 KV
heads of 128, bfloat16). Decodes are 48 layers in one CUDA graph, each over a pool of its own, so that no cache helps;
prefills run operator by operator. Medians; bytes are keys and values read once, operations those that causality leaves.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from ceilings import copy_bandwidth
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from actors.engine.attention.base import KVShape
from actors.engine.attention.triton_paged import DENSE_ROWS, DENSE_STEP, TritonPagedAttention
from actors.engine.batch import Batch
from actors.engine.cuda import flash
from actors.engine.cuda.attend_decode import decode, decode_tiles
from actors.engine.cuda.attend_prefill import prefill, prefill_tiles
from actors.engine.cuda.attend_tile import Tiles
from actors.engine.cuda.inputs import Padded, StepInputs
from actors.engine.cuda.rotary import Heads
from actors.engine.steps import rehearsal

HEADS, KV_HEADS, WIDTH, LAYERS, BLOCK = 32, 4, 128, 48, 16
SCALE = WIDTH**-0.5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DEVICE = torch.device("cuda")
DECODE_SWEEP = [
    Tiles(16, tokens, warps, stages)
    for tokens, warps, stages in ((32, 2, 3), (32, 4, 5), (64, 4, 3), (64, 4, 5), (64, 4, 7), (64, 8, 5), (128, 8, 3))
]
PREFILL_SWEEP = [
    Tiles(*sizes)
    for sizes in ((128, 64, 8, 5), (128, 128, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 5))
]


@dataclass
class Case:
    """What one configuration of a model's attention needs to be right in."""

    name: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    window: int | None = None
    sinks: bool = False
    block_size: int = 16


CASES = [
    Case("GQA 32/4 of 128", torch.bfloat16, 32, 4, 128, 128),
    Case("GQA 64/8 of 64, window, sinks", torch.bfloat16, 64, 8, 64, 64, window=128, sinks=True),
    Case("MLA 16 of 192/128", torch.bfloat16, 16, 16, 192, 128),
    Case("MQA 71 of 64", torch.bfloat16, 71, 1, 64, 64),
    Case("GQA 16/2 of 256, window", torch.bfloat16, 16, 2, 256, 256, window=100),
    Case("MHA 3 of 24/16, sinks", torch.float16, 3, 3, 24, 16, sinks=True, block_size=4),
    Case("GQA 6/2 of 8", torch.float32, 6, 2, 8, 8, block_size=4),
    Case("GQA 8/2 of 128, window, sinks", torch.float32, 8, 2, 128, 128, window=33, sinks=True),
]


class Rig:
    """``sequences`` of these lengths in shuffled blocks, and steps over them."""

    def __init__(self, case: Case, lengths: Sequence[int], layers: int = 1, rows: int | None = None) -> None:
        self.case, self.lengths = case, list(lengths)
        needed = [-(-length // case.block_size) for length in lengths]
        order = torch.randperm(sum(needed)).tolist()
        self.blocks = [[order.pop() for _ in range(count)] for count in needed]
        shape = KVShape(case.kv_heads, case.key_width, case.value_width)
        self.attention = TritonPagedAttention([shape] * layers, sum(needed), case.block_size, case.dtype, DEVICE)
        self.inputs = StepInputs(rows or sum(lengths) + 16, len(lengths) + 16, max(needed), case.block_size, DEVICE)

    def begin(self, spans: Sequence[tuple[int, int, int]], padded: Padded | None = None) -> None:
        """A step in which sequence ``i`` computes positions ``a .. b - 1``, for each ``(i, a, b)``."""
        parts = tuple(rehearsal([0] * (b - a), a, self.blocks[i]) for i, a, b in spans)
        self.inputs.fill(Batch(parts), padded)
        self.attention.begin(self.inputs)

    def random(self, rows: int, heads: int, width: int) -> torch.Tensor:
        return torch.randn(rows, heads, width, device=DEVICE).to(self.case.dtype)


# --- right -----------------------------------------------------------------------------------------------------------


def reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, case: Case, sinks: torch.Tensor | None
) -> torch.Tensor:
    """One sequence in float64: ``query [n, heads, width]`` at ``start``; ``keys``, ``values [length, kv_heads, .]``."""
    shared = case.heads // case.kv_heads
    keys, values = (part.double().repeat_interleave(shared, 1).transpose(0, 1) for part in (keys, values))
    scores = query.double().transpose(0, 1) @ keys.transpose(1, 2) * SCALE
    position = start + torch.arange(len(query), device=DEVICE)[:, None]
    seen = torch.arange(keys.shape[1], device=DEVICE)
    hidden = seen > position
    if case.window is not None:
        hidden |= seen <= position - case.window
    scores.masked_fill_(hidden, float("-inf"))
    if sinks is not None:
        column = sinks.double()[:, None, None].expand(-1, len(query), 1)
        weights = torch.softmax(torch.cat([scores, column], 2), 2)[..., :-1]
    else:
        weights = torch.softmax(scores, 2)
    return (weights @ values).transpose(0, 1)


def check(case: Case, lengths: Sequence[int]) -> float:
    """The largest relative error of a prefill, a mixed step and a padded decode, eager and captured."""
    rig = Rig(case, lengths)
    attention = rig.attention
    for pool in (*attention.keys, *attention.values):
        pool.fill_(torch.nan)
    keys = [rig.random(length, case.kv_heads, case.key_width) for length in lengths]
    values = [rig.random(length, case.kv_heads, case.value_width) for length in lengths]
    sinks = torch.randn(case.heads, device=DEVICE).to(case.dtype) if case.sinks else None
    worst = 0.0

    def compare(output: torch.Tensor, query: torch.Tensor, spans: list[tuple[int, int, int]]) -> None:
        nonlocal worst
        row = 0
        for i, a, b in spans:
            own = slice(row, row + b - a)
            expected = reference(query[own], keys[i][:b], values[i][:b], a, case, sinks)
            error = ((output[own].double() - expected).norm() / expected.norm()).item()
            if not error < TOLERANCE[case.dtype]:
                raise SystemExit(f"WRONG: {case.name}: sequence of positions {a} to {b}: relative error {error:.2e}")
            worst = max(worst, error)
            row += b - a

    def packed(spans: list[tuple[int, int, int]], padded: int) -> Iterator[torch.Tensor]:
        for source in (keys, values):
            rows = torch.cat([source[i][a:b] for i, a, b in spans])
            yield torch.cat([rows, rows.new_full((padded, *rows.shape[1:]), torch.nan)])

    everyone = range(len(lengths))
    for spans in (
        [(i, 0, lengths[i] - 2 if i % 2 else lengths[i] // 2) for i in everyone],
        [(i, lengths[i] - 2, lengths[i] - 1) for i in everyone if i % 2]
        + [(i, lengths[i] // 2, lengths[i] - 1) for i in everyone if not i % 2],
        [(i, lengths[i] - 1, lengths[i]) for i in everyone],
    ):
        spans = [(i, a, b) for i, a, b in spans if a < b]
        decodes = all(b - a == 1 for _, a, b in spans)
        padding = 3 if decodes else 0
        rows = sum(b - a for _, a, b in spans)
        rig.begin(spans, rows + padding if decodes else None)
        query = rig.random(case.heads, rows + padding, case.key_width).transpose(0, 1)  # heads first: as models do
        new = list(packed(spans, padding))
        run = partial(attention.store_and_attend, 0, query, *new, SCALE, case.window, sinks)
        output = run()
        compare(output, query, spans)
        if padding and not (output[rows:] == 0).all():
            raise SystemExit(f"WRONG: {case.name}: padding gave no zeros")
        for _ in range(10):
            if not torch.equal(output, run()):
                raise SystemExit(f"WRONG: {case.name}: two runs on the same input differ: a race")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = attention.attend(0, query, SCALE, case.window, sinks)
    for shorter in (0, 5):  # the same graph, other lengths
        spans = [(i, max(0, lengths[i] - 1 - shorter), max(1, lengths[i] - shorter)) for i in everyone]
        rig.begin(spans, len(spans) + 3)
        output.fill_(torch.nan)
        graph.replay()
        compare(output, query, spans)
    return worst


# --- fast ------------------------------------------------------------------------------------------------------------


def median_ms(run: Callable[[], object], repeats: int = 10) -> float:
    run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def captured(run: Callable[[], object]) -> Callable[[], object]:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


QWEN = Case("Qwen3-30B-A3B", torch.bfloat16, HEADS, KV_HEADS, WIDTH, WIDTH)


def decode_us(rig: Rig, query: torch.Tensor, tiles: Tiles, splits: int) -> float:
    """Microseconds a layer."""
    out = torch.empty_like(query)
    arrivals = torch.zeros(len(query) * KV_HEADS, dtype=torch.int32, device=DEVICE)
    pools = list(zip(rig.attention.keys, rig.attention.values, strict=True))
    tables, lengths = rig.inputs.tables, rig.inputs.lengths

    def run() -> None:
        for keys, values in pools:
            decode(query, keys, values, tables, lengths, out, SCALE, None, None, splits, arrivals, tiles)

    return median_ms(captured(run)) / len(pools) * 1e3


def attend_us(rig: Rig, query: torch.Tensor, new: torch.Tensor | None) -> float:
    """Microseconds a layer as the class does it, storing ``new`` first if that is not None."""
    attention, layers = rig.attention, len(rig.attention.keys)

    def run() -> None:
        for layer in range(layers):
            if new is None:
                attention.attend(layer, query, SCALE, None, None)
            else:
                attention.store_and_attend(layer, query, new, new, SCALE, None, None)

    return median_ms(captured(run)) / layers * 1e3


def time_decodes(sweep: bool, bandwidth: float) -> list[str]:
    lines = []
    for count, context in ((1, 1024), (8, 1024), (64, 1024), (128, 1024), (1, 16384)):
        rig = Rig(QWEN, [context] * count, LAYERS if count * context < 2**16 else LAYERS // 4, rows=count)
        for pool in (*rig.attention.keys, *rig.attention.values):
            pool.normal_()
        rig.begin([(i, context - 1, context) for i in range(count)], count)
        query, new = rig.random(count, HEADS, WIDTH), rig.random(count, KV_HEADS, WIDTH)
        taken, stored = attend_us(rig, query, None), attend_us(rig, query, new)
        read = 4 * count * context * KV_HEADS * WIDTH
        own = tuple(decode_tiles(torch.bfloat16, HEADS // KV_HEADS, WIDTH)), rig.attention._splits(count, KV_HEADS)
        lines.append(
            f"decode {count:4} x {context:5}: {taken:7.2f} us a layer, with store {stored:7.2f}; "
            f"{read / taken / 1e6:5.2f} TB/s of {bandwidth / 1e12:.2f} (floor {read / bandwidth * 1e6:6.2f} us); {own}"
        )
        if not sweep:
            continue
        full = max(1, 132 // (count * KV_HEADS))
        results = [
            (decode_us(rig, query, tiles, splits), tuple(tiles), splits)
            for tiles in DECODE_SWEEP
            for splits in sorted({min(32, full * factor) for factor in (1, 2, 4)} | {max(1, full // 2)})
        ]
        lines += [f"    {taken:7.2f} us: {tiles}, {splits} splits" for taken, tiles, splits in sorted(results)[:4]]
    return lines


def time_prefills(sweep: bool) -> list[str]:
    lines = []
    flash_attention = flash.load(QWEN.dtype, DEVICE)
    for count, rows, start in ((1, 8192, 0), (1, 2048, 0), (8, 1024, 0), (16, 512, 0), (64, 128, 0), (1, 8192, 8192)):
        rig = Rig(QWEN, [start + rows] * count)
        for pool in (*rig.attention.keys, *rig.attention.values):
            pool.normal_()
        rig.begin([(i, start, start + rows) for i in range(count)])
        query, out = (rig.random(count * rows, HEADS, WIDTH) for _ in range(2))
        key, value = (rig.random(count * rows, KV_HEADS, WIDTH) for _ in range(2))
        inputs, pools = rig.inputs, (rig.attention.keys[0], rig.attention.values[0])
        own = prefill_tiles(torch.bfloat16, WIDTH)
        ways: dict[str, Callable[[], object]] = {
            "as the class does it": partial(rig.attention.attend, 0, query, SCALE, None, None)
        }
        if not start:
            ways["from joint heads on"] = partial(
                rig.attention.attend_joint, 0, *joint_heads(count * rows), SCALE, None, None
            )
        for tiles in [own, *(PREFILL_SWEEP if sweep and rows >= 1024 else [])]:
            ways[f"Triton {tuple(tiles)}"] = partial(
                prefill, query, *pools, inputs.tables, inputs.starts, inputs.lengths, inputs.chunk_span,
                range(count), count * rows, out, SCALE, None, None, tiles,
            )  # fmt: skip
        if not start:
            if flash_attention is not None:
                ways["FlashAttention 4"] = partial(
                    flash.attend, flash_attention, inputs.chunks, query, key, value, inputs.starts, SCALE, None, None
                )
            packed = varlen(query, key, value, rows)
            if packed is not None:
                ways["varlen_attn"] = packed
            for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
                ways[f"SDPA {backend.name}"] = partial(sdpa, query, key, value, rows, backend)
        lines.append(f"prefill {count} x {rows} after {start}")
        for name, way in ways.items():
            lines.append(f"    {name:28} {timed(way, count * (rows * start + rows * (rows + 1) / 2))}")
        if rows >= DENSE_ROWS and not start:  # what does cuDNN's plan for another length cost?
            part = [x[: rows - DENSE_STEP] for x in (query, key, value)]
            way = partial(sdpa, *part, rows - DENSE_STEP, SDPBackend.CUDNN_ATTENTION)
            lines.append(f"    {'cuDNN, a shape new to it':28} {timed(way, (rows - DENSE_STEP) ** 2 / 2)}")
    return lines


def joint_heads(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Heads]:
    """A joint projection, cosines and sines, and what the heads are like, as Qwen3 has them."""
    angle = (torch.rand(rows, WIDTH // 2, device=DEVICE) * 6).repeat(1, 2)
    joint = torch.randn(rows, (HEADS + 2 * KV_HEADS) * WIDTH, device=DEVICE, dtype=torch.bfloat16)
    norms = [torch.ones(WIDTH, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
    heads = Heads(HEADS, KV_HEADS, WIDTH, WIDTH, *norms, 1e-6)
    return joint, angle.cos().to(joint.dtype), angle.sin().to(joint.dtype), heads


def timed(way: Callable[[], object], pairs: float) -> str:
    """How long it takes, at how many operations per second when ``pairs`` of a token and one it sees are counted."""
    first = time.perf_counter()
    try:
        way()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    first = time.perf_counter() - first
    taken = median_ms(way)
    return f"{taken * 1e3:8.1f} us, {4 * HEADS * WIDTH * pairs / taken / 1e9:5.0f} TFLOP/s; first call {first:.2f} s"


def varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, count: int) -> Callable[[], object] | None:
    """torch's attention over packed sequences of ``count`` rows each; None where this torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    borders = torch.arange(0, len(query) + 1, count, dtype=torch.int32, device=DEVICE)
    takes = inspect.signature(varlen_attn).parameters
    settings: dict[str, object] = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
    if "enable_gqa" in takes:
        settings["enable_gqa"] = True
    else:
        key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
    return partial(varlen_attn, query, key, value, borders, borders, count, count, **settings)


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, count: int, backend: SDPBackend) -> torch.Tensor:
    """torch's attention over sequences of ``count`` rows each, as a batch."""
    parts = [x.view(-1, count, *x.shape[1:]).transpose(1, 2) for x in (query, key, value)]
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(*parts, is_causal=True, scale=SCALE, enable_gqa=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="check,decode,prefill", help="parts, comma-separated")
    parser.add_argument("--no-sweep", action="store_true", help="time what is in the code only")
    options = parser.parse_args()
    parts, sweep = options.only.split(","), not options.no_sweep
    torch.manual_seed(0)
    began = time.perf_counter()
    lines = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}"]
    with torch.inference_mode():
        if "check" in parts:
            for case in CASES:
                error = check(case, [600, 33, 2, 257, 1030, 64, 16])
                lines.append(f"right: {case.name}, {case.dtype}: relative error {error:.1e}")
                print(lines[-1], f"({time.perf_counter() - began:.0f} s)", flush=True)
            error = check(CASES[0], [100, 2150, 4298, 40])  # long enough for torch's attention, and padded for it
            lines.append(f"right: long prompts: relative error {error:.1e}")
        if "decode" in parts:
            bandwidth = copy_bandwidth()
            lines += time_decodes(sweep, bandwidth)
            print(f"decodes timed ({time.perf_counter() - began:.0f} s)", flush=True)
        if "prefill" in parts:
            lines += time_prefills(sweep)
    print("\n".join(lines))
    print(f"all in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
