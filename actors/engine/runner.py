"""The model runner of one rank: weights, KV cache, and one forward step at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from actors.engine import cpu
from actors.engine.attention.base import PagedAttention, bytes_per_block
from actors.engine.attention.torch_sdpa import TorchPagedAttention
from actors.engine.batch import Batch, Slice
from actors.engine.config import EngineConfig
from actors.engine.experts.exchange import Exchange, PeerLost, SoloExchange
from actors.engine.experts.layer import ExpertsBroken
from actors.engine.experts.map import ExpertMap
from actors.engine.experts.routing import Routing
from actors.engine.model import MoEModel
from actors.engine.weights import WeightLoader
from actors.wire import SamplingParams

logger = logging.getLogger(__name__)

WARM_UP_SEQUENCES = 8


class StepFailed(RuntimeError):
    """The model raised on this rank's batch. Peers were served and the lockstep holds; nothing was sampled.

    The cause is chained. The caller may run the requests one by one to find the one at fault.
    """


class ModelRunner:
    """Loads the model and runs steps. One thread uses it.

    ``exchange`` may belong to a smaller group (a rank that has not joined yet) as long as ``adopt`` comes before the
    first step. Raises ValueError on a configuration that cannot work (map, checkpoint, dtype, too few KV blocks).
    """

    def __init__(self, config: EngineConfig, routing: Routing, exchange: Exchange) -> None:
        torch.set_num_threads(config.threads)
        self.config = config
        self.device = torch.device(config.device)
        self.model = MoEModel(config.model, config.dtype)
        self.summary = self.model.summary
        if config.max_model_len > self.summary.max_positions:
            raise ValueError(
                f"max_model_len is {config.max_model_len}, but {config.model} has {self.summary.max_positions} "
                f"positions; lower max_model_len"
            )
        self.model.allocate_slots(routing.num_slots, self.device)
        self.adopt(routing, exchange)
        self.loader = WeightLoader(self.model, self.device)
        with torch.inference_mode():
            self.loader.load_dense()
            if cpu.supported(self.model.dtype, self.device):
                self._prepare_for_cpu()
            self.loader.load_experts(routing.own_slots)
        self.loader.checkpoint.close()
        logger.info("read %.1f MiB of weights from %s", self.loader.checkpoint.bytes_read / 2**20, config.model)
        self.num_kv_blocks = self._count_blocks()
        self.model.attention = self._make_attention()

    def adopt(self, routing: Routing, exchange: Exchange) -> None:
        """Run the next step in another epoch or with another map; experts must stand in their slots already."""
        self.model.experts.adopt(routing, exchange)

    @torch.inference_mode()
    def step(self, batch: Batch, tokens_per_rank: Sequence[int]) -> torch.Tensor:
        """Logits, float32 ``[S, vocab]``, one row for each of ``batch.sampling_slices``.

        ``tokens_per_rank`` is the same list on every rank, by rank index; this rank's entry is ``batch.num_tokens``.
        Raises StepFailed; PeerLost, when the step is void; ExpertsBroken, when this rank cannot go on.
        """
        self.model.experts.begin(tokens_per_rank)
        try:
            return self._forward(batch)
        except (PeerLost, ExpertsBroken):
            raise
        except Exception as error:
            self.model.experts.finish()
            raise StepFailed(f"the model raised {type(error).__name__}: {error}") from error

    @torch.inference_mode()
    def make_expert(self, layer: int, expert: int) -> Any:
        """Reads one expert of a MoE layer from the checkpoint, ready for ``put_expert``."""
        return self.loader.make_expert(layer, expert)

    @torch.inference_mode()
    def put_expert(self, layer: int, slot: int, made: Any) -> None:
        self.model.experts.layers[layer].put(slot, made)

    def warm_up(self) -> None:
        """Runs steps of the usual shapes with nobody else, so that the first real one takes no longer than others.

        Before the first request only: it scribbles into the KV cache.
        """
        experts = self.model.experts
        routing, exchange = experts.routing, experts.exchange
        self.adopt(routing.alone(), SoloExchange())
        size = self.config.block_size
        prompt = [0] * min(size, self.config.max_num_batched_tokens)
        sequences = range(min(WARM_UP_SEQUENCES, self.num_kv_blocks, self.config.max_num_seqs))
        for batch in (
            Batch((_rehearsal(prompt, 0, 0),)),
            Batch((_rehearsal([0], len(prompt) - 1, 0),)),
            Batch(tuple(_rehearsal([0], len(prompt) - 1, block) for block in sequences)),
        ):
            self.step(batch, [batch.num_tokens])
        experts.chosen[:] = experts.computed = 0
        self.adopt(routing, exchange)

    @torch.inference_mode()
    def dummy_step(self, tokens_per_rank: Sequence[int]) -> None:
        """Serve the peers' rows in a step in which this rank has no tokens. Raises PeerLost, ExpertsBroken."""
        self.model.experts.begin(tokens_per_rank)
        self.model.experts.finish()

    def _forward(self, batch: Batch) -> torch.Tensor:
        tokens: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        for part in batch.slices:
            tokens += part.tokens
            positions += range(part.start, part.start + len(part.tokens))
            if part.samples:
                last.append(len(tokens) - 1)
        self.model.attention.begin(batch)
        inputs = torch.tensor([tokens, positions], device=self.device)
        output = self.model.module(
            input_ids=inputs[:1],
            position_ids=inputs[1:],
            use_cache=False,
            logits_to_keep=torch.tensor(last, dtype=torch.long, device=self.device),
        )
        logits: torch.Tensor = output.logits
        return logits[0].float()

    def _prepare_for_cpu(self) -> None:
        # Numba is needed, and takes its time to import, on CPUs only.
        from actors.engine.cpu.fuse import fuse
        from actors.engine.cpu.linear import join

        joined = join(self.model.linear_groups)
        if self.model.dtype == torch.float32:
            fuse(self.model, joined)

    def _make_attention(self) -> PagedAttention:
        shapes, block_size, dtype = self.model.kv_shapes, self.config.block_size, self.model.dtype
        if self.device.type == "cpu" and dtype == torch.float32:
            from actors.engine.attention.compiled import CompiledPagedAttention

            return CompiledPagedAttention(shapes, self.num_kv_blocks, block_size)
        return TorchPagedAttention(shapes, self.num_kv_blocks, block_size, dtype, self.device)

    def _count_blocks(self) -> int:
        config = self.config
        block = bytes_per_block(self.model.kv_shapes, config.block_size, self.model.dtype)
        if config.kv_blocks is not None:
            blocks, source = config.kv_blocks, "as configured"
        else:
            free = _free_bytes(self.device)
            blocks = int(free * config.memory_fraction) // block
            source = f"{config.memory_fraction:.0%} of {free / 2**20:.0f} MiB free"
        needed = -(-config.max_model_len // config.block_size)
        logger.info(
            "KV cache: %s: %d blocks of %d tokens, %d bytes each, %.1f MiB; %d tokens in all",
            source, blocks, config.block_size, block, blocks * block / 2**20, blocks * config.block_size,
        )  # fmt: skip
        if blocks < needed:
            raise ValueError(
                f"the KV cache has {blocks} blocks ({source}), but one request of max_model_len {config.max_model_len} "
                f"needs {needed}; lower max_model_len, or raise kv_blocks or memory_fraction"
            )
        return blocks


def ready(index: int, expert_map: ExpertMap, config: EngineConfig, report: Callable[[str], None]) -> ModelRunner:
    """A runner with the weights that member ``index`` holds by ``expert_map``, warmed up; not in any group yet.

    ``report`` is told what is being done. Raises as ``ModelRunner`` does.
    """
    report(f"loading weights of {config.model}")
    runner = ModelRunner(config, Routing(expert_map, index), SoloExchange())
    report("warming up")
    runner.warm_up()
    return runner


def _rehearsal(tokens: list[int], start: int, block: int) -> Slice:
    return Slice("warm-up", tokens, start, [block], True, tokens, [], SamplingParams(max_tokens=1))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free
