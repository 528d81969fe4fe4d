"""What a served application occupies, as Ray's dashboard and /proc show it; and what only its front-ends know.

A front-end's own port is found among the sockets of its process: behind the proxy a question reaches any of them, but
their counters are their own. Where there is no dashboard, or it is another machine's, less is known; nothing fails.
"""

from __future__ import annotations

import contextlib
import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Serve's range for the ports of replicas behind HAProxy.
REPLICA_PORTS = range(30000, 31000)
LISTEN = "0A"
REPLAYED = re.compile(r"^accordion_requests_replayed_total(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


class Footprint:
    """``url`` is the application's, ``dashboard`` Ray's; ``here``: its processes run on this machine."""

    def __init__(self, url: str, dashboard: str | None, here: bool) -> None:
        self._url = url
        self._dashboard = dashboard
        self._here = here

    def replayed(self) -> dict[str, float]:
        """Requests replayed so far, by front-end (by its address)."""
        found = {}
        for address in self._front_ends() or [self._url]:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/metrics", timeout=5) as answer:
                found[address] = sum(float(value) for value in REPLAYED.findall(answer.read().decode()))
        return found

    def counts(self) -> dict[str, float]:
        """Everything that could leak, by name."""
        counts: dict[str, float] = {}
        if (groups := self._list("placement_groups")) is not None:
            counts["placement groups"] = len(groups)
        if not self._here:
            return counts
        counts["files in /dev/shm"] = len(list(Path("/dev/shm").iterdir()))
        kinds: dict[str, list[int]] = {}
        for name, pid in self._actors().items():
            if kind := _kind(name):
                kinds.setdefault(kind, []).append(pid)
        counts["processes of ranks"] = sum(len(pids) for kind, pids in kinds.items() if kind.startswith("dp_rank_"))
        for kind, pids in sorted(kinds.items()):
            # Of ranks only the first one stays through all sizes.
            if kind.startswith("dp_rank_") and kind != "dp_rank_0":
                continue
            files = [link for pid in pids for link in _open_files(pid)]
            counts[f"{kind}: sockets"] = sum(link.startswith("socket:") for link in files)
            counts[f"{kind}: open files"] = len(files)
            counts[f"{kind}: threads"] = sum(_status(pid, "Threads") for pid in pids)
            counts[f"{kind}: memory, MiB"] = round(sum(_status(pid, "VmRSS") for pid in pids) / 1024)
        return counts

    def _front_ends(self) -> list[str]:
        if not self._here:
            return []
        pids = [pid for name, pid in self._actors().items() if _kind(name) == "front-ends"]
        ports = sorted({port for pid in pids for port in _listening(pid) if port in REPLICA_PORTS})
        return [f"http://127.0.0.1:{port}" for port in ports]

    def _actors(self) -> dict[str, int]:
        return {actor["name"]: actor["pid"] for actor in self._list("actors") or () if actor.get("name")}

    def _list(self, what: str) -> list[dict[str, Any]] | None:
        """Live ones, or None where the dashboard does not tell."""
        if self._dashboard is None:
            return None
        # Ended actors stay listed for long, and would fill the answer.
        live = {"actors": ("ALIVE",), "placement_groups": ("PENDING", "CREATED", "RESCHEDULING")}[what]
        found = []
        for state in live:
            query = f"limit=1000&detail=1&filter_keys=state&filter_predicates=%3D&filter_values={state}"
            try:
                with urllib.request.urlopen(f"{self._dashboard}/api/v0/{what}?{query}", timeout=10) as answer:
                    found += json.load(answer)["data"]["result"]["result"]
            except (OSError, ValueError, KeyError, TypeError):
                return None
        return found


def _kind(name: str) -> str | None:
    if name.startswith("SERVE_REPLICA::"):
        return "front-ends"
    if name.startswith("dp_rank_"):
        return name
    return next((kind for kind in ("manager", "coordinator") if name.endswith(f"::{kind}")), None)


def _open_files(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                yield str(entry.readlink())


def _status(pid: int, field: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1])
    return 0


def _listening(pid: int) -> Iterator[int]:
    """Ports of TCP sockets on which the process listens."""
    sockets = {link[len("socket:[") : -1] for link in _open_files(pid) if link.startswith("socket:[")}
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()  # 1: local address, 3: state, 9: inode
                if fields[3] == LISTEN and fields[9] in sockets:
                    yield int(fields[1].rpartition(":")[2], 16)
