"""A whole group without Ray: real engines in processes of their own, a real coordinator, real sockets."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from actors.coordinator import Coordinator
from actors.engine.batch import Batch
from actors.engine.config import EngineConfig
from actors.membership import Epoch, Member
from actors.sockets import Keys

IP = "127.0.0.1"


def _engine(pipe: Connection, rank: int, index: int, size: int, config: EngineConfig, keys: Keys) -> None:
    from actors.engine.core import EngineCore
    from actors.engine.experts.planner import Shape, plan
    from actors.engine.mailbox import Mailbox
    from actors.engine.model import summarize
    from actors.engine.runner import ready

    shape = summarize(config.model)
    slots = config.expert_slots or -(-shape.num_experts // config.min_data_parallel_size)
    expert_map = plan(Shape(shape.num_moe_layers, shape.num_experts, slots), range(size))
    runner = ready(index, expert_map, config, lambda doing: None)
    core = EngineCore(rank, config, runner, Mailbox(IP, keys))
    pipe.send(core.mailbox.address)
    store = None
    thread: threading.Thread | None = None
    while True:
        call, *args = pipe.recv()
        if call == "store":
            from torch.distributed import TCPStore

            store = TCPStore(IP, 0, is_master=True, wait_for_workers=False)
            pipe.send(f"{IP}:{store.port}")
        elif call == "join":
            epoch, address, coordinator = args
            core.mailbox.connect_coordinator(coordinator)
            core.prepare(epoch, expert_map, address)
            core.enter(epoch.number)
            thread = threading.Thread(target=core.run)
            thread.start()
            pipe.send(None)
        elif call == "switch":
            epoch, address = args
            switched: Future[float] = Future()
            core.prepare(epoch, expert_map, address)
            core.arm(epoch.number, switched.set_result)
            pipe.send(switched.result(60))
        elif call == "held":
            pipe.send((len(list(Path("/proc/self/fd").iterdir())), threading.active_count()))
        elif call == "status":
            pipe.send(core.status())
        elif call == "poison":
            _poison(core, args[0])
            pipe.send(None)
        elif call == "hold":
            holds, release = _hold(core)
            pipe.send(None)
        elif call == "holds":
            pipe.send(holds.is_set())
        elif call == "release":
            release.set()
            pipe.send(None)
        elif call == "stop":
            core.stop()
            assert thread is not None
            thread.join()
            pipe.send(None)
            return


def _before_steps(core: Any, act: Callable[[Batch], None]) -> None:
    """Has ``act`` called in the place where the model computes, before each of its steps."""
    steps = core._runner.steps
    own = steps.run

    def run(batch: Batch, drawn: Any = None) -> Any:
        act(batch)
        return own(batch, drawn)

    steps.run = run


def _poison(core: Any, token: int) -> None:
    """Makes the model raise whenever ``token`` is among a step's inputs."""

    def check(batch: Batch) -> None:
        if any(token in part.tokens for part in batch.slices):
            raise RuntimeError(f"poison token {token}")

    _before_steps(core, check)


def _hold(core: Any) -> tuple[threading.Event, threading.Event]:
    """Makes the next step wait in the model: the first event says that it does, the second lets it go on."""
    holds, release = threading.Event(), threading.Event()

    def wait(_batch: Batch) -> None:
        holds.set()
        assert release.wait(60)

    _before_steps(core, wait)
    return holds, release


@dataclass
class Engine:
    process: multiprocessing.process.BaseProcess
    pipe: Connection

    def call(self, *message: Any) -> Any:
        self.pipe.send(message)
        if not self.pipe.poll(60):
            raise TimeoutError(f"no answer to {message[0]}")
        return self.pipe.recv()


@dataclass
class LocalGroup:
    engines: list[Engine]
    coordinator: Coordinator
    keys: Keys
    epoch: Epoch

    async def locate(self) -> tuple[str, str]:
        return self.coordinator.addresses()

    def status(self) -> list[dict[str, Any]]:
        return self.all("status")

    def all(self, *message: Any) -> list[Any]:
        """The answers of all engines to a message that they get at once."""
        for engine in self.engines:
            engine.pipe.send(message)
        for engine in self.engines:
            assert engine.pipe.poll(60), f"no answer to {message[0]}"
        return [engine.pipe.recv() for engine in self.engines]

    def switch(self) -> None:
        """The same members in the next epoch."""
        self.epoch = Epoch(self.epoch.number + 1, self.epoch.members)
        self.all("switch", self.epoch, self.engines[0].call("store"))
        self.coordinator.set_epoch(self.epoch)


@contextmanager
def local_group(config: EngineConfig, size: int) -> Iterator[LocalGroup]:
    """A group of ``size`` ranks on this machine, serving until the block ends."""
    keys = Keys.new()
    coordinator = Coordinator(IP, keys.server)
    context = multiprocessing.get_context("spawn")
    engines = []
    try:
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_engine, args=(theirs, rank, rank, size, config, keys), daemon=True)
            process.start()
            engines.append(Engine(process, ours))
        members = []
        for rank, engine in enumerate(engines):
            assert engine.pipe.poll(120), f"rank {rank} did not start"
            members.append(Member(rank, engine.pipe.recv(), "local"))
        epoch = Epoch(1, tuple(members))
        coordinator.set_epoch(epoch)
        store = engines[0].call("store")
        for engine in engines:
            engine.pipe.send(("join", epoch, store, coordinator.addresses()[0]))
        for engine in engines:
            assert engine.pipe.poll(60)
            engine.pipe.recv()
        yield LocalGroup(engines, coordinator, keys, epoch)
        for engine in engines:
            if engine.process.is_alive():
                engine.pipe.send(("stop",))
    finally:
        for engine in engines:
            engine.process.join(5)
            if engine.process.is_alive():
                engine.process.kill()
                engine.process.join()
        coordinator.stop()
