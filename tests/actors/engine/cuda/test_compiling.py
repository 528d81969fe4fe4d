"""Kernels that are only compiled: nothing runs meanwhile, and everything does afterwards. Needs a GPU."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from actors.engine.cuda.compiling import only_compiling

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: needs a GPU")
DEVICE = torch.device("cuda")


@triton.jit
def _add(values, amount, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    at = values + tl.arange(0, COUNT)
    tl.store(at, tl.load(at) + amount)


def add(values: torch.Tensor, amount: float) -> None:
    _add[(1,)](values, amount, COUNT=len(values))


def test_kernels_run_afterwards_and_not_before() -> None:
    some, more = (torch.zeros(count, device=DEVICE) for count in (16, 32))
    with only_compiling():
        for _ in range(3):
            add(some, 1.0)
            add(more, 2.0)
    assert not some.any() and not more.any()
    add(some, 1.0)
    add(more, 2.0)
    assert (some == 1).all() and (more == 2).all()


def test_what_can_not_be_compiled_raises_when_it_is_to_run() -> None:
    values = torch.zeros(16, device=DEVICE)
    with only_compiling():
        _add[(1,)](values, 1.0, COUNT=15)
        add(values, 1.0)
    with pytest.raises(Exception, match="power of 2"):
        _add[(1,)](values, 1.0, COUNT=15)
    add(values, 1.0)
    assert (values == 1).all()
