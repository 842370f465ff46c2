"""Tells whether a file is still the one that was read. For files that are replaced while we run: keys, certificates."""

import os
from pathlib import Path

FileVersion = tuple[int, int, int, int]


def file_version(path: Path) -> FileVersion:
    """Different after each rewrite or replacement, symbolic links followed (Kubernetes swaps one to renew a secret).

    Blocks for a system call. Raises OSError.
    """
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
