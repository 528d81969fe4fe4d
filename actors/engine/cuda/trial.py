"""Side by side on random input: a module's own forward and one that may take its place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from actors.engine.model import MoEModel

# The largest relative error of a row, which may come from another order of sums and from where they are rounded.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Of the rows of a sample: a module that clips shows it at one of them.
_SCALES = (0.1, 1.0, 10.0)
_judging = True


class Trial:
    """Random input for the modules of ``model``, whose weights must be loaded, and stand-ins for what they call."""

    def __init__(self, model: MoEModel) -> None:
        self.model = model
        self.device = next(model.module.parameters()).device
        self.generator = torch.Generator().manual_seed(0)

    def random(self, *shape: int) -> torch.Tensor:
        """Normal, in the model's dtype."""
        return torch.randn(shape, generator=self.generator).to(self.device, self.model.dtype)

    def integers(self, below: int, count: int) -> torch.Tensor:
        """``[1, count]`` of ``0 .. below - 1``, int32 as in a step."""
        return torch.randint(below, (1, count), generator=self.generator).to(self.device, torch.int32)

    def hidden(self, width: int, rows: int = len(_SCALES)) -> torch.Tensor:
        """``[1, rows, width]``, the rows of different size."""
        scales = torch.tensor(_SCALES[:rows], device=self.device, dtype=self.model.dtype)
        return self.random(1, rows, width) * scales[:, None]

    def arguments(self, width: int, rows: int = len(_SCALES)) -> dict[str, Any]:
        """What a decoder gives its layers beside the hidden states ``[1, rows, width]``."""
        highest = self.model.summary.max_positions
        positions = torch.randint(highest, (1, rows), generator=self.generator).to(self.device)
        rotary = next((m for m in self.model.module.modules() if hasattr(m, "inv_freq")), None)
        x = self.random(1, rows, width)
        angles = None if rotary is None else attempt(lambda: rotary(x, position_ids=positions))
        return {
            "attention_mask": None, "position_ids": positions, "past_key_values": None, "use_cache": False,
            "position_embeddings": angles,
        }  # fmt: skip

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[tuple[Any, ...]]]:
        """Attention gives its queries back and writes its arguments to the list; experts give their rows weighted."""
        model: Any = self.model
        before = {name: getattr(model, name) for name in ("attention", "experts") if hasattr(model, name)}
        recorder = _Recorder()
        model.attention, model.experts = recorder, _Weigher()
        try:
            yield recorder.calls
        finally:
            for name in ("attention", "experts"):
                delattr(model, name)
            for name, value in before.items():
                setattr(model, name, value)


class _Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def forward(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *settings: Any
    ) -> torch.Tensor:
        self.calls.append((layer, query, key, value, *settings))
        return query.transpose(1, 2)[..., : value.shape[-1]]


class _Weigher:
    def forward(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return hidden * weights.sum(-1, keepdim=True).to(hidden.dtype)

    def narrow(self, rows: int, count: torch.Tensor) -> None:
        pass


def attempt(call: Callable[[], Any]) -> Any:
    """None when it raises: a module that wants other arguments is not one of those meant here."""
    try:
        return call()
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):
        return None


@contextlib.contextmanager
def unjudged() -> Iterator[None]:
    """All that has the right shape and dtype agrees, whatever it is: kernels are only compiled."""
    global _judging
    _judging = False
    try:
        yield
    finally:
        _judging = True


def error(own: Any, fused: Any) -> float:
    """The largest relative error of a row of ``fused``; infinite where shapes or dtypes differ, or NaN appears."""
    if not isinstance(own, torch.Tensor) or not isinstance(fused, torch.Tensor):
        return float("inf")
    if own.shape != fused.shape or own.dtype != fused.dtype:
        return float("inf")
    if not _judging:
        return 0.0
    difference = (own.double() - fused.double()).norm(dim=-1)
    worst = float((difference / own.double().norm(dim=-1).clamp_min(1e-30)).max())
    return worst if worst == worst else float("inf")


def errors(own: Sequence[Any], fused: Sequence[Any]) -> float:
    return max(map(error, own, fused))
