"""The scheduling priority of a thread that must not be in the way of others."""

from __future__ import annotations

import os
import sys

LOWEST = 19
# Ray starts its workers at 15 unless told otherwise, which is next to 19 already.
LOW = 10


def stand_back() -> None:
    """The calling thread, and those it starts, get from now on little more than what the cores have left over.

    There is no way back: most systems ask for a privilege to raise a priority again, so what is urgent later must
    run on another thread. Does nothing where threads have no priorities of their own.
    """
    if sys.platform != "linux":
        return
    # Either leaves a share of a core that is never idle, so that who stands back gets on: a thirteenth of one beside
    # threads of nice 15, a seventieth beside those of nice 0, where SCHED_IDLE would leave a three hundredth.
    if os.getpriority(os.PRIO_PROCESS, 0) > LOW:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.setpriority(os.PRIO_PROCESS, 0, LOWEST)
