"""Bounds that no client of the HTTP API can cross."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Each bound has a clear error of its own. Times are in seconds, lengths in tokens unless named otherwise.

    ``max_model_len`` bounds prompt plus completion. ``max_queued_requests`` bounds the requests of this front-end that
    have no token yet. ``max_sequences`` bounds prompts times ``n`` of one call. ``start_timeout_s`` is how long a
    request waits for a rank that can be reached.
    """

    max_model_len: int
    max_body_bytes: int = 8 * 1024 * 1024
    max_queued_requests: int = 1024
    max_sequences: int = 128
    max_n: int = 16
    max_stop_strings: int = 16
    max_stop_chars: int = 256
    max_logprobs: int = 20
    max_logit_bias: int = 1024
    request_timeout_s: float = 600.0
    start_timeout_s: float = 60.0
