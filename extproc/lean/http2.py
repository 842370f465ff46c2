"""HTTP/2 for a server, without I/O (RFC 9113; section numbers below are its): bytes in → events, calls → bytes out.

Two rules. Nothing the peer sends raises: a mistake is answered with RST_STREAM or GOAWAY and told as an event. And
nothing it sends grows without a bound: every buffer has its limit in `Limits`, but for `unsent_frames`.

A stream's life, for a server that never pushes (5.1):

    idle ──HEADERS──▶ open ──END_STREAM──▶ half-closed (remote) ──our trailers──▶ closed
                       └──────our trailers, then RST_STREAM(NO_ERROR) (8.1)─────────▶ closed
    and from anywhere RST_STREAM, either way, ▶ closed.

Idle and closed streams have no object: higher identifiers than the highest seen are idle, the others closed.
"""

import enum
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import Any, Final, Generic

from extproc.lean.fields import BlockDecoder, BlockError, Fields, Meaning, TooManyFields, check_trailers

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""3.4"""

DATA: Final = 0x0
HEADERS: Final = 0x1
PRIORITY: Final = 0x2
RST_STREAM: Final = 0x3
SETTINGS: Final = 0x4
PUSH_PROMISE: Final = 0x5
PING: Final = 0x6
GOAWAY: Final = 0x7
WINDOW_UPDATE: Final = 0x8
CONTINUATION: Final = 0x9
"""Frame types (6)."""

END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
PRIORITISED: Final = 0x20
"""Frame flags (6)."""

HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = (
    range(1, 7)
)
"""Settings (6.5.2)."""

DEFAULT_WINDOW_BYTES: Final = (1 << 16) - 1
MAX_WINDOW_BYTES: Final = (1 << 31) - 1
MIN_FRAME_BYTES: Final = 1 << 14
MAX_FRAME_BYTES: Final = (1 << 24) - 1
MAX_STREAM_ID: Final = (1 << 31) - 1
HEADER_TABLE_BYTES: Final = 4096
"""6.5.2, 6.9.1, 4.1. The dynamic table keeps its default size."""

HEADER_BYTES: Final = 9

MAX_BLOCK_FRAMES: Final = 64
"""HEADERS and CONTINUATION frames of one block: many more than the largest needs."""
REMEMBERED: Final = 512
"""Closed streams of which is known how they were closed: this many at least, and up to twice as many."""
WRITE_BYTES: Final = 1 << 18
"""About as much is handed to the transport at a time; the rest waits in its stream, where it is counted."""
RESET_WEIGHT: Final = 10
"""A request that is reset before it was answered, in frames that lead nowhere: it costs about as much more."""
DRAIN_PING: Final = b"draining"

_HEADER: Final = Struct(">HBBBL")
_SETTING: Final = Struct(">HL")
_U32: Final = Struct(">L")
_header: Final = _HEADER.pack
_unpack_header: Final = _HEADER.unpack_from
_unpack_u32: Final = _U32.unpack_from


class Code(enum.IntEnum):
    """Error codes (7)."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


@dataclass(frozen=True, slots=True)
class Limits:
    """What a peer may make this side hold or do, for one connection."""

    max_streams: int = 4096
    """Open at once (SETTINGS_MAX_CONCURRENT_STREAMS); Envoy opens a further connection beyond that."""
    stream_window_bytes: int = 1 << 18
    """Received on a stream and not yet credited. Not below 65,535, so that it holds before the peer knows of it."""
    connection_window_bytes: int = 1 << 24
    """Credited as it comes: memory is bounded by stream. Of a size that it never slows anything."""
    max_frame_bytes: int = MIN_FRAME_BYTES
    max_header_bytes: int = 1 << 14
    """One header block, as sent and as decoded (SETTINGS_MAX_HEADER_LIST_SIZE); grpcio's own limit."""
    max_stream_queued_bytes: int = 1 << 27
    """Waiting on a stream for the peer to take it: two of the largest messages. Beyond that it is reset."""
    max_queued_bytes: int = 1 << 28
    """The same on all streams together. The stream that goes beyond is reset."""
    max_idle_frames: int = 10_000
    """A second, of frames that lead nowhere: PING, SETTINGS, PRIORITY, empty DATA, unknown ones, and requests reset at
    once (`RESET_WEIGHT`). A few µs each, so a flood costs some per cent of a core and then its connection."""


# Events. Not frozen, as that makes each dearer by half a microsecond. Those that are many have their own `__init__`:
# one that `dataclass` makes is not compiled.


@dataclass(slots=True, init=False)
class RequestReceived:
    """A stream was opened."""

    stream_id: int
    request: Any
    """What `interpret` made of the header fields; the same object for the same block."""
    ended: bool
    """Nothing else will come on the stream."""

    def __init__(self, stream_id: int, request: Any, ended: bool) -> None:
        self.stream_id = stream_id
        self.request = request
        self.ended = ended


@dataclass(slots=True, init=False)
class DataReceived:
    """Part of the request's body."""

    stream_id: int
    data: bytes
    charged_bytes: int
    """What it counts for flow control: to be given back with `credit` when it is no longer held."""
    ended: bool

    def __init__(self, stream_id: int, data: bytes, charged_bytes: int, ended: bool) -> None:
        self.stream_id = stream_id
        self.data = data
        self.charged_bytes = charged_bytes
        self.ended = ended


@dataclass(slots=True)
class TrailersReceived:
    """The request ended with header fields."""

    stream_id: int
    fields: Fields


@dataclass(slots=True, init=False)
class StreamReset:
    """A stream is over before its time: by the peer, or here because of what it sent."""

    stream_id: int
    code: int
    by_peer: bool

    def __init__(self, stream_id: int, code: int, by_peer: bool) -> None:
        self.stream_id = stream_id
        self.code = code
        self.by_peer = by_peer


@dataclass(slots=True)
class ConnectionEnded:
    """Nothing will be received any more, and every stream is gone: the peer broke the rules."""

    code: Code
    reason: str


@dataclass(slots=True)
class PeerLeaves:
    """The peer sent GOAWAY: it opens no more streams."""

    code: int


Event = RequestReceived | DataReceived | TrailersReceived | StreamReset | ConnectionEnded | PeerLeaves


class _ConnectionFault(Exception):
    """Ends the connection (5.4.1)."""

    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class _StreamFault(Exception):
    """Ends one stream (5.4.2)."""

    def __init__(self, stream_id: int, code: Code) -> None:
        super().__init__(stream_id, code)
        self.stream_id = stream_id
        self.code = code


class _Stream:
    """An open or half-closed stream."""

    __slots__ = ("answered", "expected", "id", "queue", "queued", "ready", "remote_ended", "send_window", "trailers",
                 "uncredited")  # fmt: skip

    def __init__(self, stream_id: int, send_window: int, expected: int | None, remote_ended: bool) -> None:
        self.id = stream_id
        self.remote_ended = remote_ended
        """Half-closed (remote)."""
        self.expected = expected
        """Bytes that content-length still promises."""
        self.send_window = send_window
        """May be negative (6.9.2)."""
        self.uncredited = 0
        """Bytes received that were not given back."""
        self.answered = False
        self.queue: deque[memoryview] | None = None
        """What could not be sent at once; None when nothing ever was."""
        self.queued = 0
        """Its bytes."""
        self.trailers: bytes | None = None
        """To be sent after the queue."""
        self.ready = False
        """Is in the connection's `_ready`."""


class Connection(Generic[Meaning]):
    """The server's side of one connection."""

    def __init__(self, interpret: Callable[[Fields], Meaning], limits: Limits, clock: Callable[[], float]) -> None:
        """`interpret` turns header fields into what `RequestReceived` carries; `clock` counts seconds."""
        if not DEFAULT_WINDOW_BYTES <= limits.stream_window_bytes <= MAX_WINDOW_BYTES:
            raise ValueError("stream_window_bytes must be 65,535 at least")
        if not DEFAULT_WINDOW_BYTES < limits.connection_window_bytes <= MAX_WINDOW_BYTES:
            raise ValueError("connection_window_bytes must be above 65,535")
        if not MIN_FRAME_BYTES <= limits.max_frame_bytes <= MAX_FRAME_BYTES:
            raise ValueError("max_frame_bytes must be 16,384 at least")
        self.limits = limits
        self._clock = clock
        self._decoder = BlockDecoder(limits.max_header_bytes, interpret)
        self._streams: dict[int, _Stream] = {}
        self._highest = 0
        """Identifier of the newest stream."""
        self._last: int | None = None
        """What the final GOAWAY named: later streams are ignored (6.8)."""
        self._draining = False
        """The first GOAWAY of two was sent."""
        self._peer_left = False
        self._closed = False
        # Which streams ended how, in two generations: True when the peer had ended it, so nothing may follow.
        self._past: dict[int, bool] = {}
        self._older_past: dict[int, bool] = {}

        # Receiving
        self._rest = b""
        self._greeted = False
        self._awaited: tuple[int, int] | None = (SETTINGS, 0)
        """Type and stream of the only frame that may come: at the start (3.4), and within a header block (4.3)."""
        self._block: list[bytes] = []
        self._block_bytes = 0
        self._block_ends = False
        """END_STREAM of the block under way."""
        self._uncredited = 0
        self._idle_frames = 0
        self._idle_since = clock()

        # Sending
        self._send_window = DEFAULT_WINDOW_BYTES
        self._stream_send_window = DEFAULT_WINDOW_BYTES
        self._max_send_frame = MIN_FRAME_BYTES
        self._shrink_table = False
        """The next block has to start with a table size update (RFC 7541 4.2)."""
        self._ready: deque[_Stream] = deque()
        """Streams with something queued and a window, sent from in turn."""
        self._queued = 0
        """Bytes queued on all streams."""
        self._out: list[bytes | memoryview] = []
        self._out_bytes = 0
        """Data bytes in `_out`."""
        self._data_frames = 0
        """DATA frames sent since the last look at idle frames: the peer may send two WINDOW_UPDATE for each."""

        settings = [
            (MAX_CONCURRENT_STREAMS, limits.max_streams),
            (INITIAL_WINDOW_SIZE, limits.stream_window_bytes),
            (MAX_FRAME_SIZE, limits.max_frame_bytes),
            (MAX_HEADER_LIST_SIZE, limits.max_header_bytes),
        ]
        self._frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*setting) for setting in settings))
        self._frame(WINDOW_UPDATE, 0, 0, _U32.pack(limits.connection_window_bytes - DEFAULT_WINDOW_BYTES))

    # What the owner asks

    @property
    def done(self) -> bool:
        """What `data_to_send` still gives is the last."""
        return self._closed or (not self._streams and (self._peer_left or self._last is not None))

    @property
    def greeted(self) -> bool:
        """The client's preface came."""
        return self._greeted

    @property
    def open_streams(self) -> int:
        """Streams that are not closed."""
        return len(self._streams)

    @property
    def queued_bytes(self) -> int:
        """What waits for the peer to take it, on all streams."""
        return self._queued

    def queued(self, stream_id: int) -> int:
        """What waits for the peer to take it, in bytes; 0 for a stream that is closed."""
        stream = self._streams.get(stream_id)
        return stream.queued if stream is not None else 0

    @property
    def unsent_frames(self) -> int:
        """What `data_to_send` has ready. The owner stops receiving while it is high, as frames ask for frames."""
        return len(self._out)

    @property
    def held_bytes(self) -> int:
        """Received bytes of a frame or header block that is not complete."""
        return len(self._rest) + self._block_bytes

    # Receiving

    def receive(self, data: bytes) -> list[Event]:
        """What the peer sent next means. Never raises."""
        events: list[Event] = []
        if self._closed:
            return events
        if self._rest:
            data = self._rest + data
        try:
            self._receive(data, events)
        except _ConnectionFault as fault:
            self._fail(fault.code, str(fault))
            events.append(ConnectionEnded(fault.code, str(fault)))
        return events

    def _receive(self, data: bytes, events: list[Event]) -> None:
        offset = 0
        size = len(data)
        if not self._greeted:
            if not data.startswith(PREFACE):
                if not PREFACE.startswith(data):
                    raise _ConnectionFault(Code.PROTOCOL_ERROR, "not an HTTP/2 preface")
                self._rest = data
                return
            self._greeted = True
            offset = len(PREFACE)
        max_frame_bytes = self.limits.max_frame_bytes
        while size - offset >= HEADER_BYTES:
            # Named with its type: numbers of any type are objects in what is compiled.
            header: tuple[int, int, int, int, int] = _unpack_header(data, offset)
            high, low, kind, flags, stream_id = header
            length = high << 8 | low
            if length > max_frame_bytes:
                raise _ConnectionFault(Code.FRAME_SIZE_ERROR, "frame above SETTINGS_MAX_FRAME_SIZE")
            start = offset + HEADER_BYTES
            offset = start + length
            if offset > size:
                offset = start - HEADER_BYTES
                break
            stream_id &= MAX_STREAM_ID
            if self._awaited is not None and self._awaited != (kind, stream_id):
                raise _ConnectionFault(Code.PROTOCOL_ERROR, "another frame was due")
            try:
                if kind == DATA:
                    self._data(flags, stream_id, data[start:offset], events)
                elif kind == HEADERS:
                    self._headers(flags, stream_id, data[start:offset], events)
                elif kind <= CONTINUATION:
                    _RECEIVE[kind](self, flags, stream_id, data[start:offset], events)
                else:  # unknown frames are ignored (5.5)
                    self._idle_frame()
            except _StreamFault as fault:
                self._stop(fault, events)
        self._rest = data[offset:]

    def _data(self, flags: int, stream_id: int, data: bytes, events: list[Event]) -> None:
        """6.1"""
        length = charged = len(data)
        self._uncredited += length
        if self._uncredited > self.limits.connection_window_bytes >> 1:
            if self._uncredited > self.limits.connection_window_bytes:
                raise _ConnectionFault(Code.FLOW_CONTROL_ERROR, "connection window exceeded")
            self._frame(WINDOW_UPDATE, 0, 0, _U32.pack(self._uncredited))
            self._uncredited = 0
        if flags & PADDED:
            data = _unpad(data)
            length = len(data)
        stream = self._streams.get(stream_id)
        if stream is None:
            self._expect_past(stream_id)
            self._idle_frame()
            if self._ended_by_peer(stream_id):
                raise _StreamFault(stream_id, Code.STREAM_CLOSED)
            return
        if stream.remote_ended:
            raise _StreamFault(stream_id, Code.STREAM_CLOSED)
        stream.uncredited += charged
        if stream.uncredited > self.limits.stream_window_bytes:
            raise _StreamFault(stream_id, Code.FLOW_CONTROL_ERROR)
        ended = flags & END_STREAM != 0
        if stream.expected is not None:
            stream.expected -= length
            if stream.expected < 0 or (ended and stream.expected):
                raise _StreamFault(stream_id, Code.PROTOCOL_ERROR)  # not what content-length said (8.1.1)
        if ended:
            stream.remote_ended = True
        elif not length:
            self._idle_frame()
            if charged:
                self.credit(stream_id, charged)
            return
        events.append(DataReceived(stream_id, data, charged, ended))

    def _headers(self, flags: int, stream_id: int, data: bytes, events: list[Event]) -> None:
        """6.2"""
        if not stream_id & 1:
            raise _ConnectionFault(Code.PROTOCOL_ERROR, "HEADERS on a stream that is not a client's")
        if flags & PADDED:
            data = _unpad(data)
        if flags & PRIORITISED:
            if len(data) < 5:
                raise _ConnectionFault(Code.FRAME_SIZE_ERROR, "HEADERS too short for its priority")
            data = data[5:]
        if flags & END_HEADERS:
            self._block_complete(stream_id, data, flags & END_STREAM != 0, events)
            return
        self._awaited = (CONTINUATION, stream_id)
        self._block_ends = flags & END_STREAM != 0
        self._add_to_block(data)

    def _continuation(self, flags: int, stream_id: int, data: bytes, events: list[Event]) -> None:
        """6.10"""
        if self._awaited is None:
            raise _ConnectionFault(Code.PROTOCOL_ERROR, "CONTINUATION of nothing")
        self._add_to_block(data)
        if flags & END_HEADERS:
            block = b"".join(self._block)
            self._block, self._block_bytes, self._awaited = [], 0, None
            self._block_complete(stream_id, block, self._block_ends, events)

    def _add_to_block(self, data: bytes) -> None:
        self._block.append(data)
        self._block_bytes += len(data)
        if self._block_bytes > self.limits.max_header_bytes or len(self._block) > MAX_BLOCK_FRAMES:
            raise _ConnectionFault(Code.ENHANCE_YOUR_CALM, "header block too long")

    def _block_complete(self, stream_id: int, data: bytes, ended: bool, events: list[Event]) -> None:
        try:
            # Always, whatever becomes of the stream: the next block builds on it (4.3).
            block = self._decoder.decode(data)
        except BlockError as error:
            raise _ConnectionFault(Code.COMPRESSION_ERROR, str(error)) from None
        except TooManyFields as too_many:  # not `error`: a name has one type in what is compiled
            raise _ConnectionFault(Code.ENHANCE_YOUR_CALM, str(too_many)) from None
        if stream_id <= self._highest:
            self._trailers_complete(stream_id, block.fields, ended, events)
            return
        self._highest = stream_id
        if self._last is not None:  # the peer has yet to read the final GOAWAY, and will try elsewhere
            self._idle_frame()
            self._remember(stream_id, ended_by_peer=False)
            return
        if len(self._streams) >= self.limits.max_streams:
            self._idle_frame()
            raise _StreamFault(stream_id, Code.REFUSED_STREAM)  # 5.1.2
        if block.meaning is None or (ended and block.content_length):
            raise _StreamFault(stream_id, Code.PROTOCOL_ERROR)  # malformed (8.1.1)
        self._streams[stream_id] = _Stream(stream_id, self._stream_send_window, block.content_length, ended)
        events.append(RequestReceived(stream_id, block.meaning, ended))

    def _trailers_complete(self, stream_id: int, fields: Fields, ended: bool, events: list[Event]) -> None:
        stream = self._streams.get(stream_id)
        if stream is None:
            ended_by_peer = self._ended_by_peer(stream_id)
            if ended_by_peer is None:
                raise _ConnectionFault(Code.PROTOCOL_ERROR, "stream identifier below an earlier one")  # 5.1.1
            if ended_by_peer:
                raise _ConnectionFault(Code.STREAM_CLOSED, "HEADERS on a closed stream")
            self._idle_frame()
            return
        if stream.remote_ended:
            raise _StreamFault(stream_id, Code.STREAM_CLOSED)
        if not ended or stream.expected or check_trailers(fields):
            raise _StreamFault(stream_id, Code.PROTOCOL_ERROR)
        stream.remote_ended = True
        events.append(TrailersReceived(stream_id, fields))

    def _priority(self, _flags: int, stream_id: int, data: bytes, _events: list[Event]) -> None:
        """6.3: ignored."""
        if not stream_id:
            raise _ConnectionFault(Code.PROTOCOL_ERROR, "PRIORITY on stream 0")
        if len(data) != 5:
            if stream_id > self._highest:  # idle: there is nothing to reset
                raise _ConnectionFault(Code.FRAME_SIZE_ERROR, "PRIORITY of a wrong size")
            raise _StreamFault(stream_id, Code.FRAME_SIZE_ERROR)
        self._idle_frame()

    def _rst_stream(self, _flags: int, stream_id: int, data: bytes, events: list[Event]) -> None:
        """6.4"""
        if len(data) != 4:
            raise _ConnectionFault(Code.FRAME_SIZE_ERROR, "RST_STREAM of a wrong size")
        stream = self._streams.get(stream_id)
        if stream is None:
            self._expect_past(stream_id)
            self._idle_frame()
            return
        if not stream.answered:
            self._idle_frame(RESET_WEIGHT)
        self._close(stream, ended_by_peer=True)
        events.append(StreamReset(stream_id, _unpack_u32(data)[0], by_peer=True))

    def _settings(self, flags: int, stream_id: int, data: bytes, _events: list[Event]) -> None:
        """6.5"""
        if stream_id:
            raise _ConnectionFault(Code.PROTOCOL_ERROR, "SETTINGS on a stream")
        if (flags & ACK and data) or len(data) % _SETTING.size:
            raise _ConnectionFault(Code.FRAME_SIZE_ERROR, "SETTINGS of a wrong size")
        self._idle_frame()
        if flags & ACK:
            if self._awaited is not None:
                raise _ConnectionFault(Code.PROTOCOL_ERROR, "the first SETTINGS is an acknowledgement")
            return
        self._awaited = None
        # Of a setting that comes twice the last value stands: nothing is sent between the two.
        values: dict[int, int] = dict(_SETTING.iter_unpack(data))
        for setting, value in _SETTING.iter_unpack(data):
            if setting == ENABLE_PUSH and value > 1:
                raise _ConnectionFault(Code.PROTOCOL_ERROR, "SETTINGS_ENABLE_PUSH is neither 0 nor 1")
            if setting == INITIAL_WINDOW_SIZE and value > MAX_WINDOW_BYTES:
                raise _ConnectionFault(Code.FLOW_CONTROL_ERROR, "SETTINGS_INITIAL_WINDOW_SIZE above 2^31-1")
            if setting == MAX_FRAME_SIZE and not MIN_FRAME_BYTES <= value <= MAX_FRAME_BYTES:
                raise _ConnectionFault(Code.PROTOCOL_ERROR, "SETTINGS_MAX_FRAME_SIZE out of range")
            if setting == HEADER_TABLE_SIZE and value < HEADER_TABLE_BYTES:
                self._shrink_table = True
        self._max_send_frame = values.get(MAX_FRAME_SIZE, self._max_send_frame)
        if INITIAL_WINDOW_SIZE in values:
            self._change_stream_windows(values[INITIAL_WINDOW_SIZE])
        self._frame(SETTINGS, ACK, 0, b"")

    def _change_stream_windows(self, size: int) -> None:
        """6.9.2"""
        difference = size - self._stream_send_window
        if not difference:
            return
        self._stream_send_window = size
        self._idle_frame(len(self._streams) >> 4)  # a flood of these is dearer
        for stream in self._streams.values():
            stream.send_window += difference
            if stream.send_window > MAX_WINDOW_BYTES:
                raise _ConnectionFault(Code.FLOW_CONTROL_ERROR, "a stream window above 2^31-1")
            self._make_ready(stream)

    def _push_promise(self, _flags: int, _stream_id: int, _data: bytes, _events: list[Event]) -> None:
        """8.4"""
        raise _ConnectionFault(Code.PROTOCOL_ERROR, "PUSH_PROMISE from a client")

    def _ping(self, flags: int, stream_id: int, data: bytes, _events: list[Event]) -> None:
        """6.7"""
        if stream_id:
            raise _ConnectionFault(Code.PROTOCOL_ERROR, "PING on a stream")
        if len(data) != 8:
            raise _ConnectionFault(Code.FRAME_SIZE_ERROR, "PING of a wrong size")
        self._idle_frame()
        if not flags & ACK:
            self._frame(PING, ACK, 0, data)
        elif self._draining and data == DRAIN_PING:
            self.refuse_streams()

    def _goaway(self, _flags: int, stream_id: int, data: bytes, events: list[Event]) -> None:
        """6.8"""
        if stream_id:
            raise _ConnectionFault(Code.PROTOCOL_ERROR, "GOAWAY on a stream")
        if len(data) < 8:
            raise _ConnectionFault(Code.FRAME_SIZE_ERROR, "GOAWAY of a wrong size")
        self._idle_frame()
        self._peer_left = True
        events.append(PeerLeaves(_unpack_u32(data, 4)[0]))

    def _window_update(self, _flags: int, stream_id: int, data: bytes, _events: list[Event]) -> None:
        """6.9"""
        if len(data) != 4:
            raise _ConnectionFault(Code.FRAME_SIZE_ERROR, "WINDOW_UPDATE of a wrong size")
        self._idle_frame()
        increment = _unpack_u32(data)[0] & MAX_WINDOW_BYTES
        if not stream_id:
            if not increment:
                raise _ConnectionFault(Code.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
            self._send_window += increment
            if self._send_window > MAX_WINDOW_BYTES:
                raise _ConnectionFault(Code.FLOW_CONTROL_ERROR, "connection window above 2^31-1")
            return
        stream = self._streams.get(stream_id)
        if stream is None:
            self._expect_past(stream_id)
            return
        if not increment:
            raise _StreamFault(stream_id, Code.PROTOCOL_ERROR)
        stream.send_window += increment
        if stream.send_window > MAX_WINDOW_BYTES:
            raise _StreamFault(stream_id, Code.FLOW_CONTROL_ERROR)
        self._make_ready(stream)

    def _expect_past(self, stream_id: int) -> None:
        """A frame on an idle stream, on stream 0 where it is of no use, or on one that we would have opened (5.1)."""
        if stream_id > self._highest or not stream_id & 1:
            raise _ConnectionFault(Code.PROTOCOL_ERROR, "frame on an idle stream")

    def _ended_by_peer(self, stream_id: int) -> bool | None:
        """Whether the peer had ended a stream that is closed; None when it is not known any more, or never was."""
        ended = self._past.get(stream_id)
        return ended if ended is not None else self._older_past.get(stream_id)

    def _idle_frame(self, weight: int = 1) -> None:
        """Count a frame that leads nowhere."""
        self._idle_frames += weight
        if self._idle_frames > self.limits.max_idle_frames:
            now_s = self._clock()
            allowed = self.limits.max_idle_frames + 2 * self._data_frames
            if now_s - self._idle_since < 1 and self._idle_frames > allowed:
                raise _ConnectionFault(Code.ENHANCE_YOUR_CALM, "too many frames that lead nowhere")
            if now_s - self._idle_since >= 1:
                self._idle_since = now_s
                self._idle_frames = self._data_frames = 0

    # Sending

    def data_to_send(self) -> bytes:
        """What is to be written next, not much more than `WRITE_BYTES`; to be asked until nothing comes."""
        if self._ready:
            self._send_queued()
        out = self._out
        if not out:
            return b""
        data = b"".join(out)
        out.clear()
        self._out_bytes = 0
        return data

    def send_headers(self, stream_id: int, block: bytes) -> bool:
        """Start the answer. False when the stream is closed."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return False
        stream.answered = True
        self._send_block(stream_id, block, 0)
        return True

    def send_data(self, stream_id: int, data: bytes) -> bool:
        """Send now what the windows allow, and the rest when they do. False when the stream is closed, or is now."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.trailers is not None:
            return False
        length = len(data)
        if (
            length <= stream.send_window
            and length <= self._send_window
            and length <= self._max_send_frame
            and not stream.queued
            and self._out_bytes < WRITE_BYTES
        ):
            stream.send_window -= length
            self._send_window -= length
            self._out_bytes += length
            self._data_frames += 1
            self._out += (_header(length >> 8, length & 0xFF, DATA, 0, stream_id), data)
            return True
        limits = self.limits
        if stream.queued + length > limits.max_stream_queued_bytes or self._queued + length > limits.max_queued_bytes:
            self.reset(stream_id, Code.ENHANCE_YOUR_CALM)
            return False
        if stream.queue is None:
            stream.queue = deque()
        stream.queue.append(memoryview(data))
        stream.queued += length
        self._queued += length
        self._make_ready(stream)
        return True

    def send_trailers(self, stream_id: int, block: bytes) -> bool:
        """End the answer once all data is sent; the request too, where it has not ended. False when it is closed."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.trailers is not None:
            return False
        stream.answered = True
        stream.trailers = block
        if not stream.queued:
            self._end(stream, block)
        return True

    def reset(self, stream_id: int, code: Code) -> None:
        """End a stream without an answer; nothing is done when it is closed."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._frame(RST_STREAM, 0, stream_id, _U32.pack(code))
            self._close(stream, ended_by_peer=stream.remote_ended)

    def credit(self, stream_id: int, count: int) -> None:
        """Let the peer send `count` more bytes on a stream: received ones are no longer held."""
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.remote_ended and count:
            stream.uncredited -= count
            self._frame(WINDOW_UPDATE, 0, stream_id, _U32.pack(count))

    def drain(self) -> None:
        """Ask the peer to open no more streams; those on their way are still served (6.8)."""
        if not self._draining and self._last is None and not self._closed:
            self._draining = True
            self._goaway_frame(MAX_STREAM_ID, Code.NO_ERROR)
            self._frame(PING, 0, 0, DRAIN_PING)  # back when the peer has read the GOAWAY

    def refuse_streams(self) -> None:
        """The second half of `drain`, for when the peer does not answer: streams from here on are not served."""
        if self._last is None and not self._closed:
            self._last = self._highest
            self._goaway_frame(self._last, Code.NO_ERROR)

    def close(self) -> None:
        """End everything now."""
        if not self._closed:
            self._fail(Code.NO_ERROR, "")

    def _send_queued(self) -> None:
        """Frames of the streams in turn, so that a large message does not hold the others up."""
        ready = self._ready
        while ready and self._out_bytes < WRITE_BYTES:
            stream = ready[0]
            queue = stream.queue
            if not queue or stream.send_window <= 0:  # closed meanwhile, or has to wait for its window
                ready.popleft().ready = False
                continue
            head = queue[0]
            length = min(len(head), stream.send_window, self._send_window, self._max_send_frame)
            if length <= 0 < len(head):
                return
            if length == len(head):
                queue.popleft()
            else:
                queue[0] = head[length:]
            stream.send_window -= length
            stream.queued -= length
            self._send_window -= length
            self._queued -= length
            self._out_bytes += length
            self._data_frames += 1
            self._out += (_header(length >> 8, length & 0xFF, DATA, 0, stream.id), head[:length])
            if queue:
                ready.rotate(-1)
                continue
            ready.popleft().ready = False
            if stream.trailers is not None:
                self._end(stream, stream.trailers)

    def _make_ready(self, stream: _Stream) -> None:
        if stream.queue and not stream.ready and stream.send_window > 0:
            stream.ready = True
            self._ready.append(stream)

    def _end(self, stream: _Stream, block: bytes) -> None:
        self._send_block(stream.id, block, END_STREAM)
        if not stream.remote_ended:
            # The rest of the request is of no use any more (8.1).
            self._frame(RST_STREAM, 0, stream.id, _U32.pack(Code.NO_ERROR))
        self._close(stream, ended_by_peer=stream.remote_ended)

    def _send_block(self, stream_id: int, block: bytes, flags: int) -> None:
        if self._shrink_table:
            # To nothing, which suits any size; blocks do not use the table anyway.
            self._shrink_table = False
            block = b"\x20" + block
        limit = self._max_send_frame
        kind = HEADERS
        while len(block) > limit:
            self._frame(kind, flags, stream_id, block[:limit])
            kind, flags, block = CONTINUATION, 0, block[limit:]
        self._frame(kind, flags | END_HEADERS, stream_id, block)

    def _goaway_frame(self, last: int, code: Code, reason: str = "") -> None:
        self._frame(GOAWAY, 0, 0, _U32.pack(last) + _U32.pack(code) + reason.encode()[:256])

    def _frame(self, kind: int, flags: int, stream_id: int, data: bytes) -> None:
        length = len(data)
        self._out.append(_header(length >> 8, length & 0xFF, kind, flags, stream_id) + data)

    # Ends

    def _stop(self, fault: _StreamFault, events: list[Event]) -> None:
        """Reset a stream for what the peer sent on it."""
        stream_id, code = fault.stream_id, fault.code
        self._frame(RST_STREAM, 0, stream_id, _U32.pack(code))
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._close(stream, ended_by_peer=stream.remote_ended)
            events.append(StreamReset(stream_id, code, by_peer=False))
        elif self._ended_by_peer(stream_id) is None:  # one that was refused: more of it may be on the way
            self._remember(stream_id, ended_by_peer=False)

    def _close(self, stream: _Stream, ended_by_peer: bool) -> None:
        del self._streams[stream.id]
        self._remember(stream.id, ended_by_peer)
        if stream.queue:
            self._queued -= stream.queued
            stream.queue.clear()  # it may still be in _ready
            stream.queued = 0

    def _remember(self, stream_id: int, ended_by_peer: bool) -> None:
        self._past[stream_id] = ended_by_peer
        if len(self._past) >= REMEMBERED:
            self._older_past, self._past = self._past, {}

    def _fail(self, code: Code, reason: str) -> None:
        self._goaway_frame(self._highest if self._last is None else self._last, code, reason)
        self._closed = True
        self._streams.clear()
        self._ready.clear()
        self._queued = 0
        self._rest = b""
        self._block, self._block_bytes = [], 0


def _unpad(data: bytes) -> bytes:
    """6.1: the first byte says how many to leave off at the end."""
    if not data:
        raise _ConnectionFault(Code.FRAME_SIZE_ERROR, "no room for the pad length")
    end = len(data) - data[0]
    if end < 1:
        raise _ConnectionFault(Code.PROTOCOL_ERROR, "more padding than frame")
    return data[1:end]


_RECEIVE: Final = (
    Connection._data,
    Connection._headers,
    Connection._priority,
    Connection._rst_stream,
    Connection._settings,
    Connection._push_promise,
    Connection._ping,
    Connection._goaway,
    Connection._window_update,
    Connection._continuation,
)
"""By frame type."""
