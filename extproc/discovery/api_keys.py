"""The bearer tokens of engines, for checks, discovery and scrapes: from files or the environment, never shown.

A file is read again when it has changed. Clients' own `Authorization` headers pass through Envoy and never come here.
"""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from extproc.config import Config, WorkerConfig
from extproc.errors import ConfigError
from extproc.file_version import FileVersion, file_version
from extproc.model import Role

log = logging.getLogger(__name__)

MAX_KEY_FILE_BYTES = 64 << 10
"""Beyond what any HTTP server takes as a header: somebody named the wrong file."""

_KEY = re.compile(rb"[\x21-\x7e]+")
"""What may follow `Bearer `: visible ASCII in one piece. Checked here, as HTTP libraries quote a bad value when they
refuse it."""


class ApiKeys:
    """The token for each worker: its own, else the one for all, else none."""

    def __init__(self, config: Config, environ: Mapping[str, str] = os.environ) -> None:
        """Raises ConfigError for a key that is not there or cannot be a token."""
        files = dict[str, _KeyFile]()

        def source(place: str, file: str | None, variable: str | None) -> "_KeyFile | _Key | None":
            if file is not None:
                if file not in files:
                    files[file] = _KeyFile(place, Path(file))
                return files[file]
            if variable is None:
                return None
            if variable not in environ:
                raise ConfigError(f"{place}api_key_env: the environment has no variable {variable}")
            return _Key(_token(f"{place}api_key_env: {variable}", os.fsencode(environ[variable])))

        default = source("", config.api_key_file, config.api_key_env)
        self._sources = dict[str, _KeyFile | _Key]()
        for role in Role:
            entries: tuple[WorkerConfig, ...] = config.prefill if role is Role.PREFILL else config.decode
            for number, entry in enumerate(entries):
                found = source(f"{role}[{number}].", entry.api_key_file, entry.api_key_env) or default
                if found is not None:
                    self._sources[entry.to_worker(role).name] = found

    def __repr__(self) -> str:
        return f"<ApiKeys of {len(self._sources)} workers>"

    def headers(self, worker_name: str) -> Mapping[str, str]:
        """What to send to the worker; empty without a key. To be asked anew for each request."""
        source = self._sources.get(worker_name)
        return {} if source is None else {"authorization": f"Bearer {source.token()}"}


class _Key:
    """A token that stays as it is. A class of its own, so that no `repr` shows it."""

    __slots__ = ("_token",)

    def __init__(self, token: str) -> None:
        self._token = token

    def token(self) -> str:
        return self._token


class _KeyFile:
    """A token in a file."""

    __slots__ = ("_path", "_place", "_token", "_version")

    def __init__(self, place: str, path: Path) -> None:
        self._place = f"{place}api_key_file"
        self._path = path
        self._version: FileVersion | None = None
        try:
            self._version = file_version(path)
            self._token = self._read()
        except OSError as error:
            raise ConfigError(f"{self._place}: {path}: {error.strerror}") from None

    def token(self) -> str:
        """The one in the file now; while there is none that can be used, the last one."""
        try:
            version = file_version(self._path)
        except OSError:
            version = None
        if version != self._version:
            self._version = version
            try:
                self._token = self._read()
            except ConfigError as error:
                log.error("the last API key is used on: %s", error)  # noqa: TRY400 - the message says it all
            except OSError as error:
                log.error("the last API key is used on: %s: %s", self._path, error.strerror)  # noqa: TRY400 - as above
            else:
                log.info("new API key read from %s", self._path)
        return self._token

    def _read(self) -> str:
        """Raises OSError, ConfigError."""
        with self._path.open("rb") as file:
            return _token(f"{self._place}: {self._path}", file.read(MAX_KEY_FILE_BYTES).strip())


def _token(place: str, value: bytes) -> str:
    """Raises ConfigError, which does not quote the value."""
    if not _KEY.fullmatch(value):
        raise ConfigError(f"{place}: expected one key of visible ASCII characters and nothing else")
    return value.decode("ascii")
