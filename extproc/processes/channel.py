"""One end of the socket between the leader and a follower."""

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import cast

import msgspec

from extproc.processes.messages import Message, Unframer, decode, frame

logger = logging.getLogger(__name__)

MAX_UNSENT_BYTES = 64 << 20
"""Of a peer that does not read: minutes of changes at thousands of requests a second. More than that, and it hangs."""


class Channel(asyncio.Protocol):
    """Whole messages, in order, until one end closes or dies. Nothing is said after that."""

    def __init__(self, received: "Callable[[Channel, Message], None]", lost: Callable[[], None]) -> None:
        """`received`: of each message, which can come before `open` returns; `lost`: once, when no more will come."""
        self._received = received
        self._lost = lost
        self._unframer = Unframer()
        self._transport: asyncio.Transport | None = None
        self._closed = asyncio.Event()

    @classmethod
    async def open(
        cls, connection: socket.socket, received: "Callable[[Channel, Message], None]", lost: Callable[[], None]
    ) -> "Channel":
        """Over a connected socket, which belongs to the channel then."""
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_unix_connection(lambda: cls(received, lost), sock=connection)
        return channel

    def send(self, message: Message) -> None:
        """Send a message; never blocks."""
        self.send_frame(frame(message))

    def send_frame(self, framed: bytes) -> None:
        """The same with one that is framed already."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        transport.write(framed)
        if transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            logger.error("a process does not read what the others tell it: giving it up")
            transport.abort()

    def close(self) -> None:
        """Close when everything is sent."""
        if self._transport is not None:
            self._transport.close()

    @property
    def is_closed(self) -> bool:
        """Whether no more messages come."""
        return self._closed.is_set()

    async def closed(self) -> None:
        """Return when no more messages come."""
        await self._closed.wait()

    # For asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclasses of it

    def data_received(self, data: bytes) -> None:
        """Some bytes."""
        assert self._transport is not None  # noqa: S101 - made
        try:
            for message in self._unframer.feed(data):
                self._received(self, decode(message))
        except msgspec.MsgspecError:
            # Both ends are of one program; what one cannot read, the other should not have said.
            logger.exception("a bug: a message of another process cannot be read; giving it up")
            self._transport.abort()
        except Exception:
            logger.exception("a bug; a message of another process is the last one taken from it")
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The other end is gone, or this one closed."""
        self._closed.set()
        self._lost()
