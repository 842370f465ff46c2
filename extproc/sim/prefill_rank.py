"""A DP rank of a prefill engine. No I/O, no clocks.

The order is the engine's (`disaggregation/prefill.py`): a request waits in the bootstrap queue until the decode engine
has allocated memory and said where to write; only then is it computed; then its KV cache is sent, and only when decode
has it does the request end.
"""

import heapq
from itertools import count

from extproc.sim.gpu import GpuModel
from extproc.sim.job import Event, EventKind, Job, Phase
from extproc.sim.rank import PrefillWork, Rank, tokens_of
from extproc.sim.snapshot import Figures


class PrefillRank(Rank):
    """Queues: bootstrap, waiting, inflight."""

    def __init__(self, index: int, gpu: GpuModel, bootstrap_timeout_s: float) -> None:
        super().__init__(index, gpu)
        self._bootstrap_timeout_s = bootstrap_timeout_s
        self._bootstrap: dict[int, Job] = {}  # by room, in order of arrival
        self._announced: set[int] = set()  # rooms that decode named before their request came
        self._work = PrefillWork()
        self._inflight: dict[Job, None] = {}
        self._sends: list[tuple[float, int, Job]] = []  # (end of transfer, order, job)
        self._order = count()

    @property
    def idle(self) -> bool:
        return not (self._bootstrap or self._work.waiting or self._inflight)

    def submit(self, job: Job, now_s: float, events: list[Event]) -> None:
        room = job.room
        if room is None or room in self._announced:
            if room is not None:
                self._announced.remove(room)
            self._work.add(job)
            self._start(now_s, events)
        else:
            job.phase = Phase.BOOTSTRAP
            self._bootstrap[room] = job

    def announce(self, room: int, now_s: float, events: list[Event]) -> None:
        """Decode has room for `room` and waits for it here. May come before the request."""
        job = self._bootstrap.pop(room, None)
        if job is None:
            self._announced.add(room)
            return
        self._work.add(job)
        self._start(now_s, events)

    def withdraw(self, room: int) -> None:
        """Decode no longer waits for a room whose request has not come."""
        self._announced.discard(room)

    def taken(self, job: Job, now_s: float, events: list[Event]) -> None:
        """Decode has the KV cache: the request ends, with the one token that prefill made."""
        if job.phase is not Phase.INFLIGHT:
            return
        del self._inflight[job]
        self.kv_used_tokens -= job.prompt_tokens
        job.generated_tokens = 1
        self._first_token(job, now_s, events)
        self._finish(job, now_s, events)
        self._start(now_s, events)

    def abort(self, job: Job, now_s: float, events: list[Event]) -> None:
        if job.phase is Phase.BOOTSTRAP and job.room is not None:
            self._bootstrap.pop(job.room, None)
        elif job.phase is Phase.WAITING:
            self._drop_from_prefill(self._work, job)
        elif job.phase is Phase.INFLIGHT:
            del self._inflight[job]
            self.kv_used_tokens -= job.prompt_tokens
        job.phase = Phase.DONE
        job.finished_s = now_s
        self._start(now_s, events)

    def next_s(self) -> float | None:
        due = [self._batch_ends_s, self._sends[0][0] if self._sends else None, self._deadline_s()]
        return min((at_s for at_s in due if at_s is not None), default=None)

    def _deadline_s(self) -> float | None:
        """When the oldest request of the bootstrap queue has waited too long."""
        for job in self._bootstrap.values():
            return job.arrived_s + self._bootstrap_timeout_s
        return None

    def _happen(self, at_s: float, events: list[Event]) -> None:
        if self._batch_ends_s == at_s:
            for job, last_chunk in self._end_prefill_batch(self._work):
                job.phase = Phase.INFLIGHT
                self._inflight[job] = None
                done_s = at_s + self.gpu.transfer_s(last_chunk)
                heapq.heappush(self._sends, (done_s, next(self._order), job))
            self.publisher.prefill_batch(at_s, self.output_tokens_total)
        elif self._sends and self._sends[0][0] == at_s:
            job = heapq.heappop(self._sends)[2]
            if job.phase is Phase.INFLIGHT:
                events.append(Event(EventKind.KV_SENT, job, at_s))
        else:
            room, job = next(iter(self._bootstrap.items()))
            del self._bootstrap[room]
            self._fail(job, at_s, events, self._timeout_message(job))

    def _start(self, at_s: float, events: list[Event]) -> None:
        if self._batch_ends_s is None and self._work.waiting:
            self._fill_prefill_batch(self._work, at_s, len(self._work.waiting))

    def _timeout_message(self, job: Job) -> str:
        waited = f"Request {job.room} timed out after {self._bootstrap_timeout_s:.1f}s in KVPoll.Bootstrapping"
        return bootstrap_failed(self.index, job, waited)

    def _measure(self, at_s: float, output_tokens_per_s: float) -> Figures:
        # running_reqs stays 0: the engine counts its decode batch there, which a prefill engine does not have.
        uncached = self._work.left_tokens
        return Figures(
            at_s=at_s,
            waiting_reqs=len(self._work.waiting),
            waiting_uncached_tokens=uncached,
            used_tokens=self.kv_used_tokens,
            queued_tokens=uncached + tokens_of(self._bootstrap.values()),
            bootstrap_reqs=len(self._bootstrap),
            inflight_reqs=len(self._inflight),
            prefill_tokens_total=self._work.tokens_total,
            prefill_busy_s_total=self._work.busy_s_total,
        )


def bootstrap_failed(rank: int, job: Job, reason: str) -> str:
    """What prefill answers when the handshake with decode fails (`disaggregation/prefill.py`)."""
    return (
        f"Prefill bootstrap failed for request rank={rank} req.rid={job.rid!r} req.bootstrap_room={job.room} "
        f"with exception KVTransferError(bootstrap_room={job.room}): {reason}"
    )


def transfer_failed(rank: int, job: Job, reason: str) -> str:
    """What prefill answers when the KV transfer fails (`disaggregation/prefill.py`)."""
    return (
        f"Prefill transfer failed for request rank={rank} req.rid={job.rid!r} req.bootstrap_room={job.room} "
        f"with exception KVTransferError(bootstrap_room={job.room}): {reason}"
    )
