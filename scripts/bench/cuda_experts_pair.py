"""Two processes that see one GPU each, for ``cuda_experts.py``: whether they compute what one does, and how fast."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from typing import Any

import torch
import torch.distributed as dist
from cuda_experts import EXPERTS, HIDDEN, INNER, LAYERS, Block, Gated, draw, error, halves, make, whole

from actors.engine.cuda.experts import CudaExperts
from actors.engine.cuda.peers import CudaPeers, PeerWindows
from actors.engine.experts.exchange import Exchange, PeerLost, SoloExchange
from actors.engine.experts.mesh import MeshExchange


def pair() -> list[dict[str, Any]]:
    """Two processes that see one GPU each: whether they compute what one does, and how long they take."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    for index in range(2):
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
        ours, theirs = context.Pipe()
        process = context.Process(target=_member, args=(index, server.port, theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    os.environ.pop("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    try:
        result = pipes[0].recv() if pipes[0].poll(150) else "rank 0 gave no answer within 150 s"
        if isinstance(result, str):
            raise RuntimeError(result)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return result


def _member(index: int, port: int, pipe: Any) -> None:
    try:
        pipe.send(_pair(index, port))
    except BaseException:
        pipe.send(traceback.format_exc())
        print(traceback.format_exc(), flush=True)
    time.sleep(60)  # the peer may still read this memory


def _join(windows: PeerWindows, port: int, epoch: int, index: int) -> CudaPeers:
    store = dist.PrefixStore(f"epoch{epoch}", dist.TCPStore("127.0.0.1", port, is_master=False))
    started = time.monotonic()
    peers = windows.connect(MeshExchange(store, index, 2, 60.0, "127.0.0.1"), store, epoch, 60.0)
    if index == 0:
        print(f"  epoch {epoch} connected in {(time.monotonic() - started) * 1e3:.0f} ms", flush=True)
    return peers


def _pair(index: int, port: int) -> list[dict[str, Any]]:
    device = torch.device("cuda:0")
    torch.cuda.set_device(device)
    # In float32 a group's results are those of one rank, bit for bit, whatever the batch.
    hidden, layers = 256, 3
    full = [Gated(EXPERTS, hidden, 96, torch.float32, device).fill(layer, range(EXPERTS)) for layer in range(layers)]
    alone = make(full, 256)
    alone.adopt(whole(layers), SoloExchange())
    half = [
        Gated(EXPERTS // 2, hidden, 96, torch.float32, device).fill(layer, range(index, EXPERTS, 2))
        for layer in range(layers)
    ]
    experts = make(half, 256)
    windows = PeerWindows(experts.window)
    peers = _join(windows, port, 1, index)
    experts.adopt(halves(layers, index), peers)
    for step, tokens in enumerate([[3, 200], [0, 5], [64, 64], [1, 0], [256, 256]] * 3):
        peers.sync([0])
        rows = tokens[index]
        for group in (experts, alone):
            group.own_rows.fill_(rows)
            group.begin(tokens if group is experts else [rows])
        experts.window.results.fill_(float("nan"))
        if not rows:
            experts.finish()
        inputs = [draw(max(rows, 1), hidden, torch.float32, device, 100 * step + 10 * index + i) for i in range(layers)]
        for layer in range(layers if rows else 0):
            result = experts.forward(layer, *inputs[layer])
            own = alone.forward(layer, *inputs[layer])
            assert torch.equal(result, own), (step, layer, error(result, own.double()))
        check(experts)
    if index == 0:
        print("  two ranks equal one, bit for bit", flush=True)
    peers.sync([0])
    results = _pair_times(index, port, device)
    # A peer dies while this rank's kernels wait for it.
    second = _join(windows, port, 2, index)
    peers.close()
    experts.adopt(halves(layers, index), second)
    second.sync([0])
    if index == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    experts.own_rows.fill_(4)
    experts.begin([4, 4])
    for layer in range(layers):
        experts.forward(layer, *draw(4, hidden, torch.float32, device, layer))
    event = torch.cuda.Event()
    event.record()
    started = time.monotonic()
    second.wait(event, 20.0)
    waited = time.monotonic() - started
    try:
        check(experts)
        raise AssertionError("a step without the peer was not void")
    except PeerLost as lost:
        print(f"  peer killed 0.5 s into the wait; the step ended after {waited:.3f} s: {lost}", flush=True)
    experts = None  # type: ignore[assignment]
    alone.own_rows.fill_(4)
    alone.begin([4])
    last = draw(4, hidden, torch.float32, device, 5)
    assert error(alone.forward(0, *last), full[0].reference(*last)) < 1e-5
    return results


def check(experts: CudaExperts) -> None:
    """Waits, and raises PeerLost when the steps until here are void."""
    verdict = experts.verdict()
    torch.cuda.synchronize()
    experts.check(verdict)


def _pair_times(index: int, port: int, device: torch.device) -> list[dict[str, Any]]:
    half = [
        Gated(EXPERTS // 2, HIDDEN, INNER, torch.bfloat16, device).fill(i, range(index, EXPERTS, 2))
        for i in range(LAYERS)
    ]
    experts = make(half, 2048)
    peers: Exchange = _join(PeerWindows(experts.window), port, 3, index)
    experts.adopt(halves(LAYERS, index), peers)
    results = []
    for rows in (1, 8, 64, 128, 512):
        peers.sync([0])
        block = Block(experts, rows, seed=index)
        peers.sync([0])
        took = block.time(20)
        peers.sync([0])
        results.append({"rows": rows, "block": took, **block.kernels()})
        check(experts)
    return results
