from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from actors.engine import cpu
from actors.engine.cpu.linear import Linear, join

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """A layer asks, when it is made, how many threads torch has."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_the_operators_we_use_exist() -> None:
    """Inductor's, without a promise: when a release of torch moves them, this file must follow."""
    assert cpu.supported(torch.float32, CPU)
    assert not cpu.supported(torch.float16, CPU)
    assert not cpu.supported(torch.float32, torch.device("meta"))


@pytest.mark.parametrize("biases", [(False,), (True,), (True, False, True), (False, False)], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 33])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_it_computes_what_its_layers_do(rows: int, shape: tuple[int, ...], biases: tuple[bool, ...], threads: int):
    layers = [torch.nn.Linear(48, 37 + i, bias=bias) for i, bias in enumerate(biases)]
    given = [layer.bias.detach() if bias else None for layer, bias in zip(layers, biases, strict=True)]
    linear = Linear([layer.weight.detach() for layer in layers], given)
    x = torch.randn(*shape, rows, 48)
    with torch.inference_mode():
        expected = torch.cat([layer(x) for layer in layers], -1)
        torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [3, 9])
def test_rows_and_weights_that_are_not_contiguous(rows: int, threads: int) -> None:
    weight = torch.randn(48, 12).t()
    x = torch.randn(48, rows).t()
    torch.testing.assert_close(Linear([weight])(x), x @ weight.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [3, 7])
def test_bfloat16(rows: int) -> None:
    if not cpu.supported(torch.bfloat16, CPU):
        pytest.skip("this processor has no bfloat16 products")
    weight, x = torch.randn(12, 48, dtype=torch.bfloat16), torch.randn(rows, 48, dtype=torch.bfloat16)
    torch.testing.assert_close(Linear([weight])(x), x @ weight.t(), rtol=2e-2, atol=2e-2)


@torch.inference_mode()
def test_layers_of_one_input_are_joined_and_still_each_give_their_own() -> None:
    layers = [torch.nn.Linear(16, 8), torch.nn.Linear(16, 4, bias=False), torch.nn.Linear(16, 6)]
    x, y = torch.randn(1, 7, 16), torch.randn(1, 3, 16)
    expected = {id(given): [layer(given) for layer in layers] for given in (x, y)}
    joined = join([layers])
    # In order; a second pass with another tensor; and out of order, with tensors mixed.
    calls = [(i, x) for i in range(3)] + [(i, y) for i in range(3)] + [(1, x), (0, y), (2, x), (1, y)]
    for position, given in calls:
        torch.testing.assert_close(layers[position](given), expected[id(given)][position], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(joined[tuple(layers)](x), torch.cat(expected[id(x)], -1), rtol=1e-5, atol=1e-5)
