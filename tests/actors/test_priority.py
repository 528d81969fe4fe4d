"""A thread that stands back leaves the others alone."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from actors import priority


@pytest.mark.skipif(sys.platform != "linux", reason="threads have policies of their own on Linux")
def test_one_thread_stands_back() -> None:
    def policy() -> int:
        return os.sched_getscheduler(0)

    def child() -> int:
        with ThreadPoolExecutor(1) as own:
            return own.submit(policy).result()

    usual = policy()
    with ThreadPoolExecutor(1, initializer=priority.stand_back) as meek:
        assert meek.submit(policy).result() == meek.submit(child).result() == os.SCHED_IDLE
        assert policy() == child() == usual
