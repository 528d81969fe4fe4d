"""The exchange of one epoch among GPUs: the mesh carries control, rows travel through the peers' windows."""

from __future__ import annotations

import platform
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from actors.engine.cuda.window import Window
from actors.engine.experts.exchange import PeerLost
from actors.engine.experts.mesh import MeshExchange

# How often a member that has not told yet is looked for, and how often it is looked whether one was lost, seconds.
POLL_S, WATCH_S = 0.005, 0.05


class NoPeerAccess(RuntimeError):
    """Some members can't reach each other's device memory. Raised by all of them, so that all take another way."""


class _Card(msgspec.Struct):
    """What a member tells the others of its window; ``owner`` differs from process to process."""

    owner: str
    machine: str
    layout: str
    handle: bytes


class PeerWindows:
    """The windows of other processes that this one has open; one object a process.

    A peer that stays from one epoch to the next is opened once. ``connect`` may run beside a step, in any thread.
    """

    def __init__(self, window: Window) -> None:
        self.window = window
        self._owner = uuid.uuid4().hex
        self._connecting, self._lock = threading.Lock(), threading.Lock()
        self._open: dict[str, int] = {}
        self._used: dict[CudaPeers, set[str]] = {}

    def connect(
        self,
        mesh: MeshExchange,
        store: dist.Store,
        epoch: int,
        timeout_s: float,
        abandoned: threading.Event | None = None,
    ) -> CudaPeers:
        """Opens the windows of all members of ``epoch``, whose control ``mesh`` carries.

        ``store`` is shared by the members of the epoch and nobody else. Blocks until all have told theirs. Raises
        PeerLost when one does not within ``timeout_s`` or ``abandoned`` is set, and NoPeerAccess, on all members, when
        one can't open another's.
        """
        with self._connecting:
            return self._connect(mesh, store, epoch, time.monotonic() + timeout_s, abandoned or threading.Event())

    def release(self, peers: CudaPeers) -> None:
        """These are not used any more. What nobody else uses is closed, so that a peer that left gets its memory back.

        By a thread of its own: the driver may take as long for it as a step.
        """
        with self._lock:
            self._used.pop(peers, None)
        threading.Thread(target=self._tidy, name="peer windows", daemon=True).start()

    def _connect(
        self, mesh: MeshExchange, store: dist.Store, epoch: int, deadline: float, abandoned: threading.Event
    ) -> CudaPeers:
        def told(what: str, peer: int) -> bytes:
            key = f"{what}{peer}"
            while not store.check([key]):
                if abandoned.is_set() or time.monotonic() > deadline:
                    reason = "the epoch was abandoned" if abandoned.is_set() else "too late"
                    raise PeerLost(f"rank index {peer} did not tell rank index {mesh.rank_index} its {what}: {reason}")
                time.sleep(POLL_S)
            return bytes(store.get(key))

        index = mesh.rank_index
        self._close_unused()
        self.window.clear_pad(epoch)
        refusal, handle = "", b""
        try:
            handle = self.window.memory.handle()
        except OSError as error:
            refusal = f"rank index {index} can't share its memory: {error}"
        own = _Card(self._owner, _machine(), repr(self.window.layout), handle)
        store.set(f"window{index}", msgspec.json.encode(own).decode())
        owners, addresses = set(), []
        for peer in range(mesh.size):
            card = msgspec.json.decode(told("window", peer), type=_Card)
            owners.add(card.owner)
            try:
                addresses.append(self.window.address if peer == index else self._opened(own, card))
            except OSError as error:
                refusal = refusal or f"rank index {index} can't reach the memory of rank index {peer}: {error}"
        store.set(f"reach{index}", refusal)
        if refusals := [answer.decode() for peer in range(mesh.size) if (answer := told("reach", peer))]:
            raise NoPeerAccess("; ".join(refusals))
        peers = CudaPeers(self, mesh, addresses, epoch)
        with self._lock:
            self._used[peers] = owners
        return peers

    def _opened(self, own: _Card, card: _Card) -> int:
        if card.machine != own.machine:
            raise OSError(f"it is on machine {card.machine}, this is {own.machine}")
        if card.layout != own.layout:
            raise OSError(f"its window is {card.layout}, here it is {own.layout}")
        if card.owner not in self._open:
            self._open[card.owner] = self.window.memory.open(card.handle)
        return self._open[card.owner]

    def _tidy(self) -> None:
        with self._connecting:
            self._close_unused()

    def _close_unused(self) -> None:
        with self._lock:
            used = set().union(*self._used.values())
        for owner in self._open.keys() - used:
            self.window.memory.close(self._open.pop(owner))


class CudaPeers:
    """See ``Exchange``; ``dispatch`` and ``combine`` are the mesh's, for those who hold no window.

    ``addresses`` are the members' windows as this process sees them, ``pad`` where in each of them this epoch's flags
    stand, ``turn`` how many exchanges there have been in it (kept by ``CudaExperts`` while it is not in use).

    A thread watches the members' connections. Who launches steps may be held up by the driver behind a step that waits
    for a lost peer, so it can't be left to them.
    """

    def __init__(self, windows: PeerWindows, mesh: MeshExchange, addresses: Sequence[int], epoch: int) -> None:
        self.rank_index, self.size = mesh.rank_index, mesh.size
        self.addresses = list(addresses)
        self.pad = windows.window.layout.pad(epoch)
        self.turn = torch.zeros(1, dtype=torch.int32, device=windows.window.memory.data.device)
        self._windows = windows
        self._mesh = mesh
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="peer watch", daemon=True)
        self._watcher.start()

    def sync(self, vector: Sequence[int]) -> list[list[int]]:
        return self._mesh.sync(vector)

    def offer(self, vector: Sequence[int]) -> None:
        self._mesh.offer(vector)

    def awaited(self) -> list[int]:
        return self._mesh.awaited()

    def gather(self) -> list[list[int]]:
        return self._mesh.gather()

    def heard(self, rank_indexes: Iterable[int]) -> bool:
        return self._mesh.heard(rank_indexes)

    def dispatch(self, rows: torch.Tensor, tokens_per_rank: Sequence[int]) -> torch.Tensor:
        return self._mesh.dispatch(rows, tokens_per_rank)

    def combine(self, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        return self._mesh.combine(rows, send, receive)

    def close(self) -> None:
        self._closing.set()
        self._watcher.join()
        self._mesh.close()
        self._windows.release(self)

    def break_off(self) -> None:
        """From any thread: lets kernels that wait for a peer, here or at peers, run through. Their steps are void."""
        self._windows.window.broken[0] = self.pad

    def wait(self, done: torch.cuda.Event, timeout_s: float) -> None:
        """Waits for an event that was recorded behind a step.

        When a member's connection breaks, or after ``timeout_s``, the step is broken off; whether that made it void,
        ``CudaExperts.check`` tells. Raises PeerLost when the device does not complete it even then.
        """
        started = time.monotonic()
        while not done.query():
            waited = time.monotonic() - started
            if waited > 2 * timeout_s:
                raise PeerLost(f"a step of rank index {self.rank_index} did not end within {waited:.1f} s")
            if waited > timeout_s:
                self.break_off()

    def _watch(self) -> None:
        while not self._closing.wait(WATCH_S):
            if self._mesh.lost():
                self.break_off()
                return


def _machine() -> str:
    """The host and this start of it."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()} {boot.read_text().strip() if boot.exists() else ''}"
