"""An engine's sockets: requests in from clients, outputs out, waves to and from the coordinator.

The engine's loop owns the mailbox and polls it between steps; no other thread touches its sockets. Other threads reach
the loop by ``post``: the callable runs on the loop's thread at the next drain.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import zmq

from actors import wire
from actors.sockets import Keys, bind

logger = logging.getLogger(__name__)


class Mailbox:
    """Binds ``address`` (``tcp://ip:port``) at once; the coordinator is connected when its address is known."""

    def __init__(self, ip: str, keys: Keys) -> None:
        self._keys = keys
        self._context = zmq.Context()
        self._clients = self._context.socket(zmq.ROUTER)
        keys.server(self._clients)
        # A client that reconnects keeps its identity; its former connection may not have been seen to break yet.
        self._clients.router_handover = True
        self.address = bind(self._clients, ip)
        self._coordinator: zmq.Socket | None = None
        self._wake_in = self._context.socket(zmq.PAIR)
        self._wake_in.bind("inproc://wake")
        self._wake_out = self._context.socket(zmq.PAIR)
        self._wake_out.connect("inproc://wake")
        self._wake_lock = threading.Lock()
        self._posted: deque[Callable[[], None]] = deque()
        self._poller = zmq.Poller()
        self._poller.register(self._clients, zmq.POLLIN)
        self._poller.register(self._wake_in, zmq.POLLIN)
        self._heard: dict[bytes, float] = {}
        self.malformed = 0

    def connect_coordinator(self, address: str) -> None:
        """Connects to the coordinator at ``address``, leaving a former one."""
        if self._coordinator is not None:
            self._poller.unregister(self._coordinator)
            self._coordinator.close()
        self._coordinator = self._context.socket(zmq.DEALER)
        self._keys.client(self._coordinator)
        self._coordinator.connect(address)
        self._poller.register(self._coordinator, zmq.POLLIN)

    def post(self, callback: Callable[[], None]) -> None:
        """From any thread: run ``callback`` on the loop's thread, waking it if it sleeps."""
        with self._wake_lock:
            if self._wake_out.closed:
                raise RuntimeError("the engine has stopped")
            self._posted.append(callback)
            self._wake_out.send(b"")

    def drain(self, timeout_ms: int) -> tuple[list[tuple[bytes, wire.ToEngine]], list[wire.StartWave]]:
        """Runs what was posted and returns what arrived: (client, message) pairs and waves to start.

        Waits up to ``timeout_ms`` for the first of them. Frames that are no valid message are counted and dropped.
        """
        ready = dict(self._poller.poll(timeout_ms))
        if self._wake_in in ready:
            _receive_all(self._wake_in)
        while self._posted:
            self._posted.popleft()()
        requests = self.requests() if self._clients in ready else []
        starts: list[wire.StartWave] = []
        if self._coordinator is not None and self._coordinator in ready:
            for frames in _receive_all(self._coordinator):
                start = self._decode(wire.coordinator_to_engine, frames)
                if start is not None:
                    starts.append(start)
        return requests, starts

    def wait(self, descriptors: Iterable[int], timeout_ms: int) -> None:
        """Waits until a client has sent something or one of these files can be read, up to ``timeout_ms``."""
        poller = zmq.Poller()
        for source in (self._clients, *descriptors):
            poller.register(source, zmq.POLLIN)
        poller.poll(timeout_ms)

    def requests(self) -> list[tuple[bytes, wire.ToEngine]]:
        """What clients have sent, and nothing else. Does not wait."""
        received = []
        for frames in _receive_all(self._clients):
            message = self._decode(wire.to_engine, frames[1:])
            if message is not None:
                received.append((frames[0], message))
                self._heard[frames[0]] = time.monotonic()
        return received

    def fallen_silent(self, seconds: float) -> list[bytes]:
        """Clients that have sent nothing valid for so long. Each is named once."""
        limit = time.monotonic() - seconds
        silent = [client for client, heard in self._heard.items() if heard < limit]
        for client in silent:
            del self._heard[client]
        return silent

    def send(self, client: bytes, message: wire.FromEngine) -> None:
        """Sends to one client; a client that is gone is silently skipped (its requests end by missed beats)."""
        self._clients.send_multipart([client, wire.encode(message)])

    def report(self, message: wire.ToCoordinator) -> None:
        """Sends to the coordinator; while none is connected, nothing (its successor is told by ``Announce``)."""
        if self._coordinator is not None:
            self._coordinator.send(wire.encode(message))

    def close(self) -> None:
        with self._wake_lock:
            self._wake_out.close()
        self._wake_in.close()
        self._clients.close()
        if self._coordinator is not None:
            self._coordinator.close()
        self._context.term()

    def _decode(self, decoder: Callable[[bytes], Any], frames: list[bytes]) -> Any:
        try:
            (frame,) = frames
            return decoder(frame)
        except (ValueError, msgspec.MsgspecError) as error:
            self.malformed += 1
            logger.warning("dropped a malformed message (%d so far): %s", self.malformed, error)
            return None


def _receive_all(socket: zmq.Socket) -> list[list[bytes]]:
    received = []
    while True:
        try:
            received.append(socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return received
