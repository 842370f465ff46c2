"""Runs the engine model in scaled real time, on one event loop, with one timer for the whole engine.

Owns the jobs that are under way. What lies outside the model (HTTP clients, the other engine) hears of a job's progress
in two ways: its `wake` event, and the `on_…` callbacks that a side of the KV transfer hangs in.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from extproc.sim.job import Event, EventKind, Job, Phase
from extproc.sim.model import EngineModel

ABORTED_BY_REQUEST = "Aborted by AbortReq."


@dataclass(eq=False, slots=True)
class Pending:
    """A job under way, as its HTTP request sees it."""

    job: Job
    wake: asyncio.Event
    """Set when the job ends, and on each new token when `streams`. Shared by the jobs of one request."""
    streams: bool
    bootstrap_host: str | None = None
    bootstrap_port: int | None = None
    prefill_rank: int | None = None
    """Decode: where the request says the KV cache is."""
    seen_tokens: int = 0
    done: bool = False
    status: int = 200
    error: str = ""
    """Why the engine gave it up; empty: it did not."""
    abort_message: str | None = None
    """It was ended early, and its answer is what there was by then."""
    at_peer: Any = None
    """The transfer side's own note about this job."""


class Runner:
    """Virtual time starts at 0 when this is made, inside the running loop."""

    def __init__(self, model: EngineModel, time_scale: float, tick_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self.model = model
        self.time_scale = time_scale
        self._tick_s = tick_s
        self._zero = self._loop.time()
        self.start_unix = time.time()
        self.pending: dict[Job, Pending] = {}
        self.by_room: dict[int, Pending] = {}
        self._streaming: set[Pending] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._last_tick = 0.0
        self.on_allocated: Callable[[Pending], None] | None = None
        self.on_sent: Callable[[Pending], None] | None = None
        self.on_ended: Callable[[Pending], None] | None = None

    def now_s(self) -> float:
        """Virtual seconds since the start."""
        return (self._loop.time() - self._zero) * self.time_scale

    def real_s(self, virtual_s: float) -> float:
        """How long a virtual duration takes in reality."""
        return virtual_s / self.time_scale

    def accept(self, pending: Pending) -> None:
        """Admit a job: its rank is chosen and its room claimed. Raises `Rejected`. `submit` or `abort` must follow."""
        self.model.admit(pending.job)
        pending.job.arrived_s = self.now_s()
        self.pending[pending.job] = pending
        if pending.job.room is not None:
            self.by_room[pending.job.room] = pending
        if pending.streams:
            self._streaming.add(pending)

    def submit(self, pending: Pending) -> None:
        """Queue an accepted job on its rank."""
        self.apply(self.model.submit(pending.job, self.now_s()))

    def abort(self, pending: Pending, message: str) -> None:
        """End a job early. One that has reached no batch in PD mode fails, as its KV transfer does."""
        if pending.done:
            return
        queued = pending.job.phase not in (Phase.RUNNING, Phase.READY, Phase.RETRACTED)
        failure = self.model.failure(pending.job, message)
        events = self.model.abort(pending.job, self.now_s())
        if not pending.done:
            pending.abort_message = message
            if queued and pending.job.room is not None:
                pending.status, pending.error = 500, failure
            self._end(pending)
        self.apply(events)

    def fail(self, pending: Pending, reason: str) -> None:
        """The KV transfer of a job went wrong: it ends with the engine's error (500)."""
        if pending.done:
            return
        message = self.model.failure(pending.job, reason)
        events = self.model.abort(pending.job, self.now_s())
        if not pending.done:
            pending.status, pending.error = 500, message
            self._end(pending)
        self.apply(events)

    def fail_early(self, pending: Pending, message: str, status: int = 500) -> None:
        """A job that was accepted and never submitted cannot be run."""
        if not pending.done:
            pending.status, pending.error = status, message
            self._end(pending)

    def tokens(self, pending: Pending) -> int:
        """Output tokens so far."""
        return self.model.generated(pending.job)

    def apply(self, events: list[Event]) -> None:
        """Pass on what the model says has happened, then set the timer."""
        for event in events:
            pending = self.pending.get(event.job)
            if pending is None:
                continue
            if event.kind is EventKind.KV_ALLOCATED and self.on_allocated:
                self.on_allocated(pending)
            elif event.kind is EventKind.KV_SENT and self.on_sent:
                self.on_sent(pending)
            elif event.kind is EventKind.FINISHED:
                self._end(pending)
            elif event.kind is EventKind.FAILED:
                pending.status, pending.error = event.status, event.message
                self._end(pending)
        self._set_timer()

    def stop(self) -> None:
        """End everything that is under way."""
        for pending in list(self.pending.values()):
            self.abort(pending, "engine stopped")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self, pending: Pending) -> None:
        job = pending.job
        pending.done = True
        self.model.release(job)
        del self.pending[job]
        if job.room is not None:
            self.by_room.pop(job.room, None)
        self._streaming.discard(pending)
        if self.on_ended:
            self.on_ended(pending)
        pending.wake.set()

    def _set_timer(self) -> None:
        """Wake up when the model next has something, but not more often than the tick allows."""
        next_s = self.model.next_s()
        if next_s is None:
            return
        at = max(self._zero + next_s / self.time_scale, self._last_tick + self._tick_s)
        if self._timer is not None:
            if self._timer_at <= at:
                return
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._loop.call_at(at, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._last_tick = self._loop.time()
        events = self.model.advance(self.now_s())
        for pending in self._streaming:
            tokens = self.tokens(pending)
            if tokens != pending.seen_tokens:
                pending.seen_tokens = tokens
                pending.wake.set()
        self.apply(events)
