"""Which captured size a step gets, from its own rows and from those of its peers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engine.batch import Batch, Slice
from actors.engine.cuda.inputs import Padded
from actors.engine.cuda.steps import CudaSteps, ladder, prompt_ladder
from actors.wire import SamplingParams


def steps(most_rows: int = 0, mean_rows: int = 0, pairwise: bool = False, graphs: bool = True) -> CudaSteps:
    made = object.__new__(CudaSteps)
    made._experts = experts = SimpleNamespace(most_rows=most_rows, mean_rows=mean_rows, pairwise=pairwise)  # type: ignore
    made.model = SimpleNamespace(experts=experts)  # type: ignore
    made.sizes = ladder(64) if graphs else []
    made.prompt_sizes = prompt_ladder(4096, 64) if graphs else []
    return made


def batch(*lengths: int, samples: bool = True) -> Batch:
    def part(length: int) -> Slice:
        return Slice("x", [0] * length, 0, [], samples, [], [], SamplingParams(max_tokens=1))

    return Batch(tuple(map(part, lengths)))


DECODES = [1] * 40


@pytest.mark.parametrize(
    ("made", "step", "expected"),
    [
        (steps(1, 1), batch(1), Padded(1, 1)),
        (steps(1, 1, pairwise=True), batch(1), Padded(1, 1)),
        (steps(2, 1, pairwise=True), batch(1), Padded(2, 2)),  # a peer has more rows than one
        (steps(40, 40), batch(*DECODES), Padded(48, 48)),
        (steps(40, 40), batch(*DECODES, samples=False), Padded(128, 64)),
        (steps(20, 20), batch(20), Padded(64, 16)),
        (steps(60, 60), batch(*DECODES, 20), Padded(128, 64)),
        (steps(2048, 2048), batch(2048), Padded(2048, 16)),
        (steps(2049, 2049), batch(2049), None),
        (steps(2000, 1020), batch(*DECODES), Padded(1024, 64)),  # beside a peer's prompt: tiles for both
        (steps(8192, 4116), batch(*DECODES), None),
        (steps(8192, 1100), batch(1), Padded(1536, 16)),
        (steps(40, 40, graphs=False), batch(*DECODES), None),
    ],
)
def test_sizes(made: CudaSteps, step: Batch, expected: Padded | None) -> None:
    assert made._size_of(step) == expected


def test_no_graph_has_another_exchange() -> None:
    made = steps(1, 1)
    made.model.experts = SimpleNamespace()  # type: ignore
    assert made._size_of(batch(1)) is None and made._size_of(batch(5)) is None


@given(st.integers(1, 10_000), st.integers(1, 300))
def test_ladders(most_rows: int, most_sequences: int) -> None:
    sizes = prompt_ladder(most_rows, most_sequences)
    assert sizes == sorted(set(sizes))
    for rows, sequences in sizes:
        assert 1 <= sequences < rows <= most_rows and sequences <= most_sequences
    if most_rows > 1:
        assert sizes[-1].rows == min(most_rows, 2048)
        assert sizes[-1].sequences == min(most_sequences, sizes[-1].rows // 2)
