"""What the raylet starts for a rank: asks the node's zygote for the worker, and stands in for it until it ends.

    python -I -S spawn.py NAME DEVICE MODEL default_worker.py --raylet-name=... ...

Imports the standard library only, and little of that: it is what a rank waits for. See the package for the whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Within what Ray grants a worker to register (60 s by default), with time left to import everything after all.
WAIT_S = 30.0


def main(name: str, device: str, model: str, *worker: str) -> None:
    raylet = next(argument.partition("=")[2] for argument in worker if argument.startswith("--raylet-name="))
    try:
        zygote = connect(Path(raylet).with_name(name), device, model)
        zygote.settimeout(WAIT_S)
        zygote.set_inheritable(True)  # should this become the worker after all, the zygote stays for the next
        answers = zygote.makefile("r")
        if answers.readline() != "ready\n":
            raise OSError("the zygote cannot fork")
        ask(zygote, worker)
        pid = int(answers.readline())
    except (OSError, ValueError) as error:
        print(f"accordion: no fork from {name} ({error}): starting Python anew", file=sys.stderr, flush=True)
        os.execv(sys.executable, [sys.executable, *worker])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: pass_on(pid, number))
    with contextlib.suppress(ProcessLookupError):
        # Should the zygote go, the worker stays, and so does this process.
        select.select([os.pidfd_open(pid)], [], [])
    sys.exit(int(answers.readline() or 1))


def connect(path: Path, device: str, model: str) -> socket.socket:
    """A connection to the zygote at ``path``, which is started if there is none."""
    zygote = socket.socket(socket.AF_UNIX)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            zygote.connect(str(path))
            return zygote
        except OSError:
            path.unlink(missing_ok=True)
        # Bound and connected here, so that it has somebody to live for from its start.
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(64)
        zygote.connect(str(path))
        subprocess.Popen(
            [sys.executable, "-m", "actors.zygote", str(listener.fileno()), str(path), device, model],
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            preexec_fn=os.setpgrp,  # Ray ends a worker with all of its process group
        )
        listener.close()
    return zygote


def ask(zygote: socket.socket, worker: Sequence[str]) -> None:
    """Sends what makes a process this one: arguments, environment, directory, process group, standard streams."""
    place = {"environment": dict(os.environ), "directory": str(Path.cwd()), "group": os.getpgrp()}
    wanted = json.dumps({"arguments": worker} | place).encode()
    socket.send_fds(zygote, [len(wanted).to_bytes(4, "big")], [0, 1, 2])
    zygote.sendall(wanted)


def pass_on(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


if __name__ == "__main__":
    main(*sys.argv[1:])
