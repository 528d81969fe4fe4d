"""Tiny random checkpoints of each model family, for tests: seeded, in the layout the Hub uses.

    python tests/tiny_models.py DIR [FAMILY ...]

Weights are drawn per tensor from its name, wide enough that greedy continuations vary and the best two logits are
far apart compared with float32 noise; sizes are chosen to be awkward (experts that do not divide by the ranks, key
and value widths that differ, grouped heads), not realistic.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB = 512
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unused|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _config(model_type: str, **settings: Any) -> PreTrainedConfig:
    """A configuration with what the families share; ``settings`` override. No EOS: ``generate`` runs to its length."""
    shared: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return AutoConfig.for_model(model_type, **(shared | settings))


def mixtral() -> PreTrainedConfig:
    return _config("mixtral", intermediate_size=96, num_local_experts=8, num_experts_per_tok=2)


def qwen2_moe() -> PreTrainedConfig:
    """A shared expert behind a sigmoid gate; layers 1 and 3 of 4 sparse; one kv head."""
    return _config(
        "qwen2_moe",
        num_hidden_layers=4,
        num_key_value_heads=1,
        intermediate_size=128,
        decoder_sparse_step=2,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=96,
        norm_topk_prob=True,
    )


def qwen3_moe() -> PreTrainedConfig:
    """Heads wider than hidden / heads, normalised queries and keys; layer 0 dense."""
    return _config(
        "qwen3_moe",
        num_hidden_layers=4,
        num_attention_heads=6,
        head_dim=32,
        intermediate_size=128,
        mlp_only_layers=[0],
        num_experts=10,
        num_experts_per_tok=3,
        moe_intermediate_size=40,
        norm_topk_prob=True,
    )


def olmoe() -> PreTrainedConfig:
    """As many kv heads as heads; top-k weights not normalised."""
    return _config("olmoe", num_key_value_heads=4, intermediate_size=64, num_experts=8, num_experts_per_tok=4)


def _mla(**settings: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "v_head_dim": 20,
        "intermediate_size": 128,
        "moe_intermediate_size": 40,
        **settings,
    }


def deepseek_v2() -> PreTrainedConfig:
    """MLA without a query projection of low rank (as V2-Lite); layer 0 dense; two shared experts."""
    return _config(
        "deepseek_v2",
        **_mla(
            q_lora_rank=None,
            first_k_dense_replace=1,
            n_routed_experts=6,
            num_experts_per_tok=2,
            n_shared_experts=2,
            topk_method="greedy",
            routed_scaling_factor=1.0,
        ),
    )


def deepseek_v3() -> PreTrainedConfig:
    """MLA; layers 0 and 1 of 4 dense; 2 of 4 groups of experts, chosen with a correction bias; YaRN."""
    return _config(
        "deepseek_v3",
        num_hidden_layers=4,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        **_mla(
            q_lora_rank=48,
            first_k_dense_replace=2,
            n_routed_experts=12,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            n_shared_experts=1,
            routed_scaling_factor=1.5,
            norm_topk_prob=True,
            num_nextn_predict_layers=0,
        ),
    )


def gpt_oss() -> PreTrainedConfig:
    """Packed experts with biases, attention biases and sinks; every other layer sees a window of 16 tokens."""
    return _config(
        "gpt_oss",
        num_hidden_layers=4,
        num_attention_heads=8,
        head_dim=16,
        intermediate_size=48,
        num_local_experts=6,
        num_experts_per_tok=2,
        sliding_window=16,
    )


def glm4_moe() -> PreTrainedConfig:
    """Partial rotary embedding, normalised queries and keys, correction bias; layer 0 dense."""
    return _config(
        "glm4_moe",
        num_attention_heads=6,
        head_dim=16,
        use_qk_norm=True,
        attention_bias=True,
        intermediate_size=128,
        moe_intermediate_size=40,
        first_k_dense_replace=1,
        n_routed_experts=7,
        num_experts_per_tok=2,
        n_shared_experts=1,
        num_nextn_predict_layers=0,
    )


def llama() -> PreTrainedConfig:
    return _config("llama", intermediate_size=128)


def qwen3() -> PreTrainedConfig:
    """Dense, with the output head tied to the embedding."""
    return _config("qwen3", head_dim=32, intermediate_size=128, tie_word_embeddings=True)


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    f.__name__: f
    for f in (
        mixtral,
        qwen2_moe,
        qwen3_moe,
        olmoe,
        deepseek_v2,
        deepseek_v3,
        gpt_oss,
        glm4_moe,
        llama,
        qwen3,
    )
}
MOE_FAMILIES = tuple(name for name in FAMILIES if name not in ("llama", "qwen3"))


def _draw(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Standard normal numbers that depend on ``seed`` and the tensor's name only."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big")))


@torch.no_grad()
def _fill(model: PreTrainedModel, seed: int) -> None:
    """Draw every weight: projections scaled to their inputs, norms near one, biases and sinks small but not zero."""
    tied = model.config.tie_word_embeddings
    transposed = model.config.model_type == "gpt_oss"  # its experts multiply from the right
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if "inv_freq" in name:
            continue
        value = _draw(name, tensor.shape, seed)
        if "norm" in name and tensor.dim() == 1:
            # A tied head is the embedding, which stays small against the layers; the last norm makes up for it.
            value = (8.0 if tied and name == "model.norm.weight" else 1.0) + 0.1 * value
        elif "embed_tokens" in name:
            value *= 0.1 if tied else 1.0
        elif "e_score_correction_bias" in name or name.endswith("bias"):
            value *= 0.2
        elif tensor.dim() >= 2:
            inputs = tensor.shape[-2] if transposed and ".experts." in name else tensor.shape[-1]
            gain = 4.0 if name == "lm_head.weight" else 2.0 if "mlp.gate.weight" in name else 1.5
            value *= gain / inputs**0.5
        tensor.copy_(value)


def _save_tokenizer(path: Path) -> None:
    """A byte-level BPE of ``VOCAB`` tokens: specials, the 256 bytes, and pairs of frequent letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = itertools.product("Ġetaoinshrdlcumwf", repeat=2)
    merges = list(itertools.islice(pairs, VOCAB - len(SPECIAL_TOKENS) - len(alphabet)))
    tokens = [*SPECIAL_TOKENS, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2], "pad_token_id": 0}) + "\n")


def build(name: str, directory: str | Path, *, tokenizer: bool = False, seed: int = 0) -> Path:
    """The checkpoint of family ``name`` under ``directory``, float32, in several safetensors shards.

    Made once: a second call returns the same path. With ``tokenizer`` a tokenizer with a chat template stands beside
    it (and ``<|im_end|>``, id 2, is its EOS). Safe when several processes build the same one.
    """
    if name not in FAMILIES:
        raise KeyError(f"no tiny model family {name!r}; there are {', '.join(FAMILIES)}")
    suffix = f"-seed{seed}" if seed else ""
    path = Path(directory) / f"{name}{suffix}{'-chat' if tokenizer else ''}"
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        model = AutoModelForCausalLM.from_config(FAMILIES[name](), dtype=torch.float32)
        _fill(model, seed)
        model.save_pretrained(scratch, max_shard_size="150KB")
        if tokenizer:
            _save_tokenizer(scratch)
        try:
            scratch.rename(path)
        except OSError:
            if not path.is_dir():  # else another process was first, with the same bytes
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def quantized(source: Path, directory: Path, block: int = 32) -> tuple[Path, Path]:
    """The checkpoint ``source`` in FP8 with a scale per ``block`` x ``block``, and one of the same numbers in float32.

    Both stand under ``directory``, in one file each. Embeddings, output head and router stay as they are, as in
    published checkpoints.
    """
    config = json.loads((source / "config.json").read_text())
    plain = {key: tensor for file in source.glob("*.safetensors") for key, tensor in load_file(file).items()}
    stored, same = dict(plain), dict(plain)
    for key, tensor in plain.items():
        if tensor.dim() < 2 or not re.search(r"_proj|experts", key) or "bias" in key:
            continue
        rows, columns = tensor.shape[-2:]
        scale = torch.empty(*tensor.shape[:-2], -(-rows // block), -(-columns // block))
        stored[key], same[key] = torch.empty_like(tensor, dtype=torch.float8_e4m3fn), torch.empty_like(tensor)
        for i, j in itertools.product(range(scale.shape[-2]), range(scale.shape[-1])):
            place = (..., slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scale[..., i, j] = tensor[place].abs().amax((-2, -1)) / 448
            rounded = (tensor[place] / scale[..., i, j, None, None]).to(torch.float8_e4m3fn)
            stored[key][place] = rounded
            same[key][place] = rounded.float() * scale[..., i, j, None, None]
        stored[f"{key}_scale_inv"] = scale
    scheme = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [block] * 2}
    for path, tensors, extra in (
        (directory / f"{source.name}-fp8", stored, {"quantization_config": scheme}),
        (directory / f"{source.name}-dequantized", same, {}),
    ):
        path.mkdir(parents=True)
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config | extra))
    return directory / f"{source.name}-fp8", directory / f"{source.name}-dequantized"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for family in sys.argv[2:] or FAMILIES:
        print(build(family, sys.argv[1]))
