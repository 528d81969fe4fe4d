"""How an actor's process logs: the time, what is said, and who says it."""

from __future__ import annotations

import logging


def begin(name: str) -> None:
    """All that this process logs from now on names the actor."""
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s %(levelname)s {name}: %(message)s", force=True)
