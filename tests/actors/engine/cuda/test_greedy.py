"""The largest logits of rows by one kernel, against the operators that a CPU samples with."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine import sampler
from actors.engine.batch import Sampled, Slice
from actors.engine.cuda.greedy import largest
from actors.wire import Failure, SamplingParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Few, so that rows are full of equals.
ODD = (0.0, -0.0, 1.5, -1.5, 3.0, -math.inf, math.inf, math.nan)


def check(x: torch.Tensor) -> None:
    found = largest(x).cpu()
    tokens, peaks = found[0], found[1].view(torch.float64)
    own_tokens, own_peaks = (part.cpu() for part in sampler._argmax(x))
    assert found.dtype == torch.int64 and found.shape == (2, len(x))
    assert torch.equal(peaks.isnan(), x.isnan().any(1).cpu())
    assert torch.equal(peaks.nan_to_num(7.0), own_peaks.double().nan_to_num(7.0))
    assert torch.equal(tokens[~peaks.isnan()], own_tokens[~peaks.isnan()])
    assert bool(((tokens >= 0) & (tokens < x.shape[1])).all())


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 4),
    st.sampled_from([1, 2, 63, 4096, 4097, 9000, 12288]),
    st.sampled_from(DTYPES),
    st.lists(st.sampled_from(ODD), max_size=6),
    st.booleans(),
)
def test_rows_with_equals_infinities_and_nan(
    seed: int, rows: int, width: int, dtype: torch.dtype, odd: list[float], flat: bool
) -> None:
    draw = np.random.default_rng(seed)
    values = draw.choice([-2.0, -1.0, 0.5], (rows, width)) if flat else draw.normal(0, 3, (rows, width))
    for value in odd:
        values[draw.integers(rows), draw.integers(width)] = value
    check(torch.from_numpy(values).to(DEVICE, dtype))


@pytest.mark.parametrize("fill", [-math.inf, math.inf, math.nan, 0.0])
def test_rows_of_one_value(fill: float) -> None:
    check(torch.full((3, 5000), fill, device=DEVICE))


@pytest.mark.parametrize(("rows", "width"), [(1, 262144), (256, 300), (5, 151936)])
def test_sizes(rows: int, width: int) -> None:
    check(torch.randn(rows, width).to(DEVICE, torch.bfloat16))


def test_rows_apart_in_memory_and_none_at_all() -> None:
    x = torch.randn(4, 9000).to(DEVICE)[:, :5000]
    check(x)
    assert largest(x[:0]).shape == (2, 0)


def test_the_sampler_takes_its_tokens_and_failures_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of greedy rows, drawn ones and bad ones side by side, with and without a bias."""

    def piece(**settings: object) -> Slice:
        return Slice("r", [0], 0, [0], True, [0], [], SamplingParams(**{"max_tokens": 9, "temperature": 0, **settings}))

    x = torch.randn(5, 700)
    x[0, [30, 600]] = x[0].max() + 1
    x[2, 650] = math.nan
    x[3] = -math.inf
    for bias in (None, {7: 50.0}):
        slices = [piece(), piece(temperature=1.0, seed=3, logprobs=2), piece(), piece(), piece(logit_bias=bias)]
        expected = sampler.sample(x, slices)
        monkeypatch.setattr(sampler, "_largest_of", largest)
        found = sampler.Sampling(x.to(DEVICE), slices)
        results = found.results()
        monkeypatch.undo()
        assert [type(result) for result in results] == [Sampled, Sampled, Failure, Failure, Sampled]
        assert results[0] == Sampled(30) and results[4] == expected[4]
        assert results[1].token == expected[1].token  # type: ignore[union-attr]
        assert results[2:4] == expected[2:4]
        assert found.tokens.dtype == torch.int64 and found.tokens.shape == (5,)
        assert found.tokens[[0, 4]].tolist() == [30, expected[4].token]  # type: ignore[union-attr]
