"""Times decode steps of two ranks, a GPU each, that hold half of the experts each and exchange rows; prints a table.

    python scripts/bench/engine_pair.py [--decode 1,8,64] [--layers 48] --json OUT

Qwen3-30B-A3B's shape, random weights, bf16, context 1,024 for each of so many requests on each rank; steps in lockstep,
sampling included, one launched while the one before it runs. A rank's floor is what it must read, as in engine.py: its
experts that any rank's token chose, dense weights, its keys and values.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import origin
import shapes
import torch.distributed as dist
from ceilings import copy_bandwidth
from engine import STEPS, Decodes, bytes_read

from actors.engine.config import EngineConfig
from actors.engine.experts.exchange import Exchange, SoloExchange
from actors.engine.experts.mesh import MeshExchange
from actors.engine.experts.planner import Shape, plan
from actors.engine.experts.routing import Routing
from actors.engine.model import summarize
from actors.engine.runner import ModelRunner

RANKS = 2
TIMEOUT_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--decode", default="1,8,64", help="numbers of running requests on each rank")
    parser.add_argument("--layers", type=int, default=48)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.decode.split(",")]
    with tempfile.TemporaryDirectory() as made:
        rows = together(shapes.write(Path(made), arguments.layers), sizes)
    for row in rows:
        print(
            f"{row['requests']} requests on each of {RANKS} ranks: {row['step_ms']:.2f} ms, {row['over_floor']:.2f} "
            f"times the floor of {row['floor_ms']:.2f} ms ({row['distinct_experts']:.1f} experts a layer and rank)"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"origin": origin.origin(), "decode": rows}, indent=1) + "\n")


def together(model: Path, sizes: list[int]) -> list[dict[str, Any]]:
    """What rank 0 says; each rank is a process that sees one GPU."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    processes = []
    for index in range(RANKS):
        os.environ["CUDA_VISIBLE_DEVICES"] = str(index)
        processes.append(context.Process(target=member, args=(index, server.port, model, sizes, theirs), daemon=True))
        processes[-1].start()
    del os.environ["CUDA_VISIBLE_DEVICES"]
    try:
        answer = ours.recv() if ours.poll(300) else "no answer within 300 s"
    finally:
        for process in processes:
            process.kill()
            process.join()
    if isinstance(answer, str):
        raise SystemExit(answer)
    rows: list[dict[str, Any]] = answer
    return rows


def member(index: int, port: int, model: Path, sizes: list[int], pipe: Any) -> None:
    try:
        rows = measure(index, port, model, sizes)
        if index == 0:
            pipe.send(rows)
    except BaseException:
        pipe.send(traceback.format_exc())
    time.sleep(TIMEOUT_S)  # the peer may still read this memory


def measure(index: int, port: int, model: Path, sizes: list[int]) -> list[dict[str, Any]]:
    config = EngineConfig(
        model=str(model), dtype="bfloat16", device="cuda", max_model_len=2048, max_num_seqs=max(sizes),
        max_num_batched_tokens=1024, min_data_parallel_size=RANKS, load_format="dummy", threads=4,
        cuda_graphs=tuple(sizes),
    )  # fmt: skip
    bandwidth = copy_bandwidth()
    summary = summarize(model)
    halves = plan(Shape(summary.num_moe_layers, summary.num_experts), range(RANKS))
    runner = ModelRunner(config, Routing(halves, index), SoloExchange())
    runner.warm_up()
    store = dist.PrefixStore("pair", dist.TCPStore("127.0.0.1", port, is_master=False))
    mesh = MeshExchange(store, index, RANKS, TIMEOUT_S, "127.0.0.1")
    exchange = runner.exchange(mesh, store, epoch=1)
    runner.adopt(Routing(halves, index), exchange)
    return [decode(runner, exchange, size, bandwidth) for size in sizes]


def decode(runner: ModelRunner, exchange: Exchange, count: int, bandwidth: float) -> dict[str, Any]:
    took = Decodes(runner, count).ahead(lambda: [count] * len(exchange.sync([0])))
    decodes = Decodes(runner, count)
    distinct = []
    before = np.array(runner.model.experts.chosen.tolist())
    for _ in range(STEPS):
        exchange.sync([0])
        decodes.step([count] * RANKS)
        after = np.array(runner.model.experts.chosen.tolist())
        everybody = exchange.sync((after - before).flatten().tolist())
        before = after
        chosen = np.array(everybody).sum(axis=0).reshape(after.shape) > 0
        own = np.zeros_like(chosen)
        for layer, held in enumerate(runner.model.experts.routing.own_slots):
            own[layer, [expert for expert in held if expert >= 0]] = True
        distinct.append(float((chosen & own).sum(axis=1).mean()))
    read = bytes_read(runner, count, statistics.mean(distinct))
    floor = sum(read.values()) / bandwidth
    return {
        "requests": count, "step_ms": took * 1e3, "floor_ms": floor * 1e3, "over_floor": took / floor,
        "distinct_experts": statistics.mean(distinct), "read_bytes": read,
    }  # fmt: skip


if __name__ == "__main__":
    main()
