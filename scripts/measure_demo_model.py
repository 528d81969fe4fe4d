#!/usr/bin/env python3
"""Measure the demo model: is it still the dense model it was made of, and does a routing mistake show?

    python scripts/measure_demo_model.py models/demo

Prints perplexity and divergence against the dense model, how the tokens spread over the experts, what swapping two
experts does to the logits and to greedy text, an answer, and the decoding speed of plain transformers.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from smollm2_gguf import Source, find_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

TEXTS = (
    "The harbour was quiet in the early morning. A few fishing boats had already left, and their lights could still "
    "be seen on the horizon. Anna walked along the wall with her dog and thought about the letter in her pocket. She "
    "had read it three times the evening before, and she still did not know what to answer. Her brother wanted to sell "
    "the house in which they had grown up. He wrote that nobody needed it any more, that the roof would not survive "
    "another winter, and that the money would help both of them. All of that was true, and none of it was the point.",
    "Photosynthesis is the process by which plants turn light into chemical energy. In the leaves, chlorophyll absorbs "
    "light, mostly in the blue and the red part of the spectrum. This energy splits water molecules into oxygen, which "
    "leaves the plant, and hydrogen, which is used to make sugar from carbon dioxide. Because nearly all food chains "
    "begin with plants, almost every living thing on Earth depends on this reaction. The rate at which it runs is "
    "limited by light, by temperature and by the amount of carbon dioxide in the air.",
    "To make a simple tomato soup, heat two spoons of olive oil in a pot and fry one chopped onion until it is soft. "
    "Add two cloves of garlic and cook for another minute. Then add 800 grams of tomatoes, half a litre of vegetable "
    "stock, a teaspoon of sugar and some salt. Let the soup simmer for 20 minutes, stir it from time to time, and "
    "blend it at the end. Serve it with fresh bread and a few leaves of basil.",
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total / "
    'len(values)\n\n\ndef variance(values):\n    """Return the population variance of a list of numbers."""\n    m = '
    "mean(values)\n    return sum((value - m) ** 2 for value in values) / len(values)\n",
)
GENERATED = 64
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Give me three tips for a good night's sleep.",
    "Write a short poem about the sea.",
    "How do I boil an egg?",
    "What is a prime number?",
    "Tell me a story about a lost dog.",
    "Explain gravity to a child.",
)


def dense_model(source: Source) -> LlamaForCausalLM:
    """The dense model of the source, float32."""
    settings = source.llama_config()
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(source.tensor(name)))
    return model


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """[T - 1, vocabulary]: log-probabilities of the next token after each but the last of ``ids`` [T]."""
    return model(ids[None]).logits[0, :-1].log_softmax(-1)


def compare(dense: PreTrainedModel, sparse: PreTrainedModel, texts: list[torch.Tensor]) -> dict[str, float]:
    """Perplexity of both, mean KL divergence (nats a token) and share of equal best tokens, over ``texts``."""
    a = torch.cat([log_probabilities(dense, ids) for ids in texts])
    b = torch.cat([log_probabilities(sparse, ids) for ids in texts])
    target = torch.cat([ids[1:] for ids in texts])[:, None]
    return {
        "tokens": len(target),
        "dense_perplexity": (-a.gather(1, target).mean()).exp().item(),
        "perplexity": (-b.gather(1, target).mean()).exp().item(),
        "divergence": (a.exp() * (a - b)).sum(-1).mean().item(),
        "same_best": (a.argmax(-1) == b.argmax(-1)).float().mean().item(),
    }


def expert_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The modules that hold the stacked experts' weights, in the order of the layers."""
    return [module for name, module in model.named_modules() if name.endswith(".mlp.experts")]


@torch.no_grad()
def swap_experts(layers: list[torch.nn.Module], first: int, second: int) -> None:
    """Exchange the weights of two experts in each of ``layers`` and leave the router: a mistake in an expert map."""
    for layer in layers:
        for weight in (layer.gate_up_proj, layer.down_proj):
            weight[[first, second]] = weight[[second, first]]


def busiest(model: PreTrainedModel, ids: torch.Tensor) -> list[tuple[int, int, float]]:
    """Per sparse layer: its two busiest experts, and the share of assignments that the first of them takes."""
    counts: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, args: counts.append(args[1].flatten().bincount(minlength=layer.num_experts))
        )
        for layer in expert_layers(model)
    ]
    log_probabilities(model, ids)
    for hook in hooks:
        hook.remove()
    result = []
    for count in counts:
        order = count.argsort(descending=True).tolist()
        result.append((order[0], order[1], (count.max() / count.sum()).item()))
    return result


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: torch.Tensor, length: int) -> list[int]:
    """Up to ``length`` tokens after ``prompt`` [T]."""
    output = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt)[None],  # else generate() takes the ends of turns for padding
        max_new_tokens=length,
        do_sample=False,
    )
    return output[0, len(prompt) :].tolist()


@torch.no_grad()
def diverges(model: PreTrainedModel, prompt: torch.Tensor, expected: list[int]) -> bool:
    """Whether greedy text after ``prompt`` is not ``expected``: some token would have been another one."""
    ids = torch.cat([prompt, torch.tensor(expected)])
    best = log_probabilities(model, ids).argmax(-1)[len(prompt) - 1 :]
    return best.tolist() != expected


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the demo model against the dense one.")
    parser.add_argument("model", type=Path, help="what build_demo_model.py made")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    sparse = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    dense = dense_model(Source(find_gguf()))
    texts = [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in TEXTS]
    for key, value in compare(dense, sparse, texts).items():
        print(f"{key:17} {value:.4g}")

    sparse.generation_config.eos_token_id = None
    chat = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"][0]
        for question in QUESTIONS
    ]
    print(f"answer            {tokenizer.decode(greedy(sparse, chat[0], 12))!r}")
    started = time.perf_counter()
    right = [greedy(sparse, prompt, GENERATED) for prompt in chat]
    rate = GENERATED * len(chat) / (time.perf_counter() - started)
    print(f"tokens/s          {rate:.1f} (batch 1, {arguments.threads} threads, prefill included)")

    ids = torch.cat(texts)
    shares = busiest(sparse, ids)
    print(f"busiest expert    {min(s for *_, s in shares):.0%} to {max(s for *_, s in shares):.0%} of assignments")
    with torch.no_grad():
        reference = sparse(ids[None]).logits
    layers = expert_layers(sparse)
    middle = len(layers) // 2
    for label, wrong in ((f"in sparse layer {middle}", [middle]), ("in all layers", range(len(layers)))):
        for index in wrong:
            swap_experts([layers[index]], *shares[index][:2])
        with torch.no_grad():
            change = (sparse(ids[None]).logits - reference).abs()
        diverged = sum(diverges(sparse, prompt, expected) for prompt, expected in zip(chat, right, strict=True))
        for index in wrong:
            swap_experts([layers[index]], *shares[index][:2])
        print(
            f"two swapped {label}: logits move by up to {change.max():.2f} (mean {change.mean():.3f}), "
            f"{diverged} of {len(chat)} texts diverge in {GENERATED} tokens"
        )


if __name__ == "__main__":
    main()
