"""Greedy equality with ``transformers``, token for token in float32, for every family and for groups of 1, 2 and 3.

Requests have mixed lengths; prompts are chunked, share prefixes, and lose their blocks (preemption).
"""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path

import msgspec
import pytest
import tiny_models
import torch
from rank_processes import Job, RankProcesses, Result
from transformers import AutoModelForCausalLM

from actors.engine.config import EngineConfig
from actors.engine.experts.exchange import PeerLost
from actors.engine.experts.map import ExpertMap
from actors.engine.experts.planner import Shape, plan
from actors.engine.model import summarize

# "cuda" runs the same tests on a GPU, which all ranks of a group share.
DEVICE = os.environ.get("ACCORDION_TEST_DEVICE", "cpu")
MAX_TOKENS = 16
SHARED_PREFIX = 24
# Requests arrive in the order of their names; the last ones repeat the first one's beginning once that is computed.
LENGTHS = {"a": 40, "b": 3, "c": 17, "d": 1, "e": 50, "f": 29, "g": 5, "h": 33}
LATE = {"g": 4, "h": 6}


def prompts() -> dict[str, list[int]]:
    draw = random.Random(7)
    made = {name: [draw.randrange(tiny_models.VOCAB) for _ in range(length)] for name, length in LENGTHS.items()}
    made["h"][:SHARED_PREFIX] = made["a"][:SHARED_PREFIX]
    return made


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def processes():
    with RankProcesses(3) as started:
        yield started


@pytest.fixture(scope="module")
def expected(directory: Path):
    """``expected(family)``: what ``generate()`` gives, by request."""
    known: dict[str, dict[str, list[int]]] = {}

    def generate(family: str) -> dict[str, list[int]]:
        if family not in known:
            model = AutoModelForCausalLM.from_pretrained(tiny_models.build(family, directory), dtype=torch.float32)
            known[family] = {
                name: model.generate(
                    torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                    max_new_tokens=MAX_TOKENS,
                    do_sample=False,
                )[0].tolist()[len(prompt) :]
                for name, prompt in prompts().items()
            }
        return known[family]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield generate
    torch.set_num_threads(threads)


def jobs(processes: RankProcesses, path: Path, expert_map: ExpertMap, **changes: object) -> list[Job]:
    """One job per rank of the map; requests go round the ranks.

    24 blocks of 8 tokens hold three to four of a rank's requests; a step takes 24 tokens, less than most prompts.
    """
    settings: dict = {"block_size": 8, "kv_blocks": 24, "max_num_batched_tokens": 24, "max_num_seqs": 8}
    # On a GPU steps are captured, decodes of more than two sequences as others are.
    config = EngineConfig(
        model=str(path), device=DEVICE, max_model_len=128, collective_timeout_s=30.0, cuda_graphs=(1, 2), **settings
    )
    size = max(expert_map.num_ranks, 1)
    store = processes.store()
    requests = [(name, prompt, LATE.get(name, 0)) for name, prompt in prompts().items()]
    return [
        Job(config, expert_map, index, size, store, requests[index::size], MAX_TOKENS, **changes)  # type: ignore[arg-type]
        for index in range(size)
    ]


def together(results: list[Result]) -> dict[str, list[int]]:
    for result in results:
        if isinstance(result, Exception):
            raise result
    return {name: tokens for result in results for name, tokens in result.tokens.items()}


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_group_size_generates_what_transformers_does(family, directory, processes, expected) -> None:
    path = tiny_models.build(family, directory)
    figures = summarize(path)
    maps = {size: plan(Shape(figures.num_moe_layers, figures.num_experts), range(size)) for size in (1, 2, 3)}
    # A dense model has no layer to read the number of ranks from: it runs alone.
    if not figures.num_moe_layers:
        maps = {1: maps[1]}
    solo = jobs(processes, path, maps[1])
    processes.start(solo, first=0)
    if 2 in maps:
        processes.start(jobs(processes, path, maps[2]), first=1)
    want = expected(family)
    (alone,) = processes.results(1, first=0)
    assert together([alone]) == want
    assert alone.preemptions > 0
    assert alone.prefix_hits > 0
    assert alone.longest_slice <= 24 < max(LENGTHS.values())
    if 2 in maps:
        assert together(processes.results(2, first=1)) == want
        assert together(processes.run(jobs(processes, path, maps[3]))) == want


def test_swapping_two_experts_in_the_map_is_noticed(directory, processes, expected) -> None:
    path = tiny_models.build("qwen2_moe", directory)
    figures = summarize(path)
    true = plan(Shape(figures.num_moe_layers, figures.num_experts), range(2))
    first = [list(row) for row in true.slots[0]]
    first[0][0], first[1][0] = first[1][0], first[0][0]
    swapped = ExpertMap(true.num_experts, (tuple(tuple(row) for row in first), *true.slots[1:]))
    results = processes.run(jobs(processes, path, swapped, load=true))
    assert together(results) != expected("qwen2_moe")


@pytest.mark.parametrize("family", ["qwen2_moe", "llama"])
def test_steps_launched_ahead_change_nothing(family, directory, processes, expected) -> None:
    path = tiny_models.build(family, directory)
    figures = summarize(path)
    size = 2 if figures.num_moe_layers else 1
    expert_map = plan(Shape(figures.num_moe_layers, figures.num_experts), range(size))
    results = processes.run(jobs(processes, path, expert_map, ahead=True))
    assert together(results) == expected(family)
    assert all(result.followed for result in results)


def test_replicas_and_empty_slots_change_nothing(directory, processes, expected) -> None:
    path = tiny_models.build("qwen2_moe", directory)
    figures = summarize(path)
    rows = ((0, 5, 2, -1), (1, 2, 4, 3), (-1, 5, 3, 0))
    expert_map = ExpertMap(figures.num_experts, (rows,) + (rows[::-1],) * (figures.num_moe_layers - 1))
    assert together(processes.run(jobs(processes, path, expert_map))) == expected("qwen2_moe")


def test_a_rank_without_requests_takes_part(directory, processes, expected) -> None:
    path = tiny_models.build("mixtral", directory)
    figures = summarize(path)
    made = jobs(processes, path, plan(Shape(figures.num_moe_layers, figures.num_experts), range(2)))
    everything = made[0].prompts + made[1].prompts
    made = [dataclasses.replace(job, prompts=everything if job.rank_index else []) for job in made]
    idle, busy = processes.run(made)
    assert together([busy]) == expected("mixtral")
    assert idle.dummy_steps > 0


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_rank_reads_no_other_rank_s_experts(family, directory, processes) -> None:
    path = tiny_models.build(family, directory)
    figures = summarize(path)
    reads = {}
    for size in (1, 2):
        made = jobs(processes, path, plan(Shape(figures.num_moe_layers, figures.num_experts), range(size)))
        results = processes.run(made)
        together(results)
        reads[size] = [result.bytes_read for result in results]
    experts = sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).named_parameters()
        if ".experts." in name
    )
    (everything,) = reads[1]
    assert everything > experts
    assert reads[2] == [everything - experts // 2] * 2


def test_a_request_that_makes_the_model_raise_leaves_all_others_right(directory, processes, expected) -> None:
    path = tiny_models.build("qwen2_moe", directory)
    figures = summarize(path)
    made = jobs(processes, path, plan(Shape(figures.num_moe_layers, figures.num_experts), range(3)))
    used = {token for prompt in prompts().values() for token in prompt}
    used |= {token for tokens in expected("qwen2_moe").values() for token in tokens}
    poison = next(token for token in range(tiny_models.VOCAB) if token not in used)
    bad = ("bad", [*range(9), poison, 4, 5], 3)
    config = msgspec.structs.replace(made[1].config, cuda_graphs=())  # a graph does not run what raises
    made[1] = dataclasses.replace(made[1], config=config, prompts=[*made[1].prompts, bad], poison=poison)
    results = processes.run(made)
    tokens = together(results)
    assert tokens.pop("bad") == []
    assert tokens == expected("qwen2_moe")
    assert [result.failed for result in results] == [[], ["bad"], []]


def test_peers_of_a_killed_rank_raise_peer_lost(directory, processes) -> None:
    path = tiny_models.build("qwen2_moe", directory)
    figures = summarize(path)
    first, victim, last = jobs(processes, path, plan(Shape(figures.num_moe_layers, figures.num_experts), range(3)))
    with RankProcesses(1) as mortal:
        processes.start([first, last])
        mortal.start([dataclasses.replace(victim, dies_in=5)])
        assert [type(result) for result in processes.results(2)] == [PeerLost, PeerLost]
