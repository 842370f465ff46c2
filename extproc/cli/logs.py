"""Logging of the command line's programs."""

import logging
import sys


def setup_logging(level: str) -> None:
    """Log to standard error, one line a message. `level` as in `Config.log_level`."""
    logging.basicConfig(
        level={"warn": "WARNING"}.get(level, level.upper()),
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        stream=sys.stderr,
    )
