"""Every script of scripts/bench can be started: what it imports is there. Most of them need a GPU to do more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "scripts" / "bench"


def test_all_scripts_find_what_they_import() -> None:
    names = sorted(file.stem for file in BENCH.glob("*.py"))
    assert "serve" in names
    code = f"import importlib\nfor name in {names}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCH, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
