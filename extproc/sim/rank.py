"""What every DP rank has, whatever its role: virtual time, the KV cache, the one batch that runs. No I/O, no clocks.

A rank is driven from outside: tell it what happened at a time (`submit`, `abort`, ...), let it run up to a time with
`advance`, ask `next_s` when it next has something to do. Work started while nobody looked keeps its exact virtual time,
so a driver that comes late loses nothing. Calls that can bring something about take the list to which events are added.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from itertools import islice

from extproc.sim.gpu import GpuModel
from extproc.sim.job import Event, EventKind, Job, Phase
from extproc.sim.snapshot import Figures, Publisher


class PrefillWork:
    """FIFO chunked prefill: the waiting queue and the chunks of the batch that runs.

    A job stays in the queue until its whole prompt is computed; only the first one can be partly done between batches.
    """

    __slots__ = ("batch", "batch_tokens", "busy_s_total", "left_tokens", "tokens_total", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[Job] = deque()
        self.batch: list[tuple[Job, int]] = []
        self.batch_tokens = 0
        self.busy_s_total = 0.0
        self.tokens_total = 0
        self.left_tokens = 0
        """Prompt tokens that no batch has taken yet."""

    def add(self, job: Job) -> None:
        """Queue a prompt."""
        job.phase = Phase.WAITING
        self.waiting.append(job)
        self.left_tokens += job.prompt_tokens


class Rank(ABC):
    """One DP rank. The subclass decides which batch runs next and what follows from it."""

    def __init__(self, index: int, gpu: GpuModel) -> None:
        self.index = index
        self.gpu = gpu
        self.kv_used_tokens = 0
        self.output_tokens_total = 0
        self.publisher = Publisher(gpu, self._measure)
        self._batch_ends_s: float | None = None

    # what a driver calls

    @abstractmethod
    def submit(self, job: Job, now_s: float, events: list[Event]) -> None:
        """Queue a job that the engine has accepted. `advance` to `now_s` first."""

    @abstractmethod
    def abort(self, job: Job, now_s: float, events: list[Event]) -> None:
        """Drop a job at once, silently: no event tells of it."""

    def next_s(self) -> float | None:
        """When something happens next, if nothing comes from outside; None: never."""
        return self._batch_ends_s

    def advance(self, now_s: float, events: list[Event]) -> None:
        """Let everything happen that is due by `now_s`."""
        while (due_s := self.next_s()) is not None and due_s <= now_s:
            self._happen(due_s, events)
            self._start(due_s, events)

    def generated(self, job: Job) -> int:
        """Tokens that the job has so far."""
        return job.generated_tokens

    @property
    @abstractmethod
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""

    def figures(self, now_s: float) -> tuple[Figures, Figures]:
        """What /metrics and /v1/loads would show at `now_s`."""
        if self._batch_ends_s is None:
            self.publisher.no_batch(now_s, self.output_tokens_total, self.idle)
        return self.publisher.metrics.figures, self.publisher.loads.figures

    # what a subclass fills in

    @abstractmethod
    def _happen(self, at_s: float, events: list[Event]) -> None:
        """Carry out what is due at `at_s` (the value of `next_s`)."""

    @abstractmethod
    def _start(self, at_s: float, events: list[Event]) -> None:
        """Start a batch if none runs and there is work."""

    @abstractmethod
    def _measure(self, at_s: float, output_tokens_per_s: float) -> Figures:
        """The true figures now."""

    # shared parts

    def _finish(self, job: Job, at_s: float, events: list[Event]) -> None:
        job.phase = Phase.DONE
        job.finished_s = at_s
        events.append(Event(EventKind.FINISHED, job, at_s))

    def _fail(self, job: Job, at_s: float, events: list[Event], message: str, status: int = 500) -> None:
        job.phase = Phase.DONE
        job.finished_s = at_s
        events.append(Event(EventKind.FAILED, job, at_s, status, message))

    def _first_token(self, job: Job, at_s: float, events: list[Event]) -> None:
        job.first_token_s = at_s
        events.append(Event(EventKind.FIRST_TOKEN, job, at_s))

    def _fill_prefill_batch(self, work: PrefillWork, at_s: float, limit_jobs: int) -> None:
        """Put the next chunk of tokens together, first come first served, and start it if there is any.

        A prompt is admitted when the whole of it fits into the KV cache beside what an admitted prompt will still take;
        the cache fills chunk by chunk. A head that does not fit blocks those behind it, as in the engine.
        """
        budget = self.gpu.chunk_tokens
        head = work.waiting[0]
        promised = head.prompt_tokens - head.prefilled_tokens if head.prefilled_tokens else 0
        for job in islice(work.waiting, limit_jobs):
            if not budget:
                break
            left = job.prompt_tokens - job.prefilled_tokens
            if not job.prefilled_tokens:
                if self.kv_used_tokens + promised + left > self.gpu.kv_capacity_tokens:
                    break
                promised += left
            take = min(left, budget)
            budget -= take
            promised -= take
            self.kv_used_tokens += take
            job.prefilled_tokens += take
            work.batch.append((job, take))
        if work.batch:
            work.batch_tokens = self.gpu.chunk_tokens - budget
            work.left_tokens -= work.batch_tokens
            self._batch_ends_s = at_s + self.gpu.prefill_s(work.batch_tokens)

    def _end_prefill_batch(self, work: PrefillWork) -> list[tuple[Job, int]]:
        """Account for the batch that just ended; returns the jobs whose prompt is complete, with their last chunk."""
        work.busy_s_total += self.gpu.prefill_s(work.batch_tokens)
        work.tokens_total += work.batch_tokens
        complete = [(job, take) for job, take in work.batch if self._prompt_done(job)]
        work.batch = []
        for job, _ in complete:
            work.waiting.remove(job)  # at the front: the queue is first come, first served
        self._batch_ends_s = None
        return complete

    @staticmethod
    def _prompt_done(job: Job) -> bool:
        return job.phase is Phase.WAITING and job.prefilled_tokens == job.prompt_tokens

    def _drop_from_prefill(self, work: PrefillWork, job: Job) -> None:
        """Take an aborted job out of queue and cache. Its chunk still takes its time in a batch that runs."""
        work.waiting.remove(job)
        work.left_tokens -= job.prompt_tokens - job.prefilled_tokens
        self.kv_used_tokens -= job.prefilled_tokens
        job.prefilled_tokens = 0


def tokens_of(jobs: Iterable[Job]) -> int:
    """Sum of prompt lengths."""
    return sum(job.prompt_tokens for job in jobs)
