"""The requests of one client that are under way: who waits for a rank, who for a first output."""

from __future__ import annotations

from app.call import Call
from app.flight import Flight


class Flights:
    """Flights with their calls, by the wire id of the present attempt. ``waiting`` counts those without any output."""

    def __init__(self) -> None:
        self.waiting = 0
        self._all: dict[str, tuple[Flight, Call]] = {}
        self._unplaced: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, wire_id: str) -> bool:
        return wire_id in self._all

    def get(self, wire_id: str) -> tuple[Flight, Call] | None:
        return self._all.get(wire_id)

    def add(self, flight: Flight, call: Call) -> None:
        """Enters the flight's present attempt."""
        self._all[flight.wire_id] = (flight, call)
        if not flight.seen:
            self.waiting += 1

    def remove(self, flight: Flight) -> bool:
        """Takes its present attempt out; False if it was not there."""
        if self._all.pop(flight.wire_id, None) is None:
            return False
        self._unplaced.pop(flight.wire_id, None)
        if not flight.seen:
            self.waiting -= 1
        return True

    def saw(self, flight: Flight) -> None:
        """An output came."""
        if not flight.seen:
            flight.seen = True
            self.waiting -= 1

    def placed(self, flight: Flight) -> None:
        self._unplaced.pop(flight.wire_id, None)

    def displaced(self, flight: Flight) -> None:
        """It waits for a rank."""
        self._unplaced[flight.wire_id] = None

    @property
    def unplaced(self) -> list[tuple[Flight, Call]]:
        """Those that wait for a rank, in the order in which they began to."""
        return [self._all[wire_id] for wire_id in self._unplaced]

    def on(self, rank: int) -> list[tuple[Flight, Call]]:
        return [(flight, call) for flight, call in self._all.values() if flight.rank == rank]

    @property
    def calls(self) -> list[Call]:
        """Whose flights these are, each once."""
        return list({id(call): call for _, call in self._all.values()}.values())
