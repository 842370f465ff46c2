"""Spans over OTLP/HTTP in JSON: what a collector gets, and what comes of its answers."""

import email.utils
import gzip
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("opentelemetry.sdk", reason="needs the extra [otel]")

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from extproc import otlp_json
from extproc.otlp_json import JsonSpanExporter, encode

TRACE, SPAN, PARENT = 0x0AF7651916CD43DD8448EB211C80319C, 0x00AD6B7169203331, 0x1
SAMPLED = TraceFlags(TraceFlags.SAMPLED)
RESOURCE = Resource({"service.name": "gateway"}, "https://schema/1")
SCOPE = InstrumentationScope("extproc", "1")
SUCCESS, FAILURE = SpanExportResult.SUCCESS, SpanExportResult.FAILURE
MARK = "m4rk"


def context(span_id=SPAN, *, remote=False, state=None):
    return SpanContext(TRACE, span_id, remote, SAMPLED, TraceState(state or []))


def span(name="s", **more):
    settled = {"context": context(), "resource": RESOURCE, "instrumentation_scope": SCOPE}
    return ReadableSpan(name, **(settled | more))


def encoded(*spans):
    return json.loads(encode(spans))["resourceSpans"]


def only(*spans):
    [resource] = encoded(*spans)
    [scope] = resource["scopeSpans"]
    [found] = scope["spans"]
    return found


def test_a_whole_span():
    whole = span(
        "POST /generate",
        context=context(state=[("a", "1"), ("b", "2")]),
        parent=context(PARENT, remote=True),
        attributes={"n": 1},
        events=[Event("e", {"x": "y"}, timestamp=1_700_000_000_000_000_001)],
        links=[Link(context(0xABC, state=[("c", "3")]), {"why": "w"})],
        kind=SpanKind.SERVER,
        status=Status(StatusCode.ERROR, "broken"),
        start_time=1_700_000_000_000_000_000,
        end_time=1_700_000_000_000_000_009,
    )
    trace = "0af7651916cd43dd8448eb211c80319c"
    assert encoded(whole) == [
        {
            "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "gateway"}}]},
            "schemaUrl": "https://schema/1",
            "scopeSpans": [
                {
                    "scope": {"name": "extproc", "version": "1", "attributes": []},
                    "schemaUrl": "",
                    "spans": [
                        {
                            "traceId": trace,
                            "spanId": "00ad6b7169203331",
                            "parentSpanId": "0000000000000001",
                            "traceState": "a=1,b=2",
                            "flags": 0x301,
                            "name": "POST /generate",
                            "kind": 2,
                            "startTimeUnixNano": "1700000000000000000",
                            "endTimeUnixNano": "1700000000000000009",
                            "attributes": [{"key": "n", "value": {"intValue": "1"}}],
                            "droppedAttributesCount": 0,
                            "events": [
                                {
                                    "timeUnixNano": "1700000000000000001",
                                    "name": "e",
                                    "attributes": [{"key": "x", "value": {"stringValue": "y"}}],
                                    "droppedAttributesCount": 0,
                                }
                            ],
                            "droppedEventsCount": 0,
                            "links": [
                                {
                                    "traceId": trace,
                                    "spanId": "0000000000000abc",
                                    "traceState": "c=3",
                                    "flags": 0x101,
                                    "attributes": [{"key": "why", "value": {"stringValue": "w"}}],
                                    "droppedAttributesCount": 0,
                                }
                            ],
                            "droppedLinksCount": 0,
                            "status": {"code": 2, "message": "broken"},
                        }
                    ],
                }
            ],
        }
    ]


def test_a_root():
    found = only(span())
    assert "parentSpanId" not in found
    assert "traceState" not in found
    assert (found["flags"], found["kind"], found["status"]) == (0x101, 1, {"code": 0})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("x", {"stringValue": "x"}),
        ("\u00e9\U0001f600", {"stringValue": "\u00e9\U0001f600"}),
        ("a\udc80b", {"stringValue": "a?b"}),  # what a header of no valid UTF-8 can become
        (True, {"boolValue": True}),
        (2**63 - 1, {"intValue": "9223372036854775807"}),
        (-1, {"intValue": "-1"}),
        (0.5, {"doubleValue": 0.5}),
        (float("nan"), {"doubleValue": "NaN"}),
        (float("inf"), {"doubleValue": "Infinity"}),
        (float("-inf"), {"doubleValue": "-Infinity"}),
        (["a", 1, False], {"arrayValue": {"values": [{"stringValue": "a"}, {"intValue": "1"}, {"boolValue": False}]}}),
        ({"k": 1}, {"kvlistValue": {"values": [{"key": "k", "value": {"intValue": "1"}}]}}),
        (b"\xff", {"bytesValue": "/w=="}),
        (None, {}),
    ],
)
def test_a_value(value, expected):
    assert only(span(attributes={"k": value}))["attributes"] == [{"key": "k", "value": expected}]


def test_spans_are_put_together_by_resource_and_scope():
    other = InstrumentationScope("other")
    found = encoded(
        span("1"), span("2", instrumentation_scope=other), span("3"), span("4", resource=Resource({"r": 1}))
    )
    scopes = [scope for resource in found for scope in resource["scopeSpans"]]
    assert [scope["scope"]["name"] for scope in scopes] == ["extproc", "other", "extproc"]
    assert [[each["name"] for each in scope["spans"]] for scope in scopes] == [["1", "3"], ["2"], ["4"]]


class FakeCollector:
    """Answers as it is told to, then 200; None: not at all, until it is let go."""

    def __init__(self):
        self.answers, self.got, self.go_on = [], [], threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.got.append((self.path, dict(self.headers), body))
                answer = collector.answers.pop(0) if collector.answers else (200, {}, b"{}")
                if answer is None:
                    collector.go_on.wait()
                    return
                status, headers, content = answer
                self.send_response(status)
                for name, value in ({"content-length": str(len(content))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.go_on.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def collector(monkeypatch):
    with FakeCollector() as running:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", running.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60000")
        monkeypatch.setattr(otlp_json, "BACK_OFF_S", 0.001)
        yield running


def test_a_batch_is_posted(collector, monkeypatch):
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy"):  # of no interest
        monkeypatch.setenv(proxy, "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "Authorization=Bearer%20a%2Cb, x-team = \u00e9 ,,content-type=x")
    assert JsonSpanExporter().export([span()]) is SUCCESS
    [(path, headers, body)] = collector.got
    assert path == "/v1/traces"
    assert body == encode([span()])
    lower = {name.lower(): value for name, value in headers.items()}
    assert (lower["content-type"], lower["authorization"]) == ("application/json", "Bearer a,b")
    assert lower["x-team"].encode("latin-1") == "\u00e9".encode()
    assert "content-encoding" not in lower


def test_variables_for_traces_come_first(collector, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{collector.url}/other?q=1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "a=1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "b=2")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "59000")
    exporter = JsonSpanExporter()
    assert exporter._timeout_s == 59
    assert exporter.export([span()]) is SUCCESS
    [(path, headers, _)] = collector.got
    assert path == "/other?q=1"
    assert headers["b"] == "2"
    assert "a" not in headers


@pytest.mark.parametrize(
    ("endpoint", "port", "target"),
    [
        ("", 4318, "/v1/traces"),
        ("http://c", 80, "/v1/traces"),
        ("https://c", 443, "/v1/traces"),
        ("http://c:4318/", 4318, "/v1/traces"),
        ("http://[::1]:4318/base/", 4318, "/base/v1/traces"),
    ],
)
def test_an_endpoint(monkeypatch, endpoint, port, target):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    exporter = JsonSpanExporter()
    assert (exporter._port, exporter._target) == (port, target)


def test_compressed(collector, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    assert JsonSpanExporter().export([span()]) is SUCCESS
    [(_, headers, body)] = collector.got
    assert headers["content-encoding"] == "gzip"
    assert gzip.decompress(body) == encode([span()])


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_what_may_pass_is_tried_again(collector, status, caplog):
    collector.answers = [(status, {}, b"")] * 2
    assert JsonSpanExporter().export([span()]) is SUCCESS
    assert len(collector.got) == 3
    assert not caplog.records


@pytest.mark.parametrize("status", [301, 400, 401, 404, 408, 413, 500, 501])
def test_what_may_not_is_not(collector, status, caplog):
    collector.answers = [(status, {"location": "/elsewhere", "retry-after": "0"}, b"")]
    assert JsonSpanExporter().export([span(), span()]) is FAILURE
    assert len(collector.got) == 1
    assert f"2 spans were not exported to 127.0.0.1:{collector.url.rpartition(':')[2]}: status {status}" in caplog.text


def test_attempts_are_bounded(collector):
    collector.answers = [(503, {"retry-after": "0"}, b"")] * 100
    assert JsonSpanExporter().export([span()]) is FAILURE
    assert len(collector.got) == otlp_json.MOST_ATTEMPTS


@pytest.mark.parametrize("later", ["3600", email.utils.formatdate(time.time() + 3600, usegmt=True)])
def test_a_retry_after_that_is_too_late_ends_it(collector, later):
    collector.answers = [(503, {"retry-after": later}, b"")]
    assert JsonSpanExporter().export([span()]) is FAILURE
    assert len(collector.got) == 1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, None),
        ("7", 7),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("soon", None),
        ("-1", None),
        ("Wed, 21 Oct 99999999999 07:28:00 GMT", None),
    ],
)
def test_retry_after(text, seconds):
    assert otlp_json._seconds(text) == seconds


def test_retry_after_is_waited_for(collector, monkeypatch):
    monkeypatch.setattr(otlp_json, "BACK_OFF_S", 3_600)
    collector.answers = [(503, {"retry-after": "1"}, b"")]
    begun = time.monotonic()
    assert JsonSpanExporter().export([span()]) is SUCCESS
    assert time.monotonic() - begun >= 1


def test_a_shutdown_ends_the_wait(collector, monkeypatch):
    monkeypatch.setattr(otlp_json, "BACK_OFF_S", 30)
    collector.answers = [(503, {}, b"")] * 10
    exporter = JsonSpanExporter()
    exporter.shutdown()
    assert exporter.export([span()]) is FAILURE
    assert len(collector.got) == 1


def test_a_collector_that_does_not_answer(collector, monkeypatch, caplog):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "200")
    collector.answers = [None] * 10
    assert JsonSpanExporter().export([span()]) is FAILURE
    assert "timed out" in caplog.text


def test_a_connection_that_breaks_is_tried_again(collector):
    collector.answers = [None, None]
    collector.go_on.set()
    assert JsonSpanExporter().export([span()]) is SUCCESS
    assert len(collector.got) == 3


def test_nobody_is_there(monkeypatch, caplog):
    with FakeCollector() as gone:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", gone.url)
    monkeypatch.setattr(otlp_json, "BACK_OFF_S", 0.001)
    assert JsonSpanExporter().export([span()]) is FAILURE
    assert "refused" in caplog.text


@pytest.mark.parametrize("answer", [b'{"partialSuccess": {"rejectedSpans": "2", "errorMessage": "m4rk"}}'])
def test_spans_that_a_collector_rejects_are_told_of(collector, answer, caplog):
    collector.answers = [(200, {}, answer)]
    assert JsonSpanExporter().export([span()]) is SUCCESS
    assert "rejected 2 spans" in caplog.text
    assert MARK not in caplog.text


@pytest.mark.parametrize(
    "answer", [b"", b"{}", b"[]", b"\xff", b"[" * 60_000, b'{"partialSuccess": {}}', b"x" * 100_000]
)
def test_other_answers_are_not(collector, answer, caplog):
    collector.answers = [(200, {}, answer)]
    assert JsonSpanExporter().export([span()]) is SUCCESS
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PROTOCOL", "http/protobuf"),
        ("ENDPOINT", "m4rk"),
        ("ENDPOINT", "ftp://m4rk"),
        ("ENDPOINT", "http://"),
        ("ENDPOINT", "http://c:m4rk"),
        ("ENDPOINT", "http://c:0"),
        ("ENDPOINT", "http://[::1"),
        ("ENDPOINT", "http://c/a b"),
        ("ENDPOINT", "http://user:m4rk@c"),
        ("TIMEOUT", "0"),
        ("TIMEOUT", "-1"),
        ("TIMEOUT", "10s"),
        ("COMPRESSION", "deflate"),
        ("HEADERS", "m4rk"),
        ("HEADERS", "a=1,=m4rk"),
        ("HEADERS", "a b=m4rk"),
        ("HEADERS", "a=m4rk%0d%0ab: c"),
    ],
)
@pytest.mark.parametrize("prefix", ["OTEL_EXPORTER_OTLP_", "OTEL_EXPORTER_OTLP_TRACES_"])
def test_a_wrong_setting(monkeypatch, prefix, name, value):
    monkeypatch.setenv(prefix + name, value)
    with pytest.raises(ValueError, match=f"OTEL_EXPORTER_OTLP_{name}") as raised:
        JsonSpanExporter()
    assert MARK not in str(raised.value)


@pytest.mark.parametrize("name", ["CERTIFICATE", "CLIENT_CERTIFICATE"])
def test_a_certificate_that_is_not_there(monkeypatch, tmp_path, name):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "https://c")
    monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{name}", str(tmp_path / "none.pem"))
    with pytest.raises(ValueError, match="OTEL_EXPORTER_OTLP_CERTIFICATE"):
        JsonSpanExporter()


def test_no_credentials_are_logged(collector, monkeypatch, caplog):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{collector.url}/{MARK}?key={MARK}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization={MARK}")
    collector.answers = [(401, {"x": MARK}, MARK.encode())]
    assert JsonSpanExporter().export([span()]) is FAILURE
    assert collector.got[0][1]["authorization"] == MARK
    assert "status 401" in caplog.text
    assert MARK not in caplog.text
