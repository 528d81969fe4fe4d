"""``POST /v1/completions``."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import UNSET
from starlette.responses import Response

from actors.wire import TokenLogprobs
from app.answers import StreamedAnswer, WholeAnswer, usage_of
from app.choice import Piece
from app.protocol import CompletionBody
from app.responses import Completion, CompletionChoice, CompletionLogprobs, encode, event
from app.run import Run, Service
from app.tokenizer import Tokenizer

# OpenAI's default for a completion whose body gives no bound.
DEFAULT_LENGTH = 16


async def complete(body: CompletionBody, service: Service) -> Response:
    """Raises InvalidRequest; what goes wrong later is raised by the answer itself."""
    tokenizer = service.tokenizer
    prompts = [prompt if isinstance(prompt, list) else await tokenizer.encode(prompt) for prompt in body.prompt]
    run = Run(service, body, prompts, "cmpl", DEFAULT_LENGTH)
    echoes = [""] * len(run.choices)
    if body.echo:
        texts = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in body.prompt]
        echoes = [text for text in texts for _ in range(body.n or 1)]
    writer = _Writer(run, body, service, [_Progress(echo) for echo in echoes])
    return StreamedAnswer(run, writer, service.metrics) if body.stream else WholeAnswer(run, writer)


@dataclass
class _Progress:
    """One choice so far. ``pending`` is text to be sent before the next piece (the echoed prompt)."""

    pending: str
    offset: int = 0
    text: str = ""
    finish: str | None = None
    logprobs: CompletionLogprobs | None = None


class _Writer:
    def __init__(self, run: Run, body: CompletionBody, service: Service, progress: list[_Progress]) -> None:
        self._run = run
        self._body = body
        self._model = service.model
        self._tokenizer = service.tokenizer
        self._progress = progress
        self._no_usage = None if body.include_usage else UNSET

    def chunk(self, index: int, piece: Piece) -> bytes:
        progress = self._progress[index]
        text, logprobs, finish = piece.text, None, piece.finish
        if progress.pending:
            text, progress.pending = progress.pending + text, ""
        if piece.logprobs:
            logprobs = _logprobs(self._tokenizer, piece.tokens, piece.logprobs, progress.offset, self._body.logprobs)
            progress.offset += sum(map(len, logprobs.tokens))
        if not text and finish is None and logprobs is None:
            return b""
        run, choice = self._run, CompletionChoice(index, text, logprobs, finish)
        return event(Completion(run.id, run.created, self._model, [choice], self._no_usage))

    def usage(self) -> bytes:
        if not self._body.include_usage:
            return b""
        return event(Completion(self._run.id, self._run.created, self._model, [], usage_of(self._run)))

    def keep(self, index: int, piece: Piece) -> None:
        progress = self._progress[index]
        progress.text += piece.text
        progress.finish = piece.finish
        if piece.logprobs:
            new = _logprobs(self._tokenizer, piece.tokens, piece.logprobs, progress.offset, self._body.logprobs)
            progress.offset += sum(map(len, new.tokens))
            old = progress.logprobs
            if old is None:
                progress.logprobs = new
                return
            old.tokens += new.tokens
            old.token_logprobs += new.token_logprobs
            old.text_offset += new.text_offset
            if old.top_logprobs is not None and new.top_logprobs is not None:
                old.top_logprobs += new.top_logprobs

    def whole(self) -> bytes:
        run = self._run
        choices = [
            CompletionChoice(index, progress.pending + progress.text, progress.logprobs, progress.finish)
            for index, progress in enumerate(self._progress)
        ]
        return encode(Completion(run.id, run.created, self._model, choices, usage_of(run)))


def _logprobs(
    tokenizer: Tokenizer, tokens: list[int], logprobs: list[TokenLogprobs], offset: int, alternatives: int | None
) -> CompletionLogprobs:
    texts = [tokenizer.token_text(token) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    top = None
    if alternatives:
        # The chosen token is listed even when it is not among the most likely.
        top = [
            {tokenizer.token_text(token): logprob for token, logprob in item.top} | {text: item.logprob}
            for text, item in zip(texts, logprobs, strict=True)
        ]
    return CompletionLogprobs(texts, [item.logprob for item in logprobs], top, offsets)
