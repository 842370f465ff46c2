"""gRPC over `http2`, without I/O: messages in and out, statuses, deadlines.

Rules: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md. Not served: compression, a server's metadata.
A method is a `Receiver`, called from within `GrpcConnection.receive` as bytes come in; it answers through the `Stream`.
"""

import base64
import binascii
import enum
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Any, Final, Protocol
from urllib.parse import quote

from extproc.lean.fields import Fields, encode_block
from extproc.lean.http2 import (
    Connection,
    ConnectionEnded,
    DataReceived,
    Limits,
    RequestReceived,
    StreamReset,
    TrailersReceived,
)

logger = logging.getLogger(__name__)

_PREFIX: Final = Struct(">BL")
"""Compressed flag and length, in front of each message."""
_prefix: Final = _PREFIX.pack
_unpack_prefix: Final = _PREFIX.unpack_from
PREFIX_BYTES: Final = _PREFIX.size

COPIED_BYTES: Final = 1 << 14
"""Messages up to here are put behind their prefix; longer ones are sent apart from it, to save the copy."""
MAX_TIMEOUT_S: Final = 365 * 24 * 3600.0
"""Longer ones are no deadline: clients write "forever" as a very large number."""
MAX_DETAILS_BYTES: Final = 2048
"""Of a status; a client drops trailers beyond its header limit, 8 KiB in most."""

LOW_WATER_BYTES: Final = 1 << 14
"""Queued on a stream, when its writer may go on."""

_UNITS_S: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TIMEOUT: Final = re.compile(r"(\d{1,8})([HMSmun])", re.ASCII)
_NOT_METADATA: Final = frozenset({"te", "content-type", "grpc-timeout", "grpc-encoding", "grpc-accept-encoding"})

Metadata = Sequence[tuple[str, str | bytes]]
"""Names in lower case; values of names in -bin are bytes."""


class Status(enum.IntEnum):
    """Status codes: https://github.com/grpc/grpc/blob/master/doc/statuscodes.md."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


_GRPC: Final = ((b":status", b"200"), (b"content-type", b"application/grpc"))
_HEADERS: Final = encode_block(_GRPC)
_TRAILERS_OK: Final = encode_block([(b"grpc-status", b"0")])
_NOT_GRPC: Final = encode_block([(b":status", b"415")])
_NOT_POST: Final = encode_block([(b":status", b"405"), (b"allow", b"POST")])


class Timer(Protocol):
    """What a scheduled call can be called off with."""

    def cancel(self) -> object:
        """Call it off."""


class Receiver(Protocol):
    """A method. All calls for one stream come in order; `on_end` or `on_reset` comes once, unless it was finished."""

    def on_open(self, stream: "Stream") -> None:
        """A call was made; `stream.state` is the receiver's own."""

    def on_message(self, stream: "Stream", message: bytes) -> None:
        """A message came."""

    def on_end(self, stream: "Stream") -> None:
        """The client has sent all it wants to. The stream stays open until `finish`, or `on_reset`."""

    def on_reset(self, stream: "Stream") -> None:
        """The stream is gone: reset, connection lost, deadline passed, or a mistake of the client's. The last call."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a header block asks for."""

    path: str
    receiver: Receiver | None
    refusal: bytes
    """The header block to answer with where there is no receiver."""
    metadata: Metadata = ()
    timeout_s: float | None = None


class Stream:
    """One call, as its receiver sees it."""

    __slots__ = (
        "_answered",
        "_connection",
        "_granted",
        "_held",
        "_partial",
        "_timer",
        "_uncredited",
        "_wanted",
        "id",
        "open",
        "request",
        "state",
    )

    def __init__(self, connection: "GrpcConnection", stream_id: int, request: Request) -> None:
        self.id = stream_id
        self.request = request
        self.state: Any = None
        """The receiver's own."""
        self.open = True
        """Whether something may be written."""
        self._connection = connection
        self._answered = False
        self._partial: bytearray | None = None
        """Received bytes of a message that is not complete."""
        self._uncredited = 0
        self._wanted = 0
        """Bytes of the message that is coming in; 0 when none is."""
        self._granted = 0
        """Bytes that are set aside for it."""
        self._held = 0
        self._timer: Timer | None = None

    @property
    def metadata(self) -> Metadata:
        """The call's."""
        return self.request.metadata

    @property
    def queued_bytes(self) -> int:
        """What was written and waits for the client to take it."""
        return self._connection.http2.queued(self.id)

    def write(self, message: bytes) -> bool:
        """Send a message, or queue it. False when the stream is over: it is dropped."""
        if not self.open:
            return False
        connection = self._connection
        http2 = connection.http2
        if not self._answered:
            self._answered = True
            http2.send_headers(self.id, _HEADERS)
        length = len(message)
        if length <= COPIED_BYTES:
            sent = http2.send_data(self.id, _prefix(0, length) + message)
        else:
            sent = http2.send_data(self.id, _prefix(0, length)) and http2.send_data(self.id, message)
        if not sent:  # more is queued than is allowed
            connection.lose(self)
        if not connection.receiving:
            connection.wake()
        return sent

    def finish(self, status: Status = Status.OK, details: str = "") -> None:
        """End the call, after what was written. Nothing is done when it is over already."""
        if self.open:
            connection = self._connection
            connection.forget(self)
            connection.http2.send_trailers(self.id, _trailers(status, details, self._answered))
            if not connection.receiving:
                connection.wake()

    def hold(self, count: int) -> None:
        """A message of `count` bytes waits to be read: the client may fill its window, but gets no more."""
        if self.open:
            self._held += count
            self._connection.buffer(self, count)

    def release(self, count: int) -> None:
        """It was read."""
        if self.open:
            self._held -= count
            connection = self._connection
            connection.buffer(self, -count)
            if not self._held and connection.credit(self) and not connection.receiving:
                connection.wake()

    def when_taken(self, tell: Callable[[], object]) -> None:
        """Call `tell` once when the client has taken most of what is queued, or the stream is over."""
        self._connection.watch(self, tell)


class GrpcConnection:
    """The gRPC server's side of one HTTP/2 connection."""

    def __init__(
        self,
        methods: Mapping[str, Receiver],
        *,
        limits: Limits,
        max_message_bytes: int,
        max_buffered_bytes: int,
        clock: Callable[[], float],
        wake: Callable[[], None],
        call_later: Callable[[float, Callable[[Stream], None], Stream], Timer],
    ) -> None:
        """`methods` by path; `wake` is called when there is something to send that `receive` did not lead to.

        `max_buffered_bytes`: messages that are not complete or not read, on all streams; the stream that goes beyond
        is ended.
        """
        self.http2: Connection[Request] = Connection(self._interpret, limits, clock)
        self.receiving = False
        """`data_to_send` is asked for right after."""
        self.wake = wake
        self._methods = methods
        self._max_message_bytes = max_message_bytes
        self._max_buffered_bytes = max_buffered_bytes
        self._buffered = 0
        self._credit_step = limits.stream_window_bytes >> 1
        # The other half is for what the windows of all streams let in without asking.
        self._max_granted = max(max_buffered_bytes >> 1, max_message_bytes)
        self._granted = 0
        self._waiting: dict[Stream, None] = {}
        """Streams with a large message, in the order they came; they get no more window until there is room."""
        self._taking: set[Stream] = set()
        """Streams whose large message was answered at length: its room is free when the client has taken that."""
        self._call_later = call_later
        self._streams: dict[int, Stream] = {}
        self._lost: list[Stream] = []
        self._watched: dict[Stream, Callable[[], object]] = {}

    @property
    def open_streams(self) -> int:
        """Calls that are not over."""
        return len(self._streams)

    @property
    def buffered_bytes(self) -> int:
        """Of messages that are not complete or not read."""
        return self._buffered

    def receive(self, data: bytes) -> None:
        """Take what the client sent, and call the receivers. Never raises."""
        self.receiving = True
        for event in self.http2.receive(data):
            kind = type(event)
            if kind is DataReceived:
                self._data(event)  # type: ignore[arg-type]
            elif kind is RequestReceived:
                self._request(event)  # type: ignore[arg-type]
            elif isinstance(event, StreamReset):
                self._reset(event.stream_id)
            elif isinstance(event, TrailersReceived):
                stream = self._streams.get(event.stream_id)
                if stream is not None:
                    self._end(stream)
            elif isinstance(event, ConnectionEnded):
                logger.warning("HTTP/2 connection ended with %s: %s", event.code.name, event.reason)
                self.lost()
        if self._lost:
            self._tell_lost()
        self.receiving = False

    def lost(self) -> None:
        """The connection is gone, and every stream with it."""
        for stream_id in list(self._streams):
            self._reset(stream_id)
        self._tell_taken()

    def data_to_send(self) -> bytes:
        """What is to be written next; to be asked until nothing comes."""
        if self._lost:
            self._tell_lost()
        data = self.http2.data_to_send()
        if self._watched or self._taking:
            self._tell_taken()
        return data

    # For streams

    def forget(self, stream: Stream) -> None:
        """A stream is over."""
        stream.open = False
        del self._streams[stream.id]
        self._buffered -= stream._held
        stream._held = 0
        if stream._partial is not None:
            self._buffered -= len(stream._partial)
            stream._partial = None
        if stream._wanted or stream._granted:
            self._waiting.pop(stream, None)
            self._taking.discard(stream)
            self._free(stream)
        if stream._timer is not None:
            stream._timer.cancel()

    def lose(self, stream: Stream) -> None:
        """A stream was reset by what its receiver is doing just now: tell it afterwards."""
        self.forget(stream)
        self._lost.append(stream)

    def buffer(self, stream: Stream, count: int) -> None:
        """Count what is held; a stream that makes it too much is ended."""
        self._buffered += count
        if count > 0 and self._buffered > self._max_buffered_bytes and stream.open:
            stream.finish(Status.RESOURCE_EXHAUSTED, "too many messages wait to be read on this connection")
            self._lost.append(stream)

    def credit(self, stream: Stream) -> bool:
        """Let the client send as much as is not held any more, once it is worth a frame. Whether it was."""
        if stream._uncredited < self._credit_step or not self._grant(stream):
            return False
        self.http2.credit(stream.id, stream._uncredited)
        stream._uncredited = 0
        return True

    def _grant(self, stream: Stream) -> bool:
        """Whether a stream may get on with its message: small, or there is room for all of it.

        Large messages come in one after another when there is no room for all: else each would hold a part of it.
        """
        wanted = stream._wanted
        if stream._granted or wanted <= 2 * self._credit_step:
            return True
        if self._granted + wanted > self._max_granted:
            self._waiting[stream] = None
            return False
        stream._granted = wanted
        self._granted += wanted
        return True

    def _free(self, stream: Stream) -> None:
        """Give the room of a message back, to whoever waits."""
        self._granted -= stream._granted
        stream._granted = stream._wanted = 0
        for waiting in list(self._waiting):
            del self._waiting[waiting]
            if not self.credit(waiting):
                return
        if not self.receiving:
            self.wake()

    def watch(self, stream: Stream, tell: Callable[[], object]) -> None:
        """See `Stream.when_taken`."""
        self._watched[stream] = tell
        if not stream.open:
            self._tell_taken()

    # Events

    def _request(self, event: RequestReceived) -> None:
        request: Request = event.request
        receiver = request.receiver
        if receiver is None:
            self.http2.send_trailers(event.stream_id, request.refusal)
            return
        stream = self._streams[event.stream_id] = Stream(self, event.stream_id, request)
        if request.timeout_s is not None:
            stream._timer = self._call_later(request.timeout_s, self._deadline, stream)
        try:
            receiver.on_open(stream)
        except Exception:
            self._bug(stream)
        if event.ended and stream.open:
            self._end(stream)

    def _data(self, event: DataReceived) -> None:
        stream = self._streams.get(event.stream_id)
        if stream is None:
            return  # finished, but for what is queued
        data = event.data
        length = len(data)
        stream._uncredited += event.charged_bytes
        if stream._partial is None and length >= PREFIX_BYTES:
            prefix: tuple[int, int] = _unpack_prefix(data)
            flag, message_bytes = prefix
            if not flag and message_bytes + PREFIX_BYTES == length and message_bytes <= self._max_message_bytes:
                # One message in one frame: nearly always.
                try:
                    stream.request.receiver.on_message(stream, data[PREFIX_BYTES:])  # type: ignore[union-attr]
                except Exception:
                    self._bug(stream)
                length = 0
        if length:
            self._assemble(stream, data)
        if not stream.open:
            return
        if event.ended:
            self._end(stream)
        elif not stream._held and stream._uncredited >= self._credit_step:
            self.credit(stream)

    def _assemble(self, stream: Stream, data: bytes) -> None:
        """Messages that are split, or several in a frame."""
        partial = stream._partial
        if partial is None:
            partial = stream._partial = bytearray()
        partial += data
        self.buffer(stream, len(data))
        offset = 0
        while stream.open and len(partial) - offset >= PREFIX_BYTES:
            flag, message_bytes = _unpack_prefix(partial, offset)
            if flag:
                self._refuse(stream, Status.UNIMPLEMENTED, "compressed messages are not supported")
                return
            if message_bytes > self._max_message_bytes:
                self._refuse(
                    stream,
                    Status.RESOURCE_EXHAUSTED,
                    f"a message of {message_bytes} bytes is larger than the allowed {self._max_message_bytes}",
                )
                return
            start = offset + PREFIX_BYTES
            offset = start + message_bytes
            if offset > len(partial):
                stream._wanted = message_bytes
                offset = start - PREFIX_BYTES
                break
            message = bytes(memoryview(partial)[start:offset])
            try:
                stream.request.receiver.on_message(stream, message)  # type: ignore[union-attr]
            except Exception:
                self._bug(stream)
        if stream.open:
            self._buffered -= offset
            if offset and stream._granted:
                self._taking.add(stream)
                self._tell_taken()
            if offset == len(partial):
                stream._partial = None
            elif offset:
                del partial[:offset]

    def _end(self, stream: Stream) -> None:
        if stream._partial is not None:
            self._refuse(stream, Status.INTERNAL, "the request ended within a message")
            return
        try:
            stream.request.receiver.on_end(stream)  # type: ignore[union-attr]
        except Exception:
            self._bug(stream)

    def _reset(self, stream_id: int) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None:
            self.forget(stream)
            self._tell(stream)

    def _refuse(self, stream: Stream, status: Status, details: str) -> None:
        stream.finish(status, details)
        self._tell(stream)

    def _deadline(self, stream: Stream) -> None:
        if stream.open:
            self._refuse(stream, Status.DEADLINE_EXCEEDED, "deadline exceeded")

    def _bug(self, stream: Stream) -> None:
        logger.exception("%s failed", stream.request.path)
        if stream.open:
            self._refuse(stream, Status.UNKNOWN, "internal error")

    def _tell_lost(self) -> None:
        lost, self._lost = self._lost, []
        for stream in lost:
            self._tell(stream)

    def _tell_taken(self) -> None:
        for stream in [s for s in self._taking if s.queued_bytes <= LOW_WATER_BYTES]:
            self._taking.discard(stream)
            self._free(stream)
        for stream in [s for s in self._watched if not s.open or s.queued_bytes <= LOW_WATER_BYTES]:
            self._watched.pop(stream)()

    def _tell(self, stream: Stream) -> None:
        try:
            stream.request.receiver.on_reset(stream)  # type: ignore[union-attr]
        except Exception:
            logger.exception("%s failed", stream.request.path)

    # Header fields

    def _interpret(self, fields: Fields) -> Request:
        """Called once for each different header block."""
        path = ""
        content_type = b""
        timeout: str | None = None
        metadata = list[tuple[str, str | bytes]]()
        for raw_name, raw_value in fields:
            name, value = raw_name.decode("ascii"), raw_value.decode("latin-1")
            if name == ":path":
                path = value
            elif name == ":method":
                if value != "POST":
                    return Request(path, None, _NOT_POST)
            elif name == "content-type":
                content_type = raw_value
            elif name == "grpc-timeout":
                timeout = value
            elif name.endswith("-bin"):
                try:
                    # A list of several values is joined by commas; padding is optional.
                    metadata += [(name, _from_base64(part)) for part in value.split(",")]
                except binascii.Error:
                    return Request(path, None, _trailers(Status.INTERNAL, f"{name} is not base64", answered=False))
            elif name[0] != ":" and name not in _NOT_METADATA:
                metadata.append((name, value))
        if not _is_grpc(content_type):
            return Request(path, None, _NOT_GRPC)
        receiver = self._methods.get(path)
        if receiver is None:
            return Request(path, None, _trailers(Status.UNIMPLEMENTED, f"unknown method {path}", answered=False))
        timeout_s = None
        if timeout is not None:
            match = _TIMEOUT.fullmatch(timeout)
            if not match:
                return Request(path, None, _trailers(Status.INTERNAL, "malformed grpc-timeout", answered=False))
            timeout_s = int(match[1]) * _UNITS_S[match[2]]
            if timeout_s > MAX_TIMEOUT_S:
                timeout_s = None
        return Request(path, receiver, b"", tuple(metadata), timeout_s)


def _is_grpc(content_type: bytes) -> bool:
    return content_type.startswith(b"application/grpc") and content_type[16:17] in (b"", b"+", b";")


def _from_base64(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def _trailers(status: Status, details: str, answered: bool) -> bytes:
    """The header block that ends a call; of a call that was not answered yet, the only one (Trailers-Only)."""
    if answered and status == Status.OK:
        return _TRAILERS_OK
    fields = [] if answered else list(_GRPC)
    fields.append((b"grpc-status", b"%d" % status))
    if status == Status.UNIMPLEMENTED:
        fields.append((b"grpc-accept-encoding", b"identity"))
    if details:
        # Percent-encoding of all but printable ASCII, without "%".
        text = quote(details.encode()[:MAX_DETAILS_BYTES], safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~")
        fields.append((b"grpc-message", text.encode()))
    return encode_block(fields)
