"""Envoy's streams in, events to exchanges, effects back out: what every transport calls.

Decides nothing and knows no transport: bytes of messages come in by calls, and go out through each call's `Outlet`. Of
asyncio it uses the loop's timers and futures only.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

from extproc import wire
from extproc.events import Effect, Ended, Finished, Leg, Linger, RequestHeaders, Send, Wake, Woken
from extproc.exchange import Exchange, Gateway, refuse_prefill

LEG_METADATA = "x-pd-leg"
"""gRPC metadata by which Envoy's two filters say which leg a stream is for (`initial_metadata` of its grpc_service)."""

MESSAGE_SLACK_BYTES = 1 << 20
"""On top of the largest body, for headers and framing."""


class Outlet(Protocol):
    """Where a stream's messages go."""

    def write(self, message: bytes, /) -> object:
        """Send a message, in the order of the calls; one for a stream that has ended is dropped. Never blocks."""


class Call:
    """One ext_proc stream."""

    __slots__ = ("exchange", "leg", "outlet", "timers")

    def __init__(self, leg: Leg, outlet: Outlet, exchange: Exchange | None) -> None:
        self.leg = leg
        self.outlet = outlet
        self.exchange = exchange
        """None while a prefill stream has not said which it belongs to, and for one that belongs to none."""
        self.timers: list[asyncio.TimerHandle] = []
        """Go with the stream: else each would hold its exchange until it is due."""


class ExternalProcessor:
    """Feeds exchanges from streams; hears of broken ones by the access log."""

    def __init__(self, gateway: Gateway, finished: Callable[[Finished], None]) -> None:
        """`finished` is told of every attempt that is over."""
        self._gateway = gateway
        self._finished = finished
        self._calls: dict[Leg, dict[Exchange, Call]] = {leg: {} for leg in Leg}
        self._lingering: dict[Exchange, asyncio.TimerHandle] = {}
        self._moved: asyncio.Future[None] | None = None
        """Somebody waits in `met`."""
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def open_streams(self) -> int:
        """Streams that belong to an exchange."""
        return sum(map(len, self._calls.values()))

    async def idle(self) -> None:
        """Return when every exchange has finished."""
        await self._idle.wait()

    async def met(self) -> None:
        """Return when no placed request is without its prefill stream."""
        while self._gateway.expecting:
            self._moved = asyncio.get_running_loop().create_future()
            await self._moved

    # For the transport

    def opened(self, metadata: Iterable[tuple[str, str | bytes]], outlet: Outlet) -> Call:
        """A stream was opened, with the gRPC metadata of its call."""
        if (LEG_METADATA, Leg.PREFILL) in metadata:
            return Call(Leg.PREFILL, outlet, None)
        return self._join(Call(Leg.ROUTE, outlet, None), Exchange(self._gateway))

    def received(self, call: Call, data: bytes) -> bool:
        """A message came. False: the stream is of no use any more.

        Raises WireError and ProtocolViolation, which say what is wrong with it; then the stream has to be ended.
        """
        event = wire.decode(data)
        if call.exchange is None:  # a prefill stream belongs to the exchange whose room its first message names
            exchange = self._gateway.find(event) if isinstance(event, RequestHeaders) else None
            if exchange is None:
                call.outlet.write(wire.encode(refuse_prefill().reply))
                return False
            self._join(call, exchange)
        exchange = call.exchange
        assert exchange is not None  # noqa: S101 - joined above
        self._apply(exchange, exchange.route(event) if call.leg is Leg.ROUTE else exchange.prefill(event))
        return True

    def ended(self, call: Call) -> None:
        """The stream is over, however that came: nothing may stay charged."""
        exchange = call.exchange
        if exchange is None:
            return
        del self._calls[call.leg][exchange]
        for timer in call.timers:
            timer.cancel()
        self._apply(exchange, exchange.route(Ended()) if call.leg is Leg.ROUTE else exchange.prefill(Ended()))

    def logged(self, data: bytes) -> None:
        """A message of an Envoy's access log came: of `il_pd`, what has response flags. Raises WireError."""
        for room, broken in wire.decode_access_log(data):
            exchange = self._gateway.broken(room)
            if exchange is not None:
                self._apply(exchange, exchange.route(broken))

    # Inside

    def _join(self, call: Call, exchange: Exchange) -> Call:
        call.exchange = exchange
        self._calls[call.leg][exchange] = call
        self._idle.clear()
        return call

    def _apply(self, exchange: Exchange, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(leg, reply):
                    call = self._calls[leg].get(exchange)
                    if call is not None:
                        call.outlet.write(wire.encode(reply))
                case Wake(leg, after_s):
                    call = self._calls[leg].get(exchange)
                    if call is not None:
                        call.timers.append(asyncio.get_running_loop().call_later(after_s, self._wake, exchange, leg))
                case Linger(after_s):
                    timer = asyncio.get_running_loop().call_later(after_s, self._settle, exchange)
                    self._lingering[exchange] = timer
                case Finished():
                    if exchange in self._lingering:
                        self._lingering.pop(exchange).cancel()
                    self._finished(effect)
        if self._moved and not self._moved.done():
            self._moved.set_result(None)
        if not self._lingering and not any(self._calls.values()):
            self._idle.set()

    def _wake(self, exchange: Exchange, leg: Leg) -> None:
        if exchange in self._calls[leg]:
            self._apply(exchange, exchange.route(Woken()) if leg is Leg.ROUTE else exchange.prefill(Woken()))

    def _settle(self, exchange: Exchange) -> None:
        del self._lingering[exchange]
        self._apply(exchange, exchange.route(Woken()))
