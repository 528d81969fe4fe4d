"""One request inside a rank: its tokens, how far they are computed, and where."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from actors.engine.blocks import digest, root
from actors.wire import SamplingParams


class Status(Enum):
    """``WAITING`` for a first or another admission, ``RUNNING`` with blocks, or ``ENDED`` for whatever reason."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(eq=False)
class Request:
    """A sequence to be continued.

    ``client`` is where its tokens go, opaque here. ``generated`` follows ``prompt``; a request continued from another
    rank starts with tokens in it. ``salt`` separates prefix caches. The rest is the scheduler's: keys and values of
    the first ``computed`` tokens stand in ``blocks``, of which the first ``published`` can be found by others;
    ``cached_tokens`` is how many tokens of the prompt were found in the cache when it was first admitted. Of the tokens
    behind those, ``under_way`` are being computed; ``drawn`` is the number, among its step's sampling slices, of the
    one at whose end a next token is being drawn.
    """

    request_id: str
    client: bytes
    prompt: list[int]
    sampling: SamplingParams
    generated: list[int] = field(default_factory=list)
    salt: bytes = b""
    status: Status = Status.WAITING
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    published: int = 0
    cached_tokens: int | None = None
    under_way: int = 0
    drawn: int | None = None
    _digests: list[bytes] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.generated)

    @property
    def left(self) -> int:
        """Tokens to compute in steps to come, one that is being drawn included."""
        return len(self) + (self.drawn is not None) - self.computed - self.under_way

    @property
    def foreseeable(self) -> bool:
        """Whether a next token can be drawn on the device while the host does not know the one before: no penalty."""
        s = self.sampling
        return s.repetition_penalty == 1 and not (s.presence_penalty or s.frequency_penalty)

    def outgrown(self, length: int, max_model_len: int) -> bool:
        """Whether it ends at the latest with ``length`` tokens, those of the prompt included."""
        return length - len(self.prompt) >= self.sampling.max_tokens or length >= max_model_len

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens at positions ``start .. end - 1`` of prompt and generated."""
        border = len(self.prompt)
        if start >= border:
            return self.generated[start - border : end - border]
        if end <= border:
            return self.prompt[start:end]
        return self.prompt[start:] + self.generated[: end - border]

    def digests(self, start: int, end: int, block_size: int) -> list[bytes]:
        """Chained digests of the full blocks number ``start .. end - 1``; each is computed once."""
        known = self._digests
        while len(known) < end:
            first = len(known) * block_size
            known.append(digest(known[-1] if known else root(self.salt), self.tokens(first, first + block_size)))
        return known[start:end]

    def finish_reason(self, max_model_len: int) -> tuple[str | None, int | None]:
        """Whether the last generated token ends the request: (finish, stop_token) as in ``wire.Delta``."""
        sampling, token = self.sampling, self.generated[-1]
        if len(self.generated) > sampling.min_tokens:
            if token in sampling.eos_token_ids:
                return "stop", None
            if token in sampling.stop_token_ids:
                return "stop", token
        if self.outgrown(len(self), max_model_len):
            return "length", None
        return None, None

    def complaint(self, *, max_model_len: int, vocab_size: int) -> str | None:
        """What makes this request impossible for the model, with the fix; None if nothing does."""
        sampling = self.sampling
        if not self.prompt:
            return "the prompt is empty: send at least one token"
        if len(self.prompt) >= max_model_len:
            return (
                f"the prompt has {len(self.prompt)} tokens and max_model_len is {max_model_len}, which must hold at "
                f"least one more: shorten the prompt or raise max_model_len"
            )
        if len(self) >= max_model_len:
            return f"the request has {len(self)} tokens already and max_model_len is {max_model_len}: it is complete"
        if len(self.generated) >= sampling.max_tokens:
            return (
                f"max_tokens is {sampling.max_tokens} and {len(self.generated)} tokens are generated already: "
                f"raise max_tokens or send nothing"
            )
        for token in (min(self.prompt), max(self.prompt), *self.generated, *(sampling.logit_bias or ())):
            if not 0 <= token < vocab_size:
                return f"token id {token} is outside the vocabulary: ids go from 0 to {vocab_size - 1}"
        for name, value, fine, fix in (
            ("temperature", sampling.temperature, sampling.temperature >= 0, "0 or more"),
            ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "above 0 and at most 1"),
            ("top_k", sampling.top_k, sampling.top_k >= 0, "0 (off) or more"),
            ("min_p", sampling.min_p, 0 <= sampling.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", sampling.repetition_penalty, sampling.repetition_penalty > 0, "above 0"),
            ("presence_penalty", sampling.presence_penalty, True, "finite"),
            ("frequency_penalty", sampling.frequency_penalty, True, "finite"),
            ("logprobs", sampling.logprobs or 0, (sampling.logprobs or 0) >= 0, "0 or more"),
        ):
            if not (fine and math.isfinite(value)):
                return f"{name} is {value}: it must be {fix}"
        if any(math.isnan(bias) for bias in (sampling.logit_bias or {}).values()):
            return "logit_bias contains NaN: give numbers"
        return None
