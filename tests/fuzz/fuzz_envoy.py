"""Envoy and the transport as an exchange sees them: which messages may come next on a leg, and what replies must be.

Rules that are checked here, at each step:
- a reply goes to a stream that is open, never to one that has ended or never began;
- each message gets one answer, of its own kind, and may ask for more time once;
- an immediate response is the last thing on a stream.
"""

from dataclasses import dataclass, field
from typing import get_args

from extproc import wire
from extproc.events import (
    Answer,
    Broken,
    Effect,
    Ended,
    Event,
    Extend,
    Finished,
    Immediate,
    Leg,
    Linger,
    Phase,
    Reply,
    RequestBody,
    RequestHeaders,
    ResponseBody,
    ResponseHeaders,
    Send,
    Trailers,
    Wake,
    Woken,
)
from extproc.exchange import Exchange, ProtocolViolation
from extproc.gateway import Gateway
from extproc.mutation import ROOM

MESSAGES = {
    RequestHeaders: Phase.REQUEST_HEADERS,
    RequestBody: Phase.REQUEST_BODY,
    ResponseHeaders: Phase.RESPONSE_HEADERS,
    ResponseBody: Phase.RESPONSE_BODY,
}
"""Events that Envoy waits to have answered, and `Trailers`, which name their phase themselves."""
SIGNALS = (Ended, Woken, Broken)
"""Events that want no answer."""

CROSSED = 1
"""Messages that may be under way when an immediate response is sent."""


def check_vocabulary() -> None:
    """Every kind of event, reply and effect is known here: a new one has to be taught to `Stream` or `Request`."""
    assert set(get_args(Event)) == {*MESSAGES, *SIGNALS, Trailers}
    assert set(get_args(Reply)) == {Answer, Immediate, Extend}
    assert set(get_args(Effect)) == {Send, Wake, Linger, Finished}


@dataclass
class Stream:
    """One leg's gRPC stream."""

    began: bool = False
    over: bool = False
    immediate: bool = False
    """An immediate response was sent: nothing may follow."""
    crossed: int = 0
    """Messages that came after it."""
    sent: set[Phase] = field(default_factory=set)
    """What Envoy has sent on it."""
    unanswered: list[Phase] = field(default_factory=list)
    extended: bool = False
    """The message at hand has got more time."""
    has_body: bool = True
    wants_body: bool = True
    wants_response_body: bool = False
    wakes: int = 0
    """Timers that run."""

    @property
    def open(self) -> bool:
        return self.began and not self.over

    def got(self, phase: Phase) -> None:
        """Envoy sends a message."""
        self.sent.add(phase)
        if self.immediate:
            self.crossed += 1
            return
        self.unanswered.append(phase)
        self.extended = False

    def reply(self, reply: Reply) -> None:
        """The service replies."""
        assert self.open, f"a reply on a stream that is not open: {reply}"
        assert not self.immediate, f"after an immediate response: {reply}"
        assert wire.encode(reply)
        match reply:
            case Immediate():
                assert 400 <= reply.status < 600
                self.immediate = True
                self.unanswered.clear()
            case Extend():
                assert self.unanswered, "more time for nothing"
                assert not self.extended, "more time twice for one message"
                assert reply.seconds > 0
                self.extended = True
            case Answer():
                assert reply.phase in self.unanswered, f"an answer to no message: {reply}"
                self.unanswered.remove(reply.phase)
                if reply.phase is Phase.REQUEST_HEADERS:
                    self.wants_body = reply.body is None and not reply.skip_request_body
                self.wants_response_body |= reply.want_response_body

    def next_messages(self) -> list[Phase]:
        """What an Envoy with our processing mode may send now."""
        if not self.open or self.crossed >= CROSSED or (self.unanswered and not self.immediate):
            return []
        sent = self.sent
        if Phase.REQUEST_HEADERS not in sent:
            return [Phase.REQUEST_HEADERS]
        allowed = []
        if Phase.RESPONSE_HEADERS not in sent:
            allowed.append(Phase.RESPONSE_HEADERS)
            if self.has_body and self.wants_body and Phase.REQUEST_BODY not in sent:
                allowed.append(Phase.REQUEST_BODY)
        elif Phase.RESPONSE_TRAILERS not in sent:
            allowed.append(Phase.RESPONSE_TRAILERS)
            if self.wants_response_body and Phase.RESPONSE_BODY not in sent:
                allowed.append(Phase.RESPONSE_BODY)
        return allowed


class Request:
    """One attempt: an exchange, and Envoy's streams for it."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self.exchange = Exchange(gateway)
        self.streams = {Leg.ROUTE: Stream(began=True), Leg.PREFILL: Stream()}
        self.request_headers: dict[str, str] = {}
        """As the service has set them on the route leg; the mirrored request has them, too."""
        self.finished: list[Finished] = []
        self.lingers = 0
        self.broken = False
        """The access log has had its entry."""
        self.steps: set[tuple[object, ...]] = set()
        """What happened in which states, in pairs of steps."""
        self._last: tuple[object, ...] = ()

    @property
    def room(self) -> int | None:
        """Once it was placed."""
        return int(self.request_headers[ROOM]) if ROOM in self.request_headers else None

    @property
    def over(self) -> bool:
        """Nothing more can happen to it."""
        return not self.lingers and not any(stream.open for stream in self.streams.values())

    def feed(self, leg: Leg, event: Event, *, legal: bool = True) -> None:
        """Give an event to the exchange, as the transport does. Not `legal`: out of turn, which ends the stream."""
        stream, exchange = self.streams[leg], self.exchange
        phase = event.phase if isinstance(event, Trailers) else MESSAGES.get(type(event))
        if phase is not None:
            stream.got(phase)
        if isinstance(event, Ended):
            stream.over, stream.wakes = True, 0
            stream.unanswered.clear()
        before = (exchange.route_state, exchange.prefill_state, leg, type(event))
        try:
            effects = exchange.route(event) if leg is Leg.ROUTE else exchange.prefill(event)
        except ProtocolViolation:
            assert not legal, f"{event} was in turn"
            self.feed(leg, Ended())
            return
        for effect in effects:
            self._apply(effect)
        step = (*before, *(_kind(effect) for effect in effects))
        self.steps.add((self._last, step))
        self._last = step

    def open_prefill(self) -> bool:
        """The mirrored request arrives at the prefill filter; whether the service lets it in."""
        headers = RequestHeaders(dict(self.request_headers), False)
        found = self._gateway.find(headers.headers.get("x-pd-room", ""))
        if found is not self.exchange:
            assert found is None, "another request's room"
            return False
        stream = self.streams[Leg.PREFILL]
        assert not stream.began, "let in twice"
        stream.began = True
        self.feed(Leg.PREFILL, headers)
        return True

    def tell_broken(self, event: Broken) -> None:
        """The access log's entry comes: at once if the exchange is known by its room, else for nobody."""
        self.broken = True
        found = None if self.room is None else self._gateway.broken(self.room)
        assert found in (None, self.exchange)
        if found is not None:
            self.feed(Leg.ROUTE, event)

    def _apply(self, effect: Effect) -> None:
        match effect:
            case Send(leg, reply):
                self.streams[leg].reply(reply)
                if leg is Leg.ROUTE and isinstance(reply, Answer) and reply.phase is not Phase.RESPONSE_HEADERS:
                    self.request_headers |= dict(reply.set_headers)
            case Wake(leg, after_s):
                assert after_s > 0
                if self.streams[leg].open:  # timers go with the stream
                    self.streams[leg].wakes += 1
            case Linger(after_s):
                assert after_s > 0
                assert self.streams[Leg.ROUTE].over, "a stream that is not over needs no grace"
                self.lingers += 1
            case Finished():
                self.finished.append(effect)
                assert len(self.finished) == 1, "finished twice"
                assert not any(stream.open for stream in self.streams.values()), "finished before its streams"
                assert effect.duration_s >= 0


def _kind(effect: Effect) -> object:
    match effect:
        case Send(leg, Immediate(status)):
            return leg, status
        case Send(leg, reply):
            return leg, type(reply)
        case Finished():
            return effect.outcome
        case _:
            return type(effect)
