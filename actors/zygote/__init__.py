"""One process per node that has everything imported, and forks the processes of ranks.

A rank's process spends seconds importing torch and transformers: a group that grows waits for it, and ranks that serve
on the same cores miss them. ``command`` makes Ray start a rank's worker as a fork of a process that has imported them:
a zygote, as Android and Chromium call it. The first rank on a node starts it, and it ends with the last one.

    raylet --starts--> spawn.py --asks--> zygote --forks--> Ray's worker, the rank

``spawn.py`` stays as what the raylet started, passes signals on and ends as the worker ends. Wherever anything goes
wrong it becomes the worker itself, and that one imports everything again.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

PACKAGE = Path(__file__).parent


def command(environment: Mapping[str, str], device: str, model: str) -> str:
    """What Ray shall start instead of ``python`` (``py_executable`` of a runtime environment), as a shell command.

    Ranks share a zygote when they run the same interpreter for the same ``model`` directory on the same kind of
    ``device`` with the same ``environment``, which libraries read once, when they are imported. Python and Accordion
    must stand at the same path on every node.
    """
    same = json.dumps([sys.executable, str(PACKAGE), sorted(environment.items()), device, model])
    name = f"zygote-{hashlib.sha256(same.encode()).hexdigest()[:12]}"
    return shlex.join([sys.executable, "-I", "-S", str(PACKAGE / "spawn.py"), name, device, model])
