"""Steps on a GPU: decodes as one captured graph per padded size, everything else operator by operator.

A graph holds a whole step, from the embedding to the logits, the exchange between ranks included. What differs from
step to step, and from epoch to epoch, is read from device tensors that never move: ``StepInputs``, and the tables of
the experts. So nothing is captured again when the group changes.
"""

from __future__ import annotations

import bisect
import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from actors.engine.attention.base import bytes_per_block
from actors.engine.attention.triton_paged import TritonPagedAttention
from actors.engine.batch import EMPTY, Batch, Slice
from actors.engine.config import EngineConfig
from actors.engine.cuda import memory
from actors.engine.cuda.compiling import only_compiling
from actors.engine.cuda.decoder import Narrowed
from actors.engine.cuda.driver import Bytes
from actors.engine.cuda.experts import CudaExperts
from actors.engine.cuda.greedy import largest
from actors.engine.cuda.inputs import StepInputs
from actors.engine.cuda.peers import CudaPeers
from actors.engine.model import MoEModel
from actors.engine.steps import rehearsal

logger = logging.getLogger(__name__)

# Runs of a step before it is captured: kernels are compiled and chosen, workspaces made.
_REHEARSALS = 2
# What the driver keeps for one captured step, besides the memory that the step computes in. Bytes.
_GRAPH_BYTES = 16 * 2**20


class _Mark(NamedTuple):
    """A place in the stream; ``verdict`` is the experts', where peers take part."""

    done: torch.cuda.Event
    verdict: torch.Tensor | None


def ladder(most: int) -> list[int]:
    """Padded sizes up to ``most``, close together where a step's time depends on its rows."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, *range(64, 128, 16), *range(128, 256, 32), *range(256, most, 64)]
    return [size for size in sizes if size < most] + [most]


class CudaSteps:
    """See ``Steps``. Building it runs a largest step, and takes of what is left the KV cache.

    The group is this rank by itself meanwhile. ``weights`` is what ``memory.weights_of`` said of the model,
    ``narrowed`` what ``fuse`` gave for it. Raises ValueError when too little is left.
    """

    asynchronous = True

    def __init__(
        self, model: MoEModel, config: EngineConfig, weights: memory.Weights, narrowed: Narrowed | None = None
    ) -> None:
        self.model = model
        self.config = config
        self.device = torch.device(config.device)
        self._narrowed = narrowed
        self._experts: CudaExperts = model.experts
        blocks = -(-config.max_model_len // config.block_size)
        self.inputs = StepInputs(
            config.max_num_batched_tokens, config.max_num_seqs, blocks, config.block_size, self.device
        )
        self._experts.own_rows = self.inputs.count
        wanted = ladder(config.max_num_seqs) if config.cuda_graphs is None else sorted(config.cuda_graphs)
        self.sizes = wanted if self._experts.capturable else []
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._idle: torch.cuda.CUDAGraph | None = None
        plan = self._plan(weights)
        logger.info("%s", plan)
        self.num_kv_blocks = plan.blocks
        model.attention = self._make_attention(plan.blocks)

    def run(self, batch: Batch, drawn: torch.Tensor | None = None) -> torch.Tensor:
        count = batch.num_tokens
        size = self._size_of(batch) if self._captured_suits else None
        self.inputs.fill(batch, size, drawn)
        self.model.attention.begin(self.inputs)
        if size in self._graphs:
            graph, logits = self._graphs[size]
            graph.replay()
            return logits[:count]
        logits = self._forward()
        if size is not None:
            return logits[:count]
        sampling = [i for i, part in enumerate(batch.slices) if part.samples]
        return logits if len(sampling) == len(batch.slices) else logits[sampling]

    def idle(self) -> None:
        self.inputs.fill(EMPTY)
        if self._idle is not None and self._captured_suits:
            self._idle.replay()
        else:
            self.model.experts.finish()

    @property
    def _captured_suits(self) -> bool:
        """Whether this step's rows may be few and its exchange is the one that graphs have.

        Right it would be in any case, but tiles for a few rows are slow where a peer has thousands.
        """
        experts = self.model.experts
        return bool(self.sizes) and experts is self._experts and experts.most_rows <= self.sizes[-1]

    def mark(self) -> _Mark:
        experts = self.model.experts
        verdict = experts.verdict() if isinstance(experts.exchange, CudaPeers) else None
        done = torch.cuda.Event()
        done.record()
        return _Mark(done, verdict)

    def wait(self, mark: _Mark) -> None:
        experts = self.model.experts
        if mark.verdict is None:
            mark.done.synchronize()
        else:
            experts.exchange.wait(mark.done, self.config.collective_timeout_s)
            experts.check(mark.verdict)

    def warm_up(self) -> None:
        started, before = time.monotonic(), torch.cuda.mem_get_info()[0]
        for size in reversed(self.sizes):
            self._capture(size)
        if self.sizes and self.model.experts.layers:
            self._capture_idle()
        torch.cuda.synchronize()
        logger.info(
            "captured steps of %s sequences in %.1f s; %.1f MiB",
            self.sizes or "no", time.monotonic() - started, (before - torch.cuda.mem_get_info()[0]) / 2**20,
        )  # fmt: skip

    def _capture(self, size: int) -> None:
        for _ in range(_REHEARSALS):
            self._rehearse(size)
        torch.cuda.synchronize()
        self.model.experts.begin([size])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._forward()
        self._graphs[size] = graph, _unowned(logits)

    def _capture_idle(self) -> None:
        for _ in range(_REHEARSALS):
            self.model.experts.begin([0])
            self.idle()
        torch.cuda.synchronize()
        self.model.experts.begin([0])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self.model.experts.finish()
        self._idle = graph

    @property
    def _pool(self) -> Any:
        """One pool for all graphs: one runs at a time, and its logits have been used before another one begins."""
        return next((graph.pool() for graph, _ in self._graphs.values()), None)

    def _size_of(self, batch: Batch) -> int | None:
        """The padded size for ``batch``; None when it is not one of decodes that all sample, or is too large."""
        count = len(batch.slices)
        # The graph of one row may compute experts pair by pair: too slow where a peer has more.
        least = 2 if self._experts.pairwise and self._experts.most_rows > 1 else 1
        if not self.sizes or count != batch.num_tokens or count > self.sizes[-1]:
            return None
        if not all(part.samples for part in batch.slices):
            return None
        return self.sizes[bisect.bisect_left(self.sizes, max(count, least))]

    def _forward(self) -> torch.Tensor:
        inputs = self.inputs
        module: Any = self.model.module
        # Only in steps with prompts, which are not captured. Rows that go through host memory come as announced.
        if self._narrowed is not None and inputs.rows > inputs.sequences and self.model.experts is self._experts:
            module = self._narrowed
        output = module(
            input_ids=inputs.ids[None, : inputs.rows],
            position_ids=inputs.positions[None, : inputs.rows],
            use_cache=False,
            logits_to_keep=inputs.last[: inputs.sequences],
        )
        logits: torch.Tensor = output.logits
        return logits[0]

    def _make_attention(self, blocks: int) -> TritonPagedAttention:
        return TritonPagedAttention(self.model.kv_shapes, blocks, self.config.block_size, self.model.dtype, self.device)

    def _plan(self, weights: memory.Weights) -> memory.MemoryPlan:
        """Runs the largest steps over a KV cache that is just large enough, and counts."""
        config, needed = self.config, -(-self.config.max_model_len // self.config.block_size)
        enough = -(-config.max_num_batched_tokens // config.block_size)
        self.num_kv_blocks = max(needed, enough)
        self.model.attention = self._make_attention(self.num_kv_blocks)
        with only_compiling():
            self._largest_step()
            for size in self.sizes[::2]:  # neighbours take the same kernels, mostly
                self._rehearse(size)
        activations = self._peak(self._largest_step)
        most = self.sizes[-1] if self.sizes else 0
        decodes = self._peak(lambda: self._rehearse(most)) + len(self.sizes) * _GRAPH_BYTES if most else 0
        del self.model.attention
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        cache = memory.Cache(
            block_bytes=bytes_per_block(self.model.kv_shapes, config.block_size, self.model.dtype),
            block_size=config.block_size,
            needed=needed,
            blocks=config.kv_blocks,
            fraction=config.memory_fraction,
        )
        return memory.plan(
            weights, cache, total=total, free=free, activations=activations,
            step_tokens=config.max_num_batched_tokens, graphs=decodes, min_ranks=config.min_data_parallel_size,
        )  # fmt: skip

    def _peak(self, step: Callable[[], None]) -> int:
        """Bytes that a step takes at most. It runs twice: the first time compiles, and makes what stays."""
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _rehearse(self, size: int) -> None:
        slices = (rehearsal([0], 0, [i % self.num_kv_blocks]) for i in range(size))
        batch = Batch(tuple(dataclasses.replace(piece, follows=0) for piece in slices))
        self.model.experts.begin([size])
        self.run(batch, torch.zeros(1, dtype=torch.int64, device=self.device))

    def _largest_step(self) -> None:
        """Prompts as long as they may be, as many as a step holds."""
        left, first = self.config.max_num_batched_tokens, 0
        slices: list[Slice] = []
        while left and len(slices) < self.config.max_num_seqs:
            count = min(left, self.config.max_model_len)
            needed = -(-count // self.config.block_size)
            blocks = [block % self.num_kv_blocks for block in range(first, first + needed)]
            slices.append(rehearsal([0] * count, 0, blocks))
            left, first = left - count, first + needed
        batch = Batch(tuple(slices))
        self.model.experts.begin([batch.num_tokens])
        logits = self.run(batch)
        for form in (logits, logits.float()):  # the latter is what penalties make of them
            largest(form)


def _unowned(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, which may be used for something else once ``tensor`` is gone: by the other graphs of a pool."""
    whole = tensor.untyped_storage()
    flat = torch.as_tensor(Bytes(whole.data_ptr(), whole.nbytes()), device=tensor.device).view(tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
