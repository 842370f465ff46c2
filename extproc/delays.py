"""Many delays of the same length with one timer of the event loop."""

import asyncio
import itertools
import math
from collections.abc import Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")

SLACK, MAX_SLACK_S = 1 / 16, 0.02
"""Share of the delay, and seconds, that a call may be late, so that one turn of the loop serves many."""


class Delays(Generic[Key]):
    """Tells of each key (hashable) when it has been in here for `after_s`, unless it is taken out before.

    Keys of one length are due in the order they came, so a dict is their queue; each would otherwise be an object of
    the loop's own, made with every request and nearly always called off.
    """

    def __init__(self, after_s: float, due: Callable[[Key], None]) -> None:
        """`due` is called from the event loop, with one key at a time."""
        self._after_s = after_s
        self._slack_s = min(after_s * SLACK, MAX_SLACK_S)
        self._tell = due
        self._due_s: dict[Key, float] = {}
        self._loop = asyncio.get_running_loop()
        self._armed = False

    def __len__(self) -> int:
        return len(self._due_s)

    def add(self, key: Key) -> None:
        """Begin a key's delay; that of one which is in here begins anew."""
        self._due_s.pop(key, None)  # to the end of the queue
        self._due_s[key] = self._loop.time() + self._after_s
        if not self._armed:
            self._arm()

    def discard(self, key: Key) -> None:
        """Take a key out, if it is in here."""
        self._due_s.pop(key, None)

    def _arm(self) -> None:
        first_s = next(iter(self._due_s.values()), None)
        self._armed = first_s is not None
        if first_s is not None:
            self._loop.call_at(first_s + self._slack_s, self._fire)

    def _fire(self) -> None:
        now_s = self._loop.time()
        # In one go: what was taken out at a dict's front is passed over again by each look from there.
        due = list(itertools.takewhile(lambda key: self._due_s[key] <= now_s, self._due_s))
        try:
            for key in due:
                if self._due_s.get(key, math.inf) <= now_s:  # not taken out, nor begun anew, by one told before
                    del self._due_s[key]
                    self._tell(key)
        finally:  # whatever became of this one, the others are due as well
            self._arm()
