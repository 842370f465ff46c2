"""OpenTelemetry: one span for each attempt, exported over OTLP/HTTP (extra `[otel]`).

Shell, and with `otlp_json` the only importer of OpenTelemetry; itself imported only where `otel` is on. Settings are
OpenTelemetry's own environment variables. An attempt's ids and whether it is sampled are settled when its headers
come, as the engines are told; the span itself is made from `Finished`, so it holds nothing that the log line might not.
"""

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping

from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from extproc import otlp_json, trace_context
from extproc.config import Config
from extproc.errors import ConfigError
from extproc.events import Finished, Outcome
from extproc.model import Pick, Role
from extproc.trace_context import Trace, TraceContext

logger = logging.getLogger(__name__)

FLUSH_S = 5.0
"""The longest a stopping service waits for its last spans: half of what OTLP exporters give one export by default. By
then all requests are over, and Kubernetes has begun to count down (`terminationGracePeriodSeconds`)."""

COMPLAINT_S = 60.0
"""The exporter's complaints are logged this seldom; a collector that is away causes several for each batch."""

MAX_REQUEST_ID = 128
"""Characters; clients choose it, and a UUID has 36."""

FAILED = frozenset({Outcome.NO_WORKER, Outcome.OVERLOADED, Outcome.PREFILL_FAILED, Outcome.DECODE_FAILED})
"""Status ERROR. A request that is wrong (4xx) is its client's error, and one that is aborted nobody's: semantic
conventions for HTTP, section "Status"."""

SCOPE = InstrumentationScope("extproc")

Attributes = dict[str, str | int | float]


class Tracing:
    """Gives attempts their place in traces, and makes spans of those that are over."""

    def __init__(self, config: Config, clock: Callable[[], float], processor: SpanProcessor | None = None) -> None:
        """`clock`: that of `Finished.started_s`. `processor`: where spans go, by default to a collector.

        Raises ConfigError.
        """
        # Of the provider only what the environment says; it has no processor, and nobody else gets it.
        provider = TracerProvider(resource=_resource(config), shutdown_on_exit=False)
        self._resource, self._sampler, self._ids = provider.resource, provider.sampler, provider.id_generator
        self._clock = clock
        self._processor = processor or _exporting()

    # `trace_context.Begin`
    def begin(self, headers: Mapping[str, str]) -> Trace:
        """The place of the attempt that has these request headers."""
        parent, state = trace_context.received(headers)
        trace_id = parent.trace_id if parent else self._ids.generate_trace_id()
        context, members = Context(), None  # not None, which would be the thread's current one
        if parent:
            span_context = _span_context(parent, TraceState.from_header([state]) if state else None)
            context, members = set_span_in_context(NonRecordingSpan(span_context), context), span_context.trace_state
        verdict = self._sampler.should_sample(context, trace_id, headers.get(":method", ""), SpanKind.SERVER)
        if verdict.trace_state is not members:  # a sampler may write to it
            state = verdict.trace_state.to_header() if verdict.trace_state else ""
        own = TraceContext(trace_id, self._ids.generate_span_id(), verdict.decision is Decision.RECORD_AND_SAMPLE)
        return trace_context.placed(headers, own, parent, state)

    def finished(self, record: Finished) -> None:
        """An attempt is over: queue its span. Never blocks; when the queue is full, a span is lost."""
        trace = record.trace
        if trace is None or not trace.own.sampled:
            return
        # Both clocks are read now, so a step of the wall clock in the hours before does not matter.
        start_ns = time.time_ns() - round((self._clock() - record.started_s) * 1e9)
        members = TraceState.from_header([trace.state]) if trace.state else None
        failed = record.outcome in FAILED
        self._processor.on_end(
            ReadableSpan(
                name=_name(record, trace),
                context=_span_context(trace.own, members, remote=False),
                parent=_span_context(trace.parent, members) if trace.parent else None,
                resource=self._resource,
                attributes=attributes(record, trace),
                events=_events(record, start_ns),
                kind=SpanKind.SERVER,
                status=Status(StatusCode.ERROR, record.reason) if failed else Status(),
                start_time=start_ns,
                end_time=start_ns + round(record.duration_s * 1e9),
                instrumentation_scope=SCOPE,
            )
        )

    async def close(self) -> None:
        """Export what is queued, for at most FLUSH_S; the exporter's threads are then left to end with the process."""
        loop, flushed = asyncio.get_running_loop(), asyncio.Event()

        def flush() -> None:
            self._processor.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(flushed.set)

        threading.Thread(target=flush, name="flush spans", daemon=True).start()
        try:
            async with asyncio.timeout(FLUSH_S):
                await flushed.wait()
        except TimeoutError:
            logger.warning("the last spans were not exported within %g s", FLUSH_S)


def tracing_disabled() -> bool:
    """Whether OTEL_SDK_DISABLED overrules the setting; see OpenTelemetry's general SDK configuration."""
    return os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


def attributes(record: Finished, trace: Trace) -> Attributes:
    """What a span says of an attempt; names by the semantic conventions, else `extproc.*`."""
    said: Attributes = {
        "http.request.method": trace.method,
        "extproc.outcome": record.outcome,
        "extproc.attempt": record.attempt,
        "extproc.request_id": record.request_id[:MAX_REQUEST_ID],
    }
    if record.endpoint != "other":
        said["http.route"] = record.endpoint
    if record.status:
        said["http.response.status_code"] = record.status
    if record.outcome is not Outcome.OK:
        said["error.type"] = record.outcome
        said["extproc.reason"] = record.reason
    if placement := record.placement:
        said |= {
            **_pick("prefill", placement.prefill, record.prefill_end),
            **_pick("decode", placement.decode, record.decode_end),
            "extproc.room": placement.room,
            "extproc.batch_size": record.batch_size,
            "extproc.prompt_tokens": round(record.prompt_tokens),
        }
    elif record.direct_worker:
        said["extproc.decode.worker"] = record.direct_worker
    if record.counted_tokens:
        said["gen_ai.usage.input_tokens"] = record.counted_tokens
    if record.decision_s is not None:
        said["extproc.decision_s"] = record.decision_s
    if record.prefill_s is not None:
        said["extproc.prefill.duration_s"] = record.prefill_s
    if record.explanation:
        said["extproc.prefill.loads"] = record.explanation.prefill
        said["extproc.decode.loads"] = record.explanation.decode
    return said


def _pick(role: str, pick: Pick, end: str | None) -> Attributes:
    said: Attributes = {f"extproc.{role}.worker": pick.worker.name}
    if pick.dp_rank is not None:
        said[f"extproc.{role}.dp_rank"] = pick.dp_rank
    if end is not None:
        said[f"extproc.{role}.end"] = end
    return said


def _name(record: Finished, trace: Trace) -> str:
    """`METHOD ROUTE`, or what the semantic conventions say where there is no route or no known method."""
    method = "HTTP" if trace.method == "_OTHER" else trace.method
    return method if record.endpoint == "other" else f"{method} {record.endpoint}"


def _events(record: Finished, start_ns: int) -> list[Event]:
    """The moments in between, in the order of time."""
    moments = {"extproc.response_headers": record.response_headers_s}
    if record.dispatched_s is not None:
        moments["extproc.dispatched"] = record.dispatched_s
        if record.prefill_s is not None:
            moments["extproc.prefill_ended"] = record.dispatched_s + record.prefill_s
    at = sorted((seconds, name) for name, seconds in moments.items() if seconds is not None)
    return [Event(name, timestamp=start_ns + round(seconds * 1e9)) for seconds, name in at]


def _span_context(span: TraceContext, members: TraceState | None, *, remote: bool = True) -> SpanContext:
    flags = TraceFlags(TraceFlags.SAMPLED if span.sampled else TraceFlags.DEFAULT)
    return SpanContext(span.trace_id, span.span_id, remote, flags, members)


def _resource(config: Config) -> Resource:
    """What all spans have in common: the environment's word, and by which rules ranks are picked."""
    rules = {"extproc.load_model": config.load_model}
    for role in Role:
        rules[f"extproc.{role}.policy"] = config.worker_policy(role)
        rules[f"extproc.{role}.rank_policy"] = config.rank_policy(role)
    resource = Resource.create().merge(Resource(rules))
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # what it is without OTEL_SERVICE_NAME
        resource = resource.merge(Resource({SERVICE_NAME: "extproc"}))
    return resource


def _exporting() -> SpanProcessor:
    """To a collector, by a thread of its own, from a bounded queue (OTEL_BSP_*)."""
    try:
        processor = BatchSpanProcessor(otlp_json.JsonSpanExporter())
    except ValueError as error:
        raise ConfigError(f"otel: {error} (an OTEL_* environment variable)") from None
    otlp_json.logger.addFilter(_Seldom())
    return processor


class _Seldom(logging.Filter):
    """Lets one message through, then none for COMPLAINT_S."""

    def __init__(self) -> None:
        super().__init__()
        self._quiet_until_s = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.created < self._quiet_until_s:
            return False
        self._quiet_until_s = record.created + COMPLAINT_S
        return True
