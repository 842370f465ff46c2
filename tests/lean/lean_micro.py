"""What the lean server costs without sockets and without its handlers: bytes of a connection as Envoy 1.40 makes them.

    python tests/lean/lean_micro.py [--profile]

A stream is what an ext_proc stream is: one header block (all but :path from the table, as Envoy's encoder has it),
request headers, a 2 KB body and response headers, a message and a frame each, and RST_STREAM; three answers. "Together"
are 16 streams' frames in each read, "alone" one frame in each.
"""

import asyncio
import cProfile
import pstats
import sys
import time

import hpack
import uvloop
from lean_frames import DATA, END_HEADERS, HEADERS, HELLO, RST_STREAM, frame, message, u32

from extproc.lean.coroutines import EOF
from extproc.lean.server import Server, _Connection

PATH = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
FIELDS = (
    (":method", "POST"),
    hpack.NeverIndexedHeaderTuple(":path", PATH),
    (":authority", "extproc"),
    (":scheme", "http"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
    ("x-envoy-internal", "true"),
    ("x-forwarded-for", "127.0.0.1"),
)
MESSAGE_BYTES = (388, 2023, 177)
ANSWER = bytes(120)
STREAMS = 3200
TOGETHER = 16


class Receiver:
    """On the callback seam."""

    def on_open(self, stream):
        pass

    def on_message(self, stream, _message):
        stream.write(ANSWER)

    def on_end(self, stream):
        stream.finish()

    def on_reset(self, stream):
        pass


async def handler(context):
    while await context.read() is not EOF:
        await context.write(ANSWER)


class Nowhere:
    """A transport that takes everything."""

    def get_extra_info(self, _name):
        return None

    def write(self, data):
        pass

    def abort(self):
        pass


def reads(together: int) -> list[bytes]:
    """What the server reads, piece by piece."""
    encoder = hpack.Encoder()
    pieces = [HELLO]
    for first in range(0, STREAMS, together):
        ids = [2 * number + 1 for number in range(first, first + together)]
        steps = [[frame(HEADERS, END_HEADERS, stream_id, encoder.encode(FIELDS)) for stream_id in ids]]
        steps += [[frame(DATA, 0, stream_id, message(bytes(size))) for stream_id in ids] for size in MESSAGE_BYTES]
        steps.append([frame(RST_STREAM, 0, stream_id, u32(2)) for stream_id in ids])
        # Envoy sends the header block and the first message in one go.
        pieces += [b"".join(steps[0] + steps[1]), *map(b"".join, steps[2:])]
    return pieces


async def measure(seam: str, together: int, profile: cProfile.Profile | None = None) -> float:
    """CPU microseconds a stream, with the event loop's own where there are tasks."""
    server = Server()
    if seam == "callback":
        server.add(PATH, Receiver())
    else:
        server.add_coroutine(PATH, handler)
    connection = _Connection(server)
    connection.connection_made(Nowhere())
    pieces = reads(together)
    start = time.process_time()
    if profile is not None:
        profile.enable()
    for piece in pieces:
        connection.data_received(piece)
        if seam == "coroutine":
            await asyncio.sleep(0)
            await asyncio.sleep(0)
    if profile is not None:
        profile.disable()
    spent = time.process_time() - start
    connection.connection_lost(None)
    return spent / STREAMS * 1e6


async def main() -> None:
    for seam in ("callback", "coroutine"):
        for together in (TOGETHER, 1):
            best = min([await measure(seam, together) for _ in range(5)])
            print(f"{seam:10} {'together' if together > 1 else 'alone':9} {best:6.1f} us a stream")


if __name__ == "__main__":
    if "--profile" in sys.argv:
        profile = cProfile.Profile()
        asyncio.run(measure("callback", TOGETHER, profile))
        pstats.Stats(profile).sort_stats("tottime").print_stats(20)
    else:
        uvloop.run(main())
