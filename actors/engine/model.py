"""A transformers model with our attention and experts plugged in, and what we need to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from actors.engine import library
from actors.engine.attention.base import KVShape, PagedAttention
from actors.engine.experts import slots
from actors.engine.experts.layer import Experts
from actors.engine.quantization import Blocks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSummary:
    """A model's figures. ``num_moe_layers`` is 0, and so are ``num_experts`` and ``top_k``, for a dense model."""

    num_moe_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    vocab_size: int
    max_positions: int


class _Probe:
    """Takes the place of attention and experts in one forward pass on the meta device, and writes down the calls."""

    def __init__(self) -> None:
        self.attention: list[tuple[torch.nn.Module, KVShape]] = []
        self.experts: list[tuple[torch.nn.Module, int, int]] = []
        self.linears: list[tuple[torch.nn.Linear, torch.Tensor]] = []

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        extra: dict[str, Any],
    ) -> torch.Tensor:
        for name in ("softcap", "position_bias"):
            if extra.get(name) is not None:
                raise ValueError(f"{type(module).__name__} wants {name}, which our attention does not have")
        self.attention.append((module, KVShape(key.shape[1], key.shape[3], value.shape[3])))
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])

    def route(self, module: torch.nn.Module, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        self.experts.append((module, hidden.shape[1], ids.shape[1]))
        return torch.empty_like(hidden)

    def see_linear(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, torch.nn.Linear)
        self.linears.append((module, inputs[0]))


class _Site:
    """Stands on an attention or experts module: which layer it is, and who does the work."""

    def __init__(self, layer: int, model: MoEModel) -> None:
        self.layer = layer
        self.model = model


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **extra: Any,
) -> tuple[torch.Tensor, None]:
    site: Any = module.accordion
    if isinstance(site, _Probe):
        return site.attend(module, query, key, value, extra), None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return site.model.attention.forward(site.layer, query, key, value, scaling, sliding_window, s_aux), None


def _experts(
    module: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    site: Any = module.accordion
    if isinstance(site, _Probe):
        return site.route(module, hidden, top_k_index)
    output: torch.Tensor = site.model.experts.forward(site.layer, hidden, top_k_index, top_k_weights)
    return output


class MoEModel:
    """A causal language model (mixture of experts or dense), built on the meta device.

    ``kv_shapes`` has one entry per attention layer, in the order in which the layers run; ``experts_names`` the module
    path of each MoE layer's experts, and ``experts_shapes`` the shapes of its stacked parameters, likewise.
    ``linear_groups`` are the linear layers that ran, those together which one module gave the same input one after
    the other. ``experts`` exists after ``allocate_slots``; ``attention`` is set by whoever sizes the KV cache.
    """

    attention: PagedAttention
    experts: Any  # Experts, or CudaExperts, which has the same interface

    def __init__(self, directory: str | Path, dtype: str) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        library.register(_attention, _experts)
        self.directory = Path(directory)
        self.dtype = DTYPES[dtype]
        self.module: PreTrainedModel = library.construct(directory, self.dtype)
        probe = self._probe()
        names = {module: name for name, module in self.module.named_modules()}
        self.kv_shapes = [shape for _, shape in probe.attention]
        self.experts_names = [names[module] for module, _, _ in probe.experts]
        self.experts_shapes = [
            {leaf: list(parameter.shape) for leaf, parameter in module.named_parameters(recurse=False)}
            for module, _, _ in probe.experts
        ]
        self.linear_groups = _groups(probe.linears, names)
        for layer, (module, _) in enumerate(probe.attention):
            module.accordion = _Site(layer, self)  # type: ignore[assignment]
        for layer, (module, _, _) in enumerate(probe.experts):
            module.accordion = _Site(layer, self)  # type: ignore[assignment]
        config = self.module.config.get_text_config()
        modules = [module for module, _, _ in probe.experts]
        _, hidden, top_k = probe.experts[0] if probe.experts else (None, config.hidden_size, 0)
        self.summary = ModelSummary(
            num_moe_layers=len(modules),
            num_experts=self.experts_shapes[0]["down_proj"][0] if modules else 0,
            top_k=top_k,
            hidden_size=hidden,
            vocab_size=config.vocab_size,
            max_positions=config.max_position_embeddings,
        )

    def allocate_slots(
        self,
        num_slots: int,
        device: torch.device,
        max_rows: int = 0,
        max_ranks: int = 1,
        blocks: Blocks | None = None,
    ) -> None:
        """Make ``num_slots`` empty expert slots in each MoE layer. Once only.

        On GPUs a step has at most ``max_rows`` rows a rank, and a group at most ``max_ranks`` ranks. With ``blocks``,
        those of an FP8 checkpoint, experts stay in FP8 where the device can compute with them.
        """
        self._layers = [
            slots.allocate(self.module.get_submodule(name), num_slots, self.dtype, device, blocks)
            for name in self.experts_names
        ]
        self._device = device
        if device.type != "cuda":
            self.experts = self.host_experts()
            return
        from actors.engine.cuda.experts import CudaExperts

        summary, layers = self.summary, cast("list[slots.StackedSlots]", self._layers)
        self.experts = CudaExperts(
            layers, summary.num_experts, summary.top_k, summary.hidden_size, self.dtype, device, max_rows, max_ranks
        )

    def host_experts(self) -> Experts:
        """Experts in the same slots, whose rows are routed by the host."""
        summary = self.summary
        return Experts(self._layers, summary.num_experts, summary.top_k, summary.hidden_size, self.dtype, self._device)

    def _probe(self) -> _Probe:
        probe = _Probe()
        hooks = []
        for module in self.module.modules():
            module.accordion = probe  # type: ignore[assignment]
            if type(module) is torch.nn.Linear:
                hooks.append(module.register_forward_pre_hook(probe.see_linear))
        try:
            with torch.inference_mode(), torch.device("meta"):
                ids = torch.zeros(1, 2, dtype=torch.long)
                self.module(input_ids=ids, position_ids=ids, use_cache=False)
        finally:
            for module in self.module.modules():
                del module.accordion
            for hook in hooks:
                hook.remove()
        holders = [module for module in self.module.modules() if library.is_experts(module)]
        if [module for module, _, _ in probe.experts] != holders:
            raise ValueError(
                f"{type(self.module).__name__} has {len(holders)} experts modules but called our experts function "
                f"{len(probe.experts)} times, or in another order: this architecture is not supported"
            )
        if not probe.attention:
            raise ValueError(f"{type(self.module).__name__} never called our attention: not supported")
        return probe


def _groups(
    calls: list[tuple[torch.nn.Linear, torch.Tensor]], names: dict[torch.nn.Module, str]
) -> list[list[torch.nn.Linear]]:
    groups: list[list[torch.nn.Linear]] = []
    previous: tuple[str, torch.Tensor] | None = None
    for module, given in calls:
        parent = names[module].rpartition(".")[0]
        if previous is not None and previous[0] == parent and previous[1] is given:
            groups[-1].append(module)
        else:
            groups.append([module])
        previous = (parent, given)
    return groups


def summarize(directory: str | Path) -> ModelSummary:
    """The figures of the checkpoint in ``directory``; reads its config, no weights."""
    return MoEModel(directory, "float32").summary
