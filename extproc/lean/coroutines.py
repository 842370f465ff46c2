"""Methods written as coroutines: a task a call, reading and writing messages as with `grpc.aio`."""

import asyncio
import functools
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn

from extproc.lean.grpc import Metadata, Status, Stream

logger = logging.getLogger(__name__)

HIGH_WATER_BYTES = 1 << 16
"""A writer waits while more than this is queued on its stream: asyncio's own default for a transport."""


class EndOfMessages:
    """The type of `EOF`."""

    def __repr__(self) -> str:
        return "EOF"


EOF: Final = EndOfMessages()
"""What `read` gives when no message will come any more. Falsy it is not: an empty message is."""


class Aborted(Exception):
    """Unwinds a handler that has called `abort`."""


Handler = Callable[["Context"], Awaitable[None]]
"""Serves one call. Its return ends the call with OK; it is cancelled when the call is over before its time."""


class Context:
    """One call, as its handler sees it: the part of `grpc.aio.ServicerContext` that is of use here."""

    __slots__ = ("_ended", "_messages", "_reader", "_stream", "task")

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._messages: deque[bytes] = deque()
        self._ended = False
        self._reader: asyncio.Future[None] | None = None
        self.task: asyncio.Task[None]
        """The handler's."""

    def invocation_metadata(self) -> Metadata:
        """Metadata of the call."""
        return self._stream.metadata

    async def read(self) -> bytes | EndOfMessages:
        """The next message, or `EOF` when the client has ended its side or the call is over."""
        while not self._messages:
            if self._ended:
                return EOF
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        message = self._messages.popleft()
        self._stream.release(len(message))
        return message

    async def write(self, message: bytes) -> None:
        """Send a message; waits while the client takes none. One for a call that is over is dropped."""
        stream = self._stream
        if stream.write(message) and stream.queued_bytes > HIGH_WATER_BYTES:
            taken = asyncio.get_running_loop().create_future()
            stream.when_taken(functools.partial(_wake, taken))
            await taken

    async def abort(self, code: int, details: str = "") -> NoReturn:
        """End the call with an error, and the handler with it."""
        self._stream.finish(Status(code), details)
        raise Aborted(details)

    # For the receiver

    def put(self, message: bytes) -> None:
        """A message came."""
        self._messages.append(message)
        self._stream.hold(len(message))
        self._wake_reader()

    def end(self) -> None:
        """None will come any more."""
        self._ended = True
        self._wake_reader()

    def _wake_reader(self) -> None:
        if self._reader is not None:
            _wake(self._reader)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Coroutines:
    """A receiver that runs a handler for each call."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop itself keeps weak references only

    def on_open(self, stream: Stream) -> None:
        """Start the handler."""
        context = stream.state = Context(stream)
        task = context.task = asyncio.get_running_loop().create_task(self._run(stream, context))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def on_message(self, stream: Stream, message: bytes) -> None:
        """Give it to the handler."""
        stream.state.put(message)

    def on_end(self, stream: Stream) -> None:
        """The handler reads EOF once it has read all messages."""
        stream.state.end()

    def on_reset(self, stream: Stream) -> None:
        """Cancel the handler."""
        context: Context = stream.state
        context.end()
        context.task.cancel()

    async def finished(self) -> None:
        """Return when every handler has."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _run(self, stream: Stream, context: Context) -> None:
        try:
            await self._handler(context)
        except Aborted:
            pass
        except asyncio.CancelledError:
            stream.finish(Status.CANCELLED)
            raise
        except Exception:
            logger.exception("%s failed", stream.request.path)
            stream.finish(Status.UNKNOWN, "internal error")
        else:
            stream.finish()
