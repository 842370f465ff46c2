"""What the process asks of its allocator and its garbage collector."""

import ctypes
import gc

M_MMAP_THRESHOLD = -3
"""`malloc.h` of glibc."""
LARGE_BYTES = 4 << 20
"""Blocks from here on get pages of their own. By default glibc raises that limit with the first large block it frees,
up to 32 MiB: after 32 uploads of 20 MB at once the process kept 981 MB, with this 98 MB. Chats are far below."""


def give_back_large_blocks() -> None:
    """For the whole process, from now on. Does nothing where the C library is another."""
    try:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
    except (AttributeError, OSError):
        return


YOUNG_OBJECTS = 10_000
"""More than what a few hundred requests under way are made of. With Python's 700, each of them was looked at a few
times in its life: 5 % of the service's time."""


def spare_what_stays() -> None:
    """Once the service is up: the garbage collector need not look at what is there by now.

    Modules alone are 100,000 objects, and a full collection of them stopped all requests for 50 to 100 ms, every few
    seconds under load. Requests leave nothing to collect: no cycles, which tests/lean/test_lean_garbage.py sees to.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 10, 10)
