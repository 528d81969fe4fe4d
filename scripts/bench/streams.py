"""Steady load of greedy streams, each answer compared with what the same server said undisturbed.

``Streams`` keeps a fixed number of streams going until it is left. Every request keeps the times of its tokens, so
that the gaps in any span of the run can be asked for afterwards. Times are of ``time.perf_counter``.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import aiohttp
from load import Dialect, Prompt, Recording, RequestFailed

# Ids that every vocabulary of a real model has, beyond those that stand for bytes and special tokens.
TOKEN_IDS = range(512, 16384)
BAD = ("failed", "aborted", "refused", "different")
# After a bad answer, so that a server that refuses everything is not asked a thousand times a second.
BACK_OFF_S = 0.25
TICK_S = 0.02


@dataclass(frozen=True)
class Case:
    """A prompt and how many tokens are asked for."""

    prompt: Prompt
    tokens: int


@dataclass(frozen=True)
class Said:
    """An answer: its text, and the text of each of its tokens when the server tells them (as log probabilities)."""

    text: str
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """``arrivals`` are the times of its tokens; ``outcome`` is ``complete``, ``open`` or one of ``BAD``."""

    stream: int
    case: int
    sent: float
    ended: float
    arrivals: tuple[float, ...]
    outcome: str
    note: str = ""

    @property
    def moments(self) -> tuple[float, ...]:
        """Between these its reader waited: one that breaks off, or has not ended, counts up to its end or now."""
        return self.arrivals if self.outcome in ("complete", "different") else (*self.arrivals, self.ended)


def some_cases(count: int, seed: int = 0) -> list[Case]:
    """The same for the same seed: prompts of 32 to 128 random tokens, 48 to 96 tokens asked for."""
    source = random.Random(f"cases {seed}")
    return [
        Case(Prompt(source.choices(TOKEN_IDS, k=source.randint(32, 128)), ""), source.randint(48, 96))
        for _ in range(count)
    ]


def dialect_of(model: str) -> Dialect:
    # With log probabilities each token is named, and has an event even if it has no text by itself.
    return Dialect(model, {"ignore_eos": True, "logprobs": 0, "stream_options": {"include_usage": True}})


def read(recording: Recording, tokens: int) -> tuple[Said, tuple[float, ...], str, str]:
    """What was said and when, the outcome without regard to what should have been said, and a note on it."""
    text, names, arrivals, finish, used, trouble = "", [], [], None, None, recording.broken
    for arrived, line in zip(list(recording.arrivals), recording.lines, strict=False):
        event = json.loads(line[6:])
        if "error" in event:
            trouble = trouble or f"error inside the stream: {event['error']}"
        used = event.get("usage") or used
        for choice in event.get("choices") or ():
            new = (choice.get("logprobs") or {}).get("tokens") or ()
            if new or choice.get("text"):
                arrivals.append(arrived)
            text += choice.get("text") or ""
            names += new
            finish = choice.get("finish_reason") or finish
    said = Said(text, tuple(names))
    if recording.ended is None:
        return said, tuple(arrivals), "open", ""
    if recording.status is not None and (400 <= recording.status < 500 or recording.status == 503):
        return said, (), "refused", trouble or ""
    if finish == "abort":
        return said, tuple(arrivals), "aborted", f"after {len(arrivals)} chunks"
    got = (used or {}).get("completion_tokens")
    if trouble is None and (got != tokens or finish is None):
        trouble = f"asked for {tokens} tokens; the server's usage says {got}, the reason of its end is {finish}"
    return said, tuple(arrivals), "failed" if trouble else "complete", trouble or ""


def judge(recording: Recording, stream: int, case: int, tokens: int, expected: Said) -> Request:
    """A request, over or not, beside what it should say."""
    said, arrivals, outcome, note = read(recording, tokens)
    if outcome == "complete" and said != expected:
        outcome, note = "different", difference(said, expected)
    ended = time.perf_counter() if recording.ended is None else recording.ended
    return Request(stream, case, recording.sent, ended, arrivals, outcome, note)


def difference(said: Said, expected: Said) -> str:
    for place, (one, other) in enumerate(zip(said.tokens, expected.tokens, strict=False)):
        if one != other:
            return f"token {place} is {one!r}, not {other!r}"
    return f"{said.text[-40:]!r}, not {expected.text[-40:]!r}"


async def reference(
    session: aiohttp.ClientSession, url: str, dialect: Dialect, cases: Sequence[Case]
) -> tuple[list[Said], list[float]]:
    """What is said to each case alone, and the gaps between tokens meanwhile in ms. Raises RequestFailed."""
    answers, gaps = [], []
    for case in cases:
        recording = Recording()
        await recording.fill(session, url, dialect.body(case.prompt, case.tokens))
        said, arrivals, outcome, note = read(recording, case.tokens)
        if outcome != "complete":
            raise RequestFailed(f"a request alone on the server {outcome}: {note}")
        answers.append(said)
        gaps += [(b - a) * 1000 for a, b in pairwise(arrivals)]
    return answers, gaps


class Streams:
    """A closed loop: each of ``count`` streams sends its next request when its last one has ended.

    A context manager; leaving it lets what runs end. ``stalls`` are (when, seconds) this process itself was late, which
    it shows as a gap of all streams although the server did nothing wrong.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        dialect: Dialect,
        cases: Sequence[Case],
        expected: Sequence[Said],
        count: int,
    ) -> None:
        self.stalls: list[tuple[float, float]] = []
        self._session = session
        self._url = url
        self._dialect = dialect
        self._cases = cases
        self._expected = expected
        self._count = count
        self._ended: list[Request] = []
        self._open: dict[int, tuple[int, Recording]] = {}
        self._leaving = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Streams:
        self._tasks = [asyncio.create_task(self._stream(number)) for number in range(self._count)]
        self._ticking = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, kind: Any, *exc: object) -> None:
        self._leaving = True
        self._ticking.cancel()
        if kind is not None:
            # What is broken off here is no failure of the server.
            self._ended, self._open = self.requests, {}
            for task in self._tasks:
                task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception) and kind is None:
                raise outcome

    @property
    def requests(self) -> list[Request]:
        """Those that have ended, and those under way as far as they got."""
        return [*self._ended, *(self._judge(stream, *under_way) for stream, under_way in self._open.items())]

    def _judge(self, stream: int, case: int, recording: Recording) -> Request:
        return judge(recording, stream, case, self._cases[case].tokens, self._expected[case])

    async def _stream(self, stream: int) -> None:
        source = random.Random(f"stream {stream}")
        while not self._leaving:
            case = source.randrange(len(self._cases))
            recording = Recording()
            self._open[stream] = (case, recording)
            asked = self._cases[case]
            await recording.fill(self._session, self._url, self._dialect.body(asked.prompt, asked.tokens))
            del self._open[stream]
            request = self._judge(stream, case, recording)
            self._ended.append(request)
            if request.outcome in BAD:
                await asyncio.sleep(BACK_OFF_S)

    async def _tick(self) -> None:
        while True:
            due = time.perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            late = time.perf_counter() - due
            if late > TICK_S:
                self.stalls.append((due, late))


def gaps(requests: Iterable[Request], start: float, end: float, inside: bool = False) -> list[float]:
    """Milliseconds between tokens of one request, of all gaps that touch the span, or lie inside it."""
    return [
        (b - a) * 1000
        for request in requests
        if request.sent < end and request.ended > start
        for a, b in pairwise(request.moments)
        if (start <= a and b <= end if inside else a < end and b > start)
    ]


def longest_gap(requests: Iterable[Request], start: float, end: float) -> tuple[float, float]:
    """Milliseconds of the longest gap that touches the span, and when it began; NaN of nothing."""
    touching = (
        ((b - a) * 1000, a)
        for request in requests
        if request.sent < end and request.ended > start
        for a, b in pairwise(request.moments)
        if a < end and b > start
    )
    return max(touching, default=(math.nan, math.nan))


def first_tokens(requests: Iterable[Request], start: float, end: float) -> list[float]:
    """Milliseconds that requests waited for their first token, of all waits that touch the span."""
    return [
        (request.moments[0] - request.sent) * 1000
        for request in requests
        if request.outcome != "refused" and request.sent < end and request.moments[0] > start
    ]
