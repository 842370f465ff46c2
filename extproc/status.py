"""The service's own HTTP port: its metrics, the load table, and whether it lives and is ready.

Shell. Not on the data path; Envoy never asks here.
"""

from collections.abc import Callable

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from extproc.errors import ConfigError


class StatusServer:
    """Serves `/metrics`, `/debug/loads`, `/health` (it lives) and `/ready` (a pair of workers is healthy)."""

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        ready: Callable[[], bool],
        loads: Callable[[], object],
    ) -> None:
        """`loads`: what `/debug/loads` shows, as JSON."""
        self._host = host
        self._port = port
        self._registry = registry
        self._ready = ready
        self._loads = loads
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/debug/loads", self._debug_loads)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._readiness)
        self._runner = web.AppRunner(app, access_log=None)

    async def start(self) -> str:
        """Listen; returns the URL, with the port that was chosen for port 0. Raises ConfigError if that fails."""
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as error:
            raise ConfigError(
                f"--prometheus-port: cannot listen on {self._host}:{self._port}: {error.strerror or error}"
            ) from None
        host, port = self._runner.addresses[0][:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def stop(self) -> None:
        """Close the port and all connections."""
        await self._runner.cleanup()

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def _debug_loads(self, _: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(self._loads()), content_type="application/json")

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readiness(self, _: web.Request) -> web.Response:
        if self._ready():
            return web.Response(text="ok\n")
        return web.Response(status=503, text="no healthy pair of prefill and decode workers\n")
