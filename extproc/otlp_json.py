"""Exports spans over OTLP/HTTP in its JSON encoding, with the standard library alone.

Shell; imports nothing of ours. Why not OpenTelemetry's own exporter: it needs `opentelemetry-proto`, and `xds-protos`
installs an older copy of the same modules (`opentelemetry/proto/`): the one installed last is there, and with the older
one the exporter cannot be imported. Nothing of ours may import `opentelemetry.proto` or `opentelemetry.exporter`.

Sources: OTLP 1.x (https://opentelemetry.io/docs/specs/otlp/, "JSON Protobuf Encoding" and "OTLP/HTTP", both stable),
`opentelemetry/proto/trace/v1/trace.proto`, and https://opentelemetry.io/docs/specs/otel/protocol/exporter/ for the
environment variables.
"""

import base64
import gzip
import json
import logging
import math
import os
import random
import re
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from email.utils import mktime_tz, parsedate_tz
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import Link, SpanContext

logger = logging.getLogger(__name__)

PREFIX = "OTEL_EXPORTER_OTLP_"
DEFAULT_ENDPOINT = "http://localhost:4318"
DEFAULT_TIMEOUT_MS = 10_000

RETRIED = frozenset({429, 502, 503, 504})
"""OTLP, "Retryable Response Codes"; no other may be."""

BACK_OFF_S = 1.0
"""Before the first retry, without a Retry-After; doubled for each that follows. As OpenTelemetry's exporters do."""

MOST_ATTEMPTS = 6
"""At one batch; a Retry-After of 0 would else be a tight loop. The back-off alone gets to four in ten seconds."""

MOST_RESPONSE_BYTES = 65_536
"""Read of an answer, of which only a count is used. OTLP recommends a limit, and 4 MiB at most."""

HAS_IS_REMOTE, IS_REMOTE = 0x100, 0x200
"""`SpanFlags`; the lower eight bits are those of W3C."""

HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""A token of RFC 9110, section 5.6.2."""


class JsonSpanExporter(SpanExporter):
    """Posts batches to a collector: a connection for each, straight (no proxies, no redirects).

    Its log has the collector's host and port and nothing else of the settings: the rest may hold credentials.
    """

    def __init__(self) -> None:
        """As the environment says. Raises ValueError."""
        if (protocol := _setting("PROTOCOL") or "http/json") != "http/json":
            raise ValueError(f"{PREFIX}PROTOCOL={protocol}: spans go over http/json only")
        url = _endpoint()
        self._tls = _tls() if url.scheme == "https" else None
        self._host, self._port = url.hostname or "", url.port or (443 if self._tls else 80)
        self._target = (url.path or "/") + (f"?{url.query}" if url.query else "")
        self._timeout_s = _timeout_s()
        self._gzip = _compressed()
        own = {"content-type": "application/json", "user-agent": "extproc"}
        self._headers: dict[str, str | bytes] = {**_headers(), **own}
        if self._gzip:
            self._headers["content-encoding"] = "gzip"
        self._over = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Blocks, as it has a thread of its own: at most for the timeout, and for what a slow answer dribbles."""
        body = encode(spans)
        if self._gzip:
            body = gzip.compress(body)
        deadline_s = time.monotonic() + self._timeout_s
        for attempt in range(MOST_ATTEMPTS):
            # Random, so that replicas do not all come back at once.
            delay_s = BACK_OFF_S * 2**attempt * random.uniform(0.8, 1.2)
            try:
                status, retry_after_s, answer = self._post(body, max(deadline_s - time.monotonic(), 0.001))
            except (OSError, HTTPException, UnicodeError) as error:  # UnicodeError: a host no resolver takes
                problem = str(error) if isinstance(error, OSError) else type(error).__name__
            else:
                if 200 <= status < 300:
                    if rejected := _rejected(answer):
                        logger.warning("the collector %s:%d rejected %d spans", self._host, self._port, rejected)
                    return SpanExportResult.SUCCESS
                problem = f"status {status}"
                if status not in RETRIED:
                    break
                delay_s = delay_s if retry_after_s is None else retry_after_s
            if delay_s >= deadline_s - time.monotonic() or self._over.wait(delay_s):
                break
        logger.error("%d spans were not exported to %s:%d: %s", len(spans), self._host, self._port, problem)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        """No more retries."""
        self._over.set()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Nothing is kept here."""
        return True

    def _post(self, body: bytes, timeout_s: float) -> tuple[int, float | None, bytes]:
        """Status, Retry-After in seconds, and the beginning of the body. `timeout_s`: for each wait on the socket."""
        if self._tls:
            connection: HTTPConnection = HTTPSConnection(self._host, self._port, timeout=timeout_s, context=self._tls)
        else:
            connection = HTTPConnection(self._host, self._port, timeout=timeout_s)
        try:
            connection.request("POST", self._target, body, self._headers)
            response = connection.getresponse()
            retry_after = response.getheader("retry-after")
            return response.status, _seconds(retry_after), response.read(MOST_RESPONSE_BYTES)
        finally:
            connection.close()


def encode(spans: Sequence[ReadableSpan]) -> bytes:
    """An `ExportTraceServiceRequest`."""
    # By identity: a resource's hash is that of its JSON. One that is listed twice is as good.
    batches: dict[tuple[int, int], tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for span in spans:
        key = id(span.resource), id(span.instrumentation_scope)
        if key not in batches:
            encoded: list[dict[str, Any]] = []
            batches[key] = _resource_spans(span, encoded), encoded
        batches[key][1].append(_span(span))
    request = {"resourceSpans": [batch for batch, _ in batches.values()]}
    # "replace": headers may hold what is no Unicode (lone surrogates), for which a collector would refuse the batch.
    return json.dumps(request, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(errors="replace")


def _resource_spans(span: ReadableSpan, encoded: list[dict[str, Any]]) -> dict[str, Any]:
    resource, scope = span.resource, span.instrumentation_scope
    scope_spans: dict[str, Any] = {"spans": encoded}
    if scope:
        scope_spans["scope"] = {
            "name": scope.name,
            "version": scope.version or "",
            "attributes": _attributes(scope.attributes),
        }
        scope_spans["schemaUrl"] = scope.schema_url or ""
    return {
        "resource": {"attributes": _attributes(resource.attributes)},
        "scopeSpans": [scope_spans],
        "schemaUrl": resource.schema_url,
    }


def _span(span: ReadableSpan) -> dict[str, Any]:
    status: dict[str, Any] = {"code": span.status.status_code.value}
    if span.status.description:
        status["message"] = span.status.description
    encoded = {
        **_context(span.context, span.parent),
        "name": span.name,
        "kind": span.kind.value + 1,  # OTLP has SPAN_KIND_UNSPECIFIED before them
        "startTimeUnixNano": str(span.start_time or 0),
        "endTimeUnixNano": str(span.end_time or 0),
        "attributes": _attributes(span.attributes),
        "droppedAttributesCount": span.dropped_attributes,
        "events": [_event(event) for event in span.events],
        "droppedEventsCount": span.dropped_events,
        "links": [_link(link) for link in span.links],
        "droppedLinksCount": span.dropped_links,
        "status": status,
    }
    if span.parent:
        encoded["parentSpanId"] = f"{span.parent.span_id:016x}"
    return encoded


def _context(context: SpanContext, whose_origin: SpanContext | None) -> dict[str, Any]:
    """`whose_origin`: the flags tell whether it came from elsewhere; a span's parent, a link's own context."""
    remote = IS_REMOTE if whose_origin and whose_origin.is_remote else 0
    encoded: dict[str, Any] = {
        "traceId": f"{context.trace_id:032x}",
        "spanId": f"{context.span_id:016x}",
        "flags": int(context.trace_flags) | HAS_IS_REMOTE | remote,
    }
    if context.trace_state:
        encoded["traceState"] = context.trace_state.to_header()
    return encoded


def _event(event: Event) -> dict[str, Any]:
    return {
        "timeUnixNano": str(event.timestamp),
        "name": event.name,
        "attributes": _attributes(event.attributes),
        "droppedAttributesCount": event.dropped_attributes,
    }


def _link(link: Link) -> dict[str, Any]:
    return {
        **_context(link.context, link.context),
        "attributes": _attributes(link.attributes),
        "droppedAttributesCount": link.dropped_attributes,
    }


def _attributes(attributes: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in (attributes or {}).items()]


def _value(value: Any) -> dict[str, Any]:
    """An `AnyValue`; None is one without a value. Raises TypeError."""
    match value:
        case str():
            return {"stringValue": value}
        case bool():  # before int, of which it is one
            return {"boolValue": value}
        case int():
            return {"intValue": str(int(value))}
        case float():
            return {"doubleValue": value if math.isfinite(value) else _not_finite(value)}
        case bytes():
            return {"bytesValue": base64.b64encode(value).decode()}
        case None:
            return {}
        case Mapping():
            return {"kvlistValue": {"values": _attributes(value)}}
        case Sequence():
            return {"arrayValue": {"values": [_value(each) for each in value]}}
    raise TypeError(f"no attribute's value: {type(value).__name__}")


def _not_finite(value: float) -> str:
    """As ProtoJSON writes it."""
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _setting(name: str) -> str:
    """The variable for traces, else that for all signals; an empty one counts as none."""
    return (os.environ.get(f"{PREFIX}TRACES_{name}") or os.environ.get(PREFIX + name) or "").strip()


def _endpoint() -> SplitResult:
    """Where batches go: that for traces as it is, that for all signals with `/v1/traces`. Raises ValueError."""
    text = os.environ.get(f"{PREFIX}TRACES_ENDPOINT", "").strip()
    if not text:
        text = (os.environ.get(f"{PREFIX}ENDPOINT", "").strip() or DEFAULT_ENDPOINT).rstrip("/") + "/v1/traces"
    try:
        url = urlsplit(text)
        valid = url.scheme in {"http", "https"} and url.hostname and url.port != 0 and re.fullmatch(r"[!-~]+", text)
    except ValueError:  # a port that is no number, or half an IPv6 address
        valid = False
    if not valid:
        raise ValueError(f"{PREFIX}ENDPOINT: expected http://HOST:PORT or https://HOST:PORT")
    if "@" in url.netloc:
        raise ValueError(f"{PREFIX}ENDPOINT: credentials go into {PREFIX}HEADERS (authorization=...)")
    return url


def _timeout_s() -> float:
    """Raises ValueError."""
    text = _setting("TIMEOUT") or str(DEFAULT_TIMEOUT_MS)
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) == 0:
        raise ValueError(f"{PREFIX}TIMEOUT={text}: expected milliseconds, more than 0")
    return int(text) / 1000


def _compressed() -> bool:
    """Raises ValueError."""
    if (text := _setting("COMPRESSION") or "none") not in {"none", "gzip"}:
        raise ValueError(f"{PREFIX}COMPRESSION={text}: expected none or gzip")
    return text == "gzip"


def _headers() -> dict[str, bytes]:
    """Of all requests: `name=value,...`, values percent-encoded. Raises ValueError, which names no value."""
    headers = {}
    for number, pair in enumerate(_setting("HEADERS").split(","), 1):
        name, equals, value = pair.partition("=")
        if not pair.strip():
            continue
        decoded = unquote(value.strip())
        if not equals or not HEADER_NAME.fullmatch(name.strip()) or not decoded.isprintable():
            raise ValueError(f"{PREFIX}HEADERS: pair {number} is no name=value")
        headers[name.strip().lower()] = decoded.encode()
    return headers


def _tls() -> ssl.SSLContext:
    """The system's authorities, or the given one; a certificate of our own where there is one. Raises ValueError."""
    try:
        context = ssl.create_default_context(cafile=_setting("CERTIFICATE") or None)
        if certificate := _setting("CLIENT_CERTIFICATE"):
            context.load_cert_chain(
                certificate, _setting("CLIENT_KEY") or None, password=""
            )  # never ask at the terminal
    except OSError as error:  # ssl.SSLError is one
        raise ValueError(f"{PREFIX}CERTIFICATE, _CLIENT_CERTIFICATE, _CLIENT_KEY: {error}") from None
    return context


def _seconds(retry_after: str | None) -> float | None:
    """From now; None: not said, or not understood. RFC 9110, section 10.2.3: seconds or a date."""
    if retry_after is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}", retry_after):
        return float(retry_after)
    try:
        date = parsedate_tz(retry_after)
        return max(mktime_tz(date) - time.time(), 0.0) if date else None
    except (ValueError, OverflowError):
        return None


def _rejected(answer: bytes) -> int:
    """How many spans of a batch that was taken were not (`ExportTracePartialSuccess`)."""
    try:
        return int(json.loads(answer)["partialSuccess"]["rejectedSpans"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
