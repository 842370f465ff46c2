"""One `extproc` command as a child process that logs to a file and never outlives its parent.

Synchronous. Start it from a thread that lives as long as the child should: to Linux the parent is a thread.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from extproc.child_process import tied_to_parent

POLL_S = 0.03
"""How often start-up and end are looked at. A Python process takes about a second to start."""
LAST_LINES = 15

T = TypeVar("T")


class StackError(Exception):
    """A process could not be started, or died. The message has the last lines of its log."""


class Child:
    """One running process. `name` is for messages; the log file is replaced when it exists."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path) -> None:
        """Start `python -m extproc ARGUMENTS`."""
        self.name = name
        self.log = log
        command = [sys.executable, "-m", "extproc", *arguments]
        with log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                tied_to_parent(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in a terminal is for the parent, which stops its children in order
            )

    @property
    def pid(self) -> int:
        """Process id; the process may be over."""
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    @property
    def log_text(self) -> str:
        """What it has written so far."""
        return self.log.read_text(errors="replace")

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens when the process is over."""
        self._process.send_signal(number)

    def wait_until(self, look: Callable[[], T | None], state: str, timeout_s: float) -> T:
        """Call `look` until it gives something other than None. `state`: what is awaited, as in "was not STATE".

        Raises StackError when the process ends before that, or the time is over.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            ended, late = self.exit_status is not None, time.monotonic() > deadline_s
            found = look()
            if found is not None:
                return found
            if ended:
                raise self.failure(f"ended before it was {state}")
            if late:
                raise self.failure(f"was not {state} within {timeout_s:g} s")
            time.sleep(POLL_S)

    def failure(self, what: str) -> StackError:
        """An error to raise, with what the process said last. `what` completes a sentence that begins with its name."""
        status = self.exit_status
        state = "still running" if status is None else exit_reason(status)
        lines = self.log_text.splitlines()[-LAST_LINES:] or ["(nothing)"]
        said = "\n".join(f"  {line}" for line in lines)
        return StackError(f"{self.name} {what} ({state}). Last lines of its log:\n{said}")

    def stop(self, timeout_s: float) -> None:
        """SIGTERM, then SIGKILL when it takes too long. Safe to call twice."""
        self._process.terminate()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self._process.kill()
        self._process.wait()


def exit_reason(status: int) -> str:
    """A process's exit status in words."""
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
