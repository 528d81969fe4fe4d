"""Steps on a GPU: decodes as one captured graph per padded size, everything else operator by operator.

A graph holds a whole step, from the embedding to the logits, the exchange between ranks included. What differs from step
to step, and from epoch to epoch, is read from device tensors that never move: ``StepInputs`` with its block tables, and
the tables of the experts. So nothing is captured again when the group changes.
"""

from __future__ import annotations

import bisect
import logging
import time

import torch

from actors.engine.attention.triton_paged import TritonPagedAttention
from actors.engine.batch import EMPTY, Batch
from actors.engine.config import EngineConfig
from actors.engine.cuda.inputs import StepInputs
from actors.engine.model import MoEModel
from actors.engine.steps import check_blocks, rehearsal

logger = logging.getLogger(__name__)

# Runs of a step before it is captured: kernels are compiled and chosen, workspaces made.
_REHEARSALS = 2


def ladder(most: int) -> list[int]:
    """Padded sizes up to ``most``, close together where a step's time depends on its rows."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, *range(64, 128, 16), *range(128, 256, 32), *range(256, most, 64)]
    return [size for size in sizes if size < most] + [most]


class CudaSteps:
    """See ``Steps``. Building it runs a largest step, and takes of what is left the KV cache.

    Raises ValueError when too little is left.
    """

    asynchronous = True

    def __init__(self, model: MoEModel, config: EngineConfig) -> None:
        self.model = model
        self.config = config
        self.device = torch.device(config.device)
        self._max_blocks = -(-config.max_model_len // config.block_size)
        self.inputs = StepInputs(
            config.max_num_batched_tokens, config.max_num_seqs, self._max_blocks, config.block_size, self.device
        )
        model.experts.own_rows = self.inputs.count
        self.sizes = ladder(config.max_num_seqs) if config.cuda_graphs is None else sorted(config.cuda_graphs)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._idle: torch.cuda.CUDAGraph | None = None
        self.num_kv_blocks = self._count_blocks()
        model.attention = self._make_attention(self.num_kv_blocks)

    def run(self, batch: Batch) -> torch.Tensor:
        count = batch.num_tokens
        size = self._size_of(batch)
        self.inputs.fill(batch, None if size is None else lambda _: size)
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
        if self._idle is not None:
            self._idle.replay()
        else:
            self.model.experts.finish()

    def warm_up(self) -> None:
        self._largest_step()
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
        batch = Batch(tuple(rehearsal([0], 0, [i % self.num_kv_blocks]) for i in range(size)))
        for _ in range(_REHEARSALS):
            self.model.experts.begin([size])
            self.run(batch)
        torch.cuda.synchronize()
        self.model.experts.begin([size])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._forward()
        self._graphs[size] = graph, logits

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
    def _pool(self) -> tuple[int, int] | None:
        """One pool for all graphs: only one of them runs at a time, and its results are used before the next one."""
        return next((graph.pool() for graph, _ in self._graphs.values()), None)

    def _size_of(self, batch: Batch) -> int | None:
        """The padded size for ``batch``; None when it is not one of decodes that all sample, or is too large."""
        count = len(batch.slices)
        if not self.sizes or count != batch.num_tokens or count > self.sizes[-1]:
            return None
        if not all(part.samples for part in batch.slices):
            return None
        return self.sizes[bisect.bisect_left(self.sizes, count)]

    def _forward(self) -> torch.Tensor:
        inputs = self.inputs
        output = self.model.module(
            input_ids=inputs.ids[None, : inputs.rows],
            position_ids=inputs.positions[None, : inputs.rows],
            use_cache=False,
            logits_to_keep=inputs.last[: inputs.sequences],
        )
        logits: torch.Tensor = output.logits
        return logits[0]

    def _make_attention(self, blocks: int) -> TritonPagedAttention:
        return TritonPagedAttention(self.model.kv_shapes, blocks, self.config.block_size, self.model.dtype, self.device)

    def _largest_step(self) -> None:
        """Prompts as long as they may be, as many as a step holds."""
        left, slices, first = self.config.max_num_batched_tokens, [], 0
        while left and len(slices) < self.config.max_num_seqs:
            count = min(left, self.config.max_model_len)
            needed = -(-count // self.config.block_size)
            blocks = [block % self.model.attention.num_blocks for block in range(first, first + needed)]
            slices.append(rehearsal([0] * count, 0, blocks))
            left, first = left - count, first + needed
        batch = Batch(tuple(slices))
        self.model.experts.begin([batch.num_tokens])
        self.run(batch)
        torch.cuda.synchronize()
