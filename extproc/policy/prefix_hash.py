"""`prefix_hash`: the worker that the beginning of the prompt hashes to.

Source: `prefix_hash` of smg 1.13. A cheap stand-in for `cache_aware`: no memory of requests, O(log n), and it keeps
together what begins alike, but does not know how much is alike after that.
Parameters: `prefix_token_count` (tokens; 4 bytes each, as requests are not tokenized), `prefix_hash_load_factor`
(ratio to the mean) and `prefix_hash_balance_abs_threshold` (requests per rank above the mean): above both, the next
on the ring.
"""

from collections.abc import Sequence

from extproc.estimate import BYTES_PER_TOKEN
from extproc.load import WorkerState
from extproc.policy.base import Choice, PolicyContext, WorkerPolicy
from extproc.policy.fleet import Fleet
from extproc.policy.ring import Ring, bounded, key_point
from extproc.request import GenerationRequest


class PrefixHash(WorkerPolicy):
    """The prompt counts as it stands in the body, JSON and all; prompts shorter than the prefix count whole."""

    reads_prompts = True

    def __init__(self, context: PolicyContext) -> None:
        self._fleet = Fleet(context)
        self._ring = Ring()
        self._prefix_bytes = int(context.config.prefix_token_count * BYTES_PER_TOKEN)
        self._factor = context.config.prefix_hash_load_factor
        self._margin = context.config.prefix_hash_balance_abs_threshold

    def pick(self, states: Sequence[WorkerState], request: GenerationRequest | None) -> Choice:
        """The prefix's worker, or while that is over its bound the next on the ring; without a prompt the least
        loaded."""
        if self._fleet.see(states):
            self._ring.update(self._fleet.by_name)
        state = None
        if request and request.prompt:
            point = key_point(bytes(request.prompt[: self._prefix_bytes]))
            state = bounded(self._ring, self._fleet, point, self._over)
        return Choice(state or self._fleet.least_loaded(states))

    def _over(self, state: WorkerState) -> bool:
        return self._fleet.above(state, self._factor, self._margin)
