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
        # The draw is in random order, so a full tie goes to either.
        first, second = self._rng.sample(states, 2)
        tokens, other_tokens = self._loads.worker_tokens((first, second))
        # A request waits on one rank: four times the tokens on four times the ranks is the same wait. Cross-multiplied.
        ranks, other_ranks = len(first.ranks), len(second.ranks)
        load = tokens * other_ranks, first.in_flight * other_ranks
        other_load = other_tokens * ranks, second.in_flight * ranks
        return Choice(second if other_load < load else first)
