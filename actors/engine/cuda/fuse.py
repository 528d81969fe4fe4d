"""Modules of a loaded model whose forward is a few kernels instead of dozens.

Which modules those are is not a list of model families. A candidate is recognised by its parts, its fused forward is
run beside its own on random input, and it is taken only when both agree; any other module stays as it is.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from actors.engine.attention.triton_paged import TritonPagedAttention
from actors.engine.cuda.body import fuse_body
from actors.engine.cuda.compiling import only_compiling
from actors.engine.cuda.decoder import Narrowed, Norm, OfRow, OfRows, fuse_decoders
from actors.engine.cuda.elementwise import MAX_NORM_WIDTH, rms_norm, silu_and_mul
from actors.engine.cuda.linear import Linear, join
from actors.engine.cuda.one_row import Row
from actors.engine.cuda.rotary import Heads, split_and_keep
from actors.engine.cuda.router import MAX_CHOSEN, MAX_EXPERTS, Choice, Router, route
from actors.engine.cuda.trial import TOLERANCE, Trial, attempt, error, errors, unjudged
from actors.engine.model import MoEModel

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_ROUTED_ROWS = 16


@torch.inference_mode()
def fuse(model: MoEModel, positions: int) -> Narrowed | None:
    """Give the modules of ``model`` forwards of few kernels. Its dense weights stand where they stay.

    Linear layers of the same input share one weight from here on. Runs every module it may fuse on a few random rows;
    attention and experts are not called, and need not exist. From here on positions have to be below ``positions``.
    Gives the model narrowed to the rows that are kept, if it can be.
    """
    joined = join(model.linear_groups)
    if next(model.module.parameters()).is_cuda:
        _compile(model, joined)
    return _Fuser(model, joined).run(positions)


def _compile(model: MoEModel, joined: dict[tuple[torch.nn.Linear, ...], Linear]) -> None:
    """Compiles most of what fusing runs, several kernels at a time: candidates are taken untried, and given up."""
    own = {module: module.__dict__.get("forward") for module in model.module.modules()}
    with only_compiling(), unjudged():
        _Fuser(model, joined).fuse_modules(list(_distinct(model.module)))
    for module, forward in own.items():
        if forward is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = forward


def _distinct(module: Any) -> Iterator[Any]:
    """``module`` and those in it, but of those in a list that have equal parts only one."""
    yield module
    children = list(module.children())
    if isinstance(module, torch.nn.ModuleList):
        parts = ((type(child), [(name, part.shape) for name, part in child.named_parameters()]) for child in children)
        children = list({str(part): child for part, child in zip(parts, children, strict=True)}.values())
    for child in children:
        yield from _distinct(child)


class _Fuser:
    def __init__(self, model: MoEModel, joined: dict[tuple[torch.nn.Linear, ...], Linear]) -> None:
        self.model, self.joined = model, joined
        self.trial = Trial(model)
        self.tolerance = TOLERANCE[model.dtype]
        self.norms: dict[Any, Norm] = {}
        self.of_row: dict[Any, OfRow] = {}
        self.of_rows: dict[Any, OfRows] = {}

    def run(self, positions: int) -> Narrowed | None:
        counts, narrowed = self.fuse_modules(list(self.model.module.modules()))
        counts["body"], counts["table of angles"] = map(int, fuse_body(self.trial, positions))
        logger.info("fused %s", ", ".join(f"{n} {name}" for name, n in counts.items() if n) or "nothing")
        return narrowed

    def fuse_modules(self, modules: Sequence[Any]) -> tuple[Counter[str], Narrowed | None]:
        """How many of which kind were fused, and the model narrowed."""
        counts: Counter[str] = Counter()
        kinds = (
            ("norms", self._norm),
            ("MLPs", self._mlp),
            ("routers", self._router),
            ("routed blocks", self._routed),
            ("attentions", self._attention),
        )
        for name, attempt_to_fuse in kinds:
            for module in modules:
                if attempt_to_fuse(module):
                    counts[name] += 1
        layers, narrowed = fuse_decoders(self.trial, self.norms, self.of_row, self.of_rows)
        counts["layers"], counts["open layers"], counts["layers by row"] = layers
        counts["narrowed layers"] = int(narrowed is not None)
        counts["joint projections"] = sum(len(group) > 1 for group in self.joined)
        return counts, narrowed

    def _best(self, own: Any, candidates: Sequence[_T], run: Callable[[_T], Any]) -> _T | None:
        """The candidate whose result is nearest to ``own``, of those within the tolerance."""
        if own is None:
            return None
        scored = [(error(own, run(candidate)), place) for place, candidate in enumerate(candidates)]
        worst, place = min(scored, default=(float("inf"), 0))
        return candidates[place] if worst <= self.tolerance else None

    def _norm(self, module: Any) -> bool:
        weight: Any = getattr(module, "weight", None)
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not type(module).__name__.endswith("RMSNorm") or not isinstance(epsilon, float):
            return False
        if not isinstance(weight, torch.Tensor) or weight.dtype != self.model.dtype or len(weight) > MAX_NORM_WIDTH:
            return False
        x = self.trial.hidden(len(weight))
        candidates = [Norm(weight.detach(), epsilon, early) for early in (True, False)]
        norm = self._best(attempt(lambda: module.forward(x)), candidates, lambda candidate: candidate(x))
        if norm is None:
            return False
        module.forward = norm
        self.norms[module] = norm
        return True

    def _mlp(self, module: Any) -> bool:
        parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        inner = self.joined.get(tuple(parts[:2]))  # type: ignore[arg-type]
        outer = self.joined.get(tuple(parts[2:]))  # type: ignore[arg-type]
        if inner is None or outer is None:
            return False

        def forward(x: torch.Tensor) -> torch.Tensor:
            return outer(silu_and_mul(inner(x)))

        x = self.trial.hidden(parts[0].in_features)  # type: ignore[union-attr]
        if self._best(attempt(lambda: module.forward(x)), [forward], lambda candidate: candidate(x)) is None:
            return False
        module.forward = forward
        return True

    def _router(self, module: Any) -> bool:
        weight, top_k = getattr(module, "weight", None), getattr(module, "top_k", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not isinstance(top_k, int):
            return False
        experts, width = weight.shape
        if experts > MAX_EXPERTS or top_k > MAX_CHOSEN or weight.dtype != self.model.dtype:
            return False
        x = self.trial.random(_ROUTED_ROWS, width)
        own = attempt(lambda: module.forward(x))
        if not isinstance(own, tuple) or len(own) != 3 or own[2].shape != (_ROUTED_ROWS, top_k):
            return False
        # In float32 no two experts are equal, so that both choose the same: the way of choosing shows there.
        exact = _in_float32(module, lambda: module.forward(x.float()))
        if exact is None:
            return False
        bias, correction = getattr(module, "bias", None), getattr(module, "e_score_correction_bias", None)
        groups = getattr(module, "num_group", None) or 1
        kept = getattr(module, "topk_group", None) or groups
        factor = float(getattr(module, "routed_scaling_factor", 1.0))
        logits = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
        candidates = [
            Choice(top_k, sigmoid, normalised, torch.float32, correction if sigmoid else None, count, best, factor)
            for count, best in {(1, 1), (groups, kept)}
            for sigmoid, normalised in itertools.product((False, True), repeat=2)
        ]

        def dense(weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            """By expert: the order of the chosen is free. Being chosen counts as well as the weight."""
            empty = torch.zeros(_ROUTED_ROWS, experts, dtype=torch.float32, device=weights.device)
            ids = ids.clamp(0, experts - 1)  # which are anything where a kernel was only compiled
            return torch.cat([empty.scatter(1, ids, weights.float()), empty.scatter(1, ids, 1.0)], 1)

        choice = self._best(dense(*exact[1:]), candidates, lambda c: dense(*route(logits, c)))
        if choice is None:
            return False
        choice = choice._replace(dtype=own[1].dtype)
        router = Router(weight.detach(), bias, choice, wide=error(own[0], logits) <= TOLERANCE[torch.float32])
        module.forward = router
        return True

    def _routed(self, module: Any) -> bool:
        """A block of nothing but a router and its experts can take a row before its norm; its forward stays."""
        gates = (getattr(module, name, None) for name in ("gate", "router"))
        forwards = (getattr(gate, "forward", None) for gate in gates)
        router = next((forward for forward in forwards if isinstance(forward, Router)), None)
        experts = getattr(module, "experts", None)
        if router is None or not router.takes_row or not isinstance(experts, torch.nn.Module):
            return False
        x = self.trial.random(1, 1, router.weight.shape[1])
        block = _Routed(router, experts)
        with self.trial.recorded():
            own = attempt(lambda: module.forward(x))
            own = own[0] if isinstance(own, tuple) else own
            found = attempt(lambda: block.of_row(Row(x))[0])
        if found is None or error(own, found) > self.tolerance:
            return False
        self.of_row[module] = block.of_row
        return True

    def _attention(self, module: Any) -> bool:
        parts = tuple(getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj"))
        inner = self.joined.get(parts)  # type: ignore[arg-type]
        outer = self.joined.get((getattr(module, "o_proj", None),))  # type: ignore[arg-type]
        width = getattr(module, "head_dim", None)
        if inner is None or outer is None or not isinstance(width, int):
            return False
        query, shared = inner.sizes[0] // width, inner.sizes[1] // width
        if inner.sizes != [query * width, shared * width, shared * width]:
            return False
        hidden = parts[0].in_features  # type: ignore[union-attr]
        x, arguments = self.trial.hidden(hidden), self.trial.arguments(hidden)
        angles = arguments["position_embeddings"]
        if not isinstance(angles, tuple) or len(angles) != 2 or angles[0].dtype != self.model.dtype:
            return False
        with self.trial.recorded() as calls:
            own = attempt(lambda: module.forward(x, **arguments))
            if own is None or len(calls) != 1:
                return False
            layer, _, _, _, *settings = calls[0]
            expected = [own[0], *calls[0][1:4]]
            norms = [self.norms.get(getattr(module, name, None)) for name in ("q_norm", "k_norm")]
            best, best_error = None, self.tolerance
            for rotated in {angles[0].shape[-1], 2 * angles[0].shape[-1]}:
                if rotated > width or rotated % 2:
                    continue
                candidate = _Attention(
                    self.model, layer, settings, inner, outer, (query, shared, width, rotated), norms
                )
                result = candidate(x, angles)
                found = errors(expected, [result[0], *calls[-1][1:4]])
                if found <= best_error:
                    best, best_error = candidate, found
        if best is None:
            return False
        module.forward = best
        self.of_rows[module] = best.of_rows
        if inner.takes_row:
            self.of_row[module] = best.of_row
        return True


class _Routed:
    """Rows to the experts that ``router`` chooses for them."""

    def __init__(self, router: Router, experts: torch.nn.Module) -> None:
        self.router, self.experts = router, experts

    def of_row(self, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
        total, normed, (_, weights, ids) = self.router.of_row(row)
        return self.experts(normed.view(1, -1), ids, weights).view(row.x.shape), total


class _Attention:
    """The forward of an attention module whose heads are as ``Heads`` says, ``norms`` per head or over all of them."""

    def __init__(
        self,
        model: MoEModel,
        layer: int,
        settings: Sequence[Any],
        inner: Linear,
        outer: Linear,
        sizes: tuple[int, int, int, int],
        norms: Sequence[Norm | None],
    ) -> None:
        self.model, self.layer, self.settings, self.inner, self.outer = model, layer, settings, inner, outer
        self.heads = Heads(*sizes)
        self.wide_norms: list[tuple[slice, Norm]] = []
        query, key = norms
        if query is not None and key is not None:
            if len(query.weight) == self.heads.width and len(key.weight) == self.heads.width:
                self.heads = Heads(*sizes, query.weight, key.weight, query.epsilon, query.round_before_scale)
            elif [len(query.weight), len(key.weight)] == inner.sizes[:2]:
                first, second = inner.sizes[0], inner.sizes[0] + inner.sizes[1]
                self.wide_norms = [(slice(first), query), (slice(first, second), key)]

    def __call__(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any
    ) -> tuple[torch.Tensor, None]:
        return self._attend(self.inner(hidden_states)[0], position_embeddings), None

    def of_row(
        self, row: Row, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        joint, total = self.inner.of_row(row)
        return self._attend(joint, position_embeddings), total

    def of_rows(
        self,
        hidden_states: torch.Tensor,
        rows: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **_: Any,
    ) -> torch.Tensor:
        return self._attend(self.inner(hidden_states)[0], position_embeddings, rows)

    def _attend(
        self,
        joint: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The joint projections ``[T, ...]`` to the module's output ``[1, T, hidden]``, or that at ``rows``."""
        for columns, norm in self.wide_norms:
            rms_norm(joint[:, columns], norm.weight, norm.epsilon, norm.round_before_scale, inplace=True)
        # Of some models and releases of transformers they are views of angles by frequency.
        cosine, sine = (part[0].contiguous() for part in position_embeddings)
        attention = self.model.attention
        if isinstance(attention, TritonPagedAttention):
            scaling, window, sinks = self.settings
            output = attention.attend_joint(self.layer, joint, cosine, sine, self.heads, scaling, window, sinks, rows)
        else:
            parts = split_and_keep(joint, cosine, sine, self.heads)
            query, key, value = (part.transpose(0, 1)[None] for part in parts)
            output = attention.forward(self.layer, query, key, value, *self.settings)[0]
            output = output if rows is None else output.index_select(0, rows)
        return self.outer(output.reshape(1, len(output), -1))


def _in_float32(module: Any, call: Callable[[], Any]) -> Any:
    """What ``call`` gives while the module's own parameters are float32."""
    own = dict(module.named_parameters(recurse=False))
    try:
        for name, parameter in own.items():
            setattr(module, name, torch.nn.Parameter(parameter.float(), requires_grad=False))
        return attempt(call)
    finally:
        for name, parameter in own.items():
            setattr(module, name, parameter)
