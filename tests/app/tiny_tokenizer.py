"""Small tokenizers in checkpoint form, trained on a sentence."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = ["hello world, the quick brown fox jumps over the lazy dog", "one two three four five six seven eight nine ten"]
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no such role: ' + message.role) }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
EOS, PAD = 0, 1


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["</s>", "<pad>"]
        ),
    )
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As sentencepiece models have it: words begin with U+2581, unknown characters are bytes."""
    alphabet = sorted({character for text in TEXT for character in text} | {"\u2581"})
    pieces = ["</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256)), *alphabet]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=None, fuse_unk=False, byte_fallback=True))
    tokenizer.add_special_tokens(["</s>", "<pad>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def write(directory: Path, backend: Tokenizer | None = None, template: str | None = TEMPLATE) -> Path:
    """Writes tokenizer and configuration files; byte-level unless told otherwise."""
    backend = backend or byte_level()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    size = backend.get_vocab_size()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": size, "eos_token_id": EOS}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, PAD]}))
    return directory
