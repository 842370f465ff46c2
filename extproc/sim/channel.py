"""The line between a decode and a prefill engine: small messages over one WebSocket on the bootstrap port.

It stands for the engines' ZeroMQ sockets and RDMA transfers, and like their heartbeats its end tells each side that the
other is gone. Messages that are sent in the same moment go out in one frame.
"""

import asyncio
from collections.abc import Callable

import msgspec
from aiohttp import ClientWebSocketResponse, WSMsgType, web


class Message(msgspec.Struct, array_like=True):
    """`op` is one of the constants below; `rank` is the prefill rank at which decode looks for the room."""

    op: str
    rank: int
    room: int
    reason: str = ""


WANT = "want"  # decode → prefill: memory is allocated, write here
SENT = "sent"  # prefill → decode: the KV cache is written
TAKEN = "taken"  # decode → prefill: got it
DROP = "drop"  # decode → prefill: no longer wanted
FAILED = "failed"  # prefill → decode: it will never come

_decoder = msgspec.json.Decoder(list[Message])


class Channel:
    """One end of the line. `send` never waits; `run` carries messages until either side closes."""

    def __init__(self, socket: ClientWebSocketResponse | web.WebSocketResponse) -> None:
        self._socket = socket
        self._outbox: list[Message] = []
        self._filled = asyncio.Event()
        self.open = True

    def send(self, message: Message) -> None:
        """Queue a message; without effect once the line is closed."""
        if self.open:
            self._outbox.append(message)
            self._filled.set()

    async def run(self, receive: Callable[[Message], None]) -> None:
        """Call `receive` for each message that comes; returns when the line is closed."""
        writer = asyncio.create_task(self._write())
        try:
            async for frame in self._socket:
                if frame.type is not WSMsgType.BINARY:
                    break
                for message in _decoder.decode(frame.data):
                    receive(message)
        finally:
            self.open = False
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            await self._socket.close()

    async def _write(self) -> None:
        while True:
            await self._filled.wait()
            self._filled.clear()
            batch, self._outbox = self._outbox, []
            await self._socket.send_bytes(msgspec.json.encode(batch))
