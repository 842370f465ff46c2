"""gRPC without I/O: messages however they are cut, statuses, refusals, deadlines, what is held and for how long."""

import itertools
import logging

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lean_frames import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    HELLO,
    PREFACE,
    REQUEST,
    RST_STREAM,
    WINDOW_UPDATE,
    Clock,
    data,
    frame,
    headers,
    message,
    parse,
    u32,
)

from extproc.lean.grpc import MAX_DETAILS_BYTES, GrpcConnection, Status
from extproc.lean.http2 import Code, Limits

GRPC = {":status": "200", "content-type": "application/grpc"}


class Recorder:
    """Notes what it is told; `react` may answer."""

    def __init__(self, react=None):
        self.told = []
        self.streams = []
        self.react = react or (lambda stream, event: None)

    def _note(self, stream, *event):
        self.told.append(event if len(event) > 1 else event[0])
        self.react(stream, self.told[-1])

    def on_open(self, stream):
        self.streams.append(stream)
        self._note(stream, "open")

    def on_message(self, stream, received):
        self._note(stream, "message", received)

    def on_end(self, stream):
        self._note(stream, "end")

    def on_reset(self, stream):
        self._note(stream, "reset")


class Side:
    """A server's connection with one method, its timers, and what it sent."""

    def __init__(self, react=None, *, max_message_bytes=1000, max_buffered_bytes=100_000, hello=HELLO, **limits):
        self.receiver = Recorder(react)
        self.woken = 0
        self.timers = []
        self.grpc = GrpcConnection(
            {"/t/Echo": self.receiver},
            limits=Limits(**limits),
            max_message_bytes=max_message_bytes,
            max_buffered_bytes=max_buffered_bytes,
            clock=Clock(),
            wake=self._wake,
            call_later=self._call_later,
        )
        self.decoder = hpack.Decoder()
        self.grpc.receive(hello)
        self.sent()

    def _wake(self):
        self.woken += 1

    def _call_later(self, after_s, call, stream):
        timer = Timer(after_s, call, stream)
        self.timers.append(timer)
        return timer

    def sent(self):
        parts = []
        while part := self.grpc.data_to_send():
            parts.append(part)
        return parse(b"".join(parts))

    def answer(self):
        """Frames, with header blocks decoded."""
        return [
            (kind, flags, stream_id, dict(self.decoder.decode(payload)) if kind == HEADERS else payload)
            for kind, flags, stream_id, payload in self.sent()
        ]

    def status(self):
        """Of a call that was ended without an answer before."""
        (kind, flags, _, fields), *_ = self.answer()
        assert (kind, flags) == (HEADERS, END_HEADERS | END_STREAM)
        return fields

    @property
    def told(self):
        return self.receiver.told


class Timer:
    def __init__(self, after_s, call, stream):
        self.after_s = after_s
        self.cancelled = False
        self.fire = lambda: call(stream)

    def cancel(self):
        self.cancelled = True


def echo(stream, event):
    if event == "end":
        stream.finish()
    elif event[0] == "message":
        stream.write(event[1])


def test_an_exchange():
    side = Side(echo)
    side.grpc.receive(headers() + data(1, message(b"hello")))
    assert side.answer() == [(HEADERS, END_HEADERS, 1, GRPC), (DATA, 0, 1, message(b"hello"))]
    side.grpc.receive(data(1, message(b"")) + data(1, b"", END_STREAM))
    assert side.answer() == [
        (DATA, 0, 1, message(b"")),
        (HEADERS, END_HEADERS | END_STREAM, 1, {"grpc-status": "0"}),
    ]
    assert side.told == ["open", ("message", b"hello"), ("message", b""), "end"]
    assert side.grpc.open_streams == side.grpc.buffered_bytes == side.woken == 0


@given(
    messages=st.lists(st.binary(max_size=300), max_size=6),
    cuts=st.lists(st.integers(0, 2000)),
    ended_by=st.sampled_from(["last", "empty", "trailers"]),
)
def test_messages_are_found_however_they_are_cut(messages, cuts, ended_by):
    side = Side()
    stream = b"".join(map(message, messages))
    edges = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    side.grpc.receive(headers())
    parts = [stream[start:end] for start, end in itertools.pairwise(edges)]
    for number, part in enumerate(parts):
        last = ended_by == "last" and number == len(parts) - 1
        side.grpc.receive(data(1, part, END_STREAM if last else 0))
    if ended_by == "empty":
        side.grpc.receive(data(1, b"", END_STREAM))
    elif ended_by == "trailers":
        side.grpc.receive(headers(1, ((b"a", b"b"),), END_HEADERS | END_STREAM))
    assert side.told == ["open", *(("message", sent) for sent in messages), "end"]
    assert side.grpc.buffered_bytes == 0


def test_a_request_without_messages():
    side = Side(echo)
    side.grpc.receive(headers(1, flags=END_HEADERS | END_STREAM))
    assert side.told == ["open", "end"]
    assert side.status() == GRPC | {"grpc-status": "0"}


@pytest.mark.parametrize("size", [1 << 14, (1 << 14) + 1, 100_000])
def test_long_answers(size):
    side = Side(max_message_bytes=size)
    side.grpc.receive(frame(WINDOW_UPDATE, payload=u32(1 << 20)) + headers() + frame(WINDOW_UPDATE, 0, 1, u32(1 << 20)))
    (stream,) = side.receiver.streams
    assert stream.write(b"m" * size)
    assert b"".join(payload for kind, *_, payload in side.sent() if kind == DATA) == message(b"m" * size)


def test_a_write_from_outside_wakes_the_owner():
    side = Side()
    side.grpc.receive(headers())
    (stream,) = side.receiver.streams
    assert stream.write(b"x")
    assert side.woken == 1
    stream.finish()
    assert side.woken == 2


# Ends


def test_reset_is_told_and_writes_are_dropped():
    side = Side()
    side.grpc.receive(headers())
    side.grpc.receive(frame(RST_STREAM, 0, 1, u32(8)))
    assert side.told == ["open", "reset"]
    (stream,) = side.receiver.streams
    assert not stream.open
    assert not stream.write(b"late")
    stream.finish()
    assert side.sent() == []


def test_a_stream_that_was_reset_in_the_same_read():
    side = Side(echo)
    side.grpc.receive(headers() + data(1, message(b"x")) + frame(RST_STREAM, 0, 1, u32(8)))
    assert side.told == ["open", ("message", b"x"), "reset"]
    assert side.sent() == []


def test_reset_after_the_end():
    """A server-streaming call: the request has ended, the answer has not."""
    side = Side()
    side.grpc.receive(headers() + data(1, message(b"x"), END_STREAM) + frame(RST_STREAM, 0, 1, u32(8)))
    assert side.told == ["open", ("message", b"x"), "end", "reset"]


def test_a_finished_stream_is_told_nothing_more():
    side = Side(lambda stream, event: stream.finish() if event[0] == "message" else None)
    side.grpc.receive(headers() + data(1, message(b"a") + message(b"b")) + data(1, message(b"c"), END_STREAM))
    assert side.told == ["open", ("message", b"a")]
    assert side.status()["grpc-status"] == "0"
    assert side.grpc.buffered_bytes == 0


def test_the_connections_end_is_told_to_all():
    side = Side()
    side.grpc.receive(headers(1) + headers(3))
    side.grpc.lost()
    assert side.told == ["open", "open", "reset", "reset"]
    other = Side()
    other.grpc.receive(headers(1) + data(1, message(b"x")[:4]) + frame(6, payload=b"short"))
    assert other.told == ["open", "reset"]
    assert other.grpc.buffered_bytes == 0


def test_details_are_percent_encoded_and_bounded():
    side = Side()
    side.grpc.receive(headers() + headers(3))
    first, second = side.receiver.streams
    first.finish(Status.INVALID_ARGUMENT, "100 % of\nzürich")
    assert side.status() == GRPC | {"grpc-status": "3", "grpc-message": "100 %25 of%0Az%C3%BCrich"}
    second.finish(Status.INTERNAL, "x" * 100_000)
    assert len(side.status()["grpc-message"]) == MAX_DETAILS_BYTES


# Refusals


def altered(**fields):
    changed = {name.replace("_", "-").encode(): value for name, value in fields.items()}
    return [(name, changed.pop(name.lstrip(b":"), value)) for name, value in REQUEST] + list(changed.items())


UNIMPLEMENTED = {"grpc-status": "12", "grpc-accept-encoding": "identity"}
REFUSED = {
    "unknown method": (altered(path=b"/t/Other"), GRPC | UNIMPLEMENTED | {"grpc-message": "unknown method /t/Other"}),
    "wrong content-type": (altered(content_type=b"application/json"), {":status": "415"}),
    "content-type that only starts alike": (altered(content_type=b"application/grpc-web"), {":status": "415"}),
    "no content-type": ([field for field in REQUEST if field[0] != b"content-type"], {":status": "415"}),
    "not POST": (altered(method=b"GET"), {":status": "405", "allow": "POST"}),
    "malformed timeout": (
        altered(grpc_timeout=b"1 hour"),
        GRPC | {"grpc-status": "13", "grpc-message": "malformed grpc-timeout"},
    ),
    "timeout of nine digits": (
        altered(grpc_timeout=b"123456789n"),
        GRPC | {"grpc-status": "13", "grpc-message": "malformed grpc-timeout"},
    ),
    "metadata that is not base64": (
        altered(a_bin=b"%%%"),
        GRPC | {"grpc-status": "13", "grpc-message": "a-bin is not base64"},
    ),
}


@pytest.mark.parametrize(("fields", "status"), REFUSED.values(), ids=REFUSED)
def test_refused_requests(fields, status):
    side = Side()
    side.grpc.receive(headers(1, fields) + data(1, message(b"x"), END_STREAM))
    assert side.status() == status
    assert side.told == []


@pytest.mark.parametrize("content_type", [b"application/grpc", b"application/grpc+proto", b"application/grpc;x=y"])
def test_content_types(content_type):
    side = Side()
    side.grpc.receive(headers(1, altered(content_type=content_type)))
    assert side.told == ["open"]


BAD_MESSAGES = {
    "compressed": (message(b"x", 1), {"grpc-status": "12", "grpc-message": "compressed messages are not supported"}),
    "too large": (
        message(bytes(1001)),
        {"grpc-status": "8", "grpc-message": "a message of 1001 bytes is larger than the allowed 1000"},
    ),
    "too large, by its prefix alone": (
        message(bytes(1001))[:5],
        {"grpc-status": "8", "grpc-message": "a message of 1001 bytes is larger than the allowed 1000"},
    ),
}


@pytest.mark.parametrize(("sent", "status"), BAD_MESSAGES.values(), ids=BAD_MESSAGES)
@pytest.mark.parametrize("cut", [0, 3])
def test_bad_messages(sent, status, cut):
    side = Side()
    side.grpc.receive(headers() + data(1, message(b"good") + sent[:cut]))
    side.grpc.receive(data(1, sent[cut:]))
    assert side.told == ["open", ("message", b"good"), "reset"]
    assert side.status().items() >= status.items()
    assert side.grpc.buffered_bytes == 0


def test_a_request_that_ends_within_a_message():
    side = Side()
    side.grpc.receive(headers() + data(1, message(b"half")[:-1], END_STREAM))
    assert side.told == ["open", "reset"]
    assert side.status()["grpc-status"] == "13"


@pytest.mark.parametrize("where", ["open", "message", "end", "reset", "split"])
def test_bugs_end_the_stream_and_are_logged(where, caplog):
    def react(stream, event):
        if event in (where, (where, b"x"), ("message", where.encode())):
            raise ValueError("a bug")

    side = Side(react)
    with caplog.at_level(logging.ERROR):
        side.grpc.receive(headers())
        if where == "split":
            side.grpc.receive(data(1, message(b"split")[:3]))
            side.grpc.receive(data(1, message(b"split")[3:]))
        else:
            side.grpc.receive(data(1, message(b"x"), 0 if where == "reset" else END_STREAM))
            side.grpc.receive(frame(RST_STREAM, 0, 1, u32(8)))
    assert "a bug" in caplog.text
    assert side.told[-1] == "reset"
    assert side.grpc.open_streams == 0
    if where != "reset":
        assert side.status()["grpc-status"] == "2"


def test_a_bug_after_the_end_is_logged(caplog):
    def react(stream, event):
        stream.finish()
        raise ValueError("a bug")

    side = Side(react)
    side.grpc.receive(headers())
    assert side.told == ["open"]
    assert "a bug" in caplog.text


# Metadata and deadlines


def test_metadata():
    side = Side()
    fields = (
        *REQUEST,
        (b"x-pd-room", b"7"),
        (b"user-agent", b"t\xfc"),
        (b"a-bin", b"AAE,//8="),
        (b"grpc-timeout", b"1H"),
    )
    side.grpc.receive(headers(1, fields))
    (stream,) = side.receiver.streams
    assert stream.metadata == (
        ("x-pd-room", "7"),
        ("user-agent", "tü"),
        ("a-bin", b"\0\1"),
        ("a-bin", b"\xff\xff"),
    )


@pytest.mark.parametrize(
    ("timeout", "seconds"),
    [(b"1H", 3600), (b"2M", 120), (b"3S", 3), (b"4m", 0.004), (b"5u", 5e-6), (b"6n", 6e-9), (b"99999999H", None)],
)
def test_timeouts(timeout, seconds):
    side = Side()
    side.grpc.receive(headers(1, (*REQUEST, (b"grpc-timeout", timeout))))
    assert [timer.after_s for timer in side.timers] == ([pytest.approx(seconds)] if seconds else [])


def test_a_deadline_ends_the_call():
    side = Side()
    side.grpc.receive(headers(1, (*REQUEST, (b"grpc-timeout", b"1S"))))
    (timer,) = side.timers
    timer.fire()
    assert side.told == ["open", "reset"]
    assert side.status()["grpc-status"] == "4"
    assert side.woken


def test_a_call_that_ends_takes_its_deadline_along():
    side = Side(echo)
    side.grpc.receive(headers(1, (*REQUEST, (b"grpc-timeout", b"1S"))) + data(1, b"", END_STREAM))
    (timer,) = side.timers
    assert timer.cancelled
    side.sent()
    timer.fire()
    assert side.sent() == []


# What is held


def updates(side):
    return [
        int.from_bytes(payload, "big")
        for kind, _, stream_id, payload in side.sent()
        if kind == WINDOW_UPDATE and stream_id
    ]


def test_read_messages_are_credited_in_halves_of_the_window():
    side = Side(stream_window_bytes=1 << 16, max_message_bytes=1 << 20)
    side.grpc.receive(headers())
    part = message(bytes(10_000))
    for _ in range(3):
        side.grpc.receive(data(1, part))
    assert updates(side) == []
    side.grpc.receive(data(1, part))
    assert updates(side) == [4 * len(part)]


def test_a_message_larger_than_the_window_gets_through():
    side = Side(stream_window_bytes=1 << 16, max_message_bytes=1 << 20, max_buffered_bytes=1 << 21)
    side.grpc.receive(headers())
    whole = message(bytes(1 << 20))
    granted = 1 << 16
    for start in range(0, len(whole), 16384):
        part = whole[start : start + 16384]
        side.grpc.receive(data(1, part))
        granted += sum(updates(side)) - len(part)
        assert granted >= 0
    assert side.told[1:] == [("message", whole[5:])]
    assert side.grpc.buffered_bytes == 0


@pytest.mark.parametrize("answer_bytes", [10, 300_000], ids=["short answers", "long answers"])
@pytest.mark.parametrize("streams", [3, 20])
def test_large_messages_take_turns_when_there_is_no_room_for_all(streams, answer_bytes):
    """Each would else hold a part of its message, and none come to its end."""
    window, size, room = 1 << 16, 300_000, 1 << 20

    def answer(stream, event):
        if event[0] == "message":
            stream.write(bytes(answer_bytes))
        elif event == "end":
            stream.finish()

    side = Side(answer, stream_window_bytes=window, max_message_bytes=size, max_buffered_bytes=2 * room)
    ids = range(1, 2 * streams, 2)
    side.grpc.receive(b"".join(headers(stream_id) for stream_id in ids))
    side.grpc.receive(frame(WINDOW_UPDATE, 0, 0, u32(1 << 30)))
    left = {stream_id: message(bytes(size)) for stream_id in ids}
    windows = dict.fromkeys(ids, window)
    most = 0
    while left:
        before = sum(map(len, left.values()))
        for stream_id in list(left):  # the client sends on all of them at once
            part = left[stream_id][: min(16384, windows[stream_id])]
            if part:
                side.grpc.receive(data(stream_id, part))
                windows[stream_id] -= len(part)
                left[stream_id] = left[stream_id][len(part) :]
            most = max(most, side.grpc.buffered_bytes)
            for kind, _, of, payload in side.sent():
                if kind == WINDOW_UPDATE and of:
                    windows[of] += int.from_bytes(payload, "big")
                elif kind == DATA and len(payload) > 0:
                    side.grpc.receive(frame(WINDOW_UPDATE, 0, of, u32(len(payload))))
            if not left[stream_id]:
                del left[stream_id]
        assert sum(map(len, left.values())) < before, "nothing moves"
    assert [event[0] for event in side.told if event[0] == "message"] == ["message"] * streams
    assert side.grpc.buffered_bytes == 0
    assert most <= room + streams * window


def test_room_that_a_reset_stream_held_goes_to_the_next():
    side = Side(stream_window_bytes=1 << 16, max_message_bytes=300_000, max_buffered_bytes=600_000)
    side.grpc.receive(headers(1) + headers(3))
    start = message(bytes(300_000))[:16384]
    for stream_id in (1, 3):
        for _ in range(4):
            side.grpc.receive(data(stream_id, start if not _ else bytes(16384)))
    assert {of for kind, _, of, _ in side.sent() if kind == WINDOW_UPDATE and of} == {1}
    side.grpc.receive(frame(RST_STREAM, 0, 1, u32(8)))
    assert {of for kind, _, of, _ in side.sent() if kind == WINDOW_UPDATE and of} == {3}


def test_unread_messages_hold_the_window():
    """One message may wait, and another window of bytes; then the client stops."""
    side = Side(
        lambda stream, event: stream.hold(len(event[1])) if event[0] == "message" else None,
        stream_window_bytes=1 << 16,
        max_message_bytes=1 << 20,
    )
    side.grpc.receive(headers())
    part = message(bytes(16_000))
    for _ in range(4):
        side.grpc.receive(data(1, part))
    assert updates(side) == []
    assert side.grpc.buffered_bytes == 4 * 16_000
    (stream,) = side.receiver.streams
    for _ in range(3):
        stream.release(16_000)
    assert updates(side) == []
    stream.release(16_000)
    assert updates(side) == [4 * len(part)]
    assert side.woken == 1
    assert side.grpc.buffered_bytes == 0


def test_too_much_held_ends_the_stream_that_goes_beyond():
    side = Side(
        lambda stream, event: stream.hold(len(event[1])) if event[0] == "message" else None,
        max_message_bytes=10_000,
        max_buffered_bytes=15_000,
    )
    side.grpc.receive(headers(1) + headers(3))
    side.grpc.receive(data(1, message(bytes(9000))))
    side.grpc.receive(data(3, message(bytes(9000))))
    assert side.told[-1] == "reset"
    assert side.status()["grpc-status"] == "8"
    assert side.grpc.open_streams == 1
    assert side.grpc.buffered_bytes == 9000
    side.receiver.streams[1].release(9000)  # read too late
    side.grpc.receive(frame(RST_STREAM, 0, 1, u32(8)))
    assert side.grpc.buffered_bytes == 0


def test_too_much_of_incomplete_messages_ends_the_stream_that_goes_beyond():
    side = Side(max_message_bytes=10_000, max_buffered_bytes=15_000)
    side.grpc.receive(headers(1) + headers(3))
    for stream_id in (1, 3):
        side.grpc.receive(data(stream_id, message(bytes(9000))[:-1]))
    assert side.told == ["open", "open", "reset"]
    assert side.grpc.buffered_bytes == 9004
    side.grpc.receive(data(1, b"\0"))
    assert side.told[-1] == ("message", bytes(9000))
    assert side.grpc.buffered_bytes == 0


def test_a_client_that_takes_nothing_loses_its_stream():
    side = Side(echo, hello=PREFACE + frame(4, payload=b"\0\4" + u32(0)), max_queued_bytes=5000)
    side.grpc.receive(headers())
    for _ in range(5):
        side.grpc.receive(data(1, message(bytes(999))))
    assert side.told[-1] == "reset"
    assert (RST_STREAM, 0, 1, u32(Code.ENHANCE_YOUR_CALM)) in side.sent()
    assert side.grpc.http2.queued_bytes == 0


def test_a_client_that_takes_nothing_loses_its_stream_to_a_late_write():
    side = Side(hello=PREFACE + frame(4, payload=b"\0\4" + u32(0)), max_queued_bytes=5000)
    side.grpc.receive(headers())
    (stream,) = side.receiver.streams
    assert stream.write(bytes(4000))
    assert not stream.write(bytes(4000))
    assert side.told == ["open"]  # not from within its own call
    side.sent()
    assert side.told == ["open", "reset"]


def test_what_comes_after_the_answer_is_dropped():
    """The answer waits for the client's window; meanwhile the client goes on."""
    side = Side(hello=PREFACE + frame(4, payload=b"\0\4" + u32(0)))
    side.grpc.receive(headers())
    (stream,) = side.receiver.streams
    stream.write(b"answer")
    stream.finish()
    stream.hold(5)
    side.grpc.receive(data(1, message(b"more")) + headers(1, ((b"a", b"b"),), END_HEADERS | END_STREAM))
    assert side.told == ["open"]
    assert side.grpc.buffered_bytes == 0
    side.sent()
    side.grpc.receive(frame(WINDOW_UPDATE, 0, 1, u32(100)))
    assert [kind for kind, *_ in side.sent()] == [DATA, HEADERS]


def test_a_client_that_leaves_is_served_to_the_end():
    side = Side(echo)
    side.grpc.receive(headers() + frame(7, payload=bytes(8)) + data(1, message(b"x"), END_STREAM))
    assert side.told == ["open", ("message", b"x"), "end"]
    assert side.grpc.http2.done


def test_a_writer_hears_when_its_messages_are_taken():
    side = Side(hello=PREFACE + frame(4, payload=b"\0\4" + u32(0)), max_message_bytes=100_000)
    side.grpc.receive(headers())
    (stream,) = side.receiver.streams
    stream.write(bytes(30_000))
    taken = []
    stream.when_taken(lambda: taken.append(1))
    side.grpc.receive(frame(WINDOW_UPDATE, 0, 1, u32(10_000)))
    side.sent()
    assert not taken
    side.grpc.receive(frame(WINDOW_UPDATE, 0, 1, u32(10_000)))
    side.sent()
    assert taken == [1]
    stream.write(bytes(30_000))
    stream.when_taken(lambda: taken.append(2))
    side.grpc.receive(frame(RST_STREAM, 0, 1, u32(8)))
    side.sent()
    assert taken == [1, 2]
    stream.when_taken(lambda: taken.append(3))
    assert taken == [1, 2, 3]
