"""Header fields: HPACK blocks in, literal blocks out, and what RFC 9113 section 8 allows in a request.

No I/O. Decoding is the `hpack` package's; repeated blocks are looked up, as one client sends the same ones again.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from hpack import Decoder, HPACKError, OversizedHeaderListError
from hpack.table import HeaderTable

Fields = tuple[tuple[bytes, bytes], ...]
"""Names (lower case, pseudo-header fields with their colon) and values, in the order sent."""

Meaning = TypeVar("Meaning")

MAX_CACHED_BLOCKS: Final = 64
MAX_CACHED_BLOCK_BYTES: Final = 1024
"""With the one above: 64 KiB of keys a connection, and some ten times that for what they decode to."""

_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
"""RFC 9110 5.1 (token), without upper case: RFC 9113 8.2.1."""
_BAD_VALUE: Final = re.compile(rb"[\x00\r\n]|^[ \t]|[ \t]$")
"""RFC 9113 8.2.1."""
_CONNECTION_FIELDS: Final = frozenset(
    {b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"}
)
"""RFC 9113 8.2.2."""
_PSEUDO: Final = frozenset({b":method", b":scheme", b":path", b":authority"})
_REQUIRED: Final = frozenset({b":method", b":scheme", b":path"})


class BlockError(Exception):
    """A block that cannot be decoded: the two sides' tables no longer agree, so the connection is lost."""


class TooManyFields(Exception):
    """A block that decodes to more than was announced; decoding stopped in the middle, so the connection is lost."""


@dataclass(slots=True)
class Block:
    """One decoded header block."""

    fields: Fields
    fault: str | None
    """Why it is not a well-formed request; None when it is one."""
    meaning: Any
    """What the layer above made of it; None when it is not a request."""
    content_length: int | None = None


class _CountingTable(HeaderTable):
    """Knows how often an entry was added: until then a block means the same as before."""

    additions = 0

    def add(self, name: bytes, value: bytes) -> None:
        self.additions += 1
        super().add(name, value)


class BlockDecoder(Generic[Meaning]):
    """Decodes the blocks of one connection, in the order they come."""

    def __init__(self, max_list_bytes: int, interpret: Callable[[Fields], Meaning]) -> None:
        """`interpret` is called once for each different request."""
        self._decoder = Decoder(max_list_bytes)
        self._table = self._decoder.header_table = _CountingTable()
        self._interpret = interpret
        self._cache: dict[bytes, Block] = {}

    def decode(self, block: bytes) -> Block:
        """Raises BlockError, TooManyFields."""
        known = self._cache.get(block)
        return known if known is not None else self._decode(block)

    def _decode(self, data: bytes) -> Block:
        additions = self._table.additions
        try:
            fields: Fields = tuple((name, value) for name, value in self._decoder.decode(data, raw=True))
        except OversizedHeaderListError as error:
            raise TooManyFields(str(error)) from None
        except HPACKError as error:
            raise BlockError(str(error)) from None
        fault, length = check_request(fields)
        block = Block(fields, fault, None if fault else self._interpret(fields), length)
        resized = data[:1] and data[0] & 0xE0 == 0x20  # dynamic table size update: RFC 7541 6.3
        if self._table.additions != additions or resized:
            self._cache.clear()
        elif len(data) <= MAX_CACHED_BLOCK_BYTES:
            if len(self._cache) >= MAX_CACHED_BLOCKS:
                self._cache.clear()
            self._cache[data] = block
        return block


def check_request(fields: Fields) -> tuple[str | None, int | None]:
    """Why the fields are not a request (RFC 9113 8.2, 8.3), and the content-length, where there is one."""
    seen = set[bytes]()
    length = None
    regular = False
    for name, value in fields:
        if name[:1] == b":":
            if regular:
                return "pseudo-header field after a regular one", None
            if name not in _PSEUDO or name in seen:
                return "unknown or repeated pseudo-header field", None
            if _BAD_VALUE.search(value):
                return "forbidden character in a value", None
            seen.add(name)
            continue
        regular = True
        if fault := _check_field(name, value):
            return fault, None
        if name == b"content-length":
            if not value.isdigit() or len(value) > 18 or length not in (None, int(value)):
                return "content-length is not one number", None
            length = int(value)
    pseudo = dict(fields)
    required = {b":method", b":authority"} if pseudo.get(b":method") == b"CONNECT" else _REQUIRED
    if not required <= seen:
        return "a pseudo-header field is missing", None
    if required is not _REQUIRED and seen != required:
        return "CONNECT with :scheme or :path", None
    if pseudo.get(b":path") == b"":
        return "empty :path", None
    return None, length


def check_trailers(fields: Fields) -> str | None:
    """Why the fields cannot end a request (RFC 9113 8.1)."""
    for name, value in fields:
        if name[:1] == b":":
            return "pseudo-header field in trailers"
        if fault := _check_field(name, value):
            return fault
    return None


def _check_field(name: bytes, value: bytes) -> str | None:
    if not _NAME.fullmatch(name):
        return "forbidden character in a name"
    if _BAD_VALUE.search(value):
        return "forbidden character in a value"
    if name in _CONNECTION_FIELDS or (name == b"te" and value != b"trailers"):
        return "connection-specific field"
    return None


def encode_block(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A block that stands alone: literals without indexing (RFC 7541 6.2.2), and :status from the static table."""
    parts = list[bytes]()
    for name, value in fields:
        if (name, value) == (b":status", b"200"):
            parts.append(b"\x88")
        elif name == b":status":
            parts += [b"\x08", _length(value), value]
        else:
            parts += [b"\x00", _length(name), name, _length(value), value]
    return b"".join(parts)


def _length(text: bytes) -> bytes:
    """RFC 7541 5.1, with a prefix of 7 bits; the eighth says: no Huffman coding."""
    rest = len(text)
    if rest < 127:
        return bytes((rest,))
    out = bytearray((127,))
    rest -= 127
    while rest >= 128:
        out.append(rest & 127 | 128)
        rest >>= 7
    out.append(rest)
    return bytes(out)
