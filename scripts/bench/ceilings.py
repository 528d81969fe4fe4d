"""What a GPU reaches at best, and how long work on it takes: what every measurement there stands beside."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy on the device."""
    source = torch.randint(256, (2 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / timed(lambda: target.copy_(source))


def matrix_rate() -> float:
    """Operations per second of a large bf16 product of random matrices."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / timed(lambda: a @ b)


def timed(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median seconds of ``call`` on the device."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)
