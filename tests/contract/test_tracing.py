"""Spans of attempts over gRPC: what they say, and what the engines are told."""

import asyncio
import functools
import random
import subprocess
import sys
import threading

import grpc.aio
import pytest
from test_ext_proc import POST, WORKERS, Stream, body, headers, set_headers

from extproc.config import Config
from extproc.errors import ConfigError
from extproc.gateway import Gateway
from extproc.load import LoadTable
from extproc.model import Role, Worker
from extproc.schedule import Scheduler
from extproc.server import Service
from extproc.service import ExternalProcessor
from extproc.trace_context import parse_traceparent
from extproc.transport import TRANSPORTS

pytest.importorskip("opentelemetry.sdk", reason="needs the extra [otel]")

from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import SpanKind, StatusCode, TraceState

from extproc import otlp_json, tracing
from extproc.tracing import Tracing

CLIENT = parse_traceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
MARK = "m4rk"
BODY = b'{"text": "m4rk", "rid": "m4rk"}'
MORE_WORKERS = [
    *WORKERS,
    Worker("p:2", Role.PREFILL, "http://p:2", "10.0.1.2:1", "p", 8998, 2),
    Worker("d:2", Role.DECODE, "http://d:2", "10.0.2.2:1", dp_size=2),
]


def post(**more):
    """Headers of a request of this client, none of whose secrets may show."""
    own = {":method": "POST", ":path": f"/generate?key={MARK}", "x-request-id": "r1"}
    secrets = {"authorization": f"Bearer {MARK}", "cookie": MARK, "user-agent": MARK, ":authority": MARK}
    named = {name.replace("_", "-"): value for name, value in more.items()}
    return headers({**own, **secrets, "traceparent": CLIENT.traceparent, **named})


def traced(script, *, healthy=True, workers=MORE_WORKERS, **settings):
    """Run `script(open_stream)`; the spans that were made, in the order of their ends."""
    exporter = InMemorySpanExporter()

    async def main():
        config = Config(**settings)
        clock = asyncio.get_running_loop().time
        table = LoadTable(workers, clock)
        for worker in workers:
            table.worker_changed(worker, healthy)
        tracer = Tracing(config, clock, SimpleSpanProcessor(exporter))
        gateway = Gateway(config, table, Scheduler(config, table, random.Random(1)), clock, begin_trace=tracer.begin)
        processor = ExternalProcessor(gateway, tracer.finished)
        server = TRANSPORTS[config.transport](processor, config.max_payload_size, None)
        target = await server.listen("127.0.0.1:0")
        try:
            async with grpc.aio.insecure_channel(target) as channel, asyncio.timeout(60):
                await script(functools.partial(Stream, channel))
                await processor.idle()
        finally:
            await server.stop()

    asyncio.run(main())
    spans = exporter.get_finished_spans()
    assert MARK.encode() not in otlp_json.encode(spans)
    return spans


async def both_legs(open_stream, request=None, prefill_status="200"):
    """A whole attempt; what was set on the request, and on prefill's own leg."""
    route = open_stream()
    await route.ask(request or post())
    common = (await route.ask(body(BODY))).request_body.response
    placed = set_headers(common)
    prefill = open_stream()
    sent = (await prefill.ask(headers(placed))).request_headers.response
    await prefill.ask(headers({":status": prefill_status}, response=True))
    if prefill_status == "200":
        prefill.cancel()
        await route.ask(headers({":status": "200"}, response=True))
        await route.done()
    else:
        assert (await route.read()).immediate_response is not None
        prefill.cancel()
        route.cancel()
    return placed, set_headers(sent), list(common.header_mutation.remove_headers)


def test_a_request_that_went_well():
    told = []

    async def script(open_stream):
        told.extend(await both_legs(open_stream, post(tracestate="vendor=1")))

    [span] = traced(script, explain=True)
    placed, on_prefill, removed = told
    own = parse_traceparent(placed["traceparent"])
    assert (own.trace_id, own.sampled) == (CLIENT.trace_id, True)
    assert (span.context.trace_id, span.context.span_id) == (own.trace_id, own.span_id)
    assert (span.parent.trace_id, span.parent.span_id, span.parent.is_remote) == (*(CLIENT.trace_id, CLIENT.span_id), 1)
    # Left on the request as they are: the mirror has had the first, and the client's second is still right.
    assert "traceparent" not in on_prefill
    assert "tracestate" not in placed
    assert "tracestate" not in removed
    assert span.context.trace_state.to_header() == "vendor=1"
    assert (span.name, span.kind, span.status.status_code) == ("POST /generate", SpanKind.SERVER, StatusCode.UNSET)
    said = dict(span.attributes)
    assert said.pop("extproc.decision_s") > 0
    assert said.pop("extproc.prefill.duration_s") > 0
    for role in ("prefill", "decode"):
        name = f"{said[f'extproc.{role}.worker']}/{said[f'extproc.{role}.dp_rank']}*="
        assert name in said.pop(f"extproc.{role}.loads")
        assert said.pop(f"extproc.{role}.worker") in {f"{role[0]}:1", f"{role[0]}:2"}
        assert said.pop(f"extproc.{role}.dp_rank") in {0, 1}
    assert said == {
        "http.request.method": "POST",
        "http.route": "/generate",
        "http.response.status_code": 200,
        "extproc.outcome": "ok",
        "extproc.attempt": 1,
        "extproc.request_id": "r1",
        "extproc.prefill.end": "ok",
        "extproc.decode.end": "ok",
        "extproc.room": int(placed["x-pd-room"]),
        "extproc.batch_size": 1,
        "extproc.prompt_tokens": said["extproc.prompt_tokens"],
    }
    names = [event.name for event in span.events]
    assert names[0] == "extproc.dispatched"
    assert sorted(names) == ["extproc.dispatched", "extproc.prefill_ended", "extproc.response_headers"]
    times = [span.start_time, *(event.timestamp for event in span.events)]
    assert times == sorted(times)
    assert span.start_time < span.end_time
    rules = {"service.name": "extproc", "extproc.load_model": "live", "extproc.decode.policy": "least_load"}
    assert rules.items() <= dict(span.resource.attributes).items()


def test_attempts_of_one_request_are_siblings():
    async def script(open_stream):
        await both_legs(open_stream, prefill_status="503")
        await both_legs(open_stream, post(x_envoy_attempt_count="2"))

    first, second = traced(script)
    assert first.parent == second.parent
    assert first.context.trace_id == second.context.trace_id == CLIENT.trace_id
    assert first.context.span_id != second.context.span_id
    assert (first.attributes["extproc.attempt"], second.attributes["extproc.attempt"]) == (1, 2)
    assert first.attributes["extproc.prefill.worker"] != second.attributes["extproc.prefill.worker"]
    assert (first.status.status_code, first.status.description) == (StatusCode.ERROR, "prefill worker answered 503")
    assert first.attributes["error.type"] == first.attributes["extproc.outcome"] == "prefill_failed"
    assert second.status.status_code is StatusCode.UNSET
    assert "error.type" not in second.attributes


def test_no_worker_is_an_error():
    async def script(open_stream):
        route = open_stream()
        assert (await route.ask(post())).immediate_response is not None
        route.cancel()

    [span] = traced(script, healthy=False)
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "no_worker"
    assert span.attributes["http.response.status_code"] == 503
    assert "extproc.room" not in span.attributes
    assert not span.events


def test_a_clients_own_mistake_is_not():
    async def script(open_stream):
        route = open_stream()
        await route.ask(post())
        answer = await route.ask(body(b'{"m4rk": "m4rk", '))
        assert answer.immediate_response.status.code == 400
        route.cancel()

    [span] = traced(script)
    assert span.status.status_code is StatusCode.UNSET
    assert span.attributes["error.type"] == "refused"
    assert span.attributes["extproc.reason"] == "BadRequest()"


def test_a_request_that_is_passed_on():
    told = {}

    async def script(open_stream):
        route = open_stream()
        answer = await route.ask(headers({":method": "GET", ":path": "/v1/models"}, end_of_stream=True))
        told.update(set_headers(answer.request_headers.response))
        await route.ask(headers({":status": "200"}, response=True))
        await route.done()

    [span] = traced(script)
    own = parse_traceparent(told["traceparent"])
    assert (own.trace_id, own.span_id) == (span.context.trace_id, span.context.span_id)
    assert span.parent is None
    assert span.name == "GET"
    assert span.attributes["extproc.decode.worker"] in {"d:1", "d:2"}
    assert "http.route" not in span.attributes


def test_in_headers_alone():
    told = {}

    async def script(open_stream):
        route = open_stream()
        answer = await route.ask(post(content_length=str(len(BODY))))
        told.update(set_headers(answer.request_headers.response))
        route.cancel()

    [span] = traced(script, injection="headers")
    assert parse_traceparent(told["traceparent"]).span_id == span.context.span_id
    assert span.attributes["extproc.outcome"] == "aborted"


def test_a_client_that_sends_nonsense_gets_a_new_trace():
    told = []

    async def script(open_stream):
        told.extend(await both_legs(open_stream, post(traceparent=f"00-{'0' * 32}-1-01", tracestate="a=1")))

    [span] = traced(script)
    placed, _, removed = told
    assert span.parent is None
    assert parse_traceparent(placed["traceparent"]).trace_id == span.context.trace_id != 0
    assert removed == ["tracestate"]
    assert "tracestate" not in placed


UNSAMPLED = f"{CLIENT.traceparent[:-2]}00"


@pytest.mark.parametrize(
    ("sampler", "argument", "parent", "sampled"),
    [
        (None, "", CLIENT.traceparent, True),
        (None, "", UNSAMPLED, False),
        (None, "", "", True),
        ("parentbased_traceidratio", "0", CLIENT.traceparent, True),
        ("parentbased_traceidratio", "0", "", False),
        ("traceidratio", "0", CLIENT.traceparent, False),  # whatever clients say
        ("always_on", "", UNSAMPLED, True),
        ("always_off", "", CLIENT.traceparent, False),
    ],
)
def test_sampling_is_as_the_environment_says(monkeypatch, sampler, argument, parent, sampled):
    if sampler:
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
        monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", argument)
    told = []

    async def script(open_stream):
        told.extend(await both_legs(open_stream, post(traceparent=parent)))

    spans = traced(script)
    own = parse_traceparent(told[0]["traceparent"])
    assert own.sampled == sampled
    assert [span.context.span_id for span in spans] == [own.span_id] * sampled
    if parent:
        assert own.trace_id == CLIENT.trace_id
    assert own.span_id != CLIENT.span_id


class Voter(Sampler):
    """Writes its vote before what came."""

    def should_sample(self, parent_context, trace_id, name, *_, **__):
        return SamplingResult(Decision.RECORD_AND_SAMPLE, None, TraceState([("vote", "yes"), ("a", "1")]))

    def get_description(self):
        return "Voter"


def test_a_samplers_word_goes_on(monkeypatch):
    monkeypatch.setattr("opentelemetry.sdk.trace.sampling._get_from_env_or_default", Voter)
    told = []

    async def script(open_stream):
        told.extend(await both_legs(open_stream, post(tracestate="a=1")))

    [span] = traced(script)
    assert told[0]["tracestate"] == span.context.trace_state.to_header() == "vote=yes,a=1"


def test_a_request_id_is_cut():
    async def script(open_stream):
        await both_legs(open_stream, post(x_request_id="r" * 5_000))

    [span] = traced(script)
    assert span.attributes["extproc.request_id"] == "r" * 128


def test_the_environment_names_the_service(monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "gateway-7")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=staging")

    async def script(open_stream):
        await both_legs(open_stream)

    [span] = traced(script)
    assert span.resource.attributes["service.name"] == "gateway-7"
    assert span.resource.attributes["deployment.environment.name"] == "staging"


class Nowhere:
    """An outlet."""

    def write(self, message):
        pass


def refusing(tracer, clock):
    """A function that has one request refused, as there is no worker, and thus one span made."""
    config, table = Config(), LoadTable(WORKERS, clock)
    gateway = Gateway(config, table, Scheduler(config, table, random.Random(1)), clock, begin_trace=tracer.begin)
    processor = ExternalProcessor(gateway, tracer.finished)

    def refuse():
        call = processor.opened((), Nowhere())
        processor.received(call, bytes(POST))
        processor.ended(call)

    return refuse


class Stuck(SpanExporter):
    """A collector that answers nothing until it is let go."""

    def __init__(self):
        self.busy, self.go_on, self.over = threading.Event(), threading.Event(), threading.Event()
        self.exported = 0

    def export(self, spans):
        self.exported += len(spans)
        self.busy.set()
        self.go_on.wait()
        return SpanExportResult.SUCCESS

    def shutdown(self):
        self.over.set()


def test_a_stuck_collector_neither_blocks_requests_nor_the_end(monkeypatch, caplog):
    monkeypatch.setattr(tracing, "FLUSH_S", 0.1)
    exporter = Stuck()
    processor = BatchSpanProcessor(exporter, max_queue_size=4, max_export_batch_size=1, schedule_delay_millis=1)

    async def main():
        clock = asyncio.get_running_loop().time
        tracer = Tracing(Config(), clock, processor)
        refuse = refusing(tracer, clock)
        refuse()
        assert await asyncio.to_thread(exporter.busy.wait, 60)
        for _ in range(10):
            refuse()
        await tracer.close()
        assert exporter.exported == 1
        exporter.go_on.set()
        assert await asyncio.to_thread(exporter.over.wait, 60)

    try:
        asyncio.run(main())
    finally:
        exporter.go_on.set()
    assert exporter.exported == 1 + 4  # the queue's size
    assert "not exported within" in caplog.text


def test_what_is_queued_is_exported_at_the_end():
    exporter = InMemorySpanExporter()

    async def main():
        clock = asyncio.get_running_loop().time
        tracer = Tracing(Config(), clock, BatchSpanProcessor(exporter, schedule_delay_millis=3_600_000))
        refusing(tracer, clock)()
        assert not exporter.get_finished_spans()
        await tracer.close()

    asyncio.run(main())
    assert len(exporter.get_finished_spans()) == 1


def test_a_collector_that_is_away_is_told_of_once_a_minute(caplog):
    complaints = otlp_json.logger
    before = list(complaints.filters)
    tracer = Tracing(Config(), lambda: 0.0)
    try:
        for number in range(3):
            complaints.error("away %d", number)
    finally:
        complaints.filters[:] = before
        asyncio.run(tracer.close())
    assert "away 0" in caplog.text
    assert "away 1" not in caplog.text


def test_without_the_extra_the_setting_is_refused(monkeypatch):
    monkeypatch.delitem(sys.modules, "extproc.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.context", None)
    with pytest.raises(ConfigError, match=r"pip install 'extproc\[otel\]'"):
        Service(Config(otel=True))


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"])
def test_another_protocol_is_refused(monkeypatch, name, protocol):
    monkeypatch.setenv(name, protocol)
    with pytest.raises(ConfigError, match=f"{protocol}: spans go over http/json only"):
        Service(Config(otel=True))


def test_the_sdk_can_be_disabled_by_the_environment(monkeypatch):
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert Service(Config(otel=True)).gateway.begin_trace is None


def test_off_costs_not_even_the_import():
    code = """
import sys
from extproc.config import Config
from extproc.server import Service
assert Service(Config()).gateway.begin_trace is None
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_on_needs_nothing_that_collides_with_xds_protos():
    """Both `opentelemetry-proto` and `xds-protos` install `opentelemetry/proto/`; neither copy may matter."""
    code = """
import sys
sys.modules["opentelemetry.proto"] = sys.modules["opentelemetry.exporter"] = None
from extproc.config import Config
from extproc.server import Service
assert Service(Config(otel=True)).gateway.begin_trace is not None
assert "extproc.otlp_json" in sys.modules
found = [name for name in sys.modules if name.startswith(("opentelemetry.proto", "opentelemetry.exporter"))]
assert sorted(found) == ["opentelemetry.exporter", "opentelemetry.proto"], found
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
