import asyncio
import functools
import json
import tempfile
from pathlib import Path

import pytest
import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidRequest
from app.tokenizer import Tokenizer

# What the byte-fallback tokenizer's normalizer makes of runs of spaces is not the matter here.
texts = st.text(st.sampled_from("the fox😀👩‍👩‍👧é世界한\n•"), max_size=30)
cuts = st.lists(st.integers(1, 4), max_size=80)


@pytest.fixture(scope="module", params=["byte_level", "byte_fallback"])
def tokenizer(request, tmp_path_factory):
    backend = getattr(tiny_tokenizer, request.param)()
    return Tokenizer(str(tiny_tokenizer.write(tmp_path_factory.mktemp(request.param), backend)))


@functools.cache
def byte_level_tokenizer():
    with tempfile.TemporaryDirectory() as directory:
        return Tokenizer(str(tiny_tokenizer.write(Path(directory))))


def encode(tokenizer, text):
    return asyncio.run(tokenizer.encode(text))


def pieces(tokenizer, prompt, tokens, sizes, **options):
    stream = tokenizer.detokenizer(prompt, **options)
    sizes = iter(sizes)
    out = []
    while tokens:
        size = next(sizes, 1)
        out.append(stream.add(tokens[:size]))
        tokens = tokens[size:]
    return out


@given(text=texts, context=texts, sizes=cuts)
def test_pieces_make_the_text_and_never_split_a_character(tokenizer, text, context, sizes):
    prompt = encode(tokenizer, "the fox " + context)
    tokens = encode(tokenizer, "the fox " + context + text)[len(prompt) :]
    if prompt + tokens != encode(tokenizer, "the fox " + context + text):
        return  # the boundary merged: these are not tokens that continue this prompt
    out = pieces(tokenizer, prompt, tokens, sizes)
    assert "".join(out) == text
    assert not any("\ufffd" in piece for piece in out)


@given(data=st.data(), sizes=cuts)
def test_any_tokens_whatsoever_give_what_decoding_them_at_once_gives(data, sizes):
    tokenizer = byte_level_tokenizer()
    tokens = data.draw(st.lists(st.integers(2, tokenizer.vocab_size - 1), max_size=40))
    prompt = encode(tokenizer, "the fox")
    whole = tokenizer.decode(prompt + tokens)[len(tokenizer.decode(prompt)) :]
    out = "".join(pieces(tokenizer, prompt, tokens, sizes))
    # All but the character that the end of the output cut.
    assert out == whole or out + "\ufffd" == whole


@given(cut=st.integers(1, 3), sizes=cuts)
def test_a_character_cut_by_the_end_of_the_prompt_is_completed(tokenizer, cut, sizes):
    tokens = encode(tokenizer, "the 😀 fox")
    (begin,) = [i for i in range(len(tokens)) if tokenizer.token_bytes(tokens[i]).endswith(b"\xf0")]
    out = pieces(tokenizer, tokens[: begin + cut], tokens[begin + cut :], sizes)
    assert "".join(out) == "😀 fox"


def test_the_first_word_keeps_its_space(tokenizer):
    tokens = encode(tokenizer, "the quick fox")
    prompt = encode(tokenizer, "the quick")
    assert "".join(pieces(tokenizer, prompt, tokens[len(prompt) :], [])) == " fox"


def test_special_tokens_are_shown_only_if_asked(tokenizer):
    tokens = [*encode(tokenizer, "fox"), tiny_tokenizer.EOS]
    assert "".join(pieces(tokenizer, [], tokens, [])).strip() == "fox"
    assert "".join(pieces(tokenizer, [], tokens, [], skip_special_tokens=False)).strip() == "fox</s>"


def test_the_bytes_of_tokens_join_to_the_text(tokenizer):
    text = "the 😀 世界"
    joined = b"".join(tokenizer.token_bytes(token) for token in encode(tokenizer, text))
    assert joined.decode().strip() == text
    assert tokenizer.token_bytes(tiny_tokenizer.EOS) == b"</s>"
    assert tokenizer.token_text(10**6) == ""


def test_end_of_sequence_comes_from_the_generation_configuration(tokenizer):
    assert tokenizer.eos_token_ids == (tiny_tokenizer.EOS, tiny_tokenizer.PAD)


def test_long_texts_encode_the_same_off_the_loop(tokenizer):
    text = "the quick brown fox " * 1000
    assert encode(tokenizer, text) == tokenizer._encode(text, True)


def test_chat_template(tokenizer):
    messages = [{"role": "user", "content": "the fox"}]
    tokens = asyncio.run(tokenizer.encode_chat(messages))
    assert tokenizer.decode(tokens).strip() == "<|user|>the fox\n<|assistant|>"
    with pytest.raises(InvalidRequest, match="no such role: wizard"):
        asyncio.run(tokenizer.encode_chat([{"role": "wizard", "content": "x"}]))


def test_a_model_without_a_chat_template_says_so(tmp_path):
    tokenizer = Tokenizer(str(tiny_tokenizer.write(tmp_path, template=None)))
    with pytest.raises(InvalidRequest, match="chat template"):
        asyncio.run(tokenizer.encode_chat([{"role": "user", "content": "x"}]))


def test_end_of_sequence_without_a_generation_configuration(tmp_path):
    tiny_tokenizer.write(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 1000, "eos_token_id": 7}))
    tokenizer = Tokenizer(str(tmp_path))
    assert tokenizer.eos_token_ids == (tiny_tokenizer.EOS, 7)
    assert tokenizer.vocab_size == 1000
