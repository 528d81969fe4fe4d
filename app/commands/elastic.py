"""``accordion scale``, ``rebalance``, ``cancel`` and ``status``: a running group from the command line.

They work as Ray jobs, too: ``ray job submit -- accordion scale 3``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.commands import CommandError
from app.elastic import ElasticClient, Progress, Refused, RolledBack, Unreachable
from app.operations import PHASES

URL = "http://127.0.0.1:8000"
STEPS = [phase for phase in PHASES if phase not in ("idle", "aborting")]
EXIT = "Exit status: 0 done, 1 refused or rolled back, 2 the server could not be asked."


def add(commands: Any) -> None:
    scale = _command(commands, "scale", _scale, "change the number of DP ranks of a running group")
    scale.add_argument("size", type=int, metavar="N", help="DP ranks to have")
    scale.add_argument(
        "--drain-timeout",
        type=float,
        metavar="S",
        help="longest wait for running requests of leaving ranks, in seconds",
    )
    scale.add_argument("--retire", type=_ranks, metavar="A,B,...", help="ranks that leave (default: the highest)")
    scale.add_argument("--no-wait", action="store_true", help="return as soon as it has begun")
    rebalance = _command(commands, "rebalance", _rebalance, "re-place experts by their measured load")
    rebalance.add_argument("--no-wait", action="store_true", help="return as soon as it has begun")
    cancel = _command(commands, "cancel", _cancel, "roll back the operation that runs")
    cancel.add_argument("operation", nargs="?", metavar="ID", help="operation to cancel (default: the one that runs)")
    status = _command(commands, "status", _status, "show the size of the group and what is being done to it")
    status.add_argument("--json", action="store_true", help="print the server's answer as it is")


def _command(
    commands: Any, name: str, run: Callable[[ElasticClient, argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text.capitalize()}. {EXIT}")
    command.set_defaults(run=lambda options: _answered(run, options))
    command.add_argument("--url", help=f"root of the server (default: $ACCORDION_URL, else {URL})")
    command.add_argument(
        "--admin-key-file", metavar="FILE", help="file with the server's admin key (default: $ACCORDION_ADMIN_KEY)"
    )
    return command


def _answered(run: Callable[[ElasticClient, argparse.Namespace], None], options: argparse.Namespace) -> int:
    try:
        client = ElasticClient(options.url or os.environ.get("ACCORDION_URL") or URL, _key(options.admin_key_file))
    except ValueError as error:
        raise CommandError(str(error)) from error
    try:
        run(client, options)
    except (Refused, RolledBack) as error:
        print(f"accordion: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except Unreachable as error:
        raise CommandError(f"{error}\nName the server with --url or $ACCORDION_URL.") from error
    return 0


def _key(path: str | None) -> str | None:
    if path is None:
        return os.environ.get("ACCORDION_ADMIN_KEY") or None
    try:
        return Path(path).expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--admin-key-file {path}: {error}") from error


def _ranks(text: str) -> list[int]:
    try:
        return [int(rank) for rank in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected ranks with commas between them, such as 0,2") from None


def _scale(client: ElasticClient, options: argparse.Namespace) -> None:
    def ask(id_: str, on_progress: Progress) -> dict[str, Any]:
        return client.scale_elastic_ep(
            options.size,
            options.drain_timeout,
            options.retire,
            on_progress=on_progress,
            operation_id=id_,
            wait=not options.no_wait,
        )

    _follow(ask)


def _rebalance(client: ElasticClient, options: argparse.Namespace) -> None:
    _follow(lambda id_, on_progress: client.rebalance_experts(on_progress, id_, wait=not options.no_wait))


def _cancel(client: ElasticClient, options: argparse.Namespace) -> None:
    print(client.cancel(options.operation)["message"])


def _status(client: ElasticClient, options: argparse.Namespace) -> None:
    status = client.status()
    if options.json:
        print(json.dumps(status, indent=2))
        return
    size, wanted = status["data_parallel_size"], status["wanted_data_parallel_size"]
    print(f"{size} ranks{'' if size == wanted else f' of {wanted} wanted'}, epoch {status['epoch']}: {status['phase']}")
    if status["progress"]:
        print(status["progress"])
    if status["error"]:
        print(f"error: {status['error']}")
    operation = status["operation"]
    if operation is not None:
        seconds = ", ".join(f"{phase} {took:.1f} s" for phase, took in operation["seconds"].items())
        print(f"{operation['kind']} {operation['from_size']} -> {operation['to_size']} ({operation['id']}), {seconds}")
        print(f"{_state(operation)}; longest pause {operation['pause_s'] * 1000:.0f} ms")


def _state(operation: dict[str, Any]) -> str:
    if not operation["done"]:
        return "running"
    return f"rolled back in {operation['failed_phase']}" if operation["error"] else "done"


def _follow(ask: Callable[[str, Progress], dict[str, Any]]) -> None:
    id_ = f"op-{uuid.uuid4().hex[:12]}"
    progress = _Bar() if sys.stderr.isatty() else _Lines()
    try:
        result = ask(id_, progress)
    except KeyboardInterrupt:
        progress.close()
        print(
            f"accordion: not waiting any longer; operation {id_} goes on: see `accordion status`, stop it with "
            f"`accordion cancel {id_}`",
            file=sys.stderr,
        )
        raise
    finally:
        progress.close()
    print(result["message"])


class _Lines:
    """A line for each change, for logs."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, status: dict[str, Any]) -> None:
        line = _line(status)
        if line != self._last:
            print(line, flush=True)
        self._last = line

    def close(self) -> None:
        pass


class _Bar:
    """How far along its phases an operation is."""

    def __init__(self) -> None:
        from tqdm import tqdm

        # tqdm shows nothing on a terminal that does not know its size; this falls back to a usual one.
        size = shutil.get_terminal_size()
        form = "|{bar:20}| {elapsed} {desc}"
        self._bar = tqdm(total=len(STEPS), bar_format=form, leave=False, ncols=size.columns, nrows=size.lines)

    def __call__(self, status: dict[str, Any]) -> None:
        phase = status["phase"]
        if phase in STEPS:  # an operation may skip some
            self._bar.n = max(self._bar.n, STEPS.index(phase))
        self._bar.set_description_str(_line(status))

    def close(self) -> None:
        self._bar.close()


def _line(status: dict[str, Any]) -> str:
    return f"{status['phase']}: {status['progress']}" if status["progress"] else str(status["phase"])
