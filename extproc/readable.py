"""Figures as people read them: three digits and a unit. Pure."""

import math

UNKNOWN = "-"


def tokens(count: float | None) -> str:
    """`0`, `35`, `1.2k`, `12.3k`, `123k`, `1.2M`; of requests, too."""
    if count is None:
        return UNKNOWN
    for size, unit in ((1e6, "M"), (1e3, "k")):
        scaled = count / size
        if scaled >= 0.9995:  # which would round to 1000 of the smaller unit
            return f"{scaled:.0f}{unit}" if scaled >= 99.95 else f"{scaled:.1f}{unit}"
    return f"{count:.0f}"


def duration(seconds: float | None) -> str:
    """`3 ms`, `120 ms`, `1.2 s`, `85 s`, `12 min`, `5 h`; infinite where it is longer than can be told."""
    if seconds is None:
        return UNKNOWN
    if math.isinf(seconds):
        return "too long"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    if seconds < 119.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"


def times(ratio: float) -> str:
    """`1.0x`, `3.4x`, `12x`; infinite: the others have nothing."""
    if math.isinf(ratio):
        return "alone"
    return f"{ratio:.1f}x" if ratio < 9.95 else f"{ratio:.0f}x"
