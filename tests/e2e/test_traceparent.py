"""Traces through a real Envoy: both engines see the span that the collector gets, below the client's or Envoy's own."""

import secrets
import uuid
from collections.abc import Iterator

import httpx
import pytest
import yaml
from conftest import legs, until

from extproc.demo.stack import Stack

pytest.importorskip("opentelemetry.sdk", reason="needs the extra [otel]")

from otlp_collector import SERVER, Collector
from own_envoy import own_envoy
from split_gateway import Engines, SplitGateway, extproc

pytestmark = pytest.mark.envoy

GENERATE = {"text": "hello", "sampling_params": {"max_new_tokens": 2}}
OURS, ENVOY = "gateway", "envoy"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as running, pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", running.url)
        environment.setenv("OTEL_SERVICE_NAME", OURS)
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        yield running


@pytest.fixture(scope="module")
def stack(collector) -> Iterator[Stack]:
    with Stack(prefill=2, decode=2, dp_size=2, up_flags=["--otel"], engine_flags=["--time-scale", "1000"]) as running:
        yield running


class Request:
    """A client's request, with its own span."""

    def __init__(self, *, sampled: bool = True) -> None:
        self.trace_id, self.span_id = secrets.token_bytes(16), secrets.token_bytes(8)
        self.request_id = str(uuid.uuid4())
        self.headers = {
            "x-request-id": self.request_id,
            "traceparent": self.traceparent(self.span_id, sampled),
            "tracestate": "vendor=1",
        }

    def traceparent(self, span_id: bytes, sampled: bool = True) -> str:
        return f"00-{self.trace_id.hex()}-{span_id.hex()}-{'01' if sampled else '00'}"


def test_both_engines_see_the_exported_span(stack, client, collector):
    request = Request()
    client.post("/generate", json=GENERATE, headers=request.headers).raise_for_status()
    prefill, decode = legs(stack, request.request_id)
    [span] = until(lambda: collector.of(OURS, request.trace_id), "the span")
    assert span.parent_span_id == request.span_id
    for leg in (prefill, decode):
        assert leg["headers"]["traceparent"] == request.traceparent(span.span_id)
        assert leg["headers"]["tracestate"] == span.trace_state == "vendor=1"
    told = span.attributes
    assert (span.name, told["extproc.outcome"], told["http.response.status_code"]) == ("POST /generate", "ok", 200)
    assert (told["extproc.prefill.worker"], told["extproc.decode.worker"]) == (prefill["worker"], decode["worker"])
    assert told["extproc.room"] == decode["bootstrap_room"]
    assert told["extproc.prefill.dp_rank"] == prefill["routed_dp_rank"]
    assert told["extproc.decode.dp_rank"] == decode["routed_dp_rank"]


def test_a_client_without_a_trace_gets_one(stack, client, collector):
    request_id = str(uuid.uuid4())
    client.post("/generate", json=GENERATE, headers={"x-request-id": request_id}).raise_for_status()
    prefill, decode = legs(stack, request_id)
    assert prefill["headers"]["traceparent"] == decode["headers"]["traceparent"]
    _, trace_id, span_id, _ = decode["headers"]["traceparent"].split("-")
    [span] = until(lambda: collector.of(OURS, bytes.fromhex(trace_id)), "the span")
    assert (span.span_id.hex(), span.parent_span_id) == (span_id, b"")


def test_attempts_are_siblings(stack, client, collector):
    faults = [engine.url + "/sim/faults" for engine in stack.prefills]
    httpx.put(faults[0], json=["status=503"]).raise_for_status()
    try:

        def retried():
            request = Request()
            client.post("/generate", json=GENERATE, headers=request.headers).raise_for_status()
            spans = until(lambda: ended(request), "the spans")
            return (request, spans) if len(spans) > 1 else None

        def ended(request):
            """All of them, once that of the attempt that answered is there."""
            spans = collector.of(OURS, request.trace_id)
            return spans if any(span.attributes["extproc.outcome"] == "ok" for span in spans) else None

        request, spans = until(retried, "a retry")
    finally:
        httpx.put(faults[0], json=[]).raise_for_status()
    assert {span.parent_span_id for span in spans} == {request.span_id}
    assert sorted(span.attributes["extproc.attempt"] for span in spans) == [1, 2]
    assert sorted(span.status for span in spans) == [0, 2]  # unset, error
    _, decode = legs(stack, request.request_id)
    [answered] = [span for span in spans if span.status == 0]
    assert decode["headers"]["traceparent"] == request.traceparent(answered.span_id)


def test_an_unsampled_client_is_not_traced(stack, client, collector):
    request, after = Request(sampled=False), Request()
    for each in (request, after):
        client.post("/generate", json=GENERATE, headers=each.headers).raise_for_status()
    prefill, decode = legs(stack, request.request_id)
    assert prefill["headers"]["traceparent"] == decode["headers"]["traceparent"]
    _, trace_id, span_id, flags = decode["headers"]["traceparent"].split("-")
    assert (trace_id, flags) == (request.trace_id.hex(), "00")
    assert span_id != request.span_id.hex()
    until(lambda: collector.of(OURS, after.trace_id), "the span of a later request")
    assert not collector.of(OURS, request.trace_id)


def test_what_is_queued_is_exported_before_the_end(collector, tmp_path, monkeypatch):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    request = Request()
    with Stack(prefill=1, decode=1, up_flags=["--otel"], engine_flags=["--time-scale", "1000"]) as stack:
        headers = request.headers
        httpx.post(stack.url + "/generate", json=GENERATE, headers=headers, timeout=60).raise_for_status()
        assert not collector.of(OURS, request.trace_id)
    assert len(collector.of(OURS, request.trace_id)) == 1


def with_tracer(bootstrap: str, collector: Collector) -> str:
    """The same, where the public listener makes spans of Envoy's own (docs/otel.md)."""
    config = yaml.safe_load(bootstrap)
    [found] = [each for each in config["static_resources"]["listeners"] if each["name"] == "public"]
    [chain] = found["filter_chains"]
    uri = {"uri": f"{collector.url}/v1/traces", "cluster": "collector", "timeout": "5s"}
    provider = {
        "@type": "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig",
        "http_service": {"http_uri": uri},
        "service_name": ENVOY,
    }
    tracing = {"provider": {"name": "envoy.tracers.opentelemetry", "typed_config": provider}}
    chain["filters"][0]["typed_config"]["tracing"] = tracing
    address = {"socket_address": {"address": "127.0.0.1", "port_value": collector.port}}
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": address}}]}]
    cluster = {"name": "collector", "type": "STATIC", "connect_timeout": "5s"}
    config["static_resources"]["clusters"].append(
        cluster | {"load_assignment": {"cluster_name": "collector", "endpoints": endpoints}}
    )
    soon = {"tracing.opentelemetry.flush_interval_ms": 20}
    config["layered_runtime"] = {"layers": [{"name": "soon", "static_layer": soon}]}
    return yaml.safe_dump(config, sort_keys=False)


def test_below_envoys_own_span(tmp_path, collector):
    with Engines(tmp_path, ["--time-scale", "1000"]) as engines:
        gateway = SplitGateway(tmp_path, engines, {"otel": True})
        printed = extproc("envoy", "--config", str(gateway._file("envoy", None)), "--admin", "127.0.0.1:0")
        assert printed.returncode == 0, printed.stderr
        text = with_tracer(printed.stdout, collector)
        request = Request()

        def ingress():
            found = collector.of(ENVOY, request.trace_id)
            return next((span for span in found if span.kind == SERVER), None)

        with gateway.serve(), own_envoy(tmp_path, text, {}):
            response = httpx.post(gateway.url + "/generate", json=GENERATE, headers=request.headers, timeout=60)
            assert response.status_code == 200, response.text
            envoys = until(ingress, "Envoy's span")
            [ours] = until(lambda: collector.of(OURS, request.trace_id), "our span")
            records = [httpx.get(url + "/sim/requests").json()[-1] for url in engines.urls.values()]
    assert envoys.parent_span_id == request.span_id
    assert ours.parent_span_id == envoys.span_id
    for record in records:
        assert record["headers"]["traceparent"] == request.traceparent(ours.span_id)
