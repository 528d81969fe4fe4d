"""One API call under way: prompts times choices, submitted together, read as pieces of text."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import msgspec

from app.call import Call
from app.choice import Choice, Piece
from app.client import Client
from app.errors import ServingError
from app.flight import Generation
from app.limits import Limits
from app.metrics import Metrics
from app.protocol import GenerationBody
from app.sampling import check_counts, check_prompt, derive, resolve
from app.tokenizer import Tokenizer


@dataclass(frozen=True)
class Service:
    """What every endpoint works with."""

    client: Client
    tokenizer: Tokenizer
    limits: Limits
    model: str
    metrics: Metrics


class Run:
    """The choices of one call: prompt ``i`` has choices ``i * n`` to ``i * n + n - 1``.

    The constructor checks everything against the limits and raises InvalidRequest. Entering the context submits,
    leaving it aborts what is unfinished; in between it is an asynchronous iterator over batches of (choice, piece).
    ``default_length`` bounds an answer when the body does not (None: the rest of the context).
    """

    def __init__(
        self,
        service: Service,
        body: GenerationBody,
        prompts: Sequence[list[int]],
        prefix: str,
        default_length: int | None = None,
        param: str = "prompt",
    ) -> None:
        self.arrived_at = time.perf_counter()
        self.created = int(time.time())
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.prompt_tokens = sum(map(len, prompts))
        self.choices: list[Choice] = []
        self._service = service
        self._generations: list[Generation] = []
        self._last_at: list[float] = []
        self._call: Call | None = None
        check_counts(body, len(prompts), service.limits)
        for prompt in prompts:
            check_prompt(prompt, service.limits, service.tokenizer.vocab_size, param)
            sampling = resolve(body, prompt, service.limits, service.tokenizer, default_length)
            for number in range(body.n or 1):
                seeded = msgspec.structs.replace(sampling, seed=derive(sampling.seed, number))
                request_id = f"{self.id}-{len(self.choices)}"
                self._generations.append(Generation(request_id, prompt, seeded, body.data_parallel_rank))
                detokenizer = service.tokenizer.detokenizer(prompt, body.skip_special_tokens)
                self.choices.append(Choice(detokenizer, body.stop or (), seeded))

    @property
    def generated_tokens(self) -> int:
        return sum(choice.tokens for choice in self.choices)

    @property
    def cached_tokens(self) -> int:
        return sum(choice.cached_tokens for choice in self.choices)

    def __enter__(self) -> Run:
        self._call = self._service.client.call(self._generations)
        self._service.metrics.prompt_tokens.inc(self.prompt_tokens)
        self._last_at = [0.0] * len(self.choices)
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._call is not None
        self._call.__exit__(*exc)

    def fail(self, error: ServingError) -> None:
        """Aborts everything; whoever reads gets ``error``."""
        assert self._call is not None
        self._call.fail(error)

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        assert self._call is not None
        metrics = self._service.metrics
        async for batch in self._call:
            now = time.perf_counter()
            pieces = []
            for index, delta in batch:
                piece = self.choices[index].add(delta)
                pieces.append((index, piece))
                last, self._last_at[index] = self._last_at[index], now
                if last:
                    metrics.inter_token.observe(now - last)
                else:
                    metrics.first_token.observe(now - self.arrived_at)
                if piece.finish is not None:
                    if delta.finish is None:
                        self._call.drop(index)
                    metrics.requests.labels(piece.finish).inc()
                    metrics.request.observe(now - self.arrived_at)
            yield pieces
