"""What every benchmark does at its end: processes are stopped, results written."""

import contextlib
import json
import subprocess
from pathlib import Path
from typing import Any


def end(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """Ask a process to end, and make it if it has not within `patience_s`."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience_s)
    if process.poll() is None:
        process.kill()
        process.wait()


def write_json(target: Path, results: dict[str, Any]) -> None:
    """Into a file, or with `-` to standard output."""
    text = json.dumps(results, indent=2)
    if target == Path("-"):
        print(text)
    else:
        target.write_text(text + "\n")
