"""Engines, `extproc serve` and an Envoy that was configured by `extproc envoy`: each started and stopped by itself."""

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import yaml
from conftest import until

from extproc.child_process import tied_to_parent
from extproc.demo.child import Child
from extproc.demo.stack import free_port
from extproc.envoy_process import find_binary

START_S = 60.0
STOP_S = 15.0
QUICK = {"worker_startup_check_interval": 0.2, "health_check_interval_secs": 1, "shutdown_drain_delay_secs": 0}


class Engines:
    """One prefill and one decode engine."""

    def __init__(self, folder: Path, flags: Sequence[str] = ()) -> None:
        self._children = {
            role: Child(
                f"{role} engine",
                ("engine", "--role", role, "--port", "0", "--bootstrap-port", "0", "--dp-size", "2", *flags),
                folder / f"{role}.log",
            )
            for role in ("prefill", "decode")
        }
        self.urls = {role: self._url(child) for role, child in self._children.items()}

    def __enter__(self) -> "Engines":
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children.values():
            child.stop(STOP_S)

    @property
    def settings(self) -> dict:
        return {role: [{"url": url}] for role, url in self.urls.items()}

    @property
    def logs(self) -> str:
        return "".join(child.log_text for child in self._children.values())

    def bodies(self, role: str) -> int:
        """Requests that the engine got."""
        return len(httpx.get(self.urls[role] + "/sim/requests").json())

    @staticmethod
    def _url(child: Child) -> str:
        found = child.wait_until(lambda: re.search(r"engine on (http://\S+)", child.log_text), "ready", START_S)
        return found[1]


class SplitGateway:
    """`settings` are keys of the service's YAML file, and of Envoy's unless that gets its own."""

    def __init__(self, folder: Path, engines: Engines, settings: dict) -> None:
        self._folder = folder
        self.port, self.grpc_port, self.status_port = free_port(), free_port(), free_port()
        self.settings = {
            **QUICK,
            **engines.settings,
            "host": "127.0.0.1",
            "port": self.port,
            "grpc_port": self.grpc_port,
            "prometheus_port": self.status_port,
            **settings,
        }
        self.url = f"http://127.0.0.1:{self.port}"
        self.status_url = f"http://127.0.0.1:{self.status_port}"
        self._starts = 0

    @contextlib.contextmanager
    def serve(self, settings: dict | None = None) -> Iterator[Child]:
        """`extproc serve`, ready."""
        self._starts += 1
        config = self._file(f"serve-{self._starts}", settings)
        child = Child("the service", ("serve", "--config", str(config)), self._folder / f"serve-{self._starts}.log")
        try:
            child.wait_until(lambda: self._is_ready() or None, "ready", START_S)
            yield child
        finally:
            child.stop(STOP_S)

    @contextlib.contextmanager
    def envoy(self, settings: dict | None = None, flags: Sequence[str] = ()) -> Iterator[str]:
        """An Envoy of one thread; yields the bootstrap that `extproc envoy` printed."""
        config = self._file("envoy-settings", settings)
        printed = extproc("envoy", "--config", str(config), "--admin", "127.0.0.1:0", *flags)
        assert printed.returncode == 0, printed.stderr
        bootstrap, address = self._folder / "envoy.yaml", self._folder / "admin"
        bootstrap.write_text(printed.stdout)
        address.unlink(missing_ok=True)
        arguments = ("--config-path", bootstrap, "--admin-address-path", address, "--disable-hot-restart")
        command = [find_binary(), *arguments, "--concurrency", "1", "--log-level", "warning"]
        with (self._folder / "envoy.log").open("ab") as log:
            process = subprocess.Popen(tied_to_parent([*map(str, command)]), stdout=log, stderr=log)
        try:
            until(lambda: _is_up(process, address), "Envoy is up")
            yield printed.stdout
        finally:
            process.terminate()
            process.wait(STOP_S)

    @property
    def admin(self) -> str:
        """URL of Envoy's admin interface."""
        return f"http://{(self._folder / 'admin').read_text().strip()}"

    def ask(self, tokens: int = 2) -> httpx.Response:
        body = {"text": "hello", "sampling_params": {"max_new_tokens": tokens}}
        return httpx.post(self.url + "/generate", json=body, timeout=60)

    def _file(self, name: str, settings: dict | None) -> Path:
        path = self._folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self.settings if settings is None else settings))
        return path

    def _is_ready(self) -> bool:
        try:
            return httpx.get(self.status_url + "/ready").status_code == 200
        except httpx.HTTPError:
            return False


def extproc(*arguments: str) -> subprocess.CompletedProcess[str]:
    """One command of the program, to its end."""
    command = [sys.executable, "-m", "extproc", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def killed(child: Child) -> None:
    """SIGKILL: nothing is cleaned up."""
    child.signal(signal.SIGKILL)
    child.kill()


def _is_up(process: subprocess.Popen[bytes], address: Path) -> bool:
    assert process.poll() is None, "Envoy has ended"
    try:
        return httpx.get(f"http://{address.read_text().strip()}/ready").status_code == 200
    except (OSError, httpx.HTTPError):
        return False
