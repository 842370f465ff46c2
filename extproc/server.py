"""The composition root: makes one service out of its parts, starts and stops them in order.

Everything that is shared is made here and passed in; nothing else in the package has a global.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from extproc import wire
from extproc.config import Config
from extproc.discovery.fetch import make_client
from extproc.discovery.health import HealthMonitor
from extproc.errors import ConfigError
from extproc.estimate import TokenEstimator
from extproc.exchange import Gateway
from extproc.load import LoadTable
from extproc.model import RankLoad, Role, Worker
from extproc.schedule import Scheduler
from extproc.scraper import Scraper, scrape_targets
from extproc.service import ExternalProcessor, make_server
from extproc.status import StatusServer
from extproc.table_view import describe_table
from extproc.telemetry import Telemetry
from extproc.tokenizer import load_tokenizer

LIVENESS, READINESS = "liveness", "readiness"
"""gRPC health services, besides the processor's own name and the empty one (endpoint-picker protocol 004)."""

STOP_GRACE_S = 5.0
"""How long streams may go on after a stop was asked for."""

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a running service listens."""

    grpc: str
    """gRPC target: `host:port` or `unix:PATH`."""
    status: str
    """URL of the metrics port."""


class Service:
    """One ext_proc service: load table, scheduler, gRPC server, scraper, health monitor, metrics port."""

    def __init__(
        self,
        config: Config,
        *,
        grpc_target: str | None = None,
        rng: random.Random | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """`grpc_target`: listen there instead of `grpc_host:grpc_port`. Raises ConfigError."""
        self.config = config
        self.table = LoadTable(config.workers(), clock, config.circuit_limits())
        self.scheduler = Scheduler(config, self.table, rng or random.Random())
        count = load_tokenizer(config.tokenizer_path) if config.tokenizer_path else None
        self.gateway = Gateway(config, self.table, self.scheduler, clock, TokenEstimator(count))
        self.telemetry = Telemetry(self.table, clock, lambda: self.gateway.open_rooms)
        self.processor = ExternalProcessor(self.gateway, self.telemetry.finished)
        self._clock = clock
        self._grpc_target = grpc_target or f"{config.grpc_host}:{config.grpc_port}"
        self._health = health.aio.HealthServicer()
        self._readiness: asyncio.Future[None] | None = None
        self._leaving = False

    @property
    def ready(self) -> bool:
        """Whether there is a healthy worker of either role, and the service is not about to end."""
        return not self._leaving and all(self.table.eligible(role) for role in Role)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Addresses]:
        """Serve while the context is open; a background task that dies ends it. Raises ConfigError."""
        config = self.config
        status = StatusServer(
            config.prometheus_host,
            config.prometheus_port,
            self.telemetry.registry,
            lambda: self.ready,
            lambda: describe_table(config, self.table, self.scheduler.loads, self.gateway.estimator),
        )
        client = make_client(keepalive_s=2 * max(config.worker_load_check_interval, config.health_check_interval_secs))
        scraper = Scraper(
            client,
            self,
            interval_s=config.worker_load_check_interval,
            timeout_s=config.worker_load_check_timeout,
            clock=self._clock,
        )
        scraper.set_workers(scrape_targets(config))
        monitor = HealthMonitor(config, client, self, clock=self._clock)
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(client)
            status_url = await status.start()
            stack.push_async_callback(status.stop)
            target = await self._start_grpc(stack)
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            background = [tasks.create_task(scraper.run()), tasks.create_task(monitor.run())]
            try:
                yield Addresses(target, status_url)
            finally:
                for task in background:
                    task.cancel()

    async def _start_grpc(self, stack: contextlib.AsyncExitStack) -> str:
        server = make_server(self.processor, self.config.max_payload_size)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        for name in ("", LIVENESS, wire.SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await self._health.set(READINESS, health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            port = server.add_insecure_port(self._grpc_target)
        except RuntimeError:
            raise ConfigError(f"--grpc-port: cannot listen on {self._grpc_target}: is it in use?") from None
        await server.start()
        stack.push_async_callback(server.stop, STOP_GRACE_S)
        stack.push_async_callback(self._health.enter_graceful_shutdown)
        if self._grpc_target.startswith("unix:"):
            return self._grpc_target
        return f"{self._grpc_target.rpartition(':')[0]}:{port}"

    async def leave(self) -> None:
        """Say to health checks that no more requests are wanted; the service still serves those that come."""
        self._leaving = True
        await self._health.set(READINESS, health_pb2.HealthCheckResponse.NOT_SERVING)

    # What the scraper and the health monitor report to

    def observe(self, worker_name: str, loads: Sequence[RankLoad], at_s: float, duration_s: float) -> None:
        """A scrape gave figures."""
        self.table.observe(worker_name, loads, at_s)
        self.telemetry.scraped(worker_name, duration_s, failed=False)

    def scrape_failed(self, worker_name: str, reason: str, duration_s: float) -> None:
        """A scrape gave nothing."""
        self.telemetry.scraped(worker_name, duration_s, failed=True)

    def worker_changed(self, worker: Worker, healthy: bool, reason: str | None) -> None:
        """A worker came up, went down, or is known better."""
        self.table.worker_changed(worker, healthy, reason)
        status = health_pb2.HealthCheckResponse.SERVING if self.ready else health_pb2.HealthCheckResponse.NOT_SERVING
        # A coroutine in grpcio, though it only wakes watchers. Held, as the event loop keeps weak references.
        self._readiness = asyncio.ensure_future(self._health.set(READINESS, status))
