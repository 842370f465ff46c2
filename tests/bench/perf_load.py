"""The load: bodies, and one measurement of one gateway under it."""

import json
import resource
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perf_engines import MODEL, Engines
from perf_gateways import CHAT, Gateway, last_lines
from perf_native import Tools
from perf_processes import Usage, usage

from extproc.demo.stack import HOST, StackError

KIB = 1024
NUMBER = "00000000"
"""In each body, near its beginning; every request has another number there, so that no two prompts are the same."""
OUTPUT_TOKENS = 16
WORDS = "the quick brown fox jumps over the lazy dog and "
SLACK_S = 30.0


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of load."""

    body: str
    """2KB | 64KB | SSE"""
    connections: int = 0
    """Closed loop; 0: open loop."""
    rate: int = 0
    """Requests a second, open loop."""

    @property
    def name(self) -> str:
        """Of its row."""
        return f"{self.body} c{self.connections}" if self.connections else f"{self.body} {self.rate}/s"


BODIES = {"2KB": (2 * KIB, False), "64KB": (64 * KIB, False), "SSE": (2 * KIB, True)}
"""Size in bytes, and whether the answer is streamed."""


def body_of(name: str) -> bytes:
    """A chat request of exactly that size."""
    size, stream = BODIES[name]

    def request(text: str) -> bytes:
        fields: dict[str, object] = {"model": MODEL, "messages": [{"role": "user", "content": f"#{NUMBER} {text}"}]}
        fields |= {"max_tokens": OUTPUT_TOKENS, "temperature": 0.7}
        if stream:
            fields["stream"] = True
        return json.dumps(fields).encode()

    missing = size - len(request(""))
    return request((WORDS * (missing // len(WORDS) + 1))[:missing])


@dataclass(frozen=True, slots=True)
class Figures:
    """One measurement. CPU in seconds for each 1,000 requests."""

    contender: str
    cell: str
    requests: int
    failed: int
    requests_per_s: float
    p50_us: float
    p99_us: float
    cpu: dict[str, float]
    """Of the gateway's processes, by kind."""
    engines_cpu: float
    generator_cpu: float
    resident_bytes: int
    seconds: float

    @property
    def cpu_s(self) -> float:
        """All of the gateway's processes."""
        return sum(self.cpu.values())

    @property
    def engines_share(self) -> float:
        """Of one core, both engines together."""
        return self.engines_cpu * self.requests / 1000 / self.seconds

    @property
    def generator_share(self) -> float:
        """Of one core."""
        return self.generator_cpu * self.requests / 1000 / self.seconds


@dataclass(frozen=True, slots=True)
class Rig:
    """What every measurement needs."""

    engines: Engines
    tools: Tools
    directory: Path
    """With the bodies in it."""


def write_bodies(directory: Path) -> None:
    """Files for the generators: the body, and the whole request with its headers."""
    for name in BODIES:
        body = body_of(name)
        (directory / f"{name}.json").write_bytes(body)
        head = f"POST {CHAT} HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        (directory / f"{name}.http").write_bytes(head.encode() + b"\r\n\r\n" + body)


def measure(rig: Rig, gateway: Gateway, cell: Cell, *, seconds: float, seed: int = 1) -> Figures:
    """Put a gateway under load and look at its processes before and after. Raises StackError."""
    command = _open(rig, gateway, cell, seconds, seed) if cell.rate else _closed(rig, gateway, cell, seconds)
    engines = rig.engines
    before, engines_before = gateway.usage(), _engines(engines)
    try:
        told, generator_s = _run(command, seconds)
    except StackError as error:
        said = f" Last lines of its log:\n{last_lines(gateway.log)}" if gateway.log else ""
        raise StackError(f"{gateway.name}, {cell.name}: {error}{said}") from None
    used, engines_used = gateway.usage().since(before), _engines(engines).since(engines_before)
    requests = int(told["answered"] if cell.rate else told["requests"])
    thousands = max(requests, 1) / 1000
    return Figures(
        contender=gateway.name,
        cell=cell.name,
        requests=requests,
        failed=int(told["failed"]),
        requests_per_s=requests / told["seconds"],
        p50_us=told["p50_us"],
        p99_us=told["p99_us"],
        cpu={kind: cpu_s / thousands for kind, cpu_s in used.by_kind.items()},
        engines_cpu=engines_used.total_s / thousands,
        generator_cpu=generator_s / thousands,
        resident_bytes=gateway.resident_bytes(),
        seconds=told["seconds"],
    )


def _closed(rig: Rig, gateway: Gateway, cell: Cell, seconds: float) -> list[str]:
    return [
        *(rig.tools.wrk, "--threads", "1", "--connections", str(cell.connections)),
        *("--duration", f"{max(1, round(seconds))}s", "--timeout", "10s"),
        *("--script", str(Path(__file__).with_name("perf_post.lua")), f"http://{HOST}:{gateway.port}"),
        *("--", CHAT, str(rig.directory / f"{cell.body}.json")),
    ]


def _open(rig: Rig, gateway: Gateway, cell: Cell, seconds: float, seed: int) -> list[str]:
    where = (HOST, str(gateway.port), str(cell.rate), f"{seconds:g}", str(seed))
    return [rig.tools.open_loop, *where, str(rig.directory / f"{cell.body}.http")]


def _engines(engines: Engines) -> Usage:
    return usage(engine.pid for engine in engines.all)


def _run(command: Sequence[str], seconds: float) -> tuple[dict[str, float], float]:
    """What a generator says, and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=seconds + SLACK_S)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # wrk prints a page of its own; what perf_post.lua says goes to standard error.
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise StackError(f"{command[0]} failed: {(done.stderr or done.stdout).strip()[-500:]}")
    told: dict[str, float] = json.loads(lines[0])
    used_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return told, used_s
