"""What holds for every test: Ray clusters of the tests stand apart from any other on the machine."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Set before anything imports Ray. A short path, because Ray puts Unix sockets under it (107 characters at most); one
# of our own, because a bare ``ray.init()`` elsewhere joins whatever cluster the default directory names.
_ray_files = tempfile.mkdtemp(prefix="acc-", dir="/tmp")
os.environ["RAY_TMPDIR"] = _ray_files
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("RAY_ADDRESS", None)
# Before anything imports Triton, which transformers does: without a GPU its kernels are interpreted.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# How long an example takes depends on the machine and on what else it does.
settings.register_profile("accordion", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("accordion")


def pytest_sessionfinish(session: pytest.Session) -> None:
    shutil.rmtree(Path(_ray_files), ignore_errors=True)
