"""One choice of an answer: its tokens become pieces of text. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from actors.wire import Delta, SamplingParams, TokenLogprobs
from app.stops import StopScanner
from app.tokenizer import Detokenizer


class Piece(NamedTuple):
    """What one delta added to a choice. ``logprobs`` belong to ``tokens``; ``finish`` is OpenAI's finish reason."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None
    finish: str | None


class Choice:
    """``tokens`` counts what was generated, including an end-of-sequence token, which is never shown."""

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str], sampling: SamplingParams) -> None:
        self.tokens = 0
        self.cached_tokens = 0
        self._detokenizer = detokenizer
        self._scanner = StopScanner(stops) if stops else None
        self._min_tokens = sampling.min_tokens
        self._ends = frozenset(sampling.eos_token_ids + sampling.stop_token_ids)

    def add(self, delta: Delta) -> Piece:
        """A finish in the piece that the delta does not have means that a stop string was hit."""
        tokens, finish = delta.tokens, delta.finish
        self.cached_tokens = self.cached_tokens or delta.cached_tokens
        shown = tokens[:-1] if finish == "stop" and tokens and tokens[-1] in self._ends else tokens
        if self._scanner is None:
            text = self._detokenizer.add(shown)
        else:
            exempt = max(0, self._min_tokens - self.tokens)  # stop strings count only after min_tokens
            text = self._detokenizer.add(shown[:exempt]) if exempt else ""
            text += self._scanner.add(self._detokenizer.add(shown[exempt:]))
            if self._scanner.hit is not None:
                finish = "stop"
            elif finish is not None:
                text += self._scanner.finish()
        self.tokens += len(tokens)
        return Piece(text, tokens, delta.logprobs, finish)
