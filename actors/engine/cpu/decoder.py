"""A whole decoder as one ``threads.Program`` for the steps of few rows, in which calling operators takes most time.

Only for what it knows: layers ``h = x + attention(norm(x))``, ``h + mlp(norm(h))`` of rotated attention without
anything else to it, and MLPs that are dense, or routed by a softmax with or without a shared expert. As with fused
modules it is no list of families: whoever is made of such parts is tried, and taken only when the logits agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from actors.engine.attention.compiled import CompiledPagedAttention
from actors.engine.cpu import kernels, route
from actors.engine.cpu.attend import attention
from actors.engine.cpu.linear import Linear
from actors.engine.cpu.outer import SIZE, row_width
from actors.engine.cpu.panels import COLUMNS, Panels
from actors.engine.cpu.threads import Program
from actors.engine.experts.layer import Experts, ExpertsBroken
from actors.engine.experts.slots import PanelSlots
from actors.engine.model import MoEModel

MOST_ROWS = 63
"""With more, products go to matrix units where there are some, and operators take little of the time."""
_PAGE = 4096  # bytes; rows a multiple of this apart would share a few lines of the first cache


class _Unknown(ValueError):
    """The model has a part that this file does not know."""


@dataclass
class _Sparse:
    """Routed experts of MoE layer ``layer``. ``shared`` is a dense MLP, ``gate`` the weight of its sigmoid."""

    layer: int
    router: torch.Tensor
    normalize: bool
    shared: _Dense | None
    gate: torch.Tensor | None


@dataclass
class _Dense:
    inner: Panels
    outer: Panels


@dataclass
class _Layer:
    first: tuple[torch.Tensor, float]
    second: tuple[torch.Tensor, float]
    joined: Panels
    outer: Panels
    site: int
    scaling: float
    heads: int
    mlp: _Dense | _Sparse


def find(model: MoEModel, joined: Mapping[tuple[torch.nn.Linear, ...], Linear]) -> Decoder | None:
    """The decoder of ``model`` (float32, dense weights loaded), if it is made of known parts only; untested."""
    try:
        return Decoder(model, joined)
    except (AttributeError, TypeError, ValueError):
        return None


class Decoder:
    """Runs steps of up to ``MOST_ROWS`` rows whose experts all stand on this rank."""

    def __init__(self, model: MoEModel, joined: Mapping[tuple[torch.nn.Linear, ...], Linear]) -> None:
        self._model, self._joined = model, joined
        body: Any = model.module.get_decoder()
        self._embed, self._rotary, self._head = body.embed_tokens, body.rotary_emb, model.module.lm_head
        self._last = _norm(body.norm)
        self._width = len(self._last[0])
        self._layers = [self._layer(module) for module in body.layers]
        self._programs: dict[int, Program] = {}
        self._routing: Any = None
        self._slots = torch.empty(len(model.experts.layers), model.summary.num_experts, dtype=torch.int64)
        self._room: dict[tuple[str, int], torch.Tensor] = {}

    def suits(self, rows: int) -> bool:
        """Whether a step of so many rows can run here."""
        return 0 < rows <= MOST_ROWS and all(self._model.experts.routing.local)

    def logits(self, tokens: torch.Tensor, positions: torch.Tensor, last: Sequence[int]) -> torch.Tensor:
        """``[S, vocab]`` for rows ``last`` of ``tokens [T]`` at ``positions [T]``; attention and experts have begun."""
        rows, experts = len(tokens), self._model.experts
        if experts.layers and experts.routing is not self._routing:
            self._adopt(experts)
        hidden = self._embed(tokens)
        cosine, sine = self._rotary(hidden, positions[None])
        program = self._programs.get(rows)
        if program is None:
            program = self._programs[rows] = self._build(rows, cosine.shape[-1])
        for name, value in (("x", hidden), ("cosine", cosine[0]), ("sine", sine[0])):
            self._buffer(name, value.shape[1])[:rows].copy_(value)
        if experts.layers:
            experts.run_elsewhere(rows)
        program.run()
        found: torch.Tensor = self._head(self._buffer("normed", self._width)[last])
        return found

    # --- what a model is made of -----------------------------------------------------------------------------------

    def _panels(self, *parts: Any) -> Panels:
        linear = self._joined.get(parts)
        panels = None if linear is None else linear.panels
        if panels is None or panels.shape[0] % COLUMNS or panels.shape[1] * SIZE % _PAGE == 0:
            raise _Unknown
        return panels

    def _layer(self, module: Any) -> _Layer:
        own = module.self_attn
        joined = self._panels(own.q_proj, own.k_proj, own.v_proj)
        if getattr(own, "sinks", None) is not None or getattr(own, "sliding_window", None) is not None:
            raise _Unknown
        first, second = _norm(module.input_layernorm), _norm(module.post_attention_layernorm)
        heads = own.q_proj.out_features // own.head_dim
        mlp = self._sparse(module.mlp) if hasattr(module.mlp, "experts") else self._dense(module.mlp)
        return _Layer(first, second, joined, self._panels(own.o_proj), own.accordion.layer, own.scaling, heads, mlp)

    def _dense(self, module: Any) -> _Dense:
        return _Dense(self._panels(module.gate_proj, module.up_proj), self._panels(module.down_proj))

    def _sparse(self, module: Any) -> _Sparse:
        shared, gate = getattr(module, "shared_expert", None), getattr(module, "shared_expert_gate", None)
        layer, normalize = module.experts.accordion.layer, bool(getattr(module.gate, "norm_topk_prob", True))
        slots = self._model.experts.layers[layer]
        if not isinstance(slots, PanelSlots) or not slots.gated or any(p.shape[0] % COLUMNS for p in slots.panels):
            raise _Unknown
        return _Sparse(
            layer,
            module.gate.weight.detach().contiguous(),
            normalize,
            None if shared is None else self._dense(shared),
            None if gate is None else gate.weight.detach().contiguous(),
        )

    # --- what is computed ------------------------------------------------------------------------------------------

    def _adopt(self, experts: Experts) -> None:
        """Programs know by ``_slots`` where experts stand. Raises ExpertsBroken if one is in an empty slot."""
        routing = experts.routing
        first = routing.rank_index * routing.num_slots
        own = routing.table[:, routing.rank_index, : experts.num_experts].astype(np.int64) - first
        for layer, row in zip(experts.layers, own, strict=True):
            assert isinstance(layer, PanelSlots)
            try:
                layer.check({*row.tolist()})
            except LookupError as error:
                raise ExpertsBroken(f"rank index {routing.rank_index} cannot compute its experts: {error}") from error
        self._slots.copy_(torch.from_numpy(own))
        self._routing = routing

    def _buffer(self, name: str, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``[MOST_ROWS, width]``; always in the same place."""
        if (name, width) not in self._room:
            self._room[name, width] = torch.zeros(MOST_ROWS, width, dtype=dtype)
        return self._room[name, width]

    def _at(self, name: str, width: int, dtype: torch.dtype = torch.float32) -> int:
        return self._buffer(name, width, dtype).data_ptr()

    def _build(self, rows: int, turned: int) -> Program:
        width, program = self._width, Program()
        attend = self._model.attention
        assert isinstance(attend, CompiledPagedAttention)
        x, normed, delta = (self._at(name, width) for name in ("x", "normed", "delta"))
        cosine, sine = (self._at(name, turned) for name in ("cosine", "sine"))
        whole, given = program.keep(torch.tensor([1, 0, rows, 0])), 0

        def multiply(panels: Panels, source: int, out: str, room: int) -> int:
            target = self._at(out, room)
            program.add(*panels.product(source, panels.shape[1] * SIZE, target, room * SIZE, whole))
            return target

        def dense(mlp: _Dense, out: str) -> int:
            half = mlp.outer.shape[1]
            room, gated = row_width(2 * half), self._at("gated", half)
            inner = multiply(mlp.inner, normed, "inner", room)
            program.add(*kernels.gate(inner, room, gated, rows, half))
            return multiply(mlp.outer, gated, out, width)

        for layer in self._layers:
            program.add(*kernels.norm(x, given, layer.first[0].data_ptr(), normed, rows, width, layer.first[1]))
            joined = multiply(layer.joined, normed, "joined", layer.joined.shape[0])
            pools, plan = (attend.keys[layer.site], attend.values[layer.site]), attend.plan(layer.heads, layer.site)
            query = self._at("query", layer.outer.shape[1])
            program.add(
                *kernels.rotate_and_store(
                    joined, cosine, sine, query, pools, plan.address, rows, layer.heads, turned
                )
            )  # fmt: skip
            seen = self._at("seen", layer.outer.shape[1])
            program.add(*attention(query, pools, plan, seen, rows, layer.heads, layer.scaling))
            multiply(layer.outer, seen, "delta", width)
            program.add(*kernels.norm(x, delta, layer.second[0].data_ptr(), normed, rows, width, layer.second[1]))
            if isinstance(layer.mlp, _Sparse):
                self._add_sparse(program, layer.mlp, rows, dense)
            else:
                dense(layer.mlp, "delta")
            given = delta
        program.add(*kernels.norm(x, delta, self._last[0].data_ptr(), normed, rows, width, self._last[1]))
        return program

    def _add_sparse(self, program: Program, mlp: _Sparse, rows: int, dense: Any) -> None:
        experts, width = self._model.experts, self._width
        top_k, count, num_slots = experts.top_k, experts.num_experts, experts.routing.num_slots
        up, down = experts.layers[mlp.layer].panels
        pairs, half = rows * top_k, down.shape[1]
        normed, delta = self._at("normed", width), self._at("delta", width)
        ids, places = (self._at(name, top_k, torch.int64) for name in ("ids", "places"))
        weights, gathered = self._at("weights", top_k + 1), self._at("gathered", top_k * width)
        groups = program.keep(torch.zeros(1 + 3 * num_slots, dtype=torch.int64))
        room = row_width(2 * half)
        inner, gated = self._at("inner of experts", top_k * room), self._at("gated of experts", top_k * half)
        results = self._at("results", top_k * width)
        gate = 0 if mlp.gate is None else mlp.gate.data_ptr()
        program.add(
            *route.route(normed, mlp.router.data_ptr(), gate, ids, weights, rows, width, count, top_k, mlp.normalize)
        )
        slots, chosen = self._slots[mlp.layer].data_ptr(), experts.chosen[mlp.layer].ctypes.data
        program.add(
            *route.group(normed, ids, slots, gathered, places, groups, chosen, rows, width, count, top_k, num_slots)
        )
        program.add(*up.product(gathered, width * SIZE, inner, room * SIZE, groups))
        program.add(*kernels.gate(inner, room, gated, pairs, half))
        program.add(*down.product(gated, half * SIZE, results, width * SIZE, groups))
        shared = 0 if mlp.shared is None else dense(mlp.shared, "shared")
        program.add(*route.combine(results, places, weights, shared, delta, rows, width, top_k))


def _norm(module: Any) -> tuple[torch.Tensor, float]:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if epsilon is None:
        raise _Unknown
    return module.weight.detach().contiguous(), float(epsilon)
