"""The zygote's loop: forks for whoever connects, and tells each of the end of its fork."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(eq=False)
class Fork:
    """A connection, and the process forked for it once it has said which."""

    connection: socket.socket
    pid: int | None = None
    watch: int | None = None  # a descriptor that tells of the process's end

    def close(self) -> None:
        self.connection.close()
        if self.watch is not None:
            os.close(self.watch)


class Server:
    """Serves the Unix socket ``fd``, bound to ``path`` by who started this process and is connected there already."""

    def __init__(self, fd: int, path: Path) -> None:
        self._listener = socket.socket(fileno=fd)
        self._listener.setblocking(False)
        self._path = path
        self._forks: set[Fork] = set()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def serve(self) -> list[str] | None:
        """Forks until nobody is connected any more. In a fork it returns the arguments of the program to run."""
        while True:
            for key, _ in self._selector.select():
                fork: Fork | None = key.data
                if fork is None:
                    self._accept()
                elif fork not in self._forks:
                    pass  # dropped by the event before
                elif key.fd == fork.watch:
                    self._end(fork)
                elif fork.pid is None:
                    arguments = self._fork(fork)
                    if arguments is not None:
                        return arguments
                else:
                    # Who stood in for it is gone, so nobody would miss it.
                    self._selector.unregister(fork.connection)
                    os.kill(fork.pid, signal.SIGKILL)
            if not self._forks and self._closed():
                return None

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        fork = Fork(connection)
        self._forks.add(fork)
        self._selector.register(connection, selectors.EVENT_READ, fork)
        self._tell(fork, "ready")

    def _fork(self, fork: Fork) -> list[str] | None:
        try:
            wanted, streams = _receive(fork.connection)
        except (OSError, EOFError):
            self._drop(fork)
            return None
        pid = os.fork()
        if pid == 0:
            self._selector.close()
            self._listener.close()
            for other in self._forks:
                other.close()
            return _become(wanted, streams)
        for stream in streams:
            os.close(stream)
        fork.pid, fork.watch = pid, os.pidfd_open(pid)
        self._selector.register(fork.watch, selectors.EVENT_READ, fork)
        self._tell(fork, str(pid))
        return None

    def _end(self, fork: Fork) -> None:
        assert fork.pid is not None
        _, status = os.waitpid(fork.pid, 0)
        self._tell(fork, str(os.waitstatus_to_exitcode(status) % 256))
        self._drop(fork)

    def _drop(self, fork: Fork) -> None:
        for end in (fork.connection, fork.watch):
            with contextlib.suppress(KeyError):
                if end is not None:
                    self._selector.unregister(end)
        fork.close()
        self._forks.remove(fork)

    @staticmethod
    def _tell(fork: Fork, word: str) -> None:
        with contextlib.suppress(OSError):
            fork.connection.sendall(f"{word}\n".encode())

    def _closed(self) -> bool:
        """Gives up the socket, unless somebody has connected meanwhile. Whoever connects holds the same lock."""
        with self._path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                self._accept()
            except BlockingIOError:
                self._path.unlink()
                return True
            return False


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What ``spawn.ask`` sent. Raises EOFError when the other side is gone."""
    connection.settimeout(5.0)
    header, streams, _, _ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as incoming:
        size = int.from_bytes(header, "big")
        body = incoming.read(size)
    if len(header) < 4 or len(body) < size or len(streams) != 3:
        raise EOFError
    wanted: dict[str, Any] = json.loads(body)
    return wanted, streams


def _become(wanted: dict[str, Any], streams: list[int]) -> list[str]:
    """Takes the place of who asked, environment and all; the arguments of the program to run."""
    with contextlib.suppress(OSError):  # it has ended meanwhile
        os.setpgid(0, wanted["group"])
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    os.chdir(wanted["directory"])
    os.environ.clear()
    os.environ.update(wanted["environment"])
    arguments: list[str] = wanted["arguments"]
    return arguments
