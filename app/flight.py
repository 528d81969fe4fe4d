"""One request on its way through the group, as its client sees it: pure, no sockets and no clock.

The client owns the request: it keeps the prompt and every token it has received, so that any rank can continue it.
Each attempt on a rank has a name of its own on the wire; a delta of an abandoned attempt therefore finds no flight.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from actors.wire import Delta, SamplingParams, Submit


class Generation(msgspec.Struct, frozen=True):
    """A request as its caller gives it. ``prompt`` are token ids; ``rank`` names a DP rank, or None to balance."""

    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    rank: int | None = None


class TokensMissing(Exception):
    """A delta starts after the tokens received so far: some were lost on the way."""


class Flight:
    """Progress of one request.

    ``index`` is its place among the requests of one call. ``tokens`` are all generated tokens received, ``rank`` and
    ``wire_id`` the present attempt (None while it has no rank). ``notify(flight)`` is called when ``take`` has
    something new.
    """

    __slots__ = (
        "_notify",
        "_pending",
        "admitted_at",
        "answered",
        "attempts",
        "generation",
        "index",
        "min_epoch",
        "rank",
        "seen",
        "tokens",
        "wire_id",
    )

    def __init__(self, generation: Generation, index: int, admitted_at: float, notify: Callable[[Flight], None]):
        self.generation = generation
        self.index = index
        self.admitted_at = admitted_at
        self.tokens: list[int] = []
        self.answered = False  # an output of the present attempt came
        self.seen = False  # an output of any attempt came
        self.attempts = 0
        self.rank: int | None = None
        self.wire_id = generation.request_id
        self.min_epoch = 0
        self._pending: Delta | None = None
        self._notify = notify

    def submit(self, epoch: int) -> Submit:
        """The message that starts the present attempt, or continues from the tokens received in earlier ones."""
        generation = self.generation
        return Submit(epoch, self.wire_id, generation.prompt, self.tokens, generation.sampling)

    def next_attempt(self) -> None:
        """Gives up the present attempt: the next one has another name, so late deltas of this one are strangers."""
        self.attempts += 1
        self.wire_id = f"{self.generation.request_id}~{self.attempts}"
        self.rank = None
        self.answered = False

    def absorb(self, delta: Delta) -> None:
        """Adds what is new in a delta of the present attempt; tokens already received are dropped.

        Raises TokensMissing when the delta starts after them.
        """
        known = len(self.tokens) - delta.offset
        if known < 0:
            raise TokensMissing(f"{self.wire_id}: got tokens from {delta.offset} on, but holds only {len(self.tokens)}")
        if known:
            delta.tokens = delta.tokens[known:]
            delta.offset += known
            if delta.logprobs is not None:
                delta.logprobs = delta.logprobs[known:]
        if not delta.tokens and delta.finish is None:
            return
        self.tokens += delta.tokens
        pending = self._pending
        if pending is None:
            self._pending = delta
            self._notify(self)
            return
        pending.tokens += delta.tokens
        if pending.logprobs is not None and delta.logprobs is not None:
            pending.logprobs += delta.logprobs
        pending.finish = delta.finish
        pending.stop_token = delta.stop_token

    def take(self) -> Delta:
        """All that came since the last call, as one delta. Valid after ``notify``, once per notification."""
        pending = self._pending
        assert pending is not None, f"{self.wire_id} has nothing to take"
        self._pending = None
        return pending
