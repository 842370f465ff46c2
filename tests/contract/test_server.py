"""The composed service: what Envoy's and Kubernetes' health checks see, and the metrics port."""

import asyncio
import socket

import grpc.aio
import httpx
import pytest
from aiohttp import web
from grpc_health.v1 import health_pb2, health_pb2_grpc

from extproc.config import Config, WorkerConfig
from extproc.errors import ConfigError
from extproc.model import RankLoad
from extproc.server import Service

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Workers:
    """One web server that plays both engines, and can be well or not."""

    def __init__(self) -> None:
        self.well = True

    async def __aenter__(self):
        app = web.Application()
        app.router.add_get("/health", self._health)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        self.ports = []
        for _ in range(2):
            site = web.TCPSite(self._runner, "127.0.0.1", 0)
            await site.start()
        self.ports = [address[1] for address in self._runner.addresses]
        return self

    async def __aexit__(self, *_):
        await self._runner.cleanup()

    async def _health(self, _request):
        return web.Response(status=200 if self.well else 503)


async def until(condition):
    async with asyncio.timeout(30):
        while not await condition():  # noqa: ASYNC110 - asked over the network
            await asyncio.sleep(0.01)


def test_health_follows_the_workers():
    async def main():
        async with Workers() as workers:
            prefill, decode = workers.ports
            config = Config(
                prefill=(WorkerConfig(url=f"http://127.0.0.1:{prefill}"),),
                decode=(WorkerConfig(url=f"http://127.0.0.1:{decode}"),),
                grpc_port=free_port(),
                prometheus_port=free_port(),
                health_check_interval_secs=0.02,
                worker_startup_check_interval=0.02,
                health_failure_threshold=1,
            )
            service = Service(config)
            async with (
                service.running() as addresses,
                grpc.aio.insecure_channel(addresses.grpc) as channel,
                httpx.AsyncClient(base_url=addresses.status) as client,
            ):
                health = health_pb2_grpc.HealthStub(channel)

                async def status(name):
                    return (await health.Check(health_pb2.HealthCheckRequest(service=name))).status

                async def ready():
                    return await status("readiness") == SERVING

                async def not_ready():
                    return await status("readiness") == NOT_SERVING

                await until(ready)
                assert (await client.get("/ready")).status_code == 200
                workers.well = False
                await until(not_ready)
                # It lives, and answers Envoy: with a 503 that says why.
                for name in ("", "liveness", "envoy.service.ext_proc.v3.ExternalProcessor"):
                    assert await status(name) == SERVING
                response = await client.get("/ready")
                assert response.status_code == 503
                assert "no healthy pair" in response.text
                assert (await client.get("/health")).status_code == 200
                workers.well = True
                await until(ready)
                assert "extproc_worker_healthy" in (await client.get("/metrics")).text

    asyncio.run(main())


def test_scrapes_reach_the_table_and_the_metrics():
    config = Config(prefill=(WorkerConfig(url="http://127.0.0.1:1", dp_size=2),), decode=())
    service = Service(config)
    service.observe("127.0.0.1:1", [RankLoad(1, used_tokens=7)], 1.0, 0.01)
    service.scrape_failed("127.0.0.1:1", "down", 0.5)
    assert service.table.states[0].ranks[1].scraped.used_tokens == 7
    assert service.telemetry.registry.get_sample_value("extproc_scrape_failures_total", {"worker": "127.0.0.1:1"}) == 1


@pytest.mark.parametrize("flag", ["grpc_port", "prometheus_port"])
def test_a_port_that_is_taken_is_named(flag):
    async def main(port):
        ports = {"grpc_port": free_port(), "prometheus_port": free_port(), flag: port}
        async with Service(Config(**ports)).running():
            pass

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')}: cannot listen"):
            asyncio.run(main(taken.getsockname()[1]))


def test_the_load_table_is_served_as_json():
    async def main():
        async with Workers() as workers:
            prefill, decode = workers.ports
            config = Config(
                prefill=(WorkerConfig(url=f"http://127.0.0.1:{prefill}", dp_size=2),),
                decode=(WorkerConfig(url=f"http://127.0.0.1:{decode}"),),
                grpc_port=free_port(),
                prometheus_port=free_port(),
            )
            service = Service(config)
            async with service.running() as addresses, httpx.AsyncClient(base_url=addresses.status) as client:
                service.table.observe(f"127.0.0.1:{prefill}", [RankLoad(1, used_tokens=7)], at_s=0.0)
                answer = await client.get("/debug/loads")
                assert answer.headers["content-type"].startswith("application/json")
                first, second = answer.json()["workers"]
                assert [rank["dp_rank"] for rank in first["ranks"]] == [0, 1]
                assert first["ranks"][1]["scraped"]["used_tokens"] == 7
                assert (second["role"], second["healthy"]) == ("decode", False)

    asyncio.run(main())


def test_a_bad_tokenizer_is_told_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match="tokenizer_path"):
        Service(Config(tokenizer_path=str(tmp_path / "none.json")))
