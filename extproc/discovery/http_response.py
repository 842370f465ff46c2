"""The answer to a GET over HTTP/1.1, without I/O (RFC 9112; section numbers below are its): bytes in → answer out.

Two rules. What is not plainly right is refused, and with it the connection: nothing is skipped to find the next answer.
And nothing grows without a bound: neither heads, nor lines of chunks, nor the body.
"""

import re
from dataclasses import dataclass

MAX_HEAD_BYTES = 32 << 10
"""Of all heads of one answer, interim ones included, and of its trailers. Engines send some 150 bytes."""

MAX_CHUNK_LINE_BYTES = 256
"""A chunk's size has at most 16 digits; extensions (7.1.1), which nobody uses, are what can make it longer."""

_FIELD_LINES = rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]++:[^\r\n\0]*+\r\n)*+"
"""Field lines (5); a line that goes on in the next (5.2) is none."""
_HEAD = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [^\r\n\0]*+)?\r\n(" + _FIELD_LINES + rb")")
_TRAILERS = re.compile(_FIELD_LINES)
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*+(?:;[^\r\n\0]*+)?")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_START = b"HTTP/1."

_WANTED = frozenset({b"content-length", b"transfer-encoding", b"connection", b"content-type", b"content-encoding"})

_NO_BODY = frozenset({204, 304})
"""6.3: statuses whose answers end with the head."""


class ResponseError(Exception):
    """What came cannot be used; the message says why, in words for a log line."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, whatever its status."""

    status: int
    content_type: str
    """In lower case, without parameters; empty when there was none."""
    body: bytes


class ResponseReader:
    """Reads one answer, from pieces of any size. To be dropped once it has given the answer or raised.

    A body longer than `limit_bytes` is refused, before it is read where its length is said.
    """

    __slots__ = (
        "_body",
        "_buffer",
        "_chunked",
        "_content_type",
        "_head_bytes",
        "_length",
        "_limit_bytes",
        "_status",
        "keep_alive",
    )

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._buffer = bytearray()
        self._head_bytes = 0
        """Of interim heads."""
        self._status = 0
        """0 until the final head is read."""
        self._content_type = ""
        self._length: int | None = None
        self._chunked = False
        self._body = bytearray()
        """What came of a chunked body."""
        self.keep_alive = False
        """With the answer: whether its connection can be asked again."""

    def feed(self, data: bytes) -> Answer | None:
        """The answer, once it is complete. Raises ResponseError."""
        self._buffer += data
        if not self._status and not self._read_heads():
            return None
        if self._chunked:
            return self._read_chunks()
        if self._length is None:
            self._check_length(len(self._buffer))
            return None
        if len(self._buffer) < self._length:
            return None
        return self._answer(bytes(self._buffer[: self._length]), len(self._buffer) - self._length)

    def end(self) -> Answer | None:
        """The peer will send no more: the answer, if that is how it says so (6.3); None if it was cut short."""
        if not self._status or self._chunked or self._length is not None:
            return None
        return self._answer(bytes(self._buffer), 0)

    def _read_heads(self) -> bool:
        """Whether the final head is there and read; interim answers (1xx) are passed over."""
        buffer = self._buffer
        while True:
            end = buffer.find(b"\r\n\r\n")
            if self._head_bytes + (len(buffer) if end < 0 else end) > MAX_HEAD_BYTES:
                raise ResponseError(f"the answer's head is longer than {MAX_HEAD_BYTES} bytes")
            if end < 0:
                if buffer[: len(_START)] != _START[: len(buffer)]:
                    raise ResponseError("the answer is not HTTP/1.1")
                return False
            head = _HEAD.fullmatch(buffer, 0, end + 2)
            if head is None:
                raise ResponseError("the answer is not HTTP/1.1")
            status = int(head[2])
            if status == 101:
                raise ResponseError("the answer changes to a protocol that was not asked for")
            if status >= 200:
                self._read_head(status, http_1_0=head[1] == b"0", lines=head[3])
            else:
                self._head_bytes += end
            del buffer[: end + 4]
            if self._status:
                return True

    def _read_head(self, status: int, *, http_1_0: bool, lines: bytes) -> None:
        fields = dict[bytes, bytes]()
        for line in lines.split(b"\r\n"):
            name, _, value = line.partition(b":")
            name = name.lower()
            if name in _WANTED:
                value = value.strip(b" \t")
                fields[name] = fields[name] + b"," + value if name in fields else value
        if fields.get(b"content-encoding", b"identity").lower() != b"identity":
            # A few KB can hold gigabytes: better no answer than an unbounded one.
            raise ResponseError("the answer is compressed, though that was not asked for")
        options = {option.strip(b" \t").lower() for option in fields.get(b"connection", b"").split(b",")}
        self._read_framing(fields, no_body=status in _NO_BODY)
        if http_1_0 and self._chunked:
            raise ResponseError("the answer is chunked, which HTTP/1.0 does not know")  # 6.1
        persistent = b"keep-alive" in options if http_1_0 else b"close" not in options  # 9.3
        self.keep_alive = persistent and (self._chunked or self._length is not None)
        self._content_type = fields.get(b"content-type", b"").partition(b";")[0].strip(b" \t").lower().decode("latin-1")
        self._status = status

    def _read_framing(self, fields: dict[bytes, bytes], *, no_body: bool) -> None:
        """6.3. Where it is said in two ways how long the body is, neither is believed."""
        encoding, length = fields.get(b"transfer-encoding"), fields.get(b"content-length")
        if no_body:
            self._length = 0
        elif encoding is not None:
            if encoding.lower() != b"chunked" or length is not None:
                raise ResponseError("the answer's transfer-encoding is not plain chunked")
            self._chunked = True
        elif length is not None:
            if not _LENGTH.fullmatch(length):
                raise ResponseError("the answer's content-length is no length")
            self._length = int(length)
            self._check_length(self._length)

    def _read_chunks(self) -> Answer | None:
        """7.1"""
        buffer = self._buffer
        while True:
            line_end = buffer.find(b"\r\n", 0, MAX_CHUNK_LINE_BYTES)
            if line_end < 0:
                if len(buffer) >= MAX_CHUNK_LINE_BYTES:
                    raise ResponseError("a chunk of the answer begins with no size")
                return None
            line = _CHUNK_LINE.fullmatch(buffer, 0, line_end)
            if line is None:
                raise ResponseError("a chunk of the answer begins with no size")
            size = int(line[1], 16)
            if not size:
                return self._read_trailers(line_end)
            self._check_length(len(self._body) + size)
            start, end = line_end + 2, line_end + 2 + size
            if buffer[end : end + 2] != b"\r\n"[: max(0, len(buffer) - end)]:
                raise ResponseError("a chunk of the answer is longer than its size")
            if len(buffer) < end + 2:
                return None
            self._body += buffer[start:end]
            del buffer[: end + 2]

    def _read_trailers(self, line_end: int) -> Answer | None:
        """7.1.2: looked at only to find their end."""
        end = self._buffer.find(b"\r\n\r\n", line_end)
        if (len(self._buffer) if end < 0 else end) - line_end > MAX_HEAD_BYTES:
            raise ResponseError(f"the answer's trailers are longer than {MAX_HEAD_BYTES} bytes")
        if end < 0:
            return None
        if not _TRAILERS.fullmatch(self._buffer, line_end + 2, end + 2):
            raise ResponseError("the answer's trailers are no fields")
        return self._answer(bytes(self._body), len(self._buffer) - end - 4)

    def _check_length(self, length: int) -> None:
        if length > self._limit_bytes:
            raise ResponseError(f"the answer is longer than {self._limit_bytes} bytes")

    def _answer(self, body: bytes, surplus_bytes: int) -> Answer:
        if surplus_bytes:
            self.keep_alive = False  # nobody asked for more: whatever it is, it is not the next answer
        return Answer(self._status, self._content_type, body)
