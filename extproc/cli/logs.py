"""Logging of the command line's programs."""

import logging
import sys


def setup_logging(level: str, process: int | None = None) -> None:
    """Log to standard error, one line a message. `level` as in `Config.log_level`; `process`: which of several."""
    origin = "" if process is None else f"process={process} "
    logging.basicConfig(
        level={"warn": "WARNING"}.get(level, level.upper()),
        format=f"%(asctime)s %(levelname)-7s %(name)s: {origin}%(message)s",
        stream=sys.stderr,
    )
