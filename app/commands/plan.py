"""``accordion plan``: where ranks would be placed."""

from __future__ import annotations

import argparse
import logging
import os
import socket
from pathlib import Path
from typing import Any

import msgspec

from app.commands import CommandError
from placement import snapshot
from placement.planner import NoFit, plan
from placement.request import STRATEGIES, Request
from placement.snapshot import Snapshot


def add(commands: Any) -> None:
    command = commands.add_parser(
        "plan",
        help="show where ranks would be placed, and place nothing",
        description="Shows which node each DP rank would be placed on, or why they do not fit. Places nothing. "
        "Fields given here replace those of --config. Exit status: 0 they fit, 1 they do not, 2 it is unknown.",
    )
    command.set_defaults(run=_plan)
    command.add_argument("--config", metavar="FILE", help="Serve config file of the application")
    command.add_argument("--application", metavar="NAME", help="which application of --config, if it has several")
    where = command.add_mutually_exclusive_group()
    where.add_argument("--address", help="Ray cluster to plan on (default: $RAY_ADDRESS, else the one on this machine)")
    where.add_argument(
        "--snapshot", metavar="FILE", help="plan on a saved cluster instead: the output of an earlier `plan --json`"
    )
    command.add_argument("--json", action="store_true", help="print JSON (with the cluster) instead of a table")
    fields = command.add_argument_group("fields")
    fields.add_argument("--data-parallel-size", type=int, metavar="N", help="DP ranks")
    fields.add_argument(
        "--data-parallel-size-local",
        type=int,
        metavar="N",
        help="DP ranks on the head node (strict: on each node used)",
    )
    fields.add_argument("--tensor-parallel-size", type=int, metavar="N", help="devices per rank")
    fields.add_argument("--device", choices=("cpu", "cuda"), help="what ranks compute on")
    fields.add_argument("--cpus-per-rank", type=int, metavar="N", help="CPUs of a CPU rank's bundle")
    fields.add_argument("--pack-strategy", choices=STRATEGIES, help="how ranks are spread over nodes")
    fields.add_argument("--nodes", metavar="A,B,...", help="nodes that may be used: node ids, IPs, label=value")


def _plan(options: argparse.Namespace) -> int:
    request = _request(options)
    cluster = _saved(options.snapshot) if options.snapshot else _live(options.address)
    answer = plan(cluster, request)
    refused = isinstance(answer, NoFit)
    if options.json:
        document = {"fits": not refused, "request": request, "snapshot": cluster}
        document["refusal" if refused else "plan"] = answer
        print(msgspec.json.format(msgspec.json.encode(document)).decode())
    else:
        print(answer)
    return 1 if refused else 0


def _request(options: argparse.Namespace) -> Request:
    fields: dict[str, Any] = {}
    if options.config:
        from app.config import load  # reads the model's configuration with transformers, which takes seconds to import

        try:
            fields = msgspec.structs.asdict(load(options.config, options.application).placement_request())
        except (OSError, ValueError) as error:
            raise CommandError(f"--config {options.config}: {error}") from error
    elif options.data_parallel_size is None:
        raise CommandError("plan: say what to place with --config, or with --data-parallel-size and other fields")
    given = {
        "data_parallel_size": options.data_parallel_size,
        "data_parallel_size_local": options.data_parallel_size_local,
        "world_size": options.tensor_parallel_size,
        "device": {"cpu": "CPU", "cuda": "GPU"}.get(options.device),
        "devices_per_bundle": options.cpus_per_rank,
        "strategy": options.pack_strategy,
        "nodes": tuple(options.nodes.split(",")) if options.nodes else None,
    }
    try:
        return Request(**fields | {name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise CommandError(str(error)) from error


def _saved(path: str) -> Snapshot:
    try:
        text = Path(path).read_bytes()
        return msgspec.json.decode(text, type=_Document).snapshot
    except (OSError, msgspec.MsgspecError) as error:
        raise CommandError(f"--snapshot {path}: {error}; give a file that `accordion plan --json` wrote") from error


class _Document(msgspec.Struct):
    """The part of the JSON output that another plan needs."""

    snapshot: Snapshot


def _live(address: str | None) -> Snapshot:
    import ray

    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    try:
        if address != "auto":
            _knock(address)
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise CommandError(
            f"no Ray cluster at {address}: {error}\nStart one (`ray start --head`), name one with --address, or plan "
            "on a saved --snapshot."
        ) from error
    try:
        return snapshot.take()
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raises OSError or ValueError unless something listens there: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdecimal():
        raise ValueError("expected host:port of the cluster's GCS, such as 10.0.0.1:6379")
    socket.create_connection((host, int(port)), timeout=5).close()
