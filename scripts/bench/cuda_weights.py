#!/usr/bin/env python3
"""Weights on a GPU: how fast they come, what an expert that is read meanwhile costs the steps, and experts in FP8.

    python scripts/bench/cuda_weights.py [--directory /tmp/accordion-weights] [--layers 6] [--only dummy,load]

Shapes are those of Qwen3-30B-A3B. ``dummy`` draws all 48 layers; ``load`` writes a checkpoint of ``--layers`` (1.2 GB
each) to ``--directory``, loads it and compares it with the file; ``beside`` has a graph of matrix products run while
experts are made; ``fp8`` is ``cuda_fp8.py``. The table comes last.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cuda_experts import EXPERTS  # type: ignore[import-not-found]
from cuda_fp8 import in_fp8  # type: ignore[import-not-found]
from safetensors.torch import save_file
from shapes import write  # type: ignore[import-not-found]

from actors.engine.model import MoEModel
from actors.engine.weights import open_loader

GB = 1e9


def timed(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def empty_model(directory: Path, device: torch.device) -> MoEModel:
    model = MoEModel(directory, "bfloat16")
    model.allocate_slots(EXPERTS, device, 16, 1)
    return model


def all_slots(model: MoEModel) -> list[list[int]]:
    return [list(range(EXPERTS))] * model.summary.num_moe_layers


@torch.inference_mode()
def dummy(directory: Path, device: torch.device) -> list[str]:
    model = empty_model(write(directory / "whole"), device)
    loader = open_loader(model, device, "dummy")
    dense = timed(loader.load_dense)
    experts = timed(lambda: loader.load_experts(all_slots(model)))
    slots = model.experts.layers[-1].module.down_proj
    assert slots[-1].float().std() > 0 and torch.equal(slots[5], loader._expert(47, 5)["down_proj"])
    size = loader.bytes_read
    return [f"dummy weights: {size / GB:.1f} GB in {dense + experts:.1f} s (dense {dense:.1f} s)"]


def write_checkpoint(directory: Path, layers: int, device: torch.device) -> Path:
    """Random weights in the Hub's layout, one shard a layer."""
    path = write(directory / "part", layers)
    shapes: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in MoEModel(path, "bfloat16").module.named_parameters():
        shard = shapes.setdefault(name.split(".")[2] if ".layers." in name else "rest", {})
        prefix, _, leaf = name.rpartition(".")
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(leaf, ())
        for expert in range(EXPERTS):
            for part in parts:
                rows = parameter.shape[1] // len(parts)
                shard[f"{prefix}.{expert}.{part}.weight"] = torch.Size((rows, parameter.shape[2]))
        if not parts:
            shard[name] = parameter.shape
    for shard_name, shard in shapes.items():
        tensors = {}
        for key, shape in shard.items():
            bits = torch.randint(0, 15000, shape, dtype=torch.int16, device=device)  # all finite
            tensors[key] = bits.view(torch.bfloat16).cpu()
        save_file(tensors, path / f"{shard_name}.safetensors")
    index = {key: f"{shard_name}.safetensors" for shard_name, shard in shapes.items() for key in shard}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return path


@torch.inference_mode()
def load(path: Path, device: torch.device) -> list[str]:
    lines = []
    for attempt in ("first", "again"):
        model = empty_model(path, device)
        loader = open_loader(model, device)
        told: list[tuple[int, int]] = []
        slots = [list(reversed(range(EXPERTS)))] * model.summary.num_moe_layers
        loader.watch(lambda done, total, told=told: told.append((done, total)), slots)
        dense = timed(loader.load_dense)
        experts = timed(lambda loader=loader, slots=slots: loader.load_experts(slots))
        assert told[-1][0] == told[-1][1] == loader.bytes_read, (told[-1], loader.bytes_read)
        rate = loader.bytes_read / (dense + experts) / GB
        lines.append(
            f"checkpoint, {attempt} time: {loader.bytes_read / GB:.1f} GB in {dense + experts:.2f} s = {rate:.1f} GB/s "
            f"(dense {dense:.2f} s)"
        )
        checkpoint = loader.checkpoint
        for layer, name in enumerate(model.experts_names):
            module = model.module.get_submodule(name)
            for slot, expert in ((0, EXPERTS - 1), (77, EXPERTS - 78), (EXPERTS - 1, 0)):
                parts = [checkpoint.read(f"{name}.{expert}.{part}_proj.weight") for part in ("gate", "up")]
                assert torch.equal(module.gate_up_proj[slot].cpu(), torch.cat(parts)), (layer, slot)
                down = checkpoint.read(f"{name}.{expert}.down_proj.weight")
                assert torch.equal(module.down_proj[slot].cpu(), down), (layer, slot)
        for key in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.3.self_attn.q_proj.weight"):
            assert torch.equal(model.module.get_parameter(key).cpu(), checkpoint.read(key)), key
        del model, loader
        torch.cuda.empty_cache()
    return lines


@torch.inference_mode()
def beside(path: Path, device: torch.device) -> list[str]:
    """Steps of about a millisecond as a graph, while experts are made in another thread and put between the steps."""
    lines = []
    weights = [torch.randn(4096, 4096, device=device, dtype=torch.bfloat16) for _ in range(8)]
    states = torch.randn(1024, 4096, device=device, dtype=torch.bfloat16)

    def step() -> torch.Tensor:
        output = states
        for weight in weights:
            output = output @ weight * 1e-2
        return output

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for load_format in ("auto", "dummy"):
        model = empty_model(path, device)
        loader = open_loader(model, device, load_format)
        loader.load_experts(all_slots(model))
        for requested in (False, True):
            taken, made, pending = [], 0, None
            torch.cuda.synchronize()
            last = started = time.perf_counter()
            while last - started < 2:
                if requested and pending is not None and pending.done():
                    model.experts.layers[0].put(made % EXPERTS, pending.result())
                    made, pending = made + 1, None
                if requested and pending is None:
                    pending = loader.request_expert(made % model.summary.num_moe_layers, made % EXPERTS)
                graph.replay()
                torch.cuda.synchronize()
                now = time.perf_counter()
                taken.append(1e3 * (now - last))
                last = now
            if pending is not None:
                pending.result()
            taken.sort()
            what = f"{made / 2:.0f} experts/s made beside ({load_format})" if requested else "alone"
            lines.append(
                f"steps {what}: median {statistics.median(taken):.2f} ms, 99 % {taken[int(0.99 * len(taken))]:.2f}, "
                f"longest {taken[-1]:.2f}"
            )
        del model, loader
        torch.cuda.empty_cache()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("/tmp/accordion-weights"))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--only", default="dummy,load,beside,fp8")
    arguments = parser.parse_args()
    device, chosen = torch.device("cuda"), arguments.only.split(",")
    lines: list[str] = [torch.cuda.get_device_name()]
    try:
        if "dummy" in chosen:
            lines += dummy(arguments.directory, device)
            torch.cuda.empty_cache()
        if {"load", "beside"} & set(chosen):
            path = write_checkpoint(arguments.directory, arguments.layers, device)
            lines += load(path, device) if "load" in chosen else []
            lines += beside(path, device) if "beside" in chosen else []
        if "fp8" in chosen:
            lines += in_fp8(device)
    finally:
        shutil.rmtree(arguments.directory, ignore_errors=True)
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
