"""Model directories without weights, for `load_format: dummy`.

    python scripts/bench/shapes.py DIRECTORY [--layers N] [--tokenizer models/demo]

Writes the ``config.json`` of Qwen3-30B-A3B, with fewer layers if asked; with a tokenizer's directory its files too, and
the vocabulary becomes its own, so that the model can be served and its tokens told apart as text.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "dtype": "bfloat16",
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}


def write(directory: Path, layers: int = 48, tokenizer: Path | None = None) -> Path:
    """``directory``, made if need be, with Qwen3-30B-A3B's configuration cut to ``layers`` decoder layers."""
    directory.mkdir(parents=True, exist_ok=True)
    config = QWEN3_30B_A3B | {"num_hidden_layers": layers}
    if tokenizer is not None:
        other = json.loads((tokenizer / "config.json").read_text())
        config |= {name: other[name] for name in ("vocab_size", "bos_token_id", "eos_token_id") if name in other}
        for file in tokenizer.glob("*token*.json"):
            shutil.copy(file, directory)
        for file in tokenizer.glob("chat_template.*"):
            shutil.copy(file, directory)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return directory


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--tokenizer", type=Path, help="a directory with a tokenizer")
    arguments = parser.parse_args()
    print(write(arguments.directory, arguments.layers, arguments.tokenizer))
