"""Decoder layers ``h = x + attention(norm(x))``, ``h + mlp(norm(h))``, with each sum and the norm after it as one.

The last sum of a layer has its norm in the next layer, or after the last one. So a layer gives its residual and what is
to be added to it, where the next reader is known to take them; then no sum stands alone. A single row goes to whoever
can take it even before its norm: for one row, a kernel more costs as much as the product that follows.

What the last layer gives is read at the rows whose logits are wanted, and nowhere else: behind its keys and values,
it need not compute the other rows of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from actors.engine.cuda.elementwise import add_rms_norm, rms_norm
from actors.engine.cuda.one_row import Row
from actors.engine.cuda.trial import TOLERANCE, Trial, attempt, error
from actors.engine.model import MoEModel

# What a module gives for a ``Row``, with the arguments that its forward gets besides, and that row before its norm.
OfRow = Callable[..., tuple[torch.Tensor, torch.Tensor]]
# What an attention module gives for hidden states ``[1, T, hidden]`` at rows ``[S]``: ``[1, S, hidden]``. Keys and
# values are of all rows.
OfRows = Callable[..., torch.Tensor]


@dataclass
class Norm:
    """A fused RMS norm; see ``rms_norm``."""

    weight: torch.Tensor
    epsilon: float
    round_before_scale: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.epsilon, self.round_before_scale)

    def of_sum(self, x: torch.Tensor, delta: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """``x + delta``, or ``x`` without one, and its norm."""
        if delta is None:
            return x, self(x)
        return add_rms_norm(x, delta, self.weight, self.epsilon, self.round_before_scale)


@dataclass
class Unsummed:
    """Hidden states ``x + delta``. Not a tensor, so that whoever does not know it fails."""

    x: torch.Tensor
    delta: torch.Tensor


class Narrowed:
    """Takes what ``model.module`` takes and gives the same logits, but its last layer gives no other rows than those.

    ``logits_to_keep [S]``, integers on the device: the last row of each sequence of this step, in their order, of which
    the first ``count`` (int32 ``[1]``, on the device) are not padding. Keys and values are of all rows. Only for
    ``experts`` that can be narrowed.
    """

    def __init__(self, model: MoEModel) -> None:
        self.model = model
        self.rows: torch.Tensor | None = None
        self.count: torch.Tensor | None = None

    def __call__(self, *, logits_to_keep: torch.Tensor, count: torch.Tensor, **arguments: Any) -> Any:
        self.rows, self.count = logits_to_keep, count
        try:
            return self.model.module(**arguments, logits_to_keep=0)  # 0: all that are left
        finally:
            self.rows = None


class _Layer:
    """The forward of a decoder layer. With ``open_end`` it gives an ``Unsummed``; it always takes one.

    ``attention_of_row`` and ``mlp_of_row``, where there are, take the place of these modules at a single row. The last
    layer may be ``narrowed``, with or without ``attention_of_rows``.
    """

    def __init__(self, module: Any, first: Norm, second: Norm) -> None:
        self.attention, self.mlp, self.first, self.second = module.self_attn, module.mlp, first, second
        self.attention_of_row: OfRow | None = None
        self.mlp_of_row: OfRow | None = None
        self.attention_of_rows: OfRows | None = None
        self.narrowed: Narrowed | None = None
        self.open_end = False

    def __call__(self, hidden_states: torch.Tensor | Unsummed, **arguments: Any) -> torch.Tensor | Unsummed:
        if isinstance(hidden_states, Unsummed):
            x, delta = hidden_states.x, hidden_states.delta
        else:
            x, delta = hidden_states, None
        if self.narrowed is None or self.narrowed.rows is None:
            x, delta = _apply(self.attention, self.attention_of_row, self.first, x, delta, arguments)
        else:
            # What this writes is complete before the rows are selected, and so before any kernel behind that begins.
            self.narrowed.model.experts.narrow(len(self.narrowed.rows), self.narrowed.count)
            x, delta = self._attend(x, delta, self.narrowed.rows, arguments)
        x, delta = _apply(self.mlp, self.mlp_of_row, self.second, x, delta, {})
        return Unsummed(x, delta) if self.open_end else x + delta

    def _attend(
        self, x: torch.Tensor, delta: torch.Tensor | None, rows: torch.Tensor, arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``_apply``, of ``rows`` only."""
        x, normed = self.first.of_sum(x, delta)
        if self.attention_of_rows is not None:
            found = self.attention_of_rows(normed, rows, **arguments)
        else:
            found = self.attention(normed, **arguments)[0].index_select(1, rows)
        return x.index_select(1, rows), found


def _apply(
    module: Any, of_row: OfRow | None, norm: Norm, x: torch.Tensor, delta: torch.Tensor | None, arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x + delta``, and what ``module`` gives for its norm."""
    if of_row is not None and x.numel() == x.shape[-1]:
        delta, x = of_row(Row(x, delta, norm.weight, norm.epsilon, norm.round_before_scale), **arguments)
        return x, delta
    x, normed = norm.of_sum(x, delta)
    found = module(normed, **arguments)
    return x, found[0] if isinstance(found, tuple) else found


def fuse_decoders(
    trial: Trial, norms: Mapping[Any, Norm], of_row: Mapping[Any, OfRow], of_rows: Mapping[Any, OfRows]
) -> tuple[tuple[int, int, int], Narrowed | None]:
    """Fuse the decoder layers whose norms are fused already.

    How many those are, after how many no sum stands, and how many let modules take a row before its norm; and the model
    narrowed, if it can be.
    """
    layers: dict[Any, _Layer] = {}
    ends: list[_Layer] = []
    for module in trial.model.module.modules():
        layer = _layer(module, trial, norms, of_row)
        if layer is not None:
            layers[module] = layer
            module.forward = layer
    opened = 0
    for module in trial.model.module.modules():
        stack, last = getattr(module, "layers", None), norms.get(getattr(module, "norm", None))
        if isinstance(stack, torch.nn.ModuleList) and last is not None and all(layer in layers for layer in stack):
            count = _open(module, [layers[layer] for layer in stack], last, trial)
            if count:
                ends.append(layers[stack[-1]])
                ends[-1].attention_of_rows = of_rows.get(stack[-1].self_attn)
            opened += count
    by_row = sum(layer.attention_of_row is not None or layer.mlp_of_row is not None for layer in layers.values())
    return (len(layers), opened, by_row), _narrow(ends[0], trial) if len(ends) == 1 else None


def _layer(module: Any, trial: Trial, norms: Mapping[Any, Norm], of_row: Mapping[Any, OfRow]) -> _Layer | None:
    first, second = (norms.get(getattr(module, name, None)) for name in ("input_layernorm", "post_attention_layernorm"))
    if first is None or second is None or not hasattr(module, "self_attn") or not hasattr(module, "mlp"):
        return None
    width = len(first.weight)
    x, arguments = trial.hidden(width), trial.arguments(width)
    layer = _Layer(module, first, second)
    with trial.recorded():
        own = attempt(lambda: module.forward(x, **arguments))
        if own is None or error(own, attempt(lambda: layer(x, **arguments))) > TOLERANCE[trial.model.dtype]:
            return None
        layer.attention_of_row, layer.mlp_of_row = of_row.get(module.self_attn), of_row.get(module.mlp)
        x, delta, arguments = trial.hidden(width, 1), trial.hidden(width, 1), trial.arguments(width, 1)
        own = attempt(lambda: module.forward(x + delta, **arguments))
        found = attempt(lambda: layer(Unsummed(x, delta), **arguments))
        if own is None or found is None or error(own, found) > TOLERANCE[trial.model.dtype]:
            layer.attention_of_row = layer.mlp_of_row = None
    return layer


def _open(body: Any, layers: list[_Layer], last: Norm, trial: Trial) -> int:
    """Leave the ends of ``layers`` open if ``body`` hands them on untouched; for how many layers."""
    ids = torch.zeros(1, 3, dtype=torch.long, device=trial.device)
    ids += torch.arange(3, device=trial.device)

    def run() -> Any:
        return attempt(lambda: body(input_ids=ids, position_ids=ids, use_cache=False).last_hidden_state)

    with trial.recorded():
        closed = run()
        if closed is None:
            return 0
        own = body.norm.forward

        def norm(x: torch.Tensor | Unsummed) -> torch.Tensor:
            return last.of_sum(x.x, x.delta)[1] if isinstance(x, Unsummed) else last(x)

        body.norm.forward = norm
        for layer in layers:
            layer.open_end = True
        opened = run()
        if opened is not None and error(closed, opened) <= TOLERANCE[trial.model.dtype]:
            return len(layers)
        body.norm.forward = own
        for layer in layers:
            layer.open_end = False
    return 0


def _narrow(end: _Layer, trial: Trial) -> Narrowed | None:
    """The model narrowed in ``end``, its last layer, if the logits that it keeps stay what they are."""
    ids = torch.arange(3, device=trial.device)[None]
    keep = torch.tensor([0, 2], dtype=torch.int32, device=trial.device)

    def run(model: Any, **more: Any) -> Any:
        arguments = {"input_ids": ids, "position_ids": ids, "use_cache": False, "logits_to_keep": keep}
        return attempt(lambda: model(**arguments, **more).logits)

    with trial.recorded():
        own = run(trial.model.module)
        end.narrowed = Narrowed(trial.model)
        found = run(end.narrowed, count=torch.full_like(keep[:1], len(keep)))
    if own is None or found is None or error(own, found) > TOLERANCE[trial.model.dtype]:
        end.narrowed = None
    return end.narrowed
