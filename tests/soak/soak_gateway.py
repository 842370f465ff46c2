"""The gateway under test, in front of a field's engines: a service with a window, an Envoy with its admin interface."""

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from chaos_field import Field

from extproc import envoy_config
from extproc.child_process import tied_to_parent
from extproc.config import Config
from extproc.demo.stack import GATEWAY_FLAGS, HOST, START_TIMEOUT_S, free_port
from extproc.envoy_process import EnvoyProcess

PREFILL_TIMEOUT_S = 5
"""An engine that hangs holds its request for so long."""
LOOK_S = 0.02
THIS_LOOK = "http.admin.downstream_rq_active"
"""Counts the request that asks for it."""
_READY = re.compile(r"ext_proc service on (\S+), metrics on (http://\S+)/metrics")
_GAUGE = re.compile(r"^(\S+(?:upstream_rq_active|downstream_rq_active)): (\d+)$", re.MULTILINE)


@dataclass(slots=True)
class Gateway:
    """Both processes, while they run."""

    field: Field
    service: subprocess.Popen[bytes]
    log: Path
    """What the service writes, a line an attempt."""
    census_file: Path
    envoy_pid: int
    admin: str

    async def census(self) -> dict[str, int]:
        """Live objects of the service by type."""
        self.census_file.unlink(missing_ok=True)
        self.service.send_signal(signal.SIGUSR1)

        async def written() -> bool:
            return self.census_file.exists()

        await self.field.until(written, "the service's census", within_s=60)
        counts: dict[str, int] = json.loads(self.census_file.read_text())
        return counts

    async def active_in_envoy(self) -> dict[str, int]:
        """Requests and gRPC streams that Envoy has open, by the gauge; those above 0."""
        async with self.field.http.get(f"http://{self.admin}/stats?filter=rq_active") as answer:
            text = await answer.text()
        return {name: int(value) for name, value in _GAUGE.findall(text) if int(value) and name != THIS_LOOK}


@contextlib.asynccontextmanager
async def running_gateway(field: Field, directory: Path) -> AsyncIterator[Gateway]:
    """In place of the field's own gateway, which is stopped."""
    await field.do(lambda: field.stack.gateway.process.stop(10))
    config = Config(host=HOST, port=free_port(), grpc_port=free_port(), prometheus_port=free_port())
    census, log = directory / "census.json", directory / "service.log"
    workers = [part for engine in field.engines for part in (f"--{engine.role}", engine.url)]
    ports = ("--grpc-port", str(config.grpc_port), "--prometheus-port", str(config.prometheus_port))
    flags = ("--prefill-timeout-secs", str(PREFILL_TIMEOUT_S), "--shutdown-drain-delay-secs", "0")
    script = Path(__file__).with_name("soak_service.py")
    command = [sys.executable, str(script), str(census), "serve", *workers, *GATEWAY_FLAGS, *ports, *flags]

    def start() -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            return subprocess.Popen(tied_to_parent(command), stdout=output, stderr=subprocess.STDOUT)

    service = await field.do(start)
    try:
        field.status_url = await _ready(service, log)
        async with EnvoyProcess(envoy_config.to_yaml(envoy_config.bootstrap(config, admin=f"{HOST}:0"))) as envoy:
            assert envoy.pid is not None
            assert envoy.admin_address is not None
            field.url = f"http://{HOST}:{config.port}"
            await field.calm()
            yield Gateway(field, service, log, census, envoy.pid, envoy.admin_address)
    finally:
        field.url, field.status_url = "", ""
        service.terminate()
        await field.do(lambda: service.wait(30))


async def _ready(service: subprocess.Popen[bytes], log: Path) -> str:
    """Until the service says so; the base of its metrics' URL."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not (found := _READY.search(_text(log))):
        assert service.poll() is None, f"the service has ended:\n{_text(log)}"
        assert time.monotonic() < deadline_s, "the service is not ready"
        await asyncio.sleep(LOOK_S)
    return found[2]


def _text(log: Path) -> str:
    return log.read_text(errors="replace")
