"""HTTP/2 as RFC 9113 says, one table row a rule: what the peer sends → which error, on what."""

import struct

import pytest
from lean_frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    HELLO,
    PADDED,
    PING,
    PREFACE,
    PRIORITISED,
    PRIORITY,
    PUSH_PROMISE,
    REQUEST,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Clock,
    block,
    connection,
    data,
    drained,
    frame,
    headers,
    parse,
    settings,
    u32,
)

from extproc.lean.fields import MAX_CACHED_BLOCK_BYTES, MAX_CACHED_BLOCKS, encode_block
from extproc.lean.http2 import (
    REMEMBERED,
    Code,
    Connection,
    ConnectionEnded,
    DataReceived,
    Limits,
    PeerLeaves,
    RequestReceived,
    StreamReset,
    TrailersReceived,
)

OPEN = headers(1)
ENDED = headers(1, flags=END_HEADERS | END_STREAM)
MAX = (1 << 31) - 1


def without(*names: bytes):
    return tuple(field for field in REQUEST if field[0] not in names)


CONNECTION_ERRORS = {
    "3.4 another preface": (b"PRI * HTTP/1.1\r\n\r\nSM\r\n\r\n", Code.PROTOCOL_ERROR),
    "3.4 HTTP/1": (b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", Code.PROTOCOL_ERROR),
    "3.4 no SETTINGS first": (PREFACE + frame(PING, payload=bytes(8)), Code.PROTOCOL_ERROR),
    "3.4 an acknowledgement first": (PREFACE + frame(SETTINGS, ACK), Code.PROTOCOL_ERROR),
    "4.2 frame too large": (HELLO + frame(PING, payload=bytes(16385)), Code.FRAME_SIZE_ERROR),
    "4.3 HPACK index out of range": (HELLO + frame(HEADERS, END_HEADERS, 1, b"\xff\x7f"), Code.COMPRESSION_ERROR),
    "4.3 HPACK cut off": (HELLO + frame(HEADERS, END_HEADERS, 1, b"\x40\x05ab"), Code.COMPRESSION_ERROR),
    "4.3 HPACK integer without end": (HELLO + frame(HEADERS, END_HEADERS, 1, b"\xff" * 20), Code.COMPRESSION_ERROR),
    "4.3 HPACK table too large": (HELLO + frame(HEADERS, END_HEADERS, 1, b"\x3f\xe2\x1f"), Code.COMPRESSION_ERROR),
    "4.3 HPACK bad Huffman": (HELLO + frame(HEADERS, END_HEADERS, 1, b"\x40\x81\x00\x01a"), Code.COMPRESSION_ERROR),
    "4.3 another frame within a block": (
        HELLO + headers(1, flags=0) + frame(PING, payload=bytes(8)),
        Code.PROTOCOL_ERROR,
    ),
    "4.3 an unknown frame within a block": (HELLO + headers(1, flags=0) + frame(77), Code.PROTOCOL_ERROR),
    "4.3 another stream's CONTINUATION": (
        HELLO + headers(1, flags=0) + frame(CONTINUATION, END_HEADERS, 3),
        Code.PROTOCOL_ERROR,
    ),
    "5.1 idle: DATA": (HELLO + data(1, b"x"), Code.PROTOCOL_ERROR),
    "5.1 idle: RST_STREAM": (HELLO + frame(RST_STREAM, 0, 1, u32(8)), Code.PROTOCOL_ERROR),
    "5.1 idle: WINDOW_UPDATE": (HELLO + frame(WINDOW_UPDATE, 0, 1, u32(8)), Code.PROTOCOL_ERROR),
    "5.1 closed: HEADERS": (HELLO + ENDED + frame(RST_STREAM, 0, 1, u32(8)) + ENDED, Code.STREAM_CLOSED),
    "5.1.1 an even stream": (HELLO + headers(2), Code.PROTOCOL_ERROR),
    "5.1.1 DATA on an even stream": (HELLO + headers(3) + data(2, b"x"), Code.PROTOCOL_ERROR),
    "5.1.1 below an earlier one": (HELLO + headers(5) + headers(3), Code.PROTOCOL_ERROR),
    "6.1 DATA on stream 0": (HELLO + data(0, b"x"), Code.PROTOCOL_ERROR),
    "6.1 more padding than frame": (HELLO + OPEN + frame(DATA, PADDED, 1, b"\x05abcd"), Code.PROTOCOL_ERROR),
    "6.1 no room for the pad length": (HELLO + OPEN + frame(DATA, PADDED, 1), Code.FRAME_SIZE_ERROR),
    "6.2 HEADERS on stream 0": (HELLO + headers(0), Code.PROTOCOL_ERROR),
    "6.2 more padding than frame": (HELLO + frame(HEADERS, END_HEADERS | PADDED, 1, b"\xff\x82"), Code.PROTOCOL_ERROR),
    "6.2 no room for the priority": (
        HELLO + frame(HEADERS, END_HEADERS | PRIORITISED, 1, bytes(4)),
        Code.FRAME_SIZE_ERROR,
    ),
    "6.3 PRIORITY on stream 0": (HELLO + frame(PRIORITY, 0, 0, bytes(5)), Code.PROTOCOL_ERROR),
    "6.3 PRIORITY of 4 bytes, idle": (HELLO + frame(PRIORITY, 0, 1, bytes(4)), Code.FRAME_SIZE_ERROR),
    "6.4 RST_STREAM on stream 0": (HELLO + frame(RST_STREAM, 0, 0, u32(8)), Code.PROTOCOL_ERROR),
    "6.4 RST_STREAM of 3 bytes": (HELLO + OPEN + frame(RST_STREAM, 0, 1, bytes(3)), Code.FRAME_SIZE_ERROR),
    "6.5 SETTINGS on a stream": (HELLO + frame(SETTINGS, 0, 1), Code.PROTOCOL_ERROR),
    "6.5 SETTINGS of 5 bytes": (HELLO + frame(SETTINGS, payload=bytes(5)), Code.FRAME_SIZE_ERROR),
    "6.5 acknowledgement with settings": (HELLO + frame(SETTINGS, ACK, payload=bytes(6)), Code.FRAME_SIZE_ERROR),
    "6.5.2 ENABLE_PUSH 2": (HELLO + settings(id_2=2), Code.PROTOCOL_ERROR),
    "6.5.2 INITIAL_WINDOW_SIZE 2^31": (HELLO + settings(id_4=MAX + 1), Code.FLOW_CONTROL_ERROR),
    "6.5.2 MAX_FRAME_SIZE 16383": (HELLO + settings(id_5=16383), Code.PROTOCOL_ERROR),
    "6.5.2 MAX_FRAME_SIZE 2^24": (HELLO + settings(id_5=1 << 24), Code.PROTOCOL_ERROR),
    "6.6 PUSH_PROMISE": (HELLO + OPEN + frame(PUSH_PROMISE, END_HEADERS, 1, u32(2)), Code.PROTOCOL_ERROR),
    "6.7 PING on a stream": (HELLO + OPEN + frame(PING, 0, 1, bytes(8)), Code.PROTOCOL_ERROR),
    "6.7 PING of 7 bytes": (HELLO + frame(PING, payload=bytes(7)), Code.FRAME_SIZE_ERROR),
    "6.8 GOAWAY on a stream": (HELLO + OPEN + frame(GOAWAY, 0, 1, bytes(8)), Code.PROTOCOL_ERROR),
    "6.8 GOAWAY of 7 bytes": (HELLO + frame(GOAWAY, payload=bytes(7)), Code.FRAME_SIZE_ERROR),
    "6.9 WINDOW_UPDATE of 3 bytes": (HELLO + frame(WINDOW_UPDATE, payload=bytes(3)), Code.FRAME_SIZE_ERROR),
    "6.9 WINDOW_UPDATE of 0": (HELLO + frame(WINDOW_UPDATE, payload=u32(0)), Code.PROTOCOL_ERROR),
    "6.9.1 connection window too large": (HELLO + frame(WINDOW_UPDATE, payload=u32(MAX)), Code.FLOW_CONTROL_ERROR),
    "6.9.2 a stream's window made too large": (
        HELLO + OPEN + frame(WINDOW_UPDATE, 0, 1, u32(MAX - 65535)) + settings(id_4=65536),
        Code.FLOW_CONTROL_ERROR,
    ),
    "6.10 CONTINUATION of nothing": (HELLO + OPEN + frame(CONTINUATION, END_HEADERS, 1), Code.PROTOCOL_ERROR),
    "6.10 CONTINUATION of another stream's": (HELLO + frame(CONTINUATION, END_HEADERS, 0), Code.PROTOCOL_ERROR),
    "10.5 header list too long": (
        HELLO
        # An entry of 4 KB that fills the dynamic table, and sixty references to it.
        + frame(HEADERS, END_HEADERS, 1, b"\x40\x01x\x7f\x80\x1e" + b"a" * 3967 + b"\xbe" * 60),
        Code.ENHANCE_YOUR_CALM,
    ),
    "10.5.1 header block too long": (
        HELLO + headers(1, flags=0) + frame(CONTINUATION, 0, 1, bytes(16384)),
        Code.ENHANCE_YOUR_CALM,
    ),
    "10.5 CONTINUATION flood": (
        HELLO + headers(1, flags=0) + b"".join(frame(CONTINUATION, 0, 1) for _ in range(64)),
        Code.ENHANCE_YOUR_CALM,
    ),
}  # fmt: skip

STREAM_ERRORS = {
    "5.1 half-closed: DATA": (ENDED + data(1, b"x"), Code.STREAM_CLOSED),
    "5.1 half-closed: HEADERS": (ENDED + ENDED, Code.STREAM_CLOSED),
    "5.1 closed: DATA": (ENDED + frame(RST_STREAM, 0, 1, u32(8)) + data(1, b"x"), Code.STREAM_CLOSED),
    "6.3 PRIORITY of 4 bytes": (OPEN + frame(PRIORITY, 0, 1, bytes(4)), Code.FRAME_SIZE_ERROR),
    "6.9 WINDOW_UPDATE of 0": (OPEN + frame(WINDOW_UPDATE, 0, 1, u32(0)), Code.PROTOCOL_ERROR),
    "6.9.1 window too large": (OPEN + frame(WINDOW_UPDATE, 0, 1, u32(MAX)), Code.FLOW_CONTROL_ERROR),
    "8.1 a second block without END_STREAM": (OPEN + OPEN, Code.PROTOCOL_ERROR),
    "8.1 pseudo-header field in trailers": (
        OPEN + headers(1, ((b":path", b"/"),), END_HEADERS | END_STREAM),
        Code.PROTOCOL_ERROR,
    ),
    "8.2.1 upper case in trailers": (
        OPEN + headers(1, ((b"A", b"b"),), END_HEADERS | END_STREAM),
        Code.PROTOCOL_ERROR,
    ),
    "8.1.1 less than content-length": (
        headers(1, (*REQUEST, (b"content-length", b"5"))) + data(1, b"four", END_STREAM),
        Code.PROTOCOL_ERROR,
    ),
    "8.1.1 more than content-length": (
        headers(1, (*REQUEST, (b"content-length", b"3"))) + data(1, b"four"),
        Code.PROTOCOL_ERROR,
    ),
    "8.1.1 nothing of content-length": (
        headers(1, (*REQUEST, (b"content-length", b"3")), END_HEADERS | END_STREAM),
        Code.PROTOCOL_ERROR,
    ),
    "8.1.1 trailers before content-length": (
        headers(1, (*REQUEST, (b"content-length", b"3"))) + headers(1, ((b"a", b"b"),), END_HEADERS | END_STREAM),
        Code.PROTOCOL_ERROR,
    ),
    "8.1.1 two content-lengths": (
        headers(1, (*REQUEST, (b"content-length", b"3"), (b"content-length", b"4"))),
        Code.PROTOCOL_ERROR,
    ),
    "8.1.1 content-length not a number": (headers(1, (*REQUEST, (b"content-length", b"-3"))), Code.PROTOCOL_ERROR),
    "8.2.1 upper case": (headers(1, (*REQUEST, (b"X-Name", b"v"))), Code.PROTOCOL_ERROR),
    "8.2.1 empty name": (headers(1, (*REQUEST, (b"", b"v"))), Code.PROTOCOL_ERROR),
    "8.2.1 control character in a name": (headers(1, (*REQUEST, (b"a\x01", b"v"))), Code.PROTOCOL_ERROR),
    "8.2.1 line break in a value": (headers(1, (*REQUEST, (b"a", b"v\r\nb: c"))), Code.PROTOCOL_ERROR),
    "8.2.1 NUL in a pseudo-header field": (headers(1, ((b":path", b"/\x00"), *without(b":path"))), Code.PROTOCOL_ERROR),
    "8.2.1 a value that starts with a space": (headers(1, (*REQUEST, (b"a", b" v"))), Code.PROTOCOL_ERROR),
    "8.2.1 a value that ends with a tab": (headers(1, (*REQUEST, (b"a", b"v\t"))), Code.PROTOCOL_ERROR),
    "8.2.2 connection": (headers(1, (*REQUEST, (b"connection", b"close"))), Code.PROTOCOL_ERROR),
    "8.2.2 transfer-encoding": (headers(1, (*REQUEST, (b"transfer-encoding", b"chunked"))), Code.PROTOCOL_ERROR),
    "8.2.2 te other than trailers": (headers(1, (*without(b"te"), (b"te", b"gzip"))), Code.PROTOCOL_ERROR),
    "8.3 after a regular field": (headers(1, (*without(b":path"), (b":path", b"/"))), Code.PROTOCOL_ERROR),
    "8.3 unknown": (headers(1, ((b":status", b"200"), *REQUEST)), Code.PROTOCOL_ERROR),
    "8.3.1 twice": (headers(1, ((b":path", b"/"), *REQUEST)), Code.PROTOCOL_ERROR),
    "8.3.1 no :method": (headers(1, without(b":method")), Code.PROTOCOL_ERROR),
    "8.3.1 no :scheme": (headers(1, without(b":scheme")), Code.PROTOCOL_ERROR),
    "8.3.1 no :path": (headers(1, without(b":path")), Code.PROTOCOL_ERROR),
    "8.3.1 empty :path": (headers(1, ((b":path", b""), *without(b":path"))), Code.PROTOCOL_ERROR),
    "8.3.1 no fields": (frame(HEADERS, END_HEADERS, 1), Code.PROTOCOL_ERROR),
    "8.5 CONNECT with a path": (
        headers(1, ((b":method", b"CONNECT"), (b":path", b"/"), (b":authority", b"a"))),
        Code.PROTOCOL_ERROR,
    ),
}


@pytest.mark.parametrize(("sent", "code"), CONNECTION_ERRORS.values(), ids=CONNECTION_ERRORS)
def test_connection_errors(sent, code):
    server = connection()
    events = server.receive(sent)
    assert isinstance(events[-1], ConnectionEnded)
    assert events[-1].code is code, events[-1].reason
    kind, _, stream_id, payload = parse(drained(server))[-1]
    assert (kind, stream_id, payload[4:8]) == (GOAWAY, 0, u32(code))
    assert server.done
    assert server.receive(OPEN) == []


@pytest.mark.parametrize(("sent", "code"), STREAM_ERRORS.values(), ids=STREAM_ERRORS)
def test_stream_errors(sent, code):
    server = connection()
    events = server.receive(HELLO + sent)
    assert not any(isinstance(event, ConnectionEnded) for event in events), events
    assert parse(drained(server))[-1] == (RST_STREAM, 0, 1, u32(code))
    assert server.open_streams == 0
    opened = any(isinstance(event, RequestReceived) for event in events)
    told = any(isinstance(event, StreamReset) for event in events)
    assert opened == told
    # The connection lives on.
    assert isinstance(server.receive(headers(3))[0], RequestReceived)


def test_what_is_in_flight_when_a_stream_is_reset_here_does_no_harm():
    server = connection()
    server.receive(HELLO + OPEN)
    server.reset(1, Code.CANCEL)
    more = data(1, b"x") + frame(WINDOW_UPDATE, 0, 1, u32(5)) + headers(1, ((b"a", b"b"),), END_HEADERS | END_STREAM)
    assert server.receive(more + frame(RST_STREAM, 0, 1, u32(8))) == []
    assert parse(drained(server))[1:] == [(RST_STREAM, 0, 1, u32(8))]


def test_closed_streams_are_forgotten_in_the_end():
    server = connection(max_idle_frames=1_000_000)
    server.receive(HELLO)
    for number in range(3 * REMEMBERED):
        stream_id = 2 * number + 1
        server.receive(headers(stream_id) + frame(RST_STREAM, 0, stream_id, u32(8)))
    assert len(server._past) + len(server._older_past) <= 2 * REMEMBERED
    assert server.receive(data(1, b"late")) == []
    drained(server)
    server.receive(data(stream_id, b"late"))
    assert parse(drained(server)) == [(RST_STREAM, 0, stream_id, u32(Code.STREAM_CLOSED))]


def test_greeting():
    server = Connection(lambda fields: fields, Limits(), Clock())
    (kind, flags, stream_id, payload), update = parse(server.data_to_send())
    assert (kind, flags, stream_id) == (SETTINGS, 0, 0)
    assert dict(struct.iter_unpack(">HL", payload)) == {3: 4096, 4: 1 << 18, 5: 16384, 6: 1 << 14}
    assert update == (WINDOW_UPDATE, 0, 0, u32((1 << 24) - 65535))


def test_a_request_with_everything():
    server = connection(max_header_bytes=1 << 16)
    trailers = ((b"a", b"b"),)
    long = (*REQUEST, (b"x-long", b"v" * 40_000))
    whole = block(long)
    parts = [whole[i : i + 16000] for i in range(0, len(whole), 16000)]
    sent = (
        HELLO
        + frame(PRIORITY, 0, 9, bytes(5))
        + frame(200, 255, 7, b"unknown")
        + frame(HEADERS, PADDED | PRIORITISED, 1, b"\x03" + bytes(5) + parts[0] + bytes(3))
        + b"".join(frame(CONTINUATION, 0, 1, part) for part in parts[1:])
        + frame(CONTINUATION, END_HEADERS, 1)
        + frame(DATA, PADDED, 1, b"\x02hello\0\0")
        + headers(1, trailers, END_HEADERS | END_STREAM)
    )
    assert server.receive(sent) == [
        RequestReceived(1, long, ended=False),
        DataReceived(1, b"hello", 8, ended=False),
        TrailersReceived(1, trailers),
    ]


def test_answers():
    server = connection()
    server.receive(HELLO + headers(1, flags=END_HEADERS | END_STREAM))
    drained(server)
    assert server.send_headers(1, b"\x88")
    assert server.send_data(1, b"hello")
    assert server.send_trailers(1, b"t")
    assert not server.send_data(1, b"late")
    assert not server.send_headers(1, b"late")
    assert not server.send_trailers(1, b"late")
    assert parse(drained(server)) == [
        (HEADERS, END_HEADERS, 1, b"\x88"),
        (DATA, 0, 1, b"hello"),
        (HEADERS, END_HEADERS | END_STREAM, 1, b"t"),
    ]
    assert server.open_streams == 0


def test_an_answer_before_the_request_has_ended_stops_it():
    server = connection()
    server.receive(HELLO + OPEN)
    drained(server)
    server.send_trailers(1, b"t")
    assert parse(drained(server)) == [
        (HEADERS, END_HEADERS | END_STREAM, 1, b"t"),
        (RST_STREAM, 0, 1, u32(Code.NO_ERROR)),
    ]
    assert server.receive(data(1, b"late", END_STREAM)) == []


def test_a_long_block_is_continued():
    server = connection()
    server.receive(HELLO + OPEN)
    drained(server)
    long = encode_block([(b"grpc-message", b"m" * 40_000)])
    server.send_trailers(1, long)
    frames = parse(drained(server))
    assert [(kind, flags) for kind, flags, *_ in frames] == [
        (HEADERS, END_STREAM),
        (CONTINUATION, 0),
        (CONTINUATION, END_HEADERS),
        (RST_STREAM, 0),
    ]
    assert b"".join(payload for *_, payload in frames[:3]) == long


def test_a_smaller_header_table_is_acknowledged_in_the_next_block():
    server = connection()
    server.receive(PREFACE + settings(id_1=0) + OPEN + headers(3))
    server.send_headers(1, b"\x88")
    server.send_headers(3, b"\x88")
    assert [payload for kind, *_, payload in parse(drained(server)) if kind == HEADERS] == [b"\x20\x88", b"\x88"]


def test_padding_alone_is_given_back():
    server = connection()
    server.receive(HELLO + OPEN)
    drained(server)
    assert server.receive(frame(DATA, PADDED, 1, b"\x03\0\0\0")) == []
    assert parse(drained(server)) == [(WINDOW_UPDATE, 0, 1, u32(4))]


def test_settings_and_ping_are_acknowledged():
    server = connection()
    server.receive(HELLO + frame(PING, payload=b"12345678") + frame(PING, ACK, payload=b"unasked!"))
    assert parse(drained(server)) == [(SETTINGS, ACK, 0, b""), (PING, ACK, 0, b"12345678")]


def test_too_many_streams_are_refused():
    server = connection(max_streams=2)
    events = server.receive(HELLO + headers(1) + headers(3) + headers(5) + data(5, b"x", END_STREAM))
    assert [event.stream_id for event in events] == [1, 3]
    assert parse(drained(server))[1:] == [(RST_STREAM, 0, 5, u32(Code.REFUSED_STREAM))]
    assert [type(event) for event in server.receive(frame(RST_STREAM, 0, 1, u32(8)) + headers(7))] == [
        StreamReset,
        RequestReceived,
    ]


def test_header_tables_agree_after_refused_and_malformed_requests():
    """Blocks that are of no use still change the table."""
    import hpack  # noqa: PLC0415 - the encoder with a table, which no other test wants

    encoder = hpack.Encoder()
    server = connection(max_streams=1)
    server.receive(HELLO)
    fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/t/Echo")]
    server.receive(frame(HEADERS, END_HEADERS, 1, encoder.encode([*fields, (b"one", b"1")])))
    server.receive(frame(HEADERS, END_HEADERS, 3, encoder.encode([*fields, (b"two", b"2")])))  # refused
    server.receive(frame(RST_STREAM, 0, 1, u32(8)))
    server.receive(frame(HEADERS, END_HEADERS, 5, encoder.encode([*fields, (b"Three", b"3")])))  # malformed
    wanted = [*fields, (b"one", b"1"), (b"two", b"2")]
    (event,) = server.receive(frame(HEADERS, END_HEADERS, 7, encoder.encode(wanted)))
    assert event == RequestReceived(7, tuple(wanted), ended=False)


def test_the_block_cache_follows_the_table():
    """The same bytes mean something else once the table has changed."""
    server = connection()
    base = block(REQUEST[:4])
    first, second = b"\x40\x01a\x01x", b"\x40\x01a\x01y"  # literals with indexing
    indexed = base + b"\xbe"  # the newest entry
    got = []
    for number, sent in enumerate([base + first, indexed, indexed, base + second, indexed, b"\x20" + base, indexed]):
        got += server.receive((HELLO if not number else b"") + frame(HEADERS, END_HEADERS, 2 * number + 1, sent))
    assert [event.request[-1][1] for event in got[:5]] == [b"x", b"x", b"x", b"y", b"y"]
    assert got[1].request is got[2].request
    assert got[5].request == REQUEST[:4]
    assert got[6].code is Code.COMPRESSION_ERROR  # the update to 0 has emptied the table


def test_the_block_cache_is_bounded():
    server = connection()
    server.receive(HELLO)
    for number in range(3 * MAX_CACHED_BLOCKS):
        stream_id = 2 * number + 1
        (event,) = server.receive(headers(stream_id, (*REQUEST, (b"x-number", str(number).encode()))))
        assert event.request[-1][1] == str(number).encode()
        assert 0 < len(server._decoder._cache) <= MAX_CACHED_BLOCKS
    long = (*REQUEST, (b"x-long", b"v" * 2 * MAX_CACHED_BLOCK_BYTES))
    server.receive(headers(stream_id + 2, long))
    assert max(map(len, server._decoder._cache)) < MAX_CACHED_BLOCK_BYTES


def test_larger_windows_by_settings_let_queued_data_go():
    server = connection()
    server.receive(PREFACE + settings(id_4=0) + OPEN + headers(3))
    drained(server)
    server.send_data(1, b"one")
    server.send_data(3, b"three")
    assert drained(server) == b""
    server.receive(settings(id_4=4))
    assert parse(drained(server))[1:] == [(DATA, 0, 1, b"one"), (DATA, 0, 3, b"thre")]
    server.receive(settings(id_4=2))  # that stream's window is -2 now (6.9.2)
    server.receive(frame(WINDOW_UPDATE, 0, 3, u32(2)))
    assert parse(drained(server))[1:] == []
    server.receive(frame(WINDOW_UPDATE, 0, 3, u32(1)))
    assert parse(drained(server)) == [(DATA, 0, 3, b"e")]


def test_reset_by_the_peer_is_told_at_once():
    server = connection()
    assert server.receive(HELLO + OPEN + frame(RST_STREAM, 0, 1, u32(2)))[-1] == StreamReset(1, 2, by_peer=True)
    assert not server.send_data(1, b"x")


def test_drain():
    clock = Clock()
    server = connection(clock)
    server.receive(HELLO + OPEN)
    drained(server)
    server.drain()
    server.drain()
    assert parse(drained(server)) == [(GOAWAY, 0, 0, u32(MAX) + u32(0)), (PING, 0, 0, b"draining")]
    # On its way when the peer read it: served.
    assert isinstance(server.receive(headers(3))[0], RequestReceived)
    assert server.receive(frame(PING, ACK, payload=b"draining")) == []
    assert parse(drained(server)) == [(GOAWAY, 0, 0, u32(3) + u32(0))]
    # Later: ignored, and its body too.
    assert server.receive(headers(5) + data(5, b"x") + headers(5, ((b"a", b"b"),), END_HEADERS | END_STREAM)) == []
    assert drained(server) == b""
    server.send_trailers(1, b"t")
    assert not server.done
    server.send_trailers(3, b"t")
    assert server.done


def test_drain_of_a_peer_that_does_not_answer():
    server = connection()
    server.receive(HELLO)
    server.drain()
    assert not server.done
    server.refuse_streams()
    assert server.done
    assert parse(drained(server))[-1] == (GOAWAY, 0, 0, u32(0) + u32(0))


def test_a_peer_that_leaves():
    server = connection()
    events = server.receive(HELLO + OPEN + frame(GOAWAY, payload=u32(0) + u32(0) + b"bye"))
    assert events[-1] == PeerLeaves(0)
    assert not server.done
    server.send_trailers(1, b"t")
    assert server.done


# Floods

FLOODS = {
    "PING": frame(PING, payload=bytes(8)),
    "PING answers": frame(PING, ACK, payload=bytes(8)),
    "SETTINGS": settings(id_4=70_000),
    "SETTINGS answers": frame(SETTINGS, ACK),
    "empty DATA": data(1, b""),
    "padding only": frame(DATA, PADDED, 1, b"\x01\0"),
    "PRIORITY": frame(PRIORITY, 0, 1, bytes(5)),
    "unknown frames": frame(99),
    "WINDOW_UPDATE": frame(WINDOW_UPDATE, 0, 1, u32(1)),
    "RST_STREAM": frame(RST_STREAM, 0, 3, u32(8)),
    "DATA on a closed stream": data(3, b""),
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_floods(flood):
    clock = Clock()
    server = connection(clock, max_idle_frames=100)
    server.receive(HELLO + OPEN + headers(3))
    server.reset(3, Code.CANCEL)
    clock.now_s = 1.0
    for second in range(5):  # as much as is allowed, for as long as the peer likes
        clock.now_s += 1.01
        assert server.receive(flood * 95) == [], second
        drained(server)
    (event,) = server.receive(flood * 100)
    assert event.code is Code.ENHANCE_YOUR_CALM


def test_rapid_reset():
    server = connection(max_idle_frames=1000)  # of which a request that was reset unanswered counts ten
    server.receive(HELLO)
    for number in range(1000):
        stream_id = 2 * number + 1
        events = server.receive(headers(stream_id) + frame(RST_STREAM, 0, stream_id, u32(8)))
        if isinstance(events[-1], ConnectionEnded):
            break
    assert number == 99
    assert events[-1].code is Code.ENHANCE_YOUR_CALM


def test_resets_of_answered_requests_are_no_flood():
    """Envoy ends each ext_proc stream with RST_STREAM."""
    server = connection(max_idle_frames=100)
    server.receive(HELLO)
    for number in range(1000):
        stream_id = 2 * number + 1
        server.receive(headers(stream_id))
        server.send_headers(stream_id, b"\x88")
        assert server.receive(frame(RST_STREAM, 0, stream_id, u32(8))) == [StreamReset(stream_id, 8, by_peer=True)]
        drained(server)


def test_window_updates_for_what_was_sent_are_no_flood():
    server = connection(max_idle_frames=100)
    server.receive(HELLO + OPEN)
    server.send_headers(1, b"\x88")
    for _ in range(1000):
        server.send_data(1, b"x")
        drained(server)
        assert server.receive(frame(WINDOW_UPDATE, 0, 1, u32(1)) + frame(WINDOW_UPDATE, payload=u32(1))) == []


def test_what_a_peer_does_not_take_is_bounded():
    server = connection(max_queued_bytes=100_000)
    server.receive(PREFACE + settings(id_4=0) + OPEN + headers(3))
    assert server.send_data(1, bytes(60_000))
    assert not server.send_data(3, bytes(60_000))
    assert server.queued_bytes == server.queued(1) == 60_000
    assert server.queued(3) == 0
    assert parse(drained(server))[-1] == (RST_STREAM, 0, 3, u32(Code.ENHANCE_YOUR_CALM))
    server.receive(frame(RST_STREAM, 0, 1, u32(8)))
    assert server.queued_bytes == 0


def test_what_a_peer_does_not_take_is_bounded_by_stream():
    server = connection(max_stream_queued_bytes=100)
    server.receive(PREFACE + settings(id_4=0) + OPEN + headers(3))
    assert server.send_data(1, bytes(100))
    assert server.send_data(3, bytes(100))
    assert not server.send_data(1, b"x")
    assert parse(drained(server))[-1] == (RST_STREAM, 0, 1, u32(Code.ENHANCE_YOUR_CALM))
    assert server.queued_bytes == 100


def test_limits_are_checked():
    for wrong in ({"stream_window_bytes": 1000}, {"connection_window_bytes": 1000}, {"max_frame_bytes": 1000}):
        with pytest.raises(ValueError, match="must be"):
            connection(**wrong)
