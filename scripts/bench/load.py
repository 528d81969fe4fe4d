"""The load generator: a closed loop of streamed completions against one OpenAI-compatible server.

``concurrency`` workers take prompts from one list; each sends its next request when its last one has ended. Times are
of ``time.perf_counter``, taken when a chunk with text arrives. The generator shares the machine with the server, so it
does as little as it can: one process, no model of the responses, JSON decoded after the clock was read.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass(frozen=True)
class Prompt:
    """The same prompt in both forms; its text tokenizes to exactly ``ids``."""

    ids: list[int]
    text: str


@dataclass(frozen=True)
class Dialect:
    """How a server wants a completion to be asked for.

    ``as_text``: it takes no token ids. ``extra`` are fields of its own, such as those that switch off the end of
    sequence; ``{tokens}`` in a string stands for the number of tokens wanted.
    """

    model: str
    extra: dict[str, Any]
    as_text: bool = False

    def body(self, prompt: Prompt, tokens: int) -> dict[str, Any]:
        extra = {k: v.replace("{tokens}", str(tokens)) if isinstance(v, str) else v for k, v in self.extra.items()}
        asked = prompt.text if self.as_text else prompt.ids
        return {"model": self.model, "prompt": asked, "max_tokens": tokens, "temperature": 0, "stream": True, **extra}


@dataclass(frozen=True)
class Answer:
    """One request: ``arrivals`` of its chunks in seconds since it was sent, the text, and the tokens by usage."""

    arrivals: list[float]
    text: str
    tokens: int


class RequestFailed(RuntimeError):
    """The server refused a request, broke its stream, or gave another number of tokens than asked for."""


@dataclass
class Recording:
    """One streamed request as it came: lines with events, and when. ``broken`` says what is wrong with it, if anything.

    ``status`` is None as long as nothing was answered, ``ended`` as long as it runs.
    """

    sent: float = field(default_factory=time.perf_counter)
    arrivals: list[float] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)
    status: int | None = None
    ended: float | None = None
    broken: str | None = None

    async def fill(self, session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> None:
        self.sent = time.perf_counter()
        try:
            async with session.post(f"{url}/v1/completions", json=body) as response:
                self.status = response.status
                if response.status != 200:
                    self.broken = f"HTTP {response.status}: {(await response.text())[:500]}"
                    return
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        self.arrivals.append(time.perf_counter())
                        self.lines.append(line)
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            self.broken = f"{type(error).__name__}: {error}"
        finally:
            self.ended = time.perf_counter()


async def ask(session: aiohttp.ClientSession, url: str, dialect: Dialect, prompt: Prompt, tokens: int) -> Answer:
    """One streamed completion of ``tokens`` tokens. Raises RequestFailed."""
    recording = Recording()
    await recording.fill(session, url, dialect.body(prompt, tokens))
    if recording.broken is not None:
        raise RequestFailed(recording.broken)
    text, used, seen = "", None, []
    for arrived, line in zip(recording.arrivals, recording.lines, strict=True):
        arrival = arrived - recording.sent
        event = json.loads(line[6:])
        if "error" in event:
            raise RequestFailed(f"error inside the stream: {event['error']}")
        for choice in event.get("choices") or ():
            # A chunk counts as a token when it has text or may have hidden one; the last one may carry only the reason.
            if choice.get("text") or not choice.get("finish_reason"):
                seen.append(arrival)
            text += choice.get("text") or ""
        used = event.get("usage") or used
    if used is None or used["completion_tokens"] != tokens or used["prompt_tokens"] != len(prompt.ids) or not seen:
        raise RequestFailed(f"asked for {tokens} tokens after {len(prompt.ids)}, the server's usage says {used}")
    return Answer(seen, text, tokens)


@dataclass(frozen=True)
class Level:
    """One round at one concurrency. Times in milliseconds; ``inter_token`` are the gaps between chunks.

    ``chunk_tokens`` is tokens per chunk: above 1, a server sends several tokens at once, and its gaps are longer than
    its tokens take.
    """

    concurrency: int
    requests: int
    failed: int
    seconds: float
    tokens_per_s: float
    ttft_p50: float
    ttft_p99: float
    inter_token_p50: float
    inter_token_p99: float
    chunk_tokens: float
    error: str | None = None


async def drive(
    url: str, dialect: Dialect, prompts: Sequence[Prompt], tokens: int, concurrency: int, limit_s: float
) -> Level:
    """Sends ``prompts`` at ``concurrency``; no request is sent once ``limit_s`` have passed, those under way end."""
    waiting = list(reversed(prompts))
    answers: list[Answer] = []
    errors: list[str] = []
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, read_bufsize=2**20) as session:
        started = time.perf_counter()

        async def worker() -> None:
            while waiting and time.perf_counter() - started < limit_s:
                try:
                    answers.append(await ask(session, url, dialect, waiting.pop(), tokens))
                except RequestFailed as error:
                    errors.append(str(error))

        await asyncio.gather(*(worker() for _ in range(concurrency)))
        seconds = time.perf_counter() - started
    first = [answer.arrivals[0] * 1000 for answer in answers]
    gaps = [(b - a) * 1000 for answer in answers for a, b in zip(answer.arrivals, answer.arrivals[1:], strict=False)]
    chunks = sum(len(answer.arrivals) for answer in answers)
    done = sum(answer.tokens for answer in answers)
    return Level(
        concurrency=concurrency,
        requests=len(answers),
        failed=len(errors),
        seconds=seconds,
        tokens_per_s=done / seconds,
        ttft_p50=percentile(first, 50),
        ttft_p99=percentile(first, 99),
        inter_token_p50=percentile(gaps, 50),
        inter_token_p99=percentile(gaps, 99),
        chunk_tokens=done / chunks if chunks else 0.0,
        error=errors[0] if errors else None,
    )


def percentile(values: Sequence[float], percent: int) -> float:
    """By linear interpolation; NaN of nothing."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
