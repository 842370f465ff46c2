"""`random`: any worker, with equal chance."""

from collections.abc import Sequence

from extproc.load import WorkerState
from extproc.policy.base import Choice, PolicyContext, WorkerPolicy
from extproc.request import GenerationRequest


class RandomChoice(WorkerPolicy):
    """Needs no state and no loads; the baseline for everything else."""

    def __init__(self, context: PolicyContext) -> None:
        self._rng = context.rng

    def pick(self, states: Sequence[WorkerState], request: GenerationRequest | None) -> Choice:
        """One of `states`."""
        return Choice(self._rng.choice(states))
