#!/usr/bin/env python3
"""Fused modules on a GPU: right, then how fast beside the models' own operators, and which tiles are best.

    python scripts/bench/cuda_fuse.py [--no-sweep]

Checks the kernels against float64 at the sizes of Qwen3-30B-A3B in bfloat16, then times them, some of its layers
without attention and experts, and products of few rows. Times are medians of replays of one CUDA graph that goes
through as many weights as no cache holds, per call; bytes are weights read once, over the copy bandwidth measured here.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import shapes
import torch
from ceilings import copy_bandwidth
from torch.nn.functional import linear

from actors.engine.cuda import overlap
from actors.engine.cuda.elementwise import add_rms_norm, rms_norm, silu_and_mul
from actors.engine.cuda.fuse import fuse
from actors.engine.cuda.linear import FEW_ROWS, FewRows, Tiles, tiles
from actors.engine.cuda.one_row import Row, multiply_row
from actors.engine.cuda.rotary import Heads, split_and_keep, split_and_rotate
from actors.engine.cuda.router import Choice, Router
from actors.engine.cuda.trial import Trial, error
from actors.engine.dummy import DummyLoader
from actors.engine.model import MoEModel

HIDDEN, HEADS, SHARED, WIDTH, EXPERTS, TOP_K, VOCABULARY, LAYERS = 2048, 32, 4, 128, 128, 8, 151936, 6
DTYPE, TOLERANCE = torch.bfloat16, 8e-3
DEVICE = torch.device("cuda")
ROWS = (1, 8, 64, 128)
# Bytes of weights a graph goes through, several times what the L2 cache of an H100 (50 MB) holds.
ROTATION = 200e6
PRODUCTS = {
    "q k v": ((HEADS + 2 * SHARED) * WIDTH, HIDDEN),
    "o": (HIDDEN, HEADS * WIDTH),
    "router": (EXPERTS, HIDDEN),
    "head": (VOCABULARY, HIDDEN),
}
SWEEP = {
    "q k v": [(16, 256, 1, 6, 4), (16, 512, 1, 3, 4), (32, 128, 1, 5, 4), (32, 256, 2, 4, 4), (16, 256, 2, 4, 4),
              (32, 256, 1, 4, 8), (16, 128, 1, 6, 2)],
    "o": [(16, 256, 1, 6, 4), (16, 512, 1, 4, 4), (16, 512, 2, 3, 4), (16, 256, 4, 4, 4), (32, 256, 4, 4, 4),
          (16, 256, 2, 4, 8)],
    "head": [(32, 256, 1, 4, 4), (64, 256, 1, 3, 8), (128, 128, 1, 3, 4), (128, 128, 1, 4, 8), (64, 128, 1, 6, 4),
             (32, 128, 1, 6, 4)],
}  # fmt: skip

# The same, with the rows of a tile: whether more rows should go through our kernel.
MORE_ROWS = {
    "q k v": [(64, 128, 2, 3, 4, 64), (64, 128, 4, 3, 8, 64), (128, 64, 4, 4, 4, 64), (64, 64, 1, 5, 4, 64)],
    "o": [(64, 128, 8, 3, 4, 64), (64, 128, 4, 3, 8, 64), (128, 64, 8, 4, 4, 64), (32, 128, 4, 4, 4, 64)],
    "head": [(128, 64, 1, 4, 4, 64), (128, 128, 1, 3, 8, 64)],
}


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(DTYPE)


def microseconds(calls: Sequence[Callable[[], Any]], replays: int = 15) -> float:
    """Of one of ``calls``, which are captured one after the other."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[3:])


def kernels(call: Callable[[], Any]) -> int:
    """How many a call launches."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


# --- right -----------------------------------------------------------------------------------------------------------


def check(name: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    worst = error(expected.double(), found.double())
    if not worst <= tolerance:
        raise SystemExit(f"WRONG: {name}: a row's relative error is {worst:.2e}, allowed are {tolerance:.0e}")
    print(f"right: {name}: {worst:.1e}", flush=True)


def check_kernels() -> None:
    for rows in (1, 3, 16, 130):
        x, delta, weight = random(rows, HIDDEN), random(rows, HIDDEN), random(HIDDEN)
        total, normed = add_rms_norm(x, delta, weight, 1e-6)
        wide = (x + delta).double()
        expected = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.double()
        check(f"sum and norm, {rows} rows", normed, expected)
        check(f"sum, {rows} rows", total, x + delta, 0.0)
        joint = random(rows, 2 * 768)
        gate, up = joint.double().chunk(2, -1)
        check(f"SiLU, {rows} rows", silu_and_mul(joint), gate * gate.sigmoid() * up)
        check_heads(rows)
        check_router(rows)
        for name, (outputs, inner) in PRODUCTS.items():
            if rows <= FEW_ROWS:
                x, weight = random(rows, inner), random(outputs, inner, scale=inner**-0.5)
                exact = x.double() @ weight.double().T
                check(f"product {name}, {rows} rows", FewRows(weight, None)(x), exact)
                if rows == 1:
                    check(f"product {name} by row", multiply_row(Row(x), weight, None)[0], exact)


def check_heads(rows: int) -> None:
    heads, joint, cosine, sine = attention_input(rows)
    query, key, value = (part.double() for part in joint.unflatten(1, (-1, WIDTH)).split([HEADS, SHARED, SHARED], 1))
    expected = []
    for part, weight in ((query, heads.query_norm), (key, heads.key_norm)):
        part = part * torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.double()
        first, second = part.chunk(2, -1)
        expected.append(part * cosine.double()[:, None] + torch.cat([-second, first], -1) * sine.double()[:, None])
    for name, found, own in zip("qkv", split_and_keep(joint, cosine, sine, heads), [*expected, value], strict=True):
        check(f"heads {name}, {rows} rows", found.flatten(1), own.flatten(1))
    pools, targets = pools_for(rows)
    split_and_rotate(joint, cosine, sine, heads, *pools, targets)
    stored = pools[0].transpose(1, 2).flatten(0, 1)[targets.long()]
    check(f"keys in the pool, {rows} rows", stored.flatten(1), expected[1].flatten(1))


def check_router(rows: int) -> None:
    x, weight = random(rows, HIDDEN), random(EXPERTS, HIDDEN, scale=2 * HIDDEN**-0.5)
    logits, weights, ids = Router(weight, None, Choice(TOP_K, False, True, DTYPE))(x)
    check(f"logits of experts, {rows} rows", logits, x.double() @ weight.double().T)
    scores = logits.double().softmax(-1)
    best = scores.topk(TOP_K, -1).values
    check(f"chosen experts, {rows} rows", scores.gather(1, ids), best, 1e-6)
    check(f"weights of experts, {rows} rows", weights, best / best.sum(-1, keepdim=True))


def attention_input(rows: int) -> tuple[Heads, torch.Tensor, torch.Tensor, torch.Tensor]:
    angle = (torch.rand(rows, WIDTH // 2, device=DEVICE) * 6).repeat(1, 2)
    heads = Heads(HEADS, SHARED, WIDTH, WIDTH, random(WIDTH), random(WIDTH), 1e-6)
    return heads, random(rows, (HEADS + 2 * SHARED) * WIDTH), angle.cos().to(DTYPE), angle.sin().to(DTYPE)


def pools_for(rows: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    pools = [torch.full((rows + 4, SHARED, 16, WIDTH), torch.nan, dtype=DTYPE, device=DEVICE) for _ in range(2)]
    return pools, (torch.randperm((rows + 4) * 16, device=DEVICE)[:rows]).int()


# --- fast ------------------------------------------------------------------------------------------------------------


def elementwise(table: list[str]) -> None:
    table.append("\none kernel, us (as torch operators in brackets):")
    table.append(f"{'rows':>6}{'sum + norm':>18}{'norm':>18}{'heads':>10}{'heads, stored':>15}{'SiLU x 768':>18}")
    for rows in ROWS:
        x, delta, weight, joint = random(rows, HIDDEN), random(rows, HIDDEN), random(HIDDEN), random(rows, 1536)
        heads, projected, cosine, sine = attention_input(rows)
        pools, targets = pools_for(rows)

        def norm(x: torch.Tensor, weight: torch.Tensor = weight) -> torch.Tensor:
            wide = x.float()
            return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(DTYPE)

        def silu(joint: torch.Tensor = joint) -> torch.Tensor:
            gate, up = joint.chunk(2, -1)
            return torch.nn.functional.silu(gate) * up

        calls: list[Callable[[], Any]] = [
            lambda x=x, d=delta, w=weight: add_rms_norm(x, d, w, 1e-6),
            lambda x=x, d=delta: norm(x + d),
            lambda x=x, w=weight: rms_norm(x, w, 1e-6),
            lambda x=x: norm(x),
            lambda p=projected, c=cosine, s=sine, h=heads: split_and_keep(p, c, s, h),
            lambda p=projected, c=cosine, s=sine, h=heads, k=pools, t=targets: split_and_rotate(p, c, s, h, *k, t),
            lambda j=joint: silu_and_mul(j),
            silu,
        ]
        both = [microseconds([call] * 20) for call in calls]
        pairs = [f"{both[i]:9.1f} ({both[i + 1]:5.1f})" for i in (0, 2, 6)]
        table.append(f"{rows:>6}{pairs[0]:>18}{pairs[1]:>18}{both[4]:>10.1f}{both[5]:>15.1f}{pairs[2]:>18}")


def products(table: list[str], bandwidth: float, sweep: bool) -> None:
    table.append("\nproducts, us: ours / torch's (floor from the bytes; by row: one, by its own kernel):")
    header = "".join(f"{f'{rows} rows':>18}" for rows in (1, 8, 16, 64, 128))
    table.append(f"{'':8}{header}{'by row':>9}{'floor':>9}")
    swept: list[str] = []
    for name, (outputs, inner) in PRODUCTS.items():
        size = outputs * inner * DTYPE.itemsize
        copies = min(64, max(2, int(ROTATION / size)))
        weights = [random(outputs, inner, scale=inner**-0.5) for _ in range(copies)]
        cells = []
        for rows in (1, 8, 16, 64, 128):
            x = random(rows, inner)
            torchs = microseconds([lambda w=w, x=x: linear(x, w) for w in weights])
            ours = "-"
            if rows <= FEW_ROWS:
                ours = f"{few_rows(x, weights, None):.1f}"
            cells.append(f"{ours + ' /':>11}{torchs:>7.1f}")
        row = Row(random(1, inner))
        by_row = microseconds([lambda w=w, row=row: multiply_row(row, w, None) for w in weights])
        table.append(f"{name:8}" + "".join(cells) + f"{by_row:>9.1f}{size / bandwidth:>9.1f}")
        for cut in SWEEP.get(name, []) if sweep else []:
            times = [few_rows(random(rows, inner), weights, Tiles(*cut)) for rows in (1, 16)]
            swept.append(f"{name:8}{tuple(cut)!s:24}" + "".join(f"{t:>9.1f}" for t in times))
        for cut in MORE_ROWS.get(name, []) if sweep else []:
            times = [few_rows(random(rows, inner), weights, Tiles(*cut)) for rows in (32, 64)]
            swept.append(f"{name:8}{tuple(cut)!s:24}" + "".join(f"{t:>9.1f}" for t in times) + "  at 32 and 64 rows")
        swept.append(f"{name:8}built in: {tuple(tiles(outputs, inner))}") if sweep else None
    if swept:
        table += ["\ntiles (columns, inner, splits, stages, warps, rows), us at 1 and 16 rows:", *swept]


def few_rows(x: torch.Tensor, weights: Sequence[torch.Tensor], cut: Tiles | None) -> float:
    """Microseconds; infinite for tiles that do not fit."""
    try:
        made = [FewRows(weight, None, cut=cut) for weight in weights]
        return microseconds([lambda f=product: f(x) for product in made])
    except Exception as problem:
        print(f"{cut}: {type(problem).__name__}: {problem}")
        return float("inf")


def whole(table: list[str]) -> None:
    """Some layers of the model, attention and experts giving back what they are given: before and after."""
    with tempfile.TemporaryDirectory() as directory:
        model = MoEModel(shapes.write(Path(directory), LAYERS), "bfloat16")
    model.allocate_slots(1, DEVICE, max(ROWS))
    DummyLoader(model, DEVICE, 0).load_dense()
    trial = Trial(model)
    body: Any = model.module.get_decoder()

    def step(rows: int) -> Callable[[], torch.Tensor]:
        ids = (torch.arange(rows, device=DEVICE) * 997 % VOCABULARY)[None]
        return lambda: body(input_ids=ids, position_ids=ids % 4096, use_cache=False).last_hidden_state

    own: dict[int, tuple[torch.Tensor, int, float]] = {}
    with torch.inference_mode(), trial.recorded() as calls:
        for rows in ROWS:
            run = step(rows)
            own[rows] = run().clone(), kernels(run), microseconds([run] * 3)
            calls.clear()
        started = time.monotonic()
        fuse(model, model.summary.max_positions)
        table.append(f"\nfused {LAYERS} layers in {time.monotonic() - started:.1f} s, compilation included")
        table.append(f"{LAYERS} layers without attention and experts, us (kernels in brackets):")
        table.append(f"{'rows':>6}{'own':>16}{'fused, each by itself':>24}{'overlapped':>16}{'that a layer':>14}")
        for rows in ROWS:
            run = step(rows)
            result, count, microseconds_own = own[rows]
            check(f"{LAYERS} layers, {rows} rows", run()[0], result[0], 2e-2)
            with apart():
                alone = microseconds([run] * 3)
            found = microseconds([run] * 3)
            cells = f"{microseconds_own:9.0f} ({count})", f"{alone:.0f}", f"{found:9.0f} ({kernels(run)})"
            table.append(f"{rows:>6}{cells[0]:>16}{cells[1]:>24}{cells[2]:>16}{found / LAYERS:>14.1f}")
            calls.clear()


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """No kernel starts before the one before it has ended."""
    supported = overlap._supported
    overlap._supported = lambda device: False  # type: ignore[assignment]
    try:
        yield
    finally:
        overlap._supported = supported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-sweep", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    started = time.monotonic()
    bandwidth = copy_bandwidth() / 1e6  # bytes per microsecond
    table = [f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e6:.2f} TB/s (read + written)"]
    check_kernels()
    whole(table)
    elementwise(table)
    products(table, bandwidth, not arguments.no_sweep)
    print("\n".join(table))
    print(f"\n{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
