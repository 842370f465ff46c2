"""Which workers are up: one small state machine a worker (pure), and the loop that feeds it.

The loop asks each worker's health endpoint, learns what the worker is before it is announced as healthy, and tells a
sink about each change. It has no list of healthy workers of its own.
"""

import asyncio
import enum
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from extproc.config import Config, WorkerConfig
from extproc.discovery.fetch import Client
from extproc.discovery.info import WorkerInfo, merge, problems, role_conflict
from extproc.discovery.inquiry import ask_info, check_health
from extproc.discovery.resolve import Lookup, resolve, system_lookup
from extproc.discovery.tasks import WorkerTasks
from extproc.model import Role, Worker

log = logging.getLogger(__name__)

RESOLVE_INTERVAL_S = 30.0
"""How often a healthy worker's name is resolved again: the usual TTL of a Kubernetes service name (CoreDNS)."""


class Phase(enum.StrEnum):
    """What is thought of a worker."""

    STARTING = "starting"
    """It has never been up."""
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    """It was up and is not any more."""


@dataclass(frozen=True, slots=True)
class Health:
    """A worker's phase, and the run of checks that may change it."""

    phase: Phase = Phase.STARTING
    failures: int = 0
    """Failed checks in a row."""
    successes: int = 0
    """Passed checks in a row."""

    def after(self, passed: bool, *, failure_threshold: int, success_threshold: int) -> "Health":
        """The state after one more check.

        `success_threshold` passed checks in a row make a worker healthy, `failure_threshold` failed ones unhealthy;
        one that has never been up stays `STARTING`, however often it fails.
        """
        if not passed:
            failures = self.failures + 1
            down = self.phase is Phase.HEALTHY and failures >= failure_threshold
            return Health(Phase.UNHEALTHY if down else self.phase, failures=failures)
        successes = self.successes + 1
        return Health(Phase.HEALTHY if successes >= success_threshold else self.phase, successes=successes)


class WorkerSink(Protocol):
    """Who wants to know. Called on the event loop, so it must be quick; it must not raise."""

    def worker_changed(self, worker: Worker, healthy: bool, reason: str | None) -> None:
        """A worker became healthy or unhealthy, or what is known about a healthy one changed.

        Until the first call a worker is not healthy. `reason` says why it is not, in words for a log line.
        """


Entry = tuple[Role, WorkerConfig]


def entries(config: Config) -> list[Entry]:
    """All configured workers with their roles."""
    return [(Role.PREFILL, entry) for entry in config.prefill] + [(Role.DECODE, entry) for entry in config.decode]


class HealthMonitor:
    """Checks every worker, each in a loop of its own; the first check is made at once.

    Intervals, time-outs, thresholds and the path are `config`'s. `clock` counts seconds from any origin; `sleep` goes
    with it; `headers` are added to requests to the worker of that name, and asked for anew each time.
    """

    def __init__(
        self,
        config: Config,
        client: Client,
        sink: WorkerSink,
        *,
        headers: Callable[[str], Mapping[str, str]] = lambda _: {},
        lookup: Lookup = system_lookup,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._config = config
        self._client = client
        self._sink = sink
        self._headers = headers
        self._lookup = lookup
        self._clock = clock
        self._sleep = sleep
        self._tasks = WorkerTasks(self._loop)
        self.set_workers(entries(config))

    def __repr__(self) -> str:
        return f"<HealthMonitor {self._config.health_check_endpoint}, {self._tasks!r}>"

    def set_workers(self, workers: Iterable[Entry]) -> None:
        """Makes these the workers to check, any time. One that is gone is not announced: who removed it knows."""
        self._tasks.set({entry.to_worker(role).name: (role, entry) for role, entry in workers})

    async def run(self) -> None:
        """Checks until cancelled."""
        await self._tasks.run()

    async def _loop(self, entry: Entry) -> None:
        watch = _Watch(self, *entry)
        while True:
            started_s = self._clock()
            await watch.check()
            await self._sleep(max(0.0, started_s + watch.interval_s - self._clock()))


class _Watch:
    """One worker under watch: everything that is remembered about it between two checks."""

    def __init__(self, monitor: HealthMonitor, role: Role, entry: WorkerConfig) -> None:
        self._config = monitor._config
        self._client = monitor._client
        self._sink = monitor._sink
        self._lookup = monitor._lookup
        self._clock = monitor._clock
        self._entry = entry
        self.worker = entry.to_worker(role)
        self._headers = monitor._headers
        self.health = Health()
        self._first_check_s = self._clock()
        self._resolved_s = self._first_check_s
        self._informed = False
        """Whether the engine ever said what it is."""
        self._waiting = False
        """Whether it was said that the worker is not up yet."""
        self._overdue = False
        """Whether it was said that the start takes too long."""
        self._said = tuple[str, ...]()

    def __repr__(self) -> str:
        return f"<{self.worker.role} worker {self.worker.name}: {self.health}>"

    @property
    def interval_s(self) -> float:
        """How long after the start of one check the next one starts."""
        waiting = self.health.phase is Phase.STARTING and not self.health.successes
        return self._config.worker_startup_check_interval if waiting else self._config.health_check_interval_secs

    async def check(self) -> None:
        """One check, and all that follows from it."""
        before, known = self.health, self.worker
        reason = await check_health(
            self._client,
            self.worker.url,
            self._config.health_check_endpoint,
            self._config.health_check_timeout_secs,
            self._headers(self.worker.name),
        )
        if reason is None and self._after(True).phase is Phase.HEALTHY and await self._discovery_due():
            reason = await self._discover()
        self.health = self._after(reason is None)
        self._report(before, known, reason)

    def _after(self, passed: bool) -> Health:
        return self.health.after(
            passed,
            failure_threshold=self._config.health_failure_threshold,
            success_threshold=self._config.health_success_threshold,
        )

    async def _resolve(self) -> str | None:
        self._resolved_s = self._clock()
        return await resolve(
            self.worker.url, self.worker.endpoint, self._lookup, self._config.health_check_timeout_secs
        )

    async def _discovery_due(self) -> bool:
        """Whether to ask a worker that answers what it is: it may be another engine than at the last check."""
        if self.health.phase is not Phase.HEALTHY or self.health.failures:
            return True  # even after a single failure it may have been restarted with other flags
        if self._clock() - self._resolved_s < RESOLVE_INTERVAL_S:
            return False
        endpoint = await self._resolve()
        # A resolver that is down for a while is no reason to stop using an engine that answers.
        moved = endpoint is not None and endpoint != self.worker.endpoint
        return moved or not self._informed

    async def _discover(self) -> str | None:
        """Learns what and where the worker is. Returns why it cannot be used, if it cannot."""
        endpoint = await self._resolve()
        if endpoint is None and self.worker.endpoint is None:
            return f"the host name of {self.worker.url} cannot be resolved"
        headers = self._headers(self.worker.name)
        info = await ask_info(self._client, self.worker.url, self._config.health_check_timeout_secs, headers)
        self._say(info)
        worker = self.worker
        if not info.empty or not self._informed:  # a silent engine is best taken for what it said last
            worker = merge(worker, self._entry, info)
        self._informed = self._informed or not info.empty
        self.worker = replace(worker, endpoint=endpoint or worker.endpoint)
        conflict = role_conflict(self.worker.role, info)
        return None if conflict is None else f"it {conflict}"

    def _say(self, info: WorkerInfo) -> None:
        """Logs what does not fit, once as long as it stays the same."""
        found = problems(self.worker, self._entry, info)
        for problem in found:
            if problem not in self._said:
                log.warning("%s worker %s %s", self.worker.role, self.worker.name, problem)
        self._said = found

    def _report(self, before: Health, known: Worker, reason: str | None) -> None:
        """Tells the sink and the log what changed, if anything did."""
        worker, phase = self.worker, self.health.phase
        if phase is Phase.HEALTHY and (before.phase is not phase or worker != known):
            log.info("%s worker %s is healthy: %s", worker.role, worker.name, _described(worker))
            self._sink.worker_changed(worker, True, None)
        elif phase is Phase.UNHEALTHY and before.phase is not phase:
            log.warning(
                "%s worker %s is unhealthy after %d failed checks: %s",
                worker.role,
                worker.name,
                self.health.failures,
                reason,
            )
            self._sink.worker_changed(worker, False, reason)
        elif phase is Phase.STARTING and reason is not None:
            self._report_waiting(reason)

    def _report_waiting(self, reason: str) -> None:
        worker = self.worker
        if not self._waiting:
            self._waiting = True
            log.info(
                "%s worker %s is not up yet: %s (checked every %g s)", worker.role, worker.name, reason, self.interval_s
            )
            self._sink.worker_changed(worker, False, reason)
        waited_s = self._clock() - self._first_check_s
        if not self._overdue and waited_s >= self._config.worker_startup_timeout_secs:
            self._overdue = True
            log.error(
                "%s worker %s has not come up in %g s: %s. It is still checked every %g s and joins when it is up",
                worker.role,
                worker.name,
                self._config.worker_startup_timeout_secs,
                reason,
                self.interval_s,
            )


def _described(worker: Worker) -> str:
    parts = [
        f"endpoint {worker.endpoint}",
        f"model {worker.model or 'unknown'}",
        f"dp_size {worker.dp_size or 'unknown'}",
    ]
    if worker.role is Role.PREFILL:
        parts.append(f"bootstrap {worker.bootstrap_host}:{worker.bootstrap_port}")
    return ", ".join(parts)
