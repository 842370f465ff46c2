"""The lean gRPC server behind a real Envoy: the scripted ext_proc service of `envoy_stub`, served by it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable

import grpc.aio
import httpx
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb2
from envoy_stub import PATIENCE_S, Bench, Engine, Relay, StubService, free_port, never, run

from extproc import wire
from extproc.config import Config
from extproc.envoy_config import bootstrap, to_yaml
from extproc.envoy_process import EnvoyProcess
from extproc.lean.coroutines import EOF, Context
from extproc.lean.grpc import Status
from extproc.lean.server import Server

pytestmark = pytest.mark.envoy


class StubContext:
    """What the stub uses of `grpc.aio.ServicerContext`, on a lean one."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._callbacks: list[Callable] = []
        self._cancelled = False

    def invocation_metadata(self):
        return self._context.invocation_metadata()

    def add_done_callback(self, callback: Callable) -> None:
        self._callbacks.append(callback)

    def cancelled(self) -> bool:
        return self._cancelled

    async def read(self):
        data = await self._context.read()
        return grpc.aio.EOF if data is EOF else pb2.ProcessingRequest.FromString(data)

    async def write(self, response) -> None:
        await self._context.write(response.SerializeToString())

    async def abort(self, status: Status) -> None:
        await self._context.abort(status, "not so")

    async def serve(self, stub: StubService) -> None:
        try:
            await stub.Process(None, self)
        except asyncio.CancelledError:
            self._cancelled = True
            raise
        finally:
            for callback in self._callbacks:
                callback(self)


@contextlib.asynccontextmanager
async def lean_bench(*, unix_path: str | None = None, **settings) -> AsyncIterator[tuple[Bench, Server]]:
    """As `envoy_stub.bench`, with the other server."""
    async with (
        Engine().run() as prefill,
        Engine().run() as decode,
        httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False) as client,
    ):
        stub = StubService(prefill.endpoint, decode.endpoint)
        server = Server()
        server.add_coroutine(wire.METHOD, lambda context: StubContext(context).serve(stub))
        relay = Relay(await server.listen("127.0.0.1", 0))
        await relay.start()
        if unix_path:
            await server.listen_unix(unix_path)
        config = Config(
            host="127.0.0.1", port=free_port(), grpc_port=relay.port, transport="grpcio", **settings
        )  # so that the stub can tell legs apart
        target = f"unix:{unix_path}" if unix_path else f"127.0.0.1:{relay.port}"
        try:
            async with EnvoyProcess(
                to_yaml(bootstrap(config, admin="127.0.0.1:0", grpc_target=target)), concurrency=1
            ) as envoy:
                url = f"http://127.0.0.1:{config.port}"
                yield Bench(prefill, decode, stub, relay, envoy, url, client), server
        finally:
            relay.cut()
            await server.stop(0)


@pytest.mark.parametrize("size", [13, 1_000_000, 20_000_000])
@pytest.mark.parametrize("socket", ["tcp", "unix"])
def test_each_leg_gets_its_own_body(size: int, socket: str, tmp_path) -> None:
    async def scenario() -> None:
        async with lean_bench(unix_path=str(tmp_path / "s") if socket == "unix" else None) as (b, server):
            body = b'{"a":"' + b"x" * (size - 8) + b'"}'
            for room in (1000, 1001):
                response = await b.post(body)
                assert response.status_code == 200
                for leg, engine in (("prefill", b.prefill), ("decode", b.decode)):
                    call = await engine.call(room - 1000)
                    assert call.body == body[:-1] + f', "leg": "{leg}", "room": {room}}}'.encode()
            async with asyncio.timeout(PATIENCE_S):
                for stream in b.service.streams:
                    await stream.ended.wait()
            assert server.connections

    run(scenario())


def test_a_client_that_leaves_cancels_the_stream() -> None:
    async def scenario() -> None:
        async with lean_bench() as (b, _):
            b.decode.behave = never
            request = asyncio.create_task(b.post())
            stream = await b.service.stream("route")
            await stream.until("answered request_body")
            request.cancel()
            async with asyncio.timeout(PATIENCE_S):
                await stream.ended.wait()
            assert stream.events[-1].startswith(("CancelledError", "EOF", "done-callback"))

    run(scenario())


def test_a_hundred_requests_at_once() -> None:
    async def scenario() -> None:
        async with lean_bench() as (b, server):
            bodies = [json.dumps({"prompt": str(number) * number}).encode() for number in range(1, 101)]
            responses = await asyncio.gather(*(b.post(body) for body in bodies))
            assert [response.status_code for response in responses] == [200] * 100
            assert sorted(stream.body for stream in b.service.of("route")) == sorted(bodies)
            assert server.connections == 1

    run(scenario())


@pytest.mark.parametrize("status", [Status.OK, Status.INVALID_ARGUMENT])
def test_a_call_that_the_service_ends_harms_no_other(status: Status) -> None:
    """Trailers and RST_STREAM at once, while Envoy's side is still open."""

    async def scenario() -> None:
        async with lean_bench() as (b, server):

            async def end(_stub, stream, kind, _request):
                if kind == "request_body":
                    await stream.context.abort(status)

            b.service.override = end
            # After OK Envoy goes on without the service, but knows no worker then.
            assert (await b.post()).status_code == 503
            b.service.override = None
            assert (await b.post()).status_code == 200
            assert server.connections == 1

    run(scenario())


def test_a_drain_lets_the_exchange_finish_and_envoy_comes_back() -> None:
    async def scenario() -> None:
        async with lean_bench() as (b, server):
            released = asyncio.Event()

            async def slow(call):
                await released.wait()
                return await answer(call)

            answer, b.decode.behave = b.decode.behave, slow
            request = asyncio.create_task(b.post())
            stream = await b.service.stream("route")
            await stream.until("answered request_body")
            await b.decode.call()
            (connection,) = server._connections
            connection.drain()
            b.decode.behave = answer
            # On the old connection or, as Envoy has read GOAWAY, on a new one.
            assert (await b.post()).status_code == 200
            released.set()
            assert (await request).status_code == 200
            assert stream.response_headers[":status"] == "200"

    run(scenario())
