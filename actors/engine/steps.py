"""How a batch is computed: the seam between the model runner and a kind of device."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from actors.engine.attention.base import bytes_per_block
from actors.engine.attention.torch_sdpa import TorchPagedAttention
from actors.engine.batch import Batch, Slice
from actors.engine.config import EngineConfig
from actors.engine.model import MoEModel
from actors.wire import SamplingParams

if TYPE_CHECKING:  # Numba is needed on CPUs only
    from actors.engine.cpu.decoder import Decoder

logger = logging.getLogger(__name__)

WARM_UP_SEQUENCES = 8
_TRIED_ROWS = 4
_DEEP_TOLERANCE = 1e-3  # of the largest logit: rounding grows from layer to layer


class Steps(Protocol):
    """The steps of one rank, over ``num_kv_blocks`` KV blocks. ``asynchronous``: they are launched, not waited for."""

    num_kv_blocks: int
    asynchronous: bool

    def run(self, batch: Batch, drawn: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[S, vocab]``, one row for each of ``batch.sampling_slices``; they stand until the next step.

        ``drawn``, int64, on the device: the tokens that slices follow.
        """

    def idle(self) -> None:
        """A step without rows of this rank: its experts serve the others."""

    def mark(self) -> Any:
        """What to wait for until everything launched so far is complete."""

    def wait(self, mark: Any) -> None:
        """Wait for what ``mark`` gave. Raises PeerLost when a lost peer has made the step before it void."""

    def warm_up(self) -> None:
        """Run, or capture, steps of the usual shapes; the group is this rank alone. Scribbles into the KV cache."""


class EagerSteps:
    """Operator by operator, with the attention that suits a CPU."""

    asynchronous = False

    def __init__(self, model: MoEModel, config: EngineConfig, decoder: Decoder | None = None) -> None:
        self.model = model
        self.config = config
        self._decoder: Decoder | None = None
        self.num_kv_blocks = self._count_blocks()
        attention = model.attention = self._make_attention()
        if config.kv_blocks is None:
            # All of it at once, so that the next rank of this machine does not find free what this one counts on.
            for pool in (*attention.keys, *attention.values):
                pool.zero_()
        if decoder is not None:
            self._try(decoder)

    def run(self, batch: Batch, drawn: torch.Tensor | None = None) -> torch.Tensor:
        tokens: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        for part in batch.slices:
            tokens += part.tokens if part.follows is None or drawn is None else [int(drawn[part.follows])]
            positions += range(part.start, part.start + len(part.tokens))
            if part.samples:
                last.append(len(tokens) - 1)
        self.model.attention.begin(batch)
        inputs = torch.tensor([tokens, positions])
        if self._decoder is not None and self._decoder.suits(len(tokens)):
            return self._decoder.logits(inputs[0], inputs[1], last)
        output = self.model.module(
            input_ids=inputs[:1],
            position_ids=inputs[1:],
            use_cache=False,
            logits_to_keep=torch.tensor(last, dtype=torch.long),
        )
        logits: torch.Tensor = output.logits
        return logits[0].float()

    def idle(self) -> None:
        self.model.experts.finish()

    def mark(self) -> None:
        pass  # operators of a CPU are complete when they return

    def wait(self, mark: None) -> None:
        pass

    def warm_up(self) -> None:
        size = self.config.block_size
        prompt = [0] * min(size, self.config.max_num_batched_tokens)
        sequences = range(min(WARM_UP_SEQUENCES, self.num_kv_blocks, self.config.max_num_seqs))
        for batch in (
            Batch((rehearsal(prompt, 0, [0]),)),
            Batch((rehearsal([0], len(prompt) - 1, [0]),)),
            Batch(tuple(rehearsal([0], len(prompt) - 1, [block]) for block in sequences)),
        ):
            self.model.experts.begin([batch.num_tokens])
            self.run(batch)

    def _try(self, decoder: Decoder) -> None:
        """Takes ``decoder`` if its logits are those of the model, of some rows. The group is this rank alone."""
        from actors.engine.cpu.fuse import agree, attempt

        length = min(_TRIED_ROWS, self.config.block_size, self.config.max_num_batched_tokens)
        tokens = torch.arange(length) * 7919 % self.model.summary.vocab_size
        batch = Batch((rehearsal(tokens.tolist(), 0, [0]),))
        self.model.experts.begin([length])
        own = self.run(batch)
        self._decoder = decoder
        self.model.experts.begin([length])
        if not agree(own, attempt(lambda: self.run(batch)), _DEEP_TOLERANCE):
            self._decoder = None
        logger.info("decoder runs as %s", "modules" if self._decoder is None else "one program")

    def _make_attention(self) -> Any:
        shapes, block_size, dtype = self.model.kv_shapes, self.config.block_size, self.model.dtype
        if dtype == torch.float32:
            from actors.engine.attention.compiled import CompiledPagedAttention

            return CompiledPagedAttention(shapes, self.num_kv_blocks, block_size)
        return TorchPagedAttention(shapes, self.num_kv_blocks, block_size, dtype, torch.device("cpu"))

    def _count_blocks(self) -> int:
        config = self.config
        block = bytes_per_block(self.model.kv_shapes, config.block_size, self.model.dtype)
        if config.kv_blocks is not None:
            blocks, source = config.kv_blocks, "as configured"
        else:
            free = _free_bytes()
            blocks = int(free * config.memory_fraction) // block
            source = f"{config.memory_fraction:.0%} of {free / 2**20:.0f} MiB free"
        logger.info(
            "KV cache: %s: %d blocks of %d tokens, %d bytes each, %.1f MiB; %d tokens in all",
            source, blocks, config.block_size, block, blocks * block / 2**20, blocks * config.block_size,
        )  # fmt: skip
        needed = -(-config.max_model_len // config.block_size)
        if blocks < needed:
            raise ValueError(
                f"the KV cache has {blocks} blocks ({source}), but one request of max_model_len {config.max_model_len} "
                f"needs {needed}; lower max_model_len, or raise kv_blocks or memory_fraction"
            )
        return blocks


def rehearsal(tokens: list[int], start: int, blocks: list[int]) -> Slice:
    """A slice of no request."""
    return Slice("warm-up", tokens, start, blocks, True, tokens, [], SamplingParams(max_tokens=1))


def _free_bytes() -> int:
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free
