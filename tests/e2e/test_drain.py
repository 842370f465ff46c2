"""Nothing is lost when a service, a gateway or a worker is taken out in order: real processes, 16 connections."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import aiohttp
import httpx
import pytest
from conftest import metric, until

from extproc import envoy_config
from extproc.config import Config
from extproc.demo.child import Child
from extproc.demo.stack import GATEWAY_FLAGS, START_TIMEOUT_S, Stack, free_port
from extproc.envoy_process import EnvoyProcess

pytestmark = pytest.mark.envoy

LOAD = 16
DELAY_S = 3
"""Of the drain: what is sent in it must be over before it ends, on a busy machine, too."""
WAIT_S = 60
SHORT = {"text": "hello", "sampling_params": {"max_new_tokens": 4}}
LONG = {"text": "hello", "stream": True}
"""1500 tokens take more than 10 s: longer than the drain delay and what comes after it."""


async def seen(condition, what: str):
    """The condition's first true value; it looks at logs and ports, which tell nobody when they change."""
    async with asyncio.timeout(WAIT_S):
        while True:
            with contextlib.suppress(httpx.HTTPError, aiohttp.ClientError):
                if value := await asyncio.to_thread(condition):
                    return value
            await asyncio.sleep(0.02)
    raise AssertionError(what)


class Service:
    """One `extproc serve`."""

    def __init__(self, stack: Stack, directory: Path, grpc_port: int, *flags: str) -> None:
        self.status_port = free_port()
        self.status_url = f"http://127.0.0.1:{self.status_port}"
        workers = [part for engine in stack.engines for part in (f"--{engine.role}", engine.url)]
        ports = ("--grpc-port", str(grpc_port), "--prometheus-port", str(self.status_port))
        command = ("serve", *workers, *GATEWAY_FLAGS, *ports, "--shutdown-drain-delay-secs", str(DELAY_S), *flags)
        self.process = Child("the service", command, directory / f"service-{self.status_port}.log")
        self.process.wait_until(self.ready, "ready", START_TIMEOUT_S)

    def ready(self) -> bool | None:
        try:
            return httpx.get(self.status_url + "/ready").status_code == 200 or None
        except httpx.HTTPError:
            return None

    def says(self, words: str) -> re.Match[str] | None:
        return re.search(words, self.process.log_text)


@contextlib.asynccontextmanager
async def served(stack: Stack, *flags: str):
    """A service behind an Envoy of its own: (service, URL of the gateway, a way to start the next service)."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as processes:
        config = Config(host="127.0.0.1", port=free_port(), grpc_port=free_port())

        def start() -> Service:
            service = Service(stack, Path(directory), config.grpc_port, *flags)
            processes.callback(service.process.kill)
            return service

        service = start()
        bootstrap = envoy_config.bootstrap(config, admin="127.0.0.1:0")
        async with EnvoyProcess(envoy_config.to_yaml(bootstrap)):
            yield service, f"http://127.0.0.1:{config.port}", start


async def post(client: aiohttp.ClientSession, url: str) -> int:
    """The status of one short request."""
    async with client.post(url + "/generate", json=SHORT) as response:
        await response.read()
        return response.status


async def stream(client: aiohttp.ClientSession, url: str, begun: asyncio.Event, tokens: int = 1500) -> bytes:
    """The end of one long stream."""
    body = LONG | {"sampling_params": {"max_new_tokens": tokens}}
    async with client.post(url + "/generate", json=body) as response:
        assert response.status == 200
        data = b""
        async for piece in response.content.iter_any():
            begun.set()
            data = data[-100:] + piece
        return data


@pytest.fixture(scope="module")
def engines():
    """Two pairs; the stack's own gateway is not used but for the drain of a worker."""
    with Stack(prefill=2, decode=2, dp_size=2) as running:
        yield running


@pytest.fixture
def client():
    """A factory: a session belongs to its event loop."""
    return lambda: aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


def test_serve_loses_nothing_while_it_leaves(engines, client):
    async def main():
        async with served(engines) as (service, url, start), client() as http:
            begun = asyncio.Event()
            old_stream = asyncio.create_task(stream(http, url, begun))
            await begun.wait()
            turned_away = asyncio.Event()

            async def load() -> list[int]:
                statuses = []
                while not turned_away.is_set():
                    statuses.append(await post(http, url))
                # Health checks have been told; whoever has not heard of it yet is still served.
                return statuses + [await post(http, url) for _ in range(4)]

            loads = [asyncio.create_task(load()) for _ in range(LOAD)]
            await asyncio.sleep(0)
            service.process.signal(signal.SIGTERM)
            await seen(lambda: httpx.get(service.status_url + "/ready").status_code == 503, "not ready")
            async with http.get(service.status_url + "/ready") as response:
                assert await response.text() == "stopping\n"
            async with http.get(service.status_url + "/health") as response:
                assert response.status == 200
            turned_away.set()
            statuses = [status for statuses in await asyncio.gather(*loads) for status in statuses]
            assert not service.says("no new requests,"), "the machine was too slow for this test: nothing is shown"
            assert statuses == [200] * len(statuses)
            assert len(statuses) >= 5 * LOAD

            streams = await seen(lambda: service.says(r"no new requests, (\d+) streams"), "closed")
            assert int(streams[1]) > 0
            # With no other instance there is nobody to ask.
            async with http.post(url + "/generate", json=SHORT) as response:
                assert response.status == 503
                assert response.headers["retry-after"] == "1"
            # The next process can be there before the old one has gone.
            after = await asyncio.to_thread(start)
            assert service.process.exit_status is None
            assert not old_stream.done()
            assert await post(http, url) == 200
            assert (await old_stream).rstrip().endswith(b"data: [DONE]")
            await seen(lambda: service.process.exit_status is not None, "the old one has ended")
            assert service.process.exit_status == 0
            assert not service.says("stopping with")
            assert metric(after, "extproc_attempts_total", outcome="ok") == 1

    asyncio.run(main())


def test_a_second_signal_ends_it_at_once(engines, client):
    async def main():
        forever = ("--shutdown-drain-delay-secs", "3600")
        async with served(engines, *forever) as (service, url, _), client() as http:
            begun = asyncio.Event()
            old_stream = asyncio.create_task(stream(http, url, begun))
            await begun.wait()
            service.process.signal(signal.SIGTERM)
            await seen(lambda: service.says("draining: not ready"), "draining")
            assert service.process.exit_status is None
            service.process.signal(signal.SIGINT)
            await seen(lambda: service.process.exit_status is not None, "ended")
            assert service.process.exit_status == 0
            assert service.says("stopping with 1 streams open|stopping with 2 streams open")
            assert not old_stream.done()
            # Envoy fails open: what runs needs the service no more.
            assert (await old_stream).rstrip().endswith(b"data: [DONE]")

    asyncio.run(main())


def test_the_grace_period_bounds_what_may_go_on(engines, client):
    async def main():
        short = ("--shutdown-drain-delay-secs", "0", "--shutdown-grace-period-secs", "0.5")
        async with served(engines, *short) as (service, url, _), client() as http:
            begun = asyncio.Event()
            old_stream = asyncio.create_task(stream(http, url, begun))
            await begun.wait()
            service.process.signal(signal.SIGTERM)
            await seen(lambda: service.process.exit_status is not None, "ended")
            assert service.process.exit_status == 0
            assert not old_stream.done()
            old_stream.cancel()

    asyncio.run(main())


FRONT = """
admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}}}
static_resources:
  listeners:
  - name: front
    address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: front
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes: [{{match: {{prefix: /}}, route: {{cluster: gateways, timeout: 0s}}}}]
  clusters:
  - name: gateways
    type: STATIC
    connect_timeout: 5s
    common_lb_config: {{healthy_panic_threshold: {{value: 0}}}}
    health_checks:
    - {{timeout: 5s, interval: 0.2s, no_traffic_interval: 0.2s, unhealthy_threshold: 1, healthy_threshold: 1,
       http_health_check: {{path: /ready}}}}
    load_assignment:
      cluster_name: gateways
      endpoints:
      - lb_endpoints:
{endpoints}
"""
"""A load balancer that asks `/ready` and retries nothing."""
ENDPOINT = """
        - endpoint:
            address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
            health_check_config: {{port_value: {status_port}}}
"""


class Gateway:
    """One `extproc up` that can be started again on its ports."""

    def __init__(self, stack: Stack, directory: Path) -> None:
        self.port, self.status_port = free_port(), free_port()
        self.status_url = f"http://127.0.0.1:{self.status_port}"
        workers = [part for engine in stack.engines for part in (f"--{engine.role}", engine.url)]
        ports = ("--port", str(self.port), "--prometheus-port", str(self.status_port))
        delay = ("--shutdown-drain-delay-secs", str(DELAY_S), "--envoy-concurrency", "1")
        self._command = ("up", *workers, *GATEWAY_FLAGS, *ports, *delay)
        self._log = directory / f"gateway-{self.port}.log"
        self.process: Child

    def start(self) -> None:
        self.process = Child("a gateway", self._command, self._log)

    def served(self) -> float:
        """Requests that this process has served."""
        return metric(self, "extproc_attempts_total", outcome="ok")


def test_a_rolling_restart_of_two_gateways_fails_nothing(engines, client, tmp_path):
    """Both legs of a request meet in one service, so what is rolled is a gateway: an Envoy with its service."""

    async def main():
        gateways = [Gateway(engines, tmp_path) for _ in range(2)]
        with contextlib.ExitStack() as processes:
            for gateway in gateways:
                gateway.start()
                processes.callback(lambda gateway=gateway: gateway.process.stop(30))
            endpoints = "".join(ENDPOINT.format(port=each.port, status_port=each.status_port) for each in gateways)
            port = free_port()
            url = f"http://127.0.0.1:{port}"
            async with EnvoyProcess(FRONT.format(port=port, endpoints=endpoints), concurrency=1), client() as http:
                for gateway in gateways:
                    await seen(lambda gateway=gateway: httpx.get(gateway.status_url + "/ready").is_success, "ready")
                await seen(lambda: httpx.post(url + "/generate", json=SHORT).is_success, "served")
                over = asyncio.Event()

                async def load() -> list[int]:
                    statuses = []
                    while not over.is_set():
                        statuses.append(await post(http, url))
                    return statuses

                loads = [asyncio.create_task(load()) for _ in range(LOAD)]
                for gateway in gateways:
                    await seen(gateway.served, "it has traffic")
                    gateway.process.signal(signal.SIGTERM)
                    await seen(lambda gateway=gateway: gateway.process.exit_status is not None, "ended")
                    assert gateway.process.exit_status == 0
                    await asyncio.to_thread(gateway.process.log.rename, gateway.process.log.with_suffix(".old"))
                    gateway.start()
                    await seen(gateway.served, "it has traffic again")
                over.set()
                statuses = [status for statuses in await asyncio.gather(*loads) for status in statuses]
                assert statuses == [200] * len(statuses)

    asyncio.run(main())


def drain_command(stack: Stack, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "extproc", "drain", *arguments, "--status-url", stack.status_url]


def drain(stack: Stack, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(drain_command(stack, *arguments), capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_is_drained_stopped_and_put_back(role, client):
    """Under load: nothing fails, though the engine's process ends in the middle of it."""

    async def main():
        victim, other = (engine for engine in stack.engines if engine.role == role)
        async with client() as http:
            begun = [asyncio.Event() for _ in range(4)]
            streams = [asyncio.create_task(stream(http, stack.url, event, tokens=500)) for event in begun]
            await asyncio.gather(*(event.wait() for event in begun))
            over = asyncio.Event()

            async def load() -> list[int]:
                statuses = []
                while not over.is_set():
                    statuses.append(await post(http, stack.url))
                return statuses

            loads = [asyncio.create_task(load()) for _ in range(LOAD)]
            await seen(lambda: len(victim.requests()) > 4, "it has traffic")
            done = await asyncio.to_thread(drain, stack, victim.url, "--wait")
            assert done.returncode == 0, done.stderr
            first, *_, last = done.stdout.splitlines()
            assert re.fullmatch(rf"{role} worker {victim.address} is draining: no new requests, \d+ in flight", first)
            assert last == "none in flight: it may be stopped"
            assert metric(stack, "extproc_worker_draining", worker=victim.address) == 1
            await asyncio.to_thread(victim.process.stop, 30)
            served = len(other.requests())
            await seen(lambda: len(other.requests()) > served + LOAD, "the other one serves alone")
            await asyncio.to_thread(stack.restart_engine, victim)
            await seen(lambda: metric(stack, "extproc_worker_healthy") == 4, "healthy again")
            # It is another process, and still gets nothing until somebody says so.
            served = len(other.requests())
            await seen(lambda: len(other.requests()) > served + LOAD, "the other one serves alone")
            assert not victim.requests()
            done = await asyncio.to_thread(drain, stack, victim.address, "--undo")
            assert (done.returncode, done.stdout) == (0, f"{role} worker {victim.address} gets new requests again\n")
            await seen(victim.requests, "it has traffic again")
            over.set()
            statuses = [status for statuses in await asyncio.gather(*loads) for status in statuses]
            assert statuses == [200] * len(statuses)
            assert all(data.rstrip().endswith(b"data: [DONE]") for data in await asyncio.gather(*streams))

    slow_checks = ["--health-check-interval-secs", "0.5", "--disable-circuit-breaker", "--retry-max-retries", "0"]
    with Stack(prefill=2, decode=2, up_flags=slow_checks) as stack:
        asyncio.run(main())


def test_all_workers_of_a_role_drain(engines):
    [first, second] = engines.prefills
    assert "no other prefill worker is left" not in drain(engines, first.url).stdout
    assert httpx.get(engines.status_url + "/ready").status_code == 200
    assert "no other prefill worker is left: new requests get 503" in drain(engines, second.url).stdout
    response = httpx.post(engines.url + "/generate", json=SHORT)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert "2 configured, 2 draining" in response.json()["error"]["message"]
    ready = httpx.get(engines.status_url + "/ready")
    assert (ready.status_code, ready.text) == (
        503,
        "no healthy pair of prefill and decode workers (2 draining)\n",
    )
    # Whoever waits learns that somebody else has put it back.
    body = LONG | {"sampling_params": {"max_new_tokens": 3000}}
    assert drain(engines, first.url, "--undo").returncode == 0
    with httpx.stream("POST", engines.url + "/generate", json=body, timeout=WAIT_S) as response:
        assert response.status_code == 200
        lines = response.iter_lines()  # held: the response closes with it
        next(lines)
        decode = response.headers["x-pd-decode"].partition(";")[0]
        command = drain_command(engines, decode, "--wait")
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
            assert "1 in flight" in waiting.stdout.readline()
            assert drain(engines, decode, "--undo").returncode == 0
            assert waiting.wait(WAIT_S) == 1
            assert "was put back meanwhile" in waiting.stderr.read()
    assert drain(engines, second.url, "--undo").returncode == 0
    until(lambda: httpx.get(engines.status_url + "/ready").status_code == 200, "ready again")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["http://127.0.0.1:1"], 1, "no worker 127.0.0.1:1; there are 127.0.0.1:"),
        (["ftp://127.0.0.1"], 2, "expected http://HOST[:PORT]"),
    ],
)
def test_wrong_use_of_drain_is_explained(engines, arguments, status, message):
    done = drain(engines, *arguments)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_drain_without_a_gateway_says_so(engines):
    gone = f"http://127.0.0.1:{free_port()}"
    done = subprocess.run(
        [*drain_command(engines, "127.0.0.1:1")[:-1], gone], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert f"cannot ask the gateway at {gone}" in done.stderr
    assert os.strerror(111) in done.stderr
