"""Operations on the running group, as front-ends offer them: scale, rebalance, cancel, look.

One path for HTTP and for the deployment handle. It knows neither Ray nor HTTP: ``Group`` is the manager as it is asked
here. The manager carries an operation out whether or not anybody waits for it. Every operation has an id before the
manager hears of it, so that whoever lost an answer asks again and attaches to what runs, or learns how it ended.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from app.errors import Conflict, InvalidRequest, ScalingFailed, Unavailable

# What an operation goes through, in order; ``aborting`` instead of the rest when it is rolled back.
PHASES = (
    "idle",
    "placing",
    "launching",
    "joining",
    "prefetching",
    "draining",
    "armed",
    "committed",
    "retiring",
    "aborting",
)
# Phases of a group that will not serve again by itself.
GONE = ("failed", "lost")
SIZE = "new_data_parallel_size"


class Group(Protocol):
    """The manager. Operations are answered at once with their state, and with ``refused`` (``busy``, ``invalid`` or
    ``unavailable``), ``message`` and perhaps ``param`` when not admitted; a known id attaches. Raises ``Unavailable``
    when no manager answers."""

    async def scale_elastic_ep(
        self, size: int, drain_timeout_s: float | None, operation_id: str, retire: list[int] | None
    ) -> dict[str, Any]: ...

    async def rebalance_experts(self, operation_id: str) -> dict[str, Any]: ...

    async def cancel(self, operation_id: str) -> dict[str, Any]: ...

    async def watch(self, version: int) -> dict[str, Any]: ...

    async def status(self) -> dict[str, Any]: ...


class Operations:
    """``latest`` is the last status that anybody here got of the group, or None."""

    def __init__(self, group: Group) -> None:
        self.latest: dict[str, Any] | None = None
        self._group = group

    async def scale(
        self,
        size: int,
        drain_timeout_s: float | None = None,
        operation_id: str | None = None,
        retire: list[int] | None = None,
        wait: bool = True,
    ) -> dict[str, Any]:
        """Resizes the group to ``size`` ranks; without the ranks ``retire`` if named, else the highest go first.

        Returns the operation's result, or with ``wait=False`` its state so far. Cancelling the call cancels only the
        waiting. Raises InvalidRequest, Conflict (another operation runs), Unavailable, and ScalingFailed when it was
        rolled back.
        """
        if type(size) is not int or size < 1:
            raise InvalidRequest(f"The group can't have {size!r} ranks: give a number of 1 or more", SIZE)
        id_ = operation_id or new_id()
        return await self._carry_out(
            lambda: self._group.scale_elastic_ep(size, drain_timeout_s, id_, retire), wait, SIZE, size
        )

    async def rebalance(self, operation_id: str | None = None, wait: bool = True) -> dict[str, Any]:
        """Re-places the experts by their measured load; otherwise like ``scale``."""
        id_ = operation_id or new_id()
        return await self._carry_out(lambda: self._group.rebalance_experts(id_), wait, "operation_id")

    async def cancel(self, operation_id: str) -> dict[str, Any]:
        """Has an operation rolled back, and returns its state; too late when it has committed."""
        operation = _admitted(await _asked(self._group.cancel(operation_id)), "operation_id")
        return _result(operation, f"Operation {operation_id} is being cancelled.")

    async def status(self) -> dict[str, Any]:
        """The answer of ``/is_scaling_elastic_ep``."""
        status = self.latest = await self._group.status()
        operation = status["operation"]
        scaling = running(status)
        idle = "idle" if status["phase"] == "serving" else status["phase"]
        return {
            "is_scaling_elastic_ep": scaling,
            "phase": operation["phase"] if scaling else idle,
            "epoch": status["epoch"],
            "progress": operation["progress"] if scaling else status["detail"],
            "error": status["cause"] or status["refused"] or (operation["error"] if operation else ""),
            "data_parallel_size": status["data_parallel_size"],
            "wanted_data_parallel_size": status["wanted_data_parallel_size"],
            "operation_id": operation["id"] if operation else None,
            "operation": operation,
        }

    async def _carry_out(
        self, ask: Callable[[], Awaitable[dict[str, Any]]], wait: bool, param: str, size: int | None = None
    ) -> dict[str, Any]:
        operation = _admitted(await _asked(ask()), param)
        if wait:
            operation = await self._end_of(operation, ask, size)
        if operation["done"] and operation["error"]:
            raise ScalingFailed(_failure(operation), operation)
        return _result(operation, _success(operation) if operation["done"] else _beginning(operation))

    async def _end_of(
        self, operation: dict[str, Any], ask: Callable[[], Awaitable[dict[str, Any]]], size: int | None
    ) -> dict[str, Any]:
        version = -1
        while not operation["done"]:
            status = self.latest = await self._group.watch(version)
            version = status["version"]
            last = status["operation"]
            if last is not None and last["id"] == operation["id"]:
                operation = last
            else:
                # Another began after it, or the manager was replaced: its id tells.
                answer = await ask()
                operation = answer if "refused" not in answer else _forgotten(operation, status, size)
            if status["phase"] in GONE and not operation["done"]:
                raise ScalingFailed(f"{_what(operation)} ended with the group: {status['cause']}", operation)
        return operation


def new_id() -> str:
    return f"op-{uuid.uuid4().hex[:12]}"


def running(status: dict[str, Any]) -> bool:
    """Whether the serving group is being changed; its first start is not that."""
    operation = status["operation"]
    return operation is not None and not operation["done"] and operation["kind"] != "start"


async def _asked(question: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """Its answer. A caller who leaves in this very moment does not take the question along."""
    return await asyncio.shield(asyncio.ensure_future(question))


def _admitted(answer: dict[str, Any], param: str) -> dict[str, Any]:
    """The operation; raises what the manager refused it with."""
    refused = answer.get("refused")
    if not refused:
        return answer
    message = answer["message"]
    if refused == "busy":
        raise Conflict(message)
    if refused == "invalid":
        raise InvalidRequest(message, answer.get("param") or param)
    raise Unavailable(message)


def _forgotten(operation: dict[str, Any], status: dict[str, Any], size: int | None) -> dict[str, Any]:
    """What became of an operation that the manager knows no more: the size says it."""
    if size is not None and status["data_parallel_size"] == size and status["phase"] == "serving":
        return operation | {"done": True, "error": "", "phase": "idle", "epoch": status["epoch"]}
    raise ScalingFailed(
        f"{_what(operation)} has an unknown end, as the manager was replaced meanwhile. The group has "
        f"{status['data_parallel_size']} ranks in epoch {status['epoch']}.",
        operation,
    )


def _result(operation: dict[str, Any], message: str) -> dict[str, Any]:
    well = operation["done"] and not operation["error"]
    return {
        "message": message,
        "operation_id": operation["id"],
        "data_parallel_size": operation["to_size"] if well else operation["from_size"],
        "epoch": operation["epoch"],
        "operation": operation,
    }


def _what(operation: dict[str, Any]) -> str:
    if operation["kind"] == "rebalance":
        return f"Rebalancing the experts of {operation['to_size']} ranks ({operation['id']})"
    return f"Scaling from {operation['from_size']} to {operation['to_size']} ranks ({operation['id']})"


def _beginning(operation: dict[str, Any]) -> str:
    return f"{_what(operation)} has begun: follow it at /is_scaling_elastic_ep, or ask again with its operation_id."


def _success(operation: dict[str, Any]) -> str:
    took_s = sum(operation["seconds"].values())
    return f"{_what(operation)} is done after {took_s:.1f} s; longest pause {operation['pause_s'] * 1000:.0f} ms."


def _failure(operation: dict[str, Any]) -> str:
    phase = operation["failed_phase"] or operation["phase"]
    cause = operation["error"].rstrip(".")
    return f"{_what(operation)} was rolled back in phase {phase}: {cause}. The old group serves on."
