"""What may be asked of a group, and what is known of what was asked."""

from __future__ import annotations

from typing import Any

import pytest

from actors.operations import HISTORY, Operations, impossible
from actors.transition import Event, Operation


class Running:
    def __init__(self, operation: Operation, cancellable: bool = True) -> None:
        self.operation = operation
        self.cancellable = cancellable

    def cancel(self, why: str) -> bool:
        return self.cancellable

    def begin(self) -> None:
        self.operation, _ = self.operation.take(Event.BEGIN, 0.0)


def test_a_running_operation_is_found_as_it_stands_now() -> None:
    operations = Operations()
    running = operations.running = Running(Operation("one", "scale", 2, 3))
    assert operations.of("one") == operations.newest == running.operation
    running.begin()
    found = operations.of("one")
    assert found is not None and found.phase.value == "placing"
    assert operations.of("other") is operations.of(None) is None
    busy = operations.busy()
    assert busy is not None and (busy["refused"], busy["phase"]) == ("busy", "placing")
    operations.end()
    assert operations.busy() is None and operations.running is None
    assert operations.of("one") == operations.newest == running.operation


def test_ended_ones_are_forgotten_in_time() -> None:
    operations = Operations()
    for number in range(HISTORY + 1):
        operations.running = Running(Operation(f"o{number}", "scale", 2, 3))
        operations.end()
    assert operations.of("o0") is None
    newest = operations.newest
    assert newest is not None and newest.id == f"o{HISTORY}"


def test_cancelling() -> None:
    operations = Operations()
    assert "no operation 'none' is known" in operations.cancel("none")["message"]
    running = operations.running = Running(Operation("one", "scale", 2, 3))
    assert "refused" not in operations.cancel("one")
    running.cancellable = False
    assert operations.cancel("one")["refused"] == "busy"
    operations.end()
    assert "refused" not in operations.cancel("one")


@pytest.mark.parametrize(
    ("size", "retire", "message", "param"),
    [
        (3, [], "the group has 3 ranks already", None),
        (2, [7], "ranks [7] are not in the group; its ranks are [0, 1, 4]", "retire_ranks"),
        (1, [0, 1, 4], "all ranks [0, 1, 4] would leave", "retire_ranks"),
        (1, [4], "3 ranks without [4] are more than 1", "retire_ranks"),
        (2, [4], "", None),
        (3, [4], "", None),
        (1, [], "", None),
        (4, [], "", None),
    ],
)
def test_what_a_group_of_three_can_become(size: int, retire: list[int], message: str, param: str | None) -> None:
    refused: dict[str, Any] = impossible(size, [0, 1, 4], retire) or {"message": ""}
    assert message in refused["message"] and bool(message) == bool(refused["message"])
    assert refused.get("param") == param
