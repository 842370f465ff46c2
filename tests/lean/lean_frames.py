"""The client's side of the wire for tests: frames by hand, and the `h2` package as the end that keeps the rules."""

import struct

import h2.config
import h2.connection
import hpack

from extproc.lean.http2 import Connection, Limits

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITISED = 1, 1, 4, 8, 32
REQUEST = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/t/Echo"),
    (b":authority", b"localhost"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
)


def frame(kind: int, flags: int = 0, stream_id: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream_id) + payload


def block(fields=REQUEST) -> bytes:
    """A block that leaves the tables as they are: every field marked as never indexed."""
    encoder = hpack.Encoder()
    return encoder.encode([hpack.NeverIndexedHeaderTuple(*field) for field in fields])


def headers(stream_id: int = 1, fields=REQUEST, flags: int = END_HEADERS) -> bytes:
    return frame(HEADERS, flags, stream_id, block(fields))


def data(stream_id: int, payload: bytes, flags: int = 0) -> bytes:
    return frame(DATA, flags, stream_id, payload)


def settings(**values: int) -> bytes:
    """SETTINGS; names as `id_4=value`."""
    return frame(SETTINGS, payload=b"".join(struct.pack(">HI", int(k[3:]), v) for k, v in values.items()))


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def message(payload: bytes, flag: int = 0) -> bytes:
    """With gRPC's prefix."""
    return struct.pack(">BI", flag, len(payload)) + payload


HELLO = PREFACE + settings()
"""What every client starts with."""


def parse(sent: bytes) -> list[tuple[int, int, int, bytes]]:
    """Frames as (type, flags, stream, payload)."""
    frames = []
    while sent:
        length = int.from_bytes(sent[:3], "big")
        kind, flags = sent[3], sent[4]
        frames.append((kind, flags, int.from_bytes(sent[5:9], "big"), sent[9 : 9 + length]))
        assert len(sent) >= 9 + length
        sent = sent[9 + length :]
    return frames


class Clock:
    """Seconds, moved by hand."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def connection(clock=None, **limits) -> Connection:
    """A server that has sent its greeting."""
    made = Connection(lambda fields: fields, Limits(**limits), clock or Clock())
    made.data_to_send()
    return made


def drained(made) -> bytes:
    """All it has to send."""
    parts = []
    while part := made.data_to_send():
        parts.append(part)
    return b"".join(parts)


def client() -> h2.connection.H2Connection:
    """The other end, by the `h2` package, which checks what it is sent; its preface is ready to be sent."""
    config = h2.config.H2Configuration(client_side=True, header_encoding="utf-8")
    made = h2.connection.H2Connection(config)
    made.initiate_connection()
    return made
