"""``POST /v1/chat/completions``."""

from __future__ import annotations

from msgspec import UNSET
from starlette.responses import Response

from app.answers import StreamedAnswer, WholeAnswer, usage_of
from app.choice import Piece
from app.protocol import ChatBody
from app.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    TopLogprob,
    encode,
    event,
)
from app.run import Run, Service
from app.tokenizer import Tokenizer

ROLE = "assistant"


async def chat(body: ChatBody, service: Service) -> Response:
    """Raises InvalidRequest; what goes wrong later is raised by the answer itself."""
    messages = [message.rendered() for message in body.messages]
    prompt = await service.tokenizer.encode_chat(messages, body.add_generation_prompt)
    run = Run(service, body, [prompt], "chatcmpl", param="messages")
    writer = _Writer(run, body, service)
    return StreamedAnswer(run, writer, service.metrics) if body.stream else WholeAnswer(run, writer)


class _Writer:
    def __init__(self, run: Run, body: ChatBody, service: Service) -> None:
        self._run = run
        self._body = body
        self._model = service.model
        self._tokenizer = service.tokenizer
        self._no_usage = None if body.include_usage else UNSET
        self._introduced = [False] * len(run.choices)
        count = len(run.choices)
        self._texts: list[list[str]] = [[] for _ in range(count)]
        self._logprobs: list[list[ChatLogprob]] = [[] for _ in range(count)]
        self._finishes: list[str | None] = [None] * count

    def chunk(self, index: int, piece: Piece) -> bytes:
        logprobs = ChatLogprobs(_logprobs(self._tokenizer, piece)) if piece.logprobs else None
        if not piece.text and piece.finish is None and logprobs is None:
            return b""
        head = b""
        if not self._introduced[index]:
            self._introduced[index] = True
            head = self._event(ChatChunkChoice(index, ChatDelta(ROLE, "")))
        delta = ChatDelta(content=piece.text or None)
        return head + self._event(ChatChunkChoice(index, delta, logprobs, piece.finish))

    def usage(self) -> bytes:
        if not self._body.include_usage:
            return b""
        return event(ChatChunk(self._run.id, self._run.created, self._model, [], usage_of(self._run)))

    def keep(self, index: int, piece: Piece) -> None:
        self._texts[index].append(piece.text)
        self._logprobs[index] += _logprobs(self._tokenizer, piece)
        self._finishes[index] = piece.finish

    def whole(self) -> bytes:
        run = self._run
        choices = [
            ChatChoice(
                index,
                ChatMessage(ROLE, "".join(self._texts[index])),
                ChatLogprobs(self._logprobs[index]) if self._body.logprobs else None,
                self._finishes[index],
            )
            for index in range(len(run.choices))
        ]
        return encode(ChatCompletion(run.id, run.created, self._model, choices, usage_of(run)))

    def _event(self, choice: ChatChunkChoice) -> bytes:
        return event(ChatChunk(self._run.id, self._run.created, self._model, [choice], self._no_usage))


def _logprobs(tokenizer: Tokenizer, piece: Piece) -> list[ChatLogprob]:
    entries = []
    for token, item in zip(piece.tokens, piece.logprobs or (), strict=False):
        top = [TopLogprob(*_text_and_bytes(tokenizer, other, logprob)) for other, logprob in item.top]
        entries.append(ChatLogprob(*_text_and_bytes(tokenizer, token, item.logprob), top))
    return entries


def _text_and_bytes(tokenizer: Tokenizer, token: int, logprob: float) -> tuple[str, float, list[int]]:
    return tokenizer.token_text(token), logprob, list(tokenizer.token_bytes(token))
