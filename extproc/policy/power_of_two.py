"""`power_of_two`: the less loaded of two workers drawn at random.

Source: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing" (2001). Two draws are nearly as good as
comparing all, cost the same for 1,000 workers as for 2, and do not send a burst to one worker when figures are old.
Parameters: none.
"""

from collections.abc import Sequence

from extproc.load import WorkerState
from extproc.policy.base import Choice, PolicyContext, WorkerPolicy
from extproc.request import GenerationRequest


class PowerOfTwo(WorkerPolicy):
    """Compares tokens per rank; equal ones (no scrape yet, nothing sent) are decided by legs in flight per rank."""

    def __init__(self, context: PolicyContext) -> None:
        self._loads = context.loads
        self._rng = context.rng

    def pick(self, states: Sequence[WorkerState], request: GenerationRequest | None) -> Choice:
        """The less loaded of two different ones of `states`."""
        if len(states) == 1:
            return Choice(states[0])
        # Two different ones, each pair in either order with equal chance, so a full tie goes to either.
        uniform, count = self._rng.random, len(states)
        index = int(uniform() * count)
        first = states[index]
        second = states[(index + 1 + int(uniform() * (count - 1))) % count]
        rated = self._loads.rank_loads((first, second))
        loads, other_loads = rated.tokens
        # A request waits on one rank: four times the tokens on four times the ranks is the same wait. Cross-multiplied.
        ranks, other_ranks = len(loads), len(other_loads)
        load, other_load = sum(loads) * other_ranks, sum(other_loads) * ranks
        if load == other_load:
            load, other_load = first.in_flight * other_ranks, second.in_flight * ranks
        if other_load < load:
            first, loads = second, other_loads
        return Choice(first, None, loads if rated.final else None)
