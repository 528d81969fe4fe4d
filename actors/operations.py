"""The operations of one group: what may be asked of it, and what was asked lately. No Ray, no clock."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import msgspec

from actors.transition import Operation

# Ended operations that are remembered, so that who asks again learns how they ended.
HISTORY = 64


class Running(Protocol):
    """Whatever carries an operation out: its ``operation`` is as of now."""

    operation: Operation

    def cancel(self, why: str) -> bool: ...


class Operations:
    """The running operation, if any, and those that ended lately."""

    def __init__(self) -> None:
        self.running: Running | None = None
        self._ended: dict[str, Operation] = {}

    def of(self, operation_id: str | None) -> Operation | None:
        """The operation with this id, as it stands now; None if it is unknown."""
        if self.running is not None and self.running.operation.id == operation_id:
            return self.running.operation
        return self._ended.get(operation_id or "")

    @property
    def newest(self) -> Operation | None:
        if self.running is not None:
            return self.running.operation
        return next(reversed(self._ended.values()), None)

    def busy(self) -> dict[str, Any] | None:
        """The refusal of another one while one runs."""
        if self.running is None:
            return None
        running = self.running.operation
        message = f"operation {running.id} ({running.kind} to {running.to_size} ranks) runs: {running.phase.value}"
        return shown(running) | refusal("busy", message)

    def cancel(self, operation_id: str) -> dict[str, Any]:
        """Has an operation rolled back if it can be; its state, or with it the refusal."""
        operation, running = self.of(operation_id), self.running
        if operation is None:
            return refusal("invalid", f"no operation {operation_id!r} is known: see the status for the present one")
        if running is not None and running.operation.id == operation_id and not running.cancel("it was cancelled"):
            message = f"operation {operation_id} is {operation.phase.value}: too late to cancel it"
            return shown(operation) | refusal("busy", message)
        return shown(operation)

    def end(self) -> None:
        """The running one is over."""
        assert self.running is not None
        operation, self.running = self.running.operation, None
        self._ended[operation.id] = operation
        while len(self._ended) > HISTORY:
            del self._ended[next(iter(self._ended))]


def shown(operation: Operation) -> dict[str, Any]:
    """As builtins."""
    fields: dict[str, Any] = msgspec.to_builtins(operation)
    return fields


def refusal(refused: str, message: str, param: str | None = None) -> dict[str, Any]:
    """An answer instead of an operation; ``refused`` is ``busy``, ``invalid`` or ``unavailable``."""
    return {"refused": refused, "message": message} | ({"param": param} if param else {})


def outside(size: int, smallest: int, largest: int | None) -> str:
    """Why a group can't have ``size`` ranks; empty if it can."""
    if size >= smallest and (largest is None or size <= largest):
        return ""
    return (
        f"data_parallel_size={size} is outside {smallest} .. {largest or 'any'}: choose a size inside "
        "min_data_parallel_size .. max_data_parallel_size, or widen them"
    )


def impossible(size: int, ranks: Sequence[int], retire: Collection[int]) -> dict[str, Any] | None:
    """The refusal of a resize of ``ranks`` to ``size`` without those of ``retire``, or None if it can be done."""
    if unknown := sorted(set(retire) - set(ranks)):
        message = f"ranks {unknown} are not in the group; its ranks are {list(ranks)}"
        return refusal("invalid", message, "retire_ranks")
    if size == len(ranks) and not retire:
        return refusal("invalid", f"the group has {size} ranks already")
    staying = len(ranks) - len(set(retire))
    if staying < 1:
        message = f"all ranks {list(ranks)} would leave: keep at least one, it carries the requests over"
        return refusal("invalid", message, "retire_ranks")
    if retire and staying > size:
        message = f"{len(ranks)} ranks without {sorted(set(retire))} are more than {size}"
        return refusal("invalid", message, "retire_ranks")
    return None
