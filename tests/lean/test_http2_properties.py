"""HTTP/2 under whatever comes: in any pieces, in any order, with any windows. The `h2` package is the judge."""

import itertools

import h2.events
import h2.settings
from hypothesis import given, settings
from hypothesis import strategies as st
from lean_frames import (
    END_STREAM,
    HELLO,
    PREFACE,
    REQUEST,
    block,
    client,
    connection,
    data,
    drained,
    frame,
    headers,
    parse,
    u32,
)

from extproc.lean.fields import encode_block
from extproc.lean.http2 import Code, ConnectionEnded, DataReceived, RequestReceived, StreamReset

STREAM_IDS = st.integers(0, 9)
GOOD = st.one_of(
    st.builds(headers, st.sampled_from([1, 3, 5, 7, 9]), flags=st.sampled_from([4, 5])),
    st.builds(data, st.sampled_from([1, 3, 5]), st.binary(max_size=30), st.sampled_from([0, END_STREAM])),
    st.builds(lambda i, n: frame(8, 0, i, u32(n)), st.sampled_from([0, 1, 3]), st.integers(1, 1 << 20)),
    st.builds(lambda i: frame(3, 0, i, u32(8)), st.sampled_from([1, 3, 5])),
    st.just(frame(6, 0, 0, bytes(8))),
    st.builds(lambda n: frame(4, 0, 0, b"\0\4" + u32(n)), st.integers(0, 1 << 20)),
    st.builds(
        lambda i, cut: frame(1, 0, i, block()[:cut]) + frame(9, 4, i, block()[cut:]),
        st.sampled_from([1, 3, 5, 7]),
        st.integers(0, 20),
    ),
)
"""Frames that may follow each other with luck."""
ANY = st.builds(
    frame,
    st.integers(0, 10),
    st.integers(0, 255),
    STREAM_IDS,
    st.binary(max_size=20) | st.sampled_from([block(), bytes(4), bytes(5), bytes(8), u32(1 << 31), b"\0\4" * 3]),
)
SCRIPT = st.lists(st.one_of(GOOD, GOOD, GOOD, ANY), max_size=25).map(b"".join)


@given(
    sent=st.one_of(SCRIPT.map(lambda script: HELLO + script), SCRIPT.map(lambda script: PREFACE + script), st.binary()),
    cuts=st.lists(st.integers(0, 1500)),
)
def test_pieces_make_no_difference(sent, cuts):
    whole, pieces = connection(max_streams=3), connection(max_streams=3)
    events = whole.receive(sent)
    got = []
    edges = [0, *sorted(cut for cut in cuts if cut < len(sent)), len(sent)]
    for start, end in itertools.pairwise(edges):
        got += pieces.receive(sent[start:end])
    assert got == events
    assert drained(pieces) == drained(whole)


@given(sent=SCRIPT)
def test_byte_by_byte(sent):
    whole, pieces = connection(), connection()
    events = whole.receive(HELLO + sent)
    got = [event for byte in HELLO + sent for event in pieces.receive(bytes((byte,)))]
    assert got == events


CALLS = st.one_of(
    st.tuples(st.just("send_headers"), STREAM_IDS, st.just(b"\x88")),
    st.tuples(st.just("send_data"), STREAM_IDS, st.integers(0, 40_000).map(bytes)),
    st.tuples(st.just("send_trailers"), STREAM_IDS, st.just(b"\x88")),
    st.tuples(st.just("reset"), STREAM_IDS, st.sampled_from(Code)),
    st.tuples(st.just("credit"), STREAM_IDS, st.integers(1, 1000)),
    st.sampled_from([("drain",), ("refuse_streams",), ("data_to_send",)]),
)


@settings(max_examples=300)
@given(steps=st.lists(st.one_of(GOOD, GOOD, ANY, st.binary(max_size=40), CALLS), max_size=60))
def test_nothing_raises_and_everything_is_bounded(steps):
    server = connection(max_streams=3, max_queued_bytes=100_000, max_idle_frames=40)
    server.receive(HELLO)
    opened = set()
    ended = False
    for step in steps:
        if isinstance(step, tuple):
            name, *arguments = step
            getattr(server, name)(*arguments)
        else:
            events = server.receive(step)
            assert not (ended and events)
            for event in events:
                if isinstance(event, RequestReceived):
                    assert event.stream_id not in opened
                    opened.add(event.stream_id)
                elif isinstance(event, StreamReset):
                    assert event.stream_id in opened
                elif isinstance(event, ConnectionEnded):
                    ended = True
        assert server.open_streams <= 3
        assert server.queued_bytes <= 100_000
        assert server.held_bytes <= 16384 + 9 + 16384
        assert server.queued_bytes == sum(server.queued(stream_id) for stream_id in range(10))
    while server.data_to_send():
        pass
    assert server.unsent_frames == 0


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("send"), st.sampled_from([1, 3]), st.integers(0, 100_000)),
            st.tuples(st.just("grant"), st.sampled_from([0, 1, 3]), st.integers(1, 70_000)),
            st.tuples(st.just("settings"), st.integers(0, 100_000), st.integers(16384, 40_000)),
            st.just(("exchange",)),
        ),
        max_size=40,
    )
)
def test_windows_are_kept_and_all_arrives(steps):
    """h2 raises when it is sent more than it allowed, by stream or connection, or in too large a frame."""
    server, peer = connection(), client()
    for stream_id in (1, 3):
        peer.send_headers(stream_id, [(name.decode(), value.decode()) for name, value in REQUEST])
    server.receive(peer.data_to_send())
    for stream_id in (1, 3):
        server.send_headers(stream_id, b"\x88")
    sent = {1: b"", 3: b""}
    got = {1: b"", 3: b""}
    ended = set()

    def exchange():
        while True:
            # One by one, as h2 looks at its frame size only between calls.
            frames = [frame(*part) for part in parse(drained(server))]
            for event in [event for one in frames for event in peer.receive_data(one)]:
                if isinstance(event, h2.events.DataReceived):
                    got[event.stream_id] += event.data
                elif isinstance(event, h2.events.StreamEnded):
                    ended.add(event.stream_id)
                assert not isinstance(event, h2.events.ConnectionTerminated)
            if not (answer := peer.data_to_send()):
                return
            assert not [event for event in server.receive(answer) if isinstance(event, ConnectionEnded)]

    for number, (name, *arguments) in enumerate(steps):
        if name == "send":
            stream_id, size = arguments
            payload = bytes((number + 1,)) * size
            assert server.send_data(stream_id, payload)
            sent[stream_id] += payload
        elif name == "grant":
            peer.increment_flow_control_window(arguments[1], arguments[0] or None)
        elif name == "settings":
            exchange()  # h2 takes any acknowledgement for one of all its SETTINGS: never more than one under way
            peer.update_settings(
                {
                    h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: arguments[0],
                    h2.settings.SettingCodes.MAX_FRAME_SIZE: arguments[1],
                }
            )
        else:
            exchange()
    server.send_trailers(1, encode_block([(b"grpc-status", b"0")]))
    server.send_trailers(3, encode_block([(b"grpc-status", b"0")]))
    for window in (None, 1, 3):
        if window not in ended:
            peer.increment_flow_control_window(5_000_000, window)
    exchange()
    assert got == sent
    assert ended == {1, 3}
    assert server.queued_bytes == 0
    assert server.open_streams == 0


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400_000), min_size=1, max_size=12),
    batch=st.integers(1, 600_000),
    connection_window=st.sampled_from([1 << 16, 1 << 18, 1 << 24]),
)
def test_a_peer_that_keeps_the_windows_is_never_stopped(sizes, batch, connection_window):
    """Credit comes late, in batches, yet h2 always gets on, and never has more than the window under way."""
    window = 1 << 20
    server, peer = connection(stream_window_bytes=window, connection_window_bytes=connection_window), client()
    greeting = type(server)(lambda fields: fields, server.limits, lambda: 0.0)
    peer.receive_data(greeting.data_to_send())
    peer.send_headers(1, [(name.decode(), value.decode()) for name, value in REQUEST])
    held = received = 0
    for size in sizes:
        left = size
        while left:
            room = min(left, peer.local_flow_control_window(1), peer.max_outbound_frame_size)
            if room:
                peer.send_data(1, bytes(room))
                left -= room
            for event in server.receive(peer.data_to_send()):
                assert isinstance(event, RequestReceived | DataReceived), event
                if isinstance(event, DataReceived):
                    held += event.charged_bytes
                    received += len(event.data)
            assert held <= window
            if held >= batch or not room:
                assert held, "stopped with nothing to give back"
                server.credit(1, held)
                held = 0
            peer.receive_data(drained(server))
    assert received == sum(sizes)


def test_a_peer_that_exceeds_a_streams_window_is_stopped():
    server = connection()
    server.receive(HELLO + headers(1))
    events = [event for _ in range(70) for event in server.receive(data(1, bytes(16384)))]
    assert sum(event.charged_bytes for event in events if isinstance(event, DataReceived)) == 1 << 18
    assert [event for event in events if not isinstance(event, DataReceived)] == [
        StreamReset(1, Code.FLOW_CONTROL_ERROR, by_peer=False)
    ]


def test_a_peer_that_exceeds_the_connections_window_is_stopped():
    server = connection(connection_window_bytes=1 << 16, max_frame_bytes=1 << 17)
    server.receive(HELLO + headers(1))
    assert server.receive(data(1, bytes(1 << 16)))
    (event,) = server.receive(data(1, bytes((1 << 16) + 1)))
    assert event.code is Code.FLOW_CONTROL_ERROR


def test_streams_share_the_way_out():
    """A large message of one stream does not hold up another's small one."""
    server = connection()
    server.receive(PREFACE + frame(4, payload=b"\0\4" + u32(1 << 30)) + headers(1) + headers(3))
    server.receive(frame(8, payload=u32(1 << 30)))
    server.data_to_send()
    server.send_data(1, bytes(10 << 20))
    server.send_data(3, bytes(20_000))
    assert b"\0\0\0\0\3" in server.data_to_send()


def test_a_header_block_that_h2_makes_is_understood():
    server, peer = connection(), client()
    fields = [(name.decode(), value.decode()) for name, value in REQUEST]
    for number in range(5):
        peer.send_headers(2 * number + 1, [*fields, ("x-number", str(number // 2))], end_stream=number % 2 == 1)
    events = server.receive(peer.data_to_send())
    assert [dict(event.request)[b"x-number"] for event in events] == [b"0", b"0", b"1", b"1", b"2"]
    assert [event.ended for event in events] == [False, True, False, True, False]
