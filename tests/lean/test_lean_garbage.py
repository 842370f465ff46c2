"""Requests leave nothing to the garbage collector, which is told to look seldom (`extproc.memory`)."""

import asyncio
import gc
import random

from envoy_data_plane.envoy.config.core.v3 import HeaderMap, HeaderValue
from envoy_data_plane.envoy.service.ext_proc.v3 import HttpBody, HttpHeaders, ProcessingRequest
from lean_frames import HELLO, REQUEST, RST_STREAM, Clock, data, frame, headers, message, u32

from extproc.config import Config
from extproc.events import Finished, Outcome
from extproc.exchange import VERDICT_S
from extproc.gateway import Gateway
from extproc.lean.grpc import GrpcConnection
from extproc.lean.http2 import Limits
from extproc.load import LoadTable
from extproc.model import Role, Worker
from extproc.schedule import Scheduler
from extproc.service import ExternalProcessor
from extproc.transport.lean_streams import Streams

METHOD = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
WORKERS = [
    Worker("p:1", Role.PREFILL, "http://p:1", "10.0.1.1:1", "p", 8998, 2),
    Worker("d:1", Role.DECODE, "http://d:1", "10.0.2.1:1", dp_size=2),
]
BODY = b'{"text": "hello"}'
WARM_UP, REQUESTS = 20, 100


def of_headers(kind, fields):
    values = [HeaderValue(key=name, raw_value=value.encode()) for name, value in fields.items()]
    return message(bytes(ProcessingRequest(**{kind: HttpHeaders(headers=HeaderMap(headers=values))})))


POST = of_headers("request_headers", {":method": "POST", ":path": "/generate"})
ANSWER = of_headers("response_headers", {":status": "200"})
SENT = message(bytes(ProcessingRequest(request_body=HttpBody(body=BODY, end_of_stream=True))))


class Side:
    """Envoy's side of a connection."""

    def __init__(self):
        config = Config()
        table = LoadTable(WORKERS, Clock())
        for worker in WORKERS:
            table.worker_changed(worker, True)
        self.gateway = Gateway(config, table, Scheduler(config, table, random.Random(1)), Clock())
        self.finished = list[Finished]()
        self.processor = ExternalProcessor(self.gateway, self.finished.append)
        self.grpc = GrpcConnection(
            {METHOD: Streams(self.processor)},
            limits=Limits(),
            max_message_bytes=1 << 20,
            max_buffered_bytes=1 << 24,
            clock=Clock(),
            wake=lambda: None,
            call_later=asyncio.get_running_loop().call_later,
        )
        self.send(HELLO)
        self._next_id = 1

    def send(self, *frames):
        self.grpc.receive(b"".join(frames))
        while self.grpc.data_to_send():
            pass

    def open(self):
        stream_id, self._next_id = self._next_id, self._next_id + 2
        fields = dict(REQUEST) | {b":path": METHOD.encode()}
        self.send(headers(stream_id, fields.items()))
        return stream_id

    def request(self):
        """One that goes well, from its beginning to the ends of its streams."""
        route = self.open()
        self.send(data(route, POST), data(route, SENT))
        room = str(next(reversed(self.gateway._open)))
        prefill = self.open()
        self.send(data(prefill, of_headers("request_headers", {"x-pd-room": room})))
        self.send(data(prefill, ANSWER), data(route, ANSWER))
        for stream_id in (prefill, route):
            self.send(frame(RST_STREAM, 0, stream_id, u32(8)))


def test_requests_leave_no_garbage():
    async def main():
        side = Side()
        for _ in range(WARM_UP):  # fills what is kept: header blocks, encoded options
            side.request()
        gc.collect()
        gc.disable()
        try:
            for _ in range(REQUESTS):
                side.request()
            async with asyncio.timeout(60):
                await side.processor.idle()  # after the verdict's delay
            assert len(side.finished) == WARM_UP + REQUESTS
            assert {record.outcome for record in side.finished} == {Outcome.OK}
            assert side.gateway.open_rooms == side.processor.open_streams == 0
            # A cycle in each request would be hundreds; what is left are the loop's own, and the protobuf library's.
            assert gc.collect() < REQUESTS // 2
        finally:
            gc.enable()

    assert VERDICT_S < 1
    asyncio.run(main())
