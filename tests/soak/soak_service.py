"""`extproc` with a window: on SIGUSR1 it writes what lives in it to a file, so that a leak has a name.

python tests/soak/soak_service.py FILE COMMAND [ARGUMENT…]
"""

import gc
import json
import signal
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from types import FrameType

from extproc.cli import main

MOST_KINDS = 400
BLOCKS = "blocks of memory"
"""All that Python's allocator has given out: also what the collector does not know (numbers, text, bytes)."""


def write_census(path: Path) -> None:
    """Objects that the garbage collector knows, by type, after a collection; most frequent first."""
    gc.collect()
    kinds = Counter(f"{type(one).__module__}.{type(one).__qualname__}" for one in gc.get_objects())
    kinds[BLOCKS] = sys.getallocatedblocks()
    if tracemalloc.is_tracing():  # PYTHONTRACEMALLOC=1: where what lives was made, in bytes
        for line in tracemalloc.take_snapshot().statistics("lineno")[:MOST_KINDS]:
            kinds[f"bytes from {line.traceback}"] = line.size
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(dict(kinds.most_common(2 * MOST_KINDS))))
    unfinished.rename(path)


def serve(path: Path, arguments: list[str]) -> int:
    """Run the command, with the window open."""

    def look(_number: int, _frame: FrameType | None) -> None:
        write_census(path)

    signal.signal(signal.SIGUSR1, look)
    return main(arguments)


if __name__ == "__main__":
    sys.exit(serve(Path(sys.argv[1]), sys.argv[2:]))
