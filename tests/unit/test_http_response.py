"""http_response: what is an answer, what is none, in whatever pieces it comes."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from extproc.discovery.http_response import (
    MAX_CHUNK_LINE_BYTES,
    MAX_HEAD_BYTES,
    Answer,
    ResponseError,
    ResponseReader,
)

LIMIT_BYTES = 1000


def lines(*parts, body=b""):
    return "\r\n".join([*parts, "", ""]).encode("latin-1") + body


def ok(*fields, body=b"", status="HTTP/1.1 200 OK"):
    return lines(status, *fields, body=body)


LENGTH = ok("content-type: text/plain; charset=utf-8", "content-length: 5", body=b"hello")
CHUNKED = ok("transfer-encoding: chunked", body=b'3\r\nhel\r\nA;x="y"\r\n0123456789\r\n0\r\n\r\n')
TRAILERS = ok("transfer-encoding: chunked", body=b"1 \r\nx\r\n000\r\nx-sum: 1\r\ny:\r\n\r\n")
UNTIL_CLOSE = ok("content-type: text/plain", body=b"all there is")
INTERIM = lines("HTTP/1.1 100 Continue") + lines("HTTP/1.1 103 Early Hints", "link: </x>") + LENGTH
NO_CONTENT = ok("content-length: 5", status="HTTP/1.1 204 No Content")
HELLO = Answer(200, "text/plain", b"hello")

GOOD = {
    "length": (LENGTH, HELLO, True),
    "no body": (ok("content-length: 0"), Answer(200, "", b""), True),
    "chunked": (CHUNKED, Answer(200, "", b"hel0123456789"), True),
    "chunked, empty": (ok("Transfer-Encoding: Chunked", body=b"0\r\n\r\n"), Answer(200, "", b""), True),
    "trailers": (TRAILERS, Answer(200, "", b"x"), True),
    "until close": (UNTIL_CLOSE, Answer(200, "text/plain", b"all there is"), False),
    "until close, empty": (ok(), Answer(200, "", b""), False),
    "interim": (INTERIM, HELLO, True),
    "204": (NO_CONTENT, Answer(204, "", b""), True),
    "304": (ok("transfer-encoding: gzip", status="HTTP/1.1 304 x"), Answer(304, "", b""), True),
    "no reason": (ok("content-length: 0", status="HTTP/1.1 503"), Answer(503, "", b""), True),
    "empty reason": (ok("content-length: 0", status="HTTP/1.1 404 "), Answer(404, "", b""), True),
    "names in capitals": (ok("CONTENT-LENGTH:0", "CONTENT-TYPE:\t A/B \t"), Answer(200, "a/b", b""), True),
    "close": (ok("content-length: 0", "connection: x, Close"), Answer(200, "", b""), False),
    "close, twice": (ok("content-length: 0", "connection: x", "connection: close"), Answer(200, "", b""), False),
    "1.0": (ok("content-length: 0", status="HTTP/1.0 200 OK"), Answer(200, "", b""), False),
    "1.0, kept": (
        ok("content-length: 0", "connection: Keep-Alive", status="HTTP/1.0 200 OK"),
        Answer(200, "", b""),
        True,
    ),
    "identity": (ok("content-length: 0", "content-encoding: Identity"), Answer(200, "", b""), True),
    "at the limit": (
        ok(f"content-length: {LIMIT_BYTES}", body=b"x" * LIMIT_BYTES),
        Answer(200, "", b"x" * LIMIT_BYTES),
        True,
    ),
    "odd but allowed": (ok("x:", "!#$%&'*+-.^_`|~: \xff\x01", "content-length: 0"), Answer(200, "", b""), True),
}

HEAD = "not HTTP/1.1"
SIZE = "begins with no size"
LONG = f"longer than {LIMIT_BYTES} bytes"
CODING = "transfer-encoding is not plain chunked"
BAD = {
    "another protocol": (b"SSH-2.0-OpenSSH_9.2\r\n", HEAD),
    "another protocol, a piece": (b"220", HEAD),
    "an old protocol": (b"HTTP/0.9 200 OK\r\n\r\n", HEAD),
    "HTTP/2": (b"HTTP/2 200\r\n\r\n", HEAD),
    "a TLS alert": (b"\x15\x03\x01\x00\x02\x02\x0a", HEAD),
    "no status": (lines("HTTP/1.1 OK"), HEAD),
    "a status of two digits": (lines("HTTP/1.1 20 OK"), HEAD),
    "a status of four digits": (lines("HTTP/1.1 2000 OK"), HEAD),
    "a status of zeros": (lines("HTTP/1.1 000 OK"), HEAD),
    "a status above 599": (lines("HTTP/1.1 600 OK"), HEAD),
    "two blanks": (lines("HTTP/1.1  200 OK"), HEAD),
    "a line before it": (b"\r\n" + LENGTH, HEAD),
    "a field without a name": (ok(": x"), HEAD),
    "a field without a colon": (ok("x"), HEAD),
    "a blank before the colon": (ok("content-length : 5"), HEAD),
    "a folded line": (ok("x: y", " z"), HEAD),
    "a bare CR": (ok("x: y\rz"), HEAD),
    "a bare LF": (ok("x: y\nz"), HEAD),
    "a NUL": (ok("x: y\0"), HEAD),
    "switching": (lines("HTTP/1.1 101 Switching Protocols"), "was not asked for"),
    "compressed": (ok("content-encoding: gzip", "content-length: 5"), "compressed"),
    "compressed twice": (ok("content-encoding: identity", "content-encoding: br"), "compressed"),
    "a negative length": (ok("content-length: -1"), "no length"),
    "a signed length": (ok("content-length: +5"), "no length"),
    "a hexadecimal length": (ok("content-length: 0x5"), "no length"),
    "an empty length": (ok("content-length:"), "no length"),
    "two lengths": (ok("content-length: 5", "content-length: 6"), "no length"),
    "two equal lengths": (ok("content-length: 5", "content-length: 5"), "no length"),
    "a list of lengths": (ok("content-length: 5, 5"), "no length"),
    "a length of many digits": (ok("content-length: " + "9" * 100), "no length"),
    "a length above the limit": (ok(f"content-length: {LIMIT_BYTES + 1}"), LONG),
    "chunked and a length": (ok("transfer-encoding: chunked", "content-length: 5"), CODING),
    "gzip and chunked": (ok("transfer-encoding: gzip, chunked"), CODING),
    "chunked twice": (ok("transfer-encoding: chunked", "transfer-encoding: chunked"), CODING),
    "identity as coding": (ok("transfer-encoding: identity"), CODING),
    "an empty coding": (ok("transfer-encoding:"), CODING),
    "chunked 1.0": (ok("transfer-encoding: chunked", status="HTTP/1.0 200 OK"), "chunked, which HTTP/1.0"),
    "a chunk without a size": (ok("transfer-encoding: chunked", body=b"\r\n"), SIZE),
    "a chunk's size in words": (ok("transfer-encoding: chunked", body=b"five\r\n"), SIZE),
    "a negative chunk": (ok("transfer-encoding: chunked", body=b"-1\r\n"), SIZE),
    "a chunk with an underscore": (ok("transfer-encoding: chunked", body=b"1_0\r\n"), SIZE),
    "a chunk with a prefix": (ok("transfer-encoding: chunked", body=b"0x1\r\n"), SIZE),
    "a chunk of 17 digits": (ok("transfer-encoding: chunked", body=b"0" * 16 + b"1\r\n"), SIZE),
    "a blank before the size": (ok("transfer-encoding: chunked", body=b" 1\r\nx\r\n"), SIZE),
    "a chunk's bare LF": (ok("transfer-encoding: chunked", body=b"1\nx\r\n"), SIZE),
    "a long chunk line": (ok("transfer-encoding: chunked", body=b"1;" + b"x" * MAX_CHUNK_LINE_BYTES), SIZE),
    "a chunk above the limit": (ok("transfer-encoding: chunked", body=b"3e9\r\n"), LONG),
    "a chunk of the highest size": (ok("transfer-encoding: chunked", body=b"f" * 16 + b"\r\n"), LONG),
    "chunks above the limit": (ok("transfer-encoding: chunked", body=b"3e8\r\n" + b"x" * 1000 + b"\r\n1\r\n"), LONG),
    "a chunk longer than it says": (ok("transfer-encoding: chunked", body=b"1\r\nxy"), "longer than its size"),
    "a chunk with half an end": (ok("transfer-encoding: chunked", body=b"1\r\nx\ry"), "longer than its size"),
    "odd trailers": (ok("transfer-encoding: chunked", body=b"0\r\nx\r\n\r\n"), "no fields"),
    "long trailers": (ok("transfer-encoding: chunked", body=b"0\r\nx:" + b"y" * MAX_HEAD_BYTES), "trailers are longer"),
    "above the limit until close": (ok(body=b"x" * (LIMIT_BYTES + 1)), LONG),
    "a long head": (b"HTTP/1.1 200 OK\r\nx: " + b"y" * MAX_HEAD_BYTES, "head is longer"),
    "a long head that ends": (ok("x: " + "y" * MAX_HEAD_BYTES), "head is longer"),
    "endless interim answers": (lines("HTTP/1.1 100 Continue", "x: " + "y" * 1000) * 33, "head is longer"),
}


CLOSED = {"until close", "until close, empty"}
"""Those that the end of the connection ends."""


def read(*pieces, limit_bytes=LIMIT_BYTES, end=True):
    """(answer, keep_alive) of pieces that come one after the other; None for an answer that was cut short."""
    reader = ResponseReader(limit_bytes)
    for number, piece in enumerate(pieces):
        answer = reader.feed(piece)
        if answer is not None:
            assert number == len(pieces) - 1, "it was complete before"
            return answer, reader.keep_alive
    answer = reader.end() if end else None
    return answer, reader.keep_alive if answer else None


@pytest.mark.parametrize(("page", "answer", "keep_alive"), GOOD.values(), ids=GOOD)
def test_answers(page, answer, keep_alive):
    assert read(page) == (answer, keep_alive)


@pytest.mark.parametrize(("page", "answer", "keep_alive"), GOOD.values(), ids=GOOD)
def test_split_at_any_byte_it_is_the_same_answer(page, answer, keep_alive):
    for at in range(1, len(page)):
        assert read(page[:at], page[at:]) == (answer, keep_alive), at
    assert read(*(page[at : at + 1] for at in range(len(page)))) == (answer, keep_alive)


@pytest.mark.parametrize("name", GOOD)
def test_cut_short_it_is_no_answer_but_where_the_end_of_the_connection_is_the_end(name):
    page, answer, _ = GOOD[name]
    head = page.index(b"\r\n\r\n") + 4
    for at in range(len(page)):
        found, _ = read(page[:at])
        if name in CLOSED and at >= head:
            assert found == Answer(200, answer.content_type, page[head:at])
        else:
            assert found is None, at


@pytest.mark.parametrize("name", sorted(GOOD.keys() - CLOSED))
def test_what_follows_an_answer_ends_its_connection(name):
    page, answer, _ = GOOD[name]
    assert read(page + b"H") == (answer, False)


@pytest.mark.parametrize(("page", "reason"), BAD.values(), ids=BAD)
def test_what_is_no_answer(page, reason):
    with pytest.raises(ResponseError, match=reason):
        read(page)
    with pytest.raises(ResponseError, match=reason):
        read(*(page[at : at + 1] for at in range(len(page))))


def test_a_head_at_its_limit_is_read():
    fixed = len(ok("x: ", "content-length: 0")) - 4
    page = ok("x: " + "y" * (MAX_HEAD_BYTES - fixed), "content-length: 0")
    assert read(page) == (Answer(200, "", b""), True)
    with pytest.raises(ResponseError, match="head is longer"):
        read(page.replace(b"x: ", b"x: y"))


def test_a_body_beyond_the_limit_is_refused_before_it_comes():
    with pytest.raises(ResponseError, match=LONG):
        read(ok("content-length: 1001"), end=False)
    with pytest.raises(ResponseError, match=LONG):
        read(ok("transfer-encoding: chunked", body=b"3e9\r\n"), end=False)


@given(
    page=st.sampled_from([page for page, *_ in GOOD.values()] + [page for page, _ in BAD.values() if len(page) < 2000]),
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3), st.binary(max_size=3)), max_size=3),
    cuts=st.lists(st.integers(0, 400), max_size=5),
)
@example(page=CHUNKED, edits=[], cuts=[10, 40])
def test_pieces_make_no_difference_whatever_comes(page, edits, cuts):
    """Whole or in pieces: the same answer, the same refusal, or neither."""
    for at, length, new in edits:
        page = page[:at] + new + page[at + length :]
    at = [0, *sorted(cuts), len(page)]
    pieces = [page[start:end] for start, end in itertools.pairwise(at) if start < end]

    def outcome(*pieces):
        reader = ResponseReader(LIMIT_BYTES)
        try:
            for piece in pieces:
                answer = reader.feed(piece)
                if answer is not None:
                    return answer
            return reader.end()
        except ResponseError:
            return "refused"

    assert outcome(*pieces) == outcome(page)
