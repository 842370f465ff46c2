"""One request's life: events of its two streams in, effects out. The state machine, and its only home.

No I/O. Rules:
- Prefill is released when the prefill leg ends, decode when the route leg ends; both exactly once.
- A leg that fails ends the other one: a failed prefill answers the client, an aborted client ends prefill.
- A prefill stream whose room is not open is refused: its main leg is gone, or it never was.
- A worker is judged by its own leg only: what fails there counts in its circuit, never in its partner's. A 500 can be
  the echo of a partner that broke, so it is judged a moment later.
- Every failure before the response is marked for Envoy to retry with another pair; it comes back as a new exchange.

Route leg:    NEW ─headers─> BODY ─body─> DISPATCHED ──response──> RESPONDING ─end─> UNSURE ─verdict─> OVER
               │                              ├─5xx─> HOLDING ─time─┤│
               │                              └─early─> WAITING ────┘│   (prefill answered)
               └──────────> DIRECT ────────────────response──────────┘   (any state: refused → CLOSING ─end─> OVER)
Prefill leg:  EXPECTED ─headers─> SENT ─response─> ANSWERED | COUNTED | REJECTED ─end─> OVER
              (any state but EXPECTED and OVER: ended by us → CLOSING ─end─> OVER)
"""

import enum
import json
from typing import Final

from extproc.errors import BadRequest, EngineFailed, NoWorker, Overloaded, PrefillTimeout, RequestError
from extproc.estimate import Prompt
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
    LegEnd,
    Linger,
    Outcome,
    Phase,
    RequestBody,
    RequestHeaders,
    ResponseBody,
    ResponseHeaders,
    Send,
    Trailers,
    Wake,
    Woken,
)
from extproc.gateway import Gateway
from extproc.load import Lease
from extproc.model import Placement
from extproc.mutation import (
    DECODE_ENDPOINT,
    MODE,
    RETRY,
    Headers,
    Mutation,
    explaining_headers,
    mutate,
    mutate_headers,
    reserved,
    response_headers,
)
from extproc.number import number
from extproc.parse import check_length, parse, split_path, unread
from extproc.request import ENDPOINTS, ROUTING_KEY, Endpoint, GenerationRequest
from extproc.schedule import Scheduled
from extproc.trace_context import Trace
from extproc.usage import counted_tokens, is_readable

RETRY_AFTER_S: Final = 1
"""`retry-after` of a 503, in whole seconds, the header's smallest step: workers are polled at such a pace."""

VERDICT_S: Final = 0.25
"""How long after its end an attempt may still be found to have ended badly. Envoy's access log comes within about 10 ms
(docs/decisions.md); prefill's own answer is under way, too, and on a busy machine late."""

ECHO_S: Final = 1.0
"""A 500 this soon after a failure of the partner is taken for that one's echo. All requests of a pair that breaks fail
within milliseconds; a worker that is bad by itself fails in later seconds, too."""

EXTENSION_S: Final = 5.0
"""On top of the prefill time-out, whose own answer comes first."""

HOLD_S: Final = 0.02
"""How long a decode engine's 5xx waits for prefill's word, so that the client gets a 4xx rather than its echo. When one
leg of a pair breaks, the other engine answers 500 within about a millisecond (measured on simulated engines), and on a
busy machine Envoy's two streams are several apart: with 5 ms a 4xx was retried in 1 of 16 cases."""

REASON_S: Final = 1.0
"""How long it then waits for the body of prefill's 4xx, which an engine sends together with its headers."""

READ_HEADERS: Final = (
    ":method",
    ":path",
    ":status",
    "content-encoding",
    "content-length",
    "traceparent",
    "tracestate",
    "x-envoy-attempt-count",
    "x-request-id",
    ROUTING_KEY,
)
"""What is looked at in requests and responses, besides what clients may not set. Envoy is told to send nothing else: no
credentials, and half the headers to decode."""

JSON_CONTENT: Final[Headers] = (("content-type", "application/json"),)


class RouteState(enum.Enum):
    """Where the route leg is."""

    NEW = enum.auto()
    BODY = enum.auto()
    DISPATCHED = enum.auto()
    HOLDING = enum.auto()
    """Decode answered 5xx; prefill has a moment to say that it was the one that failed."""
    WAITING = enum.auto()
    """Decode sent headers before prefill is done (`/generate` streams): if prefill fails, a retry is possible."""
    DIRECT = enum.auto()
    RESPONDING = enum.auto()
    CLOSING = enum.auto()
    """An immediate response was sent; only the end is still to come."""
    UNSURE = enum.auto()
    """The stream is over; whether it ended well, the access log may still say."""
    OVER = enum.auto()


class PrefillState(enum.Enum):
    """Where the prefill leg is."""

    EXPECTED = enum.auto()
    SENT = enum.auto()
    ANSWERED = enum.auto()
    COUNTED = enum.auto()
    """It answered; the body is awaited, as it says how many tokens the prompt has."""
    REJECTED = enum.auto()
    """It answered 4xx; the body with the reason is awaited."""
    CLOSING = enum.auto()
    """We ended it; only the end is still to come."""
    OVER = enum.auto()


# Tuples: members are found by identity, while an Enum's hash is a call of Python.
UNANSWERED: Final = (RouteState.DISPATCHED, RouteState.HOLDING, RouteState.WAITING)
"""The client has got nothing yet, so another attempt is possible."""

BEGUN: Final = (RouteState.WAITING, RouteState.RESPONDING, RouteState.UNSURE)
"""Decode has sent headers, so that only the access log knows who breaks off."""
ANSWERED_WELL: Final = (RouteState.RESPONDING, RouteState.CLOSING, RouteState.WAITING)
"""The client has got something, or is about to."""
DUE: Final = (PrefillState.EXPECTED, PrefillState.SENT, PrefillState.REJECTED)
"""Prefill may still say what the client is to get."""
ASKED: Final = (PrefillState.EXPECTED, PrefillState.SENT)
"""It has not answered."""
ENDING: Final = (PrefillState.CLOSING, PrefillState.OVER)

# What is sent with most requests, made once.
TAKE_BODY: Final = Send(Leg.ROUTE, Answer(Phase.REQUEST_HEADERS))
LET_THROUGH: Final = Send(Leg.ROUTE, Answer(Phase.RESPONSE_HEADERS))
PREFILL_GOES_ON: Final = Send(Leg.PREFILL, Answer(Phase.RESPONSE_HEADERS))
LINGER: Final = Linger(VERDICT_S)


class ProtocolViolation(Exception):
    """Envoy sent something that its configuration rules out; says what to look at."""


class Exchange:
    """One attempt of one request. Made when its route stream opens."""

    # What each begins with; an instance holds what has become of it.
    _endpoint: Endpoint | None = None
    _request_id = ""
    _attempt = 1
    _strip: tuple[str, ...] = ()
    _trace: Trace | None = None
    _routing_key = ""
    _scheduled: Scheduled | None = None
    _mutation: Mutation | None = None
    _direct_worker: str | None = None
    _batch_size = 0
    _prompt_tokens = 0.0
    _model: str | None = None
    _measured: Prompt | None = None
    """What to learn from prefill's count of the prompt; None: it is not asked."""
    _counted_tokens: int | None = None
    _held: ResponseHeaders | None = None
    _reason_is_due = False
    _prefill_failed: bool | None = None
    _decode_failed: bool | None = None
    """Whether the worker failed; None: not known (yet), or neither (rejected, ended by us)."""
    _reason = ""
    _status = 0
    _status_of_prefill = 0
    _status_of_decode = 0
    _ended_s: float | None = None
    _dispatched_s: float | None = None
    _decision_s: float | None = None
    _response_headers_s: float | None = None
    _prefill_s: float | None = None

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._started_s = gateway.clock()
        # Not above: compiled classes take constants only.
        self.route_state: RouteState = RouteState.NEW
        self.prefill_state: PrefillState = PrefillState.EXPECTED
        self._prefill_end: LegEnd = LegEnd.UNSENT
        self._decode_end: LegEnd = LegEnd.UNSENT
        self._outcome: Outcome = Outcome.OK

    def __repr__(self) -> str:
        """For logs of bugs and for failing tests; holds nothing of the request's content."""
        room = self._scheduled.placement.room if self._scheduled else None
        return f"<Exchange room={room} route={self.route_state.name} prefill={self.prefill_state.name}>"

    @property
    def awaits_prefill(self) -> bool:
        """Its prefill stream is still to come."""
        return self.prefill_state is PrefillState.EXPECTED

    # The route leg

    def route(self, event: Event) -> list[Effect]:
        """Take one event of the route stream."""
        state = self.route_state
        try:
            # In the order of a request that goes well. No `match` on both: compiled, each of its cases is a call.
            if type(event) is RequestHeaders and state is RouteState.NEW:
                return self._request(event)
            if type(event) is RequestBody and state is RouteState.BODY:
                return self._place(event.body)
            if type(event) is ResponseHeaders and (state is RouteState.DISPATCHED or state is RouteState.DIRECT):
                return self._respond(event)
            if type(event) is Ended:
                return self._route_ended()
            if type(event) is Woken:
                if state is RouteState.UNSURE:
                    return self._settle()
                return self._respond_held() if state is RouteState.HOLDING else self._prefill_overdue()
            if type(event) is Broken:
                return self._broken(event)
            if state is RouteState.CLOSING:  # crossed with our immediate response
                return []
            if type(event) is Trailers:
                return [Send(Leg.ROUTE, Answer(event.phase))]
            if type(event) is ResponseHeaders and state is RouteState.BODY:
                # Envoy's own answer, e.g. 413 when the body outgrew its buffer: it never got to us.
                return self._respond(event)
        except RequestError as error:
            return self._refuse(error)
        raise ProtocolViolation(
            f"route stream: unexpected {type(event).__name__} in state {self.route_state.name}: "
            "compare the filter's processing_mode with `extproc envoy`"
        )

    def _request(self, event: RequestHeaders) -> list[Effect]:
        headers = event.headers
        self._request_id = headers.get("x-request-id", "")
        self._attempt = number(headers.get("x-envoy-attempt-count", "")) or 1
        self._strip = reserved(headers)
        if self._gateway.begin_trace:
            self._trace = self._gateway.begin_trace(headers)
            self._strip += self._trace.remove_headers
        self._routing_key = headers.get(ROUTING_KEY, "")
        if headers.get(":method") == "POST":
            path = headers.get(":path", "")
            self._endpoint = ENDPOINTS.get(path) or ENDPOINTS.get(split_path(path))
        if self._endpoint is None:
            self._gateway.direct_paths.check(headers.get(":method", ""), headers.get(":path", ""))
            return self._pass_on(event)
        length = number(headers.get("content-length", ""))
        if length is not None:
            check_length(length, self._gateway.config.max_payload_size)
        encoding = headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise BadRequest(f"content-encoding {encoding!r} is not supported: send the JSON body uncompressed")
        if event.end_of_stream:
            raise BadRequest("the request body is empty: send a JSON object")
        if self._endpoint in self._gateway.opaque and length is not None:
            return self._place_unread(length)
        self._gateway.scheduler.check_available()  # rather than after an upload in vain
        self.route_state = RouteState.BODY
        return [TAKE_BODY]

    def _pass_on(self, event: RequestHeaders) -> list[Effect]:
        worker = self._gateway.scheduler.pick_direct().worker
        self._direct_worker = worker.name
        self.route_state = RouteState.DIRECT
        answer = Answer(
            Phase.REQUEST_HEADERS,
            set_headers=self._traced(((MODE, "direct"), (DECODE_ENDPOINT, worker.endpoint or ""))),
            remove_headers=self._strip,
            pick_route_again=True,
            skip_request_body=not event.end_of_stream,
        )
        return [Send(Leg.ROUTE, answer)]

    def _place_unread(self, length: int) -> list[Effect]:
        """Headers alone carry the placement; the body goes by."""
        gateway = self._gateway
        before_s = gateway.clock()
        assert self._endpoint is not None  # noqa: S101 - it is one of those that are not read
        placement = self._schedule(unread(self._endpoint, length, self._routing_key, gateway.estimator))
        self._mutation = mutate_headers(placement)
        return self._dispatch(Phase.REQUEST_HEADERS, before_s)

    def _place(self, body: bytes) -> list[Effect]:
        gateway = self._gateway
        before_s = gateway.clock()
        check_length(len(body), gateway.config.max_payload_size)
        assert self._endpoint is not None  # noqa: S101 - state BODY has one
        request = parse(
            self._endpoint,
            body,
            models=gateway.models,
            routing_key=self._routing_key,
            estimator=gateway.estimator,
        )
        self._mutation = mutate(request, self._schedule(request), body)
        return self._dispatch(Phase.REQUEST_BODY, before_s)

    def _schedule(self, request: GenerationRequest) -> Placement:
        """Pick and charge. Raises NoWorker or Overloaded; then nothing is charged."""
        gateway = self._gateway
        if gateway.table.catch_up is not None:
            gateway.table.catch_up()
        self._batch_size, self._prompt_tokens = request.batch_size, request.prompt_tokens
        self._scheduled = scheduled = gateway.scheduler.place(
            request, avoid=gateway.blamed(self._request_id) if self._attempt > 1 else ()
        )
        gateway.opened(scheduled.placement.room, self)
        if request.measured and gateway.estimator.ask(request.endpoint, request.model):
            self._model, self._measured = request.model, request.measured
        return scheduled.placement

    def _dispatch(self, phase: Phase, before_s: float) -> list[Effect]:
        assert self._mutation is not None  # noqa: S101 - just made
        self._dispatched_s = self._gateway.clock()
        self._decision_s = self._dispatched_s - before_s
        self.route_state = RouteState.DISPATCHED
        self._decode_end = LegEnd.CANCELLED  # unless it gets to answer
        headers, strip = self._traced(self._mutation.headers + self._gateway.marks), self._strip
        if strip:  # seldom: the public listener has done so
            ours = {name for name, _ in headers}
            strip = tuple(name for name in strip if name not in ours)
        answer = Answer(
            phase,
            set_headers=headers,
            remove_headers=strip,
            body=self._mutation.decode_body,
            pick_route_again=True,
            skip_request_body=phase is Phase.REQUEST_HEADERS,
        )
        return [Send(Leg.ROUTE, answer), Wake(Leg.ROUTE, self._gateway.config.prefill_timeout_secs)]

    def _traced(self, headers: Headers) -> Headers:
        """With what makes this attempt's span the parent of an engine's; the mirror gets it, too."""
        return headers + self._trace.set_headers if self._trace else headers

    def _respond(self, event: ResponseHeaders) -> list[Effect]:
        """The decode worker (or Envoy in its place) answers."""
        if self._scheduled and self.prefill_state in DUE:
            self._held, status = event, event.status
            if status >= 500 and status not in {502, 503}:  # those are Envoy's: it could not reach decode
                self.route_state = RouteState.HOLDING
                return [Wake(Leg.ROUTE, HOLD_S)]
            if status < 400 and self._endpoint is Endpoint.GENERATE:
                # OpenAI's endpoints send headers with the first token: by then prefill is done.
                self.route_state = RouteState.WAITING
                return [Send(Leg.ROUTE, Extend(self._gateway.config.prefill_timeout_secs + EXTENSION_S))]
        return self._let_through(event)

    def _respond_held(self) -> list[Effect]:
        if self.prefill_state is PrefillState.REJECTED and not self._reason_is_due:  # its reason is under way
            self._reason_is_due = True
            return [Wake(Leg.ROUTE, REASON_S)]
        assert self._held is not None  # noqa: S101 - states HOLDING and WAITING have one
        return self._let_through(self._held)

    def _let_through(self, event: ResponseHeaders) -> list[Effect]:
        self.route_state = RouteState.RESPONDING
        self._status = self._status_of_decode = status = event.status
        self._response_headers_s = self._gateway.clock() - self._started_s
        headers: Headers = ()
        if self._scheduled:
            if self._gateway.config.response_headers:
                headers = response_headers(self._scheduled.placement)
            if self._scheduled.explanation:
                headers += explaining_headers(self._scheduled.explanation)
        if status >= 500:
            self._fail(Outcome.DECODE_FAILED, f"decode worker answered {status}")
            if self._scheduled:
                self._decode_failed, self._decode_end = True, LegEnd.FAILED
                self._blame_pair(self._scheduled)
                headers = (*headers, (RETRY, "decode"))
        elif status >= 400:
            self._fail(Outcome.ENGINE_REJECTED, f"answered {status}")
            self._decode_end = LegEnd.REJECTED
        else:
            self._decode_failed, self._decode_end = False, LegEnd.OK
        remove = reserved(event.headers)
        changed = headers or remove
        go_on = Send(Leg.ROUTE, Answer(Phase.RESPONSE_HEADERS, headers, remove)) if changed else LET_THROUGH
        return [go_on, *self._end_prefill("decode_failed")] if status >= 400 else [go_on]

    def _blame_pair(self, scheduled: Scheduled) -> None:
        """Let the request's next attempt take another pair: which of the two broke it first is not always known."""
        for pick in (scheduled.placement.prefill, scheduled.placement.decode):
            self._gateway.blame(self._request_id, pick.worker.name)

    def _route_ended(self) -> list[Effect]:
        before, self.route_state = self.route_state, RouteState.OVER
        self._ended_s = self._gateway.clock()
        if before not in ANSWERED_WELL:
            self._fail(Outcome.ABORTED, "the client left before the response")
        if self._scheduled is None:
            return [self._finish()]
        if before in UNANSWERED:  # the client left, or decode broke off: another attempt comes at once, if any
            self._gateway.blame(self._request_id, self._scheduled.placement.decode.worker.name)
        began_well = before is RouteState.RESPONDING and self._outcome is Outcome.OK
        unsure = began_well or (before is RouteState.WAITING and self._outcome is Outcome.OK) or self._may_be_echo
        self._gateway.table.release(self._scheduled.decode, self._decode_failed, judge=not unsure)
        # After a normal end prefill has handed over the KV cache and only its answer is due; else it is of no use.
        effects = [] if began_well else self._end_prefill("gone")
        if unsure:
            self.route_state = RouteState.UNSURE
            return [*effects, LINGER]
        return [*effects, *self._conclude()]

    def _broken(self, event: Broken) -> list[Effect]:
        """Envoy tells why the route stream ended, or is about to."""
        if self._outcome is not Outcome.OK or self.route_state not in BEGUN:
            return []
        if event.by_client:
            when = "before" if self._response_headers_s is None else "during"
            self._fail(Outcome.ABORTED, f"the client left {when} the response ({event.flags})")
            self._decode_failed, self._decode_end = None, LegEnd.CANCELLED
        else:
            self._fail(Outcome.DECODE_FAILED, f"decode worker broke off the response ({event.flags})")
            self._decode_failed, self._decode_end = True, LegEnd.FAILED
        return self._settle() if self.route_state is RouteState.UNSURE else []

    def _settle(self) -> list[Effect]:
        """What is known of the end by now is all that will be."""
        assert self._scheduled is not None  # noqa: S101 - state UNSURE has one
        self.route_state = RouteState.OVER
        if self._response_headers_s is None:
            self._fail(Outcome.ABORTED, "the client left before the response")
        return [*self._end_prefill("gone"), *self._conclude()]

    def _conclude(self) -> list[Effect]:
        both = self.route_state is RouteState.OVER and self.prefill_state is PrefillState.OVER
        return [self._finish()] if both else []

    @property
    def _may_be_echo(self) -> bool:
        """Whether a leg ended with what an engine answers when its partner breaks."""
        return self._status_of_prefill == 500 or self._status_of_decode == 500

    def _judge_late(self, lease: Lease, failed: bool | None, partner: Lease) -> None:
        """Let a worker's circuit count a failure, unless its partner has failed just now."""
        echo = failed and self._may_be_echo and partner.state.circuit.last_failure_s > self._gateway.clock() - ECHO_S
        self._gateway.table.judge(lease, None if echo else failed)

    def _refuse(self, error: RequestError) -> list[Effect]:
        """Answer the client with an error; the one place where typed errors become responses."""
        # The message goes to the client only: it can hold what the client sent.
        reason = f"{type(error).__name__}({error.param or ''})"
        outcome = {NoWorker: Outcome.NO_WORKER, Overloaded: Outcome.OVERLOADED}.get(type(error), Outcome.REFUSED)
        self._fail(outcome, reason)
        return [self._close_route(error)]

    def _close_route(self, error: RequestError, *extra: tuple[str, str]) -> Send:
        headers = JSON_CONTENT + extra
        if error.status in {429, 503}:
            headers = (*headers, ("retry-after", str(RETRY_AFTER_S)))
        self._status = error.status
        self.route_state = RouteState.CLOSING
        return Send(Leg.ROUTE, Immediate(error.status, headers, error_body(error), type(error).__name__))

    # The prefill leg

    def prefill(self, event: Event) -> list[Effect]:
        """Take one event of the prefill stream."""
        state = self.prefill_state  # in the order of a request that goes well
        if type(event) is RequestHeaders and state is PrefillState.EXPECTED:
            return self._send_prefill()
        if type(event) is ResponseHeaders and state is PrefillState.SENT:
            return self._prefill_answered(event)
        if type(event) is Ended:
            return self._prefill_ended()
        if state is PrefillState.CLOSING:  # crossed with our immediate response
            return []
        if type(event) is Trailers:
            return [Send(Leg.PREFILL, Answer(event.phase))]
        if type(event) is ResponseBody:
            if state is PrefillState.COUNTED:
                return self._prefill_counted(event.body)
            if state is PrefillState.REJECTED:
                self.prefill_state = PrefillState.ANSWERED
                return [Send(Leg.PREFILL, Answer(Phase.RESPONSE_BODY)), *self._pass_on_rejection(event.body)]
        raise ProtocolViolation(
            f"prefill stream: unexpected {type(event).__name__} in state {self.prefill_state.name}: "
            "compare the filter's processing_mode with `extproc envoy`"
        )

    def _send_prefill(self) -> list[Effect]:
        assert self._mutation is not None  # noqa: S101 - only placed exchanges are found by a prefill stream
        self.prefill_state = PrefillState.SENT
        mutation = self._mutation
        self._mutation = None  # both bodies are on their way; a long stream need not keep them in memory
        # Its own mark: a mirrored request that was not answered here must not reach the engine, with decode's body.
        headers: Headers = ((MODE, "prefill"), *mutation.prefill_headers)
        return [Send(Leg.PREFILL, Answer(Phase.REQUEST_HEADERS, set_headers=headers, body=mutation.prefill_body))]

    def _prefill_answered(self, event: ResponseHeaders) -> list[Effect]:
        status = event.status
        self.prefill_state = PrefillState.ANSWERED
        self._status_of_prefill = status
        self._prefill_failed = status >= 500 if not 400 <= status < 500 else None
        self._prefill_end = LegEnd.FAILED if status >= 500 else LegEnd.OK
        if 400 <= status < 500:
            self.prefill_state, self._prefill_end = PrefillState.REJECTED, LegEnd.REJECTED
        elif status == 200 and self._measured and is_readable(event.headers):
            self.prefill_state = PrefillState.COUNTED
        wanted = self.prefill_state is not PrefillState.ANSWERED
        go_on = PREFILL_GOES_ON
        if wanted:
            go_on = Send(Leg.PREFILL, Answer(Phase.RESPONSE_HEADERS, want_response_body=True))
        if status >= 500:
            return [go_on, *self._fail_prefill(f"answered {status}")]
        if self.route_state is RouteState.WAITING and status < 400:
            return [go_on, *self._respond_held()]
        return [go_on]

    def _prefill_counted(self, body: bytes) -> list[Effect]:
        """All of prefill's answer is here: the work is done, and the next prompts are estimated better."""
        assert self._scheduled is not None  # noqa: S101
        assert self._measured is not None  # noqa: S101
        self.prefill_state = PrefillState.ANSWERED
        self._gateway.table.release(self._scheduled.prefill, failed=False)  # not later than without the question
        self._counted_tokens = counted_tokens(body, self._batch_size)
        if self._counted_tokens and self._endpoint:
            self._gateway.estimator.learn(self._endpoint, self._model, self._measured, self._counted_tokens)
        return [Send(Leg.PREFILL, Answer(Phase.RESPONSE_BODY))]

    def _pass_on_rejection(self, body: bytes) -> list[Effect]:
        """Prefill answered 4xx: the client gets the engine's own status and words, and no retry."""
        if self.route_state not in UNANSWERED:
            return []
        self._fail(Outcome.ENGINE_REJECTED, f"prefill worker answered {self._status_of_prefill}")
        self._status = self._status_of_prefill
        self.route_state = RouteState.CLOSING
        return [Send(Leg.ROUTE, Immediate(self._status, JSON_CONTENT, body, "prefill_rejected"))]

    def _fail_prefill(self, what: str) -> list[Effect]:
        assert self._scheduled is not None  # noqa: S101
        if self.route_state not in UNANSWERED:  # decode has the KV cache and needs prefill no more
            return []
        self._fail(Outcome.PREFILL_FAILED, f"prefill worker {what}")
        self._blame_pair(self._scheduled)
        # Without workers' names: they are internal addresses.
        return [self._close_route(EngineFailed(f"the prefill worker failed: it {what}"), (RETRY, "prefill"))]

    def _prefill_overdue(self) -> list[Effect]:
        """The prefill leg has not ended in time. Not retried: the next worker would be as long, or the client gone."""
        waiting = self.route_state in UNANSWERED or self.route_state is RouteState.RESPONDING
        if not waiting or self.prefill_state in ENDING:
            return []
        self._fail(Outcome.PREFILL_FAILED, "prefill did not end in time")
        limit_s = self._gateway.config.prefill_timeout_secs
        error = PrefillTimeout(f"the prompt was not processed within {limit_s:g} s (prefill_timeout_secs)")
        effects = [self._close_route(error), *self._end_prefill("prefill_timeout")]
        self._prefill_failed, self._prefill_end = True, LegEnd.FAILED
        return effects

    def _prefill_ended(self) -> list[Effect]:
        before, self.prefill_state = self.prefill_state, PrefillState.OVER
        if self._dispatched_s is not None:
            self._prefill_s = self._gateway.clock() - self._dispatched_s
        assert self._scheduled is not None  # noqa: S101
        # Before its first message: of a refused connection, with grpcio, only the call itself is seen.
        unanswered = before in ASKED
        if unanswered:
            self._prefill_failed, self._prefill_end = True, LegEnd.FAILED
        self._gateway.table.release(self._scheduled.prefill, self._prefill_failed, judge=not self._may_be_echo)
        effects: list[Effect] = []
        if unanswered:
            effects = self._fail_prefill("closed the connection without an answer")
        elif before is PrefillState.REJECTED:
            effects = self._pass_on_rejection(b"")
        return [*effects, *self._conclude()]

    def _end_prefill(self, details: str) -> list[Effect]:
        """End a prefill leg that is still running, as its other half is gone. 499: client closed request (nginx)."""
        if self.prefill_state is PrefillState.EXPECTED:
            self.prefill_state = PrefillState.OVER  # its stream may still come; then it is refused
        if self.prefill_state in ENDING:
            return []
        if self.prefill_state is PrefillState.SENT:
            self._prefill_end = LegEnd.CANCELLED
        self.prefill_state = PrefillState.CLOSING
        return [Send(Leg.PREFILL, Immediate(499, (), b"", details))]

    # The end

    def _fail(self, outcome: Outcome, reason: str) -> None:
        """Note why; the first reason stands, as others follow from it."""
        if self._outcome is Outcome.OK:
            self._outcome, self._reason = outcome, reason

    def _finish(self) -> Finished:
        if scheduled := self._scheduled:
            self._gateway.table.release(scheduled.prefill, self._prefill_failed, judge=False)
            self._judge_late(scheduled.prefill, self._prefill_failed, scheduled.decode)
            self._judge_late(scheduled.decode, self._decode_failed, scheduled.prefill)
            self._gateway.closed(scheduled.placement.room)
        return self.record()

    def record(self) -> Finished:
        """The attempt as far as it is known."""
        return Finished(
            outcome=self._outcome,
            status=self._status,
            reason=self._reason,
            endpoint=self._endpoint or "other",
            request_id=self._request_id,
            attempt=self._attempt,
            placement=self._scheduled.placement if self._scheduled else None,
            direct_worker=self._direct_worker,
            batch_size=self._batch_size,
            prompt_tokens=self._prompt_tokens,
            duration_s=(self._ended_s or self._gateway.clock()) - self._started_s,
            decision_s=self._decision_s,
            response_headers_s=self._response_headers_s,
            prefill_s=self._prefill_s,
            prefill_end=self._prefill_end if self._scheduled else None,
            decode_end=self._decode_end if self._scheduled else None,
            counted_tokens=self._counted_tokens,
            explanation=self._scheduled.explanation if self._scheduled else None,
            started_s=self._started_s,
            dispatched_s=self._dispatched_s - self._started_s if self._dispatched_s is not None else None,
            trace=self._trace,
        )


def refuse_prefill() -> Send:
    """What a prefill stream gets whose room is not open."""
    return Send(Leg.PREFILL, Immediate(410, (), b"", "unknown_room"))


def error_body(error: RequestError) -> bytes:
    """An error in OpenAI's form."""
    content = {"message": error.message, "type": error.kind, "param": error.param, "code": error.status}
    return json.dumps({"error": content}).encode()
