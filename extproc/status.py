"""The service's own HTTP port: a status page, metrics, the load table and the last decisions, whether it lives and is
ready, and which workers drain.

Shell. Not on the data path; Envoy never asks here. What changes something is for callers on this host only, as the port
is often opened for the sake of its metrics.
"""

import ipaddress
import math
import time
from collections.abc import Callable, Sequence

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from extproc import status_page
from extproc.errors import ConfigError
from extproc.histogram import Window, read_totals
from extproc.load import WorkerState
from extproc.overview import Decisions, Loads, make_overview
from extproc.table_view import describe_state

DRAIN_PATH = "/workers/{role}/{name}/drain"
"""A resource that is there while the worker drains: PUT makes it, DELETE ends it, both as often as one likes. All three
methods answer with the worker's state. The name is `host:port`, as in the configuration."""

PAGE_AGE_S = 0.5
"""The page is made at most this often, however many look: it is made on the thread that places requests."""


class StatusServer:
    """Serves `/` (for browsers), `/metrics`, `/debug/loads`, `/debug/decisions`, `/health` (it lives), `/ready`
    (requests may come), `/workers` and `DRAIN_PATH`."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        registry: CollectorRegistry,
        not_ready: Callable[[], str],
        loads: Callable[[], object],
        decisions: Callable[[], object],
        workers: Callable[[], Sequence[WorkerState]],
        set_draining: Callable[[str, bool], None],
    ) -> None:
        """`not_ready`: why no requests should come, empty when they may. `loads` and `decisions`: what is shown under
        `/debug`, as JSON.

        `set_draining` takes the name of one of the `workers`.
        """
        self._host = host
        self._port = port
        self._registry = registry
        self._not_ready = not_ready
        self._loads = loads
        self._decisions = decisions
        self._workers = workers
        self._set_draining = set_draining
        self._window = Window()
        self._page = ""
        self._page_at_s = -math.inf
        app = web.Application()
        app.router.add_get("/", self._status_page)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/debug/loads", self._debug_loads)
        app.router.add_get("/debug/decisions", self._debug_decisions)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._readiness)
        app.router.add_get("/workers", self._list_workers)
        for method in ("GET", "PUT", "DELETE"):
            app.router.add_route(method, DRAIN_PATH, self._drain)
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

    async def _status_page(self, _: web.Request) -> web.Response:
        now_s = time.monotonic()
        if now_s - self._page_at_s >= PAGE_AGE_S:
            self._window.add(now_s, read_totals(self._registry.collect()))
            loads = msgspec.convert(self._loads(), Loads)
            decisions = msgspec.convert(self._decisions(), Decisions)
            self._page = status_page.render(make_overview(loads, decisions, self._window, self._not_ready()))
            self._page_at_s = now_s
        return web.Response(text=self._page, content_type="text/html", headers=status_page.HEADERS)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def _debug_loads(self, _: web.Request) -> web.Response:
        return _json(self._loads())

    async def _debug_decisions(self, _: web.Request) -> web.Response:
        return _json(self._decisions())

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readiness(self, _: web.Request) -> web.Response:
        reason = self._not_ready()
        return web.Response(status=503, text=f"{reason}\n") if reason else web.Response(text="ok\n")

    async def _list_workers(self, _: web.Request) -> web.Response:
        return _json({"workers": [describe_state(state) for state in self._workers()]})

    async def _drain(self, request: web.Request) -> web.Response:
        role, name = request.match_info["role"], request.match_info["name"]
        state = next((each for each in self._workers() if (each.worker.role, each.worker.name) == (role, name)), None)
        if state is None:
            return _json({"error": f"no {role} worker {name}: GET /workers lists them"}, status=404)
        if request.method != "GET":
            if not _is_local(request.remote):
                return _json({"error": "only from this host: changes are taken on the loopback interface"}, status=403)
            self._set_draining(name, request.method == "PUT")
        return _json(describe_state(state))


def _json(content: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(content), content_type="application/json")


def _is_local(remote: str | None) -> bool:
    """Whether a peer's address is of the loopback interface; one that listens on `::` sees IPv4 peers mapped."""
    try:
        address = ipaddress.ip_address(remote or "")
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
