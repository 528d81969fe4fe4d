"""Everything that crosses a socket, as typed msgspec structs; nothing is ever unpickled.

Three conversations:

* client ⇄ engine: the engine binds a ROUTER, each client connects a DEALER.
* engine or client ⇄ coordinator: the coordinator binds a ROUTER, the others connect DEALERs.
* coordinator → clients: the coordinator binds a PUB; it publishes ``View``.

Each frame is one msgpack-encoded struct; the struct's tag says which. Decoders are typed by direction, so that a
message of the wrong kind, shape or type is refused by the decoder and never reaches a protocol.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from actors.membership import Member

# Bounds of what protocols compute with: an epoch, wave or step that came off a socket still fits in an int64 tensor
# after any number of increments, and a rank can key a table without filling the memory.
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]
Rank = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How one request is sampled. The client has resolved defaults: nothing here depends on the model's files.

    ``seed`` is always set (the client draws one when the user gave none): token number ``p`` of the sequence is
    sampled with randomness keyed by ``(seed, p)`` alone, so another rank can continue the request.
    ``top_k = 0`` and ``temperature = 0`` mean "off" and "greedy". ``logprobs`` is the number of alternatives to
    return per token (0: the chosen token's only; None: none). ``eos_token_ids`` is empty when EOS is ignored.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    min_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


# --- client → engine ---------------------------------------------------------------------------------------------


class Attach(msgspec.Struct, tag=True):
    """A client's first word on a connection, repeated until answered by ``Attached``."""


class Submit(msgspec.Struct, tag=True):
    """A request to start, or to continue: ``generated`` are the tokens the client already has from elsewhere.

    ``max_tokens`` and ``min_tokens`` of the sampling parameters count from the end of ``prompt``, so they include
    ``generated``.
    """

    epoch: int
    request_id: str
    prompt: list[int]
    generated: list[int]
    sampling: SamplingParams


class Abort(msgspec.Struct, tag=True):
    epoch: int
    request_ids: list[str]


class Beat(msgspec.Struct, tag=True):
    """Keep-alive, sent by a client every second and echoed by the engine.

    An engine that misses a client's beats aborts its requests; a client that misses an engine's echoes knows that
    the rank hangs.
    """

    epoch: int


ToEngine = Attach | Submit | Abort | Beat


# --- engine → client ---------------------------------------------------------------------------------------------


class Attached(msgspec.Struct, tag=True):
    """Answer to ``Attach``: who the client is connected to, and where its wave stands."""

    epoch: int
    rank: int
    wave: int
    running: bool


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Natural-log probabilities at one position, of the model's own distribution: before penalties, bias and filters.

    ``top`` holds (token id, logprob), most likely first.
    """

    logprob: float
    top: list[tuple[int, float]]


class Failure(msgspec.Struct, array_like=True):
    """Why a request failed. ``code`` is one of ``stale_epoch`` (submit again in the new epoch), ``invalid`` (the
    request's own fault), ``overloaded`` (queue full) and ``model_error`` (the model raised on it)."""

    code: str
    message: str


class Delta(msgspec.Struct, array_like=True):
    """What one step added to one request.

    ``offset`` is how many generated tokens precede ``tokens``: a client that replayed the request drops what it
    already has. ``finish`` is None while running, else ``stop`` (EOS, or ``stop_token`` when one of the request's
    stop token ids was hit), ``length``, ``abort`` or ``error`` (see ``failure``).
    """

    request_id: str
    offset: int
    tokens: list[int]
    finish: str | None = None
    stop_token: int | None = None
    cached_tokens: int = 0
    logprobs: list[TokenLogprobs] | None = None
    failure: Failure | None = None


class Outputs(msgspec.Struct, tag=True):
    """All deltas of one completed step for one client."""

    epoch: int
    rank: int
    wave: int
    step: int
    deltas: list[Delta]


FromEngine = Attached | Outputs | Beat


# --- engine or client → coordinator ------------------------------------------------------------------------------


class Announce(msgspec.Struct, tag=True, frozen=True):
    """An engine tells a coordinator, new or restarted, where it stands; answered by nothing but ``StartWave``."""

    epoch: Count
    rank: Rank
    wave: Count
    running: bool


class StartWave(msgspec.Struct, tag=True, frozen=True):
    """Engine → coordinator: this rank woke by itself into ``wave``. Coordinator → engine: run ``wave``."""

    epoch: Count
    rank: Rank
    wave: Count


class WaveComplete(msgspec.Struct, tag=True, frozen=True):
    epoch: Count
    rank: Rank
    wave: Count


class Stats(msgspec.Struct, tag=True, frozen=True):
    """A rank's load after ``step`` of ``wave``. ``kv_used`` and ``kv_total`` count blocks."""

    epoch: Count
    rank: Rank
    wave: Count
    step: Count
    waiting: Count
    running: Count
    kv_used: Count
    kv_total: Count


class FirstRequest(msgspec.Struct, tag=True, frozen=True):
    """A client sent a request to ``rank`` while it believed the group paused in ``wave``."""

    epoch: Count
    rank: Rank
    wave: Count


class Lookup(msgspec.Struct, tag=True, frozen=True):
    """A client asks for the current ``View`` instead of waiting for the next publication."""


ToCoordinator = Announce | StartWave | WaveComplete | Stats | FirstRequest | Lookup


# --- coordinator → clients ---------------------------------------------------------------------------------------


class Load(msgspec.Struct, frozen=True, array_like=True):
    """One rank's load in a ``View``; ``wave`` and ``step`` say when it was taken."""

    rank: int
    wave: int
    step: int
    waiting: int
    running: int
    kv_used: int
    kv_total: int


class View(msgspec.Struct, tag=True):
    """What front-ends know of the group: its members in ``epoch``, its wave, and its ranks' loads.

    ``leaving`` are members that get nothing new: they finish what they run, or lose it to others in the next epoch.
    ``number`` counts the views of one coordinator, so that one that was overtaken on the way is known as such.
    """

    epoch: int
    members: list[Member]
    wave: int
    running: bool
    loads: list[Load]
    leaving: list[int] = []
    number: int = 0


# One encoder serves all threads of a process (msgspec encoders hold no state between calls); decoders are typed.
encode = msgspec.msgpack.Encoder().encode
to_engine = msgspec.msgpack.Decoder(ToEngine).decode
from_engine = msgspec.msgpack.Decoder(FromEngine).decode
to_coordinator = msgspec.msgpack.Decoder(ToCoordinator).decode
coordinator_to_engine = msgspec.msgpack.Decoder(StartWave).decode
coordinator_to_client = msgspec.msgpack.Decoder(View).decode
