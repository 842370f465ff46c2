"""A DP rank of an engine without disaggregation: prefill and decode on the same GPU. No I/O, no clocks.

As in the engine's default schedule, a prefill batch goes before the next decode step; the running requests wait for it.
Simplified: output may grow past the KV cache (no retraction); prompts wait for free cache as they should.
"""

from extproc.sim.decode_batch import DecodeBatch
from extproc.sim.gpu import GpuModel
from extproc.sim.job import Event, Job, Phase
from extproc.sim.rank import PrefillWork, Rank
from extproc.sim.snapshot import Figures


class UnifiedRank(Rank):
    """Queues: waiting, the batch."""

    def __init__(self, index: int, gpu: GpuModel) -> None:
        super().__init__(index, gpu)
        self._work = PrefillWork()
        self.batch = DecodeBatch()

    @property
    def idle(self) -> bool:
        return not (self._work.waiting or self.batch)

    def submit(self, job: Job, now_s: float, events: list[Event]) -> None:
        self._work.add(job)
        self._start(now_s, events)

    def abort(self, job: Job, now_s: float, events: list[Event]) -> None:
        if job.phase is Phase.WAITING:
            self._drop_from_prefill(self._work, job)
        elif job.phase is Phase.RUNNING:
            self.kv_used_tokens -= self.batch.remove(job)
        job.phase = Phase.DONE
        job.finished_s = now_s
        self._start(now_s, events)

    def generated(self, job: Job) -> int:
        return self.batch.generated(job) if job.phase is Phase.RUNNING else job.generated_tokens

    def _happen(self, at_s: float, events: list[Event]) -> None:
        if self._work.batch:
            for job, _ in self._end_prefill_batch(self._work):
                self._begin_decode(job, at_s, events)
            self.publisher.prefill_batch(at_s, self.output_tokens_total)
            return
        self._batch_ends_s = None
        members = len(self.batch)
        self.output_tokens_total += members
        self.kv_used_tokens += members
        for job in self.batch.step():
            self.kv_used_tokens -= self.batch.remove(job)
            self._finish(job, at_s, events)
        self.publisher.decode_iteration(at_s, self.output_tokens_total)

    def _begin_decode(self, job: Job, at_s: float, events: list[Event]) -> None:
        job.generated_tokens = 1
        self.output_tokens_total += 1
        self.kv_used_tokens += 1
        self._first_token(job, at_s, events)
        if job.output_tokens <= 1:
            self.kv_used_tokens -= job.prompt_tokens + 1
            self._finish(job, at_s, events)
            return
        job.phase = Phase.RUNNING
        self.batch.add(job)

    def _start(self, at_s: float, events: list[Event]) -> None:
        if self._batch_ends_s is not None:
            return
        if self._work.waiting:
            self._fill_prefill_batch(self._work, at_s, self.gpu.max_running_requests - len(self.batch))
        if self._batch_ends_s is None and self.batch:
            self._batch_ends_s = at_s + self.gpu.decode_s(len(self.batch), self.batch.kv_tokens)

    def _measure(self, at_s: float, output_tokens_per_s: float) -> Figures:
        uncached = self._work.left_tokens
        return Figures(
            at_s=at_s,
            running_reqs=len(self.batch),
            waiting_reqs=len(self._work.waiting),
            waiting_uncached_tokens=uncached,
            used_tokens=self.kv_used_tokens,
            queued_tokens=uncached,
            prefill_tokens_total=self._work.tokens_total,
            prefill_busy_s_total=self._work.busy_s_total,
            output_tokens_total=self.output_tokens_total,
            output_tokens_per_s=output_tokens_per_s,
        )
