"""Envoy's streams in, events to exchanges, effects back out: what every transport calls.

Decides nothing and knows no transport: bytes of messages come in by calls, and go out through each call's `Outlet`. Of
asyncio it uses the loop's timers and futures only.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

from extproc import wire
from extproc.delays import Delays
from extproc.events import Effect, Ended, Finished, Leg, Linger, RequestHeaders, Send, Wake, Woken
from extproc.exchange import Exchange, refuse_prefill
from extproc.gateway import Attempt, Gateway
from extproc.mutation import ROOM

MESSAGE_SLACK_BYTES: Final = 1 << 20
"""On top of the largest body, for headers and framing."""

ENDED: Final = Ended()


class Outlet(Protocol):
    """Where a stream's messages go."""

    def write(self, message: bytes, /) -> object:
        """Send a message, in the order of the calls; one for a stream that has ended is dropped. Never blocks."""


class Processor(Protocol):
    """What a transport calls; a call is the processor's own affair."""

    def opened(self, metadata: Iterable[tuple[str, str | bytes]], outlet: Outlet, /) -> Any:
        """A stream was opened, with the gRPC metadata of its call; returns the call."""

    def received(self, call: Any, data: bytes, /) -> bool:
        """A message came. False: the stream is of no use any more. Raises WireError and ProtocolViolation."""

    def ended(self, call: Any, /) -> None:
        """The stream is over. The last that is said of a call."""

    def logged(self, data: bytes, /) -> None:
        """A message of an Envoy's access log came. Raises WireError."""


class Call:
    """One ext_proc stream."""

    __slots__ = ("exchange", "leg", "outlet")

    def __init__(self, outlet: Outlet) -> None:
        self.outlet = outlet
        self.leg = Leg.ROUTE
        self.exchange: Attempt | None = None
        """None while a stream has not said what it is about, and for a prefill stream that belongs to no exchange."""


class ExternalProcessor:
    """Feeds exchanges from streams; hears of broken ones by the access log."""

    def __init__(self, gateway: Gateway, finished: Callable[[Finished], None]) -> None:
        """`finished` is told of every attempt that is over."""
        self._gateway = gateway
        self._finished = finished
        self._calls: dict[Leg, dict[Attempt, Call]] = {leg: {} for leg in Leg}
        self._lingering: dict[float, Delays[Attempt]] = {}
        self._waking: dict[float, Delays[Call]] = {}
        """Both by their length in seconds, of which there are a few."""
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
        """A stream was opened, with the gRPC metadata of its call: of a prefill leg that may name the room."""
        call = Call(outlet)
        for name, value in metadata:
            if name == ROOM:
                exchange = self._gateway.find(str(value))
                if exchange is not None:
                    self._join(call, exchange, Leg.PREFILL)
        return call

    def received(self, call: Call, data: bytes) -> bool:
        """A message came. False: the stream is of no use any more.

        Raises WireError and ProtocolViolation, which say what is wrong with it; then the stream has to be ended.
        """
        event = wire.decode(data)
        exchange = call.exchange
        if exchange is None:  # its first message
            if isinstance(event, RequestHeaders) and event.leg is Leg.PREFILL:
                exchange = self._gateway.find(event.headers.get(ROOM, ""))
                if exchange is None:
                    call.outlet.write(wire.encode(refuse_prefill().reply))
                    return False
                self._join(call, exchange, Leg.PREFILL)
            else:
                exchange = Exchange(self._gateway)
                self._join(call, exchange, Leg.ROUTE)
        self._apply(exchange, exchange.route(event) if call.leg is Leg.ROUTE else exchange.prefill(event))
        return True

    def ended(self, call: Call) -> None:
        """The stream is over, however that came: nothing may stay charged."""
        exchange = call.exchange
        if exchange is None:
            return
        del self._calls[call.leg][exchange]
        for delays in self._waking.values():
            delays.discard(call)
        self._apply(exchange, exchange.route(ENDED) if call.leg is Leg.ROUTE else exchange.prefill(ENDED))
        self._tell_idle()

    def logged(self, data: bytes) -> None:
        """A message of an Envoy's access log came: of `il_pd`, what has response flags. Raises WireError."""
        for room, broken in wire.decode_access_log(data):
            exchange = self._gateway.broken(room)
            if exchange is not None:
                self._apply(exchange, exchange.route(broken))

    # Inside

    def _join(self, call: Call, exchange: Attempt, leg: Leg) -> None:
        call.exchange, call.leg = exchange, leg
        self._calls[leg][exchange] = call
        self._idle.clear()

    def _apply(self, exchange: Attempt, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(leg, reply):
                    call = self._calls[leg].get(exchange)
                    if call is not None:
                        call.outlet.write(wire.encode(reply))
                case Wake(leg, after_s):
                    call = self._calls[leg].get(exchange)
                    if call is not None:
                        waking = self._waking.get(after_s)
                        if waking is None:
                            waking = self._waking[after_s] = Delays(after_s, self._wake)
                        waking.add(call)
                case Linger(after_s):
                    lingering = self._lingering.get(after_s)
                    if lingering is None:
                        lingering = self._lingering[after_s] = Delays(after_s, self._settle)
                    lingering.add(exchange)
                case Finished():
                    for lingering in self._lingering.values():
                        lingering.discard(exchange)
                    self._finished(effect)
                    self._tell_idle()
        if self._moved and not self._moved.done():
            self._moved.set_result(None)

    def _tell_idle(self) -> None:
        if not any(self._calls.values()) and not any(self._lingering.values()):
            self._idle.set()

    def _wake(self, call: Call) -> None:
        exchange = call.exchange
        assert exchange is not None  # noqa: S101 - whoever is woken belongs to one
        self._apply(exchange, exchange.route(Woken()) if call.leg is Leg.ROUTE else exchange.prefill(Woken()))

    def _settle(self, exchange: Attempt) -> None:
        self._apply(exchange, exchange.route(Woken()))
