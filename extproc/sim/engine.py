"""One simulated engine, put together: model, clock, servers. `async with Engine(EngineConfig(...)) as engine: …`"""

import logging
from types import TracebackType
from typing import Self

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage

from extproc.sim.config import EngineConfig
from extproc.sim.decode_side import DecodeSide
from extproc.sim.fault_effects import FaultEffects
from extproc.sim.faults import FaultPlan, parse_fault
from extproc.sim.generation import Generation, Intake, let_through
from extproc.sim.job import Job, Role
from extproc.sim.model import EngineModel
from extproc.sim.prefill_side import PrefillSide
from extproc.sim.records import Records
from extproc.sim.runner import Runner
from extproc.sim.server import Server


def _worth_a_line(record: logging.LogRecord) -> bool:
    """Leave out what clients write that is not HTTP/1.1: gateways probe for gRPC with an HTTP/2 preface."""
    return not (record.exc_info and isinstance(record.exc_info[1], BadHttpMessage))


_log = logging.getLogger(__name__)
_log.addFilter(_worth_a_line)


class Engine:
    """Serves from `__aenter__` to `__aexit__`, on the running event loop."""

    def __init__(self, config: EngineConfig, intake: Intake = let_through) -> None:
        self.config = config
        self.records = Records(config.keep_records, config.keep_body_bytes)
        self.faults = FaultPlan(map(parse_fault, config.faults), config.fault_seed)
        """What goes wrong on purpose; may be changed at any time."""
        self._intake = intake
        self._runners: list[web.AppRunner] = []
        self._decode_side: DecodeSide | None = None
        self._runner: Runner | None = None
        self._server: Server | None = None
        self.port = 0
        self.bootstrap_port = 0
        """0 unless the role is prefill."""

    @property
    def url(self) -> str:
        """Where the engine is, without a slash at the end."""
        return f"http://{self._host_in_url}:{self.port}"

    @property
    def address(self) -> str:
        """`host:port`."""
        return f"{self._host_in_url}:{self.port}"

    @property
    def model(self) -> EngineModel:
        """The model behind the HTTP server."""
        return self._started.model

    @property
    def open_requests(self) -> int:
        """Prompts under way."""
        return len(self._started.pending)

    @property
    def jobs(self) -> list[Job]:
        """What is under way, one for each prompt; their phases tell how far they are."""
        return list(self._started.pending)

    @property
    def now_s(self) -> float:
        """The engine's clock, in virtual seconds: that of `records`."""
        return self._started.now_s()

    def set_healthy(self, healthy: bool) -> None:
        """Whether the health checks answer 200 or 503."""
        if self._server is not None:
            self._server.healthy = healthy

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def _start(self) -> None:
        config = self.config
        model = EngineModel(
            config.role, config.dp_size, config.gpu, config.bootstrap_timeout_s, config.waiting_timeout_s
        )
        runner = self._runner = Runner(model, config.time_scale, config.tick_s)
        if config.role is Role.PREFILL:
            side = PrefillSide(runner, config.dp_size)
            self.bootstrap_port = await self._listen(side.application(), config.bootstrap_port)
            side.rank_host, side.rank_port = config.host, self.bootstrap_port
        elif config.role is Role.DECODE:
            self._decode_side = DecodeSide(runner, config)
        effects = FaultEffects(self.faults)
        generation = Generation(config, runner, self.records, self._decode_side, effects)
        generation.intake = self._intake
        server = self._server = Server(config, runner, self.records, generation, effects)
        self.port = server.port = await self._listen(server.application(), config.port)
        server.bootstrap_port = self.bootstrap_port or config.bootstrap_port

    async def _listen(self, app: web.Application, port: int) -> int:
        """Serve an application; returns the port it got."""
        app_runner = web.AppRunner(
            app,
            handler_cancellation=True,
            access_log=None,
            logger=_log,
            shutdown_timeout=0.1,
            keepalive_timeout=self.config.keepalive_s,
        )
        await app_runner.setup()
        self._runners.append(app_runner)
        await web.TCPSite(app_runner, self.config.host, port, backlog=1024).start()
        return int(app_runner.addresses[0][1])

    async def _stop(self) -> None:
        if self._runner is not None:
            self._runner.stop()
        if self._decode_side is not None:
            await self._decode_side.close()
        for app_runner in reversed(self._runners):
            await app_runner.cleanup()
        self._runners.clear()

    @property
    def _host_in_url(self) -> str:
        host = self.config.host
        if host in ("", "0.0.0.0"):  # noqa: S104 - compared, not bound
            return "127.0.0.1"
        return f"[{host}]" if ":" in host else host

    @property
    def _started(self) -> Runner:
        if self._runner is None:
            raise RuntimeError("the engine has not been started")
        return self._runner
