"""The scheduling priority of this process, lowered for a while."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LOWEST = 19


class Priority:
    """Lowers the nice value of all threads, present and to come, until it is restored.

    Where the system would not let it be restored (which takes a privilege), nothing is lowered. On Linux nice values
    belong to threads, and a new thread has that of the one that started it.
    """

    def __init__(self) -> None:
        self._usual = os.getpriority(os.PRIO_PROCESS, 0)
        self._lowered = False

    def lower(self) -> None:
        with ThreadPoolExecutor(1) as thread:
            self._lowered = thread.submit(self._can_return).result()
        if self._lowered:
            self._set(LOWEST)

    def restore(self) -> None:
        if self._lowered:
            self._set(self._usual)
            self._lowered = False

    def _can_return(self) -> bool:
        """Tried on a thread that ends at once."""
        own = threading.get_native_id()
        try:
            os.setpriority(os.PRIO_PROCESS, own, LOWEST)
            os.setpriority(os.PRIO_PROCESS, own, self._usual)
        except OSError:
            return False
        return True

    def _set(self, nice: int) -> None:
        for thread in Path("/proc/self/task").iterdir():
            try:
                os.setpriority(os.PRIO_PROCESS, int(thread.name), nice)
            except ProcessLookupError:
                continue  # it has ended
