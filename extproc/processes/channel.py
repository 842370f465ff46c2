"""One end of the socket between the leader and a follower.

Not an asyncio transport: what has come is read when it is wanted, right before a request is placed, however much else
the event loop has to do first. And it wakes the process `QUIET_S` apart at most: else each of a request's changes would
wake every other process for a few microseconds' work (docs/processes.md).
"""

import asyncio
import logging
import socket
from collections.abc import Callable

import msgspec

from extproc.processes.messages import Message, Unframer, decode, frame

logger = logging.getLogger(__name__)

QUIET_S = 0.005
"""After something was heard, nothing wakes the process for so long. Metrics, health and drains can wait as long."""
MAX_UNSENT_BYTES = 64 << 20
"""Of a peer that does not read: minutes of changes at thousands of requests a second. More than that, and it hangs."""
READ_BYTES = 256 << 10


class Channel:
    """Whole messages, in order, until one end closes or dies. Nothing is said after that."""

    def __init__(
        self, connection: socket.socket, received: Callable[[Message], None], lost: Callable[[], None]
    ) -> None:
        """`connection` belongs to the channel then. `received`: of each message; `lost`: once, when no more will come.

        Needs a running event loop.
        """
        connection.setblocking(False)
        self._connection = connection
        self._received = received
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._unframer = Unframer()
        self._unsent = bytearray()
        self._closing = False
        self._closed = asyncio.Event()
        self._quiet: asyncio.TimerHandle | None = None
        self._loop.add_reader(connection, self._readable)

    @property
    def is_closed(self) -> bool:
        """Whether no more messages come."""
        return self._closed.is_set()

    async def closed(self) -> None:
        """Return when no more messages come."""
        await self._closed.wait()

    def send(self, message: Message) -> None:
        """Send a message; never blocks."""
        self.send_frame(frame(message))

    def send_frame(self, framed: bytes) -> None:
        """The same with one that is framed already."""
        if self._closing or self.is_closed:
            return
        if self._unsent:
            self._unsent += framed
            if len(self._unsent) > MAX_UNSENT_BYTES:
                logger.error("a process does not read what the others tell it: giving it up")
                self._end()
            return
        sent = self._write(framed)
        if sent < len(framed) and not self.is_closed:
            self._unsent += framed[sent:]
            self._loop.add_writer(self._connection, self._writable)

    def poll(self) -> None:
        """Take what has come, now."""
        while not self.is_closed:
            try:
                data = self._connection.recv(READ_BYTES)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data = b""
            if not data:
                self._end()
                return
            self._take(data)
            if len(data) < READ_BYTES:
                return

    def close(self) -> None:
        """Close when everything is sent."""
        self._closing = True
        if not self._unsent:
            self._end()

    # Inside

    def _readable(self) -> None:
        self.poll()
        if not self.is_closed:
            self._loop.remove_reader(self._connection)
            self._quiet = self._loop.call_later(QUIET_S, self._loop.add_reader, self._connection, self._readable)

    def _take(self, data: bytes) -> None:
        try:
            for message in self._unframer.feed(data):
                self._received(decode(message))
        except msgspec.MsgspecError:
            # Both ends are of one program; what one cannot read, the other should not have said.
            logger.exception("a bug: a message of another process cannot be read; giving it up")
            self._end()
        except Exception:
            logger.exception("a bug; a message of another process is the last one taken from it")
            self._end()

    def _writable(self) -> None:
        del self._unsent[: self._write(self._unsent)]
        if not self._unsent and not self.is_closed:
            self._loop.remove_writer(self._connection)
            if self._closing:
                self._end()

    def _write(self, data: bytes | bytearray) -> int:
        try:
            return self._connection.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:  # the other end is gone
            self._end()
            return 0

    def _end(self) -> None:
        if self.is_closed:
            return
        self._closed.set()
        if self._quiet is not None:
            self._quiet.cancel()
        self._loop.remove_reader(self._connection)
        self._loop.remove_writer(self._connection)
        self._connection.close()
        self._loop.call_soon(self._lost)  # not in the middle of whatever was sending or placing
