"""Which trace a request belongs to: W3C Trace Context, level 1 (https://www.w3.org/TR/trace-context-1/).

Pure, plain data: ids are made and sampling is decided where the tracer is (`tracing`).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

TRACEPARENT: Final = "traceparent"
TRACESTATE: Final = "tracestate"

SAMPLED: Final = 0x01
"""The one flag of level 1; the others are to be sent as 0."""
LONGEST: Final = 55
"""Characters of a `traceparent` of version 00, and of what later versions begin with."""
MOST_MEMBERS: Final = 32
"""Of a `tracestate`."""

_TRACEPARENT: Final = re.compile("([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_MEMBER: Final = re.compile(
    "(?:[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"  # section 3.3.1.3.1
    r"=[ -+\--<>-~]{0,255}[!-+\--<>-~]"  # printable ASCII but , and =, no blank at the end
)


@dataclass(frozen=True, slots=True)
class TraceContext:
    """One span, as others need to know it."""

    trace_id: int
    """128 bits, not 0."""
    span_id: int
    """64 bits, not 0."""
    sampled: bool

    @property
    def traceparent(self) -> str:
        """The header that makes it the parent of what the receiver does."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{'01' if self.sampled else '00'}"


@dataclass(frozen=True, slots=True)
class Trace:
    """One attempt's place in a trace, and what tells the engines."""

    own: TraceContext
    """The attempt's own span."""
    parent: TraceContext | None
    """The client's, or Envoy's; None: the trace begins here. Attempts of one request have the same."""
    state: str
    """`tracestate` as it goes on; empty: none."""
    method: str
    """The request's, one of `METHODS`; else `_OTHER`."""
    set_headers: tuple[tuple[str, str], ...]
    remove_headers: tuple[str, ...]


Begin = Callable[[Mapping[str, str]], Trace]
"""Gives an attempt its place, by the headers of its request."""

METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})
"""What OpenTelemetry's semantic conventions allow as `http.request.method`; a client can send any word."""


def parse_traceparent(text: str) -> TraceContext | None:
    """None: not valid (section 3.2). A later version is read as far as it is like version 00."""
    match = _TRACEPARENT.match(text)
    if not match:
        return None
    version, trace_id, span_id, flags = (int(digits, 16) for digits in match.groups())
    if version == 0xFF or not trace_id or not span_id:
        return None
    if len(text) > LONGEST and (version == 0 or text[LONGEST] != "-"):
        return None
    return TraceContext(trace_id, span_id, bool(flags & SAMPLED))


def is_tracestate(text: str) -> bool:
    """Whether it has at least one member, all of them valid, and each key once (section 3.3)."""
    members = [member for part in text.split(",") if (member := part.strip(" \t"))]
    keys = {member.partition("=")[0] for member in members}
    return 0 < len(members) == len(keys) <= MOST_MEMBERS and all(map(_MEMBER.fullmatch, members))


def received(headers: Mapping[str, str]) -> tuple[TraceContext | None, str]:
    """A request's parent and `tracestate`, which means nothing without a parent. What is not valid is not there."""
    parent = parse_traceparent(headers.get(TRACEPARENT, ""))
    state = headers.get(TRACESTATE, "")
    return parent, state if parent and state and is_tracestate(state) else ""


def placed(headers: Mapping[str, str], own: TraceContext, parent: TraceContext | None, state: str) -> Trace:
    """The attempt `own` of the request that has these headers. `state`: what is to go on as `tracestate`."""
    before, method = headers.get(TRACESTATE, ""), headers.get(":method", "")
    set_headers = ((TRACEPARENT, own.traceparent),)
    return Trace(
        own=own,
        parent=parent,
        state=state,
        method=method if method in METHODS else "_OTHER",
        set_headers=(*set_headers, (TRACESTATE, state)) if state and state != before else set_headers,
        remove_headers=(TRACESTATE,) if before and not state else (),
    )
