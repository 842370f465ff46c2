"""`consistent_hashing`: the worker that the client's routing key hashes to.

Source: `consistent_hashing` of SGLang's gateway (header `x-smg-routing-key`), with the bound on loads of its
`bounded_consistent_hashing`. When a worker joins or leaves, only the keys that it gets or had move: one in n.
Parameters: `balance_rel_threshold` (ratio) and `balance_abs_threshold` (requests per rank above the mean) bound the
load.
"""

from collections.abc import Sequence

from extproc.load import WorkerState
from extproc.policy.base import Choice, PolicyContext, WorkerPolicy
from extproc.policy.fleet import Fleet
from extproc.policy.ring import Ring, bounded, key_point
from extproc.request import GenerationRequest


class ConsistentHashing(WorkerPolicy):
    """Remembers nothing of a key: replicas of the service agree, and a restart changes nothing."""

    def __init__(self, context: PolicyContext) -> None:
        self._fleet = Fleet(context)
        self._ring = Ring()

    def pick(self, states: Sequence[WorkerState], request: GenerationRequest | None) -> Choice:
        """The key's worker, or while that is over its bound the next on the ring; without a key the least loaded."""
        if self._fleet.see(states):
            self._ring.update(self._fleet.by_name)
        state = None
        if request and request.routing_key:
            point = key_point(request.routing_key.encode())
            state = bounded(self._ring, self._fleet, point, self._fleet.over_balance)
        return Choice(state or self._fleet.least_loaded(states))
