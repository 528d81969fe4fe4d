"""Where a measurement comes from: machine, code, versions, command; what every result is stored with."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def origin() -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": relative(shlex.join([Path(sys.executable).name, *sys.argv])),
        "commit": commit(),
        "hardware": hardware(),
        "versions": own_versions(),
    }


def hardware() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    cores = len(os.sched_getaffinity(0))
    known = {"cpu": model, "cores": cores, "memory_bytes": total, "kernel": platform.release()}
    if gpus := _gpus():
        known["gpus"] = gpus
    return known


def _gpus() -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        asked = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        return [line.split(" (")[0] for line in asked.stdout.splitlines()]
    return []


def own_versions() -> dict[str, str]:
    known = {"python": platform.python_version()}
    for name in ("accordion", "torch", "transformers", "ray", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            known[name] = importlib.metadata.version(name)
    return known


def commit() -> str:
    with contextlib.suppress(FileNotFoundError):
        asked = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        return asked.stdout.strip() or "unknown"
    return "unknown"


def relative(text: str) -> str:
    """Without the directory in which this checkout happens to stand."""
    return text.replace(f"{ROOT}/", "")
