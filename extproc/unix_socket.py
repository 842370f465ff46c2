"""The gRPC port as a unix socket: who may connect, and what becomes of one that an earlier process left."""

import contextlib
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from extproc.errors import ConfigError
from extproc.file_version import file_version

MAX_PATH_BYTES = 107
"""Of Linux' `sockaddr_un.sun_path` (108), the final zero apart."""
NOT_OTHERS = 0o117
"""Umask: owner and group may connect (mode 0660), so that Envoy can run as another user of the same group."""
CONNECT_TIMEOUT_S = 1.0
"""A listener of the same machine accepts at once; one whose backlog is full is alive, too."""


@contextlib.contextmanager
def bound(path: Path, bind: Callable[[], object]) -> Iterator[None]:
    """The socket that `bind` makes at `path`, for its owner and group; removed at the end, if it is still that one.

    gRPC replaces a socket without asking who listens on it, so that is asked here. Raises ConfigError.
    """
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ConfigError(f"--grpc-uds: {path} is longer than {MAX_PATH_BYTES} bytes, the most a unix socket may have")
    _remove_leftover(path)
    umask = os.umask(NOT_OTHERS)  # the whole process's, so for this one moment only
    try:
        bind()
    finally:
        os.umask(umask)
    ours = file_version(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if file_version(path) == ours:  # not the socket of a next process, which may listen here already
                path.unlink()


def _remove_leftover(path: Path) -> None:
    """Remove a socket that nobody listens on."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"--grpc-uds: {path}: {error.strerror}") from None
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"--grpc-uds: {path} is there and no socket: name another path, or remove it")
    try:
        if not _somebody_listens(path):
            path.unlink(missing_ok=True)
            return
    except OSError as error:
        raise ConfigError(f"--grpc-uds: {path}: {error.strerror or error}") from None
    raise ConfigError(f"--grpc-uds: another process listens on {path}: stop it, or name another path")


def _somebody_listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(CONNECT_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except TimeoutError:
            return True
    return True
