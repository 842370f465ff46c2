"""Virtual time and what is due when. No I/O."""

import heapq
from collections.abc import Callable
from typing import Any


class Clock:
    """The event queue. Events at the same moment happen in the order in which they were scheduled."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._scheduled = 0

    def read(self) -> float:
        """Seconds since the start; what the service gets as its clock."""
        return self.now_s

    def at(self, at_s: float, happen: Callable[[Any], None], argument: Any = None) -> None:
        """Call `happen(argument)` at `at_s`, which is not before now."""
        self._scheduled += 1
        heapq.heappush(self._events, (at_s, self._scheduled, happen, argument))

    def run(self, until: Callable[[], bool]) -> None:
        """Let events happen until `until()` holds or there are none."""
        events = self._events
        while events and not until():
            self.now_s, _, happen, argument = heapq.heappop(events)
            happen(argument)
