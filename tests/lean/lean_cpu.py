"""CPU of the server a stream: the lean one's two seams against `grpc.aio`, the same echo under the same client.

    python tests/lean/lean_cpu.py [streams]

Each server is a process of its own on uvloop. A stream is four messages, one of them 2 KB, each answered by one; 16 at
once on one connection. Rounds are interleaved, so that what else the machine does falls on all alike.
"""

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import grpc.aio
import uvloop

from extproc.lean.coroutines import EOF
from extproc.lean.server import Server

SERVERS = ("grpc.aio", "coroutine", "callback")
MESSAGES = (bytes(400), bytes(2000), bytes(180), bytes(40))
ECHO, CPU = "/bench.Echo/Echo", "/bench.Echo/Cpu"
AT_ONCE = 16
ROUNDS = 4


class Echo:
    """On the callback seam."""

    def on_open(self, stream):
        pass

    def on_message(self, stream, message):
        stream.write(message)

    def on_end(self, stream):
        stream.finish()

    def on_reset(self, stream):
        pass


async def echo(context):
    while (message := await context.read()) is not EOF:
        await context.write(message)


async def cpu(context):
    await context.write(str(time.process_time()).encode())


async def grpc_echo(_requests, context):
    while (message := await context.read()) is not grpc.aio.EOF:
        await context.write(message)


async def grpc_cpu(_request, _context):
    return str(time.process_time()).encode()


async def serve(kind: str) -> None:
    if kind == "grpc.aio":
        server = grpc.aio.server()
        handlers = {
            "Echo": grpc.stream_stream_rpc_method_handler(grpc_echo),
            "Cpu": grpc.unary_unary_rpc_method_handler(grpc_cpu),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
    else:
        server = Server()
        server.add_coroutine(CPU, cpu)
        if kind == "callback":
            server.add(ECHO, Echo())
        else:
            server.add_coroutine(ECHO, echo)
        port = await server.listen("127.0.0.1", 0)
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until the parent closes it


@contextlib.asynccontextmanager
async def running(kind: str) -> AsyncIterator[grpc.aio.Channel]:
    command = [sys.executable, __file__, "serve", kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # noqa: ASYNC220 - at once
        try:
            port = int(await asyncio.to_thread(process.stdout.readline))
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield channel
        finally:
            process.stdin.close()


async def one(channel: grpc.aio.Channel) -> None:
    call = channel.stream_stream(ECHO)()
    for message in MESSAGES:
        await call.write(message)
        assert await call.read() == message
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


async def many(channel: grpc.aio.Channel, count: int) -> float:
    """CPU seconds that the server spent on so many streams."""

    async def some() -> None:
        for _ in range(count // AT_ONCE):
            await one(channel)

    before = float(await channel.unary_unary(CPU)(b""))
    await asyncio.gather(*(some() for _ in range(AT_ONCE)))
    return float(await channel.unary_unary(CPU)(b"")) - before


async def compare(streams: int) -> dict[str, float]:
    """CPU microseconds a stream, by server."""
    streams = max(streams // AT_ONCE, 1) * AT_ONCE
    spent_s = dict.fromkeys(SERVERS, 0.0)
    async with contextlib.AsyncExitStack() as stack:
        channels = {kind: await stack.enter_async_context(running(kind)) for kind in SERVERS}
        for channel in channels.values():
            await many(channel, AT_ONCE)
        for _ in range(ROUNDS):
            for kind, channel in channels.items():
                spent_s[kind] += await many(channel, streams)
    return {kind: value / streams / ROUNDS * 1e6 for kind, value in spent_s.items()}


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        uvloop.run(serve(sys.argv[2]))
    else:
        figures = asyncio.run(compare(int(sys.argv[1]) if len(sys.argv) > 1 else 1000))
        for name, figure in figures.items():
            print(f"{name:10} {figure:7.1f} us a stream   {figure / figures['grpc.aio']:.2f} of grpc.aio")
