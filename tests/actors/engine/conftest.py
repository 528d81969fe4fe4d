"""What several tests of the engine run under."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=["one thread", "two threads", "no OpenMP"])
def thread_pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled loops on the threads they may find."""
    from actors.engine.cpu import threads

    before = torch.get_num_threads()
    torch.set_num_threads(1 if request.param == "one thread" else 2)
    if request.param == "no OpenMP":
        monkeypatch.setattr(threads, "_parallel", None)
    yield
    torch.set_num_threads(before)
