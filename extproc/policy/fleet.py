"""The workers of a role as the policies look at them: by name, against their mean, and the least loaded of them.

A load is counted per DP rank, as a request waits on one rank: eight requests on a worker with eight ranks are as many
as one on a worker with one. Nothing here costs more with 1,000 workers than with 10, but for the pick that first sees
a changed set of them.
"""

import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Final

from extproc.load import WorkerState
from extproc.policy.base import PolicyContext

COMPARE_ALL: Final = 8
SAMPLE: Final = 4
"""Up to 8 workers are all compared, of more a random 4. With d draws the longest queue is about ln ln n / ln d above
the mean (Mitzenmacher 2001, "The Power of Two Choices in Randomized Load Balancing"): each further one wins less, and
costs as much as the last."""

PICKS_PER_REFRESH: Final = 1 / 32
"""The mean is taken anew after this many picks a worker: it then is at most 3 % of a request a worker behind."""

SPILL_FLOOR_REQUESTS: Final = 4.0
SPILL_DEVIATIONS: Final = 2.0
"""The absolute margin of `over_balance` is at most two standard deviations (sqrt(mean): arrivals are Poisson) and never
below four requests, so that few workers with little traffic spill at all (smg 1.13, `--balance-abs-threshold`)."""

in_flight: Callable[[WorkerState], int] = attrgetter("in_flight")


class Fleet:
    """One role's workers. Call `see` first in every pick."""

    def __init__(self, context: PolicyContext) -> None:
        self._loads = context.loads
        self._uniform = context.rng.random
        self._rel = context.config.balance_rel_threshold
        self._abs = context.config.balance_abs_threshold
        self._states: Sequence[WorkerState] = ()
        self._ranks = 0
        self._picks_to_refresh = 0.0
        self.by_name: dict[str, WorkerState] = {}
        """Of the last list seen."""
        self.mean = 0.0
        """Legs in flight on the average rank."""

    def see(self, states: Sequence[WorkerState]) -> bool:
        """Take note of the eligible workers; true when it is another list than last time.

        The load table hands out the same list until the membership changes. A list without the workers that a retry
        avoids is a new one, and costs one pass over it.
        """
        changed = states is not self._states
        if changed:
            self._states = states  # kept, so that no other list can take its identity
            self.by_name = {state.worker.name: state for state in states}
            self._ranks = sum(len(state.ranks) for state in states)
            self._picks_to_refresh = 0.0
        self._picks_to_refresh -= 1
        if self._picks_to_refresh <= 0:
            self._picks_to_refresh = len(states) * PICKS_PER_REFRESH
            self.mean = sum(map(in_flight, states)) / self._ranks
        return changed

    def over_balance(self, state: WorkerState) -> bool:
        """Whether a worker has so much more than the mean that affinity must give way.

        By `balance_rel_threshold` times the mean, and by `balance_abs_threshold` requests above it. The existing
        gateway (0.3.2) asks whether *any* two workers are that far apart, and then drops the affinity of every
        request; this asks for the preferred worker only, as smg 1.13 does.
        """
        margin = min(self._abs, max(SPILL_FLOOR_REQUESTS, SPILL_DEVIATIONS * math.sqrt(self.mean)))
        return self.above(state, self._rel, margin)

    def above(self, state: WorkerState, factor: float, margin: float) -> bool:
        """Whether a worker's legs in flight per rank exceed both `factor` x the mean and the mean + `margin`
        requests."""
        load = state.in_flight / len(state.ranks)
        return load > self.mean * factor and load > self.mean + margin

    def draw(self, states: Sequence[WorkerState]) -> Sequence[WorkerState]:
        """All of `states`, or some at random of many (one may come twice, which does no harm)."""
        count = len(states)
        if count <= COMPARE_ALL:
            return states
        uniform = self._uniform
        return [states[int(uniform() * count)] for _ in range(SAMPLE)]

    def tokens(self, states: Sequence[WorkerState]) -> list[float]:
        """Tokens per rank on each, by the load model."""
        return [sum(tokens) / len(tokens) for tokens in self._loads.rank_loads(states).tokens]

    def least_loaded(
        self, states: Sequence[WorkerState], tie: Callable[[WorkerState], float] = in_flight
    ) -> WorkerState:
        """The one with the fewest tokens per rank, then the least `tie`, then any."""
        if len(states) == 1:
            return states[0]
        drawn = self.draw(states)
        return self.least(drawn, self.tokens(drawn), tie)

    def least(
        self, states: Sequence[WorkerState], loads: Sequence[float], tie: Callable[[WorkerState], float] | None = None
    ) -> WorkerState:
        """The state with the least load, then the least `tie`, then any."""
        best = min(loads)
        count = loads.count(best)
        if count == 1:
            return states[loads.index(best)]
        equals = states
        if count < len(loads):
            equals = [state for state, load in zip(states, loads, strict=True) if load == best]
        if tie is not None:
            return self.least(equals, list(map(tie, equals)))
        return equals[int(self._uniform() * len(equals))]
