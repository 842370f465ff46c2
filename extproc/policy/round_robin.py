"""`round_robin`: one worker after the other."""

from collections.abc import Sequence

from extproc.load import WorkerState
from extproc.policy.base import Choice, WorkerPolicy
from extproc.request import GenerationRequest


class RoundRobin(WorkerPolicy):
    """Counts the picks. When the set of workers changes the count goes on, so nobody is served twice in a row."""

    def __init__(self) -> None:
        self._picks = 0

    def pick(self, states: Sequence[WorkerState], request: GenerationRequest | None) -> Choice:
        """The next of `states`."""
        state = states[self._picks % len(states)]
        self._picks += 1
        return Choice(state)
