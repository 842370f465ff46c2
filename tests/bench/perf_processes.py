"""CPU time and memory of processes, by what they run. Linux: /proc."""

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench_cpu import _children, _process_s

_PROC = Path("/proc")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

PYTHON, ENVOY, OTHER = "python", "envoy", "other"


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU seconds since a process began; a difference of two looks is what counts."""

    by_kind: dict[str, float]

    @property
    def total_s(self) -> float:
        """All processes."""
        return sum(self.by_kind.values())

    def since(self, before: "Usage") -> "Usage":
        """What was used in between."""
        return Usage({kind: seconds - before.by_kind.get(kind, 0.0) for kind, seconds in self.by_kind.items()})


def family(pid: int) -> list[int]:
    """A process and all that came of it."""
    return [pid, *_children(pid)]


def usage(pids: Iterable[int]) -> Usage:
    """CPU time of the processes by kind."""
    by_kind: dict[str, float] = {}
    for pid in pids:
        # A child that has just ended: those that serve requests stay.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            kind = _kind(pid)
            by_kind[kind] = by_kind.get(kind, 0.0) + _process_s(pid)
    return Usage(by_kind)


def resident_bytes(pids: Iterable[int]) -> int:
    """RSS of all together; pages that they share count once for each."""
    pages = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            pages += int((_PROC / str(pid) / "statm").read_text().split()[1])
    return pages * _PAGE_BYTES


def _kind(pid: int) -> str:
    name = (_PROC / str(pid) / "exe").readlink().name
    return ENVOY if "envoy" in name else PYTHON if "python" in name else OTHER
