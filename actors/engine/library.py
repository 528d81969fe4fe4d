"""Everything we take from transformers that is not its documented interface, in one place.

Public, and used here: ``AutoConfig``, ``AutoModelForCausalLM.from_config``, ``AttentionInterface.register``,
``ExpertsInterface.register``. Not public: the mapping of checkpoint keys to parameters, the plan of which parameters
stay in float32, the initialisation of non-persistent buffers, the list of keys a model ignores, and the attributes of
an experts module. ``tests/actors/engine/test_library.py`` fails, naming the piece, when a release moves one of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.integrations.moe import ExpertsInterface

ATTENTION = "accordion_paged"
EXPERTS = "accordion_experts"

# Old checkpoints store what every model computes for itself.
_ALWAYS_IGNORED = (r"rotary_emb\.inv_freq$",)


@dataclass(frozen=True)
class Target:
    """Where a checkpoint tensor goes: the whole of ``parameter``, or one expert's part of a stacked one.

    With ``expert`` set, the tensor is part ``part`` of ``parts`` equal pieces of that expert's rows (gate, then up).
    """

    parameter: str
    expert: int | None = None
    part: int = 0
    parts: int = 1


def register(attention: Callable[..., Any], experts: Callable[..., Any]) -> None:
    """Make our attention and experts functions known under ``ATTENTION`` and ``EXPERTS``. Idempotent."""
    AttentionInterface.register(ATTENTION, attention)
    ExpertsInterface.register(EXPERTS, experts)


def construct(directory: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint directory, on the meta device, in eval mode, calling our functions.

    Of a quantized checkpoint it is the model in ``dtype`` that it was made from.
    """
    config = AutoConfig.from_pretrained(directory)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=ATTENTION, experts_implementation=EXPERTS
        )
    return model.eval()


def is_experts(module: torch.nn.Module) -> bool:
    """Whether a module holds stacked experts and calls the registered experts function."""
    return all(hasattr(module, name) for name in ("is_transposed", "has_bias", "_apply_gate", "down_proj"))


def targets(model: PreTrainedModel, keys: Iterable[str]) -> tuple[dict[str, Target], list[str]]:
    """Where each checkpoint key goes, and the keys that go nowhere and should have.

    Keys the model is known to ignore (say, of multi-token prediction layers) are in neither. Raises ValueError for a
    conversion other than stacking experts.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    ignored = [re.compile(p) for p in (*(model._keys_to_ignore_on_load_unexpected or ()), *_ALWAYS_IGNORED)]
    prefix = model.base_model_prefix + "."
    found: dict[str, Target] = {}
    unexpected: list[str] = []
    for key in keys:
        target = _convert(key, renamings, converters)
        name = target.parameter
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            if candidate in known:
                found[key] = Target(candidate, target.expert, target.part, target.parts)
                break
        else:
            if not any(pattern.search(key) or pattern.search(name) for pattern in ignored):
                unexpected.append(key)
    return found, unexpected


def _convert(key: str, renamings: list[Any], converters: list[Any]) -> Target:
    name = key
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    for converter in converters:
        converted, pattern = converter.rename_source_key(name)
        if pattern is None:
            continue
        expert = re.search(pattern.replace(".", r"\.").replace(r"*\.", r"(\d+)\."), name)
        operations = [type(operation).__name__ for operation in converter.operations]
        if expert is None or not set(operations) <= {"MergeModulelist", "Concatenate"}:
            raise ValueError(f"checkpoint key {key} needs the conversion {operations}, which is not supported")
        sources = converter.source_patterns
        return Target(converted, int(expert.group(1)), sources.index(pattern), len(sources))
    return Target(name)


def dtype_of(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype parameter or buffer ``name`` is kept in when the model runs in ``dtype``."""
    for pattern, kept in model._get_dtype_plan(dtype).items():
        if re.search(pattern, name):
            return kept
    return dtype


def initialise_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Give the buffers that no checkpoint stores (rotary frequencies and the like) a device and their values.

    All parameters must be loaded. Raises RuntimeError when the library left a buffer without a value.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    owners: list[tuple[PreTrainedModel, str, torch.nn.Module]] = []

    def visit(owner: PreTrainedModel, name: str, module: torch.nn.Module) -> None:
        owner = module if isinstance(module, PreTrainedModel) else owner
        if module._non_persistent_buffers_set:
            owners.append((owner, name, module))
        for child, submodule in module.named_children():
            visit(owner, f"{name}.{child}" if name else child, submodule)

    visit(model, "", model)
    for owner, name, module in owners:
        for buffer in module._non_persistent_buffers_set:
            value = module._buffers[buffer]
            if value is not None:
                module._buffers[buffer] = torch.empty_like(value, device=device)
                if value.is_floating_point():
                    module._buffers[buffer].fill_(float("nan"))  # type: ignore[union-attr]
        owner._init_weights(module)
        for buffer in module._non_persistent_buffers_set:
            value = module._buffers[buffer]
            if value is not None and value.is_floating_point() and bool(value.isnan().any()):
                raise RuntimeError(f"transformers did not initialise buffer {name}.{buffer} of {type(model).__name__}")
