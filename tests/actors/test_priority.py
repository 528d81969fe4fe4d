"""A thread that stands back leaves the others alone."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from actors import priority


def standing() -> tuple[int, int]:
    return os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux")
@pytest.mark.parametrize(("nice", "expected"), [(0, (os.SCHED_OTHER, 10)), (15, (os.SCHED_OTHER, 19))])
def test_one_thread_stands_back(nice: int, expected: tuple[int, int]) -> None:
    def child() -> tuple[int, int]:
        with ThreadPoolExecutor(1) as own:
            return own.submit(standing).result()

    def stand_back() -> None:
        os.setpriority(os.PRIO_PROCESS, 0, max(nice, usual[1]))
        priority.stand_back()

    usual = standing()
    if usual[1] > nice:
        pytest.skip("the tests themselves run at a low priority")
    with ThreadPoolExecutor(1, initializer=stand_back) as meek:
        assert meek.submit(standing).result() == meek.submit(child).result() == expected
        assert standing() == child() == usual
