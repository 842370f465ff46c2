"""The composition root: makes one service out of its parts, starts and stops them in order.

Everything that is shared is made here and passed in; nothing else in the package has a global.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from extproc import wire
from extproc.config import Config, target_of
from extproc.decisions_view import describe_decisions
from extproc.discovery.api_keys import ApiKeys
from extproc.discovery.fetch import make_client
from extproc.discovery.health import HealthMonitor, entries
from extproc.errors import ConfigError
from extproc.estimate import TokenEstimator
from extproc.events import Finished
from extproc.gateway import Gateway
from extproc.load import LoadTable
from extproc.model import RankLoad, Role, Worker
from extproc.mutation import PROCESS, process_mark
from extproc.processes.figures import SummedRegistry
from extproc.processes.leader import Leader
from extproc.processes.messages import Draining, Observed, WorkerChanged
from extproc.processes.replica import Replica
from extproc.schedule import Scheduler
from extproc.scraper import Scraper, scrape_targets
from extproc.service import ExternalProcessor
from extproc.status import StatusServer
from extproc.table_view import describe_table
from extproc.telemetry import KEPT_DECISIONS, Telemetry
from extproc.tls import server_certificates
from extproc.tokenizer import load_tokenizer
from extproc.transport import TRANSPORTS

if TYPE_CHECKING:
    from extproc.tracing import Tracing

logger = logging.getLogger(__name__)

LIVENESS, READINESS = "liveness", "readiness"
"""gRPC health services, besides the processor's own name and the empty one (endpoint-picker protocol 004)."""

MEET_S = 1.0
"""The longest from the last placement to the end of new streams: the prefill stream of a placed request comes within
milliseconds, and were it refused, the decode engine would wait for nobody."""

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a running service listens."""

    grpc: str
    """gRPC target: `host:port` or `unix:PATH`."""
    status: str
    """URL of the metrics port."""


def _tracing(config: Config, clock: Clock) -> "Tracing | None":
    """Where attempts are traced; None: nowhere. Raises ConfigError."""
    if not config.otel:
        return None
    try:
        from extproc.tracing import Tracing, tracing_disabled  # noqa: PLC0415 - an extra, and slow to import
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise ConfigError(
            "otel: needs OpenTelemetry's packages: pip install 'extproc[otel]', or leave the setting out"
        ) from None
    return None if tracing_disabled() else Tracing(config, clock)


class Service:
    """One ext_proc service: load table, scheduler, gRPC server, scraper, health monitor, metrics port.

    Of several processes each has one: the leader's is `running`, a follower's `serving`.
    """

    def __init__(
        self,
        config: Config,
        *,
        grpc_target: str | None = None,
        awaits_envoy: bool = False,
        process: int = 0,
        rng: random.Random | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """`grpc_target`: listen there instead of `grpc_host:grpc_port`. `awaits_envoy`: not ready until `envoy_serves`.
        `process`: which of several; 0 is the leader.

        Raises ConfigError.
        """
        self.config = config
        self.table = LoadTable(config.workers(), clock, config.circuit_limits())
        for role, entry in entries(config):
            if entry.draining:
                self.table.set_draining(entry.to_worker(role).name, True)
        self.scheduler = Scheduler(config, self.table, rng or random.Random())
        count = load_tokenizer(config.tokenizer_path) if config.tokenizer_path else None
        self._tracing = _tracing(config, clock)
        begin_trace = self._tracing.begin if self._tracing else None
        estimator = TokenEstimator(count)
        self.gateway = Gateway(config, self.table, self.scheduler, clock, estimator, begin_trace=begin_trace)
        self.telemetry = Telemetry(self.table, clock, lambda: self.gateway.open_rooms)
        self.processor = ExternalProcessor(self.gateway, self._finished)
        self._clock = clock
        self._target = grpc_target or (
            f"unix:{config.grpc_uds}" if config.grpc_uds else f"{config.grpc_host}:{config.grpc_port}"
        )
        self._grpc_target = target_of(self._target, process, config.processes)
        self.replica: Replica | None = None
        """Where there are several processes."""
        self.changed: Callable[[], None] = lambda: None
        """Is called when the replica has something for the others."""
        self._leader: Leader | None = None
        self._summed: SummedRegistry | None = None
        if config.processes > 1:
            self.replica = Replica(
                process,
                self.table,
                blame=self.gateway.apply_blame,
                workers_changed=self._tell_readiness,
                wake=self._changed,
            )
            self.gateway.marks = ((PROCESS, process_mark(process)),)
            self.gateway.tell_blame = self.replica.blamed
            self._summed = SummedRegistry(self.telemetry.registry)
        self._transport = TRANSPORTS[config.transport](
            self.processor, config.max_payload_size, server_certificates(config)
        )
        self._api_keys = ApiKeys(config)
        self._readiness: asyncio.Future[None] | None = None
        self._awaits_envoy = awaits_envoy
        self._leaving = False
        self._closed = False

    @property
    def not_ready(self) -> str:
        """Why no requests should come here: it is about to end, or a role has no worker to pick. Empty: they may."""
        if self._leaving:
            return "stopping"
        if self._awaits_envoy:
            return "Envoy is not up yet"
        if all(self.table.eligible(role) for role in Role):
            return ""
        draining = sum(state.draining for state in self.table.states)
        return "no healthy pair of prefill and decode workers" + (f" ({draining} draining)" if draining else "")

    @property
    def open_streams(self) -> int:
        """Streams that belong to an exchange, in all processes; of the others as they last said."""
        return self.processor.open_streams + (self._summed.open_streams if self._summed else 0)

    @property
    def pids(self) -> Mapping[int, int]:
        """Process ids of the followers, by their numbers."""
        return self._leader.pids if self._leader else {}

    async def idle(self) -> None:
        """Return when every exchange of every process has finished."""
        await self.processor.idle()
        if self._leader:
            await self._leader.idle()
            await self.processor.idle()  # the next attempt at a request of another process may have come here

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """The gRPC port alone, while the context is open: a follower. Raises ConfigError."""
        async with contextlib.AsyncExitStack() as stack:
            if self._tracing:
                stack.push_async_callback(self._tracing.close)
            target = await self._start_grpc(stack)
            self._tell_readiness()
            yield target

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Addresses]:
        """Serve while the context is open; a background task that dies ends it. Raises ConfigError.

        Streams that are open at its end are cut off: `leave`, `close` and wait until it is `idle` before.
        """
        config = self.config
        status = StatusServer(
            config.prometheus_host,
            config.prometheus_port,
            registry=self._summed or self.telemetry.registry,
            not_ready=lambda: self.not_ready,
            loads=lambda: describe_table(config, self.table, self.scheduler.loads, self.gateway.estimator),
            decisions=lambda: describe_decisions(
                self.telemetry.decisions, self.gateway.running(KEPT_DECISIONS), self._clock()
            ),
            workers=lambda: self.table.states,
            set_draining=self.set_draining,
        )
        async with contextlib.AsyncExitStack() as stack:
            if self._tracing:
                stack.push_async_callback(self._tracing.close)  # the last thing: streams that are cut off end before
            keepalive_s = 2 * max(config.worker_load_check_interval, config.health_check_interval_secs)
            client = await stack.enter_async_context(make_client(keepalive_s))
            scraper = Scraper(
                client,
                self,
                interval_s=config.worker_load_check_interval,
                timeout_s=config.worker_load_check_timeout,
                headers=self._api_keys.headers,
                clock=self._clock,
            )
            scraper.set_workers(scrape_targets(config))
            monitor = HealthMonitor(config, client, self, headers=self._api_keys.headers, clock=self._clock)
            status_url = await status.start()
            stack.push_async_callback(status.stop)
            target = await self._start_grpc(stack)
            if self.replica and self._summed:
                self._leader = Leader(config, self.replica, self._summed, target=self._target, clock=self._clock)
                self.changed = self._leader.wake
                self.table.catch_up = self._leader.catch_up
                await stack.enter_async_context(self._leader.running())
                target = self._target
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            background = [tasks.create_task(scraper.run()), tasks.create_task(monitor.run())]
            if self._leader:
                background += [tasks.create_task(self._leader.keep(n)) for n in range(1, config.processes)]
            try:
                yield Addresses(target, status_url)
            finally:
                for task in background:
                    task.cancel()

    async def _start_grpc(self, stack: contextlib.AsyncExitStack) -> str:
        transport = self._transport
        for name in ("", LIVENESS, wire.SERVICE):
            await transport.set_health(name, True)
        await transport.set_health(READINESS, False)
        target = await transport.listen(self._grpc_target)
        stack.push_async_callback(transport.stop)
        return target

    def envoy_serves(self) -> None:
        """The Envoy in front is up."""
        self._awaits_envoy = False
        self._tell_readiness()

    async def leave(self) -> None:
        """Say to health checks that no more requests are wanted; the service still serves those that come."""
        self._leaving = True
        if self._leader:
            self._leader.leave()
        await self._transport.set_health(READINESS, False)

    async def close(self) -> None:
        """Take no new streams; those that are open go on. For the time after `leave`.

        The port is free at once, and connections get a GOAWAY: for new requests Envoy connects anew, to another address
        of the cluster or to the next process on this one. Until there is one it answers 503 with `retry-after`.
        """
        if self._closed:
            return
        self._closed = True
        # First nothing new is placed (503 with `retry-after`, too), as both streams of a request have to come here.
        self.scheduler.close()
        if self._leader:
            self._leader.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.processor.met(), MEET_S)
        await self._transport.close(self.config.shutdown_grace_period_secs)

    def set_draining(self, worker_name: str, draining: bool) -> None:
        """Let a worker get no new requests, or get them again. Raises KeyError for no such worker."""
        state = self.table.set_draining(worker_name, draining)
        if self.replica:
            self.replica.tell(Draining(worker_name, draining))
        what = "draining: it gets no new requests" if draining else "not draining any more"
        logger.info("%s worker %s is %s (%d in flight)", state.worker.role, worker_name, what, state.in_flight)
        self._tell_readiness()

    def _finished(self, record: Finished) -> None:
        self.telemetry.finished(record)
        if self._tracing:
            self._tracing.finished(record)

    def _changed(self) -> None:
        self.changed()

    # What the scraper and the health monitor report to

    def observe(self, worker_name: str, loads: Sequence[RankLoad], at_s: float, duration_s: float) -> None:
        """A scrape gave figures."""
        self.table.observe(worker_name, loads, at_s)
        if self.replica:
            self.replica.tell(Observed(worker_name, tuple(loads), at_s))
        self.telemetry.scraped(worker_name, duration_s, failed=False)

    def scrape_failed(self, worker_name: str, reason: str, duration_s: float) -> None:
        """A scrape gave nothing."""
        self.telemetry.scraped(worker_name, duration_s, failed=True)

    def worker_changed(self, worker: Worker, healthy: bool, reason: str | None) -> None:
        """A worker came up, went down, or is known better."""
        self.table.worker_changed(worker, healthy, reason)
        if self.replica:
            self.replica.tell(WorkerChanged(worker, healthy))
        self._tell_readiness()

    def _tell_readiness(self) -> None:
        # A coroutine, though it only wakes watchers. Held, as the event loop keeps weak references.
        self._readiness = asyncio.ensure_future(self._transport.set_health(READINESS, not self.not_ready))
