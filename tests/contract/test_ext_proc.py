"""The service over gRPC, driven by an independent implementation of the protocol (`envoy-data-plane`)."""

import asyncio
import functools
import json
import random

import grpc.aio
import pytest
from envoy_data_plane.envoy.config.core.v3 import HeaderMap, HeaderValue
from envoy_data_plane.envoy.data.accesslog.v3 import (
    AccessLogCommon,
    HttpAccessLogEntry,
    HttpRequestProperties,
    ResponseFlags,
)
from envoy_data_plane.envoy.service.accesslog.v3 import (
    StreamAccessLogsMessage,
    StreamAccessLogsMessageHttpAccessLogEntries,
)
from envoy_data_plane.envoy.service.ext_proc.v3 import (
    CommonResponseResponseStatus,
    HttpBody,
    HttpHeaders,
    HttpTrailers,
    ProcessingRequest,
    ProcessingResponse,
)

from extproc.config import Config
from extproc.events import Outcome
from extproc.gateway import Gateway
from extproc.load import LoadTable
from extproc.model import Role, Worker
from extproc.schedule import Scheduler
from extproc.service import ExternalProcessor
from extproc.transport import TRANSPORTS

ACCESS_LOG = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs"
METHOD = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
WORKERS = [
    Worker("p:1", Role.PREFILL, "http://p:1", "10.0.1.1:1", "p", 8998, 2),
    Worker("d:1", Role.DECODE, "http://d:1", "10.0.2.1:1", dp_size=2),
]
BODY = b'{"text": "hello"}'


def headers(pairs, *, response=False, end_of_stream=False):
    values = [HeaderValue(key=name, raw_value=value.encode()) for name, value in pairs.items()]
    message = HttpHeaders(headers=HeaderMap(headers=values), end_of_stream=end_of_stream)
    return ProcessingRequest(response_headers=message) if response else ProcessingRequest(request_headers=message)


POST = headers({":method": "POST", ":path": "/generate", "content-length": str(len(BODY))})


def body(data):
    return ProcessingRequest(request_body=HttpBody(body=data, end_of_stream=True))


def set_headers(common):
    return {option.header.key: option.header.raw_value.decode() for option in common.header_mutation.set_headers}


class Stream:
    """One ext_proc stream, as Envoy opens it."""

    def __init__(self, channel, method=METHOD, metadata=()):
        self._call = channel.stream_stream(method)(metadata=metadata)

    async def ask(self, message):
        await self._call.write(bytes(message))
        return await self.read()

    async def read(self):
        data = await self._call.read()
        return None if data is grpc.aio.EOF else ProcessingResponse.parse(data)

    def cancel(self):
        self._call.cancel()

    async def done(self):
        await self._call.done_writing()
        assert await self._call.read() is grpc.aio.EOF

    async def send(self, data):
        await self._call.write(data)


def run(script, *, healthy=True, **settings):
    """Run `script(service)` against a service on a free port; then nothing may be open or charged."""

    async def main():
        config = Config(**settings)
        clock = asyncio.get_running_loop().time
        table = LoadTable(WORKERS, clock)
        for worker in WORKERS:
            table.worker_changed(worker, healthy)
        gateway = Gateway(config, table, Scheduler(config, table, random.Random(1)), clock)
        finished = asyncio.Queue()
        processor = ExternalProcessor(gateway, finished.put_nowait)
        server = TRANSPORTS[config.transport](processor, config.max_payload_size, None)
        target = await server.listen("127.0.0.1:0")
        limits = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        try:
            async with grpc.aio.insecure_channel(target, options=limits) as channel, asyncio.timeout(60):
                await script(functools.partial(Stream, channel), finished)
        finally:
            await server.stop()
        assert processor.open_streams == gateway.open_rooms == 0
        assert all(state.in_flight == 0 for state in table.states)

    asyncio.run(main())


def test_both_legs():
    async def script(open_stream, finished):
        route = open_stream()
        answer = await route.ask(POST)
        assert answer.request_headers is not None
        common = (await route.ask(body(BODY))).request_body.response
        assert common.status is CommonResponseResponseStatus.CONTINUE
        assert common.clear_route_cache
        decode = json.loads(common.body_mutation.body)
        placed = set_headers(common)
        assert placed["content-length"] == str(len(common.body_mutation.body))
        assert placed["x-pd-mode"] == "pd"
        assert all(not option.header.value for option in common.header_mutation.set_headers)

        prefill = open_stream()
        common = (await prefill.ask(headers(placed))).request_headers.response
        assert common.status is CommonResponseResponseStatus.CONTINUE_AND_REPLACE
        sent = json.loads(common.body_mutation.body)
        assert sent["bootstrap_room"] == decode["bootstrap_room"]
        assert set_headers(common)["content-length"] == str(len(common.body_mutation.body))
        assert (await prefill.ask(headers({":status": "200"}, response=True))).response_headers is not None
        prefill.cancel()

        assert (await route.ask(headers({":status": "200"}, response=True))).response_headers is not None
        trailers = await route.ask(ProcessingRequest(response_trailers=HttpTrailers()))
        assert trailers.response_trailers is not None
        await route.done()
        record = await finished.get()
        assert record.outcome is Outcome.OK

    run(script)


def test_a_failed_prefill_answers_the_client_at_once():
    async def script(open_stream, finished):
        route, prefill = open_stream(), open_stream()
        await route.ask(POST)
        placed = set_headers((await route.ask(body(BODY))).request_body.response)
        await prefill.ask(headers(placed))
        await prefill.ask(headers({":status": "503"}, response=True))
        immediate = (await route.read()).immediate_response
        assert immediate.status.code == 502
        assert "prefill worker failed" in json.loads(immediate.body)["error"]["message"]
        route.cancel()
        prefill.cancel()
        assert (await finished.get()).outcome is Outcome.PREFILL_FAILED

    run(script)


def test_a_client_that_leaves_ends_prefill():
    async def script(open_stream, finished):
        route, prefill = open_stream(), open_stream()
        await route.ask(POST)
        placed = set_headers((await route.ask(body(BODY))).request_body.response)
        await prefill.ask(headers(placed))
        route.cancel()
        assert (await prefill.read()).immediate_response.status.code == 499
        prefill.cancel()
        assert (await finished.get()).outcome is Outcome.ABORTED

    run(script)


def test_early_headers_wait_for_prefill_and_the_access_log_tells_who_broke_the_stream():
    async def script(open_stream, finished):
        route, prefill = open_stream(), open_stream()
        await route.ask(POST)
        placed = set_headers((await route.ask(body(BODY))).request_body.response)
        await prefill.ask(headers(placed))
        patience = await route.ask(headers({":status": "200"}, response=True))
        assert patience.override_message_timeout.total_seconds() > 600
        await prefill.ask(headers({":status": "200"}, response=True))
        assert (await route.read()).response_headers is not None
        log = open_stream(method=ACCESS_LOG)
        entry = HttpAccessLogEntry(
            common_properties=AccessLogCommon(response_flags=ResponseFlags(upstream_connection_termination=True)),
            request=HttpRequestProperties(request_headers={"x-pd-room": placed["x-pd-room"]}),
        )
        entries = StreamAccessLogsMessageHttpAccessLogEntries(log_entry=[entry])
        route.cancel()
        await log.send(bytes(StreamAccessLogsMessage(http_logs=entries)))
        assert (await prefill.read()).immediate_response.status.code == 499
        prefill.cancel()
        record = await finished.get()
        assert (record.outcome, record.decode_end) == (Outcome.DECODE_FAILED, "failed")
        log.cancel()

    run(script)


def test_nonsense_in_the_access_log_ends_its_stream():
    async def script(open_stream, finished):
        log = open_stream(method=ACCESS_LOG)
        await log.send(b"nonsense")
        with pytest.raises(grpc.aio.AioRpcError, match="not a StreamAccessLogsMessage"):
            await log.read()

    run(script)


def test_a_prefill_stream_nobody_waits_for_is_refused():
    async def script(open_stream, _finished):
        prefill = open_stream()
        answer = await prefill.ask(headers({"x-pd-room": "12345"}))
        assert answer.immediate_response.status.code == 410

    run(script)


def test_a_call_that_names_its_room_and_says_no_more_is_prefills_end():
    """What grpcio sees of a refused connection."""

    async def script(open_stream, finished):
        route = open_stream()
        await route.ask(POST)
        placed = set_headers((await route.ask(body(BODY))).request_body.response)
        prefill = open_stream(metadata=(("x-pd-room", placed["x-pd-room"]),))
        await prefill.done()
        answer = (await route.read()).immediate_response
        assert answer.status.code == 502
        route.cancel()
        assert (await finished.get()).outcome is Outcome.PREFILL_FAILED

    run(script)


def test_no_mode_changes_for_a_request_that_is_passed_on():
    async def script(open_stream, finished):
        route = open_stream()
        answer = await route.ask(headers({":method": "GET", ":path": "/v1/models"}, end_of_stream=True))
        assert set_headers(answer.request_headers.response)["x-pd-mode"] == "direct"
        await route.done()
        assert (await finished.get()).endpoint == "other"

    run(script)


def test_503_until_a_pair_is_healthy():
    async def script(open_stream, finished):
        route = open_stream()
        immediate = (await route.ask(POST)).immediate_response
        assert immediate.status.code == 503
        route.cancel()
        assert (await finished.get()).outcome is Outcome.NO_WORKER

    run(script, healthy=False)


def test_20_mb_fit_through():
    big = b'{"text": "' + b"x" * 20_000_000 + b'"}'

    async def script(open_stream, finished):
        route = open_stream()
        await route.ask(headers({":method": "POST", ":path": "/generate", "content-length": str(len(big))}))
        mutated = (await route.ask(body(big))).request_body.response.body_mutation.body
        assert mutated.startswith(big[:-1])
        await route.done()
        await finished.get()

    run(script)


@pytest.mark.parametrize(
    ("message", "text", "records"),
    [
        (b"\xff\xff\xff", "not a ProcessingRequest", 0),
        (b"", "unknown kind", 0),
        (bytes(body(BODY)), "unexpected RequestBody in state NEW", 1),
    ],
)
def test_nonsense_ends_the_stream_with_a_reason(message, text, records):
    async def script(open_stream, finished):
        route = open_stream()
        await route.send(message)
        with pytest.raises(grpc.aio.AioRpcError, match=text) as raised:
            await route.read()
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        for _ in range(records):
            await finished.get()

    run(script)
