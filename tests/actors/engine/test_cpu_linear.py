from __future__ import annotations

import pytest
import torch

from actors.engine.packed import PackedLinear, pack, packable

CPU = torch.device("cpu")


def test_the_operators_we_use_exist() -> None:
    """Inductor's, without a promise: when a release of torch moves them, this file must follow."""
    assert packable(torch.float32, CPU)
    assert not packable(torch.float16, CPU)
    assert not packable(torch.float32, torch.device("meta"))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 4, 5, 33])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_packed_layer_computes_the_same(rows: int, shape: tuple[int, ...], bias: bool) -> None:
    layer = torch.nn.Linear(48, 37, bias=bias)
    packed = PackedLinear(layer.weight.detach(), layer.bias.detach() if bias else None)
    x = torch.randn(*shape, rows, 48)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-5)


def test_a_packed_layer_takes_rows_that_are_not_contiguous() -> None:
    weight = torch.randn(12, 48)
    x = torch.randn(48, 9).t()
    torch.testing.assert_close(PackedLinear(weight)(x), x @ weight.t(), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_layers_of_one_input_are_joined_and_still_each_give_their_own() -> None:
    layers = [torch.nn.Linear(16, 8), torch.nn.Linear(16, 4, bias=False), torch.nn.Linear(16, 6)]
    x, y = torch.randn(1, 7, 16), torch.randn(1, 3, 16)
    expected = {id(given): [layer(given) for layer in layers] for given in (x, y)}
    pack([layers])
    # In order; a second pass with another tensor; and out of order, with tensors mixed.
    calls = [(i, x) for i in range(3)] + [(i, y) for i in range(3)] + [(1, x), (0, y), (2, x), (1, y)]
    for position, given in calls:
        torch.testing.assert_close(layers[position](given), expected[id(given)][position], rtol=1e-5, atol=1e-5)
    assert layers[0].weight.is_meta
