"""Text to tokens and back: the checkpoint's own tokenizer and chat template."""

from __future__ import annotations

import asyncio
import codecs
import functools
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from tokenizers import Tokenizer as Backend

from app.errors import InvalidRequest

# Encoding more characters than this takes over a millisecond: that much is done off the event loop.
LONG_TEXT = 4096
# Bytes of the longest character in UTF-8, so the most tokens that an unfinished one can have.
LONGEST_CHARACTER = 4

Result = TypeVar("Result")


class Tokenizer:
    """The tokenizer in directory ``path``. Raises ValueError when it is none of the ``tokenizers`` library's.

    ``eos_token_ids`` come from the generation configuration, else the model's, and always include the tokenizer's
    own; ``vocab_size`` is the model's: token ids of requests must be below it.
    """

    def __init__(self, path: str) -> None:
        from transformers import AutoTokenizer  # seconds, and only who serves needs it

        self._templates = AutoTokenizer.from_pretrained(path)
        backend = getattr(self._templates, "backend_tokenizer", None)
        if not isinstance(backend, Backend):
            raise ValueError(
                f"the tokenizer in {path} is a {type(self._templates).__name__} without a tokenizer.json: "
                "convert it to one first (save_pretrained of a fast tokenizer writes it)"
            )
        self._backend: Backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenizer")
        config = _read_json(Path(path, "config.json"))
        eos = _read_json(Path(path, "generation_config.json")).get("eos_token_id", config.get("eos_token_id"))
        ids = eos if isinstance(eos, list) else [eos]
        self.eos_token_ids = tuple(sorted({id for id in [*ids, self._templates.eos_token_id] if id is not None}))
        text_config = config.get("text_config", config)
        self.vocab_size = max(int(text_config.get("vocab_size", 0)), self._backend.get_vocab_size())
        decoder = self._backend.decoder
        self._byte_level = decoder is not None and b"ByteLevel" in decoder.__getstate__()
        self._added = self._backend.get_added_tokens_decoder()
        self._special = frozenset(token for token, added in self._added.items() if added.special)
        self.token_bytes: Callable[[int], bytes] = functools.lru_cache(maxsize=1 << 16)(self._token_bytes)

    # --- to tokens ----------------------------------------------------------------------------------------------

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; long texts are encoded in a thread."""
        return await self._run(len(text), lambda: self._encode(text, add_special_tokens))

    async def encode_chat(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation through the chat template. Raises InvalidRequest when the template refuses it."""

        def render_and_encode() -> list[int]:
            try:
                text = self._templates.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
                )
            except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
                message = f"The model's chat template can't render these messages: {error}"
                raise InvalidRequest(message, param="messages") from error
            return self._encode(str(text), add_special_tokens=False)

        size = sum(len(message.get("content") or "") for message in messages)
        return await self._run(size, render_and_encode)

    async def _run(self, size: int, work: Callable[[], Result]) -> Result:
        if size <= LONG_TEXT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    # --- to text ------------------------------------------------------------------------------------------------

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def detokenizer(self, prompt: Sequence[int], skip_special_tokens: bool = True) -> Detokenizer:
        """Turns the tokens that follow ``prompt`` into text as they come."""
        skip = self._special if skip_special_tokens else frozenset()
        return Detokenizer(self.token_bytes, skip, prompt)

    def token_text(self, token: int) -> str:
        """The text of one token by itself; bytes that are no whole character appear as U+FFFD."""
        return self.token_bytes(token).decode("utf-8", errors="replace")

    def _token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for; cached as ``token_bytes``."""
        added = self._added.get(token)
        if added is not None:
            return added.content.encode()
        piece = self._backend.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level:
            byte_of = _byte_level_alphabet()
            return b"".join(byte_of.get(character) or character.encode() for character in piece)
        single = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
        return bytes([int(single[1], 16)]) if single else piece.replace("\u2581", " ").encode()


class Detokenizer:
    """Incremental decoding that never shows part of a character.

    Tokens of byte-level and byte-fallback vocabularies stand for bytes, so an incremental UTF-8 decoder is exact
    however the tokens are cut: it holds an unfinished character back, completes one that the prompt's end began, and
    shows bytes that can't be part of any as U+FFFD. (``tokenizers``' own ``DecodeStream`` holds finished characters
    back as well when an unfinished one follows in the same step, and loses them if the output ends there.)
    """

    def __init__(self, token_bytes: Callable[[int], bytes], skip: frozenset[int], prompt: Sequence[int]) -> None:
        self._token_bytes = token_bytes
        self._skip = skip
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.add(prompt[-LONGEST_CHARACTER:])

    def add(self, tokens: Sequence[int]) -> str:
        """Returns the text that ``tokens`` complete, often empty."""
        return self._decoder.decode(b"".join(self._token_bytes(token) for token in tokens if token not in self._skip))


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


@functools.cache
def _byte_level_alphabet() -> dict[str, bytes]:
    """Character -> byte of byte-level BPE (Radford et al. 2019): printable Latin-1 stands for itself, the other bytes,
    in order, for the code points from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    code_points = {byte: byte for byte in printable} | {byte: 256 + place for place, byte in enumerate(others)}
    return {chr(code_point): bytes([byte]) for byte, code_point in code_points.items()}
