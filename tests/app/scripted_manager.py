"""A manager that does what the test says, as ``app.operations.Group``: what front-ends see of the real one."""

import asyncio
import threading
import time

from app.errors import Unavailable


class ScriptedManager:
    """Operations run from ``scale_elastic_ep`` until ``finish`` or ``roll_back``; with ``auto`` they go through those
    phases by themselves. ``asked`` are the calls that came, ``begun`` the ids of operations that began."""

    def __init__(self, size=2, auto=()):
        self.size = size
        self.wanted = size
        self.epoch = 1
        self.auto = auto
        self.absent = False
        self.refuse = None
        self.phase, self.cause, self.declared_refusal = "serving", "", ""
        self.imbalance = None
        self.asked = []
        self.begun = []
        self.version = 0
        self.operation = None
        self.totals = {"operations": {"done": 0, "rolled_back": 0}, "experts_moved": 0, "pause_s_max": 0.0}
        self._known = {}
        self._lock = threading.RLock()

    # --- what front-ends ask ----------------------------------------------------------------------------------------

    async def scale_elastic_ep(self, size, drain_timeout_s, operation_id, retire):
        return self._admit(operation_id, "scale", size, (size, drain_timeout_s, operation_id, retire))

    async def rebalance_experts(self, operation_id):
        return self._admit(operation_id, "rebalance", self.size, (operation_id,))

    async def cancel(self, operation_id):
        self._there()
        if operation_id not in self._known:
            return {"refused": "invalid", "message": f"there is no operation {operation_id}"}
        if not self._known[operation_id]["done"]:
            self.roll_back("aborting", "cancelled")
        return self._known[operation_id]

    async def status(self):
        self._there()
        return self._status()

    async def watch(self, version):
        while self.version == version or self.absent:
            await asyncio.sleep(0.002)
        return self._status()

    # --- what tests do ----------------------------------------------------------------------------------------------

    def step(self, phase, progress="", **fields):
        with self._lock:
            self.operation.update(phase=phase, progress=progress, **fields)
            self.operation["seconds"].setdefault(phase, 0.5)
            self.version += 1

    def finish(self, **fields):
        with self._lock:
            self.size = self.operation["to_size"]
            self.epoch += 1
            self.totals["operations"]["done"] += 1
            self.step("idle", epoch=self.epoch, done=True, **fields)

    def roll_back(self, phase, cause):
        with self._lock:
            self.wanted = self.size
            self.totals["operations"]["rolled_back"] += 1
            self.step("idle", error=cause, failed_phase=phase, done=True)

    def replace(self):
        """A successor that knows the group, and nothing of former operations."""
        with self._lock:
            self.operation = None
            self._known = {}
            self.version += 1

    def wait(self, condition, timeout_s=10.0):
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true"
            time.sleep(0.002)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _there(self):
        if self.absent:
            raise Unavailable("The manager has not answered for 30 s.")

    def _admit(self, operation_id, kind, size, call):
        self._there()
        with self._lock:
            self.asked.append((kind, *call))
            if operation_id in self._known:
                return self._known[operation_id]
            if self.refuse is not None:
                return self.refuse
            if self.operation is not None and not self.operation["done"]:
                return {"refused": "busy", "message": f"operation {self.operation['id']} is {self.operation['phase']}"}
            if kind == "scale" and size == self.size:
                return {"refused": "invalid", "message": f"the group has {size} ranks already"}
            self._begin(operation_id, kind, size)
            return dict(self.operation, seconds={})

    def _begin(self, operation_id, kind, size):
        self.operation = self._known[operation_id] = {
            "id": operation_id,
            "kind": kind,
            "phase": "placing",
            "progress": "",
            "from_size": self.size,
            "to_size": size,
            "epoch": self.epoch,
            "done": False,
            "error": "",
            "failed_phase": "",
            "seconds": {},
            "pause_s": 0.0,
            "experts_moved": 0,
        }
        self.begun.append(operation_id)
        self.wanted = size
        self.version += 1
        if self.auto:
            threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        for phase in self.auto:
            self.step(phase, f"now {phase}")
            time.sleep(0.05)
        self.finish(pause_s=0.012, experts_moved=3)

    def _status(self):
        with self._lock:
            return {
                "phase": self.phase,
                "cause": self.cause,
                "detail": f"{self.size} ranks in epoch {self.epoch}",
                "version": self.version,
                "epoch": self.epoch,
                "data_parallel_size": self.size,
                "wanted_data_parallel_size": self.wanted,
                "refused": self.declared_refusal,
                "ranks": [],
                "imbalance": self.imbalance,
                "operation": None
                if self.operation is None
                else dict(self.operation, seconds=dict(self.operation["seconds"])),
                "totals": self.totals,
            }
