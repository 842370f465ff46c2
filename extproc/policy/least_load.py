"""`least_load`: the worker on which the request will wait least.

Source: `least_load` of smg 1.13, which ranks workers by expected drain time: tokens queued and sent, over the
worker's speed. A request waits on one DP rank only, so here it is the drain time of the worker's least loaded rank,
which the rank policy then picks: together they find the best of all ranks. Speeds come from the load model, which
measures them; where it does not, equal speeds are assumed. Parameters: none. Of more than 8 workers a random 4 are
compared (see `fleet.SAMPLE`).
"""

from collections.abc import Sequence

from extproc.load import WorkerState
from extproc.policy.base import Choice, PolicyContext, WorkerPolicy
from extproc.policy.fleet import Fleet, in_flight
from extproc.request import GenerationRequest


class LeastLoad(WorkerPolicy):
    """The rank on the worker is the rank policy's choice, which goes by the same load model."""

    def __init__(self, context: PolicyContext) -> None:
        self._fleet = Fleet(context)
        self._loads = context.loads

    def pick(self, states: Sequence[WorkerState], request: GenerationRequest | None) -> Choice:
        """The one with the shortest drain time, then the fewest legs in flight, then any."""
        drawn = self._fleet.draw(states)
        rated = self._loads.rank_loads(drawn)
        best = self._fleet.least(drawn, self._loads.drain_s(drawn, rated.tokens), in_flight)
        return Choice(best, None, rated.tokens[drawn.index(best)] if rated.final else None)
