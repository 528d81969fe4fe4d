"""The coordinator on real sockets: engines and clients come, talk, misbehave and go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import msgspec
import pytest
import zmq

from actors import wire
from actors.coordinator import MAX_MESSAGE_BYTES, Coordinator
from actors.membership import Epoch, Member
from actors.sockets import Keys

TIMEOUT_MS = 10_000


def epoch_of(number: int, *ranks: int) -> Epoch:
    return Epoch(number, tuple(Member(rank, f"tcp://10.0.0.{rank}:1", f"node-{rank}") for rank in ranks))


class Peer:
    """An engine's or a client's connection to the coordinator."""

    def __init__(self, socket: zmq.Socket) -> None:
        self.socket = socket

    def send(self, *messages: wire.ToCoordinator) -> None:
        for message in messages:
            self.socket.send(wire.encode(message))

    def start(self) -> wire.StartWave:
        return wire.coordinator_to_engine(self._receive())

    def view(self) -> wire.View:
        return wire.coordinator_to_client(self._receive())

    def look_up(self) -> wire.View:
        self.send(wire.Lookup())
        return self.view()

    def view_when(self, holds: Callable[[wire.View], bool]) -> wire.View:
        """The first publication of which ``holds`` is true."""
        while True:
            view = self.view()
            if holds(view):
                return view

    def is_silent(self, for_ms: int = 200) -> bool:
        return not self.socket.poll(for_ms)

    def _receive(self) -> bytes:
        assert self.socket.poll(TIMEOUT_MS), "nothing came"
        return self.socket.recv()


class Network:
    """A coordinator and whoever connects to it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._keys = Keys.new()
        self._context = stack.enter_context(zmq.Context())
        self.coordinator = self.start_coordinator()

    def start_coordinator(self, **intervals: float) -> Coordinator:
        self.coordinator = Coordinator("127.0.0.1", self._keys.server, **intervals)
        self._stack.callback(self.coordinator.stop)
        return self.coordinator

    def dealer(self, keys: Keys | None = None) -> Peer:
        return Peer(self._connect(zmq.DEALER, self.coordinator.addresses()[0], keys))

    def subscriber(self) -> Peer:
        """Returns once publications arrive."""
        peer = Peer(self._connect(zmq.SUB, self.coordinator.addresses()[1], None))
        while peer.is_silent(50):
            # Any change of the membership is published at once.
            number = self.coordinator.status()["epoch"] + 1
            self.coordinator.set_epoch(epoch_of(number, *self.coordinator.status()["ranks"]))
        while not peer.is_silent(50):
            peer.view()
        return peer

    def engine(self, rank: int, wave: int = 0, running: bool = False) -> Peer:
        peer = self.dealer()
        peer.send(wire.Announce(self.epoch, rank, wave, running))
        return peer

    def paused_group(self, size: int) -> list[Peer]:
        """A new epoch of ranks 0 to ``size``, each of which has run its first wave: paused before wave 1."""
        self.coordinator.set_epoch(epoch_of(self.epoch + 1, *range(size)))
        engines = [self.engine(rank) for rank in range(size)]
        for rank, engine in enumerate(engines):
            assert engine.start() == wire.StartWave(self.epoch, rank, 0)
        for rank, engine in enumerate(engines):
            engine.send(wire.WaveComplete(self.epoch, rank, 0))
            view = engine.look_up()  # so that nothing of this is still on its way
        assert (view.wave, view.running) == (1, False)
        return engines

    @property
    def epoch(self) -> int:
        number: int = self.coordinator.status()["epoch"]
        return number

    def until(self, holds: Callable[[dict], bool]) -> dict:
        deadline = time.monotonic() + TIMEOUT_MS / 1000
        while time.monotonic() < deadline:
            status = self.coordinator.status()
            if holds(status):
                return status
            time.sleep(0.005)
        raise AssertionError(f"never came true: {status}")

    def until_counted(self, kind: str, count: int) -> None:
        self.until(lambda status: status["counters"].get(kind, 0) >= count)

    def _connect(self, kind: int, address: str, keys: Keys | None) -> zmq.Socket:
        socket = self._stack.enter_context(self._context.socket(kind))
        (keys or self._keys).client(socket)
        if kind == zmq.SUB:
            socket.subscribe(b"")
        socket.connect(address)
        return socket


@pytest.fixture
def network() -> Iterator[Network]:
    with ExitStack() as stack:
        yield Network(stack)


def stats(epoch: int, rank: int, wave: int, step: int, running: int = 0) -> wire.Stats:
    return wire.Stats(epoch, rank, wave, step, waiting=0, running=running, kv_used=3, kv_total=8)


class TestWaves:
    def test_one_rank_s_start_reaches_all_and_its_end_is_published(self, network: Network) -> None:
        engines = network.paused_group(3)
        client = network.dealer()
        engines[1].send(wire.StartWave(network.epoch, 1, 1))
        for rank, engine in enumerate(engines):
            assert engine.start() == wire.StartWave(network.epoch, rank, 1)
        assert client.look_up().running
        engines[2].send(wire.WaveComplete(network.epoch, 2, 1))
        network.until(lambda status: status["wave"] == 2 and not status["running"])
        view = client.look_up()
        assert (view.wave, view.running) == (2, False)

    def test_a_client_s_notice_wakes_all(self, network: Network) -> None:
        engines = network.paused_group(2)
        network.dealer().send(wire.FirstRequest(network.epoch, 0, 1))
        for rank, engine in enumerate(engines):
            assert engine.start() == wire.StartWave(network.epoch, rank, 1)

    def test_a_replaced_coordinator_learns_wave_and_members_from_the_engines(self, network: Network) -> None:
        network.paused_group(2)
        network.coordinator.stop()
        network.start_coordinator()
        # Rank 0 was woken by a request, and its report died with the former coordinator: it can't say anything now.
        sleeper = network.dealer()
        sleeper.send(wire.Announce(7, 1, 5, False))
        network.coordinator.set_epoch(epoch_of(7, 0, 1))
        assert sleeper.start() == wire.StartWave(7, 1, 5)

    def test_engines_may_announce_an_epoch_before_the_coordinator_hears_of_it(self, network: Network) -> None:
        early = network.dealer()
        early.send(wire.Announce(4, 0, 9, True), wire.Lookup())
        assert early.view().epoch == 0
        network.coordinator.set_epoch(epoch_of(4, 0))
        assert early.start() == wire.StartWave(4, 0, 9)

    def test_an_engine_that_stays_need_not_announce_itself_to_be_reached_in_a_new_epoch(self, network: Network) -> None:
        engines = network.paused_group(2)
        number = network.epoch + 1
        network.coordinator.set_epoch(epoch_of(number, 0, 1, 2))
        for rank, engine in enumerate(engines):
            assert engine.start() == wire.StartWave(number, rank, 1)

    def test_a_rank_that_took_a_former_rank_s_number_is_another(self, network: Network) -> None:
        old = network.paused_group(2)[1]
        number = network.epoch + 1
        replaced = Epoch(number, (epoch_of(1, 0).members[0], Member(1, "tcp://10.0.0.9:1", "node-9")))
        network.coordinator.set_epoch(replaced)
        assert old.is_silent()
        new = network.dealer()
        new.send(wire.Announce(number, 1, 1, False))
        assert new.start() == wire.StartWave(number, 1, 1)
        assert old.is_silent()

    def test_an_engine_that_vanished_keeps_nobody_asleep(self, network: Network) -> None:
        gone, stays = network.paused_group(2)
        gone.socket.close()
        stays.send(wire.StartWave(network.epoch, 1, 1))
        assert stays.start() == wire.StartWave(network.epoch, 1, 1)


class TestPublishing:
    def test_a_change_of_wave_is_published_without_being_asked_for(self, network: Network) -> None:
        subscriber = network.subscriber()
        engines = network.paused_group(2)
        subscriber.view_when(lambda view: view.wave == 1 and not view.running)
        engines[0].send(wire.StartWave(network.epoch, 0, 1))
        view = subscriber.view_when(lambda view: view.running)
        assert (view.epoch, view.wave) == (network.epoch, 1)
        assert view.members == list(epoch_of(1, 0, 1).members)

    def test_loads_are_published_and_gathered_not_sent_one_by_one(self, network: Network) -> None:
        engines = network.paused_group(2)
        subscriber = network.subscriber()
        # The subscriber's epochs are new to the engines: they say where they stand.
        for rank, engine in enumerate(engines):
            engine.send(wire.Announce(network.epoch, rank, 1, True))
        before = network.coordinator.status()["counters"]["published"]
        started = time.monotonic()
        for step in range(1, 301):
            for rank, engine in enumerate(engines):
                engine.send(stats(network.epoch, rank, 1, step, running=step))
            time.sleep(0.001)
        view = subscriber.view_when(lambda view: [load.step for load in view.loads] == [300, 300])
        took_s = time.monotonic() - started
        assert [(load.running, load.kv_used, load.kv_total) for load in view.loads] == [(300, 3, 8)] * 2
        published = network.coordinator.status()["counters"]["published"] - before
        assert published <= took_s / 0.1 + 3

    def test_a_snapshot_of_a_running_group_shows_one_step(self, network: Network) -> None:
        engines = network.paused_group(2)
        client = network.dealer()
        for rank, engine in enumerate(engines):
            engine.send(stats(network.epoch, rank, 1, 1, running=1))
        engines[0].send(stats(network.epoch, 0, 1, 2, running=2))
        deadline = time.monotonic() + TIMEOUT_MS / 1000
        seen = []
        while not seen or seen[-1] != [2, 1]:
            seen.append([load.step for load in client.look_up().loads])
            assert time.monotonic() < deadline
        # Rank 1 has nothing to say of step 2: that becomes the picture only when it has had time to.
        assert set(map(tuple, seen)) <= {(), (1,), (1, 1), (2, 1)}

    def test_an_idle_group_is_published_now_and_then(self, network: Network) -> None:
        network.coordinator.stop()
        network.start_coordinator(interval_s=0.01, idle_s=0.05)
        subscriber = Peer(network._connect(zmq.SUB, network.coordinator.addresses()[1], None))
        for _ in range(5):
            assert subscriber.view().epoch == 0

    def test_an_idle_coordinator_sleeps(self, network: Network) -> None:
        network.paused_group(2)
        time.sleep(0.3)
        before, cpu = network.coordinator.status()["counters"]["published"], time.process_time()
        time.sleep(1.0)
        assert network.coordinator.status()["counters"]["published"] - before <= 1
        assert time.process_time() - cpu < 0.2


class TestLeaving:
    def test_ranks_that_leave_are_published_at_once_and_no_more_in_the_next_epoch(self, network: Network) -> None:
        network.paused_group(3)
        subscriber = network.subscriber()
        number = network.epoch
        network.coordinator.set_leaving(number, [2, 1])
        view = subscriber.view()
        assert (view.epoch, view.leaving) == (number, [1, 2])
        assert network.coordinator.status()["leaving"] == [1, 2]
        network.coordinator.set_epoch(epoch_of(number, 0, 1, 2))  # repeated: changes nothing
        assert subscriber.view_when(lambda view: view.number >= 0).leaving == [1, 2]
        network.coordinator.set_leaving(number, [])
        assert subscriber.view_when(lambda view: not view.leaving).epoch == number
        network.coordinator.set_leaving(number, [2])
        network.coordinator.set_epoch(epoch_of(number + 1, 0, 1))
        assert subscriber.view_when(lambda view: view.epoch > number).leaving == []

    def test_only_members_of_the_current_epoch_can_leave(self, network: Network) -> None:
        network.coordinator.set_epoch(epoch_of(4, 0, 1))
        with pytest.raises(ValueError, match=r"\[7\] can't leave epoch 4"):
            network.coordinator.set_leaving(4, [1, 7])
        with pytest.raises(ValueError, match="epoch 3: this is epoch 4"):
            network.coordinator.set_leaving(3, [1])
        assert network.coordinator.status()["leaving"] == []
        network.coordinator.stop()
        with pytest.raises(RuntimeError, match="has stopped"):
            network.coordinator.set_leaving(4, [1])

    def test_views_are_numbered_in_the_order_they_were_made(self, network: Network) -> None:
        client = network.dealer()
        numbers = [client.look_up().number for _ in range(3)]
        assert numbers == sorted(set(numbers))


class TestWhatIsDropped:
    @pytest.mark.parametrize(
        "frames",
        [
            [b""],
            [b"\xc1 not msgpack"],
            [b"\x80"],
            [msgspec.msgpack.encode({"type": "Drop tables"})],
            [msgspec.msgpack.encode({"type": "StartWave", "epoch": 1, "rank": 0})],
            [msgspec.msgpack.encode({"type": "StartWave", "epoch": 1, "rank": -1, "wave": 0})],
            [msgspec.msgpack.encode({"type": "StartWave", "epoch": 1, "rank": 0, "wave": 2**63})],
            [msgspec.msgpack.encode({"type": "Announce", "epoch": 1, "rank": 0, "wave": 0, "running": "yes"})],
            [wire.encode(wire.View(1, [], 0, True, []))],
            [wire.encode(wire.Lookup()), wire.encode(wire.Lookup())],
            [b"", wire.encode(wire.Lookup())],
        ],
    )
    def test_malformed_frames_are_counted_and_harm_nobody(self, network: Network, frames: list[bytes]) -> None:
        engines = network.paused_group(2)
        before = network.coordinator.status()
        engines[0].socket.send_multipart(frames)
        network.until_counted("malformed", 1)
        after = network.coordinator.status()
        assert (after["wave"], after["running"]) == (before["wave"], before["running"])
        assert engines[0].look_up().epoch == network.epoch

    def test_a_message_too_long_costs_its_sender_the_connection_only(self, network: Network) -> None:
        network.paused_group(1)
        rude, other = network.dealer(), network.dealer()
        rude.socket.send(b"x" * (MAX_MESSAGE_BYTES + 1))
        assert other.look_up().epoch == network.epoch

    def test_a_stranger_without_the_key_is_not_heard(self, network: Network) -> None:
        network.coordinator.set_epoch(epoch_of(1, 0))
        stranger = network.dealer(Keys.new())
        stranger.send(wire.Lookup(), wire.StartWave(1, 0, 50))
        assert stranger.is_silent()
        assert network.dealer().look_up().wave == 0

    def test_out_of_order_stats_are_counted_per_rank(self, network: Network) -> None:
        engines = network.paused_group(2)
        number = network.epoch
        engines[0].send(stats(number, 0, 1, 9, running=4), stats(number, 0, 1, 8, running=7))
        network.until_counted("out_of_order_stats", 1)
        engines[1].send(stats(number, 1, 1, 2, running=1), wire.Lookup())
        engines[1].view()
        assert network.coordinator.status()["counters"]["out_of_order_stats"] == 1
        time.sleep(0.12)  # for step 9 to settle
        assert [(load.step, load.running) for load in engines[1].look_up().loads] == [(9, 4), (2, 1)]

    def test_older_epochs_and_unknown_ranks_are_counted_and_change_nothing(self, network: Network) -> None:
        engine, other = network.paused_group(2)
        number = network.epoch
        network.coordinator.set_epoch(epoch_of(number + 1, 0, 1))
        for peer, rank in ((engine, 0), (other, 1)):
            peer.send(wire.Announce(number + 1, rank, 1, True))
        network.until(lambda status: status["heard"] == [0, 1])
        engine.send(wire.WaveComplete(number + 1, 0, 1))
        status = network.until(lambda status: not status["running"])
        engine.send(
            wire.StartWave(number, 0, 2),
            wire.Announce(number, 0, 2, True),
            wire.FirstRequest(number, 0, 2),
            stats(number, 0, 2, 1),
            wire.StartWave(number + 1, 9, 2),
            stats(number + 1, 9, 2, 1),
        )
        network.until_counted("unknown_rank", 2)
        after = network.coordinator.status()
        assert after["counters"]["stale_epoch"] == 4
        assert (after["wave"], after["running"]) == (status["wave"], False)

    def test_clients_that_come_and_go_leave_nothing_behind(self, network: Network) -> None:
        engines = network.paused_group(1)
        for _ in range(50):
            client = network.dealer()
            client.send(wire.Lookup())
            client.socket.close(linger=0)
        assert engines[0].look_up().epoch == network.epoch


class TestLife:
    def test_an_epoch_that_does_not_follow_is_refused(self, network: Network) -> None:
        network.coordinator.set_epoch(epoch_of(3, 0, 1))
        network.coordinator.set_epoch(epoch_of(3, 0, 1))
        with pytest.raises(ValueError, match="epoch 2"):
            network.coordinator.set_epoch(epoch_of(2, 0, 1))
        moved = Epoch(3, (Member(0, "tcp://10.9.9.9:1", "x"), Member(1, "tcp://10.9.9.9:2", "x")))
        with pytest.raises(ValueError, match="epoch 3"):
            network.coordinator.set_epoch(moved)
        assert network.coordinator.status()["ranks"] == [0, 1]

    def test_stop_is_safe_to_repeat_and_ends_the_thread(self, network: Network) -> None:
        network.coordinator.stop()
        network.coordinator.stop()
        with pytest.raises(RuntimeError, match="has stopped"):
            network.coordinator.set_epoch(epoch_of(1, 0))

    def test_it_says_what_it_is(self, network: Network) -> None:
        network.coordinator.set_epoch(epoch_of(2, 0))
        assert repr(network.coordinator) == "coordinator(epoch 2)"
