"""The coordinator: sockets, clock and counters around ``waves.GroupWaves`` and ``loads.LoadTable``.

Engines and clients talk to its ROUTER, clients listen to its PUB. One thread owns both sockets and all state; other
threads hand it commands and read what it last published. What it knows is soft: a new coordinator learns it again
from the engines, so nothing is stored.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import msgspec
import zmq

from actors import wire
from actors.loads import LoadTable
from actors.membership import NO_EPOCH, Epoch
from actors.sockets import bind
from actors.waves import GroupWaves

logger = logging.getLogger(__name__)

# No message to the coordinator comes near this; a longer one costs its sender the connection.
MAX_MESSAGE_BYTES = 4096
# Publications a client may be behind before it misses some; each is the whole picture, so it needs only the last.
PUBLISH_BACKLOG = 16
# Of what is dropped, the first and then every so many are logged.
LOG_EVERY = 1000
STOP_TIMEOUT_S = 5.0


class Coordinator:
    """Serves from construction to ``stop`` on ``ip``, ports chosen by the kernel.

    ``secure`` is applied to each socket before it binds (it sets the CURVE keys). A ``View`` is published at once when
    the wave or the membership changed, at most every ``interval_s`` seconds when loads did, and every ``idle_s``
    seconds otherwise.
    """

    def __init__(
        self, ip: str, secure: Callable[[zmq.Socket], None], interval_s: float = 0.1, idle_s: float = 5.0
    ) -> None:
        self._interval_s = interval_s
        self._idle_s = idle_s
        self._epoch = NO_EPOCH
        self._leaving: frozenset[int] = frozenset()
        self._view_numbers = itertools.count(1)
        self._waves = GroupWaves()
        self._loads = LoadTable(settle_s=interval_s)
        # Of ranks that have changed epochs before this coordinator was told.
        self._early_stats: dict[int, wire.Stats] = {}
        # Where each (epoch, rank) last spoke from; epochs to come included.
        self._routes: dict[tuple[int, int], bytes] = {}
        self._counters: Counter[str] = Counter()
        self._published_at = 0.0
        self._urgent = True
        self._loads_changed = False

        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._publisher = self._context.socket(zmq.PUB)
        for socket in (self._router, self._publisher):
            secure(socket)
            socket.linger = 0
        self._router.router_mandatory = True
        self._router.maxmsgsize = MAX_MESSAGE_BYTES
        self._publisher.sndhwm = PUBLISH_BACKLOG
        self._addresses = (bind(self._router, ip), bind(self._publisher, ip))

        self._commands: SimpleQueue[tuple[Callable[[], None], Future[None]]] = SimpleQueue()
        self._wake_lock = threading.Lock()
        self._wake_in = self._context.socket(zmq.PAIR)
        self._wake_in.bind("inproc://wake")
        self._wake_out = self._context.socket(zmq.PAIR)
        self._wake_out.connect("inproc://wake")
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="coordinator", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"coordinator(epoch {self._epoch.number})"

    # --- from any thread -------------------------------------------------------------------------------------------

    def addresses(self) -> tuple[str, str]:
        """The endpoints of the ROUTER and of the PUB."""
        return self._addresses

    def set_epoch(self, epoch: Epoch) -> None:
        """Makes ``epoch`` the group; repeating the current one changes nothing.

        Raises ``ValueError`` for an older epoch and for another membership under the current number, ``RuntimeError``
        after ``stop``.
        """
        self._command(lambda: self._form(epoch)).result(STOP_TIMEOUT_S)

    def set_leaving(self, epoch_number: int, ranks: Iterable[int]) -> None:
        """Tells all front-ends, at once, to give ``ranks`` nothing new; replaces what was set before.

        Holds until the next epoch. A coordinator that replaces this one must be told again. Raises ``ValueError`` for
        another epoch than the current one and for ranks that are not in it, ``RuntimeError`` after ``stop``.
        """
        leaving = frozenset(ranks)
        self._command(lambda: self._set_leaving(epoch_number, leaving)).result(STOP_TIMEOUT_S)

    def status(self) -> dict[str, Any]:
        """Wave, membership, and how many messages of each kind were dropped so far."""
        waves = self._waves
        return {
            "epoch": waves.epoch,
            "ranks": sorted(waves.ranks),
            "leaving": sorted(self._leaving),
            "heard": sorted(waves.heard),
            "wave": waves.wave,
            "running": waves.running,
            "counters": dict(self._counters.copy()),
        }

    def stop(self) -> None:
        """Ends the thread and closes the sockets. Safe to repeat."""

        def end() -> None:
            self._stopping = True

        try:
            self._command(end)
        except RuntimeError:
            return
        self._thread.join(STOP_TIMEOUT_S)

    def _command(self, run: Callable[[], None]) -> Future[None]:
        done: Future[None] = Future()
        with self._wake_lock:
            if self._wake_out.closed:
                raise RuntimeError("the coordinator has stopped")
            self._commands.put((run, done))
            self._wake_out.send(b"")
        return done

    # --- the loop --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._wake_in, zmq.POLLIN)
        try:
            while not self._stopping:
                wait_s = self._due() - time.monotonic()
                ready = dict(poller.poll(max(0, int(wait_s * 1000) + 1)))
                if self._wake_in in ready:
                    self._wake_in.recv()
                    self._run_command()
                if self._router in ready:
                    self._drain()
                if time.monotonic() >= self._due():
                    self._publish()
        finally:
            with self._wake_lock:
                self._wake_out.close()
            while not self._commands.empty():
                self._commands.get()[1].cancel()
            for socket in (self._wake_in, self._router, self._publisher):
                socket.close()
            self._context.term()

    def _run_command(self) -> None:
        run, done = self._commands.get()
        try:
            done.set_result(run())
        except Exception as error:
            done.set_exception(error)

    def _drain(self) -> None:
        """Takes what has arrived, but not so much that a flood could hold up publications."""
        for _ in range(1000):
            try:
                peer, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                (frame,) = frames
                self._receive(peer, wire.to_coordinator(frame))
            except (ValueError, msgspec.MsgspecError) as error:
                self._drop("malformed", str(error))
            except Exception as error:  # whatever a message does, the next one is served
                logger.exception("a message could not be handled")
                self._drop("failed", repr(error))

    def _receive(self, peer: bytes, message: wire.ToCoordinator) -> None:
        if isinstance(message, wire.Lookup):
            self._send(peer, self._view())
            return
        if message.epoch < self._waves.epoch:
            self._drop("stale_epoch", f"{message} in epoch {self._waves.epoch}")
            return
        if message.epoch == self._waves.epoch and message.rank not in self._waves.ranks:
            self._drop("unknown_rank", f"{message} to ranks {sorted(self._waves.ranks)}")
            return
        if isinstance(message, wire.FirstRequest):
            self._step(self._waves.receive(message))
            return
        self._routes[message.epoch, message.rank] = peer
        if not isinstance(message, wire.Stats):
            self._step(self._waves.receive(message))
        elif message.epoch > self._waves.epoch:
            self._early_stats[message.rank] = message
        elif self._loads.report(message, time.monotonic()):
            self._loads_changed = True
        else:
            self._drop("out_of_order_stats", f"{message} after a later step")

    def _form(self, epoch: Epoch) -> None:
        if epoch.number == self._epoch.number and epoch != self._epoch:
            raise ValueError(f"epoch {epoch.number} is {self._epoch.members}, not {epoch.members}: number it anew")
        transition = self._waves.formed(epoch)
        kept = set(epoch.members) & set(self._epoch.members)
        routes = {key: peer for key, peer in self._routes.items() if key[0] >= epoch.number}
        for member in kept:
            former = self._routes.get((self._epoch.number, member.rank))
            if former is not None:
                routes.setdefault((epoch.number, member.rank), former)
        self._routes = routes
        if epoch.number > self._epoch.number:
            self._leaving = frozenset()
        self._epoch = epoch
        self._loads.resize(epoch.ranks, kept=(member.rank for member in kept))
        early, self._early_stats = self._early_stats, {}
        for stats in early.values():
            if stats.epoch == epoch.number and stats.rank in epoch.ranks:
                self._loads.report(stats, time.monotonic())
        self._urgent = True
        self._step(transition)

    def _set_leaving(self, epoch_number: int, leaving: frozenset[int]) -> None:
        if epoch_number != self._epoch.number:
            raise ValueError(f"ranks can't leave epoch {epoch_number}: this is epoch {self._epoch.number}")
        strangers = leaving - set(self._epoch.ranks)
        if strangers:
            raise ValueError(f"ranks {sorted(strangers)} can't leave epoch {epoch_number}: its are {self._epoch.ranks}")
        self._leaving = leaving
        self._urgent = True

    def _step(self, transition: tuple[GroupWaves, list[wire.StartWave]]) -> None:
        before = self._waves
        self._waves, starts = transition
        self._urgent |= (before.wave, before.running) != (self._waves.wave, self._waves.running)
        for start in starts:
            peer = self._routes.get((start.epoch, start.rank))
            if peer is not None:  # else it is told when it announces itself
                self._send(peer, start)

    def _send(self, peer: bytes, message: wire.StartWave | wire.View) -> None:
        try:
            self._router.send_multipart([peer, wire.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:  # gone, or not reading
            self._drop("undeliverable", f"{type(message).__name__}: {error}")

    # --- publishing ------------------------------------------------------------------------------------------------

    def _due(self) -> float:
        """When to publish next, on the monotonic clock."""
        if self._urgent:
            return 0.0
        return self._published_at + (self._interval_s if self._loads_changed else self._idle_s)

    def _publish(self) -> None:
        now = time.monotonic()
        self._publisher.send(wire.encode(self._view()))
        self._published_at = now
        self._urgent = False
        # What the newest step still holds back is published an interval later.
        self._loads_changed = not self._loads.settled(now)
        self._counters["published"] += 1

    def _view(self) -> wire.View:
        waves = self._waves
        loads = self._loads.snapshot(time.monotonic())
        return wire.View(
            waves.epoch,
            list(self._epoch.members),
            waves.wave,
            waves.running,
            loads,
            leaving=sorted(self._leaving),
            number=next(self._view_numbers),
        )

    def _drop(self, kind: str, what: str) -> None:
        self._counters[kind] += 1
        if self._counters[kind] % LOG_EVERY == 1:
            logger.warning("dropped a message (%s, %d so far): %s", kind, self._counters[kind], what[:300])
