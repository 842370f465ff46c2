"""Prefill ranks: FIFO chunked prefill with a KV cache of limited size. No I/O.

The order is that of `extproc.sim.prefill_rank`, and a test compares the two. A prompt is admitted when the whole of it
fits into the KV cache; a head that does not fit blocks those behind it; its KV cache is held until decode has it.
Ranks of one `PrefillGroup` run their batches together (DP attention); without DP attention each has its own group.
"""

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from extproc.lab.clock import Clock
from extproc.lab.pages import Figures, Pages
from extproc.lab.prefill_cost import PrefillCost
from extproc.lab.prefix_cache import PrefixCache
from extproc.lab.request import Flight, TraceRequest
from extproc.sim.gpu import GpuModel


class PrefillListener(Protocol):
    """Who is told what prefill has done."""

    def prefilled(self, rank: "PrefillRank", tokens: int, complete: Sequence[tuple[Flight, int]]) -> None:
        """A batch ended on a rank: `tokens` less are to do, those found in the prefix cache included.

        Each prompt that is now complete comes with the tokens of its last chunk.
        """


class PrefillRank:
    """One DP rank. `index` counts over all prefill workers, `dp_rank` on its own."""

    def __init__(
        self, index: int, dp_rank: int, gpu: GpuModel, cost: PrefillCost, cache: PrefixCache | None = None
    ) -> None:
        self.index = index
        self.dp_rank = dp_rank
        self.pages = Pages()
        self.kv_used_tokens = 0
        self.left_tokens = 0
        """Prompt tokens here that no batch has taken yet."""
        self.bootstrap_tokens = 0
        """Prompts sent here whose decode rank has no room for them yet."""
        self.busy_s_total = 0.0
        self.tokens_total = 0
        self.batch_tokens = 0
        """Tokens of the running batch, 0 when none runs here."""
        self.batch_work_s = 0.0
        self.left_s = 0.0
        """Work of `left_tokens` and `bootstrap_tokens`."""
        self.inflight = 0
        self._cached_tokens = 0
        self._gpu = gpu
        self._cost = cost
        self._cache = cache
        self._waiting: deque[Flight] = deque()
        self._batch: list[tuple[Flight, int]] = []

    def expect(self, flight: Flight) -> None:
        """A request was sent here; it waits for its decode rank to make room."""
        self.bootstrap_tokens += flight.request.prompt_tokens
        self.left_s += self._cost.work_s(0, flight.request.prompt_tokens)

    def add(self, flight: Flight) -> None:
        """The decode rank has made room for an expected one: queue it."""
        flight.left_tokens = flight.request.prompt_tokens
        self.bootstrap_tokens -= flight.left_tokens
        self.left_tokens += flight.left_tokens
        self._waiting.append(flight)

    def fill(self) -> bool:
        """Put the next batch together; False when nothing can run."""
        budget = self._gpu.chunk_tokens
        promised = 0
        for flight in self._waiting:
            if not budget:
                break
            if not flight.admitted:
                if self.kv_used_tokens + promised + flight.left_tokens > self._gpu.kv_capacity_tokens:
                    break
                flight.admitted = True
                self._take_cached(flight)
            take = min(flight.left_tokens, budget)
            first = flight.request.prompt_tokens - flight.left_tokens
            budget -= take
            promised += flight.left_tokens - take
            flight.left_tokens -= take
            self.kv_used_tokens += take
            self.batch_work_s += self._cost.work_s(first, take)
            self._batch.append((flight, take))
        if not self._batch:
            return False
        self.batch_tokens = self._gpu.chunk_tokens - budget
        self.left_tokens -= self.batch_tokens
        self.left_s -= self.batch_work_s
        return True

    def _take_cached(self, flight: Flight) -> None:
        cached = self.cached_tokens(flight.request)
        flight.left_tokens -= cached
        self.kv_used_tokens += cached
        self.left_tokens -= cached
        self.left_s -= self._cost.work_s(0, cached)
        self._cached_tokens += cached

    def cached_tokens(self, request: TraceRequest) -> int:
        """How much of a prompt need not be computed here."""
        return self._cache.hit_tokens(request.blocks, request.prompt_tokens) if self._cache else 0

    def prompt_s(self, request: TraceRequest) -> float:
        """Work of a prompt, were it computed here now."""
        cached = self.cached_tokens(request)
        return self._cost.work_s(cached, request.prompt_tokens - cached)

    def end_batch(self, lasted_s: float) -> tuple[int, list[tuple[Flight, int]]]:
        """Account for the batch. What `PrefillListener.prefilled` is told."""
        self.busy_s_total += lasted_s
        self.tokens_total += self.batch_tokens
        complete = [(flight, take) for flight, take in self._batch if not flight.left_tokens]
        for flight, _ in complete:
            self._waiting.popleft()
            if self._cache:
                self._cache.add(flight.request.blocks, flight.request.prompt_tokens)
        self.inflight += len(complete)
        done = self.batch_tokens + self._cached_tokens
        self._batch = []
        self.batch_tokens = self._cached_tokens = 0
        self.batch_work_s = 0.0
        return done, complete

    def figures(self, at_s: float) -> Figures:
        """The true figures now."""
        return Figures(
            at_s=at_s,
            used_tokens=self.kv_used_tokens,
            queued_tokens=self.left_tokens + self.bootstrap_tokens,
            waiting_uncached_tokens=self.left_tokens,
            waiting_requests=len(self._waiting),
            prefill_tokens_total=self.tokens_total,
            prefill_busy_s_total=self.busy_s_total,
        )

    @property
    def idle(self) -> bool:
        """Nothing waits, runs or is being sent."""
        return not (self._waiting or self.bootstrap_tokens or self.inflight)


class PrefillGroup:
    """Ranks whose batches run together: a batch lasts as long as its largest share."""

    def __init__(
        self, ranks: Sequence[PrefillRank], gpu: GpuModel, cost: PrefillCost, clock: Clock, listener: PrefillListener
    ) -> None:
        self.ranks = ranks
        self._gpu = gpu
        self._cost = cost
        self._clock = clock
        self._listener = listener
        self._running = False
        self._lasts_s = 0.0
        self._ends_s = 0.0

    def add(self, rank: PrefillRank, flight: Flight) -> None:
        """Queue an expected prompt on a rank of this group."""
        self.refresh()
        rank.add(flight)
        self._start()

    def sent(self, rank: PrefillRank, flight: Flight) -> None:
        """Decode has the KV cache of a prompt."""
        rank.kv_used_tokens -= flight.request.prompt_tokens
        rank.inflight -= 1
        self._start()

    def refresh(self) -> None:
        """Publish what a rank without a batch publishes by itself. Call before a page is read."""
        for rank in self.ranks:
            if not rank.batch_tokens:
                rank.pages.stalled(rank.figures(self._clock.now_s), self._gpu, rank.idle)

    def remaining_s(self, rank: PrefillRank) -> float:
        """True time until all prompts sent to a rank are computed, if it had the group for itself."""
        running_s = self._ends_s - self._clock.now_s if rank.batch_tokens else 0.0
        return running_s + rank.left_s

    def _start(self) -> None:
        if self._running:
            return
        work_s = [rank.batch_work_s for rank in self.ranks if rank.fill()]
        if work_s:
            self._running = True
            self._lasts_s = self._cost.batch_s(max(work_s))
            self._ends_s = self._clock.now_s + self._lasts_s
            self._clock.at(self._ends_s, self._end)

    def _end(self, _: None) -> None:
        self._running = False
        for rank in self.ranks:
            if rank.batch_tokens:
                done_tokens, complete = rank.end_batch(self._lasts_s)
                rank.pages.loads = rank.pages.metrics = rank.figures(self._clock.now_s)
                self._listener.prefilled(rank, done_tokens, complete)
        self._start()
