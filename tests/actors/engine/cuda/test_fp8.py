"""The experts' products in FP8 against plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from expert_modules import Quantized

from actors.engine.cuda import fp8, gemv
from actors.engine.quantization import SCALE, dequantize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
MAX_ROWS, TOP_K, RANKS = 24, 2, 3


class Pairs:
    """Rows of three ranks, of which this is rank 1, sorted by slot as the dispatch leaves them: so many for each."""

    def __init__(self, counts: list[int], hidden: int, dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.own = torch.randn(MAX_ROWS, hidden, generator=generator).to(dtype)
        self.received = torch.randn(RANKS, MAX_ROWS, hidden, generator=generator).to(dtype)
        self.received[1] = float("nan")  # one's own rows are not sent
        codes = torch.randperm(RANKS * MAX_ROWS * TOP_K, generator=generator)
        self.by_slot = codes[: sum(counts)].split(counts)
        self.capacity = 64
        self.index = torch.full((len(counts), self.capacity), 2**30, dtype=torch.int32)
        for slot, own in enumerate(self.by_slot):
            self.index[slot, : len(own)] = own
        self.count = torch.tensor(counts, dtype=torch.int32)

    def row(self, code: int) -> torch.Tensor:
        source, token = code // (MAX_ROWS * TOP_K), code // TOP_K % MAX_ROWS
        return self.own[token] if source == 1 else self.received[source, token]


class Stand:
    """Both products of ``pairs`` and their slots' experts, in poisoned memory."""

    def __init__(self, pairs: Pairs, inner: int, seed: int) -> None:
        hidden, dtype = pairs.own.shape[1], pairs.own.dtype
        self.pairs, self.hidden, self.inner = pairs, hidden, inner
        self.module = Quantized(len(pairs.count), hidden, inner, seed)
        self.weights = {name: tensor.to(DEVICE) for name, tensor in self.module.named_parameters()}
        self.total = int(pairs.count.sum())
        self.between = torch.full((self.total + 3, inner), float("nan"), dtype=dtype, device=DEVICE)
        # The three ranks' results, one behind the other in one tensor in place of windows.
        self.results = torch.full((RANKS, MAX_ROWS * TOP_K, hidden), float("nan"), dtype=dtype, device=DEVICE)
        self.computed = torch.tensor([7], device=DEVICE)
        self.turn = torch.tensor([5], dtype=torch.int32, device=DEVICE)

    def run(self, kernels, up: dict, down: dict, gate: tuple = ()) -> None:
        """With the constants of the two kernels, and what else the first one is told of its gate."""
        pairs = self.pairs
        windows = torch.tensor([self.results[rank].data_ptr() for rank in range(RANKS)], device=DEVICE)
        members, local = (torch.tensor(value, dtype=torch.int32, device=DEVICE) for value in ([RANKS, 1], [1, 0]))
        routed = pairs.count.to(DEVICE), pairs.index.to(DEVICE), members
        sizes = {"TOP_K": TOP_K, "SLOTS": 4, "BIASED": False}
        kernels.expand[(5,)](
            pairs.own.to(DEVICE), pairs.received.to(DEVICE), self.weights["gate_up_proj"],
            self.weights["gate_up_proj" + SCALE], self.between, *routed, local, self.turn, self.computed,
            1, len(pairs.count), pairs.capacity, MAX_ROWS, *gate, N=2 * self.inner, K=self.hidden, **sizes, **up,
        )  # fmt: skip
        kernels.contract[(5,)](
            self.between, self.weights["down_proj"], self.weights["down_proj" + SCALE], self.results[1], *routed,
            windows, len(pairs.count), pairs.capacity, MAX_ROWS, N=self.hidden, K=self.inner, **sizes, **down,
        )  # fmt: skip

    def check(self) -> None:
        """The results are those of the dequantised weights, and nothing else was written."""
        assert (int(self.turn), int(self.computed)) == (6, 7 + self.total)
        assert self.between[self.total :].isnan().all()
        found = self.results.cpu().view(-1, self.hidden)
        expected = torch.full(found.shape, float("nan"), dtype=torch.float64)
        for slot, codes in enumerate(self.pairs.by_slot):
            for code in codes.tolist():
                row = self.pairs.row(code)[None].double()
                expected[code] = self.module.reference(row, torch.tensor([[slot]]), torch.ones(1, 1))
        written = ~expected[:, 0].isnan()
        assert written.sum() == self.total and found[~written].isnan().all()
        error = (found[written].double() - expected[written]).norm(dim=1) / expected[written].norm(dim=1)
        assert error.max() < TOLERANCE[found.dtype]


@pytest.mark.parametrize("rows", [16, 40, 100])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_both_products_are_those_of_the_dequantised_weights(dtype: torch.dtype, rows: int) -> None:
    stand = Stand(Pairs([17, 1, 0, 40], 256, dtype, rows), 128, rows)
    shape = fp8.shape(dtype, rows, "expand")
    assert fp8.shape(dtype, rows, "contract").rows == shape.rows
    tiles = {"TRANSPOSED": False, "PRECISION": "ieee" if dtype == torch.float32 else "tf32", "BM": shape.rows,
             "BN": shape.columns, "BK": shape.depth, "num_warps": shape.warps, "num_stages": shape.stages}  # fmt: skip
    stand.run(fp8, {"GATE": 1, **tiles}, tiles, (0.0, 0.0))
    stand.check()


@pytest.mark.parametrize(("hidden", "inner", "dtype"), [(384, 128, torch.float16), (128, 384, torch.bfloat16)])
def test_both_products_pair_by_pair(hidden: int, inner: int, dtype: torch.dtype) -> None:
    """Rows that need not be a power of two, columns of several blocks, others' rows, a slot without any."""
    stand = Stand(Pairs([2, 1, 0, 1], hidden, dtype, inner), inner, hidden)
    common = {"SCALED": True, "OVERLAP": False, "num_warps": 2}
    stand.run(gemv, {"BN": 64, "BK": max(hidden, 512), **common}, {"BN": 32, "BK": max(inner, 512), **common})
    stand.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widened_weights_are_the_dequantised_ones(dtype: torch.dtype) -> None:
    """Bit for bit, and of no more slots than asked for."""
    module = Quantized(3, 384, 128).to(DEVICE)
    room = torch.full((3 * 384 * 256 + 5,), float("nan"), dtype=dtype, device=DEVICE)
    for name in ("gate_up_proj", "down_proj"):
        weight, scale = getattr(module, name), getattr(module, name + SCALE)
        wide = fp8.widened(weight, scale, room, 2)
        assert wide.data_ptr() == room.data_ptr() and wide.shape == weight.shape
        assert torch.equal(wide[:2], dequantize(weight[:2], scale[:2], module.BLOCKS, dtype))
    assert room[2 * 384 * 256 :].isnan().all()


def test_weights_are_widened_for_many_rows_but_not_in_float32() -> None:
    assert not fp8.widens(torch.bfloat16, 64) and not fp8.widens(torch.float32, 10**6)
    assert fp8.widens(torch.bfloat16, 512) and fp8.widens(torch.float16, 512)
