"""Numbers in headers, which anybody may have written."""

from typing import Final

MAX_DIGITS: Final = 19
"""As many as 2^63 has; Python takes long for thousands, and refuses more than 4,300 with an error."""


def number(text: str) -> int | None:
    """A header's value as a number of at least 0; None for anything else."""
    return int(text) if text.isdecimal() and len(text) <= MAX_DIGITS else None
