"""The gRPC transport: Envoy's streams in, events to exchanges, effects back out.

I/O only: decides nothing. One coroutine a stream, which feeds its exchange and writes the answers.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn, Protocol

import grpc
import grpc.aio

from extproc import wire
from extproc.events import Effect, Ended, Event, Finished, Leg, Linger, Reply, RequestHeaders, Send, Wake, Woken
from extproc.exchange import Exchange, Gateway, ProtocolViolation, refuse_prefill

logger = logging.getLogger(__name__)

LEG_METADATA = "x-pd-leg"
"""gRPC metadata by which Envoy's two filters say which leg a stream is for (`initial_metadata` of its grpc_service)."""

MESSAGE_SLACK_BYTES = 1 << 20
"""On top of the largest body, for headers and framing."""


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


class ExternalProcessor:
    """Serves `envoy.service.ext_proc.v3.ExternalProcessor` with exchanges; hears of broken ones by the access log."""

    def __init__(self, gateway: Gateway, finished: Callable[[Finished], None]) -> None:
        """`finished` is told of every attempt that is over."""
        self._gateway = gateway
        self._finished = finished
        self._streams: dict[tuple[Exchange, Leg], _Stream] = {}
        self._lingering: dict[Exchange, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._moved: asyncio.Future[None] | None = None
        """Somebody waits in `met`."""
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def open_streams(self) -> int:
        """Streams that belong to an exchange."""
        return len(self._streams)

    async def idle(self) -> None:
        """Return when every exchange has finished."""
        await self._idle.wait()

    async def met(self) -> None:
        """Return when no placed request is without its prefill stream."""
        while self._gateway.expecting:
            self._moved = asyncio.get_running_loop().create_future()
            await self._moved

    def handlers(self) -> Sequence[grpc.GenericRpcHandler]:
        """What to add to a server. Without (de)serialisers: `wire` does that."""
        process = grpc.stream_stream_rpc_method_handler(self.process)
        access_log = grpc.stream_stream_rpc_method_handler(self.read_access_log)
        return (
            grpc.method_handlers_generic_handler(wire.SERVICE, {"Process": process}),
            grpc.method_handlers_generic_handler(wire.ACCESS_LOG_SERVICE, {"StreamAccessLogs": access_log}),
        )

    async def read_access_log(self, _requests: object, context: Context) -> None:
        """The access log of one of an Envoy's threads, while both live: of `il_pd`, what has response flags."""
        stream = _Stream(context)
        try:
            while (data := await stream.read()) is not None:
                for room, broken in wire.decode_access_log(data):
                    exchange = self._gateway.broken(room)
                    if exchange is not None:
                        self._apply_all(exchange, exchange.route(broken))
        except wire.WireError as error:
            logger.warning("access log: %s", error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    async def process(self, _requests: object, context: Context) -> None:
        """One stream, from its first message to its end."""
        metadata = dict(context.invocation_metadata() or ())
        leg = Leg.PREFILL if metadata.get(LEG_METADATA) == Leg.PREFILL else Leg.ROUTE
        stream = _Stream(context)
        try:
            if leg is Leg.ROUTE:
                await self._run(Exchange(self._gateway), leg, stream)
            else:
                await self._run_prefill(stream)
        except (wire.WireError, ProtocolViolation) as error:
            logger.warning("%s", error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    async def _run_prefill(self, stream: "_Stream") -> None:
        """A prefill stream belongs to the exchange whose room its first message names."""
        data = await stream.read()
        if data is None:
            return
        event = wire.decode(data)
        exchange = self._gateway.find(event) if isinstance(event, RequestHeaders) else None
        if exchange is None:
            await stream.write(wire.encode(refuse_prefill().reply))
            return
        await self._run(exchange, Leg.PREFILL, stream, first=data)

    async def _run(self, exchange: Exchange, leg: Leg, stream: "_Stream", first: bytes | None = None) -> None:
        take = _take(exchange, leg)
        self._streams[exchange, leg] = stream
        self._idle.clear()
        try:
            data = first or await stream.read()
            while data is not None:
                for reply in self._apply(exchange, leg, take(wire.decode(data))):
                    await stream.write(wire.encode(reply))
                data = await stream.read()
        finally:
            # Also when the stream was cancelled or a bug broke out: nothing may stay charged.
            del self._streams[exchange, leg]
            stream.close()
            self._apply(exchange, leg, take(Ended()))
            self._note_idle()

    def _apply(self, exchange: Exchange, leg: Leg, effects: Iterable[Effect]) -> list[Reply]:
        """Do what can be done at once; returns the replies for the leg's own stream.

        What goes to the other leg is written by a task of its own: this leg's coroutine is cancelled when its stream
        is reset, which is just when the other leg has to hear of it.
        """
        own = list[Reply]()
        for effect in effects:
            match effect:
                case Send(to, reply) if to is leg:
                    own.append(reply)
                case Send(to, reply):
                    self._write_soon(exchange, to, reply)
                case Wake(to, after_s):
                    stream = self._streams.get((exchange, to))
                    if stream is not None:
                        timer = asyncio.get_running_loop().call_later(after_s, self._wake, exchange, to)
                        stream.timers.append(timer)
                case Linger(after_s):
                    timer = asyncio.get_running_loop().call_later(after_s, self._settle, exchange)
                    self._lingering[exchange] = timer
                case Finished():
                    if exchange in self._lingering:
                        self._lingering.pop(exchange).cancel()
                    self._finished(effect)
        if self._moved and not self._moved.done():
            self._moved.set_result(None)
        return own

    def _apply_all(self, exchange: Exchange, effects: Iterable[Effect]) -> None:
        """Apply what comes of an event that is no stream's own."""
        for reply in self._apply(exchange, Leg.ROUTE, effects):
            self._write_soon(exchange, Leg.ROUTE, reply)
        self._note_idle()

    def _settle(self, exchange: Exchange) -> None:
        self._lingering.pop(exchange, None)
        self._apply_all(exchange, exchange.route(Woken()))

    def _note_idle(self) -> None:
        if not self._streams and not self._lingering:
            self._idle.set()

    def _write_soon(self, exchange: Exchange, leg: Leg, reply: Reply) -> None:
        stream = self._streams.get((exchange, leg))
        if stream is not None:
            task = asyncio.create_task(stream.write(wire.encode(reply)))
            self._tasks.add(task)  # the event loop itself keeps weak references only
            task.add_done_callback(self._tasks.discard)

    def _wake(self, exchange: Exchange, leg: Leg) -> None:
        if (exchange, leg) in self._streams:
            for reply in self._apply(exchange, leg, _take(exchange, leg)(Woken())):
                self._write_soon(exchange, leg, reply)


def _take(exchange: Exchange, leg: Leg) -> Callable[[Event], list[Effect]]:
    return exchange.route if leg is Leg.ROUTE else exchange.prefill


class _Stream:
    """One gRPC stream; writes may come from its own coroutine and from the other leg's."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._writing = asyncio.Lock()
        self._closed = False
        self.timers: list[asyncio.TimerHandle] = []
        """Go with the stream: else each would hold its exchange until it is due."""

    async def read(self) -> bytes | None:
        """The next message; None at the end."""
        data = await self._context.read()
        return None if data is grpc.aio.EOF else data

    def close(self) -> None:
        """The stream has ended: nothing is written or waited for any more."""
        self._closed = True
        for timer in self.timers:
            timer.cancel()

    async def write(self, data: bytes) -> None:
        """Write a message; one for a stream that has ended meanwhile is dropped."""
        async with self._writing:
            if self._closed:
                return
            try:
                await self._context.write(data)
            except Exception as error:  # grpcio raises several, some of which it does not export
                # The HTTP request ended while the answer was on its way: its stream's own end does the rest.
                logger.debug("a reply came too late: %s", error)


def make_server(processor: ExternalProcessor, max_payload_bytes: int) -> grpc.aio.Server:
    """A gRPC server with the processor on it; the caller binds, starts and stops it."""
    limit = max_payload_bytes + MESSAGE_SLACK_BYTES
    options = [
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", limit),
        # No grpc.max_concurrent_streams: a prefill stream that waits for one would hold up its own route stream. With 8
        # a connection, 205 of 300 requests at once got 503 after 10 s. Without it, 1500 requests went over 4
        # connections and were all served.
        # A second service must not silently share the port with the first.
        ("grpc.so_reuseport", 0),
    ]
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers(processor.handlers())
    return server
