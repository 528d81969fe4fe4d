"""Which tokens a rank computes in its next step: continuous batching over a paged KV cache.

A step is a transaction. ``schedule`` decides it and allocates blocks; then either ``commit`` takes the sampled tokens,
gives new full blocks their names and says what to tell the clients, or ``void`` declares that the step never
happened, and the next ``schedule`` gives the same batch again.

One step may be scheduled ahead, while another is under way whose tokens are not known: who decodes goes on from the
token to come, and when that turns out to be the last, what the step ahead computed for it is dropped (as in NanoFlow,
arXiv 2408.12757). Its blocks go to others meanwhile; that is safe where a device takes up steps in order. Nothing is
scheduled ahead when somebody would have to lose blocks for it, or a draw depends on the tokens to come.

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
        # Scheduled, neither committed nor void, the earlier first; and what is to be scheduled again. With each batch
        # the owners of its slices.
        self._under_way: list[tuple[Batch, list[Request]]] = []
        self._void: tuple[Batch, list[Request]] = EMPTY, []

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
        """The next step; ``EMPTY`` when there is nothing to do, or nothing before the step under way is committed.

        ``others_wait``: sequences of other ranks wait for the end of this step. Raises RuntimeError while two steps
        are under way.
        """
        if len(self._under_way) > 1:
            raise RuntimeError("schedule() while two steps are under way: commit or void one first")
        slices, owners = self._again()
        if not slices and (not self._under_way or self._foreseeable):
            slices, owners = self._fresh(self._budget(others_wait))
        if not slices:
            return EMPTY
        for piece, owner in zip(slices, owners, strict=True):
            owner.under_way += len(piece.tokens)
            owner.drawn = None
        for number, owner in enumerate(o for piece, o in zip(slices, owners, strict=True) if piece.samples):
            owner.drawn = number
        batch = Batch(tuple(slices))
        self._under_way.append((batch, owners))
        return batch

    def commit(self, batch: Batch, sampled: Sequence[Sampled | Failure]) -> list[Output]:
        """The step is complete. ``sampled`` belongs to ``batch.sampling_slices``, in order.

        A ``Failure`` in place of a token ends that request alone. Raises RuntimeError unless ``batch`` is the step
        under way, the earlier of two, ValueError unless ``sampled`` has its length.
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
            request.under_way -= len(piece.tokens)
            if not request.under_way:
                request.drawn = None
            self._publish(request)
            if result is not None:
                outputs.append(self._append(request, result))
        return outputs

    def void(self, batch: Batch) -> None:
        """The step never happened: the next ``schedule`` gives it again, less what is aborted until then.

        Raises RuntimeError unless ``batch`` is the step under way, and the only one.
        """
        if len(self._under_way) > 1:
            raise RuntimeError("void() while two steps are under way: commit the earlier one first")
        owners = self._close(batch)
        for piece, owner in zip(batch.slices, owners, strict=True):
            owner.under_way -= len(piece.tokens)
            owner.drawn = None
        self._void = batch, owners

    # --- deciding a step ---------------------------------------------------------------------------------------

    @property
    def _foreseeable(self) -> bool:
        return all(request.foreseeable for request in self._running)

    def _again(self) -> tuple[list[Slice], list[Request]]:
        (batch, owners), self._void = self._void, (EMPTY, [])
        kept = [
            (self._slice(owner, len(piece.tokens)), owner)
            for piece, owner in zip(batch.slices, owners, strict=True)
            if owner.status is not Status.ENDED
        ]
        return [piece for piece, _ in kept], [owner for _, owner in kept]

    def _budget(self, others_wait: bool) -> int:
        decodes = sum(request.left == 1 for request in self._running)
        if self._prefill_chunk is None or not (decodes or others_wait):
            return self._max_num_batched_tokens
        prefills = len(self._requests) - decodes
        return min(self._max_num_batched_tokens, decodes + self._prefill_chunk * prefills)

    def _fresh(self, budget: int) -> tuple[list[Slice], list[Request]]:
        slices: list[Slice] = []
        owners: list[Request] = []
        for request in [request for request in self._running if not self._ending(request)]:
            count = min(request.left, budget)
            if not count or request.status is Status.WAITING:
                break
            if self._under_way and self._missing(request, count) > self.pool.free:
                return [], []
            if not self._make_room(request, count):
                break
            slices.append(self._slice(request, count))
            owners.append(request)
            budget -= count
        self._admit(slices, owners, budget)
        return slices, owners

    def _ending(self, request: Request) -> bool:
        """Whether the token that is being drawn is the last one, whatever it is."""
        return request.drawn is not None and request.outgrown(len(request) + 1, self._max_model_len)

    def _missing(self, request: Request, count: int) -> int:
        """Blocks that ``request`` lacks for ``count`` more tokens."""
        return self.pool.blocks_for(request.computed + request.under_way + count) - len(request.blocks)

    def _make_room(self, request: Request, count: int) -> bool:
        """Give ``request`` blocks for ``count`` more tokens, at the newest's expense; False if that is itself."""
        missing = self._missing(request, count)
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

    def _admit(self, slices: list[Slice], owners: list[Request], budget: int) -> None:
        if not self._waiting:
            return
        size = self.pool.block_size
        in_progress: set[bytes] = set()
        for some, of in [*((batch.slices, of) for batch, of in self._under_way), (slices, owners)]:
            for piece, owner in zip(some, of, strict=True):
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
            count = min(request.left, budget)
            slices.append(self._slice(request, count))
            owners.append(request)
            in_progress.update(self._completed_by(slices[-1], request))
            budget -= count

    def _completed_by(self, piece: Slice, request: Request) -> list[bytes]:
        """Names of the blocks that are full behind this slice: of one that ends with a token to come, there is none."""
        size = self.pool.block_size
        return request.digests(piece.start // size, min(piece.end, len(request)) // size, size)

    def _slice(self, request: Request, count: int) -> Slice:
        """The next ``count`` tokens of ``request``: known ones, or the one that is being drawn."""
        start = request.computed + request.under_way
        return Slice(
            request_id=request.request_id,
            tokens=request.tokens(start, start + count) or [0],
            start=start,
            blocks=request.blocks,
            samples=count == request.left,
            prompt=request.prompt,
            generated=request.generated,
            sampling=request.sampling,
            follows=request.drawn,
        )

    # --- taking its result -------------------------------------------------------------------------------------

    def _close(self, batch: Batch) -> list[Request]:
        if not self._under_way or batch is not self._under_way[0][0]:
            raise RuntimeError("commit() or void() of a batch that is not the step under way")
        return self._under_way.pop(0)[1]

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
