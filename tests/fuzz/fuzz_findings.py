"""Findings: told apart, made smaller, written down so that they can be repeated."""

import hashlib
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from fuzz_target import Target

SMALLER_TRIES = 3000
SMALLER_S = 10.0
"""What making a finding smaller may cost, in tries and in time."""
MOST_FINDINGS = 20
"""Of one target; more are counted as the last one."""

SLOW_FACTOR = 200.0
"""An input that takes this many times what inputs of its length take on average is a finding."""
SLOW_FLOOR_S = 0.1
"""But not below this: a garbage collection may fall into any input."""
SLOW_TRIES = 3
BASE_BYTES = 64
"""What an empty input counts for when times are compared by length."""


class TooSlow(Exception):
    """An input took far longer than its length explains."""


class Pace:
    """What inputs cost on average, in CPU time of the thread: it does not depend on who else is on the machine."""

    def __init__(self) -> None:
        self._spent_s = 0.0
        self._bytes = 0

    def limit_s(self, data: bytes) -> float:
        """What this input may cost."""
        mean = self._spent_s / self._bytes if self._bytes else 0.0
        return max(SLOW_FLOOR_S, SLOW_FACTOR * mean * (len(data) + BASE_BYTES))

    def took(self, data: bytes, spent_s: float) -> None:
        """Note one that was not slow."""
        self._spent_s += spent_s
        self._bytes += len(data) + BASE_BYTES


def check_pace(check: Callable[[bytes], object], data: bytes, limit_s: float) -> None:
    """Raise TooSlow if it is slow again and again."""
    best_s = min(_seconds(check, data) for _ in range(SLOW_TRIES))
    if best_s > limit_s:
        raise TooSlow(f"{len(data)} bytes took {best_s:.2f} s, more than {limit_s:.2f} s")


def _seconds(check: Callable[[bytes], object], data: bytes) -> float:
    started_s = time.thread_time()
    check(data)
    return time.thread_time() - started_s


def kind(error: BaseException) -> str:
    """Equal for errors that have one cause, as far as can be told: type and place."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__} at {place}"


def smaller(check: Callable[[bytes], object], data: bytes, wanted: str) -> bytes:
    """An input with the same kind of error and fewer bytes: chunks are left out while that works."""
    tries, size = SMALLER_TRIES, max(1, len(data) // 2)
    deadline_s = time.monotonic() + SMALLER_S
    while size:
        at = 0
        while at < len(data) and tries and time.monotonic() < deadline_s:
            tries -= 1
            shorter = data[:at] + data[at + size :]
            if _fails_with(check, shorter) == wanted:
                data = shorter
            else:
                at += size
        size //= 2
    return data


def _fails_with(check: Callable[[bytes], object], data: bytes) -> str:
    try:
        check(data)
    except Exception as error:
        return kind(error)
    return ""


def save(folder: Path, target: Target, data: bytes, what: str) -> Path:
    """Write the input, and beside it what it does and how to see it again."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{target.name}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    again = f'make fuzz ARGS="--again {path}"'
    path.with_suffix(".txt").write_text(f"{again}\n\n{data!r}\n\n{what}\n")
    return path
