"""The data-plane client: balances requests over the ranks of the group, streams their tokens, and replays them.

A request belongs to its client. It waits here while the group has no rank that can be reached; it moves, with the
tokens already received, when its rank leaves the group, refuses it as of another epoch, or lost some of its tokens. It
fails only when it is itself invalid, when its deadline passes, or when the group is lost for good.

A submit that finds the view paused also tells the coordinator (``FirstRequest``), so that the other ranks wake a hop
earlier. Nothing depends on that message: a rank that a request wakes says so itself.

All methods run on the event loop that called ``start``.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Sequence

import zmq

from actors import wire
from app.balancer import Balancer, UnknownRank
from app.call import Call
from app.errors import (
    EngineDeadError,
    InvalidRequest,
    ModelError,
    Overloaded,
    ServingError,
    Unavailable,
)
from app.flight import Flight, Generation, TokensMissing
from app.flights import Flights
from app.limits import Limits
from app.links import Configure, CoordinatorLink, EngineLink, Locate

log = logging.getLogger(__name__)

RETRY_S = 0.05
# Why an attempt is given up: its rank left, refused it as of another epoch or for a full queue, or lost outputs.
REPLAY_REASONS = ("rank_left", "stale_epoch", "overloaded", "tokens_missing")


class Client:
    """One front-end's connection to the group.

    ``locate()`` returns the coordinator's ``(router_address, pub_address)``; it is asked again when the coordinator
    falls silent. ``configure(socket)`` sets options such as CURVE keys on each socket before it connects. ``offset``
    is where the balancer's scan starts (default: random). Beats go out every ``beat_s``; a rank silent for
    ``echo_timeout_s`` counts as missing and is offered no requests until it answers.
    """

    def __init__(
        self,
        locate: Locate,
        limits: Limits,
        configure: Configure = lambda socket: None,
        offset: int | None = None,
        beat_s: float = 1.0,
        echo_timeout_s: float = 5.0,
        coordinator_timeout_s: float = 3.0,
    ) -> None:
        self.view: wire.View | None = None
        self.limits = limits
        self.tokens_received = 0
        self.replayed: Counter[str] = Counter()  # attempts given up, by reason
        self._locate = locate
        self._configure = configure
        self._beat_s = beat_s
        self._echo_timeout_s = echo_timeout_s
        self._coordinator_timeout_s = coordinator_timeout_s
        self._identity = b"client-" + uuid.uuid4().bytes
        self._balancer = Balancer(random.randrange(1 << 16) if offset is None else offset)
        self._wave = (0, False)  # (wave, running), the latest known; ordered as a tuple
        self._links: dict[int, EngineLink] = {}
        self._flights = Flights()
        self._rumoured_epoch = 0  # the newest that an engine spoke of
        self._strays: dict[int, set[str]] = {}
        self._lost: EngineDeadError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._coordinator: CoordinatorLink | None = None

    # --- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begins to look for the coordinator; returns at once. ``ready`` says when requests can be served."""
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._coordinator = CoordinatorLink(
            self._context, self._locate, self._configure, self._observe, self._coordinator_timeout_s
        )
        self._tick()

    async def close(self) -> None:
        """Aborts what runs, ends every waiting call with Unavailable, and closes all sockets. Twice does nothing."""
        if self._context is None:
            return
        assert self._timer is not None and self._coordinator is not None
        self._timer.cancel()
        if self._retry is not None:
            self._retry.cancel()
        self._fail_all(Unavailable("This front-end is shutting down."))
        for link in self._links.values():
            link.close()
        await self._coordinator.close()
        context, self._context = self._context, None
        await asyncio.to_thread(context.term)

    async def fail(self, cause: BaseException | str) -> None:
        """The group is lost for good: every waiting call, and every later one, raises EngineDeadError."""
        self._lost = EngineDeadError(cause)
        self._fail_all(self._lost)

    # --- what it knows ------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        return self._balancer.epoch

    @property
    def wave(self) -> tuple[int, bool]:
        """The group's wave and whether it runs, as last heard."""
        return self._wave

    @property
    def loads(self) -> list[wire.Load]:
        """The last known load of each member, in order of rank."""
        return self._balancer.loads

    @property
    def leaving(self) -> tuple[int, ...]:
        """Members that are given nothing new, because the next epoch will be without them."""
        return self._balancer.leaving

    @property
    def missing(self) -> tuple[int, ...]:
        """Ranks that have not answered for ``echo_timeout_s``."""
        return tuple(rank for rank, link in self._links.items() if link.silent_s > self._echo_timeout_s)

    @property
    def waiting(self) -> int:
        """Requests of this client that have no output yet."""
        return self._flights.waiting

    @property
    def running(self) -> int:
        """Requests of this client that have output and are not finished."""
        return len(self._flights) - self._flights.waiting

    @property
    def trouble(self) -> str | None:
        """Why requests can't be served right now, or None when they can."""
        if self._lost is not None:
            return self._lost.message
        if self.view is None:
            return "The group is starting: no coordinator has named its members yet."
        if not self._links:
            return f"The group is starting: epoch {self.epoch} has no members."
        if not any(link.attached for link in self._links.values()):
            return f"No rank of epoch {self.epoch} is attached yet; its ranks are {sorted(self._links)}."
        if len(self.missing) == len(self._links):
            return f"No rank answers; all of {sorted(self._links)} are missing."
        return None

    @property
    def ready(self) -> bool:
        return self.trouble is None

    # --- requests -----------------------------------------------------------------------------------------------

    def call(self, generations: Sequence[Generation], timeout_s: float | None = None) -> Call:
        """Starts several requests for one caller; see ``Call`` for how to read them. Use it as a context manager.

        Request ids must be unique in the whole group. Raises Overloaded and EngineDeadError at once. While reading,
        one failing request ends them all: with InvalidRequest, Overloaded, ModelError, Unavailable (no rank could be
        reached for the limits' ``start_timeout_s``), DeadlineExceeded (``timeout_s`` after the start, by default the
        limits' ``request_timeout_s``) or EngineDeadError.
        """
        if self._lost is not None:
            raise self._lost
        if self._context is None:
            raise Unavailable("This front-end is not connected to the group.")
        if self.waiting + len(generations) > self.limits.max_queued_requests:
            raise Overloaded(
                f"{self.waiting} requests are waiting and {len(generations)} more would exceed this server's queue "
                f"of {self.limits.max_queued_requests}; try again later."
            )
        timeout_s = self.limits.request_timeout_s if timeout_s is None else timeout_s
        call = Call(generations, self._loop.time(), self._release)
        call.expire_after(timeout_s)
        for flight in call.flights:
            self._flights.add(flight, call)
        for flight in call.flights:
            self._place(flight, call)
        return call

    async def generate(
        self,
        request_id: str,
        prompt: list[int],
        sampling: wire.SamplingParams,
        rank: int | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[wire.Delta, None]:
        """Streams one request. Closing the iterator, or cancelling, aborts it. Raises what ``call`` does."""
        with self.call([Generation(request_id, prompt, sampling, rank)], timeout_s) as call:
            async for batch in call:
                yield batch[0][1]

    def _place(self, flight: Flight, call: Call) -> None:
        """Submits a flight to a rank, or leaves it waiting for one; does nothing if its call has failed meanwhile."""
        assert self._coordinator is not None
        if flight.wire_id not in self._flights:
            return
        wanted = flight.generation.rank
        if flight.attempts and wanted not in self._links:
            wanted = None  # the rank that it named has left
        rank = None
        if flight.min_epoch <= self.epoch and self._links:
            try:
                rank = self._balancer.assign(flight.wire_id, wanted)
            except UnknownRank as error:
                call.fail(InvalidRequest(str(error), param="data_parallel_rank"))
                return
        if rank is None:
            self._flights.displaced(flight)
            return
        self._flights.placed(flight)
        flight.rank = rank
        wave, running = self._wave
        self._links[rank].send(flight.submit(self.epoch))
        if not running:
            self._coordinator.send(wire.FirstRequest(self.epoch, rank, wave))

    def _place_all(self) -> None:
        self._retry = None
        for flight, call in self._flights.unplaced:
            self._place(flight, call)

    def _replay(self, flight: Flight, call: Call, reason: str, min_epoch: int = 0) -> None:
        """Gives up the flight's attempt, to be continued elsewhere, in ``min_epoch`` or later."""
        self.replayed[reason] += 1
        self._forget(flight)
        flight.next_attempt()
        flight.min_epoch = min_epoch
        self._flights.add(flight, call)
        self._flights.displaced(flight)

    def _forget(self, flight: Flight) -> bool:
        """Takes a flight's present attempt out of the books; False if it was not in them."""
        if not self._flights.remove(flight):
            return False
        self._balancer.ended(flight.wire_id)
        return True

    def _release(self, flights: Sequence[Flight]) -> None:
        """Forgets flights, and aborts them where they still run."""
        by_rank: dict[int, list[str]] = {}
        for flight in flights:
            if self._forget(flight) and flight.rank is not None:
                by_rank.setdefault(flight.rank, []).append(flight.wire_id)
        for rank, wire_ids in by_rank.items():
            if rank in self._links and self._context is not None:
                self._links[rank].send(wire.Abort(self.epoch, wire_ids))

    def _fail_all(self, error: ServingError) -> None:
        for call in self._flights.calls:
            call.fail(error)

    # --- what comes from the engines ----------------------------------------------------------------------------

    def _attached(self, link: EngineLink, message: wire.Attached) -> None:
        self._balancer.offer(link.rank)
        self._rumour(message.epoch)
        self._place_all()

    def _rumour(self, epoch: int) -> None:
        """An engine speaks of ``epoch``: if that is news, the coordinator is asked, rather than waited for."""
        assert self._coordinator is not None
        if epoch > max(self.epoch, self._rumoured_epoch):
            self._rumoured_epoch = epoch
            self._coordinator.look_up()

    def _outputs(self, link: EngineLink, outputs: wire.Outputs) -> None:
        self._rumour(outputs.epoch)
        # Outputs of an older epoch are taken too: a step that completed before the switch is as good as one after it.
        if outputs.epoch == self.epoch and outputs.wave > self._wave[0]:
            self._wave = (outputs.wave, True)
        for delta in outputs.deltas:
            found = self._flights.get(delta.request_id)
            if found is None or found[0].rank != link.rank:
                if delta.finish is None:
                    self._strays.setdefault(link.rank, set()).add(delta.request_id)
            elif delta.failure is not None:
                self._failed(*found, delta.failure, outputs.epoch)
            else:
                self._arrived(*found, delta, outputs)

    def _arrived(self, flight: Flight, call: Call, delta: wire.Delta, outputs: wire.Outputs) -> None:
        try:
            flight.absorb(delta)
        except TokensMissing as error:
            log.warning("rank %d: %s; the request is replayed", outputs.rank, error)
            self._links[outputs.rank].send(wire.Abort(self.epoch, [flight.wire_id]))
            self._replay(flight, call, "tokens_missing")
            self._place(flight, call)
            return
        self.tokens_received += len(delta.tokens)
        if not flight.answered:
            flight.answered = True
            self._balancer.seen(flight.wire_id, outputs.wave, outputs.step)
        self._flights.saw(flight)
        if delta.finish is not None:
            self._forget(flight)

    def _failed(self, flight: Flight, call: Call, failure: wire.Failure, engine_epoch: int) -> None:
        if failure.code == "stale_epoch" or (failure.code == "overloaded" and flight.attempts):
            # The engine is ahead of this client, or behind it, or (a replayed request only) full for the moment.
            self._replay(flight, call, failure.code, max(engine_epoch, self.epoch))
            if engine_epoch <= self.epoch and self._retry is None:
                self._retry = self._loop.call_later(RETRY_S, self._place_all)
            return
        self._forget(flight)
        error: type[ServingError] = {"invalid": InvalidRequest, "overloaded": Overloaded}.get(failure.code, ModelError)
        call.fail(error(failure.message))

    # --- what comes from the coordinator ------------------------------------------------------------------------

    def _observe(self, view: wire.View) -> None:
        before = self.epoch
        if not self._balancer.observe(view):
            return
        returned = self.view is not None and bool(set(self.view.leaving) - set(view.leaving))
        self.view = view
        wave = (view.wave, view.running)
        if view.epoch == before:
            self._wave = max(self._wave, wave)
            if returned:
                self._place_all()
            return
        log.info("epoch %d: ranks %s", view.epoch, [member.rank for member in view.members])
        self._wave = wave
        self._change_links(view)
        self._place_all()

    def _change_links(self, view: wire.View) -> None:
        assert self._context is not None
        members = {member.rank: member for member in view.members}
        for rank, link in list(self._links.items()):
            if members.get(rank) == link.member:
                continue
            link.drain()  # what it finished before it left need not be made again
            moving = self._flights.on(rank)
            if moving:
                link.send(wire.Abort(self.epoch, [flight.wire_id for flight, _ in moving]))
            link.close()
            del self._links[rank]
            self._strays.pop(rank, None)
            for flight, call in moving:
                self._replay(flight, call, "rank_left")
        for rank, member in members.items():
            if rank not in self._links:
                self._links[rank] = EngineLink(
                    self._context, member, self._identity, self._configure, self._attached, self._outputs
                )

    # --- once a second ------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        assert self._coordinator is not None
        self._timer = self._loop.call_later(self._beat_s, self._tick)
        self._coordinator.tick()
        for rank, link in self._links.items():
            link.tick(self.epoch)
            if link.silent_s > self._echo_timeout_s:
                self._balancer.withhold(rank)
            elif link.attached:
                self._balancer.offer(rank)
            # An abort sent in an epoch that the engine had left already was dropped by it.
            strays = self._strays.pop(rank, None)
            if strays:
                link.send(wire.Abort(self.epoch, [request for request in strays if request not in self._flights]))
        self._place_all()
        self._give_up_waiting()

    def _give_up_waiting(self) -> None:
        """Ends requests that no rank took in time; one that a rank had taken waits until its own deadline."""
        now = self._loop.time()
        for flight, call in self._flights.unplaced:
            if now - flight.admitted_at > self.limits.start_timeout_s and not flight.attempts:
                waited = f"The request waited {self.limits.start_timeout_s:g} s for a rank."
                call.fail(Unavailable(f"{waited} {self.trouble or ''}".rstrip()))
