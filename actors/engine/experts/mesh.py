"""The exchange over a mesh of TCP connections, one between each two ranks, driven by the engine's own thread.

A step of a small batch is two dozen collectives of a few kilobytes, so what counts is how often a thread must be woken.
A collective of Gloo wakes four (caller, worker, event loop, caller), here the kernel wakes the one that waits; it first
spins for a moment, since peers in lockstep are rarely far apart. Every rank knows all sizes beforehand, so nothing
is framed. Closing, from any thread, ends a collective that runs.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist

from actors.engine.experts.exchange import PeerLost

SPIN_S = 100e-6
SOCKET_BUFFER = 4 * 2**20
TOKEN_BYTES = 16
# How often a member that has not come yet is looked for, seconds.
POLL_S = 0.01


class MeshExchange:
    """Connects to all other members; building blocks until all ``size`` have come.

    ``store`` is shared by the members of one epoch and by nobody else (a ``PrefixStore`` per epoch); it carries
    addresses and a token that keeps strangers out. ``address`` is the local IP to bind and advertise. ``timeout_s``
    bounds the building and every collective; setting ``abandoned`` ends the building early. Building computes nothing,
    so it may go on beside a step. Raises ``PeerLost`` when a member does not arrive.
    """

    def __init__(
        self,
        store: dist.Store,
        rank_index: int,
        size: int,
        timeout_s: float,
        address: str,
        abandoned: threading.Event | None = None,
    ) -> None:
        self.rank_index = rank_index
        self.size = size
        self._timeout_s = timeout_s
        self._abandoned = abandoned or threading.Event()
        self._closed = False
        self._peers: dict[int, socket.socket] = {}
        try:
            self._connect(store, address)
        except (OSError, RuntimeError, struct.error) as error:
            self.close()
            raise PeerLost(f"rank index {rank_index} of {size} could not form its group: {error}") from error

    def sync(self, vector: Sequence[int]) -> list[list[int]]:
        self.offer(vector)
        return self.gather()

    def offer(self, vector: Sequence[int]) -> None:
        self._vectors = torch.empty(self.size, len(vector), dtype=torch.int64)
        self._vectors[self.rank_index] = torch.tensor(vector, dtype=torch.int64)
        self._offered_at = time.monotonic()
        # It fits any socket's buffer: nobody has to receive it first.
        own = _bytes(self._vectors[self.rank_index])
        self._swap("sync", dict.fromkeys(self._peers, own), {}, self._offered_at)

    def awaited(self) -> list[int]:
        if time.monotonic() - self._offered_at > self._timeout_s:
            return []
        poll = select.poll()
        sockets = {peer.fileno() for peer in self._peers.values()}
        for descriptor in sockets:
            poll.register(descriptor, select.POLLIN)
        return sorted(sockets.difference(descriptor for descriptor, _ in poll.poll(0)))

    def gather(self) -> list[list[int]]:
        inbound = {peer: _bytes(self._vectors[peer]) for peer in self._peers}
        self._swap("sync", {}, inbound, self._offered_at)
        gathered: list[list[int]] = self._vectors.tolist()
        return gathered

    def heard(self, rank_indexes: Iterable[int]) -> bool:
        try:
            return all(self._peers[peer].recv(1, socket.MSG_PEEK) for peer in rank_indexes)
        except OSError:  # nothing there yet, or the connection broke
            return False

    def lost(self) -> bool:
        """Whether the connection to some member is broken. Does not wait."""
        for peer in self._peers.values():
            try:
                if not peer.recv(1, socket.MSG_PEEK):
                    return True
            except BlockingIOError:
                continue
            except OSError:
                return True
        return False

    def dispatch(self, rows: torch.Tensor, tokens_per_rank: Sequence[int]) -> torch.Tensor:
        here = rows.cpu().contiguous()
        gathered = here.new_empty(sum(tokens_per_rank), here.shape[1])
        shares = gathered.split(list(tokens_per_rank))
        shares[self.rank_index].copy_(here)
        self._swap(
            "dispatch", dict.fromkeys(self._peers, _bytes(here)), {peer: _bytes(shares[peer]) for peer in self._peers}
        )
        return gathered.to(rows.device)

    def combine(self, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        here = rows.cpu().contiguous()
        returned = here.new_empty(sum(receive), here.shape[1])
        outbound, inbound = here.split(list(send)), returned.split(list(receive))
        inbound[self.rank_index].copy_(outbound[self.rank_index])
        self._swap(
            "combine",
            {peer: _bytes(outbound[peer]) for peer in self._peers},
            {peer: _bytes(inbound[peer]) for peer in self._peers},
        )
        return returned.to(rows.device)

    def close(self) -> None:
        self._closed = True
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
            peer.close()

    def _connect(self, store: dist.Store, address: str) -> None:
        deadline = time.monotonic() + self._timeout_s
        with socket.create_server((address, 0), backlog=self.size) as listener:
            if self.rank_index == 0:
                store.set("token", os.urandom(TOKEN_BYTES).hex())
            # Bound before it is published.
            store.set(str(self.rank_index), f"{address}:{listener.getsockname()[1]}")
            token = bytes.fromhex(self._get(store, "token", deadline))
            for other in range(self.rank_index):
                host, port = self._get(store, str(other), deadline).rsplit(":", 1)
                peer = socket.create_connection((host, int(port)), self._timeout_s)
                self._peers[other] = peer
                peer.sendall(token + struct.pack("!I", self.rank_index))
            while len(self._peers) < self.size - 1:
                listener.settimeout(POLL_S)
                try:
                    peer, _ = listener.accept()
                except TimeoutError:
                    self._check(deadline)
                    continue
                peer.settimeout(max(0.001, deadline - time.monotonic()))
                hello = peer.recv(TOKEN_BYTES + 4, socket.MSG_WAITALL)
                if hmac.compare_digest(hello[:TOKEN_BYTES], token):
                    self._peers[struct.unpack("!I", hello[TOKEN_BYTES:])[0]] = peer
                else:
                    peer.close()
        for peer in self._peers.values():
            peer.setblocking(False)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                peer.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)

    def _get(self, store: dist.Store, key: str, deadline: float) -> str:
        while not store.check([key]):
            self._check(deadline)
            time.sleep(POLL_S)
        value: str = store.get(key).decode()
        return value

    def _check(self, deadline: float) -> None:
        if self._abandoned.is_set():
            raise TimeoutError("its epoch was abandoned")
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all members came within {self._timeout_s:g} s")

    def _swap(
        self,
        what: str,
        outbound: Mapping[int, memoryview],
        inbound: Mapping[int, memoryview],
        since: float | None = None,
    ) -> None:
        """Sends and receives exactly these bytes, all at the same time. Raises PeerLost.

        The timeout counts from ``since``, of the monotonic clock; unset: from now.
        """
        out = {peer: view for peer, view in outbound.items() if view}
        into = {peer: view for peer, view in inbound.items() if view}
        moved_at = time.monotonic()
        started = moved_at if since is None else since
        peer = -1
        try:
            while out or into:
                moved = False
                for peer, view in list(out.items()):
                    with contextlib.suppress(BlockingIOError):
                        count = self._peers[peer].send(view)
                        moved = True
                        out[peer] = view[count:]
                        if count == len(view):
                            del out[peer]
                for peer, view in list(into.items()):
                    with contextlib.suppress(BlockingIOError):
                        count = self._peers[peer].recv_into(view)
                        if not count:
                            raise ConnectionResetError("it closed the connection")
                        moved = True
                        into[peer] = view[count:]
                        if count == len(view):
                            del into[peer]
                now = time.monotonic()
                if moved:
                    moved_at = now
                elif now - moved_at > SPIN_S:
                    peer = next(iter(into or out))
                    self._wait(out, into, started + self._timeout_s - now)
        except (OSError, ValueError) as error:
            reason = "the group was closed" if self._closed else f"rank index {peer}: {error}"
            raise PeerLost(f"{what} of rank index {self.rank_index} of {self.size} broke: {reason}") from error

    def _wait(self, out: Mapping[int, memoryview], into: Mapping[int, memoryview], timeout_s: float) -> None:
        poll = select.poll()
        for peer in out.keys() | into.keys():
            events = (select.POLLIN if peer in into else 0) | (select.POLLOUT if peer in out else 0)
            poll.register(self._peers[peer], events)
        if timeout_s <= 0 or not poll.poll(timeout_s * 1000):
            raise TimeoutError(f"nothing came for {self._timeout_s:g} s")


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, of any dtype."""
    return memoryview(tensor.view(torch.uint8).numpy().data).cast("B") if tensor.numel() else memoryview(b"")
