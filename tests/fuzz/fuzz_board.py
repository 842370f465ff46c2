"""A page of memory that a fuzzing process shares with its parent: counters, and the input at work.

When the process hangs or dies, in C code too, the parent still knows what it was doing.
"""

import mmap
import struct
from pathlib import Path
from typing import NamedTuple, Self

MAX_INPUT_BYTES = 4096
"""Longer inputs find little more, and each costs more; also libFuzzer's default `-max_len`."""

_COUNTERS = struct.Struct("<QQQI")
_SIZE = _COUNTERS.size + MAX_INPUT_BYTES


class Counters(NamedTuple):
    """So far."""

    inputs: int = 0
    """Begun, not counting those that findings are made smaller with."""
    behaviours: int = 0
    """Kinds of outcome that were told apart."""
    findings: int = 0


class Board:
    """Written by the child only. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        """`path`: of a file that `make` made."""
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _SIZE)

    @staticmethod
    def make(path: Path) -> None:
        """An empty page, for both sides to open."""
        path.write_bytes(bytes(_SIZE))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Neither side needs it any more; the file stays."""
        self._memory.close()

    def write(self, counters: Counters, current: bytes) -> None:
        """The counters as they are, and the input that is begun now."""
        _COUNTERS.pack_into(self._memory, 0, *counters, len(current))
        self._memory[_COUNTERS.size : _COUNTERS.size + len(current)] = current

    def read(self) -> tuple[Counters, bytes]:
        """Counters and the input at work; torn only while the child runs."""
        *counters, length = _COUNTERS.unpack_from(self._memory, 0)
        return Counters(*counters), self._memory[_COUNTERS.size : _COUNTERS.size + length]
