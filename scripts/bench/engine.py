"""Times the engine on a GPU in this process, without HTTP: decode steps, prefill, an offline batch; prints a table.

    python scripts/bench/engine.py --json OUT [--model DIR] [--only decode,prefill,prompts,batch,profile] [--no-graphs]

Without ``--model`` the shape is Qwen3-30B-A3B's, with random weights. A decode step's floor is what it must read (dense
weights, the experts that its tokens chose, keys and values) over the copy bandwidth measured in the same run; a
prefill's is its products and attention over the bf16 matrix rate measured in the same run. Steps with shorter prompts
are timed captured and operator by operator, in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import origin
import shapes
import torch
from ceilings import copy_bandwidth, matrix_rate
from usage import Usage

from actors.engine.attention.base import bytes_per_block
from actors.engine.batch import Batch, Slice
from actors.engine.blocks import BlockPool
from actors.engine.config import EngineConfig
from actors.engine.experts.exchange import SoloExchange
from actors.engine.experts.planner import Shape, plan
from actors.engine.experts.routing import Routing
from actors.engine.pipeline import Pipeline
from actors.engine.request import Request
from actors.engine.runner import ModelRunner
from actors.engine.scheduler import Scheduler
from actors.wire import SamplingParams

CONTEXT = 1024
# Steps measured, and those before them.
STEPS, WARM = 24, 3
# Decodes beside a prompt, and its length.
MIXED = ((0, 20), (0, 128), (0, 512), (0, 1024), (0, 2048), (64, 128), (64, 512), (200, 512), (200, 1024))
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", type=Path, help="a checkpoint; default: Qwen3-30B-A3B's shape, random weights")
    parser.add_argument("--only", default="decode,prefill,prompts,batch", help="which parts, and whether to profile")
    parser.add_argument("--decode", default="1,8,64,128", help="numbers of running requests")
    parser.add_argument("--requests", type=int, default=512, help="requests of the offline batch")
    parser.add_argument("--layers", type=int, default=48, help="decoder layers of the default shape")
    parser.add_argument("--no-graphs", action="store_true", help="every step operator by operator")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)7.0f ms %(message)s")
    with tempfile.TemporaryDirectory() as made:
        result = measure(arguments, arguments.model or shapes.write(Path(made), arguments.layers))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    sizes = [int(size) for size in arguments.decode.split(",")]
    config = EngineConfig(
        model=str(model), dtype="bfloat16", device="cuda", max_model_len=8192 + 256, max_num_seqs=256,
        max_num_batched_tokens=8192, memory_fraction=0.9, load_format="auto" if arguments.model else "dummy",
        cuda_graphs=() if arguments.no_graphs else None, threads=8,
    )  # fmt: skip
    rates = {"copy": copy_bandwidth(), "matrix": matrix_rate()}
    print(f"copy {rates['copy'] / 1e12:.2f} TB/s read and written, bf16 products {rates['matrix'] / 1e12:.0f} TFLOP/s")
    started = time.monotonic()
    runner = build(config)
    torch.cuda.synchronize()
    loaded = time.monotonic() - started
    runner.warm_up()
    torch.cuda.synchronize()
    ready = time.monotonic() - started
    print(f"ready after {ready:.1f} s, weights and memory {loaded:.1f} s; {runner.num_kv_blocks} KV blocks")
    only = arguments.only.split(",")
    result: dict[str, Any] = {"rates": rates, "ready_s": ready, "loaded_s": loaded, "kv_blocks": runner.num_kv_blocks}
    if "decode" in only:
        result["decode"] = [decode(runner, size, rates["copy"]) for size in sizes]
    if "profile" in only:
        for size in sizes:
            profile(f"decode of {size}", lambda size=size: Decodes(runner, size).step([size]))
        batch = prompts(runner, [8192])
        profile("prefill of 8,192", lambda: runner.step(batch, [8192]))
    if "prefill" in only:
        result["prefill"] = [prefill(runner, lengths, rates["matrix"]) for lengths in ([8192], [1024] * 8)]
    if "prompts" in only:
        result["prompts"] = [prompt(runner, count, length) for count, length in MIXED]
    if "batch" in only:
        result["batch"] = offline(runner, arguments.requests, 512, 256)
    table(result)
    return result | {"origin": origin.origin()}


def build(config: EngineConfig) -> ModelRunner:
    from actors.engine.model import summarize

    summary = summarize(config.model)
    slots = plan(Shape(summary.num_moe_layers, summary.num_experts), (0,))
    return ModelRunner(config, Routing(slots, 0), SoloExchange())


# --- decode ----------------------------------------------------------------------------------------------------------


class Decodes:
    """``count`` sequences of ``CONTEXT`` tokens, each in blocks of its own; ``step`` adds a random token to each."""

    def __init__(self, runner: ModelRunner, count: int) -> None:
        self._runner = runner
        self._draw = random.Random(count)
        size = runner.config.block_size
        needed = -(-(CONTEXT + STEPS + WARM) // size)
        self._blocks = [list(range(i * needed, (i + 1) * needed)) for i in range(count)]
        self._length = CONTEXT

    def batch(self) -> Batch:
        vocab = self._runner.summary.vocab_size
        slices = []
        for blocks in self._blocks:
            token = self._draw.randrange(vocab)
            slices.append(Slice("x", [token], self._length, blocks, True, [], [], GREEDY))
        return Batch(tuple(slices))

    def step(self, tokens_per_rank: list[int]) -> float:
        """Seconds from the first work on the host to the last on the device, with nothing launched ahead."""
        batch = self.batch()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._runner.step(batch, tokens_per_rank)
        end.record()
        self._runner.wait(self._runner.mark())
        return start.elapsed_time(end) / 1e3

    def ahead(self, tokens_per_rank: Callable[[], list[int]]) -> float:
        """Seconds of a step, sampling included, where one is launched while the one before it runs, as ranks do."""
        pipeline, landed = Pipeline(self._runner), []
        for _ in range(WARM + STEPS):
            pipeline.launch(self.batch(), tokens_per_rank())
            if len(pipeline) > 1:
                pipeline.land()
                landed.append(time.perf_counter())
        pipeline.land()
        return statistics.median(np.diff(landed[WARM - 1 :]).tolist())


def decode(runner: ModelRunner, count: int, bandwidth: float) -> dict[str, Any]:
    ahead = Decodes(runner, count).ahead(lambda: [count])
    decodes = Decodes(runner, count)
    for _ in range(WARM):
        decodes.step([count])
    experts = runner.model.experts
    distinct, before, alone = [], np.array(experts.chosen.tolist()), []
    for _ in range(STEPS):
        alone.append(decodes.step([count]))
        after = np.array(experts.chosen.tolist())
        distinct.append(float((after > before).sum(axis=1).mean()))
        before = after
    read = bytes_read(runner, count, statistics.mean(distinct))
    floor = sum(read.values()) / bandwidth
    return {
        "requests": count, "step_ms": ahead * 1e3, "alone_ms": statistics.median(alone) * 1e3, "floor_ms": floor * 1e3,
        "over_floor": ahead / floor, "distinct_experts": statistics.mean(distinct), "read_bytes": read,
    }  # fmt: skip


def bytes_read(runner: ModelRunner, count: int, distinct: float) -> dict[str, float]:
    """What a decode step must read, by kind."""
    module, config = runner.model.module, runner.config
    expert_names = tuple(runner.model.experts_names)
    embedding = module.get_input_embeddings().weight
    dense = {
        parameter.data_ptr(): parameter.numel() * parameter.element_size()
        for name, parameter in module.named_parameters()
        if not name.startswith(expert_names) and parameter is not embedding
    }
    expert = sum(
        np.prod(shape[1:]) * runner.model.dtype.itemsize
        for shapes in runner.model.experts_shapes
        for shape in shapes.values()
    )
    block = bytes_per_block(runner.model.kv_shapes, config.block_size, runner.model.dtype)
    return {
        "dense": float(sum(dense.values())),
        "experts": float(expert * distinct),
        "kv": float(count * CONTEXT * block / config.block_size),
    }


# --- prefill ---------------------------------------------------------------------------------------------------------


def prompts(runner: ModelRunner, lengths: list[int]) -> Batch:
    size, draw, first, slices = runner.config.block_size, random.Random(len(lengths)), 0, []
    for length in lengths:
        tokens = [draw.randrange(runner.summary.vocab_size) for _ in range(length)]
        blocks = list(range(first, first := first + -(-length // size)))
        slices.append(Slice("x", tokens, 0, blocks, True, tokens, [], GREEDY))
    return Batch(tuple(slices))


def prefill(runner: ModelRunner, lengths: list[int], rate: float) -> dict[str, Any]:
    batch, total = prompts(runner, lengths), [sum(lengths)]
    for _ in range(2):
        runner.step(batch, total)
    torch.cuda.synchronize()
    times = []
    for _ in range(7):
        began = time.perf_counter()
        runner.step(batch, total)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    seconds, operations = statistics.median(times), sum(products(runner, lengths).values())
    return {
        "lengths": lengths,
        "ms": seconds * 1e3,
        "operations": operations,
        "of_matrix_rate": operations / seconds / rate,
    }


def products(runner: ModelRunner, lengths: list[int]) -> dict[str, float]:
    """Operations that a prefill must do: dense and experts' products, and causal attention."""
    model, tokens = runner.model, sum(lengths)
    names = tuple(model.experts_names)
    head = {id(module) for module in (model.module.get_output_embeddings(), model.module.get_input_embeddings())}
    dense = sum(
        module.weight.numel()
        for name, module in model.module.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor)
        and module.weight.dim() == 2
        and id(module) not in head
        and not name.startswith(names)
    )
    expert = sum(float(np.prod(shape[1:])) for shapes in model.experts_shapes for shape in shapes.values())
    heads = model.module.config.get_text_config().num_attention_heads
    attention = sum(
        sum(2 * (length * length / 2) * heads * (shape.key_width + shape.value_width) for length in lengths)
        for shape in model.kv_shapes
    )
    return {
        "dense": 2.0 * dense * tokens,
        "experts": 2.0 * expert * model.summary.top_k * tokens,
        "attention": float(attention),
    }


def prompt(runner: ModelRunner, decodes: int, length: int) -> dict[str, Any]:
    """One prompt beside running requests: milliseconds of steps one after the other, and launched ahead."""
    running, new = Decodes(runner, decodes), prompts(runner, [length]).slices[0]
    first = runner.num_kv_blocks // 2
    new = dataclasses.replace(new, blocks=[first + block for block in new.blocks])
    steps, captured = runner.steps, runner.steps.prompt_sizes
    times: dict[str, list[float]] = {name: [] for name in ("captured", "eager", "captured ahead", "eager ahead")}
    for name in ("captured", "eager") * 4:
        steps.prompt_sizes = captured if name == "captured" else []
        pipeline, landed = Pipeline(runner), []
        for _ in range(WARM):
            batch = Batch((*running.batch().slices, new))
            torch.cuda.synchronize()
            began = time.perf_counter()
            pipeline.launch(batch, [batch.num_tokens])
            pipeline.land()
            times[name].append(time.perf_counter() - began)
        for _ in range(WARM + 3):
            batch = Batch((*running.batch().slices, new))
            pipeline.launch(batch, [batch.num_tokens])
            if len(pipeline) > 1:
                pipeline.land()
                landed.append(time.perf_counter())
        pipeline.land()
        times[f"{name} ahead"] += np.diff(landed[1:]).tolist()
    steps.prompt_sizes = captured
    return {"decodes": decodes, "prompt": length} | {
        name: statistics.median(spent) * 1e3 for name, spent in times.items()
    }


# --- an offline batch ------------------------------------------------------------------------------------------------


def offline(runner: ModelRunner, count: int, prompt: int, generate: int) -> dict[str, Any]:
    """All requests at once through scheduler, runner and sampler, steps launched ahead; output tokens/s."""
    config, draw = runner.config, random.Random(1)
    scheduler = Scheduler(
        BlockPool(runner.num_kv_blocks, config.block_size), max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens,
        max_queue=config.max_queue, vocab_size=runner.summary.vocab_size,
    )  # fmt: skip
    for i in range(count):
        tokens = [draw.randrange(runner.summary.vocab_size) for _ in range(prompt)]
        scheduler.add(Request(str(i), b"", tokens, SamplingParams(max_tokens=generate, temperature=0.0)))
    spent = dict.fromkeys(("schedule", "launch", "wait", "commit"), 0.0)
    steps = made = 0
    usage = Usage([])
    began = last = time.perf_counter()

    def passed(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        spent[stage] += now - last
        last = now

    pipeline = Pipeline(runner)
    while scheduler.has_work:
        batch = scheduler.schedule()
        passed("schedule")
        if batch.slices:
            pipeline.launch(batch, [batch.num_tokens])
            steps += 1
        passed("launch")
        if len(pipeline) > 1 or not batch.slices:
            landed = pipeline.land()
            passed("wait")
            made += len(scheduler.commit(*landed))
            passed("commit")
    seconds = time.perf_counter() - began
    return {
        "requests": count, "prompt": prompt, "generated": generate, "seconds": seconds, "steps": steps,
        "output_tokens_per_s": made / seconds, "preemptions": scheduler.preemptions,
        "gpu_busy": usage.stop([])["gpu_busy"].get("0", float("nan")),
        "share": {stage: time_spent / seconds for stage, time_spent in spent.items()},
    }  # fmt: skip


# --- where the time goes ---------------------------------------------------------------------------------------------


def profile(what: str, call: Callable[[], Any]) -> None:
    """Prints the device time of a step by kernel, the largest first; then when those in its middle start and end.

    A kernel may start while the one before it works, and wait for its end: so the times add up to more than the step's.
    """
    from torch.profiler import ProfilerActivity

    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    kernels = [event for event in recorded.key_averages() if event.device_time_total]
    total = sum(event.device_time_total for event in kernels)
    launches = sum(event.count for event in kernels)
    print(f"\n{what}: {total / 1e3:.2f} ms in {launches} kernels")
    for event in sorted(kernels, key=lambda event: -event.device_time_total)[:16]:
        each = event.device_time_total / event.count
        print(f"  {event.device_time_total / 1e3:8.3f} ms {event.count:5d} x {each:8.2f} us  {event.key[:90]}")
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in recorded.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    middle = spans[len(spans) // 2 :][:24]
    for start, end, name in middle:
        print(f"  from {start - middle[0][0]:8.1f} to {end - middle[0][0]:8.1f} us  {name[:90]}")


def table(result: dict[str, Any]) -> None:
    for row in result.get("decode", []):
        read = ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in row["read_bytes"].items())
        print(
            f"decode of {row['requests']}: {row['step_ms']:.2f} ms, one by one {row['alone_ms']:.2f} ms;",
            end="",
        )
        print(f" floor {row['floor_ms']:.2f} ms ({read}): {row['over_floor']:.2f} times")
    for row in result.get("prefill", []):
        print(f"prefill of {len(row['lengths'])} x {row['lengths'][0]}: {row['ms']:.1f} ms,", end="")
        print(f" {row['operations'] / 1e12:.1f} TFLOP, {row['of_matrix_rate']:.0%} of the matrix rate")
    for row in result.get("prompts", []):
        print(
            f"a prompt of {row['prompt']} beside {row['decodes']} decodes: {row['captured']:.1f} ms captured,", end=""
        )
        print(f" {row['eager']:.1f} ms not; launched ahead {row['captured ahead']:.1f} and {row['eager ahead']:.1f} ms")
    if batch := result.get("batch"):
        print(f"offline: {batch['requests']} requests of {batch['prompt']} in, {batch['generated']} out:", end="")
        print(
            f" {batch['seconds']:.1f} s, {batch['output_tokens_per_s']:.0f} output tokens/s, {batch['steps']} steps,",
            end="",
        )
        print(
            f" GPU busy {batch['gpu_busy']:.1%}, host: "
            + ", ".join(f"{stage} {share:.1%}" for stage, share in batch["share"].items())
        )


if __name__ == "__main__":
    main()
