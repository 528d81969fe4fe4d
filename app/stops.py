"""Stop strings over a stream of text: pure.

The text ends where the first stop string begins that is completed, reading character by character; of stop strings
completed by the same character the longest counts. So the result does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Holds back text that may be the beginning of a stop string. ``stops`` are non-empty; ``hit`` is the one found."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.hit: str | None = None
        self._stops = tuple(stops)
        self._held = ""

    def add(self, text: str) -> str:
        """Returns the text that is now certain to come before any stop string; nothing more after a hit."""
        if self.hit is not None:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.hit = min(found)
            self._held = ""
            return text[:at]
        safe = min((_possible_start(text, stop) for stop in self._stops), default=len(text))
        self._held = text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """The text ended: returns what was held back."""
        held, self._held = self._held, ""
        return held


def _possible_start(text: str, stop: str) -> int:
    """Where the longest end of ``text`` begins that is a beginning of ``stop``; the text's length if there is none."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return at
        at = text.find(stop[0], at + 1)
    return len(text)
