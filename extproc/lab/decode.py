"""Decode ranks: a batch of requests that each get one token a step, in a KV cache of limited size. No I/O.

The order is that of `extproc.sim.decode_rank`, and a test compares the two. The difference is speed: as long as nobody
joins or leaves, a step's time grows by the same amount from step to step, so the time of n steps is a closed form, and
a *segment* of many steps is one event. Ranks of one `DecodeGroup` step together (DP attention): a step takes as long as
its slowest rank's; without DP attention each rank has its own group.
"""

import heapq
import math
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from extproc.lab.clock import Clock
from extproc.lab.pages import Figures, Pages
from extproc.lab.request import Flight
from extproc.sim.gpu import GpuModel


class DecodeListener(Protocol):
    """Who is told what decode has done. Times of flights are written before the call."""

    def allocated(self, flight: Flight) -> None:
        """The KV cache has room for the prompt: prefill may start."""

    def finished(self, flight: Flight) -> None:
        """The last token is out."""


class DecodeRank:
    """One DP rank. Figures of the running batch are those at the start of the group's segment."""

    def __init__(self, index: int, dp_rank: int, gpu: GpuModel) -> None:
        self.index = index
        self.dp_rank = dp_rank
        self.pages = Pages()
        self.batch: dict[Flight, int] = {}
        """Members, in the order of joining -> the group's step count when they had no token yet."""
        self.batch_tokens = 0
        """KV cache of the members."""
        self.kv_used_tokens = 0
        """`batch_tokens`, and what is held for prompts on their way."""
        self.ready: deque[Flight] = deque()
        self.prealloc: deque[Flight] = deque()
        self.retracted: deque[Flight] = deque()
        self.transfers = 0
        self.step_now_s = 0.0
        """Duration of the segment's first step, with all that step together."""
        self.retractions_total = 0
        self._ends: list[tuple[int, int, Flight]] = []
        self._joined = 0
        self._gpu = gpu

    def step_s(self) -> float:
        """Duration of the segment's first step, as far as this rank is concerned; 0 without a batch."""
        return self._gpu.decode_s(len(self.batch), self.batch_tokens) if self.batch else 0.0

    def join(self, flight: Flight, steps: int) -> None:
        """Take a flight into the batch before step number `steps`."""
        self.batch[flight] = steps - flight.generated_tokens
        self.batch_tokens += flight.request.prompt_tokens + flight.generated_tokens
        self._joined += 1
        end = steps + flight.request.output_tokens - flight.generated_tokens
        heapq.heappush(self._ends, (end, self._joined, flight))

    def leave(self, flight: Flight, steps: int) -> None:
        """Take a flight out of batch and KV cache."""
        flight.generated_tokens = steps - self.batch.pop(flight)
        freed = flight.request.prompt_tokens + flight.generated_tokens
        self.batch_tokens -= freed
        self.kv_used_tokens -= freed

    def next_end(self) -> int | None:
        """The step count at which the next member has all its tokens."""
        while self._ends:
            end, _, flight = self._ends[0]
            joined = self.batch.get(flight)
            if joined is not None and joined + flight.request.output_tokens == end:
                return end
            heapq.heappop(self._ends)  # it was retracted
        return None

    def take_due(self, steps: int) -> Flight:
        """Take out the member that `next_end` spoke of."""
        flight = heapq.heappop(self._ends)[2]
        self.leave(flight, steps)
        return flight

    def stepped(self, count: int) -> None:
        """`count` steps are over: every member has that many tokens more."""
        made = count * len(self.batch)
        self.batch_tokens += made
        self.kv_used_tokens += made

    def figures(self, at_s: float, extra_steps: int = 0) -> Figures:
        """The true figures `extra_steps` into the segment."""
        return Figures(
            at_s=at_s,
            used_tokens=self.kv_used_tokens + extra_steps * len(self.batch),
            queued_tokens=sum(flight.request.prompt_tokens for flight in (*self.prealloc, *self.retracted)),
            running_requests=len(self.batch),
            waiting_requests=len(self.ready),
            # The engine divides the tokens of its last steps by their time, which is the same but for the lag.
            output_tokens_per_s=len(self.batch) / self.step_now_s if self.batch else 0.0,
        )

    @property
    def idle(self) -> bool:
        """Nothing runs, waits or is on its way."""
        return not (self.batch or self.ready or self.prealloc or self.retracted or self.transfers)


class DecodeGroup:
    """Ranks that step together."""

    def __init__(self, ranks: Sequence[DecodeRank], gpu: GpuModel, clock: Clock, listener: DecodeListener) -> None:
        self.ranks = ranks
        self.steps = 0
        """Steps done when the segment began."""
        self._gpu = gpu
        self._clock = clock
        self._listener = listener
        self._kv_token_s = gpu.decode_per_kv_token_us / 1e6
        self._version = 0
        self._planned = 0
        """Steps of the segment; 0: none runs."""
        self._start_s = 0.0
        self._first_step_s = 0.0
        self._growth_s = 0.0
        """By how much each step is longer than the one before."""
        self._published_metrics = 0
        self._published_loads = 0

    # what happens from outside

    def submit(self, rank: DecodeRank, flight: Flight) -> None:
        """A request was sent here; it needs room in the KV cache first."""
        self.refresh()
        rank.prealloc.append(flight)
        self._allocate(rank)
        if self._planned and rank.batch:
            planned = max(self._until_full(rank), self._steps_done() + 1)
            if planned < self._planned:
                self._plan(planned)

    def received(self, rank: DecodeRank, flight: Flight) -> None:
        """The KV cache of a prompt has come: it joins at the next step."""
        rank.transfers -= 1
        rank.ready.append(flight)
        if not self._planned:
            self._start()
        elif len(rank.batch) < self._gpu.max_running_requests:
            planned = min(self._planned, self._steps_done() + 1)
            if planned < self._planned:
                self._plan(planned)

    def refresh(self) -> None:
        """Publish all that is due by now. Call before a page is read and before figures change."""
        if self._planned:
            self._publish(self._steps_done())
        else:
            for rank in self.ranks:
                rank.pages.stalled(rank.figures(self._clock.now_s), self._gpu, rank.idle)

    def batch_now(self, rank: DecodeRank) -> list[tuple[int, int]]:
        """For each member of the batch: KV tokens held, and output tokens still to come."""
        steps = self.steps + self._steps_done()
        return [
            (flight.request.prompt_tokens + steps - joined, flight.request.output_tokens - (steps - joined))
            for flight, joined in rank.batch.items()
        ]

    # time within a segment

    def _lasts_s(self, steps: int) -> float:
        """Duration of the segment's first steps."""
        return steps * self._first_step_s + self._growth_s * (steps * (steps - 1) // 2)

    def _steps_done(self) -> int:
        """Steps of the running segment that are over now."""
        if not self._planned:
            return 0
        elapsed_s = self._clock.now_s - self._start_s
        if elapsed_s >= self._lasts_s(self._planned):
            return self._planned
        # Solve growth/2 n^2 + (first - growth/2) n = elapsed; the float's error is mended below.
        linear, growth = self._first_step_s - self._growth_s / 2, self._growth_s
        done = int(2 * elapsed_s / (linear + math.sqrt(linear * linear + 2 * growth * elapsed_s)))
        while self._lasts_s(done + 1) <= elapsed_s:
            done += 1
        while done and self._lasts_s(done) > elapsed_s:
            done -= 1
        return done

    def _plan(self, steps: int) -> None:
        self._planned = steps
        self._version += 1
        self._clock.at(self._start_s + self._lasts_s(steps), self._end, self._version)

    # from segment to segment

    def _end(self, version: int) -> None:
        if version != self._version:
            return
        planned = self._planned
        self._publish(planned - 1)
        self._planned = 0
        self.steps += planned
        for rank in self.ranks:
            if rank.batch:
                rank.stepped(planned)
                self._finish_due(rank)
                self._retract(rank)
        self._publish_now()
        for rank in self.ranks:
            self._allocate(rank)
        self._start()

    def _finish_due(self, rank: DecodeRank) -> None:
        while (end := rank.next_end()) is not None and end <= self.steps:
            self._finish(rank.take_due(self.steps))

    def _finish(self, flight: Flight) -> None:
        flight.finished_s = self._clock.now_s
        self._listener.finished(flight)

    def _retract(self, rank: DecodeRank) -> None:
        while rank.kv_used_tokens > self._gpu.kv_capacity_tokens and len(rank.batch) > 1:
            youngest = next(reversed(rank.batch))
            rank.leave(youngest, self.steps)
            rank.retracted.appendleft(youngest)
            rank.retractions_total += 1

    def _allocate(self, rank: DecodeRank) -> None:
        """Give KV cache to those that wait, first come first served, retracted ones first."""
        if not (rank.prealloc or rank.retracted):
            return
        reserved = self._gpu.reserved_decode_tokens
        active = len(rank.batch) + rank.transfers + len(rank.ready)
        used = rank.kv_used_tokens + self._steps_done() * len(rank.batch)
        free = self._gpu.kv_capacity_tokens - used - active * reserved
        while rank.retracted:
            flight = rank.retracted[0]
            need = flight.request.prompt_tokens + flight.generated_tokens
            if need + reserved > free and active:
                return
            rank.retracted.popleft()
            rank.kv_used_tokens += need
            free -= need + reserved
            active += 1
            rank.ready.appendleft(flight)
        while rank.prealloc:
            flight = rank.prealloc[0]
            need = flight.request.prompt_tokens
            if need + reserved > free:
                return
            rank.prealloc.popleft()
            rank.kv_used_tokens += need
            free -= need + reserved
            rank.transfers += 1
            self._listener.allocated(flight)

    def _start(self) -> None:
        """Let the ready ones join and plan the next segment: up to the first step that changes a batch."""
        for rank in self.ranks:
            self._join_ready(rank)
        slowest = max(self.ranks, key=lambda rank: (rank.step_s(), len(rank.batch)))
        if not slowest.batch:
            return
        self._start_s = self._clock.now_s
        self._first_step_s = slowest.step_s()
        self._growth_s = self._kv_token_s * len(slowest.batch)
        planned = self._until_overtaken(slowest)
        for rank in self.ranks:
            rank.step_now_s = self._first_step_s
            end = rank.next_end()
            if end is not None:
                planned = min(planned, end - self.steps)
                planned = min(planned, self._until_full(rank))
        self._plan(planned)

    def _until_full(self, rank: DecodeRank) -> int:
        """Steps, from the segment's start, until a batch has outgrown the KV cache."""
        if len(rank.batch) < 2:
            return 1 << 30
        return max(1, (self._gpu.kv_capacity_tokens - rank.kv_used_tokens) // len(rank.batch) + 1)

    def _until_overtaken(self, slowest: DecodeRank) -> int:
        """Steps until another rank's larger batch makes it the slowest one."""
        steps = 1 << 30
        for rank in self.ranks:
            faster_growth = self._kv_token_s * (len(rank.batch) - len(slowest.batch))
            if faster_growth > 0:
                steps = min(steps, int((self._first_step_s - rank.step_s()) / faster_growth) + 1)
        return steps

    def _join_ready(self, rank: DecodeRank) -> None:
        while rank.ready and len(rank.batch) < self._gpu.max_running_requests:
            flight = rank.ready.popleft()
            if not flight.generated_tokens:  # the first token comes from prefill
                flight.generated_tokens = 1
                flight.first_token_s = self._clock.now_s
                rank.kv_used_tokens += 1
            if flight.generated_tokens >= flight.request.output_tokens:
                rank.kv_used_tokens -= flight.request.prompt_tokens + flight.generated_tokens
                self._finish(flight)
            else:
                rank.join(flight, self.steps)

    # publication

    def _publish(self, done: int) -> None:
        """Publish what fell due within the first `done` steps of the segment, with the figures of that step."""
        steps, gpu = self.steps + done, self._gpu
        loads = steps - steps % gpu.loads_decode_interval
        if loads > self._published_loads:
            self._published_loads = loads
            at_s = self._start_s + self._lasts_s(loads - self.steps)
            for rank in self.ranks:
                rank.pages.loads = rank.figures(at_s, loads - self.steps)
        metrics = steps - steps % gpu.metrics_decode_interval
        if metrics > self._published_metrics:
            self._published_metrics = metrics
            at_s = self._start_s + self._lasts_s(metrics - self.steps)
            for rank in self.ranks:
                rank.pages.metrics = rank.figures(at_s, metrics - self.steps)

    def _publish_now(self) -> None:
        """A step has just ended, and with it a segment."""
        if self.steps % self._gpu.loads_decode_interval == 0:
            self._published_loads = self.steps
            for rank in self.ranks:
                rank.pages.loads = rank.figures(self._clock.now_s)
        if self.steps % self._gpu.metrics_decode_interval == 0:
            self._published_metrics = self.steps
            for rank in self.ranks:
                rank.pages.metrics = rank.figures(self._clock.now_s)
