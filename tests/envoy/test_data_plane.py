"""The generated bootstrap on a real Envoy, between a scripted ext_proc service and toy engines.

What Envoy does is tried here, not what the service does: the assumptions of `extproc.exchange`, one test each.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable

import h2.config
import h2.connection
import h2.events
import httpx
import pytest
from aiohttp import web
from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2 as mode_pb2
from envoy_stub import (
    PATIENCE_S,
    Call,
    Engine,
    StubService,
    answer_ok,
    bench,
    immediate,
    never,
    reset,
    run,
    set_headers,
    soon,
    sse,
)

from extproc.envoy_config.routing import PREFILL_READ_HEADERS
from extproc.envoy_process import EnvoyProcess
from extproc.exchange import READ_HEADERS
from extproc.mutation import ROOM
from extproc.request import ROUTING_KEY

pytestmark = pytest.mark.envoy

NO_PORT = "127.0.0.1:1"
"""An endpoint that refuses connections: nothing on a test machine listens on tcpmux."""


def error_of(response: httpx.Response) -> dict:
    """The OpenAI-style error of a response that Envoy made."""
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == response.status_code
    return error


def ended(events: list[str]) -> bool:
    return any(event.startswith(("EOF", "CancelledError")) for event in events)


def kinds(events: list[str]) -> list[str]:
    """The messages Envoy sent, without our answers and the end."""
    return [event.split()[0] for event in events if re.match("(request|response)_", event)]


# -- two legs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [13, 1_000_000, 20_000_000])
def test_each_leg_gets_its_own_body(size: int) -> None:
    async def scenario() -> None:
        async with bench() as b:
            body = b'{"a":"' + b"x" * (size - 8) + b'"}'
            response = await b.post(body)
            assert response.status_code == 200
            for leg, engine in (("prefill", b.prefill), ("decode", b.decode)):
                call = await engine.call()
                assert call.body == body[:-1] + f', "leg": "{leg}", "room": 1000}}'.encode()
                assert call.request.headers["x-pd-room"] == "1000"
            assert b.service.of("route")[0].body == body

    run(scenario())


def test_direct_mode_reaches_decode_alone_and_untouched() -> None:
    """`mode_override` in the answer to the request headers switches body buffering off, however long the body."""

    async def scenario() -> None:
        async with bench() as b:
            assert (await b.client.get(f"{b.url}/v1/models")).status_code == 200

            async def direct(service: StubService, stream, kind, request):
                if kind == "request_headers":
                    stream.headers[":method"] = "any"
                    return service.on_request_headers(stream, request)
                return None

            b.service.override = direct
            body = b"x" * 3_000_000
            response = await b.client.post(f"{b.url}/other", content=body)
            assert response.status_code == 200
            assert [call.request.path for call in b.decode.calls] == ["/v1/models", "/other"]
            assert b.decode.calls[1].body == body
            assert b.prefill.calls == []
            for stream in b.service.streams:
                assert kinds(stream.events) == ["request_headers", "response_headers"]

    run(scenario())


def test_sse_chunks_arrive_one_by_one_and_the_stream_ends_with_the_response() -> None:
    async def scenario() -> None:
        async with bench() as b:
            go = asyncio.Semaphore(0)

            async def chunks() -> AsyncIterator[bytes]:
                for number in range(3):
                    await go.acquire()
                    yield f"data: {number}\n\n".encode()

            b.decode.behave = lambda call: sse(call, chunks())
            go.release()
            async with b.client.stream("POST", b.url + "/generate", content=b'{"stream": true}') as response:
                received = response.aiter_raw()
                for number in range(3):
                    # The engine sends the next one only now: nothing may hold a chunk back.
                    assert await anext(received) == f"data: {number}\n\n".encode()
                    # After the last one the engine ends the response by itself, and with it the stream.
                    assert number == 2 or not b.service.of("route")[0].ended.is_set()
                    go.release()
            stream = b.service.of("route")[0]
            await soon(stream.ended)
            assert kinds(stream.events) == ["request_headers", "request_body", "response_headers"]

    run(scenario())


# -- what clients must not set ------------------------------------------------------------------------------------

FORBIDDEN = {
    "X-PD-Mode": "pd",
    "x-pd-decode-endpoint": NO_PORT,
    "X-Pd-Prefill-ENDPOINT": NO_PORT,
    "x-pd-invented-later": "1",
    "X-Override-Bootstrap-Room": "1",
    "x-Data-Parallel-Rank": "7",
    "X-GATEWAY-Destination-Endpoint": NO_PORT,
    "X-Envoy-Max-Retries": "9",
    "x-envoy-upstream-rq-timeout-ms": "1",
    "x-envoy-invented-later": "1",
    "x_pd_mode": "pd",
}


@pytest.mark.parametrize("http2", [False, True])
def test_headers_that_steer_are_stripped_from_clients(http2: bool) -> None:
    async def scenario() -> None:
        async with bench(http2=http2) as b:
            secret = {"authorization": "Bearer secret", "cookie": "secret"}
            response = await b.post(headers={**FORBIDDEN, **secret, "x-mine": "stays"})
            assert response.status_code == 200
            assert response.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
            seen = b.service.of("route")[0].headers
            assert not {name.lower() for name in FORBIDDEN} & set(seen)
            # Of the rest it is told what it looks at; the engine gets all.
            assert set(seen) <= {*READ_HEADERS, ROUTING_KEY}
            prefill = await b.service.stream("prefill")
            await prefill.until("request_headers")
            assert ROOM in prefill.headers
            assert set(prefill.headers) <= set(PREFILL_READ_HEADERS)
            got = b.decode.calls[0].request.headers
            assert [got.get(name) for name in ("x-mine", *secret)] == ["stays", *secret.values()]
            assert seen["x-envoy-attempt-count"] == "1"

    run(scenario())


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        ("/%67enerate", "/generate"),
        ("/v1%2Fchat/completions", "/v1/chat/completions"),
        ("//generate", "/generate"),
        ("/x/../generate", "/generate"),
    ],
)
def test_the_service_sees_the_path_that_engines_will_understand(path: str, seen: str) -> None:
    async def scenario() -> None:
        async with bench() as b:
            reader, writer = await asyncio.open_connection("127.0.0.1", b.port)
            writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            writer.close()
            assert b.service.of("route")[0].headers[":path"] == seen

    run(scenario())


# -- another attempt ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("http2", [False, True])
def test_a_marked_failure_is_tried_again_with_the_whole_body(http2: bool) -> None:
    async def scenario() -> None:
        async with bench(http2=http2) as b:

            async def behave(call: Call) -> web.StreamResponse:
                return await (never if len(b.decode.calls) == 1 else answer_ok)(call)

            b.decode.behave = behave
            b.prefill.behave = never
            body = b'{"a":"' + b"x" * 20_000_000 + b'"}'
            post = asyncio.create_task(b.post(body))
            first = await b.decode.call()
            await b.service.of("route")[0].say(immediate(502, "prefill died", x_pd_retry="prefill"))
            response = await post
            assert (response.status_code, response.json()) == (200, {"ok": True})
            await soon(first.gone)
            streams = b.service.of("route")
            assert [s.headers["x-envoy-attempt-count"] for s in streams] == ["1", "2"]
            assert [len(s.body or b"") for s in streams] == [len(body)] * 2
            assert b'"room": 1001' in (await b.prefill.call(1)).body

    run(scenario())


def test_an_unmarked_failure_is_not_tried_again_and_a_mark_stays_inside() -> None:
    async def scenario() -> None:
        async with bench(retry_max_retries=1) as b:
            for headers, attempts in (({}, 1), ({"x_pd_retry": "x"}, 2)):
                b.service.streams.clear()

                async def fail(service, stream, kind, request, headers=headers):
                    return immediate(503, "no", **headers)

                b.service.override = fail
                response = await b.post()
                assert response.status_code == 503
                assert "x-pd-retry" not in response.headers
                assert len(b.service.of("route")) == attempts

    run(scenario())


def test_a_mark_on_an_engines_answer_works_too() -> None:
    async def scenario() -> None:
        async with bench() as b:

            async def behave(call: Call) -> web.StreamResponse:
                return web.json_response({"call": len(b.decode.calls)}, status=503 if len(b.decode.calls) == 1 else 200)

            async def mark(service: StubService, stream, kind, request):
                if kind != "response_headers" or stream.response_headers[":status"] != "503":
                    return None
                response = service.on_response_headers(stream, request)
                response.response_headers.response.header_mutation.CopyFrom(set_headers(x_pd_retry="decode"))
                return response

            b.decode.behave = behave
            b.service.override = mark
            response = await b.post()
            assert (response.status_code, response.json()) == (200, {"call": 2})

    run(scenario())


@pytest.mark.parametrize("how", ["refused", "reset"])
def test_a_broken_connection_to_decode_is_tried_again_without_a_mark_of_the_service(how: str) -> None:
    async def scenario() -> None:
        async with bench() as b:
            alive = b.service.decode
            if how == "refused":
                b.service.decode = NO_PORT

            async def behave(call: Call) -> web.StreamResponse:
                return await (reset if how == "reset" and len(b.decode.calls) == 1 else answer_ok)(call)

            async def other_worker(service: StubService, stream, kind, request):
                if stream.headers.get("x-envoy-attempt-count") == "2":
                    service.decode = alive

            b.decode.behave = behave
            b.service.override = other_worker
            assert (await b.post()).status_code == 200
            assert len(b.service.of("route")) == 2

    run(scenario())


# -- the service speaks out of turn -------------------------------------------------------------------------------


def test_an_immediate_response_ends_a_waiting_request_and_its_decode_leg() -> None:
    async def scenario() -> None:
        async with bench() as b:
            b.decode.behave = b.prefill.behave = never
            post = asyncio.create_task(b.post())
            call = await b.decode.call()
            await b.service.of("route")[0].say(immediate(502, 'prefill said "no"', retry_after="7"))
            response = await post
            assert response.status_code == 502
            # Its own body and headers, not Envoy's idea of them.
            assert response.json() == {"error": {"message": 'prefill said "no"'}}
            assert response.headers["content-type"] == "application/json"
            assert response.headers["retry-after"] == "7"
            await soon(call.gone)

    run(scenario())


def test_an_immediate_response_after_the_headers_truncates() -> None:
    async def scenario() -> None:
        async with bench() as b:

            async def endless() -> AsyncIterator[bytes]:
                yield b"data: 1\n\n"
                await asyncio.Event().wait()

            b.decode.behave = lambda call: sse(call, endless())
            async with b.client.stream("POST", b.url + "/generate", content=b"{}") as response:
                received = response.aiter_raw()
                assert await anext(received) == b"data: 1\n\n"
                await b.service.of("route")[0].say(immediate(502, "too late"))
                with pytest.raises(httpx.RemoteProtocolError):
                    await anext(received)
            await soon(b.decode.calls[0].gone)

    run(scenario())


def test_an_immediate_response_ends_a_prefill_leg() -> None:
    """The only way to end one: Envoy lets the mirror run on when the main leg is gone."""

    async def scenario() -> None:
        async with bench() as b:
            b.prefill.behave = never
            assert (await b.post()).status_code == 200
            call = await b.prefill.call()
            stream = await b.service.stream("prefill")
            await soon(b.service.of("route")[0].ended)
            assert not call.gone.is_set()
            await stream.say(immediate(499, "the main leg is gone"))
            await soon(call.gone)
            await soon(stream.ended)

    run(scenario())


# -- what the service learns of each end --------------------------------------------------------------------------


@pytest.mark.parametrize("answered", [False, True], ids=["before the headers", "mid-stream"])
@pytest.mark.parametrize("http2", [False, True])
def test_a_client_that_leaves_ends_the_decode_leg_and_the_stream(http2: bool, answered: bool) -> None:
    async def scenario() -> None:
        async with bench() as b:

            async def endless() -> AsyncIterator[bytes]:
                yield b"data: 1\n\n"
                await asyncio.Event().wait()

            b.decode.behave = (lambda call: sse(call, endless())) if answered else never
            async with (post_http2 if http2 else post_http1)(b.port, until_data=answered) as leave:
                call = await b.decode.call()
                leave()
                await soon(call.gone)
            stream = b.service.of("route")[0]
            await soon(stream.ended)
            assert ended(stream.events)
            assert ("response_headers" in kinds(stream.events)) == answered

    run(scenario())


@contextlib.asynccontextmanager
async def post_http1(port: int, *, until_data: bool) -> AsyncIterator[Callable[[], None]]:
    """Send a request; gives what makes the client vanish."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
    if until_data:
        async with asyncio.timeout(PATIENCE_S):
            await reader.readuntil(b"data: 1")
    yield writer.close
    await writer.wait_closed()


@contextlib.asynccontextmanager
async def post_http2(port: int, *, until_data: bool) -> AsyncIterator[Callable[[], None]]:
    """Send a request on a new HTTP/2 connection; gives what resets the stream and leaves the connection open."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    connection.initiate_connection()
    headers = [(":method", "POST"), (":scheme", "http"), (":authority", "x"), (":path", "/generate")]
    connection.send_headers(1, headers)
    connection.send_data(1, b"{}", end_stream=True)
    writer.write(connection.data_to_send())
    while until_data:
        events = connection.receive_data(await asyncio.wait_for(reader.read(65536), PATIENCE_S))
        writer.write(connection.data_to_send())
        until_data = not any(isinstance(event, h2.events.DataReceived) for event in events)

    def leave() -> None:
        connection.reset_stream(1)
        writer.write(connection.data_to_send())

    yield leave
    writer.close()
    await writer.wait_closed()


def test_a_decode_reset_before_the_headers_is_seen_as_503() -> None:
    async def scenario() -> None:
        async with bench(retry_max_retries=0) as b:
            b.decode.behave = reset
            response = await b.post()
            assert error_of(response)["type"] == "service_unavailable"
            stream = b.service.of("route")[0]
            await soon(stream.ended)
            assert stream.response_headers[":status"] == "503"

    run(scenario())


@pytest.mark.parametrize("how", ["refused", "reset"])
def test_a_prefill_that_cannot_be_reached_is_seen_as_the_end_of_its_stream(how: str) -> None:
    async def scenario() -> None:
        async with bench() as b:
            if how == "refused":
                b.service.prefill = NO_PORT
            b.prefill.behave, b.decode.behave = reset, never
            post = asyncio.create_task(b.post())
            stream = await b.service.stream("prefill")
            await soon(stream.ended)
            assert stream.response_headers == {}
            assert dict(stream.context.invocation_metadata())["x-pd-room"] == "1000"
            post.cancel()

    run(scenario())


def test_a_failed_prefill_is_seen_with_its_status_and_text() -> None:
    """`mode_override` to a BUFFERED response body."""

    async def scenario() -> None:
        async with bench() as b:

            async def complain(call: Call) -> web.StreamResponse:
                return web.Response(status=400, text="rank 9 of 2")

            b.prefill.behave = complain
            b.decode.behave = never

            async def want_text(service: StubService, stream, kind, request):
                if kind != "response_headers" or stream.leg != "prefill":
                    return None
                response = service.on_response_headers(stream, request)
                response.mode_override.response_header_mode = mode_pb2.ProcessingMode.SEND
                response.mode_override.response_body_mode = mode_pb2.ProcessingMode.BUFFERED
                return response

            b.service.override = want_text
            post = asyncio.create_task(b.post())
            stream = await b.service.stream("prefill")
            await stream.until("response_body")
            assert (stream.response_headers[":status"], stream.response_body) == ("400", b"rank 9 of 2")
            post.cancel()

    run(scenario())


def test_a_prefill_that_does_not_read_does_not_hold_decode_up() -> None:
    """Since `CONTINUE_AND_REPLACE` takes the mirrored body off the wire, whatever prefill does with its own."""

    async def scenario() -> None:
        async with bench() as b:
            done = asyncio.Event()

            async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await done.wait()
                writer.close()

            deaf = await asyncio.start_server(hold, "127.0.0.1", 0, limit=1024)
            host, port = deaf.sockets[0].getsockname()
            b.service.prefill = f"{host}:{port}"
            async with deaf:
                body = b'{"a":"' + b"x" * 20_000_000 + b'"}'
                assert (await b.post(body)).status_code == 200
                await (await b.service.stream("prefill")).say(immediate(499, "gone"))
                done.set()

    run(scenario())


# -- Envoy's own errors -------------------------------------------------------------------------------------------


def test_a_chunked_body_above_the_limit_gets_413_as_json() -> None:
    async def scenario() -> None:
        async with bench(max_payload_size=1000) as b:
            reader, writer = await asyncio.open_connection("127.0.0.1", b.port)
            writer.write(b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
            # Above the limit and its slack of 1 MiB. A chunk at a time: as soon as Envoy has heard enough, it answers.
            answer = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
            while not answer.done():
                writer.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
                await asyncio.wait([answer], timeout=0.01)
            head = (await answer).decode().lower()
            assert head.startswith("http/1.1 413 ")
            assert "content-type: application/json\r\n" in head
            length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
            error = json.loads(await reader.readexactly(length))["error"]
            assert error["message"] == "the request body exceeds the limit of 1000 bytes"
            assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", 413, None)
            writer.close()
            assert b.decode.calls == []
            assert b.prefill.calls == []

    run(scenario())


def test_headers_too_large_get_431_as_json() -> None:
    async def scenario() -> None:
        async with bench() as b:
            response = await b.post(headers={"x-large": "x" * 100_000})
            assert response.status_code == 431
            assert error_of(response)["type"] == "invalid_request_error"

    run(scenario())


def test_a_request_that_takes_too_long_gets_504_as_json() -> None:
    async def scenario() -> None:
        async with bench(request_timeout_secs=1) as b:
            b.decode.behave = never
            response = await b.post()
            assert response.status_code == 504
            error_of(response)
            await soon(b.service.of("route")[0].ended)
            await soon(b.decode.calls[0].gone)

    run(scenario())


# -- without the service ------------------------------------------------------------------------------------------


def test_without_the_service_requests_get_503_and_none_reaches_an_engine() -> None:
    async def scenario() -> None:
        async with bench() as b:
            b.relay.cut()
            for request in (b.post(), b.client.get(f"{b.url}/v1/models"), b.post(headers=FORBIDDEN)):
                response = await request
                assert response.status_code == 503
                assert "scheduler is not answering" in error_of(response)["message"]
                assert response.headers["retry-after"] == "1"
            assert b.decode.calls == b.prefill.calls == []
            await b.relay.start()
            assert (await b.post()).status_code == 200

    run(scenario())


def test_a_running_stream_survives_the_death_of_the_service() -> None:
    async def scenario() -> None:
        async with bench() as b:
            go = asyncio.Semaphore(0)

            async def chunks() -> AsyncIterator[bytes]:
                for number in range(5):
                    yield f"data: {number}\n\n".encode()
                    await go.acquire()

            b.decode.behave = lambda call: sse(call, chunks())
            received = []
            async with b.client.stream("POST", b.url + "/generate", content=b"{}") as response:
                async for chunk in response.aiter_raw():
                    received.append(chunk)
                    if len(received) == 2:
                        b.relay.cut()
                        assert (await b.post()).status_code == 503
                    go.release()
            assert b"".join(received).count(b"data: ") == 5

    run(scenario())


def test_a_request_waiting_for_decode_survives_the_death_of_the_service() -> None:
    async def scenario() -> None:
        async with bench() as b:
            go = asyncio.Event()

            async def when_told(call: Call) -> web.StreamResponse:
                await go.wait()
                return web.json_response({"late": True})

            b.decode.behave = when_told
            post = asyncio.create_task(b.post())
            await b.decode.call()
            b.relay.cut()
            assert (await b.client.get(f"{b.url}/v1/models")).status_code == 503  # Envoy has noticed
            go.set()
            response = await post
            assert (response.status_code, response.json()) == (200, {"late": True})

    run(scenario())


def test_a_prefill_leg_that_the_service_did_not_answer_reaches_no_engine() -> None:
    """Fail-open lets the mirrored request go on, and that has decode's body."""

    async def scenario() -> None:
        async with bench() as b:

            async def die(service: StubService, stream, kind, request):
                if stream.leg == "prefill":
                    raise RuntimeError("a bug, a time-out, a restart just now")

            b.service.override = die
            assert (await b.post()).status_code == 200
            await soon((await b.service.stream("prefill")).ended)
            # The connection that was to carry it is closed, unused.
            assert await count(b.envoy, "cluster.prefill.upstream_cx_destroy_local_with_active_rq") == 1
            assert b.prefill.calls == []

    run(scenario())


async def count(envoy: EnvoyProcess, stat: str) -> int:
    """Wait for a counter of Envoy to leave 0."""
    async with httpx.AsyncClient(trust_env=False) as client, asyncio.timeout(PATIENCE_S):
        while True:
            text = (await client.get(f"http://{envoy.admin_address}/stats", params={"filter": f"^{stat}$"})).text
            if text.strip() and (value := int(text.split(": ")[1])):
                return value
            await asyncio.sleep(0.02)


# -- connections to engines ---------------------------------------------------------------------------------------


def test_connections_to_engines_are_reused() -> None:
    async def scenario() -> None:
        async with bench() as b:
            for number in range(5):
                assert (await b.post()).status_code == 200
                await soon((await b.service.stream("prefill", number)).ended)
            for engine in (b.prefill, b.decode):
                assert len(ports(engine)) == 1

    run(scenario())


def ports(engine: Engine) -> set[int]:
    return {call.port for call in engine.calls}
