"""Bootstrap rooms: the number under which prefill and decode of one request meet.

No I/O. Rule (SGLang 0.5.23): an integer in [0, 2^63-1], unique among live requests, fresh for every attempt; a batch
of N uses N consecutive ones; an engine that decides by itself takes the rank `room % dp_size`.
"""

import random
from typing import Final

ROOM_LIMIT: Final = 1 << 63
"""Rooms are below this (int64 over HTTP)."""

_MAX_GAP: Final = 1 << 10
"""Rooms are drawn this far apart at most, so that `room % dp_size` is uniform; 2^53 draws fit before the start comes
round again."""


class Rooms:
    """Draws rooms that ascend from a random start with random gaps: unique without remembering any.

    The start keeps two services in front of the same engines apart: each uses a tiny part of 2^63 values.
    """

    def __init__(self, rng: random.Random) -> None:
        self._uniform = rng.random
        self._next = rng.randrange(ROOM_LIMIT)

    def draw(self, count: int = 1, *, modulus: int = 1, residue: int = 0) -> int:
        """Reserve `count` consecutive rooms; the first is congruent to `residue` modulo `modulus`."""
        first = self._next + int(self._uniform() * _MAX_GAP)
        first += (residue - first) % modulus
        if first + count > ROOM_LIMIT:
            first = residue % modulus
        self._next = first + count
        return first
