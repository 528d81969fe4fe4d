"""The scheduling priority of a thread that must not be in the way of others."""

from __future__ import annotations

import os
import sys


def stand_back() -> None:
    """The calling thread, and those it starts, run from now on only where a core has nothing else to do.

    There is no way back: most systems ask for a privilege to raise a priority again, so what is urgent later must
    run on another thread. Does nothing where threads have no priorities of their own.
    """
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
