"""`random`: any worker, with equal chance."""

import random
from collections.abc import Sequence

from extproc.load import WorkerState
from extproc.request import GenerationRequest


class RandomChoice:
    """Needs no state and no loads; the baseline for everything else."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def pick(self, states: Sequence[WorkerState], request: GenerationRequest | None) -> WorkerState:
        """One of `states`."""
        return self._rng.choice(states)
