"""A single row's kernels: each against torch in higher precision, or against those that it takes the place of."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from expert_modules import KINDS, Module, slots

from actors.engine.attention.base import KVShape
from actors.engine.attention.triton_paged import TritonPagedAttention
from actors.engine.batch import Batch, Slice
from actors.engine.cuda import attend_joint
from actors.engine.cuda import router as router_module
from actors.engine.cuda.attend_decode import decode
from actors.engine.cuda.attend_joint import decode_joint
from actors.engine.cuda.attend_tile import Tiles
from actors.engine.cuda.elementwise import add_rms_norm, rms_norm
from actors.engine.cuda.experts import CudaExperts
from actors.engine.cuda.inputs import Padded, StepInputs
from actors.engine.cuda.linear import Linear
from actors.engine.cuda.one_row import Row, multiply_row, share, suits_row
from actors.engine.cuda.rotary import Heads, split_and_rotate
from actors.engine.cuda.router import Choice, Router
from actors.engine.experts.exchange import SoloExchange
from actors.engine.experts.map import ExpertMap
from actors.engine.experts.routing import Routing
from actors.wire import SamplingParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What ``torch.empty`` gives is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_what_a_program_takes() -> None:
    assert [share(block, 8) for block in (256, 2048, 4096, 8192)] == [(8, 1), (8, 4), (4, 4), (2, 4)]
    assert suits_row(torch.float16, 8192)
    assert not suits_row(torch.float16, 8193)
    assert not suits_row(torch.float32, 16), "float32 takes what gives a row the same result among others"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("inner", "outputs"), [(64, 48), (100, 33), (2500, 21)])
@pytest.mark.parametrize("early", [True, False])
def test_a_product_with_the_sum_and_the_norm_before_it(
    dtype: torch.dtype, inner: int, outputs: int, early: bool
) -> None:
    weight, bias = random(outputs, inner, dtype=dtype) / inner**0.5, random(outputs, dtype=dtype)
    x, delta, norm = random(1, 1, inner, dtype=dtype), random(1, 1, inner, dtype=dtype), random(inner, dtype=dtype)
    both, normed = add_rms_norm(x, delta, norm, 1e-5, early)
    cases = [
        (Row(x), x, x),
        (Row(x, delta), both, both),
        (Row(x, None, norm, 1e-5, early), x, rms_norm(x, norm, 1e-5, early)),
        (Row(x, delta, norm, 1e-5, early), both, normed),
    ]
    for row, expected, multiplied in cases:
        for with_bias in (bias, None):
            product, total = multiply_row(row, weight, with_bias)
            exact = multiplied[0].double() @ weight.double().T + (0 if with_bias is None else bias.double())
            assert torch.equal(total, expected)
            assert error(product, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_which_layers_take_a_row(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Linear(64, 40, dtype=dtype, device=DEVICE)
    with torch.inference_mode():
        linear = Linear([layer])
        assert linear.takes_row == (dtype != torch.float32)
        x = random(1, 3, 64, dtype=dtype)
        assert error(linear(x[:, :1]), torch.nn.functional.linear(x[:, :1], layer.weight, layer.bias)) < 1e-2
        monkeypatch.setattr(linear, "of_row", lambda row: pytest.fail("several rows are not one"))
        assert linear(x).shape == (1, 3, 40)


@pytest.mark.parametrize("compared", [0, 128])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    ("experts", "choice"),
    [
        (128, Choice(8, False, True, torch.float32)),
        (10, Choice(3, True, True, torch.bfloat16, torch.randn(10))),
        (60, Choice(4, True, True, torch.float32, torch.randn(60) * 0.2, 4, 2, 1.5)),
    ],
)
def test_a_router_behind_its_norm(
    wide: bool, experts: int, choice: Choice, compared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_module, "_COMPARED", compared)
    dtype = torch.bfloat16
    if choice.correction is not None:
        choice = choice._replace(correction=choice.correction.to(DEVICE))
    router = Router(random(experts, 80, dtype=dtype) / 4, random(experts, dtype=dtype), choice, wide)
    x, delta, norm = random(1, 1, 80, dtype=dtype), random(1, 1, 80, dtype=dtype), random(80, dtype=dtype)
    expected_total, expected_normed = add_rms_norm(x, delta, norm, 1e-6)
    assert all(torch.equal(same, x) for same in router.of_row(Row(x))[:2])
    for _ in range(2):  # the counter is left as it was
        total, normed, (logits, weights, ids) = router.of_row(Row(x, delta, norm, 1e-6))
        assert torch.equal(total, expected_total) and torch.equal(normed, expected_normed)
        expected_logits, expected, expected_ids = router(normed)
        assert logits.dtype == expected_logits.dtype and error(logits, expected_logits) < 1e-2
        assert torch.equal(ids, expected_ids)
        assert error(weights, expected) < 1e-2


def part(blocks: list[int], start: int) -> Slice:
    return Slice("r", [0], start, blocks, True, [], [], SamplingParams(max_tokens=1))


HEADS = [
    ((6, 2, 32, 32), 32, True, None, False),
    ((4, 1, 20, 12), 12, True, 7, True),
    ((8, 2, 16, 16), 8, False, 1, False),
    ((3, 3, 128, 64), 64, False, None, True),
]


def made(
    sizes: tuple[int, int, int, int], angles: int, normed: bool, dtype: torch.dtype, rows: int
) -> tuple[Heads, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Heads, a joint projection ``[rows, ...]``, cosines and sines."""
    query, shared, width, _ = sizes
    norms = [random(width, dtype=dtype) for _ in range(2)] if normed else [None, None]
    joint = random(rows, (query + 2 * shared) * width, dtype=dtype)
    angle = torch.rand(rows, angles, device=DEVICE) * 6
    return Heads(*sizes, *norms, 1e-6), joint, angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("sizes", "angles", "normed", "window", "sinks"), HEADS)
@pytest.mark.parametrize("splits", [1, 3])
def test_attention_from_the_joint_projection_on(
    sizes: tuple[int, int, int, int], angles: int, normed: bool, window: int | None, sinks: bool, splits: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Against the two kernels it takes the place of; sequences of several lengths, one of them padding."""
    query, shared, width, _ = sizes
    heads, joint, cosine, sine = made(sizes, angles, normed, dtype, 4)
    logits = random(query, dtype=dtype) if sinks else None
    inputs = StepInputs(8, 8, 12, 4, DEVICE)
    blocks = torch.randperm(32).tolist()
    inputs.fill(Batch((part(blocks[:12], 40), part(blocks[12:13], 0), part(blocks[13:18], 16))), Padded(4, 4))
    pools = random(2, 32, shared, 4, width, dtype=dtype)
    arrivals = torch.zeros(16, dtype=torch.int32, device=DEVICE)
    tiles = Tiles(16, 16, 4, 1)
    found, expected = pools.clone(), pools.clone()
    turned = split_and_rotate(joint, cosine, sine, heads, *expected, inputs.targets)
    out, other = joint.new_empty(4, query, width), joint.new_empty(4, query, width)
    seen = inputs.tables, inputs.lengths
    decode(turned, *expected, *seen, other, 0.3, window, logits, splits, arrivals, tiles)
    for _ in range(2):  # the arrivals of the first are not counted in the second
        out.fill_(torch.nan)
        decode_joint(
            joint, cosine, sine, heads, *found, inputs.targets, *seen, out, 0.3, window, logits, splits, arrivals, tiles
        )
        assert torch.equal(found, expected), "keys and values"
        assert error(out, other) < TOLERANCE[dtype]
        assert not out[3].any() and not arrivals.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_which_steps_take_attention_from_the_joint_projection_on(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    own = attend_joint.decode_joint
    monkeypatch.setattr(
        "actors.engine.attention.triton_paged.decode_joint", lambda *a: (calls.append(len(a[0])), own(*a))
    )
    attention = TritonPagedAttention([KVShape(2, 32, 32)], 32, 4, dtype, DEVICE)
    inputs = StepInputs(8, 8, 12, 4, DEVICE)

    def step(batch: list[Slice], rows: int, padded: Padded | None) -> None:
        inputs.fill(Batch(tuple(batch)), padded)
        attention.begin(inputs)
        heads, joint, cosine, sine = made((6, 2, 32, 32), 32, True, dtype, rows)
        out = attention.attend_joint(0, joint, cosine, sine, heads, 0.3, None, None)
        assert out.shape == (rows, 6, 32) and bool(out.isfinite().all())

    step([part([0], 0)], 1, None)
    step([], 1, Padded(1, 1))
    assert calls == ([] if dtype == torch.float32 else [1, 1])
    calls.clear()
    step([part([0], 1), part([1], 0)], 2, None)
    step([part([0], 2)], 2, Padded(2, 2))
    step([Slice("r", [0, 0], 0, [0], True, [], [], SamplingParams(max_tokens=1))], 2, None)
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float32, *TOLERANCE])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_pair_by_pair(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the weights are of 16 bits, not transposed, and the gate is SiLU; only at one row."""
    hidden, inner, count, top_k = 48, 40, 5, 3
    module = Module(kind, count, hidden, inner, dtype)
    experts = CudaExperts([slots(module, DEVICE)], count, top_k, hidden, dtype, DEVICE, max_rows=4, max_ranks=2)
    experts.window.memory.data.fill_(0xFF)
    experts._inner.fill_(torch.nan)
    calls = []
    own = experts._multiply_pairs
    monkeypatch.setattr(experts, "_multiply_pairs", lambda *a: (calls.append(len(a[1])), own(*a)))
    experts.adopt(Routing(ExpertMap(count, ((tuple(range(count)),),)), 0), SoloExchange())
    suits = kind in ("silu", "biased") and dtype != torch.float32
    for rows in (1, 2, 1):
        x = random(rows, hidden, dtype=dtype)
        ids = torch.rand(rows, count, device=DEVICE).argsort(1)[:, :top_k]
        weights = torch.rand(rows, top_k, device=DEVICE)
        experts.own_rows.fill_(rows)
        experts.begin([rows])
        found = experts.forward(0, x, ids, weights).cpu()
        reference = module.cpu().reference(x.cpu(), ids.cpu(), weights.cpu())
        module.to(DEVICE)
        assert error(found, reference) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert calls == ([1, 1] if suits else []) and experts.pairwise == suits
    assert experts.computed == 4 * top_k
    # A row of padding, as the graph of one row has it in an idle step.
    experts.own_rows.fill_(0)
    experts.begin([1])
    assert not experts.forward(0, x, torch.full_like(ids, 2**31 - 1), weights).any()
    assert experts.computed == 4 * top_k


@pytest.mark.parametrize("sigmoid", [False, True])
def test_comparing_experts_chooses_the_same_among_equals(sigmoid: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = Choice(4, sigmoid, True, torch.float32)
    logits = torch.randint(3, (5, 60), device=DEVICE).to(torch.bfloat16)
    logits[1, 7], logits[2], logits[3] = torch.nan, 0.0, -1000.0
    for own in logits:
        weight = torch.zeros(60, 16, dtype=torch.bfloat16, device=DEVICE)
        weight[:, 0] = own
        x = torch.zeros(1, 16, dtype=torch.bfloat16, device=DEVICE)
        x[0, 0] = 1
        found = []
        for compared in (0, 128):
            monkeypatch.setattr(router_module, "_COMPARED", compared)
            found.append(Router(weight, None, choice).of_row(Row(x))[2])
        assert torch.equal(found[0][0].nan_to_num(-1.0), own[None].nan_to_num(-1.0))
        for one, other in zip(*found, strict=True):
            assert torch.equal(one.nan_to_num(-1.0), other.nan_to_num(-1.0))
