"""One step's work of one rank: what the scheduler decided and the model runner executes."""

from __future__ import annotations

from dataclasses import dataclass

from actors.wire import SamplingParams, TokenLogprobs


@dataclass(frozen=True)
class Slice:
    """One request's share of a step: ``tokens`` at positions ``start, start + 1, ...`` of its sequence.

    ``blocks`` is the request's block table; it covers positions ``0 .. start + len(tokens) - 1``. ``samples`` says that
    the slice ends at the last token, so its last row of logits yields the next one. ``prompt`` and ``generated`` are
    what penalties and ``min_tokens`` look at; ``generated`` is a reference to the request's own list.

    ``follows``: the only token is not known yet (0 stands in its place). The step launched before this one draws it, as
    the one of that number among its sampling slices.
    """

    request_id: str
    tokens: list[int]
    start: int
    blocks: list[int]
    samples: bool
    prompt: list[int]
    generated: list[int]
    sampling: SamplingParams
    follows: int | None = None

    @property
    def end(self) -> int:
        """The position behind the last token: of the token that is sampled, if one is."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Batch:
    """All slices of a step, decodes first. Packed in this order into one row of tokens."""

    slices: tuple[Slice, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(s.tokens) for s in self.slices)

    @property
    def sampling_slices(self) -> tuple[Slice, ...]:
        """Slices that sample, in the order of the rows of logits the runner returns."""
        return tuple(s for s in self.slices if s.samples)


@dataclass(frozen=True)
class Sampled:
    """The next token of one sampling slice. A slice without one has a ``wire.Failure`` in its place."""

    token: int
    logprobs: TokenLogprobs | None = None


EMPTY = Batch(slices=())
