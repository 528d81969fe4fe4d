"""The experts' kernels against plain torch: one rank here, groups in ``test_peers.py``."""

from __future__ import annotations

import pytest
import torch
from expert_modules import KINDS, Module, slots

from actors.engine.cuda import gemm
from actors.engine.cuda.experts import CudaExperts
from actors.engine.experts.exchange import SoloExchange
from actors.engine.experts.map import ExpertMap
from actors.engine.experts.routing import Routing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
MAX_ROWS = 40


def make(modules: list[Module], top_k: int, hidden: int, num_experts: int) -> CudaExperts:
    dtype = modules[0].down_proj.dtype
    layers = [slots(module, DEVICE) for module in modules]
    experts = CudaExperts(layers, num_experts, top_k, hidden, dtype, DEVICE, max_rows=MAX_ROWS, max_ranks=2)
    experts.window.memory.data.fill_(0xFF)  # NaN, whatever the dtype
    experts._inner.fill_(float("nan"))
    return experts


def whole(num_experts: int, layers: int = 1) -> ExpertMap:
    return ExpertMap(num_experts, ((tuple(range(num_experts)),),) * layers)


def draw(rows: int, hidden: int, num_experts: int, top_k: int, dtype: torch.dtype, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, num_experts, generator=generator).argsort(1)[:, :top_k]
    return [torch.randn(rows, hidden, generator=generator).to(dtype), ids, torch.rand(rows, top_k, generator=generator)]


def run(experts: CudaExperts, layer: int, tensors: list[torch.Tensor]) -> torch.Tensor:
    return experts.forward(layer, *(tensor.to(DEVICE) for tensor in tensors)).cpu()


def error(result: torch.Tensor, reference: torch.Tensor) -> float:
    return float((result.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_computes_what_plain_torch_does(kind: str, dtype: torch.dtype) -> None:
    hidden, inner, count, top_k = 48, 40, 5, 2
    module = Module(kind, count, hidden, inner, dtype)
    experts = make([module], top_k, hidden, count)
    experts.adopt(Routing(whole(count), 0), SoloExchange())
    tensors = draw(7, hidden, count, top_k, dtype)
    experts.begin([7])
    experts.own_rows.fill_(7)
    result = run(experts, 0, tensors)
    assert error(result, module.cpu().reference(*tensors)) < TOLERANCE[dtype]
    assert experts.computed == 14
    assert experts.chosen.tolist() == [torch.bincount(tensors[1].reshape(-1), minlength=count).tolist()]


@pytest.mark.parametrize(("hidden", "inner"), [(32, 16), (33, 17), (70, 130)])
def test_sizes_need_not_fit_the_tiles(hidden: int, inner: int) -> None:
    module = Module("silu", 3, hidden, inner, torch.float32)
    experts = make([module], 3, hidden, 3)
    experts.adopt(Routing(whole(3), 0), SoloExchange())
    tensors = draw(37, hidden, 3, 3, torch.float32)
    experts.begin([37])
    experts.own_rows.fill_(37)
    assert error(run(experts, 0, tensors), module.cpu().reference(*tensors)) < 1e-5


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float16])
@pytest.mark.parametrize(("hidden", "inner"), [(48, 40), (34, 40), (48, 36), (33, 17)])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_rows_come_by_descriptors_where_they_can(
    kind: str, hidden: int, inner: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 16 bytes, or not in the first product, the second, both; layers of other sizes use the same memory."""
    monkeypatch.setattr(gemm, "shape", lambda *_: gemm.Shape(16, 16, 16, 4, 1, 1, True))
    modules = [Module(kind, 3, hidden, width, dtype) for width in (inner, 64)]
    experts = make(modules, 2, hidden, 3)
    experts.adopt(Routing(whole(3, 2), 0), SoloExchange())
    experts.begin([21])
    experts.own_rows.fill_(21)
    for layer, module in enumerate(modules):
        tensors = draw(21, hidden, 3, 2, dtype, layer)
        assert error(run(experts, layer, tensors), module.cpu().reference(*tensors)) < TOLERANCE[dtype]
        module.to(DEVICE)


@pytest.mark.parametrize("rows", [30, 70])
def test_the_tiles_of_more_rows(rows: int) -> None:
    """Those of a long prompt, whose last are nearly empty."""
    module = Module("silu", 2, 128, 136, torch.float16)
    layers = [slots(module, DEVICE)]
    experts = CudaExperts(layers, 2, 2, 128, torch.float16, DEVICE, max_rows=rows, max_ranks=2)
    experts.window.memory.data.fill_(0xFF)
    experts._inner.fill_(float("nan"))
    experts.adopt(Routing(whole(2), 0), SoloExchange())
    tensors = draw(rows, 128, 2, 2, torch.float16)
    experts.begin([rows])
    experts.own_rows.fill_(rows)
    assert gemm.shape(torch.float16, rows, "expand").described
    assert error(run(experts, 0, tensors), module.cpu().reference(*tensors)) < 2e-3


def test_rows_of_padding_are_not_routed_and_give_zeros() -> None:
    module = Module("silu", 4, 32, 16, torch.float32)
    experts = make([module] * 2, 2, 32, 4)
    experts.adopt(Routing(whole(4, 2), 0), SoloExchange())
    tensors = draw(6, 32, 4, 2, torch.float32)
    tensors[0][4:], tensors[1][4:], tensors[2][4:] = float("nan"), 2**31 - 1, float("nan")
    experts.begin([4])
    experts.own_rows.fill_(4)
    for layer in range(2):
        result = run(experts, layer, tensors)
        assert error(result[:4], module.cpu().reference(*(tensor[:4] for tensor in tensors))) < 1e-5
        assert not result[4:].any()
        module.to(DEVICE)
    assert experts.computed == 16


def test_a_step_without_rows_and_a_row_without_experts() -> None:
    module = Module("silu", 4, 32, 16, torch.float32)
    experts = make([module] * 2, 2, 32, 4)
    experts.adopt(Routing(whole(4, 2), 0), SoloExchange())
    experts.begin([0])
    experts.finish()
    assert experts.computed == 0
    tensors = draw(3, 32, 4, 2, torch.float32)
    tensors[1][1], tensors[1][2, 0] = -1, -1
    experts.begin([3])
    experts.own_rows.fill_(3)
    result = run(experts, 0, tensors)
    experts.finish()
    assert error(result, module.cpu().reference(*tensors)) < 1e-5
    assert not result[1].any()
    assert experts.computed == 3


def test_a_step_that_is_narrowed_between_two_layers() -> None:
    modules = [Module("silu", 4, 32, 16, torch.float32, seed) for seed in range(3)]
    experts = make(modules, 2, 32, 4)
    experts.adopt(Routing(whole(4, 3), 0), SoloExchange())
    tensors = draw(7, 32, 4, 2, torch.float32)
    few = [tensor[[6, 1, 3]] for tensor in tensors]
    for _ in range(2):  # the next step has all its rows again
        experts.reset_counts()
        experts.begin([7])
        experts.own_rows.fill_(7)
        found = run(experts, 0, tensors)
        experts.narrow(3, torch.full_like(experts.own_rows, 3))
        narrowed = run(experts, 1, few)
        with pytest.raises(ValueError, match="layer 2 ran with 2 rows; layer 2 with 3 was announced"):
            run(experts, 2, [tensor[:2] for tensor in few])
        experts.finish()
        assert experts.chosen.sum(1).tolist() == [14, 6, 0] and experts.computed == 20
        assert error(found, modules[0].cpu().reference(*tensors)) < 1e-5
        assert error(narrowed, modules[1].cpu().reference(*few)) < 1e-5
        for module in modules:
            module.to(DEVICE)


def test_alone_every_row_goes_to_what_stands_here() -> None:
    """As in a warm-up before a rank has joined: two of four experts stand here, all pairs of a token in one slot."""
    module = Module("silu", 4, 32, 16, torch.float32)
    experts = make([module.of([2, -1])], 2, 32, 4)
    expert_map = ExpertMap(4, (((2, -1), (0, 1), (3, -1)),))
    routing = Routing(expert_map, 0).alone()
    experts.adopt(routing, SoloExchange())
    tensors = draw(MAX_ROWS, 32, 4, 2, torch.float32)
    experts.begin([MAX_ROWS])
    experts.own_rows.fill_(MAX_ROWS)
    result = run(experts, 0, tensors)
    assert error(result, module.reference(tensors[0], torch.full_like(tensors[1], 2), tensors[2])) < 1e-5


def test_a_rows_result_does_not_depend_on_the_others() -> None:
    module = Module("silu", 4, 64, 48, torch.float32)
    experts = make([module], 2, 64, 4)
    experts.adopt(Routing(whole(4), 0), SoloExchange())
    tensors = draw(MAX_ROWS, 64, 4, 2, torch.float32)
    results = []
    for rows in (range(MAX_ROWS), [3], [39, 3, 8]):
        experts.begin([len(rows)])
        experts.own_rows.fill_(len(rows))
        results.append(run(experts, 0, [tensor[list(rows)] for tensor in tensors]))
    assert torch.equal(results[0][[3]], results[1])
    assert torch.equal(results[0][[39, 3, 8]], results[2])


def test_what_does_not_fit_is_refused() -> None:
    module = Module("silu", 4, 32, 16, torch.float32)
    experts = make([module], 2, 32, 4)
    with pytest.raises(ValueError, match="2 layers, the model 1"):
        experts.adopt(Routing(whole(4, 2), 0), SoloExchange())
    with pytest.raises(ValueError, match="3 ranks; windows were made for 2"):
        experts.adopt(Routing(ExpertMap(4, (((0, 1), (2, 3), (0, 1)),)), 0), SoloExchange())
    experts.adopt(Routing(whole(4), 0), SoloExchange())
    with pytest.raises(ValueError, match="a step of 2 ranks"):
        experts.begin([1, 1])
    with pytest.raises(ValueError, match="made for 40"):
        experts.begin([41])
    experts.begin([2])
    with pytest.raises(ValueError, match="layer 0 ran with 1 rows; layer 0 with 2 was announced"):
        run(experts, 0, draw(1, 32, 4, 2, torch.float32))


def test_only_gates_that_the_kernels_have_may_be_captured() -> None:
    for kind in KINDS:
        experts = make([Module(kind, 2, 32, 16, torch.float32)], 1, 32, 2)
        assert experts.capturable == (kind not in ("ungated", "gelu"))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="CUDA graphs need a GPU")
def test_a_graph_outlives_what_it_was_captured_with() -> None:
    dtype, hidden, count = torch.bfloat16, 64, 8
    module = Module("silu", count, hidden, 96, dtype)
    experts = make([module.of([*range(count)])], 2, hidden, count)
    experts.adopt(Routing(whole(count), 0), SoloExchange())
    tensors = [tensor.to(DEVICE) for tensor in draw(8, hidden, count, 2, dtype)]
    experts.begin([8])
    experts.own_rows.fill_(8)
    experts.forward(0, *tensors)
    torch.cuda.synchronize()
    experts.begin([8])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = experts.forward(0, *tensors)
    order = [3, 1, 0, 2, 7, 6, 5, 4]
    experts.layers[0].module.load_state_dict(module.of(order).state_dict())
    experts.adopt(Routing(ExpertMap(count, ((tuple(order),),)), 0), SoloExchange())
    for rows in (8, 5):
        fresh = draw(8, hidden, count, 2, dtype, seed=rows)
        for tensor, values in zip(tensors, fresh, strict=True):
            tensor.copy_(values)
        experts.begin([rows])
        experts.own_rows.fill_(rows)
        output.fill_(float("nan"))
        graph.replay()
        result = output.cpu()
        assert error(result[:rows], module.reference(*(tensor[:rows] for tensor in fresh))) < TOLERANCE[dtype]
        assert not result[rows:].any()
