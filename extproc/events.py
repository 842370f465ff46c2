"""What goes into an exchange and what comes out of it: the seam between the core and any transport.

An Envoy asks on two gRPC streams for one request, a leg each. Events come from them, effects go back to them.
No I/O, no protobuf: `wire` translates both ways.
"""

import enum
from collections.abc import Mapping

from extproc.explain import Explanation
from extproc.model import Placement
from extproc.mutation import Headers
from extproc.trace_context import Trace
from extproc.values import Value


class Leg(enum.StrEnum):
    """Which of an exchange's two streams. Envoy's filter on the prefill leg sends no `:method`."""

    ROUTE = "route"
    """Client → decode worker."""
    PREFILL = "prefill"
    """The mirrored request → prefill worker."""


class Phase(enum.StrEnum):
    """What an Answer answers: Envoy wants exactly one for each message, of the same kind. Named as Envoy names them."""

    REQUEST_HEADERS = "request_headers"
    REQUEST_BODY = "request_body"
    REQUEST_TRAILERS = "request_trailers"
    RESPONSE_HEADERS = "response_headers"
    RESPONSE_BODY = "response_body"
    RESPONSE_TRAILERS = "response_trailers"


# Events


class RequestHeaders(Value, frozen=True):
    """First event of a stream. Names are lower case; of a repeated one, the first value."""

    headers: Mapping[str, str]
    end_of_stream: bool
    """There is no body."""

    @property
    def leg(self) -> Leg:
        """Whose it is, by what each of Envoy's filters is told to send (`READ_HEADERS`, `PREFILL_READ_HEADERS`)."""
        return Leg.ROUTE if ":method" in self.headers else Leg.PREFILL


class RequestBody(Value, frozen=True):
    """The whole body."""

    body: bytes


class ResponseHeaders(Value, frozen=True):
    """The worker's, or Envoy's own when it could not reach the worker."""

    headers: Mapping[str, str]

    @property
    def status(self) -> int:
        """HTTP status; 0 where there is none."""
        return int(self.headers.get(":status", "0"))


class ResponseBody(Value, frozen=True):
    """The body of a response, or its first 1 MiB; only where it was asked for."""

    body: bytes


class Trailers(Value, frozen=True):
    """Trailers of the request or response; of no interest, but Envoy waits for an answer."""

    phase: Phase


class Ended(Value, frozen=True):
    """Last event of a stream: its HTTP request is over, one way or another.

    Envoy 1.40 resets the gRPC stream in every case (docs/decisions.md), so it does not tell which.
    """


class Woken(Value, frozen=True):
    """The time of a Wake is over."""


class Broken(Value, frozen=True):
    """Envoy's access log on the route leg: the request did not end well. Comes around the stream's end, or never."""

    by_client: bool
    """The client left, rather than the decode worker."""
    flags: str
    """Envoy's response flags, in its own short form (`UC`, `DC`)."""


Event = RequestHeaders | RequestBody | ResponseHeaders | ResponseBody | Trailers | Ended | Woken | Broken


# Effects


class Answer(Value, frozen=True):
    """Let the request or response go on, changed."""

    phase: Phase
    set_headers: Headers = ()
    remove_headers: tuple[str, ...] = ()
    body: bytes | None = None
    """Replaces the body; in answer to headers, the body is then never read. `content-length` is set with it."""
    pick_route_again: bool = False
    """Let Envoy choose the route by the new headers."""
    skip_request_body: bool = False
    want_response_body: bool = False
    """In answer to response headers: send the body, too, when all of it is there."""


class Immediate(Value, frozen=True):
    """End the HTTP request now, with this response; after response headers were sent, by truncation."""

    status: int
    headers: Headers
    body: bytes
    details: str
    """Shows as response code details in Envoy's access log; one word."""


class Extend(Value, frozen=True):
    """Ask for more time to answer the message at hand; Envoy grants it once for each message."""

    seconds: float


Reply = Answer | Immediate | Extend


class Send(Value, frozen=True):
    """Send a reply on one of the exchange's streams."""

    leg: Leg
    reply: Reply


class Wake(Value, frozen=True):
    """Give the leg a Woken after some time, if the exchange is not finished by then."""

    leg: Leg
    after_s: float


class Linger(Value, frozen=True):
    """Give the route leg a Woken after some time, though its stream is over."""

    after_s: float


class Outcome(enum.StrEnum):
    """How an attempt ended, as far as the service can tell."""

    OK = "ok"
    REFUSED = "refused"
    """Bad input; no engine saw it."""
    NO_WORKER = "no_worker"
    OVERLOADED = "overloaded"
    """Every worker has as much as it may have."""
    PREFILL_FAILED = "prefill_failed"
    DECODE_FAILED = "decode_failed"
    ENGINE_REJECTED = "engine_rejected"
    """An engine answered 4xx."""
    ABORTED = "aborted"
    """The client left before the end of the response."""


class LegEnd(enum.StrEnum):
    """How one leg of an attempt ended."""

    OK = "ok"
    REJECTED = "rejected"
    """The engine answered 4xx."""
    FAILED = "failed"
    """The engine answered 5xx, refused the connection, broke it off, or was too slow."""
    CANCELLED = "cancelled"
    """Ended for the client's or the other leg's sake."""
    UNSENT = "unsent"
    """It had not begun when the attempt was over."""


class Finished(Value, frozen=True):
    """One attempt is over and nothing of it is charged any more. What the log line and the metrics say.

    Times in seconds, None where it did not come to that.
    """

    outcome: Outcome
    status: int
    """What the client was answered, 0 if nothing."""
    reason: str
    endpoint: str
    """The path for a generation request, else `other`."""
    request_id: str
    attempt: int
    placement: Placement | None
    direct_worker: str | None
    batch_size: int
    prompt_tokens: float
    duration_s: float
    decision_s: float | None
    response_headers_s: float | None
    """From the request's headers to the response's."""
    prefill_s: float | None
    """From dispatch to the end of the prefill leg."""
    prefill_end: LegEnd | None = None
    decode_end: LegEnd | None = None
    """None for a request without legs."""
    counted_tokens: int | None = None
    """What the prefill engine counted for `prompt_tokens`, where it was asked."""
    explanation: Explanation | None = None
    """The loads that the pick was made by, where that is switched on."""
    started_s: float = 0.0
    """When its headers came, on the service's clock."""
    dispatched_s: float | None = None
    """From the request's headers to its dispatch."""
    trace: Trace | None = None
    """Its place in a trace, where those are made."""


Effect = Send | Wake | Linger | Finished
