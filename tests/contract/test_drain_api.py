"""Leaving in order, and draining workers over HTTP: what health checks, Envoy and operators see of a service."""

import asyncio
import contextlib
import socket
from dataclasses import dataclass
from urllib.parse import quote

import grpc.aio
import httpx
import pytest
from aiohttp import web
from envoy_data_plane.envoy.config.core.v3 import HeaderMap, HeaderValue
from envoy_data_plane.envoy.service.ext_proc.v3 import HttpHeaders, ProcessingRequest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from extproc.cli.serve import drain
from extproc.config import Config, WorkerConfig
from extproc.model import Role
from extproc.server import Service
from extproc.status import _is_local

METHOD = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
HEADERS = HttpHeaders(headers=HeaderMap(headers=[HeaderValue(key=":method", raw_value=b"GET")]))
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
WAIT_S = 30


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.asynccontextmanager
async def engines():
    """The ports of two engines that are well."""

    async def well(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_get("/health", well)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        for _ in range(2):
            await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield [address[1] for address in runner.addresses]
    finally:
        await runner.cleanup()


@dataclass
class Running:
    """A service that is ready, by a pair of workers; a second prefill worker, `[::1]:1`, is down."""

    service: Service
    channel: grpc.aio.Channel
    client: httpx.AsyncClient
    prefill: str
    """Name of the one that is well."""

    async def status(self, name: str = "readiness") -> int:
        stub = health_pb2_grpc.HealthStub(self.channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status


@contextlib.asynccontextmanager
async def running(*, awaits_envoy: bool = False, **settings: object):
    async with engines() as (prefill, decode):
        config = Config(
            **{
                "prefill": (WorkerConfig(url=f"http://127.0.0.1:{prefill}"), WorkerConfig(url="http://[::1]:1")),
                "decode": (WorkerConfig(url=f"http://127.0.0.1:{decode}"),),
                "grpc_port": free_port(),
                "prometheus_port": free_port(),
                "shutdown_drain_delay_secs": 0,
                **settings,
            }
        )
        service = Service(config, awaits_envoy=awaits_envoy)
        async with (
            asyncio.timeout(WAIT_S),
            service.running() as addresses,
            grpc.aio.insecure_channel(addresses.grpc) as channel,
            httpx.AsyncClient(base_url=addresses.status) as client,
        ):
            while not all(service.table.eligible(role) for role in Role):  # noqa: ASYNC110 - the table tells nobody
                await asyncio.sleep(0.01)
            yield Running(service, channel, client, f"127.0.0.1:{prefill}")


def test_a_worker_is_marked_and_unmarked():
    async def main():
        async with running() as it:
            listed = (await it.client.get("/workers")).json()["workers"]
            assert [(each["role"], each["worker"], each["healthy"], each["draining"]) for each in listed[:2]] == [
                ("prefill", it.prefill, True, False),
                ("prefill", "[::1]:1", False, False),
            ]
            for name, healthy in ((it.prefill, True), ("[::1]:1", False)):
                path = f"/workers/prefill/{quote(name, safe='')}/drain"
                expected = {"worker": name, "role": "prefill", "healthy": healthy, "draining": True, "in_flight": 0}
                for _ in range(2):  # as often as one likes
                    answer = await it.client.put(path)
                    assert (answer.status_code, answer.json()) == (200, expected)
                assert (await it.client.get(path)).json() == expected
            assert await it.status() == NOT_SERVING
            assert await it.status("liveness") == SERVING
            assert (await it.client.get("/ready")).text.endswith("(2 draining)\n")
            loads = (await it.client.get("/debug/loads")).json()["workers"]
            assert [each["draining"] for each in loads] == [True, True, False]
            for _ in range(2):
                assert not (await it.client.delete(f"/workers/prefill/{it.prefill}/drain")).json()["draining"]
            assert await it.status() == SERVING
            assert (await it.client.get("/ready")).status_code == 200

    asyncio.run(main())


@pytest.mark.parametrize("path", ["/workers/decode/[::1]:1/drain", "/workers/prefill/other:1/drain"])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_a_worker_that_is_not_there(method, path):
    async def main():
        async with running() as it:
            answer = await it.client.request(method, path)
            assert answer.status_code == 404
            assert "GET /workers lists them" in answer.json()["error"]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("remote", "local"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("10.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("fe80::1%eth0", False),
        ("", False),
        (None, False),
    ],
)
def test_changes_are_for_this_host_only(remote, local):
    assert _is_local(remote) is local


async def accepts(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionError:
        return False
    writer.close()
    return True


def test_leaving_is_said_first_and_streams_outlive_the_close():
    async def main():
        async with running() as it:
            assert await it.status() == SERVING
            watch = health_pb2_grpc.HealthStub(it.channel).Watch(health_pb2.HealthCheckRequest(service="readiness"))
            assert (await watch.read()).status == SERVING
            old = it.channel.stream_stream(METHOD)()
            await old.write(bytes(ProcessingRequest(request_headers=HEADERS)))
            await old.read()
            await it.service.leave()
            assert (await watch.read()).status == NOT_SERVING
            assert (await it.client.get("/ready")).status_code == 503
            assert (await it.client.get("/health")).status_code == 200
            state = it.service.table.states[0]
            it.service.worker_changed(state.worker, True, None)  # whatever the workers do now
            assert await it.status() == NOT_SERVING
            assert it.service.processor.open_streams == 1  # and it still serves
            await it.service.close()
            assert it.service.processor.open_streams == 1
            port = it.service.config.grpc_port
            while await accepts(port):  # noqa: ASYNC110 - gRPC closes it in a thread of its own
                await asyncio.sleep(0.01)
            assert it.service.processor.open_streams == 1
            with socket.socket() as next_process:
                next_process.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                next_process.bind(("127.0.0.1", port))
            old.cancel()
            await it.service.processor.idle()

    asyncio.run(main())


def test_a_health_watch_does_not_hold_up_the_end():
    """It is a stream like any other to gRPC, and never ends by itself: the grace period is far beyond this test's."""

    async def main():
        async with running(shutdown_grace_period_secs=3600) as it:
            watch = health_pb2_grpc.HealthStub(it.channel).Watch(health_pb2.HealthCheckRequest(service="readiness"))
            await watch.read()
            await drain(it.service, asyncio.Event(), it.service.close)

    asyncio.run(main())


def test_not_ready_before_envoy_is():
    async def main():
        async with running(awaits_envoy=True) as it:
            assert await it.status() == NOT_SERVING
            assert (await it.client.get("/ready")).text == "Envoy is not up yet\n"
            it.service.envoy_serves()
            assert (await it.client.get("/ready")).status_code == 200
            assert await it.status() == SERVING

    asyncio.run(main())
