"""What we use of transformers without a promise. When one of these fails, a release moved it: change library.py."""

from __future__ import annotations

import inspect

import pytest
import tiny_models
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from actors.engine import library
from actors.engine.model import summarize


@pytest.mark.parametrize("name", ["_get_dtype_plan", "_init_weights", "_keys_to_ignore_on_load_unexpected"])
def test_models_have_the_private_members_we_call(name: str) -> None:
    assert hasattr(PreTrainedModel, name), f"transformers' PreTrainedModel has no {name} any more"


def test_the_key_mapping_gives_transforms_with_patterns_and_operations() -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_models.mixtral())
    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    gate, up, down = (f".experts.*.{name}.weight" for name in ("w1", "w3", "w2"))
    assert [converter.source_patterns for converter in converters] == [[gate, up], [down]]
    assert [type(operation).__name__ for operation in converters[0].operations] == ["MergeModulelist", "Concatenate"]
    assert converters[0].operations[1].dim == 1
    renamed = "model.layers.0.mlp.experts.gate_up_proj"
    assert converters[0].rename_source_key("model.layers.0.mlp.experts.7.w3.weight") == (renamed, up)


@pytest.mark.parametrize("family", tiny_models.MOE_FAMILIES)
def test_experts_modules_are_recognised(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_models.FAMILIES[family]())
    found = [name for name, module in model.named_modules() if library.is_experts(module)]
    assert found
    assert all(name.endswith("experts") for name in found)
    for name in found:
        forward = inspect.signature(inspect.unwrap(type(model.get_submodule(name)).forward))
        assert len(forward.parameters) == 4  # self, hidden states, chosen experts, their weights


def test_checkpoint_keys_find_their_parameters() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_models.mixtral())
    keys = {
        "model.layers.1.block_sparse_moe.experts.5.w3.weight": library.Target(
            "model.layers.1.mlp.experts.gate_up_proj", 5, 1, 2
        ),
        "model.layers.1.block_sparse_moe.experts.5.w2.weight": library.Target(
            "model.layers.1.mlp.experts.down_proj", 5, 0, 1
        ),
        "model.layers.1.block_sparse_moe.gate.weight": library.Target("model.layers.1.mlp.gate.weight"),
        "layers.0.input_layernorm.weight": library.Target("model.layers.0.input_layernorm.weight"),
    }
    ignored = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert library.targets(model, [*keys, ignored, "nonsense"]) == (keys, ["nonsense"])


def test_a_correction_bias_stays_in_float32() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_models.deepseek_v3(), dtype=torch.bfloat16)
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    assert library.dtype_of(model, name, torch.bfloat16) == torch.float32
    assert library.dtype_of(model, "model.norm.weight", torch.bfloat16) == torch.bfloat16


def test_a_name_without_a_mask_gets_no_mask() -> None:
    """Our attention masks by itself; a model must not build a mask for it."""
    seen = []

    def attend(module, query, key, value, attention_mask, **extra):
        seen.append(attention_mask)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register("accordion_test", attend)
    ExpertsInterface.register("accordion_test", lambda module, hidden, ids, weights: hidden)
    for family in ("gpt_oss", "qwen2_moe"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                tiny_models.FAMILIES[family](),
                attn_implementation="accordion_test",
                experts_implementation="accordion_test",
            )
            ids = torch.zeros(1, 4, dtype=torch.long)
            model(input_ids=ids, position_ids=ids, use_cache=False)
    assert seen
    assert set(seen) == {None}


@pytest.mark.parametrize(
    ("family", "layers", "experts", "top_k"),
    [("mixtral", 3, 8, 2), ("qwen2_moe", 2, 6, 2), ("deepseek_v3", 2, 12, 3), ("gpt_oss", 4, 6, 2), ("llama", 0, 0, 0)],
)
def test_figures_come_from_the_model_itself(tmp_path, family: str, layers: int, experts: int, top_k: int) -> None:
    tiny_models.FAMILIES[family]().save_pretrained(tmp_path)
    figures = summarize(tmp_path)
    assert (figures.num_moe_layers, figures.num_experts, figures.top_k) == (layers, experts, top_k)
    assert (figures.hidden_size, figures.vocab_size, figures.max_positions) == (64, tiny_models.VOCAB, 4096)
