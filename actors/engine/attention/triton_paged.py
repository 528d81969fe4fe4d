"""Paged attention on GPUs: Triton kernels over KV pools, and for long prompts FlashAttention 4 or torch's attention."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from actors.engine.attention.base import KVShape
from actors.engine.cuda import flash
from actors.engine.cuda.attend_decode import MAX_SPLITS, decode
from actors.engine.cuda.attend_joint import decode_joint
from actors.engine.cuda.attend_prefill import prefill
from actors.engine.cuda.inputs import Chunk, StepInputs
from actors.engine.cuda.paged import store
from actors.engine.cuda.rotary import Heads, split_and_keep, split_and_rotate

# Programs of a decode kernel that keep a GPU busy: two per multiprocessor of an H100. A captured step with prompts has
# room for more decodes than are there, and launches so many times as many.
PROGRAMS, SPARSE = 264, 4
# Without FlashAttention 4, a whole prompt of this many rows or more goes to torch's attention, padded to a multiple of
# DENSE_STEP because cuDNN makes a plan for every shape it meets.
DENSE_ROWS, DENSE_STEP = 4096, 256
DENSE_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


class _Run(NamedTuple):
    """Neighbouring sequences that one launch takes, with at most so many rows; ``chunks`` where the host knows them."""

    dense: bool
    chunks: list[Chunk]
    sequences: range
    rows: int


class TritonPagedAttention:
    """See ``PagedAttention``, except that ``begin`` takes ``StepInputs``. float32, bfloat16 or float16.

    ``keys[layer]`` and ``values[layer]`` are pools ``[num_blocks, kv_heads, block_size, width]``: slot ``s`` of
    ``targets`` stands at ``[s // block_size, :, s % block_size]``. All but ``begin`` may be captured in a step that is
    padded.
    """

    def __init__(
        self, shapes: Sequence[KVShape], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.device = device

        def pool(heads: int, width: int) -> torch.Tensor:
            return torch.zeros(num_blocks, heads, block_size, width, dtype=dtype, device=device)

        self.keys = [pool(shape.heads, shape.key_width) for shape in shapes]
        self.values = [pool(shape.heads, shape.value_width) for shape in shapes]
        # Never made anew: captured graphs point at it. Only launches of fewer sequences times heads split any.
        self._arrivals = torch.zeros(SPARSE * PROGRAMS, dtype=torch.int32, device=device)
        self._varlen = flash.load(dtype, device)

    def begin(self, step: StepInputs) -> None:
        """Attend as ``step`` says from now on; read again at each call, so a graph may be replayed after a refill."""
        self._inputs = step
        self._packed = sum(chunk.count for chunk in step.chunks or () if flash.suits(chunk)) >= flash.LEAST_IN_STEP

    def forward(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
        return self.store_and_attend(layer, query, key, value, scaling, window, sinks)[None]

    def store_and_attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """``forward`` with ``[T, heads, width]`` tensors, of any strides, and ``[T, heads, value_width]`` as result."""
        store(key, value, self._inputs.targets, self.keys[layer], self.values[layer])
        return self.attend(layer, query, scaling, window, sinks, (key, value))

    def attend_joint(
        self,
        layer: int,
        joint: torch.Tensor,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        heads: Heads,
        scaling: float,
        window: int | None,
        sinks: torch.Tensor | None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``joint [T, ...]``, see ``Heads``, to ``[T, heads, width]``; its keys and values are stored.

        With ``rows [S]``, integers, the last row of each of the step's sequences: to ``[S, heads, width]`` of these.
        """
        inputs, keys, values = self._inputs, self.keys[layer], self.values[layer]
        if rows is not None:
            # A sequence's last row sees all of its tokens, as a decode does.
            query = split_and_rotate(joint, cosine, sine, heads, keys, values, inputs.targets).index_select(0, rows)
            out = torch.empty_like(query)
            self._decode(layer, query, inputs.lengths, out, scaling, window, sinks)
            return out
        # More rows would each be turned by several programs, to no measured gain; float32 takes the kernels that give a
        # row the same result whatever stands beside it.
        if len(joint) == inputs.decodes == 1 and self.dtype != torch.float32:
            out = joint.new_empty(1, heads.query, heads.width)
            decode_joint(
                joint, cosine, sine, heads, keys, values, inputs.targets, inputs.tables, inputs.lengths, out,
                scaling, window, sinks, self._splits(1, heads.shared), self._arrivals,
            )  # fmt: skip
            return out
        if any(self._dense(chunk, layer, window, sinks) for chunk in inputs.chunks or ()):
            parts = split_and_keep(joint, cosine, sine, heads)
            return self.store_and_attend(layer, *parts, scaling, window, sinks)
        query = split_and_rotate(joint, cosine, sine, heads, keys, values, inputs.targets)
        return self.attend(layer, query, scaling, window, sinks)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        scaling: float,
        window: int | None,
        sinks: torch.Tensor | None,
        new: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """``query [T, heads, key_width]`` to ``[T, heads, value_width]``; this step's keys and values are stored.

        ``new`` are those keys and values ``[T, kv_heads, .]``, by which whole prompts may go; flash.py says when
        they are changed. Without them all goes by the pools.
        """
        inputs, keys, values = self._inputs, self.keys[layer], self.values[layer]
        decodes = inputs.decodes
        runs = self._runs(layer, window, sinks, new is not None)
        out: torch.Tensor | None = None
        for run in runs:
            if run.dense and new is not None:
                out = self._attend_prompts(layer, run.chunks, query, *new, scaling, window, sinks, out)
        if out is None:
            out = query.new_empty(len(query), query.shape[1], values.shape[3])
        if decodes:
            self._decode(layer, query[:decodes], inputs.decode_lengths, out, scaling, window, sinks)
        for run in runs:
            if not run.dense:
                prefill(
                    query, keys, values, inputs.tables, inputs.starts, inputs.lengths, inputs.chunk_span,
                    run.sequences, run.rows, out, scaling, window, sinks,
                )  # fmt: skip
        return out

    def _decode(
        self,
        layer: int,
        query: torch.Tensor,
        lengths: torch.Tensor,
        out: torch.Tensor,
        scaling: float,
        window: int | None,
        sinks: torch.Tensor | None,
    ) -> None:
        """One row each of the first sequences, ``query [S, heads, key_width]``, to ``out [S or more, ...]``."""
        keys, values = self.keys[layer], self.values[layer]
        decode(
            query, keys, values, self._inputs.tables, lengths, out, scaling, window, sinks,
            self._splits(len(query), keys.shape[1]), self._arrivals,
        )  # fmt: skip

    def _splits(self, sequences: int, kv_heads: int) -> int:
        """Programs per sequence and KV head, from what a captured graph has fixed.

        One in float32, so that a result does not depend on how many others there are.
        """
        if self.dtype == torch.float32:
            return 1
        programs = SPARSE * PROGRAMS if self._inputs.chunks is None else PROGRAMS
        return max(1, min(MAX_SPLITS, programs // (sequences * kv_heads)))

    def _flash(self, layer: int) -> bool:
        return (
            self._varlen is not None
            and self._packed
            and flash.fits(self.keys[layer].shape[3], self.values[layer].shape[3])
        )

    def _dense(self, chunk: Chunk, layer: int, window: int | None, sinks: torch.Tensor | None) -> bool:
        """Whether it is a whole prompt long enough for an attention over keys and values as they come."""
        if self._flash(layer):
            return flash.suits(chunk)
        if chunk.start or chunk.count < DENSE_ROWS or window is not None or sinks is not None:
            return False
        return self._plain(self.keys[layer].shape[3], self.values[layer].shape[3])

    def _runs(self, layer: int, window: int | None, sinks: torch.Tensor | None, new: bool) -> list[_Run]:
        """This step's chunks as launches take them, ``_dense`` ones only with ``new``. torch takes one at a time."""
        inputs, together = self._inputs, self._flash(layer)
        if inputs.chunks is None:
            return [_Run(False, [], range(inputs.sequences), inputs.rows)]

        def way(chunk: Chunk) -> tuple[bool, int]:
            dense = new and self._dense(chunk, layer, window, sinks)
            return dense, chunk.sequence if dense and not together else 0

        runs = []
        for (dense, _), group in groupby(inputs.chunks, way):
            run = list(group)
            sequences = range(run[0].sequence, run[-1].sequence + 1)
            runs.append(_Run(dense, run, sequences, sum(chunk.count for chunk in run)))
        return runs

    def _attend_prompts(
        self,
        layer: int,
        prompts: list[Chunk],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
        sinks: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        """Writes the rows of ``prompts`` to ``out``, or, with no copy, to what it returns in its place."""
        span = slice(prompts[0].first, prompts[-1].first + prompts[-1].count)
        if self._varlen is not None and self._flash(layer):
            starts = self._inputs.starts
            result = flash.attend(self._varlen, prompts, query, key, value, starts, scaling, window, sinks)
            if out is None:
                return result
            out[span] = result[span]
            return out
        result = self._causal(query[span], key[span], value[span], scaling)
        if len(result) == len(query):
            return result
        if out is None:
            out = query.new_empty(len(query), query.shape[1], value.shape[2])
        out[span] = result
        return out

    def _plain(self, key_width: int, value_width: int) -> bool:
        fits = key_width == value_width and key_width % 8 == 0 and key_width <= 256
        return fits and self.dtype != torch.float32 and self.device.type == "cuda"

    def _causal(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """A whole prompt by torch: ``query [n, heads, w]``, ``key`` and ``value [n, kv_heads, w]``, to its shape."""
        count = len(query)
        rest = -count % DENSE_STEP
        parts = [query, key, value]
        if rest:
            parts = [torch.cat([part, part.new_zeros(rest, *part.shape[1:])]) for part in parts]
        query, key, value = (part.transpose(0, 1)[None] for part in parts)
        with sdpa_kernel(DENSE_BACKENDS, set_priority=True):
            result = scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] > key.shape[1]
            )
        return result[0].transpose(0, 1)[:count]
