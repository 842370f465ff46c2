"""`power_of_two`: the less loaded of two workers drawn at random.

Source: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing" (2001). Two draws are nearly as good as
comparing all, cost the same for 1,000 workers as for 2, and do not send a burst to one worker when figures are old.
"""

import random
from collections.abc import Sequence

from extproc.load import WorkerState
from extproc.load_model import LoadModel
from extproc.request import GenerationRequest


class PowerOfTwo:
    """Compares tokens first; equal tokens (no scrape yet, nothing sent) are decided by legs in flight."""

    def __init__(self, loads: LoadModel, rng: random.Random) -> None:
        self._loads = loads
        self._rng = rng

    def pick(self, states: Sequence[WorkerState], request: GenerationRequest | None) -> WorkerState:
        """The less loaded of two different ones of `states`."""
        if len(states) == 1:
            return states[0]
        # The draw is in random order, so `min` breaks a full tie at random.
        pair = self._rng.sample(states, 2)
        tokens = self._loads.worker_tokens(pair)
        return min(
            zip(tokens, (state.in_flight for state in pair), (0, 1), pair, strict=True), key=lambda row: row[:3]
        )[3]
