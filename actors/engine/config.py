"""What one engine needs to know to build itself; derived from the application's configuration."""

from __future__ import annotations

import msgspec


class EngineConfig(msgspec.Struct, frozen=True):
    """Settings of one DP rank.

    ``model`` is a directory with a Hugging Face checkpoint; ``dtype`` one of ``float32``, ``bfloat16``, ``float16``;
    ``device`` ``cpu`` or ``cuda``. ``kv_blocks`` blocks of ``block_size`` tokens form the KV cache; when None, they are
    what ``memory_fraction`` of the memory holds that the weights, and on cuda the largest step, leave free.
    ``max_model_len`` bounds prompt and completion together. ``max_num_batched_tokens`` bounds the tokens of one step,
    ``max_num_seqs`` its sequences, ``prefill_chunk`` the prompt tokens in it, for each request that is not complete
    yet, while others decode (None: not at all), ``max_queue`` the requests waiting (more are refused as
    ``overloaded``). ``expert_slots`` is the number of physical slots per MoE layer, by default what a group of
    ``min_data_parallel_size`` ranks needs. ``threads`` are torch's intra-op threads. ``load_format`` is ``auto``, the
    checkpoint, or ``dummy``, random weights by ``seed``. On cuda, up to ``max_ranks`` ranks of one machine exchange
    rows through each other's memory. ``cuda_graphs`` are the padded numbers of decodes for which a step is captured
    (None: a ladder up to ``max_num_seqs``), unless it is empty besides others of up to 2,048 rows. ``quantization`` is
    ``auto``, where experts of an FP8 checkpoint stay in FP8 if the device computes with them, or ``dequantize``.
    Timeouts are in seconds.
    """

    model: str
    dtype: str = "float32"
    device: str = "cpu"
    block_size: int = 16
    kv_blocks: int | None = None
    memory_fraction: float = 0.9
    max_model_len: int = 2048
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    prefill_chunk: int | None = None
    max_queue: int = 1024
    expert_slots: int | None = None
    min_data_parallel_size: int = 1
    threads: int = 1
    collective_timeout_s: float = 60.0
    client_timeout_s: float = 5.0
    load_format: str = "auto"
    seed: int = 0
    quantization: str = "auto"
    cuda_graphs: tuple[int, ...] | None = None
    max_ranks: int = 8
