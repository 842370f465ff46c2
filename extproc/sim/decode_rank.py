"""A DP rank of a decode engine. No I/O, no clocks.

The order is the engine's (`disaggregation/decode.py`): a request waits until its KV cache can be allocated, then for
the data from prefill, then joins the decode batch with the first token, which prefill made. When the cache runs full,
the youngest requests are retracted and come back before new ones are let in.
"""

from collections import deque

from extproc.sim.decode_batch import DecodeBatch
from extproc.sim.gpu import GpuModel
from extproc.sim.job import Event, EventKind, Job, Phase
from extproc.sim.rank import Rank, tokens_of
from extproc.sim.snapshot import Figures


class DecodeRank(Rank):
    """Queues: prealloc, transfer, ready, the batch, retracted."""

    def __init__(self, index: int, gpu: GpuModel, waiting_timeout_s: float) -> None:
        super().__init__(index, gpu)
        self._waiting_timeout_s = waiting_timeout_s
        self._prealloc: dict[Job, None] = {}
        self._transfer: dict[Job, float] = {}  # deadline, in order of allocation
        self._ready: deque[Job] = deque()
        self._retracted: deque[Job] = deque()
        self.batch = DecodeBatch()

    @property
    def idle(self) -> bool:
        return not (self._prealloc or self._transfer or self._ready or self._retracted or self.batch)

    def submit(self, job: Job, now_s: float, events: list[Event]) -> None:
        job.phase = Phase.PREALLOC
        self._prealloc[job] = None
        self._start(now_s, events)

    def received(self, job: Job, now_s: float, events: list[Event]) -> None:
        """Prefill's KV cache is here."""
        if job.phase is not Phase.TRANSFER:
            return
        del self._transfer[job]
        job.phase = Phase.READY
        self._ready.append(job)
        self._start(now_s, events)

    def abort(self, job: Job, now_s: float, events: list[Event]) -> None:
        if job.phase is Phase.PREALLOC:
            del self._prealloc[job]
        elif job.phase is Phase.TRANSFER:
            del self._transfer[job]
            self.kv_used_tokens -= job.prompt_tokens
        elif job.phase is Phase.READY:
            self._ready.remove(job)
            self.kv_used_tokens -= job.prompt_tokens
        elif job.phase is Phase.RETRACTED:
            self._retracted.remove(job)
        elif job.phase is Phase.RUNNING:
            self.kv_used_tokens -= self.batch.remove(job)
        job.phase = Phase.DONE
        job.finished_s = now_s
        self._start(now_s, events)

    def generated(self, job: Job) -> int:
        return self.batch.generated(job) if job.phase is Phase.RUNNING else job.generated_tokens

    def next_s(self) -> float | None:
        deadline_s = next(iter(self._transfer.values()), None)
        if self._batch_ends_s is None or deadline_s is None:
            return deadline_s if self._batch_ends_s is None else self._batch_ends_s
        return min(self._batch_ends_s, deadline_s)

    def _happen(self, at_s: float, events: list[Event]) -> None:
        if self._batch_ends_s == at_s:
            self._end_step(at_s, events)
            return
        job = next(iter(self._transfer))
        del self._transfer[job]
        self.kv_used_tokens -= job.prompt_tokens
        reason = f"Request {job.room} timed out after {self._waiting_timeout_s:.1f}s in KVPoll.WaitingForInput"
        self._fail(job, at_s, events, transfer_failed(self.index, job, reason))

    def _end_step(self, at_s: float, events: list[Event]) -> None:
        self._batch_ends_s = None
        members = len(self.batch)
        self.output_tokens_total += members
        self.kv_used_tokens += members
        for job in self.batch.step():
            self.kv_used_tokens -= self.batch.remove(job)
            self._finish(job, at_s, events)
        while self.kv_used_tokens > self.gpu.kv_capacity_tokens and len(self.batch) > 1:
            job = self.batch.youngest()
            self.kv_used_tokens -= self.batch.remove(job)
            job.phase = Phase.RETRACTED
            job.retractions += 1
            self._retracted.appendleft(job)
        self.publisher.decode_iteration(at_s, self.output_tokens_total)

    def _start(self, at_s: float, events: list[Event]) -> None:
        self._allocate(at_s, events)
        if self._batch_ends_s is not None:
            return
        while self._ready and len(self.batch) < self.gpu.max_running_requests:
            self._join(self._ready.popleft(), at_s, events)
        if self.batch:
            self._batch_ends_s = at_s + self.gpu.decode_s(len(self.batch), self.batch.kv_tokens)

    def _join(self, job: Job, at_s: float, events: list[Event]) -> None:
        if not job.generated_tokens:
            job.generated_tokens = 1
            self.output_tokens_total += 1
            self.kv_used_tokens += 1
            self._first_token(job, at_s, events)
        if job.generated_tokens >= job.output_tokens:
            self.kv_used_tokens -= job.prompt_tokens + job.generated_tokens
            self._finish(job, at_s, events)
            return
        job.phase = Phase.RUNNING
        self.batch.add(job)

    def _allocate(self, at_s: float, events: list[Event]) -> None:
        """Give KV cache to those that wait, first come first served, retracted ones first."""
        if not (self._prealloc or self._retracted):
            return
        active = len(self.batch) + len(self._transfer) + len(self._ready)
        free = self.gpu.kv_capacity_tokens - self.kv_used_tokens - active * self.gpu.reserved_decode_tokens
        while self._retracted:
            job = self._retracted[0]
            need = job.prompt_tokens + job.generated_tokens
            if need + self.gpu.reserved_decode_tokens > free and active:
                return
            self._retracted.popleft()
            self.kv_used_tokens += need
            free -= need + self.gpu.reserved_decode_tokens
            active += 1
            job.phase = Phase.READY
            self._ready.appendleft(job)
        while self._prealloc:
            job = next(iter(self._prealloc))
            if job.prompt_tokens + self.gpu.reserved_decode_tokens > free:
                return
            del self._prealloc[job]
            self.kv_used_tokens += job.prompt_tokens
            free -= job.prompt_tokens + self.gpu.reserved_decode_tokens
            job.phase = Phase.TRANSFER
            self._transfer[job] = at_s + self._waiting_timeout_s
            events.append(Event(EventKind.KV_ALLOCATED, job, at_s))

    def _measure(self, at_s: float, output_tokens_per_s: float) -> Figures:
        return Figures(
            at_s=at_s,
            running_reqs=len(self.batch),
            waiting_reqs=len(self._ready),
            used_tokens=self.kv_used_tokens,
            queued_tokens=tokens_of(self._prealloc) + tokens_of(self._retracted),
            prealloc_reqs=len(self._prealloc),
            transfer_reqs=len(self._transfer),
            retracted_reqs=len(self._retracted),
            output_tokens_total=self.output_tokens_total,
            output_tokens_per_s=output_tokens_per_s,
        )


def transfer_failed(rank: int, job: Job, reason: str) -> str:
    """What decode answers when it does not get its KV cache (`disaggregation/decode.py`)."""
    return (
        f"Decode transfer failed for request rank={rank} decode_req.req.rid={job.rid!r} "
        f"decode_req.req.bootstrap_room={job.room} with exception KVTransferError(bootstrap_room={job.room}): {reason}"
    )
