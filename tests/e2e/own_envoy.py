"""An Envoy that was somebody's before: an example of `envoy/examples/`, and what stands behind it."""

import contextlib
import re
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml
from conftest import until

from extproc.child_process import tied_to_parent
from extproc.demo.stack import free_port
from extproc.envoy_process import find_binary

EXAMPLES = Path(__file__).parents[2] / "envoy" / "examples"
STOP_S = 15.0
PLACE = re.compile(r"^( *)# -- extproc envoy .*\n(?s:.*?)^ *# -- end\n", re.MULTILINE)


def example(name: str, *, without: str = "") -> str:
    """An example's text; `without` the part that is printed by a command that ends so."""
    text = (EXAMPLES / f"{name}.yaml").read_text()
    if not without:
        return text
    changed = re.sub(
        rf"^ *# -- extproc envoy {re.escape(without)}\n(?s:.*?)^ *# -- end\n", "", text, flags=re.MULTILINE
    )
    assert changed != text
    return changed


def before_it_was_attached(name: str) -> str:
    """An example without anything that was pasted."""
    return PLACE.sub("", (EXAMPLES / f"{name}.yaml").read_text())


def with_ports(text: str, ports: dict[int, int]) -> str:
    """The same configuration with other ports."""

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: ports.get(part, part) if key == "port_value" else replaced(part) for key, part in value.items()
            }
        return [replaced(part) for part in value] if isinstance(value, list) else value

    return yaml.safe_dump(replaced(yaml.safe_load(text)), sort_keys=False)


class OwnEnvoy:
    """One running Envoy with an example's configuration."""

    def __init__(self, admin: str, port: int) -> None:
        self.admin = admin
        """URL of its admin interface."""
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def counter(self, name: str) -> int:
        """One of its own statistics; 0 before the first time."""
        text = httpx.get(f"{self.admin}/stats", params={"filter": f"^{re.escape(name)}$"}).text.strip()
        return int(text.split(": ")[1]) if text else 0

    def post(self, host: str, path: str, body: dict, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.post(self.url + path, json=body, headers={"host": host, **named}, timeout=60)


@contextlib.contextmanager
def own_envoy(folder: Path, text: str, ports: dict[int, int]) -> Iterator[OwnEnvoy]:
    """`text` with its ports replaced; its own listener (10000) and admin get free ones."""
    port = free_port()
    config, address, log_path = folder / "own.yaml", folder / "own-admin", folder / "own.log"
    config.write_text(with_ports(text, {9901: 0, 10000: port} | ports))
    address.unlink(missing_ok=True)
    arguments = ("--config-path", config, "--admin-address-path", address, "--disable-hot-restart")
    command = [find_binary(), *arguments, "--concurrency", "1", "--log-level", "warning"]
    with log_path.open("ab") as log:
        process = subprocess.Popen(tied_to_parent([*map(str, command)]), stdout=log, stderr=log)

    def is_up() -> bool:
        assert process.poll() is None, log_path.read_text()[-2000:]
        try:
            return httpx.get(f"http://{address.read_text().strip()}/ready").status_code == 200
        except (OSError, httpx.HTTPError):
            return False

    try:
        until(is_up, "Envoy is up")
        yield OwnEnvoy(f"http://{address.read_text().strip()}", port)
    finally:
        process.terminate()
        process.wait(STOP_S)


class Shop:
    """A backend that has nothing to do with us: keeps each request as the bytes that came."""

    def __init__(self) -> None:
        shop = self
        self.requests: list[bytes] = []

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while head := self.head():
                    length = re.search(rb"(?i)^content-length: (\d+)", head, re.MULTILINE)
                    body = self.rfile.read(int(length[1])) if length else b""
                    shop.requests.append(head + body)
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nx-shop: yes\r\ncontent-length: 4\r\n\r\nshop")

            def head(self) -> bytes:
                lines = []
                while line := self.rfile.readline():
                    lines.append(line)
                    if line == b"\r\n":
                        return b"".join(lines)
                return b""  # Envoy has closed the connection

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]

    def __enter__(self) -> "Shop":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def last(self) -> bytes:
        """The last request, its id left out, as each has another."""
        return re.sub(rb"(?m)^x-request-id: [0-9a-f-]{36}\r\n", b"", self.requests[-1])
