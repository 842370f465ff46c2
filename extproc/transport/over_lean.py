"""The processor on `extproc.lean`: callbacks, no coroutine for a stream."""

import asyncio
import contextlib
import socket
from pathlib import Path

from grpc_health.v1 import health_pb2

from extproc import unix_socket, wire
from extproc.errors import ConfigError
from extproc.lean.coroutines import EOF, Context
from extproc.lean.grpc import Status
from extproc.lean.server import BUFFERED_BYTES, Server
from extproc.service import MESSAGE_SLACK_BYTES, Processor
from extproc.tls import ServerCertificates
from extproc.transport.lean_streams import AccessLogs, Streams

HEALTH = "/grpc.health.v1.Health"
BACKLOG = 1024
"""Connections that wait to be accepted: an Envoy opens one a worker thread, many Envoys some more."""


class LeanTransport:
    """Serves the processor, the access log and health checks."""

    def __init__(self, processor: Processor, max_payload_bytes: int, certificates: ServerCertificates | None) -> None:
        limit = max_payload_bytes + MESSAGE_SLACK_BYTES
        self._certificates = certificates
        self._server = Server(max_message_bytes=limit, max_buffered_bytes=max(BUFFERED_BYTES, 2 * limit))
        self._server.add(wire.METHOD, Streams(processor))
        self._server.add(f"/{wire.ACCESS_LOG_SERVICE}/StreamAccessLogs", AccessLogs(processor))
        self._health = _Health()
        self._server.add_coroutine(f"{HEALTH}/Check", self._health.check)
        self._server.add_coroutine(f"{HEALTH}/Watch", self._health.watch)
        self._bound = contextlib.ExitStack()
        self._closing: asyncio.Task[None] | None = None

    async def listen(self, target: str) -> str:
        """See `Transport`."""
        if target.startswith("unix:"):
            listener = socket.socket(socket.AF_UNIX)
            path = Path(target.removeprefix("unix:"))
            try:
                self._bound.enter_context(unix_socket.bound(path, lambda: listener.bind(str(path))))
            except ConfigError:
                listener.close()
                raise
            listener.listen(BACKLOG)
            await self._server.listen_on(listener)
            return target
        host, _, port = target.rpartition(":")
        tls = self._certificates.context() if self._certificates else None
        try:
            bound = await self._server.listen(host.strip("[]"), int(port), tls)
        except OSError as error:
            raise ConfigError(f"--grpc-port: cannot listen on {target}: {error.strerror or error}") from None
        return f"{host}:{bound}"

    async def set_health(self, service: str, serving: bool) -> None:
        """See `Transport`."""
        self._health.set(service, serving)

    async def close(self, grace_s: float) -> None:
        """See `Transport`."""
        self._health.leave()
        # In a task: it waits for the open streams, of health watches and access logs as well.
        self._closing = asyncio.create_task(self._server.stop(grace_s))
        await asyncio.sleep(0)  # lets it begin

    async def stop(self) -> None:
        """See `Transport`."""
        self._health.leave()
        await self._server.stop(0)
        if self._closing:
            await self._closing
        self._bound.close()


class _Health:
    """`grpc.health.v1.Health`: https://github.com/grpc/grpc/blob/master/doc/health-checking.md."""

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {}
        self._leaving = False
        self._changed = asyncio.Event()

    def set(self, service: str, serving: bool) -> None:
        """Tell those who ask, and those who watch."""
        if not self._leaving and self._serving.get(service) is not serving:
            self._serving[service] = serving
            self._tell()

    def leave(self) -> None:
        """From now on nothing is served."""
        if not self._leaving:
            self._serving = dict.fromkeys(self._serving, False)
            self._leaving = True
            self._tell()

    async def check(self, context: Context) -> None:
        """Answer once."""
        service = await self._service(context)
        if service not in self._serving:
            await context.abort(Status.NOT_FOUND, f"unknown service {service[:200]!r}")
        await context.write(self._answer(service))

    async def watch(self, context: Context) -> None:
        """Answer now and at each change."""
        service = await self._service(context)
        told = None
        while True:
            changed = self._changed
            answer = self._answer(service)
            if answer != told:
                told = answer
                await context.write(answer)
            await changed.wait()

    async def _service(self, context: Context) -> str:
        data = await context.read()
        try:
            name: str = health_pb2.HealthCheckRequest.FromString(b"" if data is EOF else data).service
        except Exception:  # protobuf's own, which only `wire` knows
            await context.abort(Status.INVALID_ARGUMENT, "not a HealthCheckRequest")
        return name

    def _answer(self, service: str) -> bytes:
        answer = health_pb2.HealthCheckResponse
        states = {True: answer.SERVING, False: answer.NOT_SERVING, None: answer.SERVICE_UNKNOWN}
        data: bytes = answer(status=states[self._serving.get(service)]).SerializeToString()
        return data

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
