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
from extproc.lab.request import Flight
from extproc.sim.gpu import GpuModel


class PrefillListener(Protocol):
    """Who is told what prefill has done."""

    def prefilled(self, rank: "PrefillRank", tokens: int, complete: Sequence[tuple[Flight, int]]) -> None:
        """A batch of `tokens` ended on a rank; each prompt that is now complete comes with its last chunk's tokens."""


class PrefillRank:
    """One DP rank. `index` counts over all prefill workers, `dp_rank` on its own."""

    def __init__(self, index: int, dp_rank: int, gpu: GpuModel) -> None:
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
        self.inflight = 0
        self._gpu = gpu
        self._waiting: deque[Flight] = deque()
        self._batch: list[tuple[Flight, int]] = []

    def add(self, flight: Flight) -> None:
        """Queue a prompt whose decode rank has made room."""
        flight.left_tokens = flight.request.prompt_tokens
        self._waiting.append(flight)
        self.left_tokens += flight.left_tokens

    def fill(self) -> int:
        """Put the next batch together; its tokens, 0 when nothing can run."""
        budget = self._gpu.chunk_tokens
        promised = 0
        for flight in self._waiting:
            if not budget:
                break
            if flight.admitted:
                promised += flight.left_tokens
            elif self.kv_used_tokens + promised + flight.left_tokens > self._gpu.kv_capacity_tokens:
                break
            else:
                flight.admitted = True
                promised += flight.left_tokens
            take = min(flight.left_tokens, budget)
            budget -= take
            promised -= take
            flight.left_tokens -= take
            self.kv_used_tokens += take
            self._batch.append((flight, take))
        self.batch_tokens = self._gpu.chunk_tokens - budget if self._batch else 0
        self.left_tokens -= self.batch_tokens
        return self.batch_tokens

    def end_batch(self, lasted_s: float) -> list[tuple[Flight, int]]:
        """Account for the batch; the flights whose prompt is complete, with their last chunk's tokens."""
        self.busy_s_total += lasted_s
        self.tokens_total += self.batch_tokens
        complete = [(flight, take) for flight, take in self._batch if not flight.left_tokens]
        for _ in complete:
            self._waiting.popleft()
        self.inflight += len(complete)
        self._batch = []
        self.batch_tokens = 0
        return complete

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

    def __init__(self, ranks: Sequence[PrefillRank], gpu: GpuModel, clock: Clock, listener: PrefillListener) -> None:
        self.ranks = ranks
        self._gpu = gpu
        self._clock = clock
        self._listener = listener
        self._running = False
        self._lasts_s = 0.0
        self._ends_s = 0.0

    def add(self, rank: PrefillRank, flight: Flight) -> None:
        """Queue a prompt on a rank of this group."""
        self.refresh()
        rank.add(flight)
        self._start()

    def sent(self, rank: PrefillRank, flight: Flight) -> None:
        """Decode has the KV cache of a prompt."""
        rank.kv_used_tokens -= flight.request.prompt_tokens
        rank.inflight -= 1
        self._start()

    def refresh(self) -> None:
        """Publish what a stalled rank publishes by itself. Call before a page is read."""
        if not self._running:
            for rank in self.ranks:
                rank.pages.stalled(rank.figures(self._clock.now_s), self._gpu, rank.idle)

    def remaining_s(self, rank: PrefillRank) -> float:
        """True time until all prompts sent to a rank are computed, if it had the group for itself."""
        running_s = self._ends_s - self._clock.now_s if rank.batch_tokens else 0.0
        return running_s + (rank.left_tokens + rank.bootstrap_tokens) / self._gpu.prefill_tokens_per_s

    def _start(self) -> None:
        if self._running:
            return
        tokens = max([rank.fill() for rank in self.ranks])
        if tokens:
            self._running = True
            self._lasts_s = self._gpu.prefill_s(tokens)
            self._ends_s = self._clock.now_s + self._lasts_s
            self._clock.at(self._ends_s, self._end)

    def _end(self, _: None) -> None:
        self._running = False
        for rank in self.ranks:
            tokens = rank.batch_tokens
            if tokens:
                complete = rank.end_batch(self._lasts_s)
                rank.pages.loads = rank.pages.metrics = rank.figures(self._clock.now_s)
                self._listener.prefilled(rank, tokens, complete)
        self._start()
