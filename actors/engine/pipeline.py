"""Steps of one rank, of which one may be launched before the tokens of the one before it are known."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from actors.engine.batch import Batch, Sampled
from actors.engine.runner import ModelRunner
from actors.engine.sampler import Sampling
from actors.wire import Failure


class _Launched(NamedTuple):
    batch: Batch
    sampling: Sampling
    mark: Any


class Pipeline:
    """Launches steps of ``runner`` and takes their tokens, in order."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._launched: deque[_Launched] = deque()

    def __len__(self) -> int:
        """Steps launched whose tokens were not taken."""
        return len(self._launched)

    def launch(self, batch: Batch, tokens_per_rank: Sequence[int]) -> None:
        """Raises as ``ModelRunner.step`` does; then nothing was launched."""
        before = self._launched[-1].sampling.tokens if self._launched else None
        sampling = Sampling(self._runner.step(batch, tokens_per_rank, before), batch.sampling_slices)
        self._launched.append(_Launched(batch, sampling, self._runner.mark()))

    def land(self) -> tuple[Batch, list[Sampled | Failure]]:
        """Waits for the earliest step: its batch and what ``Scheduler.commit`` wants. Raises PeerLost: it was void."""
        launched = self._launched.popleft()
        self._runner.wait(launched.mark)
        return launched.batch, launched.sampling.results()
