"""`cache_aware`: the worker that has the longest beginning of the prompt in its cache, while it is not overloaded.

Source: `cache_aware` of SGLang's gateway 0.3.2 and smg 1.13: an approximate prefix tree over what was sent where.
1. The best match is longer than `cache_threshold` of the prompt, and its worker not over its bound: that worker.
2. Otherwise the least loaded worker, and of equals the one with the least text in the tree (the most free cache).
Parameters: `cache_threshold` (share of the prompt's bytes, 0 to 1); `balance_abs_threshold` (requests per rank above
the mean) and `balance_rel_threshold` (ratio to the mean), above both of which a worker is over its bound;
`max_tree_size` (bytes per role, everything counted); `eviction_interval_secs` (seconds after which the text of
workers that left is dropped; the size is kept at every insert); `cache_aware_rank` (whether it also chooses the DP
rank).
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

from extproc.load import WorkerState
from extproc.policy.base import Choice, PolicyContext, WorkerPolicy
from extproc.policy.fleet import Fleet
from extproc.policy.prefix_tree import BLOCK_BYTES, MAX_PREFIX_BYTES, Holder, PrefixTree
from extproc.request import GenerationRequest

SWEEP_NODES: Final = 32
"""Nodes looked at with each request while text of workers that left is dropped: some 20 us."""


class CacheAware(WorkerPolicy):
    """Each role has a tree of its own, as it has its own instance."""

    reads_prompts = True

    def __init__(self, context: PolicyContext) -> None:
        config = context.config
        self._loads = context.loads
        self._clock = context.clock
        self._fleet = Fleet(context)
        self._threshold = config.cache_threshold
        self._by_rank = config.cache_aware_rank
        self._interval_s = config.eviction_interval_secs
        self._tree = PrefixTree(config.max_tree_size)
        self._last: tuple[GenerationRequest | None, bytes, int] = (None, b"", 0)
        self._sweep: Iterator[None] | None = None
        self._swept_s = context.clock()
        self._missing = set[str]()

    def pick(self, states: Sequence[WorkerState], request: GenerationRequest | None) -> Choice:
        """The best match's worker, and its rank where that is chosen here, or else the least loaded worker."""
        self._fleet.see(states)
        if request is None:
            return Choice(self._fleet.least_loaded(states))
        text, whole_bytes = self._text(request)
        for matched_bytes, holders in reversed(self._tree.matches(text)):
            if matched_bytes <= self._threshold * whole_bytes:
                break
            able = [holder for holder in holders if self._is_able(holder)]
            if able:
                state = self._fleet.least_loaded(self._workers(able))
                if self._fleet.over_balance(state):
                    break
                return Choice(state, self._rank(state, able, request.prompt_tokens * matched_bytes / whole_bytes))
        return Choice(self._fleet.least_loaded(states, tie=self._held_bytes))

    def placed(self, request: GenerationRequest, state: WorkerState, dp_rank: int) -> None:
        """The prompt will be in that rank's cache."""
        text, _ = self._text(request)
        self._tree.insert(text, Holder(state.worker.name, dp_rank if self._by_rank else None))
        self._drop_gone()

    def _text(self, request: GenerationRequest) -> tuple[bytes, int]:
        """What is compared of a request, and its length before it was cut to whole blocks; made once for both uses.

        Cut here, so that the tree keeps these very bytes, and no second size of block wears holes into the heap.
        """
        last, text, whole_bytes = self._last
        if last is not request:
            # base:adapter; an adapter's KV cache is of no use to another
            adapter = request.model.encode() if request.model and ":" in request.model else b""
            whole_bytes = len(adapter) + min(len(request.prompt), MAX_PREFIX_BYTES)
            prompt = request.prompt[: max(0, whole_bytes - whole_bytes % BLOCK_BYTES - len(adapter))]
            text = adapter + bytes(prompt) if adapter else bytes(prompt)
            self._last = request, text, whole_bytes
        return text, whole_bytes

    def _is_able(self, holder: Holder) -> bool:
        state = self._fleet.by_name.get(holder.worker)
        return state is not None and (holder.dp_rank or 0) < len(state.ranks)

    def _workers(self, holders: Sequence[Holder]) -> list[WorkerState]:
        return [self._fleet.by_name[name] for name in dict.fromkeys(holder.worker for holder in holders)]

    def _rank(self, state: WorkerState, holders: Sequence[Holder], matched_tokens: float) -> int | None:
        """The least loaded of the ranks that have the prefix, if waiting for it costs less than computing it again.

        Both are in tokens of prefill on one rank: what it has to do more than the least loaded rank, and what matched.
        """
        ranks = [holder.dp_rank for holder in holders if holder.worker == state.worker.name]
        (tokens,) = self._loads.rank_loads((state,)).tokens
        best = min((rank for rank in ranks if rank is not None), key=tokens.__getitem__, default=None)
        return best if best is not None and tokens[best] - min(tokens) <= matched_tokens else None

    def _held_bytes(self, state: WorkerState) -> float:
        return self._tree.held_bytes.get(state.worker.name, 0)

    def _drop_gone(self) -> None:
        """Drop the text of workers that were missing at both ends of an interval, a few nodes at a time."""
        if self._sweep is None:
            now_s = self._clock()
            if now_s - self._swept_s < self._interval_s:
                return
            self._swept_s = now_s
            missing = self._tree.held_bytes.keys() - self._fleet.by_name.keys()
            gone = missing & self._missing
            self._missing = missing
            if gone:
                self._sweep = self._tree.forgetting(lambda holder: holder.worker in gone)
        if self._sweep and next(islice(self._sweep, SWEEP_NODES - 1, None), True):
            self._sweep = None  # it has come to its end: a step yields None
