"""All processes of a gateway: simulated engines, and `extproc up` in front of them.

Synchronous, so that tests and scripts can use it from anywhere; see `child` for the one rule about threads.

    with Stack(prefill=2, decode=2, dp_size=2) as stack:
        httpx.get(stack.url + "/v1/models")
        stack.restart_gateway(["--no-dp-minimum-tokens-scheduler"])
"""

import contextlib
import random
import re
import signal
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from extproc.demo.child import Child, StackError

__all__ = ["EngineProcess", "GatewayProcess", "Stack", "StackError", "free_port"]

HOST = "127.0.0.1"
START_TIMEOUT_S = 60.0
"""Generous: a process starts in 1-2 s, but four start at once on what may be a busy machine."""
STOP_TIMEOUT_S = 15.0
"""Envoy takes 1 s to close its port, streams may go on, then Envoy has 5 s to end."""
LOOK_TIMEOUT_S = 5.0
"""For one look at a process over HTTP."""
PORTS = range(20_000, 32_000)
"""Where free ports are looked for: below Linux' range for outgoing connections (`ip_local_port_range`, from 32768),
so that none of those takes the port between the look and its use."""
GATEWAY_ATTEMPTS = 3
"""Starts with fresh ports, as another program may still be faster."""

GATEWAY_FLAGS = (
    *("--host", HOST, "--response-headers"),
    *("--worker-startup-check-interval", "0.2", "--health-check-interval-secs", "1"),
    *("--shutdown-drain-delay-secs", "0"),
)
"""Before a stack's own flags, so that those win."""

_ENGINE_READY = re.compile(r"engine on (http://\S+) \(dp \d+(?:, bootstrap (\d+))?\)")
_GATEWAY_READY = re.compile(r"gateway on (http://\S+), metrics on (http://\S+)/metrics")
_PORT_TAKEN = re.compile(r"cannot listen on|cannot bind|Address already in use")


def free_port() -> int:
    """A port of the loopback interface that nobody uses."""
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise StackError(f"found no free port on {HOST} between {PORTS.start} and {PORTS.stop}")


@dataclass(slots=True)
class EngineProcess:
    """One simulated engine."""

    label: str
    """P1, P2, … D1, D2, …"""
    role: str
    """prefill | decode"""
    dp_size: int
    process: Child
    arguments: tuple[str, ...]
    url: str = ""
    """Known once it is ready."""
    bootstrap_port: str | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def address(self) -> str:
        """`host:port`: the worker's name in the gateway."""
        return self.url.removeprefix("http://")

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self.process.exit_status is None

    def requests(self) -> list[dict[str, Any]]:
        """What the engine recorded of each request (`GET /sim/requests`), oldest first."""
        answer: list[dict[str, Any]] = self._ask("GET", "/sim/requests")
        return answer

    def forget_requests(self) -> None:
        """Empty the records."""
        self._ask("DELETE", "/sim/requests")

    def state(self) -> dict[str, Any]:
        """What runs on the engine at this moment (`GET /sim/state`)."""
        answer: dict[str, Any] = self._ask("GET", "/sim/state")
        return answer

    def _ask(self, method: str, path: str) -> Any:
        try:
            return (
                httpx.request(method, self.url + path, timeout=LOOK_TIMEOUT_S, trust_env=False)
                .raise_for_status()
                .json()
            )
        except httpx.HTTPError as error:
            raise self.process.failure(f"does not answer {method} {path}: {error!r}") from None


@dataclass(frozen=True, slots=True)
class GatewayProcess:
    """One `extproc up`."""

    process: Child
    url: str
    """For clients."""
    status_url: str
    """Base of `/metrics`, `/health` and `/ready`."""

    @property
    def pid(self) -> int:
        """The service's process id; Envoy is its child."""
        return self.process.pid


class Stack:
    """Engines and a gateway, running while the context is open. Raises StackError when something does not start.

    `up_flags` and `engine_flags` are appended to the commands, so they win over the stack's own. Logs go to files in
    `log_dir` if given, else to a temporary directory that is removed at the end.
    """

    def __init__(
        self,
        *,
        prefill: int = 2,
        decode: int = 2,
        dp_size: int = 2,
        up_flags: Sequence[str] = (),
        engine_flags: Sequence[str] = (),
        prefill_flags: Sequence[str] = (),
        decode_flags: Sequence[str] = (),
        log_dir: Path | None = None,
    ) -> None:
        self._up_flags = tuple(up_flags)
        common = ("--dp-size", str(dp_size), "--host", HOST)
        self._plan = [
            (f"P{i + 1}", "prefill", dp_size, (*common, "--bootstrap-port", "0", *engine_flags, *prefill_flags))
            for i in range(prefill)
        ] + [(f"D{i + 1}", "decode", dp_size, (*common, *engine_flags, *decode_flags)) for i in range(decode)]
        self._log_dir = log_dir
        self._gateway_starts = 0
        self._gateway: GatewayProcess | None = None
        self._cleanup = contextlib.ExitStack()
        self.engines: list[EngineProcess] = []

    @property
    def gateway(self) -> GatewayProcess:
        """The gateway that runs now (or ran last)."""
        if self._gateway is None:
            raise StackError("the gateway has not been started")
        return self._gateway

    @property
    def url(self) -> str:
        """Where clients send requests."""
        return self.gateway.url

    @property
    def status_url(self) -> str:
        """Base of the service's own `/metrics`, `/health` and `/ready`."""
        return self.gateway.status_url

    @property
    def gateway_log(self) -> str:
        """What the service and Envoy have logged since the gateway's last start."""
        return self.gateway.process.log_text

    @property
    def prefills(self) -> list[EngineProcess]:
        """The prefill engines."""
        return [engine for engine in self.engines if engine.role == "prefill"]

    @property
    def decodes(self) -> list[EngineProcess]:
        """The decode engines."""
        return [engine for engine in self.engines if engine.role == "decode"]

    def __enter__(self) -> Self:
        try:
            if self._log_dir is None:
                self._log_dir = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="extproc-demo-")))
            self._log_dir.mkdir(parents=True, exist_ok=True)
            for label, role, dp_size, arguments in self._plan:
                self.engines.append(self._launch_engine(label, role, dp_size, arguments))
            for engine in self.engines:
                self._wait_for_engine(engine)
            self._start_gateway(self._up_flags, None)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the gateway, then the engines. Safe to call twice."""
        try:
            if self._gateway is not None:
                self._gateway.process.stop(STOP_TIMEOUT_S)
            for engine in self.engines:  # all at once, rather than one after the other
                engine.process.signal(signal.SIGTERM)
        finally:
            for engine in self.engines:
                engine.process.stop(STOP_TIMEOUT_S)
            self._cleanup.close()

    def restart_gateway(self, flags: Sequence[str] | None = None) -> None:
        """Stop the gateway and start it on the same ports and engines. `flags`: in place of `up_flags`."""
        self.gateway.process.stop(STOP_TIMEOUT_S)
        self._start_gateway(self._up_flags if flags is None else tuple(flags), self._gateway)

    def restart_engine(self, engine: EngineProcess) -> None:
        """Stop an engine, if it still runs, and start it anew on its ports; it remembers nothing."""
        engine.process.stop(STOP_TIMEOUT_S)
        arguments = engine.arguments
        if engine.bootstrap_port is not None:
            arguments = (*arguments, "--bootstrap-port", engine.bootstrap_port)
        port = engine.url.rpartition(":")[2]
        fresh = self._launch_engine(engine.label, engine.role, engine.dp_size, arguments, port)
        engine.process = fresh.process
        self._wait_for_engine(engine)

    def _launch_engine(
        self, label: str, role: str, dp_size: int, arguments: tuple[str, ...], port: str = "0"
    ) -> EngineProcess:
        assert self._log_dir is not None  # noqa: S101 - set on entry
        command = ("engine", "--role", role, "--port", port, *arguments)
        process = Child(f"{role} engine {label}", command, self._log_dir / f"{label}.log")
        return EngineProcess(label, role, dp_size, process, arguments)

    @staticmethod
    def _wait_for_engine(engine: EngineProcess) -> None:
        process = engine.process
        ready = process.wait_until(lambda: _ENGINE_READY.search(process.log_text), "ready", START_TIMEOUT_S)
        engine.url = ready[1]
        engine.bootstrap_port = ready[2]

    def _start_gateway(self, flags: tuple[str, ...], before: GatewayProcess | None) -> None:
        """Start it, on the ports of the one before if that is given and they are free."""
        ports = None
        if before is not None:
            ports = tuple(int(url.rpartition(":")[2]) for url in (before.url, before.status_url))
        for attempt in range(GATEWAY_ATTEMPTS):
            port, status_port = ports or (free_port(), free_port())
            self._launch_gateway(flags, port, status_port)
            try:
                self._wait_for_gateway()
            except StackError as error:
                if attempt == GATEWAY_ATTEMPTS - 1 or not _PORT_TAKEN.search(str(error)):
                    raise
                ports = None
            else:
                return

    def _launch_gateway(self, flags: tuple[str, ...], port: int, status_port: int) -> None:
        assert self._log_dir is not None  # noqa: S101 - set on entry
        workers = [part for engine in self.engines for part in (f"--{engine.role}", engine.url)]
        addresses = ("--port", str(port), "--prometheus-host", HOST, "--prometheus-port", str(status_port))
        self._gateway_starts += 1
        process = Child(
            "the gateway",
            ("up", *workers, *addresses, *GATEWAY_FLAGS, *flags),
            self._log_dir / f"gateway-{self._gateway_starts}.log",
        )
        self._gateway = GatewayProcess(process, f"http://{HOST}:{port}", f"http://{HOST}:{status_port}")

    def _wait_for_gateway(self) -> None:
        """Until both say so: the service (a healthy pair of workers), and a request through Envoy."""
        gateway = self.gateway
        process = gateway.process
        process.wait_until(lambda: _GATEWAY_READY.search(process.log_text), "ready", START_TIMEOUT_S)
        for url in (f"{gateway.status_url}/ready", f"{gateway.url}/v1/models"):
            process.wait_until(lambda url=url: _answers(url), f"ready: no 200 from {url}", START_TIMEOUT_S)  # type: ignore[misc]


def _answers(url: str) -> bool | None:
    """Whether a GET gives 200; None if not."""
    try:
        return httpx.get(url, timeout=LOOK_TIMEOUT_S, trust_env=False).status_code == 200 or None
    except httpx.HTTPError:
        return None
