"""The sampler against a plain NumPy one, against what chance must give, and against itself elsewhere."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from actors.engine.batch import Sampled, Slice
from actors.engine.sampler import sample, uniform
from actors.wire import Failure, SamplingParams

torch.set_num_threads(1)


def piece(prompt: list[int] | None = None, generated: list[int] | None = None, **sampling: object) -> Slice:
    prompt, generated = prompt or [0], generated or []
    params = SamplingParams(**{"max_tokens": 100, **sampling})
    known = prompt + generated
    return Slice("r", known[-1:], len(known) - 1, [0], True, prompt, generated, params)


def tokens(logits: torch.Tensor, slices: list[Slice]) -> list[int]:
    results = sample(logits, slices)
    assert all(isinstance(result, Sampled) for result in results), results
    return [result.token for result in results]


# --- a plain reference ---------------------------------------------------------------------------------------------


def edited(logits: np.ndarray, s: Slice) -> np.ndarray:
    x = logits.astype(np.float64).copy()
    for token in set(s.prompt) | set(s.generated):
        x[token] = (
            x[token] / s.sampling.repetition_penalty if x[token] > 0 else x[token] * s.sampling.repetition_penalty
        )
    for token, count in Counter(s.generated).items():
        x[token] -= s.sampling.presence_penalty + s.sampling.frequency_penalty * count
    for token, bias in (s.sampling.logit_bias or {}).items():
        x[token] += bias
    if len(s.generated) < s.sampling.min_tokens:
        x[list(s.sampling.eos_token_ids + s.sampling.stop_token_ids)] = -np.inf
    return x


def distribution(logits: np.ndarray, s: Slice) -> np.ndarray:
    """Probabilities after all filters, in float64, by sorting."""
    x = edited(logits, s) / s.sampling.temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    ordered = np.sort(p)[::-1]
    floor = 0.0
    if s.sampling.top_k:
        ordered = ordered[: s.sampling.top_k]
        floor = ordered[-1]
    if s.sampling.top_p < 1:
        mass = np.cumsum(ordered / ordered.sum())
        floor = max(floor, ordered[np.argmax(mass >= s.sampling.top_p - 1e-12)])
    floor = max(floor, s.sampling.min_p * p.max())
    kept = np.where(p >= floor * (1 - 1e-9), p, 0.0)
    return kept / kept.sum()


def near_a_border(logits: np.ndarray, s: Slice, u: float) -> bool:
    """Whether rounding in float32 may tip a filter or the draw."""
    x = edited(logits, s) / s.sampling.temperature
    p = np.exp(x - x.max())
    relative = np.sort(p)[::-1]
    considered = relative[: s.sampling.top_k or None]
    mass = np.cumsum(considered) / considered.sum()
    draw = np.cumsum(distribution(logits, s))
    return bool(
        (s.sampling.top_p < 1 and np.abs(mass - s.sampling.top_p).min() < 1e-5)
        or (s.sampling.min_p and np.abs(relative - s.sampling.min_p).min() < 1e-5)
        or np.abs(draw - u).min() < 1e-5
    )


settings_of_a_request = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 0.7, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 2, 5, 40, 1000]),
        "top_p": st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.1]),
        "min_p": st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 0.6, -1.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.4, -0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3, 0.8]),
        "logit_bias": st.sampled_from([None, None, {3: 2.0, 4: -100.0}]),
        "min_tokens": st.sampled_from([0, 5]),
        "eos_token_ids": st.just((1,)),
        "stop_token_ids": st.just((2, 6)),
        "seed": st.integers(0, 2**64 - 1),
    }
)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([7, 64, 65, 300, 9000]),
    st.sampled_from([0.3, 3.0, 12.0]),
    st.lists(settings_of_a_request, min_size=1, max_size=4),
    st.lists(st.integers(0, 6), max_size=8),
)
# Flat: top-p keeps thousands of tokens, so the first looks at the largest are not enough.
@example(5, 9000, 0.3, [{"temperature": 1.0, "top_p": 0.9, "seed": 3}, {"temperature": 1.0, "top_p": 0.01}], [])
@example(6, 9000, 0.3, [{"temperature": 1.0, "top_p": 0.9, "top_k": 5000}, {"temperature": 2.5, "seed": 9}], [1])
def test_tokens_are_those_of_a_plain_sampler(
    seed: int, vocab: int, scale: float, samplings: list[dict], generated: list[int]
) -> None:
    logits = np.random.default_rng(seed).normal(0, scale, (len(samplings), vocab)).astype(np.float32)
    slices = [piece([0, 5, 5], generated, **sampling) for sampling in samplings]
    results = sample(torch.from_numpy(logits), slices)
    compared = 0
    for row, s, result in zip(logits, slices, results, strict=True):
        u = uniform(s.sampling.seed, 3 + len(generated))
        if near_a_border(row, s, u):
            continue
        compared += 1
        assert isinstance(result, Sampled)
        assert result.token == int(np.argmax(np.cumsum(distribution(row, s)) > u))
    assume(compared)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(settings_of_a_request, min_size=1, max_size=4), st.sampled_from([5, 200]))
def test_greedy_takes_the_largest_and_of_equals_the_first(seed: int, samplings: list[dict], vocab: int) -> None:
    logits = np.random.default_rng(seed).integers(-3, 4, (len(samplings), vocab)).astype(np.float32)
    plain = [piece(temperature=0.0) for _ in samplings]
    assert tokens(torch.from_numpy(logits), plain) == logits.argmax(-1).tolist()
    assert tokens(torch.from_numpy(logits).bfloat16(), plain) == logits.argmax(-1).tolist()
    simple = {"logit_bias": None, "repetition_penalty": 1.0, "frequency_penalty": 0.5}  # exact in float32
    slices = [
        piece(
            [0, 3], [1, 1], **{**sampling, **simple, "temperature": 0.0, "presence_penalty": 1.0, "stop_token_ids": ()}
        )
        for sampling in samplings
    ]
    expected = [int(edited(row, s).argmax()) for row, s in zip(logits, slices, strict=True)]
    assert tokens(torch.from_numpy(logits), slices) == expected


# --- chance --------------------------------------------------------------------------------------------------------


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 2.0, "top_k": 8, "top_p": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("across", ["seeds", "positions"])
def test_frequencies_follow_the_distribution(sampling: dict, across: str) -> None:
    row = np.random.default_rng(1).normal(0, 1, 12).astype(np.float32)
    draws = 8000
    if across == "seeds":
        slices = [piece(seed=seed, **sampling) for seed in range(draws)]
    else:
        slices = [piece([0] * (length + 1), seed=7, **sampling) for length in range(0, 800)]
    logits = torch.from_numpy(row).expand(len(slices), -1)
    counts = np.bincount(tokens(logits, slices), minlength=12)
    p = distribution(row, piece(**sampling))
    assert counts[p == 0].sum() == 0
    # 0.9999 quantile of chi-square with 11 degrees of freedom: 37.4; the seeds are fixed, so this is no gamble.
    assert chi_square(counts[p > 0], p[p > 0] * len(slices)) < 37.4


def test_numbers_are_uniform_and_keyed() -> None:
    numbers = np.array([uniform(seed, position) for seed in range(100) for position in range(100)])
    assert numbers.min() >= 0 and numbers.max() < 1 and len(set(numbers)) == len(numbers)
    assert chi_square(np.histogram(numbers, 100, (0, 1))[0], np.full(100, 100.0)) < 161  # 0.9999, 99 degrees
    assert uniform(12, 3) != uniform(1, 23)


# --- independence --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(settings_of_a_request, min_size=2, max_size=6), st.randoms())
def test_a_row_does_not_depend_on_its_batch(seed: int, samplings: list[dict], random: object) -> None:
    logits = torch.from_numpy(np.random.default_rng(seed).normal(0, 3, (len(samplings), 500)).astype(np.float32))
    slices = [piece([0, 5], [4, 4], logprobs=2, **sampling) for sampling in samplings]
    before = logits.clone()
    together = sample(logits, slices)
    assert torch.equal(logits, before)
    order = list(range(len(slices)))
    random.shuffle(order)
    shuffled = sample(logits[order], [slices[i] for i in order])
    assert [shuffled[order.index(i)].token for i in range(len(order))] == [result.token for result in together]
    apart = [sample(logits[i : i + 1], [s])[0] for i, s in enumerate(slices)]
    assert [result.token for result in apart] == [result.token for result in together]


@settings(max_examples=40, deadline=None)
@given(settings_of_a_request, st.integers(1, 19))
def test_a_request_continued_elsewhere_gets_the_same_tokens(sampling: dict, moved_after: int) -> None:
    prompt = [2, 7, 1]

    def logits(generated: list[int]) -> torch.Tensor:
        seed = hash(tuple(prompt + generated)) % 2**32
        return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, (1, 100)).astype(np.float32))

    def go_on(generated: list[int], end: int) -> list[int]:
        generated = list(generated)
        while len(generated) < end:
            generated += tokens(logits(generated), [piece(prompt, generated, **sampling)])
        return generated

    whole = go_on([], 20)
    assert go_on(go_on([], moved_after), 20) == whole


# --- bad rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf, "all -inf"])
@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 3, "min_p": 0.1, "logprobs": 2}]
)
def test_a_poisoned_row_fails_alone(poison: float | str, sampling: dict) -> None:
    logits = torch.from_numpy(np.random.default_rng(2).normal(0, 3, (3, 5000)).astype(np.float32))
    slices = [piece(seed=seed, **sampling) for seed in range(3)]
    healthy = sample(logits, slices)
    if poison == "all -inf":
        logits[1] = -math.inf
    else:
        logits[1, 4000] = poison
    results = sample(logits, slices)
    assert results[1] == Failure("model_error", "the logits for position 1 contain NaN or infinity")
    assert [results[0], results[2]] == [healthy[0], healthy[2]]


def test_nothing_left_to_choose_from_is_the_requests_own_fault() -> None:
    logits = torch.zeros(2, 3)
    mine = piece(temperature=0.0, logit_bias={0: -math.inf, 1: -math.inf}, min_tokens=2, eos_token_ids=(2,))
    results = sample(logits, [mine, piece(temperature=0.0)])
    assert isinstance(results[0], Failure) and results[0].code == "invalid"
    assert results[1] == Sampled(0)


def test_single_infinite_logits_are_only_never_chosen() -> None:
    logits = torch.full((200, 70), -math.inf)
    logits[:, [3, 66]] = 1.0
    slices = [piece(seed=seed, temperature=1.0 if seed % 2 else 0.2) for seed in range(200)]
    assert set(tokens(logits, slices)) == {3, 66}


def test_as_many_rows_as_slices() -> None:
    assert sample(torch.zeros(0, 5), []) == []
    with pytest.raises(ValueError, match="one row per slice"):
        sample(torch.zeros(2, 5), [piece()])


# --- single features -----------------------------------------------------------------------------------------------


def test_ends_are_masked_until_min_tokens() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0]] * 2)
    sampling = {"temperature": 0.0, "min_tokens": 2, "eos_token_ids": (0,), "stop_token_ids": (1, 99)}
    assert tokens(logits, [piece([2], [3], **sampling), piece([2], [3, 3], **sampling)]) == [2, 0]


def test_logprobs_are_those_of_the_model() -> None:
    logits = torch.from_numpy(np.random.default_rng(3).normal(0, 2, (4, 50)).astype(np.float32))
    slices = [
        piece(temperature=0.0, logprobs=3),
        piece(temperature=0.2, top_k=2, logprobs=0, logit_bias={7: 100.0}, repetition_penalty=2.0),
        piece(temperature=0.0),
        piece(temperature=0.0, logprobs=99),
    ]
    first, second, third, fourth = sample(logits, slices)
    reference = torch.log_softmax(logits.double(), -1)
    assert second.token == 7 and second.logprobs.top == [] and third.logprobs is None
    assert second.logprobs.logprob == pytest.approx(float(reference[1, 7]), abs=1e-5)
    best = reference[0].topk(3)
    assert [token for token, _ in first.logprobs.top] == best.indices.tolist()
    assert [value for _, value in first.logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert (first.token, first.logprobs.logprob) == first.logprobs.top[0]
    assert len(fourth.logprobs.top) == 50


def test_equal_logits_are_kept_or_dropped_together() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    seen = {token for seed in range(300) for token in tokens(logits, [piece(seed=seed, top_k=2)])}
    assert seen == {0, 1, 2, 3}


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(4))
    slices = [piece(seed=seed, temperature=temperature) for seed in range(25) for temperature in (1e-30, 9e-6)]
    assert tokens(logits, slices) == logits.argmax(-1).tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_request_may_move_between_cpu_and_gpu(dtype: torch.dtype) -> None:
    logits = (torch.randn(96, 20000, generator=torch.Generator().manual_seed(5)) * 3).to(dtype)
    samplings = [
        {},
        {"top_p": 0.9},
        {"top_k": 40, "top_p": 0.9},
        {"min_p": 0.05, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
        {"temperature": 0.0, "logit_bias": {5: 3.0}, "logprobs": 2},
        {"temperature": 0.0, "min_tokens": 9, "eos_token_ids": (3,)},
    ]
    slices = [piece([1, 2], [3, 3], seed=row, **samplings[row % len(samplings)]) for row in range(96)]
    elsewhere = tokens(logits.cuda(), slices)
    # A draw so close to a border that the devices' rounding decides is possible, but rare.
    assert sum(a != b for a, b in zip(tokens(logits, slices), elsewhere, strict=True)) <= 1
