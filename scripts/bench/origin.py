"""Where a measurement comes from: machine, code, versions, command; what every result is stored with."""

from __future__ import annotations

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
    return {"cpu": model, "cores": cores, "memory_bytes": total, "kernel": platform.release()}


def own_versions() -> dict[str, str]:
    packages = ("accordion", "torch", "transformers", "ray")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def commit() -> str:
    asked = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return asked.stdout.strip() or "unknown"


def relative(text: str) -> str:
    """Without the directory in which this checkout happens to stand."""
    return text.replace(f"{ROOT}/", "")
