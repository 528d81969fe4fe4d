"""Who uses the processors during a span: CPU seconds by kind of process, and the share of it that GPUs were busy."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

# The first samples, a second's, are of periods that began before.
_OLD = 5
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Usage:
    """From ``start`` to ``stop``, of the processes with the ids that ``members`` names, and of this one: the load."""

    def __init__(self, members: list[int]) -> None:
        self._before = {pid: spent for pid, (_, spent) in _spent(members).items()}
        self._own = time.process_time()
        self._started = time.perf_counter()
        self._gpu = None
        if shutil.which("nvidia-smi"):
            # The driver's own counter: the share of each of its periods in which a kernel ran.
            query = ["--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits"]
            command = ["nvidia-smi", *query, "--loop-ms=200"]
            self._gpu = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def stop(self, members: list[int]) -> dict[str, Any]:
        """``cores``: by kind, CPU seconds per second; ``gpu_busy``: a share for each GPU, empty without one."""
        seconds = time.perf_counter() - self._started
        cores: dict[str, float] = {}
        for pid, (kind, spent) in _spent(members).items():
            cores[kind] = cores.get(kind, 0.0) + (spent - self._before.get(pid, 0.0)) / seconds
        cores["load generator"] = (time.process_time() - self._own) / seconds
        busiest = sorted(((kind, used) for kind, used in cores.items() if used >= 0.01), key=lambda pair: -pair[1])
        return {"seconds": seconds, "cores": dict(busiest), "gpu_busy": self._busy()}

    def _busy(self) -> dict[str, float]:
        if self._gpu is None:
            return {}
        self._gpu.terminate()
        samples: dict[str, list[float]] = {}
        for line in self._gpu.communicate()[0].splitlines():
            index, _, share = line.partition(",")
            with contextlib.suppress(ValueError):
                samples.setdefault(index, []).append(float(share) / 100)
        return {index: sum(shares[_OLD:]) / len(shares[_OLD:]) for index, shares in samples.items() if shares[_OLD:]}


def text(usage: dict[str, Any]) -> str:
    gpus = ", ".join(f"GPU {index} busy {share:.1%}" for index, share in usage["gpu_busy"].items())
    cores = ", ".join(f"{kind} {used:.2f}" for kind, used in usage["cores"].items())
    return f"{gpus + '; ' if gpus else ''}cores used: {cores}"


def _spent(members: list[int]) -> dict[int, tuple[str, float]]:
    """By process id what it calls itself, and its CPU seconds so far."""
    found: dict[int, tuple[str, float]] = {}
    for pid in members:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            words = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").split()
            kind = Path(words[0]).name if words else "?"
            found[pid] = kind, (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return found
