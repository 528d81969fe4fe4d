"""The scheduler under a simulated model: every request gets the tokens it would get alone, whatever happens to it.

The model of the model: the next token is a function of the whole prefix. The KV cache is a dict from (block, offset) to
the prefix that was standing there when the cell was computed, so reading a wrong, stale or unwritten cell shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from actors.engine.batch import EMPTY, Batch, Sampled, Slice
from actors.engine.blocks import BlockPool
from actors.engine.request import Request, Status
from actors.engine.scheduler import Output, Scheduler
from actors.wire import Failure, SamplingParams

VOCAB = 8
EOS, STOP = 0, 1
MAX_MODEL_LEN = 24
GARBAGE = (-1,)


def next_token(prefix: Sequence[int]) -> int:
    return blake2b(bytes(prefix), digest_size=1).digest()[0] % VOCAB


def alone(prompt: list[int], sampling: SamplingParams) -> tuple[list[int], str]:
    """What a request generates on an idle rank, and why it ends."""
    generated: list[int] = []
    while True:
        token = next_token(prompt + generated)
        if len(generated) < sampling.min_tokens and token in (EOS, STOP):
            token = VOCAB - 1
        generated.append(token)
        if token in (*sampling.eos_token_ids, *sampling.stop_token_ids):
            return generated, "stop"
        if len(generated) == sampling.max_tokens or len(prompt) + len(generated) == MAX_MODEL_LEN:
            return generated, "length"


class Device:
    """Computes batches against a KV cache that remembers the prefix behind every cell."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.cells: dict[tuple[int, int], tuple[int, ...]] = {}
        self.drawn: list[int] = []  # in the step before

    def sequence(self, piece: Slice) -> list[int]:
        """What is known of the slice's request, and the token that it follows."""
        return piece.prompt + piece.generated + ([] if piece.follows is None else [self.drawn[piece.follows]])

    def cell(self, blocks: list[int], position: int) -> tuple[int, int]:
        return blocks[position // self.block_size], position % self.block_size

    def spoil(self, batch: Batch) -> None:
        """A step that broke half-way: whatever it was to write may hold anything."""
        for piece in batch.slices:
            for position in range(piece.start, piece.start + len(piece.tokens)):
                self.cells[self.cell(piece.blocks, position)] = GARBAGE

    def run(self, batch: Batch) -> list[Sampled | Failure]:
        written = set()
        for piece in batch.slices:
            sequence = self.sequence(piece)
            if piece.follows is None:
                assert piece.tokens and piece.tokens == sequence[piece.start : piece.end]
            else:
                assert (piece.tokens, piece.end) == ([0], len(sequence))
            assert piece.samples == (piece.start + len(piece.tokens) == len(sequence))
            for position in range(piece.start):  # computed by earlier steps
                assert self.cells[self.cell(piece.blocks, position)] == tuple(sequence[: position + 1])
            for position in range(piece.start, piece.start + len(piece.tokens)):
                cell = self.cell(piece.blocks, position)
                assert cell not in written
                written.add(cell)
        for piece in batch.slices:
            sequence = self.sequence(piece)
            for position in range(piece.start, piece.start + len(piece.tokens)):
                self.cells[self.cell(piece.blocks, position)] = tuple(sequence[: position + 1])
        for piece in batch.slices:  # no slice wrote over what another reads in the same step
            sequence = self.sequence(piece)
            for position in range(piece.start + len(piece.tokens)):
                assert self.cells[self.cell(piece.blocks, position)] == tuple(sequence[: position + 1])
        sampled: list[Sampled | Failure] = []
        for piece in batch.sampling_slices:
            token = next_token(self.sequence(piece))
            if piece.end - len(piece.prompt) < piece.sampling.min_tokens and token in (EOS, STOP):
                token = VOCAB - 1
            sampled.append(Sampled(token))
        self.drawn = [result.token for result in sampled if isinstance(result, Sampled)]
        return sampled


class Rank:
    """A scheduler, its device, and what the clients have been told."""

    def __init__(
        self, blocks: int = 14, block_size: int = 2, max_num_seqs: int = 3, budget: int = 5, chunk: int | None = None
    ) -> None:
        self.pool = BlockPool(blocks, block_size)
        self.limits = (max_num_seqs, budget)
        self.scheduler = Scheduler(
            self.pool,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_queue=4,
            vocab_size=VOCAB,
            prefill_chunk=chunk,
        )
        self.device = Device(block_size)
        self.live: dict[str, Request] = {}  # in order of arrival
        self.told: dict[str, list[int]] = {}
        self.finish: dict[str, str] = {}
        self.cached: dict[str, int] = {}

    def add(
        self, prompt: list[int], generated: Sequence[int] = (), request_id: str | None = None, **sampling: object
    ) -> Output | None:
        request_id = request_id or f"r{len(self.told)}"
        params = SamplingParams(**{"max_tokens": 8, "eos_token_ids": (EOS,), "stop_token_ids": (STOP,), **sampling})
        request = Request(request_id, b"client-of-" + request_id.encode(), prompt, params, list(generated))
        refusal = self.scheduler.add(request)
        if refusal is None:
            self.live[request_id] = request
            self.told[request_id] = list(generated)
        return refusal

    def schedule(self, others_wait: bool = False, ahead: bool = False) -> Batch:
        before = [request for request in self.live.values() if request.status is Status.RUNNING]
        batch = self.scheduler.schedule(others_wait)
        max_num_seqs, budget = self.limits
        assert len(batch.slices) <= max_num_seqs and batch.num_tokens <= budget
        assert self.scheduler.running <= max_num_seqs
        ids = [piece.request_id for piece in batch.slices]
        assert len(set(ids)) == len(ids)
        if ahead:
            assert all(request.status is Status.RUNNING for request in before)
            return batch
        # Nobody starves: the oldest is always served, and who ran goes on unless it was preempted.
        if self.live:
            assert next(iter(self.live)) in ids
        assert all(request.request_id in ids for request in before if request.status is Status.RUNNING)
        return batch

    def hear(self, outputs: Sequence[Output | None]) -> None:
        for output in outputs:
            assert output is not None
            delta = output.delta
            request = self.live[delta.request_id]
            assert output.client == request.client
            assert delta.offset == len(self.told[delta.request_id])
            self.told[delta.request_id] += delta.tokens
            self.cached[delta.request_id] = delta.cached_tokens
            assert delta.cached_tokens <= len(request.prompt)
            if delta.finish is not None:
                self.finish[delta.request_id] = delta.finish
                del self.live[delta.request_id]
                assert request.status is Status.ENDED and not request.blocks

    def step(self) -> Batch:
        batch = self.schedule()
        self.hear(self.scheduler.commit(batch, self.device.run(batch)))
        return batch

    def drain(self) -> None:
        steps = 0
        while self.scheduler.has_work:
            self.step()
            steps += 1
            assert steps < 2000
        assert not self.live and self.pool.used == 0 and self.scheduler.schedule() is EMPTY

    def check_blocks(self) -> None:
        users = [block for request in self.live.values() for block in request.blocks]
        assert [self.pool.references(block) for block in range(self.pool.total)] == [
            users.count(block) for block in range(self.pool.total)
        ]
        assert self.pool.used == len(set(users))
        assert self.scheduler.running + self.scheduler.waiting == len(self.live)


prompts = st.one_of(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
    st.integers(1, 12).map(lambda length: ([2, 3, 4, 5] * 3)[:length]),  # many with a common beginning
)


class Life(RuleBasedStateMachine):
    """Requests come and go, steps are scheduled, some ahead, committed, voided, broken into by aborts, or fail in part.

    Steps run on the device as soon as they are scheduled; ``under_way`` are those that were not committed, with what
    they drew.
    """

    chunk: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.rank = Rank(chunk=self.chunk)
        self.under_way: list[tuple[Batch, list[Sampled | Failure]]] = []
        self.voided: Batch | None = None
        self.expected: dict[str, tuple[list[int], str]] = {}
        self.cut: set[str] = set()  # aborted or failed

    @rule(
        prompt=prompts,
        max_tokens=st.integers(1, 14),
        min_tokens=st.integers(0, 3),
        ignore_eos=st.booleans(),
        copies=st.integers(1, 3),
        known=st.integers(0, 6),
    )
    def add(
        self, prompt: list[int], max_tokens: int, min_tokens: int, ignore_eos: bool, copies: int, known: int
    ) -> None:
        sampling = {
            "max_tokens": max_tokens,
            "min_tokens": min(min_tokens, max_tokens),
            "eos_token_ids": () if ignore_eos else (EOS,),
            "stop_token_ids": () if ignore_eos else (STOP,),
        }
        tokens, finish = alone(prompt, SamplingParams(**sampling))
        for _ in range(copies):
            request_id = f"r{len(self.expected)}"
            refusal = self.rank.add(prompt, tokens[: min(known, len(tokens) - 1)], request_id, **sampling)
            if refusal is None:
                self.expected[request_id] = tokens, finish
            else:
                assert refusal.delta.failure.code == "overloaded"
                assert self.rank.scheduler.waiting >= 4

    @precondition(lambda self: len(self.under_way) < 2)
    @rule(others_wait=st.booleans())
    def schedule(self, others_wait: bool) -> None:
        batch = self.rank.schedule(others_wait, ahead=bool(self.under_way))
        if self.voided is not None:
            kept = tuple(
                dataclasses.replace(piece, tokens=self.rank.live[piece.request_id].tokens(piece.start, piece.end))
                for piece in self.voided.slices
                if piece.request_id in self.rank.live
            )
            if kept:
                assert batch.slices == tuple(dataclasses.replace(piece, follows=None) for piece in kept)
            self.voided = None
        if batch.slices:
            self.under_way.append((batch, self.rank.device.run(batch)))

    @precondition(lambda self: self.under_way)
    @rule()
    def commit(self) -> None:
        batch, sampled = self.under_way.pop(0)
        live = list(self.rank.live)
        outputs = self.rank.scheduler.commit(batch, sampled)
        sampling = [piece.request_id for piece in batch.sampling_slices if piece.request_id in live]
        assert [output.delta.request_id for output in outputs] == sampling
        self.rank.hear(outputs)

    @precondition(lambda self: len(self.under_way) == 1)
    @rule()
    def void(self) -> None:
        hits = self.rank.pool.hits
        batch, _ = self.under_way.pop()
        self.rank.device.spoil(batch)
        self.rank.scheduler.void(batch)
        assert self.rank.pool.hits == hits
        self.voided = batch

    @precondition(lambda self: self.under_way and self.under_way[0][0].sampling_slices)
    @rule(data=st.data())
    def commit_with_a_poisoned_row(self, data: st.DataObject) -> None:
        batch, sampled = self.under_way.pop(0)
        row = data.draw(st.integers(0, len(sampled) - 1))
        sampled[row] = Failure("model_error", "poisoned")
        self.cut.add(batch.sampling_slices[row].request_id)
        self.rank.hear(self.rank.scheduler.commit(batch, sampled))

    @precondition(lambda self: self.rank.live)
    @rule(data=st.data(), poisoned=st.booleans())
    def end(self, data: st.DataObject, poisoned: bool) -> None:
        """At any time, so also in the middle of a step, and between a void one and its repetition."""
        request_id = data.draw(st.sampled_from(sorted(self.rank.live)))
        self.cut.add(request_id)
        if poisoned:
            self.rank.hear([self.rank.scheduler.fail(request_id, Failure("model_error", "poisoned"))])
        else:
            self.rank.hear([self.rank.scheduler.abort(request_id)])
        assert self.rank.scheduler.abort(request_id) is None

    @invariant()
    def blocks_belong_to_the_living(self) -> None:
        self.rank.check_blocks()

    def teardown(self) -> None:
        while self.under_way:
            self.commit()
        self.rank.drain()
        for request_id, (tokens, finish) in self.expected.items():
            told = self.rank.told[request_id]
            if request_id in self.cut:
                assert told == tokens[: len(told)]
            else:
                assert (told, self.rank.finish[request_id]) == (tokens, finish)


class LifeInChunks(Life):
    chunk = 1


TestLife, TestLifeInChunks = Life.TestCase, LifeInChunks.TestCase
TestLife.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLifeInChunks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(prompts, st.integers(1, 12)), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 12),
    st.integers(0, 20),
)
def test_tokens_do_not_depend_on_the_limits(
    wanted: list[tuple[list[int], int]], block_size: int, seqs: int, more_budget: int, spare_blocks: int
) -> None:
    smallest = -(-(MAX_MODEL_LEN - 1) // block_size)
    rank = Rank(smallest + spare_blocks, block_size, seqs, seqs + more_budget)
    for prompt, max_tokens in wanted:
        assert rank.add(prompt, max_tokens=max_tokens) is None
    rank.drain()
    for index, (prompt, max_tokens) in enumerate(wanted):
        sampling = SamplingParams(max_tokens=max_tokens, eos_token_ids=(EOS,), stop_token_ids=(STOP,))
        assert (rank.told[f"r{index}"], rank.finish[f"r{index}"]) == alone(prompt, sampling)


def test_a_long_prompt_is_computed_in_chunks_behind_the_decodes() -> None:
    rank = Rank(blocks=30, budget=5)
    rank.add([2, 3], max_tokens=9, eos_token_ids=(), stop_token_ids=())
    rank.step()
    rank.add([4] * 10, eos_token_ids=(), stop_token_ids=())
    shapes = [[(piece.request_id, len(piece.tokens), piece.samples) for piece in rank.step().slices] for _ in range(4)]
    assert shapes == [
        [("r0", 1, True), ("r1", 4, False)],
        [("r0", 1, True), ("r1", 4, False)],
        [("r0", 1, True), ("r1", 2, True)],
        [("r0", 1, True), ("r1", 1, True)],
    ]


def test_requests_that_begin_alike_compute_the_beginning_once() -> None:
    rank = Rank(blocks=30, max_num_seqs=4, budget=30)
    prompt = [2, 3, 4, 5, 6, 7, 2, 3]
    for _ in range(3):
        rank.add(prompt, max_tokens=4, eos_token_ids=(), stop_token_ids=())
    assert [(piece.request_id, piece.start) for piece in rank.step().slices] == [("r0", 0)]
    # The last token is always computed, hence its block too.
    assert [(piece.request_id, piece.start) for piece in rank.step().slices] == [("r0", 8), ("r1", 6), ("r2", 6)]
    rank.drain()
    assert rank.cached == {"r0": 0, "r1": 6, "r2": 6}
    assert (rank.pool.hits, rank.pool.queries) == (6, 9)
    rank.add(prompt, max_tokens=1)
    assert rank.step().slices[0].start == 6


def test_nothing_of_a_void_step_can_be_found() -> None:
    rank = Rank(blocks=30, max_num_seqs=4, budget=30)
    rank.add([2, 3, 4, 5, 6])
    batch = rank.schedule()
    rank.device.spoil(batch)
    rank.scheduler.void(batch)
    rank.scheduler.abort("r0")
    del rank.live["r0"]
    rank.add([2, 3, 4, 5, 6], request_id="again")
    assert rank.step().slices[0].start == 0


def test_what_a_failed_request_computed_is_not_reused() -> None:
    rank = Rank(blocks=30, budget=30)
    rank.add([2, 3, 4, 5, 6])
    rank.step()
    rank.hear([rank.scheduler.fail("r0", Failure("model_error", "the model raised"))])
    assert rank.finish["r0"] == "error"
    rank.add([2, 3, 4, 5, 6])
    assert rank.step().slices[0].start == 0


def test_the_newest_gives_way_when_blocks_run_out_and_comes_back_first() -> None:
    rank = Rank(blocks=12, block_size=2, max_num_seqs=3, budget=24)
    for token in (2, 3, 4):
        rank.add([token] * 7, max_tokens=16, eos_token_ids=(), stop_token_ids=())
    preempted_at = None
    while rank.scheduler.has_work:
        rank.step()
        rank.check_blocks()
        if rank.scheduler.preemptions and preempted_at is None:
            preempted_at = [request.status for request in rank.live.values()]
    assert preempted_at == [Status.RUNNING, Status.RUNNING, Status.WAITING]
    assert list(rank.finish) == ["r0", "r1", "r2"]


def test_prompts_take_small_steps_while_somebody_decodes() -> None:
    def lengths(others_wait: bool = False) -> list[int]:
        batch = rank.schedule(others_wait)
        rank.hear(rank.scheduler.commit(batch, rank.device.run(batch)))
        return [len(piece.tokens) for piece in batch.slices]

    endless = {"eos_token_ids": (), "stop_token_ids": ()}
    rank = Rank(blocks=60, max_num_seqs=8, budget=24, chunk=4)
    rank.add([2] * 10, **endless)
    assert lengths() == [10]  # nobody waits for it
    rank.add([3] * 10, **endless)
    assert [lengths(), lengths(), lengths(), lengths()] == [[1, 4], [1, 4], [1, 2], [1, 1]]
    rank.add([4] * 10, **endless)
    rank.add([5] * 10, **endless)
    assert lengths() == [1, 1, 8]  # two of them have twice the room
    assert lengths() == [1, 1, 2, 6]
    assert lengths() == [1, 1, 1, 4]

    rank = Rank(blocks=60, max_num_seqs=8, budget=24, chunk=4)
    rank.add([2] * 10, **endless)
    assert [lengths(others_wait=True), lengths(others_wait=True), lengths()] == [[4], [4], [2]]


def test_decodes_go_on_from_tokens_that_are_not_known_yet() -> None:
    rank = Rank(blocks=60, max_num_seqs=4, budget=24)
    endless = {"eos_token_ids": (), "stop_token_ids": ()}
    rank.add([2, 3, 4], max_tokens=4, **endless)
    rank.add([5, 3, 2], max_tokens=2, **endless)

    def launch() -> tuple[Batch, list[Sampled | Failure]]:
        batch = rank.schedule(ahead=True)
        return batch, rank.device.run(batch)

    shapes = []
    under_way = [launch()]
    rank.add([6], max_tokens=2, **endless)
    while under_way:
        under_way.append(launch())
        shapes.append([(piece.request_id, piece.follows) for piece in under_way[-1][0].slices])
        if len(under_way) == 2 and not under_way[1][0].slices:
            under_way.pop()
        rank.hear(rank.scheduler.commit(*under_way.pop(0)))
    assert shapes == [
        [("r0", 0), ("r1", 1), ("r2", None)],
        [("r0", 0), ("r2", 2)],  # r1's last token is being drawn
        [("r0", 0)],
        [],
    ]
    for request_id, prompt, length in (("r0", [2, 3, 4], 4), ("r1", [5, 3, 2], 2), ("r2", [6], 2)):
        assert rank.told[request_id] == alone(prompt, SamplingParams(max_tokens=length, **endless))[0]


def test_what_ran_ahead_of_a_last_token_is_dropped() -> None:
    rank = Rank(blocks=60)
    rank.add([2, 3], max_tokens=8)
    first = rank.schedule()
    ahead = rank.schedule(ahead=True)
    rank.hear(rank.scheduler.commit(first, [Sampled(EOS)]))
    assert rank.finish == {"r0": "stop"} and rank.pool.used == 0
    assert rank.scheduler.commit(ahead, [Sampled(5)]) == []
    assert rank.told["r0"] == [EOS]


@pytest.mark.parametrize(
    "sampling", [{"presence_penalty": 0.5}, {"frequency_penalty": 0.5}, {"repetition_penalty": 1.1}]
)
def test_nothing_runs_ahead_of_a_draw_that_depends_on_the_token_to_come(sampling: dict) -> None:
    rank = Rank(blocks=60)
    rank.add([2, 3], **sampling)
    rank.add([4, 5])
    batch = rank.schedule()
    assert rank.schedule(ahead=True) is EMPTY
    rank.hear(rank.scheduler.commit(batch, rank.device.run(batch)))
    rank.drain()


def test_nobody_loses_blocks_to_a_step_ahead() -> None:
    rank = Rank(blocks=12, max_num_seqs=2, budget=24)
    for token in (2, 3):
        rank.add([token] * 12, max_tokens=11, eos_token_ids=(), stop_token_ids=())
    batch = rank.schedule()
    assert len(batch.slices) == 2 and rank.pool.free == 0
    assert rank.schedule(ahead=True) is EMPTY and rank.scheduler.preemptions == 0
    rank.hear(rank.scheduler.commit(batch, rank.device.run(batch)))
    rank.drain()
    assert rank.scheduler.preemptions > 0


def test_an_id_reused_in_the_middle_of_a_step_does_not_get_the_old_ones_token() -> None:
    rank = Rank()
    rank.add([2, 3], request_id="same")
    batch = rank.schedule()
    rank.hear([rank.scheduler.abort("same")])
    rank.add([4, 5], request_id="same")
    assert rank.scheduler.commit(batch, rank.device.run(batch)) == []
    rank.drain()
    sampling = SamplingParams(max_tokens=8, eos_token_ids=(EOS,), stop_token_ids=(STOP,))
    assert rank.told["same"] == alone([4, 5], sampling)[0]


def test_eos_stop_and_length_are_told_apart() -> None:
    def last(token: int, **sampling: object) -> tuple[str | None, int | None]:
        rank = Rank()
        rank.add([2, 3], **sampling)
        delta = rank.scheduler.commit(rank.schedule(), [Sampled(token)])[0].delta
        return delta.finish, delta.stop_token

    assert last(EOS) == ("stop", None)
    assert last(STOP) == ("stop", STOP)
    assert last(STOP, stop_token_ids=()) == (None, None)
    assert last(5, max_tokens=1) == ("length", None)
    assert last(EOS, min_tokens=1) == (None, None)


@pytest.mark.parametrize(
    ("request_fields", "code", "message"),
    [
        ({"prompt": []}, "invalid", "the prompt is empty: send at least one token"),
        ({"prompt": [2] * 24}, "invalid", "the prompt has 24 tokens and max_model_len is 24"),
        ({"prompt": [2, 8]}, "invalid", "token id 8 is outside the vocabulary: ids go from 0 to 7"),
        ({"prompt": [2], "logit_bias": {-1: 1.0}}, "invalid", "token id -1 is outside the vocabulary"),
        ({"prompt": [2], "max_tokens": 0}, "invalid", "max_tokens is 0 and 0 tokens are generated already"),
        ({"prompt": [2], "temperature": float("nan")}, "invalid", "temperature is nan: it must be 0 or more"),
        ({"prompt": [2], "top_p": 0.0}, "invalid", "top_p is 0.0: it must be above 0 and at most 1"),
        ({"prompt": [2] * 20, "max_tokens": 20}, "invalid", "may need 12 KV blocks of 2 tokens and the cache has 10"),
    ],
)
def test_refusals_name_the_value_and_the_fix(request_fields: dict, code: str, message: str) -> None:
    rank = Rank(blocks=10)
    refusal = rank.add(**request_fields)
    assert refusal.delta.finish == "error" and refusal.delta.failure.code == code
    assert message in refusal.delta.failure.message
    assert not rank.scheduler.has_work


def test_a_full_queue_refuses_new_requests_but_not_continued_ones() -> None:
    rank = Rank()
    for _ in range(4):
        assert rank.add([2, 3]) is None
    refusal = rank.add([2, 3])
    assert refusal.delta.failure == Failure("overloaded", "4 requests wait and max_queue is 4: try again later")
    assert rank.add([2, 3], generated=[4]) is None
    duplicate = rank.add([2, 3], request_id="r0")
    assert duplicate.delta.failure.code == "invalid"


def test_a_step_is_committed_or_voided_exactly_once() -> None:
    rank = Rank()
    rank.add([2, 3])
    batch = rank.schedule()
    ahead = rank.schedule(ahead=True)
    with pytest.raises(RuntimeError, match="commit or void one first"):
        rank.scheduler.schedule()
    with pytest.raises(RuntimeError, match="commit the earlier one first"):
        rank.scheduler.void(ahead)
    with pytest.raises(RuntimeError, match="not the step under way"):
        rank.scheduler.commit(ahead, [Sampled(2)])
    with pytest.raises(ValueError, match="2 sampled tokens for 1 slices"):
        rank.scheduler.commit(batch, [Sampled(2), Sampled(3)])
    rank.hear(rank.scheduler.commit(batch, [Sampled(2)]))
    rank.hear(rank.scheduler.commit(ahead, [Sampled(2)]))
    with pytest.raises(RuntimeError, match="not the step under way"):
        rank.scheduler.commit(batch, [Sampled(2)])
    with pytest.raises(RuntimeError, match="not the step under way"):
        rank.scheduler.void(batch)


def test_requests_of_one_client() -> None:
    rank = Rank()
    rank.add([2])
    rank.add([3])
    assert rank.scheduler.of_client(b"client-of-r1") == ["r1"]


def test_a_step_must_hold_a_token_of_every_sequence() -> None:
    with pytest.raises(ValueError, match="max_num_seqs is 4 and max_num_batched_tokens is 3"):
        Rank(max_num_seqs=4, budget=3)
