"""The floor: an ext_proc service that decides nothing, on the same transport and behind the same Envoy configuration.

It answers the same messages with the same mutations as the real one: headers, and bodies that are longer by as many
bytes. What it sends is encoded beforehand; of what comes it looks at the kind of the message and, in a body, at where
it begins. Run as a program it is a gateway: `python perf_floor.py TRANSPORT PREFILL DECODE FLAGS...`.
"""

import asyncio
import signal
import sys
import tempfile
from collections.abc import Iterable

import uvloop

from extproc import envoy_config, wire
from extproc.config import Config, build
from extproc.envoy_process import EnvoyProcess
from extproc.events import Answer, Phase
from extproc.model import Pick, Placement, Role, Worker
from extproc.mutation import MODE, mutate, request_headers
from extproc.parse import parse
from extproc.request import Endpoint
from extproc.service import Outlet
from extproc.transport import TRANSPORTS

REQUEST_HEADERS, RESPONSE_HEADERS, REQUEST_BODY, RESPONSE_TRAILERS = 0x12, 0x1A, 0x22, 0x3A
"""First byte of a ProcessingRequest: the field of its `request`, length-delimited. Envoy writes fields in order."""
ROOM = 1 << 62
METHOD = b":method"
"""Envoy names it on the route leg alone."""


class NoOp:
    """A `Processor`. A stream's call is its outlet."""

    def __init__(self, prefill: Worker, decode: Worker) -> None:
        self._placement = Placement(Pick(prefill, 0), Pick(decode, 0), ROOM)
        self._go_on = wire.encode(Answer(Phase.REQUEST_HEADERS))
        self._response = wire.encode(Answer(Phase.RESPONSE_HEADERS))
        self._trailers = wire.encode(Answer(Phase.RESPONSE_TRAILERS))
        self._around: dict[int, tuple[tuple[bytes, bytes], tuple[bytes, bytes]]] = {}
        """By a body's length: what stands before and behind it in decode's answer, and in prefill's."""
        self._body = b""
        """The last one: bodies of a run are of one length, so it stands for any."""

    def opened(self, metadata: Iterable[tuple[str, str | bytes]], outlet: Outlet) -> Outlet:
        """A stream was opened."""
        return outlet

    def received(self, outlet: Outlet, data: bytes) -> bool:
        """A message came."""
        kind = data[0]
        if kind == REQUEST_BODY:
            start, length = _field(data, 0)  # HttpBody
            start, length = _field(data, start)  # its body
            self._body = body = data[start : start + length - 1]  # without the closing brace
            before, behind = self._prepared(body)[0]
            outlet.write(before + body + behind)
        elif kind == REQUEST_HEADERS:
            if METHOD in data:
                outlet.write(self._go_on)
            else:
                before, behind = self._prepared(self._body)[1]
                outlet.write(before + self._body + behind)
        elif kind == RESPONSE_HEADERS:
            outlet.write(self._response)
        elif kind == RESPONSE_TRAILERS:
            outlet.write(self._trailers)
        else:
            raise wire.WireError(f"a message that begins with {kind:#x}")
        return True

    def ended(self, outlet: Outlet) -> None:
        """A stream is over."""

    def logged(self, data: bytes) -> None:
        """An access log came."""

    def _prepared(self, body: bytes) -> tuple[tuple[bytes, bytes], tuple[bytes, bytes]]:
        known = self._around.get(len(body))
        if known is None:
            known = self._around[len(body)] = self._prepare(body)
        return known

    def _prepare(self, body: bytes) -> tuple[tuple[bytes, bytes], tuple[bytes, bytes]]:
        whole = body + b"}"
        made = mutate(parse(Endpoint.CHAT, whole), self._placement, whole)
        decode = Answer(
            Phase.REQUEST_BODY,
            set_headers=request_headers(self._placement),
            body=made.decode_body,
            pick_route_again=True,
        )
        prefill = Answer(Phase.REQUEST_HEADERS, set_headers=((MODE, "prefill"),), body=made.prefill_body)
        return _split(wire.encode(decode), body), _split(wire.encode(prefill), body)


def _split(message: bytes, body: bytes) -> tuple[bytes, bytes]:
    before, _, behind = message.partition(body)
    return before, behind


def _field(data: bytes, at: int) -> tuple[int, int]:
    """Where the content of the length-delimited field at `at` begins, and its length."""
    at += 1
    length = shift = 0
    while data[at] & 0x80:
        length |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
    return at + 1, length | data[at] << shift


async def serve(config: Config, transport_name: str) -> None:
    """Until SIGTERM. As `extproc up` does it: over a Unix socket."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    prefill, decode = (
        next(worker for worker in config.workers() if worker.role is role) for role in (Role.PREFILL, Role.DECODE)
    )
    with tempfile.TemporaryDirectory(prefix="floor-") as directory:
        transport = TRANSPORTS[transport_name](NoOp(prefill, decode), config.max_payload_size, None)
        target = await transport.listen(f"unix:{directory}/ext_proc.sock")
        bootstrap = envoy_config.bootstrap(config, admin="127.0.0.1:0", grpc_target=target)
        async with EnvoyProcess(envoy_config.to_yaml(bootstrap)):
            await stop.wait()
        await transport.stop()


def main(words: list[str]) -> None:
    """Run until SIGTERM."""
    transport, port, prefill, decode = words
    workers = {"prefill": [{"url": prefill, "bootstrap_port": 8998}], "decode": [{"url": decode}]}
    uvloop.run(serve(build(workers, {"host": "127.0.0.1", "port": int(port)}), transport))


if __name__ == "__main__":
    main(sys.argv[1:])
