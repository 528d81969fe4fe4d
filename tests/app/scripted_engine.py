"""A group whose engines follow a script instead of a model, over real sockets.

Engine and coordinator speak ``actors.wire`` on real ROUTER and PUB sockets, in one thread. Token ``i`` of a request's
output is what ``script(prompt, i)`` says (by default its prompt over and over), whatever rank runs it, so a request
that moves must continue exactly. A step gives every running request one token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

from actors import wire
from actors.membership import Member

Script = Callable[[list[int], int], int]


def echo(prompt: list[int], index: int) -> int:
    return prompt[index % len(prompt)]


@dataclass
class Running:
    client: bytes
    submit: wire.Submit
    count: int
    reported: int = 0


@dataclass
class Engine:
    rank: int
    socket: zmq.Socket
    member: Member
    epoch: int
    submits: list[wire.Submit] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    beats: int = 0
    running: dict[str, Running] = field(default_factory=dict)
    deaf: bool = False  # hears and says nothing
    held: bool = False  # accepts requests but makes no step
    refuse: wire.Failure | None = None  # answer to every submit
    lose: int = 0  # so many next outputs get lost


class ScriptedGroup:
    """``engines`` by rank; the view is published whenever it changes. Use as a context manager."""

    def __init__(self, ranks: int = 2, step_s: float = 0.001, script: Script = echo, tokens_per_step: int = 1) -> None:
        self.step_s = step_s
        self.script = script
        self.tokens_per_step = tokens_per_step
        self.first_requests: list[wire.FirstRequest] = []
        self.lookups = 0
        self.paused = False
        self.wave = 1
        self.epoch = 1
        self.step = 0
        self.silent = False  # the coordinator says nothing
        self.loads: dict[int, wire.Load] = {}
        self.leaving: list[int] = []
        self.views = 0
        self._context = zmq.Context()
        self._lock = threading.RLock()
        self._stop = False
        self.engines: dict[int, Engine] = {}
        self.members: list[Member] = []
        self._open_coordinator()
        for rank in range(ranks):
            self.add(rank)
        self._publish_due = True
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> ScriptedGroup:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop = True
        self._thread.join()
        self._context.destroy(linger=0)

    # --- what tests call ----------------------------------------------------------------------------------------

    def add(self, rank: int) -> Engine:
        """An engine that is in no epoch's view yet, unless before the start."""
        with self._lock:
            socket = self._context.socket(zmq.ROUTER)
            socket.bind("tcp://127.0.0.1:0")
            member = Member(rank, socket.last_endpoint.decode(), "node")
            self.engines[rank] = Engine(rank, socket, member, self.epoch)
            if not hasattr(self, "_thread"):
                self.members.append(member)
            return self.engines[rank]

    def change(self, ranks: list[int], engines_too: bool = True, view_too: bool = True) -> None:
        """Begins the next epoch with these ranks; by default engines and view switch together."""
        with self._lock:
            if engines_too:
                for rank in ranks:
                    self.engines[rank].epoch = self.epoch + 1
            if view_too:
                self.epoch += 1
                self.leaving = []
                self.members = [self.engines[rank].member for rank in ranks]
                self._publish_due = True

    def leave(self, ranks: list[int]) -> None:
        """These ranks are to get nothing new in this epoch; [] takes it back."""
        with self._lock:
            self.leaving = ranks
            self._publish_due = True

    def send_view(self, view: wire.View) -> None:
        """Publishes something else than the present state: an older view, say."""
        with self._lock:
            self._publisher.send(wire.encode(view))

    def publish(self) -> None:
        with self._lock:
            self._publish_due = True

    def pause(self) -> None:
        with self._lock:
            self.paused = True
            self.wave += 1
            self._publish_due = True

    def replace_coordinator(self) -> None:
        with self._lock:
            self._router.close(linger=0)
            self._publisher.close(linger=0)
            self.views = 0
            self._open_coordinator()

    async def locate(self) -> tuple[str, str]:
        with self._lock:
            return self.addresses

    def wait(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true"
            time.sleep(0.002)

    @property
    def submits(self) -> list[wire.Submit]:
        return [submit for engine in self.engines.values() for submit in engine.submits]

    @property
    def aborted(self) -> list[str]:
        """Every abort that came. An output that crossed an abort makes the client send it once more."""
        return [request for engine in self.engines.values() for request in engine.aborted]

    # --- the thread ---------------------------------------------------------------------------------------------

    def _open_coordinator(self) -> None:
        self._router = self._context.socket(zmq.ROUTER)
        self._publisher = self._context.socket(zmq.PUB)
        for socket in (self._router, self._publisher):
            socket.bind("tcp://127.0.0.1:0")
        self.addresses = (self._router.last_endpoint.decode(), self._publisher.last_endpoint.decode())

    def _run(self) -> None:
        due = 0.0
        while not self._stop:
            with self._lock:
                self._hear_coordinator()
                for engine in self.engines.values():
                    self._hear(engine)
                if self._publish_due and not self.silent:
                    self._publisher.send(wire.encode(self.view()))
                    self._publish_due = False
                if time.monotonic() >= due:
                    due = time.monotonic() + self.step_s
                    self._step_all()
            time.sleep(0.0005)

    def view(self) -> wire.View:
        self.views += 1
        loads = list(self.loads.values())
        return wire.View(
            self.epoch, list(self.members), self.wave, not self.paused, loads, list(self.leaving), number=self.views
        )

    def _hear_coordinator(self) -> None:
        for identity, frame in _frames(self._router):
            message = wire.to_coordinator(frame)
            if isinstance(message, wire.FirstRequest):
                self.first_requests.append(message)
                if self.paused:
                    self.paused = False
                    self._publish_due = True
            elif isinstance(message, wire.Lookup) and not self.silent:
                self.lookups += 1
                self._router.send_multipart([identity, wire.encode(self.view())])

    def _hear(self, engine: Engine) -> None:
        if engine.deaf:
            return
        for identity, frame in _frames(engine.socket):
            message = wire.to_engine(frame)
            if isinstance(message, wire.Attach):
                self._send(engine, identity, wire.Attached(engine.epoch, engine.rank, self.wave, not self.paused))
            elif isinstance(message, wire.Beat):
                engine.beats += 1
                self._send(engine, identity, wire.Beat(engine.epoch))
            elif isinstance(message, wire.Abort):
                engine.aborted += message.request_ids
                for request_id in message.request_ids:
                    engine.running.pop(request_id, None)
            else:
                self._take(engine, identity, message)

    def _take(self, engine: Engine, identity: bytes, submit: wire.Submit) -> None:
        engine.submits.append(submit)
        failure = engine.refuse
        if submit.epoch != engine.epoch:
            failure = wire.Failure("stale_epoch", f"this is {engine.epoch}")
        if failure is not None:
            delta = wire.Delta(submit.request_id, len(submit.generated), [], finish="error", failure=failure)
            self._send(engine, identity, wire.Outputs(engine.epoch, engine.rank, self.wave, self.step, [delta]))
            return
        engine.running[submit.request_id] = Running(identity, submit, len(submit.generated))

    def _step_all(self) -> None:
        if self.paused:
            return
        self.step += 1
        for engine in self.engines.values():
            if engine.deaf or engine.held:
                continue
            by_client: dict[bytes, list[wire.Delta]] = {}
            for request in list(engine.running.values()):
                by_client.setdefault(request.client, []).append(self._advance(engine, request))
            for client, deltas in by_client.items():
                if engine.lose:
                    engine.lose -= 1
                    continue
                self._send(engine, client, wire.Outputs(engine.epoch, engine.rank, self.wave, self.step, deltas))

    def _advance(self, engine: Engine, request: Running) -> wire.Delta:
        submit, sampling = request.submit, request.submit.sampling
        delta = wire.Delta(submit.request_id, request.count, [])
        if sampling.logprobs is not None:
            delta.logprobs = []
        for _ in range(self.tokens_per_step):
            token = self.script(submit.prompt, request.count)
            request.count += 1
            delta.tokens.append(token)
            if delta.logprobs is not None:
                others = [(token + 1 + i, -2.0 - i) for i in range(max(0, (sampling.logprobs or 0) - 1))]
                top = [(token, -0.5), *others] if sampling.logprobs else []
                delta.logprobs.append(wire.TokenLogprobs(-0.5, top))
            if token in sampling.eos_token_ids or token in sampling.stop_token_ids:
                delta.finish = "stop"
                delta.stop_token = token if token in sampling.stop_token_ids else None
            elif request.count >= sampling.max_tokens:
                delta.finish = "length"
            if delta.finish is not None:
                del engine.running[submit.request_id]
                break
        return delta

    def _send(self, engine: Engine, identity: bytes, message: wire.FromEngine) -> None:
        engine.socket.send_multipart([identity, wire.encode(message)])


def _frames(socket: zmq.Socket) -> list[list[bytes]]:
    frames = []
    while True:
        try:
            frames.append(socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return frames
