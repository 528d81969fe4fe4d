"""The scheduling priority of a thread that must not be in the way of others."""

from __future__ import annotations

import os
import sys

LOWEST = 19
# A tenth of the weight of those that usually run, which is what the kernel gives a nice value that is so much higher.
STEP = 10


def stand_back() -> None:
    """The calling thread, and those it starts, get from now on little more than what the cores have left over.

    A tenth of a core that is never idle remains, so that who stands back gets on however busy the others are. There is
    no way back: most systems ask for a privilege to raise a priority again, so what is urgent later must run on another
    thread. Does nothing where threads have no priorities of their own.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, 0, min(os.getpriority(os.PRIO_PROCESS, 0) + STEP, LOWEST))
