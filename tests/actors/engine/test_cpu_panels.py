from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from actors.engine.cpu import amx
from actors.engine.cpu.panels import COLUMNS, ROWS, Panels

NAN, INF = float("nan"), float("inf")


pytestmark = pytest.mark.usefixtures("thread_pool")


def filled(count: int, width: int, depth: int) -> tuple[Panels, torch.Tensor, torch.Tensor]:
    weights, biases = torch.randn(count, width, depth), torch.randn(count, width)
    panels = Panels(count, width, depth)
    for index in range(count):
        panels.fill(index, weights[index], biases[index])
    return panels, weights, biases


@pytest.mark.parametrize("depth", [1, 3, 64])
@pytest.mark.parametrize("width", [1, COLUMNS - 1, COLUMNS, 3 * COLUMNS, 5 * COLUMNS + 7])
@pytest.mark.parametrize("rows", [0, 1, 2, ROWS, ROWS + 1, 3 * ROWS + 2])
def test_products_of_any_shape(rows: int, width: int, depth: int) -> None:
    panels, weights, biases = filled(1, width, depth)
    x = torch.randn(depth, rows).t()
    expected = torch.nn.functional.linear(x, weights[0], biases[0])
    torch.testing.assert_close(panels.multiply(x, [(0, rows, 0)]), expected, rtol=1e-5, atol=1e-5)


def test_groups_of_rows_have_weights_of_their_own() -> None:
    panels, weights, biases = filled(4, 2 * COLUMNS + 3, 20)
    x = torch.randn(40, 20)
    groups = [(0, 1, 2), (1, 27, 0), (27, 40, 3)]
    expected = torch.cat([torch.nn.functional.linear(x[a:b], weights[i], biases[i]) for a, b, i in groups])
    torch.testing.assert_close(panels.multiply(x, groups), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [100, 5 * 1024])
def test_a_row_does_not_depend_on_the_rows_beside_it(depth: int) -> None:
    panels, weights, biases = filled(1, 4 * COLUMNS, depth)
    x = torch.randn(3 * ROWS, depth)
    alone = torch.cat([panels.multiply(row[None], [(0, 1, 0)]) for row in x])
    torch.testing.assert_close(alone, torch.nn.functional.linear(x, weights[0], biases[0]), rtol=1e-4, atol=2e-4)
    for rows in range(2, len(x) + 1):
        assert torch.equal(panels.multiply(x[:rows], [(0, rows, 0)]), alone[:rows])


def test_filling_again_leaves_the_others_alone() -> None:
    panels, _, biases = filled(3, COLUMNS + 5, 16)
    x = torch.randn(2, 16)
    before = [panels.multiply(x, [(0, 2, index)]) for index in range(3)]
    weight = torch.randn(16, COLUMNS + 5).t()  # as GPT-OSS has them
    panels.fill(1, weight, biases[1])
    expected = torch.nn.functional.linear(x, weight, biases[1])
    torch.testing.assert_close(panels.multiply(x, [(0, 2, 1)]), expected, rtol=1e-5, atol=1e-5)
    for index in (0, 2):
        assert torch.equal(panels.multiply(x, [(0, 2, index)]), before[index])


def test_nan_and_infinity_stay_in_their_row() -> None:
    panels, _, _ = filled(1, COLUMNS + 1, 16)
    x = torch.randn(3, 16)
    clean = panels.multiply(x, [(0, 3, 0)])
    x[0, 3], x[2, 5] = NAN, INF
    out = panels.multiply(x, [(0, 3, 0)])
    assert out[0].isnan().all()
    assert out[2].isinf().all()
    assert torch.equal(out[1], clean[1])


# Processors with vectors of 8 and 4 elements, the latter without fused multiply-adds.
@pytest.mark.parametrize(
    ("name", "features", "columns"), [("haswell", "+sse4.2,+avx,+avx2,+fma", 16), ("nehalem", "+sse4.2", 8)]
)
def test_other_processors(name: str, features: str, columns: int, request: pytest.FixtureRequest) -> None:
    if platform.machine() != "x86_64" or "one thread" not in request.node.name:
        pytest.skip("once, on x86")
    code = f"""
import torch
from actors.engine.cpu.panels import COLUMNS, ROWS, Panels
assert (COLUMNS, ROWS) == ({columns}, 6)
weight, bias, x = torch.randn(100, 50), torch.randn(100), torch.randn(17, 50)
panels = Panels(1, 100, 50)
panels.fill(0, weight, bias)
expected = torch.nn.functional.linear(x, weight, bias)
torch.testing.assert_close(panels.multiply(x, [(0, 17, 0)]), expected, rtol=1e-5, atol=1e-5)
"""
    environment = os.environ | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


needs_matrix_units = pytest.mark.skipif(not amx.available(), reason="this processor has no AMX")


@needs_matrix_units
@pytest.mark.parametrize("depth", [1, 20, 64, 1000])  # the last: in two slabs
@pytest.mark.parametrize("width", [1, COLUMNS, 5 * COLUMNS + 7])
@pytest.mark.parametrize("rows", [64, 79, 81, 300])  # the last: in two blocks
def test_many_rows_are_as_exact_as_few(rows: int, width: int, depth: int) -> None:
    panels, weights, biases = filled(1, width, depth)
    x = torch.randn(depth, rows).t()
    exact = torch.nn.functional.linear(x.double(), weights[0].double(), biases[0].double())
    many, few = panels.multiply(x, [(0, rows, 0)]), torch.nn.functional.linear(x, weights[0], biases[0])
    assert (many - exact).abs().max() <= 2 * (few - exact).abs().max() + 1e-6
    assert torch.equal(panels.multiply(x[:-9].contiguous(), [(0, rows - 9, 0)]), many[:-9]) or rows - 9 < 64


@needs_matrix_units
def test_groups_of_many_rows_have_weights_of_their_own() -> None:
    panels, weights, biases = filled(4, 2 * COLUMNS + 3, 100)
    x = torch.randn(400, 100)
    groups = [(0, 1, 2), (1, 127, 0), (127, 400, 3)]
    expected = torch.cat([torch.nn.functional.linear(x[a:b], weights[i], biases[i]) for a, b, i in groups])
    torch.testing.assert_close(panels.multiply(x, groups), expected, rtol=1e-5, atol=2e-5)


@needs_matrix_units
def test_nan_and_infinity_among_many_rows_stay_in_theirs() -> None:
    panels, _, _ = filled(1, COLUMNS + 1, 16)
    x = torch.randn(80, 16)
    clean = panels.multiply(x, [(0, 80, 0)])
    x[0, 3], x[79, 5] = NAN, INF
    out = panels.multiply(x, [(0, 80, 0)])
    assert not out[0].isfinite().any()
    assert not out[79].isfinite().any()
    assert torch.equal(out[1:79], clean[1:79])
