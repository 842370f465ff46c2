"""`bucket`: workers share the prompts by length, so that a short one does not wait behind a long one.

Source: `bucket` of SGLang's gateway 0.3.2, for prefill. Worker i of n takes the lengths between two boundaries, which
are set so that each worker gets the same tokens of what came last. Where the length's worker has too much more than
others, the least loaded one takes it.
Parameters: `bucket_adjust_interval_secs` (seconds between adjustments); `balance_abs_threshold` (here tokens per
rank, as the gateway counts prompt text) and `balance_rel_threshold` (ratio), both against the least loaded.
"""

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

from extproc.load import WorkerState
from extproc.policy.base import Choice, PolicyContext, WorkerPolicy
from extproc.policy.fleet import Fleet
from extproc.request import GenerationRequest

MAX_LENGTHS: Final = 4096
"""Lengths that boundaries are computed from, the last ones of an interval: 0.5 ms of sorting each time."""


class Bucket(WorkerPolicy):
    """Until the first adjustment there are no buckets, and the least loaded worker is picked.

    The gateway starts with equal shares of 4,096 characters instead; real prompts are mostly longer than that.
    """

    def __init__(self, context: PolicyContext) -> None:
        self._clock = context.clock
        self._interval_s = context.config.bucket_adjust_interval_secs
        self._abs = context.config.balance_abs_threshold
        self._rel = context.config.balance_rel_threshold
        self._fleet = Fleet(context)
        self._adjusted_s = context.clock()
        self._since = deque[float](maxlen=MAX_LENGTHS)
        self._lengths: list[float] = []
        self.boundaries: list[float] = []
        """In tokens, n - 1 for n workers, ascending; worker i takes lengths from boundary i - 1 to boundary i."""

    def pick(self, states: Sequence[WorkerState], request: GenerationRequest | None) -> Choice:
        """The worker for the request's length, or the least loaded."""
        changed = self._fleet.see(states)
        if request is None:
            return Choice(self._fleet.least_loaded(states))
        self._since.append(request.prompt_tokens)
        now_s = self._clock()
        if now_s - self._adjusted_s >= self._interval_s:
            self._adjusted_s = now_s
            if len(self._since) >= len(states):  # of fewer, nothing can be said
                self._lengths = sorted(self._since)
                self._since.clear()
                changed = True
        if changed:
            self.boundaries = split_evenly(self._lengths, [len(state.ranks) for state in states])
        if not self.boundaries:
            return Choice(self._fleet.least_loaded(states))
        # Prompts of one length may fill several buckets: all their workers share them.
        first = bisect_left(self.boundaries, request.prompt_tokens)
        last = bisect_right(self.boundaries, request.prompt_tokens)
        own = self._fleet.draw(states[first : last + 1])
        drawn = (*own, *self._fleet.draw(states))
        tokens = self._fleet.tokens(drawn)
        own_tokens, least_tokens = min(tokens[: len(own)]), min(tokens)
        if own_tokens - least_tokens > self._abs and own_tokens > least_tokens * self._rel:
            return Choice(self._fleet.least(drawn, tokens))
        return Choice(self._fleet.least(own, tokens[: len(own)]))


def split_evenly(lengths: Sequence[float], weights: Sequence[int]) -> list[float]:
    """Boundaries that divide ascending `lengths` into parts with sums in proportion to `weights`; none without
    lengths."""
    if not lengths:
        return []
    sums = list(accumulate(lengths))
    shares = list(accumulate(weights))
    return [lengths[min(bisect_left(sums, sums[-1] * share / shares[-1]), len(lengths) - 1)] for share in shares[:-1]]
