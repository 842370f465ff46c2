"""The gRPC server on asyncio: listeners and connections over TCP, Unix sockets and TLS, and how they end.

One `_Connection` a socket. What all its streams have to say in one go of the event loop goes out in one write.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

from extproc.lean.coroutines import Coroutines, Handler
from extproc.lean.grpc import GrpcConnection, Receiver
from extproc.lean.http2 import Limits

logger = logging.getLogger(__name__)

MAX_UNSENT_FRAMES = 10_000
"""Nothing is read from a client that does not read what it asked for: about 300 KB of acknowledgements."""
LINGER_S = 10.0
"""How long a client may take to read what was sent last, before it is cut off."""
HANG_UP_S = 1.0
"""How long it may take to hang up then; and to read what was sent last, when the server's grace is over."""
PREFACE_TIMEOUT_S = 20.0
"""How long a client may take to say that it speaks HTTP/2; gRPC clients give a connection up after as long."""
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}
"""Seconds, seconds and a number, where there are such: a client whose machine is gone is found out in two minutes."""
MESSAGE_BYTES = 1 << 26
BUFFERED_BYTES = 1 << 28


class Server:
    """Serves methods on any number of listeners."""

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        max_message_bytes: int = MESSAGE_BYTES,
        max_buffered_bytes: int = BUFFERED_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_buffered_bytes`: for a connection, of messages that are not complete or not read."""
        self.limits = limits or Limits()
        self.max_message_bytes = max_message_bytes
        self.max_buffered_bytes = max_buffered_bytes
        self.clock = clock
        self.methods: dict[str, Receiver] = {}
        """By path: `/package.Service/Method`."""
        self._listeners: list[asyncio.Server] = []
        self._paths: list[Path] = []
        self._connections: set[_Connection] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._stopping = False

    @property
    def connections(self) -> int:
        """Open ones."""
        return len(self._connections)

    @property
    def open_streams(self) -> int:
        """Calls that are not over."""
        return sum(connection.grpc.open_streams for connection in self._connections)

    def add(self, path: str, receiver: Receiver) -> None:
        """Serve a method. Before the first connection."""
        self.methods[path] = receiver

    def add_coroutine(self, path: str, handler: Handler) -> None:
        """Serve a method, of any kind, with a coroutine a call. Before the first connection."""
        self.add(path, Coroutines(handler))

    async def listen(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> int:
        """Listen on TCP; returns the port, which matters for 0. Raises OSError. `tls` has to offer h2 by ALPN."""
        listener = await asyncio.get_running_loop().create_server(
            # A second service must not silently share the port with the first.
            lambda: _Connection(self), host, port, ssl=tls, reuse_port=False
        )  # fmt: skip
        self._listeners.append(listener)
        bound: int = listener.sockets[0].getsockname()[1]
        return bound

    async def listen_on(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Listen on a socket that is bound; whoever made it removes its path."""
        self._listeners.append(
            await asyncio.get_running_loop().create_server(lambda: _Connection(self), sock=listener, ssl=tls)
            if listener.family != socket.AF_UNIX
            else await asyncio.get_running_loop().create_unix_server(lambda: _Connection(self), sock=listener, ssl=tls)
        )

    async def listen_unix(self, path: str, tls: ssl.SSLContext | None = None) -> None:
        """Listen on a Unix socket, in place of a stale one. Raises OSError."""
        listener = await asyncio.get_running_loop().create_unix_server(lambda: _Connection(self), path, ssl=tls)
        self._listeners.append(listener)
        self._paths.append(Path(path))

    async def stop(self, grace_s: float) -> None:
        """Take no more connections and streams, wait up to `grace_s` for those there are, then end them."""
        self._stopping = True
        for listener in self._listeners:
            listener.close()
        for path in self._paths:
            path.unlink(missing_ok=True)
        for connection in set(self._connections):
            connection.drain()
        if grace_s > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s / 2):
                    await self._empty.wait()
            for connection in set(self._connections):
                connection.refuse_streams()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s / 2):
                    await self._empty.wait()
        for connection in set(self._connections):
            connection.end()
        await self._empty.wait()
        for receiver in self.methods.values():
            if isinstance(receiver, Coroutines):
                await receiver.finished()

    # For connections

    def opened(self, connection: "_Connection") -> None:
        """One more."""
        self._connections.add(connection)
        self._empty.clear()
        if self._stopping:  # accepted in the same moment
            connection.end()

    def closed(self, connection: "_Connection") -> None:
        """One less."""
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()


class _Connection(asyncio.Protocol):
    """One socket."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._paused = False
        self._reading = True
        self._hung_up = False
        self._flush_is_due = False
        self._ending: asyncio.TimerHandle | None = None
        self._greeting: asyncio.TimerHandle | None = None
        self.grpc = GrpcConnection(
            server.methods,
            limits=server.limits,
            max_message_bytes=server.max_message_bytes,
            max_buffered_bytes=server.max_buffered_bytes,
            clock=server.clock,
            wake=self._flush_soon,
            call_later=self._loop.call_later,
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclasses of it
        _keep_alive(transport.get_extra_info("socket"))
        tls = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            logger.warning("a client did not agree on h2 by ALPN")
            self._transport.abort()
            return
        self._greeting = self._loop.call_later(PREFACE_TIMEOUT_S, self._transport.abort)
        self._server.opened(self)
        self._flush()

    def data_received(self, data: bytes) -> None:
        """Answer what came; at once, unless tasks have to."""
        if self._hung_up:
            return
        if self._greeting is not None and self.grpc.http2.greeted:
            self._greeting.cancel()
            self._greeting = None
        self.grpc.receive(data)
        self._flush()
        if self._paused and self._reading and self.grpc.http2.unsent_frames > MAX_UNSENT_FRAMES:
            self._reading = False
            self._transport.pause_reading()

    def eof_received(self) -> None:
        """A client that has hung up wants no answers: the transport closes."""

    def pause_writing(self) -> None:
        """The client takes nothing: what is to be sent waits in its streams."""
        self._paused = True

    def resume_writing(self) -> None:
        """It does again."""
        self._paused = False
        if not self._reading:
            self._reading = True
            self._transport.resume_reading()
        self._flush_soon()

    def connection_lost(self, exc: Exception | None) -> None:
        """Every stream is over."""
        for timer in (self._greeting, self._ending):
            if timer is not None:
                timer.cancel()
        self._hung_up = True
        self.grpc.http2.close()
        self.grpc.lost()
        self._server.closed(self)

    def drain(self) -> None:
        """Ask for no more streams."""
        self.grpc.http2.drain()
        self._flush()

    def refuse_streams(self) -> None:
        """Serve none but those there are."""
        self.grpc.http2.refuse_streams()
        self._flush()

    def end(self) -> None:
        """End every stream, and the connection."""
        self.grpc.http2.close()
        self.grpc.lost()
        self._flush()
        self._abort_in(HANG_UP_S)

    def _flush_soon(self) -> None:
        if not self._flush_is_due:
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        if self._hung_up:
            return
        done = self.grpc.http2.done
        if done and self._ending is None:
            self._abort_in(LINGER_S)
        while not self._paused:
            data = self.grpc.data_to_send()
            if data:
                self._transport.write(data)
            elif not done:
                return
            else:
                self._hang_up()
                return

    def _hang_up(self) -> None:
        self._hung_up = True
        if not self._transport.get_write_buffer_size():
            self._abort_in(HANG_UP_S)
        # Closing at once would take GOAWAY from a client that has sent more meanwhile: TCP discards both.
        if self._transport.can_write_eof():
            with contextlib.suppress(OSError):  # the client has hung up in the same moment
                self._transport.write_eof()
        else:
            self._transport.close()

    def _abort_in(self, after_s: float) -> None:
        if self._ending is not None:
            self._ending.cancel()
        self._ending = self._loop.call_later(after_s, self._transport.abort)


def _keep_alive(connection: socket.socket | None) -> None:
    if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
