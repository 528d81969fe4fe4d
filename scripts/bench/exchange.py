#!/usr/bin/env python3
"""One MoE layer's exchange between two processes: a mesh of connections beside Gloo, in turn, in one run.

    .venv/bin/python scripts/bench/exchange.py [--json OUT]

Milliseconds for dispatch plus combine of rows 576 wide (float32), medians and 90th percentiles; the figure is what a
step pays per MoE layer beside its products.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

from actors.engine.experts.mesh import MeshExchange

WIDTH, TOP_K, REPEAT = 576, 2, 300
TOKENS = (1, 4, 16, 256)


def gloo(store: dist.Store, index: int) -> dist.ProcessGroupGloo:
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=30)
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    return dist.ProcessGroupGloo(store, index, 2, options)


def member(index: int, port: int, results: torch.multiprocessing.SimpleQueue) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    mesh = MeshExchange(dist.PrefixStore("mesh", store), index, 2, 30.0, "127.0.0.1")
    group = gloo(dist.PrefixStore("gloo", store), index)

    def by_mesh(rows: torch.Tensor, back: torch.Tensor, tokens: int) -> None:
        mesh.dispatch(rows, [tokens, tokens])
        mesh.combine(back, [len(back) // 2] * 2, [len(back) // 2] * 2)

    def by_gloo(rows: torch.Tensor, back: torch.Tensor, tokens: int) -> None:
        gathered = rows.new_empty(2 * tokens, rows.shape[1])
        group.alltoall_base(gathered, rows.repeat(2, 1), [tokens] * 2, [tokens] * 2).wait()
        halves = [len(back) // 2] * 2
        group.alltoall_base(torch.empty_like(back), back, halves, halves).wait()

    for tokens in TOKENS:
        rows, back = torch.randn(tokens, WIDTH + TOP_K), torch.randn(tokens * TOP_K, WIDTH)
        times: dict[str, list[float]] = {"mesh": [], "gloo": []}
        for _ in range(REPEAT):
            for name, exchange in (("mesh", by_mesh), ("gloo", by_gloo)):
                started = time.perf_counter()
                exchange(rows, back, tokens)
                times[name].append((time.perf_counter() - started) * 1e3)
        if index == 0:
            results.put(
                (tokens, {n: (statistics.median(t), statistics.quantiles(t, n=10)[8]) for n, t in times.items()})
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [context.Process(target=member, args=(index, store.port, results)) for index in range(2)]
    for process in processes:
        process.start()
    found = [results.get() for _ in TOKENS]
    for process in processes:
        process.join()
    print(f"{os.cpu_count()} cores; ms per layer, median (90th percentile)\n")
    print("| tokens per rank | mesh | Gloo | mesh / Gloo |\n|---|---|---|---|")
    for tokens, times in found:
        cells = [f"{times[name][0]:.3f} ({times[name][1]:.3f})" for name in ("mesh", "gloo")]
        print(f"| {tokens} | {cells[0]} | {cells[1]} | {times['mesh'][0] / times['gloo'][0]:.2f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
