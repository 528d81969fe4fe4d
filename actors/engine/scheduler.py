"""Which tokens a rank computes in its next step: continuous batching over a paged KV cache.

A step is a transaction. ``schedule`` decides it and allocates blocks; then either ``commit`` takes the sampled tokens,
gives new full blocks their names and says what to tell the clients, or ``void`` declares that the step never
happened, and the next ``schedule`` gives the same batch again.

Order is strictly first come, first served. ``running`` and ``waiting`` are both in order of arrival and everything
running arrived before everything waiting: requests are admitted from the front of ``waiting`` to the end of
``running``, and when blocks run out the newest running request loses its own and returns to the front of ``waiting``,
to be computed again later (preemption by recomputation). The oldest request therefore always gets on, so every request
ends. A prompt too long for what is left of a step's tokens is computed over several steps (chunked prefill); since
nothing is admitted behind it before it is complete, it is the last of ``running``, and going through ``running`` in
order means decodes first.

A long prefill keeps everybody waiting who decodes in the same step, on this rank or, in lockstep, on another. So while
somebody decodes, prompts get ``prefill_chunk`` tokens of a step for each request that still has some to compute (as in
Sarathi-Serve, arXiv 2403.02310, but that many waiting prompts, which cost throughput, widen the share).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from actors.engine.batch import EMPTY, Batch, Sampled, Slice
from actors.engine.blocks import BlockPool
from actors.engine.request import Request, Status
from actors.wire import Delta, Failure


@dataclass(frozen=True)
class Output:
    """What to tell ``client``."""

    client: bytes
    delta: Delta


class Scheduler:
    """The requests of one rank.

    ``max_num_batched_tokens`` and ``max_num_seqs`` bound a step, ``max_model_len`` a sequence (prompt and generated
    tokens), ``max_queue`` the requests waiting; ``prefill_chunk`` bounds prefills beside decodes, by nothing more when
    None. Raises ValueError if a step could not hold one token of each sequence.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_queue: int,
        vocab_size: int,
        prefill_chunk: int | None = None,
    ) -> None:
        if not 1 <= max_num_seqs <= max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs is {max_num_seqs} and max_num_batched_tokens is {max_num_batched_tokens}: a step must "
                f"hold a token of each sequence, so choose 1 <= max_num_seqs <= max_num_batched_tokens"
            )
        self.pool = pool
        self.preemptions = 0
        self._max_model_len = max_model_len
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_queue = max_queue
        self._prefill_chunk = prefill_chunk
        self._vocab_size = vocab_size
        self._requests: dict[str, Request] = {}
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._batch = EMPTY  # scheduled, neither committed nor void
        self._void = EMPTY  # to be scheduled again
        self._owners: list[Request] = []  # of the slices of either

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def of_client(self, client: bytes) -> list[str]:
        """Ids of the requests of ``client``."""
        return [request.request_id for request in self._requests.values() if request.client == client]

    def add(self, request: Request) -> Output | None:
        """Queue ``request``. Returns None, or what to tell the client when it is refused.

        A continued request is never refused for the length of the queue: its user already reads its tokens.
        """
        failure = self._refusal(request)
        if failure is not None:
            return _end(request, "error", failure)
        self._requests[request.request_id] = request
        self._waiting.append(request)
        return None

    def abort(self, request_id: str) -> Output | None:
        """End a request, also in the middle of a step: what that step samples for it is dropped.

        Returns its last word, or None if there is no such request (any more).
        """
        return self._drop(request_id, "abort", None)

    def fail(self, request_id: str, failure: Failure) -> Output | None:
        """End a request that cannot be computed, as ``abort`` does. Nobody gets to reuse what it left in the cache."""
        request = self._requests.get(request_id)
        if request is not None:
            self.pool.withdraw(request.blocks)
        return self._drop(request_id, "error", failure)

    def schedule(self, others_wait: bool = False) -> Batch:
        """The next step; ``EMPTY`` when there is nothing to do. Raises RuntimeError while another is under way.

        ``others_wait``: sequences of other ranks wait for the end of this step.
        """
        if self._batch.slices:
            raise RuntimeError("schedule() while a step is under way: commit or void it first")
        batch = self._again() or self._fresh(self._budget(others_wait))
        self._batch = batch
        return batch

    def commit(self, batch: Batch, sampled: Sequence[Sampled | Failure]) -> list[Output]:
        """The step is complete. ``sampled`` belongs to ``batch.sampling_slices``, in order.

        A ``Failure`` in place of a token ends that request alone. Raises RuntimeError unless ``batch`` is the step
        under way, ValueError unless ``sampled`` has its length.
        """
        if len(sampled) != len(batch.sampling_slices):
            raise ValueError(f"{len(sampled)} sampled tokens for {len(batch.sampling_slices)} slices that sample")
        owners = self._close(batch)
        results = iter(sampled)
        outputs = []
        for piece, request in zip(batch.slices, owners, strict=True):
            result = next(results) if piece.samples else None
            if request.status is Status.ENDED:
                continue
            if isinstance(result, Failure):
                output = self.fail(request.request_id, result)
                assert output is not None
                outputs.append(output)
                continue
            request.computed += len(piece.tokens)
            self._publish(request)
            if result is not None:
                outputs.append(self._append(request, result))
        return outputs

    def void(self, batch: Batch) -> None:
        """The step never happened: the next ``schedule`` gives it again, less what is aborted until then.

        Raises RuntimeError unless ``batch`` is the step under way.
        """
        self._owners = self._close(batch)
        self._void = batch

    # --- deciding a step ---------------------------------------------------------------------------------------

    def _again(self) -> Batch | None:
        batch, self._void = self._void, EMPTY
        kept = [
            (piece, owner)
            for piece, owner in zip(batch.slices, self._owners, strict=False)
            if owner.status is not Status.ENDED
        ]
        if not kept:
            return None
        self._owners = [owner for _, owner in kept]
        return Batch(tuple(piece for piece, _ in kept))

    def _budget(self, others_wait: bool) -> int:
        decodes = sum(len(request) - request.computed == 1 for request in self._running)
        if self._prefill_chunk is None or not (decodes or others_wait):
            return self._max_num_batched_tokens
        prefills = len(self._requests) - decodes
        return min(self._max_num_batched_tokens, decodes + self._prefill_chunk * prefills)

    def _fresh(self, budget: int) -> Batch:
        slices: list[Slice] = []
        self._owners = []
        while len(slices) < len(self._running) and budget:
            request = self._running[len(slices)]
            count = min(len(request) - request.computed, budget)
            if self._make_room(request, request.computed + count):
                slices.append(self._slice(request, count))
                budget -= count
        self._admit(slices, budget)
        return Batch(tuple(slices)) if slices else EMPTY

    def _make_room(self, request: Request, tokens: int) -> bool:
        """Give ``request`` blocks for its first ``tokens`` tokens, at the newest's expense; False if that is itself."""
        missing = self.pool.blocks_for(tokens) - len(request.blocks)
        while missing > self.pool.free:
            victim = self._running.pop()
            self._release(victim)
            victim.status = Status.WAITING
            self._waiting.appendleft(victim)
            self.preemptions += 1
            if victim is request:
                return False
        if missing > 0:
            request.blocks += self.pool.acquire((), missing)
        return True

    def _admit(self, slices: list[Slice], budget: int) -> None:
        if not self._waiting:
            return
        size = self.pool.block_size
        in_progress: set[bytes] = set()
        for piece, owner in zip(slices, self._owners, strict=True):
            in_progress.update(self._completed_by(piece, owner))
        while self._waiting and budget and len(self._running) < self._max_num_seqs:
            request = self._waiting[0]
            # The last token is always computed, for its logits.
            digests = request.digests(0, (len(request) - 1) // size, size)
            cached = self.pool.lookup(digests)
            # Two requests that begin alike: the second waits for the first one's step rather than repeat it.
            if len(cached) < len(digests) and digests[len(cached)] in in_progress:
                return
            fresh = self.pool.blocks_for(len(request)) - len(cached)
            if not self.pool.can_acquire(cached, fresh):
                return
            self._waiting.popleft()
            request.blocks = self.pool.acquire(cached, fresh)
            request.published = len(cached)
            request.computed = len(cached) * size
            request.status = Status.RUNNING
            self._running.append(request)
            if request.cached_tokens is None:
                request.cached_tokens = min(request.computed, len(request.prompt))
                self.pool.queries += len(digests)
                self.pool.hits += len(cached)
            count = min(len(request) - request.computed, budget)
            slices.append(self._slice(request, count))
            in_progress.update(self._completed_by(slices[-1], request))
            budget -= count

    def _completed_by(self, piece: Slice, request: Request) -> list[bytes]:
        size = self.pool.block_size
        return request.digests(piece.start // size, (piece.start + len(piece.tokens)) // size, size)

    def _slice(self, request: Request, count: int) -> Slice:
        self._owners.append(request)
        end = request.computed + count
        return Slice(
            request_id=request.request_id,
            tokens=request.tokens(request.computed, end),
            start=request.computed,
            blocks=request.blocks,
            samples=end == len(request),
            prompt=request.prompt,
            generated=request.generated,
            sampling=request.sampling,
        )

    # --- taking its result -------------------------------------------------------------------------------------

    def _close(self, batch: Batch) -> list[Request]:
        if batch is not self._batch:
            raise RuntimeError("commit() or void() of a batch that is not the step under way")
        owners, self._owners = self._owners, []
        self._batch = EMPTY
        return owners

    def _publish(self, request: Request) -> None:
        full = request.computed // self.pool.block_size
        if full > request.published:
            names = request.digests(request.published, full, self.pool.block_size)
            for block, name in zip(request.blocks[request.published : full], names, strict=True):
                self.pool.publish(block, name)
            request.published = full

    def _append(self, request: Request, sampled: Sampled) -> Output:
        offset = len(request.generated)
        request.generated.append(sampled.token)
        finish, stop_token = request.finish_reason(self._max_model_len)
        if finish is not None:
            self._remove(request)
        delta = Delta(
            request_id=request.request_id,
            offset=offset,
            tokens=[sampled.token],
            finish=finish,
            stop_token=stop_token,
            cached_tokens=request.cached_tokens or 0,
            logprobs=None if sampled.logprobs is None else [sampled.logprobs],
        )
        return Output(request.client, delta)

    # --- requests' ends ----------------------------------------------------------------------------------------

    def _refusal(self, request: Request) -> Failure | None:
        if request.request_id in self._requests:
            return Failure("invalid", f"request id {request.request_id} is in use: choose another")
        complaint = request.complaint(max_model_len=self._max_model_len, vocab_size=self._vocab_size)
        if complaint is not None:
            return Failure("invalid", complaint)
        # The last token is never computed: nothing follows it.
        most = min(len(request.prompt) + request.sampling.max_tokens, self._max_model_len) - 1
        needed = self.pool.blocks_for(most)
        if needed > self.pool.total:
            message = (
                f"a prompt of {len(request.prompt)} tokens with max_tokens {request.sampling.max_tokens} may need "
                f"{needed} KV blocks of {self.pool.block_size} tokens and the cache has {self.pool.total}: shorten "
                f"the prompt, lower max_tokens, or raise kv_blocks"
            )
            return Failure("invalid", message)
        if len(self._waiting) >= self._max_queue and not request.generated:
            message = f"{len(self._waiting)} requests wait and max_queue is {self._max_queue}: try again later"
            return Failure("overloaded", message)
        return None

    def _drop(self, request_id: str, finish: str, failure: Failure | None) -> Output | None:
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._remove(request)
        return _end(request, finish, failure)

    def _remove(self, request: Request) -> None:
        queue = self._waiting if request.status is Status.WAITING else self._running
        queue.remove(request)
        del self._requests[request.request_id]
        self._release(request)
        request.status = Status.ENDED

    def _release(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks = []  # not cleared in place: slices of a step under way refer to the old list
        request.published = request.computed = 0


def _end(request: Request, finish: str, failure: Failure | None) -> Output:
    delta = Delta(
        request_id=request.request_id,
        offset=len(request.generated),
        tokens=[],
        finish=finish,
        cached_tokens=request.cached_tokens or 0,
        failure=failure,
    )
    return Output(request.client, delta)
