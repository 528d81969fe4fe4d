"""From a request's body to what the engine is told: defaults filled in, every value checked against the limits."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from hashlib import blake2b

from actors.wire import SamplingParams
from app.errors import InvalidRequest
from app.limits import Limits
from app.protocol import GenerationBody
from app.tokenizer import Tokenizer

SEED_BITS = 63


def check_prompt(prompt: Sequence[int], limits: Limits, vocab_size: int, param: str) -> None:
    """Raises InvalidRequest for a prompt that is empty, too long, or has token ids the model does not know."""
    if not prompt:
        raise InvalidRequest("The prompt is empty: it must have at least one token.", param=param)
    if len(prompt) >= limits.max_model_len:
        raise InvalidRequest(
            f"This model's maximum context length is {limits.max_model_len} tokens, but the prompt has {len(prompt)} "
            "and at least one is needed for the answer. Shorten the prompt.",
            param=param,
            code="context_length_exceeded",
        )
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise InvalidRequest(f"Token id {wrong} is outside the vocabulary of {vocab_size} tokens.", param=param)


def resolve(
    body: GenerationBody, prompt: Sequence[int], limits: Limits, tokenizer: Tokenizer, default_length: int | None
) -> SamplingParams:
    """Sampling parameters of the first choice of a checked ``prompt``; see ``derive`` for the others.

    ``default_length`` bounds the answer when the body does not; None lets it fill the context. Raises InvalidRequest.
    """
    room = limits.max_model_len - len(prompt)
    length = body.length or min(room, default_length or room)
    if length > room:
        raise InvalidRequest(
            f"This model's maximum context length is {limits.max_model_len} tokens, but the request asks for "
            f"{len(prompt) + length}: {len(prompt)} in the prompt and {length} in the answer. Shorten either.",
            param="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
            code="context_length_exceeded",
        )
    if body.min_tokens > length:
        raise InvalidRequest(f"'min_tokens' is {body.min_tokens}, above the {length} of 'max_tokens'.", "min_tokens")
    stop_token_ids = tuple(body.stop_token_ids or ())
    _check_known(stop_token_ids, tokenizer.vocab_size, "stop_token_ids")
    seed = secrets.randbits(SEED_BITS) if body.seed is None else body.seed % (1 << SEED_BITS)
    return SamplingParams(
        max_tokens=length,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        seed=seed,
        logprobs=body.alternatives,
        logit_bias=_logit_bias(body, limits, tokenizer.vocab_size),
        min_tokens=body.min_tokens,
        eos_token_ids=() if body.ignore_eos else tokenizer.eos_token_ids,
        stop_token_ids=stop_token_ids,
    )


def derive(seed: int, choice: int) -> int:
    """The seed of choice number ``choice``: the first keeps the request's, the others are hashed from it."""
    if choice == 0:
        return seed
    digest = blake2b(seed.to_bytes(8, "little") + choice.to_bytes(4, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - SEED_BITS)


def check_counts(body: GenerationBody, prompts: int, limits: Limits) -> None:
    """Raises InvalidRequest when a count of the body is beyond what this server allows."""
    _at_most("n", body.n or 1, limits.max_n)
    _at_most("stop", len(body.stop or ()), limits.max_stop_strings, "strings")
    _at_most("stop", max(map(len, body.stop or [""])), limits.max_stop_chars, "characters in one string")
    _at_most("stop_token_ids", len(body.stop_token_ids or ()), limits.max_logit_bias, "ids")
    _at_most("logit_bias", len(body.logit_bias or ()), limits.max_logit_bias, "entries")
    _at_most("logprobs", body.alternatives or 0, limits.max_logprobs)
    _at_most("prompt", prompts * (body.n or 1), limits.max_sequences, "sequences (prompts times n)")


def _at_most(param: str, value: int, limit: int, unit: str = "") -> None:
    if value > limit:
        raise InvalidRequest(f"'{param}' has {value} {unit}".rstrip() + f"; this server allows at most {limit}.", param)


def _logit_bias(body: GenerationBody, limits: Limits, vocab_size: int) -> dict[int, float] | None:
    if not body.logit_bias:
        return None
    try:
        bias = {int(token): float(value) for token, value in body.logit_bias.items()}
    except ValueError as error:
        raise InvalidRequest(f"The keys of 'logit_bias' must be token ids: {error}.", "logit_bias") from error
    _check_known(bias, vocab_size, "logit_bias")
    return bias


def _check_known(tokens: Sequence[int] | dict[int, float], vocab_size: int, param: str) -> None:
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise InvalidRequest(f"Token id {token} is outside the vocabulary of {vocab_size} tokens.", param)
