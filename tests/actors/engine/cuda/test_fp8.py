"""The experts' products in FP8 against plain torch in float64."""

from __future__ import annotations

import pytest
import torch

from actors.engine.cuda import fp8
from actors.engine.quantization import Blocks, dequantize, quantize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
BLOCKS = Blocks(fp8.BLOCK, fp8.BLOCK)
MAX_ROWS, TOP_K, RANKS = 24, 2, 3


class Pairs:
    """Rows of three ranks, of which this is rank 1, sorted by slot as the dispatch leaves them. Slot 2 has none."""

    def __init__(self, hidden: int, dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.own = torch.randn(MAX_ROWS, hidden, generator=generator).to(dtype)
        self.received = torch.randn(RANKS, MAX_ROWS, hidden, generator=generator).to(dtype)
        self.received[1] = float("nan")  # one's own rows are not sent
        codes = torch.randperm(RANKS * MAX_ROWS * TOP_K, generator=generator)[: 17 + 1 + 40].split([17, 1, 40])
        self.by_slot = [codes[0], codes[1], codes[0][:0], codes[2]]
        self.capacity = 64
        self.index = torch.full((4, self.capacity), 2**30, dtype=torch.int32)
        for slot, own in enumerate(self.by_slot):
            self.index[slot, : len(own)] = own
        self.count = torch.tensor([len(own) for own in self.by_slot], dtype=torch.int32)

    def row(self, code: int) -> torch.Tensor:
        source, token = code // (MAX_ROWS * TOP_K), code // TOP_K % MAX_ROWS
        return self.own[token] if source == 1 else self.received[source, token]


@pytest.mark.parametrize("rows", [16, 40, 100])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_both_products_are_those_of_the_dequantised_weights(dtype: torch.dtype, rows: int) -> None:
    hidden, inner = 256, 128
    generator = torch.Generator().manual_seed(rows)
    # Columns of different size, so that blocks have different scales.
    up = torch.randn(4, 2 * inner, hidden, generator=generator) * torch.logspace(-2, 0, hidden) / hidden**0.5
    down = torch.randn(4, hidden, inner, generator=generator) * torch.logspace(0, 2, hidden)[:, None] / inner**0.5
    pairs = Pairs(hidden, dtype, rows)
    stored = [tensor for weight in (up, down) for tensor in quantize(weight, BLOCKS)]
    up, down = (dequantize(*stored[i : i + 2], BLOCKS, torch.float64) for i in (0, 2))
    up_q, up_s, down_q, down_s = (tensor.to(DEVICE) for tensor in stored)

    total = int(pairs.count.sum())
    between = torch.full((total + 3, inner), float("nan"), dtype=dtype, device=DEVICE)
    # The three ranks' results, one behind the other in one tensor in place of windows.
    results = torch.full((RANKS, MAX_ROWS * TOP_K, hidden), float("nan"), dtype=dtype, device=DEVICE)
    windows = torch.tensor([results[rank].data_ptr() for rank in range(RANKS)], device=DEVICE)
    integers = {name: torch.tensor(value, dtype=torch.int32, device=DEVICE) for name, value in
                {"members": [RANKS, 1], "local": [1, 0], "turn": [5]}.items()}  # fmt: skip
    computed = torch.tensor([7], device=DEVICE)
    count, index = pairs.count.to(DEVICE), pairs.index.to(DEVICE)
    shape = fp8.shape(dtype, rows, "expand")
    assert fp8.shape(dtype, rows, "contract").rows == shape.rows
    sizes = {"TOP_K": TOP_K, "SLOTS": 4, "TRANSPOSED": False, "BIASED": False,
             "PRECISION": "ieee" if dtype == torch.float32 else "tf32", "BM": shape.rows,
             "BN": shape.columns, "BK": shape.depth, "num_warps": shape.warps, "num_stages": shape.stages}  # fmt: skip
    fp8.expand[(5,)](
        pairs.own.to(DEVICE), pairs.received.to(DEVICE), up_q, up_s, between, count, index, integers["members"],
        integers["local"], integers["turn"], computed, 1, 4, pairs.capacity, MAX_ROWS, 0.0, 0.0,
        N=2 * inner, K=hidden, GATE=1, **sizes,
    )  # fmt: skip
    fp8.contract[(5,)](
        between, down_q, down_s, results[1], count, index, integers["members"], windows, 4, pairs.capacity, MAX_ROWS,
        N=hidden, K=inner, **sizes,
    )  # fmt: skip
    assert (int(integers["turn"]), int(computed)) == (6, 7 + total)
    assert between[total:].isnan().all()
    found = results.cpu().view(-1, hidden)
    written = torch.zeros(len(found), dtype=torch.bool)
    expected = torch.zeros(found.shape, dtype=torch.float64)
    for slot, codes in enumerate(pairs.by_slot):
        for code in codes.tolist():
            gate, other = (up[slot] @ pairs.row(code).double()).chunk(2)
            expected[code], written[code] = down[slot] @ (torch.nn.functional.silu(gate) * other), True
    assert found[~written].isnan().all()
    error = (found[written].double() - expected[written]).norm(dim=1) / expected[written].norm(dim=1)
    assert error.max() < TOLERANCE[dtype]
