"""Steps on a GPU: one captured graph per padded size, and what is larger operator by operator.

Decodes have graphs of their own; others take any step, prompts beside decodes or not, of up to so many rows. Beyond
those the GPU works longer at a step than the host takes to launch it.

A graph holds a whole step, from the embedding to the logits, the exchange between ranks included. What differs from
step to step, and from epoch to epoch, is read from device tensors that never move: ``StepInputs``, and the tables of
the experts. So nothing is captured again when the group changes.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
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
from actors.engine.cuda.inputs import Padded, StepInputs
from actors.engine.cuda.peers import CudaPeers
from actors.engine.model import MoEModel
from actors.engine.steps import rehearsal

logger = logging.getLogger(__name__)

# Rows of steps with prompts that are captured, and sequences: of few, each has several programs that decode.
_PROMPT_ROWS = (64, 128, 256, 512, 768, 1024, 1536, 2048)
_FEW_SEQUENCES = 16
# Rows that a rank without any serves, of all ranks on average, for which that is captured.
_IDLE_ROWS = (256, 1024, 2048)
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


def prompt_ladder(most_rows: int, most_sequences: int) -> list[Padded]:
    """Padded sizes of steps with prompts, the fewest rows first; each of them has more rows than sequences."""
    rows = [size for size in _PROMPT_ROWS if size < most_rows] + [min(most_rows, _PROMPT_ROWS[-1])]
    sizes = {Padded(size, min(few, size // 2)) for size in rows for few in (_FEW_SEQUENCES, most_sequences)}
    return sorted(size for size in sizes if size.sequences <= most_sequences and size.sequences)


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
        prompts = prompt_ladder(config.max_num_batched_tokens, config.max_num_seqs)
        self.prompt_sizes = prompts if self.sizes else []
        self._graphs: dict[Padded, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._idle: dict[int, torch.cuda.CUDAGraph] = {}
        plan = self._plan(weights)
        logger.info("%s", plan)
        self.num_kv_blocks = plan.blocks
        model.attention = self._make_attention(plan.blocks)

    def run(self, batch: Batch, drawn: torch.Tensor | None = None) -> torch.Tensor:
        logits = self._run(batch, self._size_of(batch), drawn)
        sampling = [i for i, part in enumerate(batch.slices) if part.samples]
        if sampling == list(range(len(sampling))):
            return logits[: len(sampling)]
        return logits[sampling]

    def _run(self, batch: Batch, size: Padded | None, drawn: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of all sequences, and of padding."""
        self.inputs.fill(batch, size, drawn)
        self.model.attention.begin(self.inputs)
        if size in self._graphs:
            graph, logits = self._graphs[size]
            graph.replay()
            return logits
        return self._forward()

    def idle(self) -> None:
        self.inputs.fill(EMPTY)
        experts = self._experts
        rows = next((rows for rows in self._idle if rows >= experts.mean_rows), None)
        if rows is None or self.model.experts is not experts:
            self.model.experts.finish()
        else:
            self._idle[rows].replay()

    @property
    def _few_rows(self) -> bool:
        """Whether no rank has more rows in this step than the largest graph of decodes has, and graphs may run.

        Right they would be in any case, but tiles for a few rows are slow where a peer has thousands.
        """
        return bool(self.sizes) and self.model.experts is self._experts and self._experts.most_rows <= self.sizes[-1]

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
        for size in reversed(self._padded):
            self._capture(size)
        if self.sizes and self.model.experts.layers:
            for rows in sorted({min(rows, self.config.max_num_batched_tokens) for rows in _IDLE_ROWS}):
                self._capture_idle(rows)
        torch.cuda.synchronize()
        logger.info(
            "captured steps of %s decodes and of up to %s rows in %.1f s; %.1f MiB",
            self.sizes or "no", self.prompt_sizes[-1].rows if self.prompt_sizes else "no",
            time.monotonic() - started, (before - torch.cuda.mem_get_info()[0]) / 2**20,
        )  # fmt: skip

    @property
    def _padded(self) -> list[Padded]:
        return [*(Padded(size, size) for size in self.sizes), *self.prompt_sizes]

    def _capture(self, size: Padded) -> None:
        self._rehearse(size)  # kernels are compiled and chosen, workspaces made
        torch.cuda.synchronize()
        self.model.experts.begin([size.rows])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._forward()
        self._graphs[size] = graph, _unowned(logits)

    def _capture_idle(self, rows: int) -> None:
        self.model.experts.begin([rows])
        self.model.experts.finish()
        torch.cuda.synchronize()
        self.model.experts.begin([rows])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self.model.experts.finish()
        self._idle[rows] = graph

    @property
    def _pool(self) -> Any:
        """One pool for all graphs: one runs at a time, and its logits have been used before another one begins."""
        return next((graph.pool() for graph, _ in self._graphs.values()), None)

    def _size_of(self, batch: Batch) -> Padded | None:
        """The padded size for ``batch``; None when it is too large, or has an exchange that graphs have not."""
        experts, count = self._experts, len(batch.slices)
        if self.model.experts is not experts:
            return None
        if self._few_rows and count == batch.num_tokens and all(part.samples for part in batch.slices):
            # The graph of one row may compute experts pair by pair: too slow where a peer has more.
            least = 2 if experts.pairwise and experts.most_rows > 1 else 1
            size = self.sizes[bisect.bisect_left(self.sizes, max(count, least))]
            return Padded(size, size)
        rows = max(batch.num_tokens, experts.mean_rows)  # so that its tiles suit what comes from peers, too
        return next((size for size in self.prompt_sizes if size.rows >= rows and size.sequences >= count), None)

    def _forward(self) -> torch.Tensor:
        inputs = self.inputs
        module: Any = self.model.module
        more = {}
        # Only in steps with prompts. Rows that go through host memory come as announced.
        if self._narrowed is not None and inputs.rows > inputs.sequences and self.model.experts is self._experts:
            module, more = self._narrowed, {"count": inputs.sequence_count}
        output = module(
            input_ids=inputs.ids[None, : inputs.rows],
            position_ids=inputs.positions[None, : inputs.rows],
            use_cache=False,
            logits_to_keep=inputs.last[: inputs.sequences],
            **more,
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
            for size in self._padded[::2]:  # neighbours take the same kernels, mostly
                self._rehearse(size)
        activations = self._peak(self._largest_step)
        # Of one pool; the largest of either kind may be the one that needs most.
        largest = [sizes[-1] for sizes in (self._padded[: len(self.sizes)], self.prompt_sizes) if sizes]
        graphs = max((self._peak(functools.partial(self._rehearse, size)) for size in largest), default=0)
        graphs += len(self._padded) * _GRAPH_BYTES
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
            step_tokens=config.max_num_batched_tokens, graphs=graphs, min_ranks=config.min_data_parallel_size,
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

    def _rehearse(self, size: Padded) -> None:
        if size.rows > size.sequences:
            batch, drawn = self._prompts(*size), None
        else:
            slices = (rehearsal([0], 0, [i % self.num_kv_blocks]) for i in range(size.sequences))
            batch = Batch(tuple(dataclasses.replace(piece, follows=0) for piece in slices))
            drawn = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.model.experts.begin([batch.num_tokens])
        self._run(batch, size, drawn)

    def _largest_step(self) -> None:
        batch = self._prompts(self.config.max_num_batched_tokens, self.config.max_num_seqs)
        self.model.experts.begin([batch.num_tokens])
        logits = self._run(batch, None)
        for form in (logits, logits.float()):  # the latter is what penalties make of them
            largest(form)

    def _prompts(self, rows: int, sequences: int) -> Batch:
        """Prompts as long as they may be, of up to so many rows and sequences."""
        first = 0
        slices: list[Slice] = []
        while rows and len(slices) < sequences:
            count = min(rows, self.config.max_model_len)
            needed = -(-count // self.config.block_size)
            blocks = [block % self.num_kv_blocks for block in range(first, first + needed)]
            slices.append(rehearsal([0] * count, 0, blocks))
            rows, first = rows - count, first + needed
        return Batch(tuple(slices))


def _unowned(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, which may be used for something else once ``tensor`` is gone: by the other graphs of a pool."""
    whole = tensor.untyped_storage()
    flat = torch.as_tensor(Bytes(whole.data_ptr(), whole.nbytes()), device=tensor.device).view(tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
