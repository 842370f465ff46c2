"""`least_load`: the worker that will have worked off its load first.

Source: `least_load` of smg 1.13, which ranks workers by expected drain time: tokens queued and sent, over the
worker's speed. Speeds come from the load model, which measures them; where it does not, equal speeds are assumed, and
tokens per rank are compared. Parameters: none. Of more than 8 workers a random 4 are compared (see `fleet.SAMPLE`).
"""

from collections.abc import Callable, Sequence

from extproc.load import WorkerState
from extproc.policy.base import Choice, PolicyContext, WorkerPolicy
from extproc.policy.fleet import Fleet
from extproc.request import GenerationRequest


class LeastLoad(WorkerPolicy):
    """The rank on the worker is the rank policy's choice, which goes by the same load model."""

    def __init__(self, context: PolicyContext) -> None:
        self._fleet = Fleet(context)
        self._drain: Callable[[Sequence[WorkerState]], list[float]]
        self._drain = getattr(context.loads, "drain_s", self._fleet.tokens)

    def pick(self, states: Sequence[WorkerState], request: GenerationRequest | None) -> Choice:
        """The one with the shortest drain time, then the fewest legs in flight, then any."""
        drawn = self._fleet.draw(states)
        requests = [float(state.in_flight) for state in drawn]
        return Choice(self._fleet.least(drawn, list(zip(self._drain(drawn), requests, strict=True))))
