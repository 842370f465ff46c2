"""Makes new inputs out of old ones; seeded, so that a run can be repeated."""

import random
from collections.abc import Sequence

from fuzz_board import MAX_INPUT_BYTES

MOST_CHANGES = 6
FRESH_SHARE = 0.02
"""Inputs that owe nothing to the old ones."""
NUMBERS = (b"0", b"1", b"-1", b"2", b"4096", b"65536", b"9223372036854775808", b"1e400", b"0.1", b"NaN")


class Mutator:
    """Keeps inputs that were worth it, and varies them."""

    def __init__(self, seeds: Sequence[bytes], words: Sequence[bytes], rng: random.Random) -> None:
        self._kept = list(seeds) or [b""]
        self._words = (*words, *NUMBERS)
        self._rng = rng
        self._changes = (
            self._flip,
            self._byte,
            self._word,
            self._word,
            self._cut,
            self._repeat,
            self._cross,
        )

    def keep(self, data: bytes) -> None:
        """It did something new: build on it."""
        self._kept.append(data)

    def make(self) -> bytes:
        """The next input."""
        rng = self._rng
        if rng.random() < FRESH_SHARE:
            return rng.randbytes(rng.randrange(64))
        data = bytearray(rng.choice(self._kept))
        for _ in range(rng.randint(1, MOST_CHANGES)):
            rng.choice(self._changes)(data)
        return bytes(data[:MAX_INPUT_BYTES])

    def _at(self, data: bytearray) -> int:
        return self._rng.randint(0, len(data))

    def _flip(self, data: bytearray) -> None:
        if data:
            data[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)

    def _byte(self, data: bytearray) -> None:
        at = self._at(data)
        data[at : at + self._rng.randint(0, 1)] = self._rng.randbytes(1)

    def _word(self, data: bytearray) -> None:
        at, word = self._at(data), self._rng.choice(self._words)
        data[at : at + self._rng.choice((0, len(word)))] = word

    def _cut(self, data: bytearray) -> None:
        at = self._at(data)
        del data[at : at + self._rng.randint(1, 16)]

    def _repeat(self, data: bytearray) -> None:
        at = self._at(data)
        piece = data[at : at + self._rng.randint(1, 32)]
        data[at:at] = piece * self._rng.choice((1, 2, 16))

    def _cross(self, data: bytearray) -> None:
        other = self._rng.choice(self._kept)
        data[self._at(data) :] = other[self._rng.randint(0, len(other)) :]
