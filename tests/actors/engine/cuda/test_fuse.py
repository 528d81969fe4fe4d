"""Fused modules: each kernel against torch in higher precision, and whole tiny models against themselves unfused."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from actors.engine.attention.torch_sdpa import TorchPagedAttention
from actors.engine.attention.triton_paged import TritonPagedAttention
from actors.engine.batch import Batch, Slice
from actors.engine.cuda import fuse
from actors.engine.cuda.elementwise import add_rms_norm, rms_norm, silu_and_mul
from actors.engine.cuda.inputs import StepInputs
from actors.engine.cuda.linear import FEW_ROWS, FewRows, Tiles, join
from actors.engine.cuda.rotary import Heads, split_and_keep, split_and_rotate
from actors.engine.cuda.router import Choice, Router, route
from actors.engine.experts.exchange import SoloExchange
from actors.engine.experts.planner import Shape, plan
from actors.engine.experts.routing import Routing
from actors.engine.model import MoEModel
from actors.engine.weights import WeightLoader
from actors.wire import SamplingParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Relative errors: of one rounding to the dtype, or of a few.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = list(TOLERANCE)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What ``torch.empty`` gives is NaN, or the largest integer: an element that nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    difference = (found.double() - expected.double()).norm()
    assert float(difference) <= tolerance * float(expected.double().norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("inner", "outputs", "cut"),
    [(64, 48, None), (96, 130, None), (600, 40, Tiles(16, 128, 2, 3, 4)), (1024, 33, Tiles(32, 64, 8, 3, 4, 32))],
)
def test_a_product_of_few_rows(dtype: torch.dtype, inner: int, outputs: int, cut: Tiles | None) -> None:
    weight, bias, x = random(outputs, inner, dtype=dtype), random(outputs, dtype=dtype), random(16, inner, dtype=dtype)
    for with_bias in (bias, None):
        product = FewRows(weight, with_bias, cut=cut)
        expected = x.double() @ weight.double().T + (0 if with_bias is None else bias.double())
        whole = product(x)
        assert_near(whole, expected, TOLERANCE[dtype])
        for rows in (1, 7):
            assert torch.equal(product(x[:rows]), whole[:rows]), "a row depends on how many others there are"
    wide = FewRows(weight, bias, torch.float32, cut)(x)
    assert_near(wide, x.double() @ weight.double().T + bias.double(), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
def test_joined_layers_share_their_weight(dtype: torch.dtype) -> None:
    layers = [torch.nn.Linear(32, size, bias=size != 8, dtype=dtype, device=DEVICE) for size in (24, 8, 5)]
    for rows in (1, FEW_ROWS + 1):
        x = random(1, rows, 32, dtype=dtype)
        with torch.inference_mode():
            expected = [layer(x) for layer in layers]
            joined = join([layers])[tuple(layers)]
            for layer, own in zip(layers, expected, strict=True):
                assert_near(layer(x), own, TOLERANCE[dtype])
            assert_near(joined(x), torch.cat(expected, -1), TOLERANCE[dtype])
    storage = joined.weight.untyped_storage().data_ptr()
    assert all(layer.weight.untyped_storage().data_ptr() == storage for layer in layers)


def norm_of(x: torch.Tensor, weight: torch.Tensor, epsilon: float, early: bool) -> torch.Tensor:
    """As the models have it, in float64 but for the roundings to the dtype."""
    wide = x.double()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return ((wide.to(x.dtype).double() if early else wide) * weight.double()).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "early"), [(64, True), (100, False), (2048, True)])
def test_norms(dtype: torch.dtype, width: int, early: bool) -> None:
    weight, x, delta = random(width, dtype=dtype), random(1, 5, width, dtype=dtype), random(1, 5, width, dtype=dtype)
    assert_near(rms_norm(x, weight, 1e-5, early), norm_of(x, weight, 1e-5, early), TOLERANCE[dtype] / 4)
    total, normed = add_rms_norm(x, delta, weight, 1e-5, early)
    assert torch.equal(total, x + delta)
    assert_near(normed, norm_of(x + delta, weight, 1e-5, early), TOLERANCE[dtype] / 4)
    wide = random(5, 3 * width, dtype=dtype)
    expected, rest = norm_of(wide[:, width : 2 * width], weight, 1e-5, early), wide.clone()
    rms_norm(wide[:, width : 2 * width], weight, 1e-5, early, inplace=True)
    assert_near(wide[:, width : 2 * width], expected, TOLERANCE[dtype] / 4)
    assert torch.equal(wide[:, :width], rest[:, :width]) and torch.equal(wide[:, 2 * width :], rest[:, 2 * width :])
    assert rms_norm(x[:, :0], weight, 1e-5).shape == (1, 0, width)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(dtype: torch.dtype) -> None:
    x = random(1, 3, 2 * 1100, dtype=dtype)
    gate, up = x.double().chunk(2, -1)
    assert_near(silu_and_mul(x), (gate * gate.sigmoid()).to(dtype).double() * up, TOLERANCE[dtype] / 2)
    assert silu_and_mul(x[:, :0]).shape == (1, 0, 1100)


def heads_of(joint: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, heads: Heads) -> list[torch.Tensor]:
    """Queries, keys and values in float64."""
    parts = joint.double().unflatten(-1, (-1, heads.width)).split([heads.query, heads.shared, heads.shared], 1)
    cosine, sine = (angle.double().repeat(1, heads.rotated // angle.shape[-1])[:, None] for angle in (cosine, sine))
    turned = []
    for part, weight in zip(parts, (heads.query_norm, heads.key_norm), strict=False):
        if weight is not None:
            part = part * torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + heads.epsilon) * weight.double()
        first, second = part[..., : heads.rotated].chunk(2, -1)
        swapped = torch.cat([-second, first], -1)
        turned.append(torch.cat([part[..., : heads.rotated] * cosine + swapped * sine, part[..., heads.rotated :]], -1))
    return [*turned, parts[2]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("query", "shared", "width", "rotated", "angles", "normed"),
    [(6, 2, 32, 32, 32, True), (4, 1, 20, 12, 12, True), (8, 2, 16, 16, 8, False), (3, 3, 128, 64, 64, False)],
)
def test_heads(
    dtype: torch.dtype, query: int, shared: int, width: int, rotated: int, angles: int, normed: bool
) -> None:
    norms = [random(width, dtype=dtype) for _ in range(2)] if normed else [None, None]
    heads = Heads(query, shared, width, rotated, *norms, 1e-6)
    rows, stride = 5, (query + 2 * shared) * width
    joint = random(rows, stride + 7, dtype=dtype)[:, :stride]
    angle = torch.rand(rows, angles // 2 if angles == rotated else angles, device=DEVICE) * 6
    angle = torch.cat([angle, angle], -1) if angles == rotated else angle
    cosine, sine = angle.cos().to(dtype), angle.sin().to(dtype)
    expected = heads_of(joint, cosine, sine, heads)
    found = split_and_keep(joint, cosine, sine, heads)
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other, TOLERANCE[dtype])
    assert torch.equal(found[2], joint[:, -shared * width :].unflatten(1, (shared, width)))
    # Into pools of 4 blocks of 8; rows 1 and 3 are padding.
    targets = torch.tensor([17, -1, 8, -1, 31, 5, 5], dtype=torch.int32, device=DEVICE)
    pools = [torch.full((4, shared, 8, width), torch.inf, dtype=dtype, device=DEVICE) for _ in range(2)]
    queries = split_and_rotate(joint, cosine, sine, heads, *pools, targets)
    assert torch.equal(queries, found[0])
    for pool, own in zip(pools, found[1:], strict=True):
        flat = pool.transpose(1, 2).flatten(0, 1)
        assert torch.equal(flat[[17, 8, 31]], own[[0, 2, 4]])
        flat[[17, 8, 31]] = torch.inf
        assert bool(flat.isinf().all()), "a slot that is nobody's target was written"


def chosen_of(logits: torch.Tensor, choice: Choice) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.double()
    scores = logits.sigmoid() if choice.sigmoid else logits.softmax(-1)
    ranked = scores if choice.correction is None else scores + choice.correction.double()
    if choice.kept_groups < choice.groups:
        grouped = ranked.unflatten(1, (choice.groups, -1))
        kept = grouped.topk(2, -1).values.sum(-1).topk(choice.kept_groups, -1).indices
        mask = torch.zeros_like(grouped[..., 0]).scatter(1, kept, 1).bool()
        ranked = grouped.masked_fill(~mask[..., None], -torch.inf).flatten(1)
    ids = ranked.topk(choice.top_k, -1).indices
    weights = scores.gather(1, ids)
    if choice.normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * choice.factor, ids


@pytest.mark.parametrize(
    ("experts", "choice"),
    [
        (128, Choice(8, False, True, torch.float32)),
        (10, Choice(3, False, True, torch.bfloat16)),
        (6, Choice(6, False, False, torch.float32, factor=2.5)),
        (60, Choice(4, True, True, torch.float32, torch.randn(60) * 0.2, 4, 2, 1.5)),
        (256, Choice(8, True, True, torch.float32, torch.randn(256) * 0.2, 8, 4, 2.5)),
        (384, Choice(8, True, False, torch.float32)),
    ],
)
def test_chosen_experts(experts: int, choice: Choice) -> None:
    if choice.correction is not None:
        choice = choice._replace(correction=choice.correction.to(DEVICE))
    logits = random(9, experts) * 2
    weights, ids = route(logits, choice)
    expected, expected_ids = chosen_of(logits, choice)
    assert weights.dtype == choice.dtype and ids.dtype == torch.int64
    assert torch.equal(ids, expected_ids)
    assert_near(weights, expected, TOLERANCE[choice.dtype])
    logits[4] = torch.nan
    ids = route(logits, choice)[1]
    assert int(ids.min()) >= 0 and int(ids.max()) < experts, "rows that are not numbers go to experts that are"
    assert torch.equal(ids[[0, 8]], expected_ids[[0, 8]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    ("experts", "choice"),
    [(128, Choice(8, False, True, torch.float32)), (10, Choice(3, True, True, torch.bfloat16, torch.randn(10)))],
)
def test_routers(dtype: torch.dtype, wide: bool, experts: int, choice: Choice) -> None:
    if choice.correction is not None:
        choice = choice._replace(correction=choice.correction.to(DEVICE))
    weight, bias = random(experts, 80, dtype=dtype), random(experts, dtype=dtype)
    router = Router(weight / 4, bias, choice, wide)
    for rows in (1, 3, FEW_ROWS, FEW_ROWS + 1):
        x = random(1, rows, 80, dtype=dtype)
        logits, weights, ids = router(x)
        exact = x[0].double() @ (weight / 4).double().T + bias.double()
        assert logits.dtype == (torch.float32 if wide else dtype)
        assert_near(logits, exact, TOLERANCE[logits.dtype])
        # Given those logits the choice is exact, and the weights but for the order of a sum.
        expected, expected_ids = route(logits, choice)
        assert torch.equal(ids, expected_ids)
        assert_near(weights, expected, TOLERANCE[weights.dtype])


def test_the_lowest_of_equal_experts_is_chosen() -> None:
    logits = torch.zeros(1, 20, device=DEVICE)
    logits[0, 13] = 1
    assert route(logits, Choice(4, False, True, torch.float32))[1].tolist() == [[13, 0, 1, 2]]


def load(path: Path, dtype: str) -> MoEModel:
    """With all its experts, alone."""
    model = MoEModel(path, dtype)
    summary = model.summary
    routing = Routing(plan(Shape(summary.num_moe_layers, summary.num_experts), (0,)), 0)
    model.allocate_slots(routing.num_slots, DEVICE, 64)
    model.experts = model.host_experts()
    model.experts.adopt(routing, SoloExchange())
    loader = WeightLoader(model, DEVICE)
    with torch.inference_mode():
        loader.load_dense()
        loader.load_experts(routing.own_slots)
    return model


def batches() -> list[Batch]:
    """A prompt; its next token beside another's prompt; both; the first by itself."""
    first, second = [3, 7, 1, 0, 9, 11], [4, 8, 2]

    def part(tokens: list[int], start: int, blocks: list[int]) -> Slice:
        return Slice("r", tokens, start, blocks, True, [], [], SamplingParams(max_tokens=1))

    prompts = [list(range(40, 60)), list(range(100, 107))]
    return [
        Batch((part(prompts[0], 0, first),)),
        Batch((part([8], 20, first), part(prompts[1], 0, second))),
        Batch((part([4], 21, first), part([9], 7, second))),
        Batch((part([6], 22, first),)),
    ]


def logits_of(model: MoEModel, paged: bool = False) -> torch.Tensor:
    inputs = StepInputs(64, 4, 8, 8, DEVICE)
    make = TritonPagedAttention if paged else TorchPagedAttention
    model.attention = make(model.kv_shapes, 16, 8, model.dtype, DEVICE)  # type: ignore[assignment]
    found = []
    for batch in batches():
        inputs.fill(batch)
        model.attention.begin(inputs if paged else batch)  # type: ignore[arg-type]
        model.experts.begin([batch.num_tokens])
        rows = inputs.rows
        with torch.inference_mode():
            output = model.module(
                input_ids=inputs.ids[None, :rows], position_ids=inputs.positions[None, :rows], use_cache=False,
                logits_to_keep=inputs.last[: inputs.sequences],
            )  # fmt: skip
        found.append(output.logits[0])
    return torch.cat(found).float()


# What is left alone. MLA is no attention of heads side by side; these families have experts in every layer.
UNFUSED = {
    "attentions": ("deepseek_v2", "deepseek_v3"),
    "MLPs": ("mixtral", "olmoe", "gpt_oss"),
    "routers": ("llama", "qwen3"),
}
# Nothing but a router and its experts; in the others, experts that all tokens share stand beside them.
ROUTED = ("qwen3_moe", "mixtral", "olmoe", "gpt_oss")


def families_and_dtypes() -> Iterator[Any]:
    """Interpreted, a family takes ten seconds, and a quarter of a minute in bfloat16."""
    for family, dtype in itertools.product(tiny_models.FAMILIES, ("float32", "bfloat16")):
        fast = dtype == "float32" and family in ("qwen3_moe", "deepseek_v3", "gpt_oss")
        yield pytest.param(family, dtype, marks=[] if fast else [pytest.mark.slow])


@pytest.mark.parametrize(("family", "dtype"), list(families_and_dtypes()))
def test_models_give_the_same_logits(family: str, dtype: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(tiny_models.build(family, tmp_path), dtype)
    paged = family in ("qwen3_moe", "glm4_moe", "gpt_oss")
    expected = logits_of(model, paged)
    caplog.set_level(logging.INFO, fuse.__name__)
    fuse.fuse(model, 64)
    (line,) = [record.getMessage() for record in caplog.records if record.name == fuse.__name__]
    layers = model.module.config.num_hidden_layers
    assert f"{layers} layers, {layers} open layers" in line and "1 body" in line and "1 narrowed layers" in line
    # Those of DeepSeek-V2 are complex numbers.
    assert ("1 table of angles" in line) == (family != "deepseek_v2"), line
    for kind, families in UNFUSED.items():
        assert (kind in line) == (family not in families), line
    if family not in UNFUSED["attentions"]:
        assert f"{layers} attentions" in line
    narrow = dtype != "float32"
    assert ("routed blocks" in line) == (narrow and family in ROUTED), line
    assert (f"{layers} layers by row" in line) == (narrow and family not in UNFUSED["attentions"]), line
    # Of models this small rounding alone makes others, by up to a twentieth; test_model.py compares with float32.
    tolerance = 5e-5 if dtype == "float32" else 6e-2
    assert_near(logits_of(model, paged), expected, tolerance)


def twice(own: Any) -> Any:
    def double(part: Any) -> Any:
        return part * 2 if isinstance(part, torch.Tensor) and part.is_floating_point() else part

    def forward(*arguments: Any, **settings: Any) -> Any:
        found = own(*arguments, **settings)
        return tuple(map(double, found)) if isinstance(found, tuple) else double(found)

    return forward


def test_modules_that_compute_otherwise_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(tiny_models.build("qwen3_moe", tmp_path), "float32")
    layers = model.module.model.layers
    changed = [layers[0].mlp, layers[1].input_layernorm, layers[1].self_attn, layers[2].mlp.gate, layers[3]]
    for module in changed:
        module.forward = twice(module.forward)
    others = [module.forward for module in changed]
    expected = logits_of(model)
    caplog.set_level(logging.INFO, fuse.__name__)
    fuse.fuse(model, 64)
    assert all(module.forward is own for module, own in zip(changed, others, strict=True))
    (line,) = [record.getMessage() for record in caplog.records if record.name == fuse.__name__]
    # A layer needs both its norms fused; where one is closed, so are all.
    assert "16 norms, 2 routers, 3 attentions, 2 layers, 5 joint projections" in line
    assert_near(logits_of(model), expected, 1e-5)


@pytest.mark.slow
def test_a_row_goes_only_to_modules_that_compute_with_it_what_their_forwards_do(tmp_path: Path) -> None:
    model = load(tiny_models.build("qwen3_moe", tmp_path), "bfloat16")
    layers = model.module.model.layers
    layers[1].mlp.forward = twice(layers[1].mlp.forward)
    layers[2].self_attn.register_forward_hook(lambda module, arguments, output: (output[0] * 2, output[1]))
    expected = logits_of(model, paged=True)
    fuse.fuse(model, 64)
    taken = [(layer.forward.attention_of_row is not None, layer.forward.mlp_of_row is not None) for layer in layers]
    # The first layer has no experts.
    assert taken == [(True, False), (True, False), (False, False), (True, True)]
    assert_near(logits_of(model, paged=True), expected, 2e-2)


def test_a_decoder_that_looks_between_its_layers_gets_whole_sums(tmp_path: Path) -> None:
    model = load(tiny_models.build("qwen3", tmp_path), "float32")
    layer = model.module.model.layers[1]
    layer.register_forward_pre_hook(lambda _, arguments: (arguments[0] * 1.5,))
    expected = logits_of(model)
    fuse.fuse(model, 64)
    assert_near(logits_of(model), expected, 1e-5)
