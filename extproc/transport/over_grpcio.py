"""The processor on `grpc.aio`: one coroutine a stream."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, Protocol

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from extproc import unix_socket, wire
from extproc.errors import ConfigError
from extproc.exchange import ProtocolViolation
from extproc.service import MESSAGE_SLACK_BYTES, Processor
from extproc.tls import ServerCertificates

logger = logging.getLogger(__name__)


class Context(Protocol):
    """The part of `grpc.aio.ServicerContext` that is used; grpcio has no types of its own."""

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]] | None:
        """Metadata of the call."""

    async def read(self) -> bytes:
        """The next message, or `grpc.aio.EOF`."""

    async def write(self, message: bytes) -> None:
        """Send a message."""

    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        """End the call with an error."""


class GrpcioTransport:
    """Serves the processor, the access log and health checks."""

    def __init__(self, processor: Processor, max_payload_bytes: int, certificates: ServerCertificates | None) -> None:
        self._processor = processor
        self._certificates = certificates
        self._health = health.aio.HealthServicer()
        self._limit = max_payload_bytes + MESSAGE_SLACK_BYTES
        self._server: grpc.aio.Server | None = None
        self._bound = contextlib.ExitStack()
        self._closing: asyncio.Task[None] | None = None

    async def listen(self, target: str) -> str:
        """See `Transport`."""
        server = self._make_server()
        port = self._bind(server, target)
        await server.start()
        return target if target.startswith("unix:") else f"{target.rpartition(':')[0]}:{port}"

    def _make_server(self) -> grpc.aio.Server:
        """Needs the event loop that it will run on."""
        options = [
            ("grpc.max_receive_message_length", self._limit),
            ("grpc.max_send_message_length", self._limit),
            # No grpc.max_concurrent_streams: a prefill stream that waits for one would hold up its own route stream.
            # With 8 a connection, 205 of 300 requests at once got 503 after 10 s. Envoy opens another one after 1024.
            # A second service must not silently share the port with the first.
            ("grpc.so_reuseport", 0),
        ]
        server = self._server = grpc.aio.server(options=options)
        # Without (de)serialisers: `wire` does that.
        process = grpc.stream_stream_rpc_method_handler(self._process)
        access_log = grpc.stream_stream_rpc_method_handler(self._read_access_log)
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(wire.SERVICE, {"Process": process}),
                grpc.method_handlers_generic_handler(wire.ACCESS_LOG_SERVICE, {"StreamAccessLogs": access_log}),
            )
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        return server

    def _bind(self, server: grpc.aio.Server, target: str) -> int:
        try:
            if target.startswith("unix:"):
                path = Path(target.removeprefix("unix:"))
                self._bound.enter_context(unix_socket.bound(path, lambda: server.add_insecure_port(target)))
                return 0
            if self._certificates:
                return int(server.add_secure_port(target, self._certificates.credentials))
            return int(server.add_insecure_port(target))
        except RuntimeError:
            flag = "--grpc-uds" if target.startswith("unix:") else "--grpc-port"
            raise ConfigError(f"{flag}: cannot listen on {target}: is it in use?") from None

    async def set_health(self, service: str, serving: bool) -> None:
        """See `Transport`."""
        answer = health_pb2.HealthCheckResponse
        await self._health.set(service, answer.SERVING if serving else answer.NOT_SERVING)

    async def close(self, grace_s: float) -> None:
        """See `Transport`."""
        await self._health.enter_graceful_shutdown()
        # In a task: it waits for the open streams, of health watches and access logs as well.
        if self._server:
            self._closing = asyncio.create_task(self._server.stop(grace_s))
        await asyncio.sleep(0)  # lets it begin

    async def stop(self) -> None:
        """See `Transport`."""
        await self._health.enter_graceful_shutdown()
        if self._server:
            await self._server.stop(None)
        if self._closing:
            await self._closing
        self._bound.close()

    async def _process(self, _requests: object, context: Context) -> None:
        """One ext_proc stream, from its first message to its end."""
        outlet = _Outlet(context)
        call = self._processor.opened(context.invocation_metadata() or (), outlet)
        try:
            useful = True
            while useful and (data := await context.read()) is not grpc.aio.EOF:
                outlet.collecting = True
                useful = self._processor.received(call, data)
                outlet.collecting = False
                await outlet.flush()
        except (wire.WireError, ProtocolViolation) as error:
            logger.warning("%s", error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            outlet.close()
            self._processor.ended(call)

    async def _read_access_log(self, _requests: object, context: Context) -> None:
        """The access log of one of an Envoy's threads, while both live."""
        try:
            while (data := await context.read()) is not grpc.aio.EOF:
                self._processor.logged(data)
        except wire.WireError as error:
            logger.warning("access log: %s", error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))


class _Outlet:
    """Writes in order, whoever writes: the stream's own coroutine, or a task for the other leg's replies and timers.

    A task, as a leg's coroutine is cancelled when its stream is reset, which is just when the other has to hear of it.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._unsent: deque[bytes] = deque()
        self._writing = asyncio.Lock()
        self.collecting = False
        """The writer flushes by itself."""
        self._closed = False
        self._task: asyncio.Task[None] | None = None  # held: the event loop itself keeps weak references

    def write(self, message: bytes) -> None:
        """Send it soon."""
        self._unsent.append(message)
        if not self.collecting and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self.flush())

    async def flush(self) -> None:
        """Write what there is."""
        async with self._writing:
            while self._unsent and not self._closed:
                try:
                    await self._context.write(self._unsent.popleft())
                except Exception as error:  # grpcio raises several, some of which it does not export
                    # The HTTP request ended while the answer was on its way: its stream's own end does the rest.
                    logger.debug("a reply came too late: %s", error)

    def close(self) -> None:
        """The stream is over."""
        self._closed = True
