"""A scripted ext_proc service and toy engines, to try the data plane without the real service.

`Bench` starts both, and a real Envoy with the generated bootstrap between them. Every ext_proc stream is recorded as
the list of what the servicer saw, in order, ending with how the stream ended.
"""

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field

import grpc
import httpx
from aiohttp import web
from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2 as mode_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb2
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as pb2_grpc
from google.protobuf.message import Message

from extproc.config import Config
from extproc.demo.stack import free_port
from extproc.envoy_config import bootstrap, to_yaml
from extproc.envoy_process import EnvoyProcess

PATIENCE_S = 15
"""How long a test waits for what must happen: an upper bound for a busy machine, never a measure."""


def run(scenario: Coroutine[None, None, None]) -> None:
    """Run one test's coroutine to its end, or fail when it hangs."""

    async def bounded() -> None:
        async with asyncio.timeout(4 * PATIENCE_S):
            await scenario

    asyncio.run(bounded())


async def soon(event: asyncio.Event) -> None:
    """Wait for an event that must happen."""
    async with asyncio.timeout(PATIENCE_S):
        await event.wait()


GRPC_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)]


@dataclass
class Stream:
    """One ext_proc stream as the service saw it."""

    leg: str
    context: grpc.aio.ServicerContext
    events: list[str] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    response_headers: dict[str, str] = field(default_factory=dict)
    response_body: bytes | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def note(self, event: str) -> None:
        self.events.append(event)
        self.changed.set()

    async def until(self, event: str) -> None:
        """Wait for an event that starts like this."""
        async with asyncio.timeout(PATIENCE_S):
            while not any(seen.startswith(event) for seen in self.events):
                self.changed.clear()
                await self.changed.wait()

    async def say(self, response: Message) -> None:
        """Answer, in turn or out of it. One at a time: grpc.aio refuses a write while another is under way."""
        async with self.writing:
            await self.context.write(response)


def set_headers(**headers: str) -> pb2.HeaderMutation:
    mutation = pb2.HeaderMutation()
    for name, value in headers.items():
        option = mutation.set_headers.add()
        option.header.key = name.replace("_", "-")
        option.header.raw_value = value.encode()
        option.append_action = option.OVERWRITE_IF_EXISTS_OR_ADD
    return mutation


def immediate(status: int, message: str, **headers: str) -> pb2.ProcessingResponse:
    body = json.dumps({"error": {"message": message}}).encode()
    response = pb2.ProcessingResponse()
    response.immediate_response.status.code = status
    response.immediate_response.body = body
    response.immediate_response.details = "stub"
    response.immediate_response.headers.CopyFrom(set_headers(content_type="application/json", **headers))
    return response


Answer = Callable[["StubService", Stream, str, Message], Awaitable[pb2.ProcessingResponse | None]]


class StubService(pb2_grpc.ExternalProcessorServicer):
    """Sends every POST to the two given endpoints, with a body of its own to each; everything else directly."""

    def __init__(self, prefill: str, decode: str) -> None:
        self.prefill = prefill
        self.decode = decode
        self.streams: list[Stream] = []
        self.rooms = itertools.count(1000)
        self.opened = asyncio.Event()
        self.bodies: dict[str, bytes] = {}
        """What the client sent, by room."""
        self.override: Answer | None = None
        """Asked first, before the defaults below; None leaves the answer to them."""

    def of(self, leg: str) -> list[Stream]:
        return [stream for stream in self.streams if stream.leg == leg]

    async def stream(self, leg: str, index: int = 0) -> Stream:
        """The index-th stream of a leg, once it is there."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.of(leg)) <= index:
                self.opened.clear()
                await self.opened.wait()
        return self.of(leg)[index]

    async def Process(self, requests, context):  # noqa: N802 - the name in the protocol
        metadata = dict(context.invocation_metadata())
        stream = Stream(leg="prefill" if "x-pd-room" in metadata else "route", context=context)
        self.streams.append(stream)
        self.opened.set()
        context.add_done_callback(lambda ended: stream.note(f"done-callback cancelled={ended.cancelled()}"))
        try:
            while True:
                request = await context.read()
                if request is grpc.aio.EOF:
                    stream.note(f"EOF cancelled={context.cancelled()}")
                    break
                kind = request.WhichOneof("request")
                self._record(stream, kind, request)
                answer = self.override and await self.override(self, stream, kind, request)
                if answer is None:
                    answer = getattr(self, f"on_{kind}")(stream, request)
                if answer is not NOTHING:
                    await stream.say(answer)
                    stream.note(f"answered {kind}")
        except asyncio.CancelledError:
            stream.note(f"CancelledError cancelled={context.cancelled()}")
            raise
        except BaseException as error:
            stream.note(f"{type(error).__name__}: {error}")
        finally:
            stream.ended.set()

    def _record(self, stream: Stream, kind: str, request: pb2.ProcessingRequest) -> None:
        part = getattr(request, kind)
        if kind.endswith("headers"):
            headers = {h.key: h.raw_value.decode() for h in part.headers.headers}
            if kind == "request_headers":
                stream.headers = headers
            else:
                stream.response_headers = headers
            stream.note(f"{kind} status={headers.get(':status')} end_of_stream={part.end_of_stream}")
        elif kind.endswith("body"):
            if kind == "request_body":
                stream.body = part.body
            else:
                stream.response_body = part.body
            stream.note(f"{kind} {len(part.body)}B end_of_stream={part.end_of_stream}")
        else:
            stream.note(kind)

    def on_request_headers(self, stream: Stream, request: pb2.ProcessingRequest) -> pb2.ProcessingResponse:
        response = pb2.ProcessingResponse()
        common = response.request_headers.response
        if stream.leg == "prefill":
            common.status = common.CONTINUE_AND_REPLACE
            common.body_mutation.body = self.body_for("prefill", stream.headers["x-pd-room"])
            common.header_mutation.CopyFrom(set_headers(x_pd_mode="prefill"))
        elif stream.headers[":method"] != "POST":
            common.header_mutation.CopyFrom(set_headers(x_pd_mode="direct", x_pd_decode_endpoint=self.decode))
            common.clear_route_cache = True
            response.mode_override.response_header_mode = mode_pb2.ProcessingMode.SEND
            response.mode_override.request_body_mode = mode_pb2.ProcessingMode.NONE
        else:
            response.request_headers.SetInParent()
        return response

    def on_request_body(self, stream: Stream, request: pb2.ProcessingRequest) -> pb2.ProcessingResponse:
        room = str(next(self.rooms))
        self.bodies[room] = stream.body
        response = pb2.ProcessingResponse()
        common = response.request_body.response
        common.body_mutation.body = self.body_for("decode", room)
        common.clear_route_cache = True
        common.header_mutation.CopyFrom(
            set_headers(
                x_pd_mode="pd",
                x_pd_room=room,
                x_pd_prefill_endpoint=self.prefill,
                x_pd_decode_endpoint=self.decode,
                content_length=str(len(common.body_mutation.body)),
            )
        )
        return response

    def on_response_headers(self, stream: Stream, request: pb2.ProcessingRequest) -> pb2.ProcessingResponse:
        response = pb2.ProcessingResponse()
        response.response_headers.SetInParent()
        return response

    def on_response_body(self, stream: Stream, request: pb2.ProcessingRequest) -> pb2.ProcessingResponse:
        response = pb2.ProcessingResponse()
        response.response_body.SetInParent()
        return response

    def on_response_trailers(self, stream: Stream, request: pb2.ProcessingRequest) -> pb2.ProcessingResponse:
        response = pb2.ProcessingResponse()
        response.response_trailers.SetInParent()
        return response

    def body_for(self, leg: str, room: str) -> bytes:
        """What the real service does in spirit: the client's bytes with fields spliced in, other ones for each leg."""
        return self.bodies[room][:-1] + f', "leg": "{leg}", "room": {room}}}'.encode()


NOTHING = object()
"""What an `override` returns to stay silent."""


@dataclass
class Call:
    """One request that reached a toy engine."""

    request: web.BaseRequest
    body: bytes = b""
    received: asyncio.Event = field(default_factory=asyncio.Event)
    """The whole body is here."""
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """Envoy closed the connection before the answer was complete."""
    port: int = 0
    """Envoy's end of the connection."""


Behave = Callable[[Call], Awaitable[web.StreamResponse]]


async def answer_ok(call: Call) -> web.StreamResponse:
    return web.json_response({"ok": True})


async def never(call: Call) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def reset(call: Call) -> web.StreamResponse:
    abort(call)
    return await never(call)


def abort(call: Call) -> None:
    """Reset the connection: RST instead of FIN."""
    call.request.transport.abort()


class Engine:
    """An HTTP/1.1 server whose `behave` answers each request."""

    def __init__(self, behave: Behave = answer_ok) -> None:
        self.behave = behave
        self.calls: list[Call] = []
        self.arrived = asyncio.Event()
        self.endpoint = ""

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator["Engine"]:
        server = web.Server(self._serve, handler_cancellation=True)
        runner = web.ServerRunner(server, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.endpoint = "{}:{}".format(*runner.addresses[0][:2])
        try:
            yield self
        finally:
            await runner.cleanup()

    async def call(self, index: int = 0) -> Call:
        """The index-th request, once its body is here."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.calls) <= index:
                self.arrived.clear()
                await self.arrived.wait()
            await self.calls[index].received.wait()
        return self.calls[index]

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        call = Call(request, port=request.transport.get_extra_info("peername")[1])
        self.calls.append(call)
        self.arrived.set()
        try:
            call.body = await request.content.read()
            call.received.set()
            return await self.behave(call)
        except (asyncio.CancelledError, ConnectionError):
            call.gone.set()
            raise


async def sse(call: Call, chunks: AsyncIterator[bytes]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(call.request)
    async for chunk in chunks:
        await response.write(chunk)
    return response


class Relay:
    """A TCP hop that can be cut: every connection reset and new ones refused, as when the process behind is killed."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        if self._server:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self._to)
        self._writers += [writer, back_writer]
        await asyncio.gather(self._pump(reader, back_writer), self._pump(back_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()


@dataclass
class Bench:
    """Service, engines and Envoy, all running."""

    prefill: Engine
    decode: Engine
    service: StubService
    relay: Relay
    envoy: EnvoyProcess
    url: str
    client: httpx.AsyncClient

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    async def post(self, body: bytes = b'{"prompt": 1}', **kwargs) -> httpx.Response:
        return await self.client.post(f"{self.url}/generate", content=body, **kwargs)


@contextlib.asynccontextmanager
async def bench(*, http2: bool = False, **settings) -> AsyncIterator[Bench]:
    """Everything running, with `settings` on top of the defaults of `Config`."""
    async with (
        Engine().run() as prefill,
        Engine().run() as decode,
        httpx.AsyncClient(timeout=PATIENCE_S, http1=not http2, http2=http2, trust_env=False) as client,
    ):
        service = StubService(prefill.endpoint, decode.endpoint)
        server = grpc.aio.server(options=GRPC_OPTIONS)
        pb2_grpc.add_ExternalProcessorServicer_to_server(service, server)
        relay = Relay(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        await relay.start()
        config = Config(host="127.0.0.1", port=free_port(), grpc_port=relay.port, transport="grpcio", **settings)
        text = to_yaml(bootstrap(config, admin="127.0.0.1:0"))
        try:
            async with EnvoyProcess(text, concurrency=1) as envoy:
                yield Bench(prefill, decode, service, relay, envoy, f"http://127.0.0.1:{config.port}", client)
        finally:
            relay.cut()
            await server.stop(0)
