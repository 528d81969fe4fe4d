"""Modules of a loaded model whose forward is one or two compiled loops instead of a dozen operators.

Which modules those are is not a list of model families. A candidate is recognised by its parts, its fused forward is
run beside its own on random input, and it is taken only when both agree; any other module stays as it is.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from actors.engine.cpu import kernels
from actors.engine.cpu.linear import Linear
from actors.engine.model import MoEModel

logger = logging.getLogger(__name__)

Joined = Mapping[tuple[torch.nn.Linear, ...], Linear]
_SAMPLE_ROWS = 3
_TOLERANCE = 1e-5  # of the largest element


def fuse(model: MoEModel, joined: Joined) -> None:
    """Give the modules of ``model`` (float32, dense weights loaded) faster forwards; ``joined`` as ``join`` made it."""
    generator = torch.Generator().manual_seed(0)
    counts: Counter[str] = Counter()
    for module in model.module.modules():
        for name, replace in (("norms", _norm), ("MLPs", _mlp), ("attentions", _attention)):
            if replace(module, model, joined, generator):
                counts[name] += 1
    logger.info("fused %s", ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing")


def _norm(module: Any, model: MoEModel, joined: Joined, generator: torch.Generator) -> bool:
    weight: Any = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or epsilon is None or not _is_float32(weight):
        return False
    scale = weight.detach().contiguous()

    def forward(x: torch.Tensor) -> torch.Tensor:
        return kernels.rms_norm(x, scale, epsilon)

    return _take(module, forward, torch.randn(1, _SAMPLE_ROWS, len(scale), generator=generator))


def _mlp(module: Any, model: MoEModel, joined: Joined, generator: torch.Generator) -> bool:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    inner = joined.get(tuple(parts[:2]))  # type: ignore[arg-type]
    outer = joined.get(tuple(parts[2:]))  # type: ignore[arg-type]
    if inner is None or outer is None or not _is_float32(parts[0].weight):  # type: ignore[union-attr]
        return False

    def forward(x: torch.Tensor) -> torch.Tensor:
        return outer(kernels.silu_and_mul(inner(x)))

    return _take(module, forward, torch.randn(1, _SAMPLE_ROWS, parts[0].in_features, generator=generator))  # type: ignore[union-attr]


class _Recorder:
    """Takes the place of the paged attention and keeps what it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def begin(self, batch: Any) -> None: ...

    def forward(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *settings: Any
    ) -> torch.Tensor:
        self.calls.append((layer, query, key, value, *settings))
        return query.transpose(1, 2)


def _attention(module: Any, model: MoEModel, joined: Joined, generator: torch.Generator) -> bool:
    parts = tuple(getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj"))
    inner, outer = joined.get(parts), getattr(module, "o_proj", None)  # type: ignore[arg-type]
    width = getattr(module, "head_dim", None)
    if inner is None or outer is None or width is None or not _is_float32(outer.weight):
        return False
    heads, shared = inner.sizes[0] // width, inner.sizes[1] // width
    if inner.sizes != [heads * width, shared * width, shared * width]:
        return False
    angles = torch.rand(1, _SAMPLE_ROWS, width // 2, generator=generator).repeat(1, 1, 2)
    sample = torch.randn(1, _SAMPLE_ROWS, parts[0].in_features, generator=generator)  # type: ignore[union-attr]
    recorder = _Recorder()
    model.attention = recorder
    own = attempt(lambda: module.forward(sample, position_embeddings=(angles.cos(), angles.sin()), attention_mask=None))
    if own is None or len(recorder.calls) != 1 or recorder.calls[0][3].shape[3] != width:
        return False
    layer, _, _, _, *settings = recorder.calls[0]

    def forward(
        hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any
    ) -> tuple[torch.Tensor, None]:
        tokens = hidden_states.shape[1]
        cosine, sine = (part[0] for part in position_embeddings)
        parts = kernels.split_and_rotate(inner(hidden_states)[0], cosine, sine, heads, shared)
        query, key, value = (part.transpose(0, 1)[None] for part in parts)
        output = model.attention.forward(layer, query, key, value, *settings)
        return outer(output.reshape(1, tokens, -1)), None

    result = attempt(lambda: forward(sample, position_embeddings=(angles.cos(), angles.sin())))
    first, second = recorder.calls[0], recorder.calls[-1]
    if result is None or not all(map(agree, (own[0], *first[1:4]), (result[0], *second[1:4]))):
        return False
    module.forward = forward
    return True


def _is_float32(weight: Any) -> bool:
    return isinstance(weight, torch.Tensor) and weight.dtype == torch.float32


def _take(module: Any, forward: Callable[[torch.Tensor], torch.Tensor], sample: torch.Tensor) -> bool:
    if not agree(attempt(lambda: module.forward(sample)), attempt(lambda: forward(sample))):
        return False
    module.forward = forward
    return True


def attempt(call: Callable[[], Any]) -> Any:
    """None when it raises: a module that wants other arguments is not one of those meant here."""
    try:
        return call()
    except (TypeError, ValueError, RuntimeError):
        return None


def agree(own: torch.Tensor | None, fused: torch.Tensor | None, tolerance: float = _TOLERANCE) -> bool:
    """Whether two results are of one shape and differ by rounding at most."""
    if own is None or fused is None or own.shape != fused.shape:
        return False
    return bool((own - fused).abs().max() <= tolerance * own.abs().max())
