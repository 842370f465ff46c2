"""The engines of the performance benchmark: fixed answers, as SGLang words them, from a small C program.

One process a role stands for all workers of the role: each has a loopback address of its own, on the same port.
"""

import ipaddress
import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from perf_native import Tools

from extproc.demo.stack import free_port
from extproc.sim import info
from extproc.sim.config import EngineConfig
from extproc.sim.gpu import GpuModel
from extproc.sim.job import Role
from extproc.sim.loads_text import LoadsText
from extproc.sim.metrics_text import MetricsText
from extproc.sim.snapshot import Figures

MODEL = "sim-model"
CHUNKS = 16
BOOTSTRAP_PORT = 8998
"""Of prefill workers; nobody connects to it here."""
FIRST_HOST = ipaddress.IPv4Address("127.0.0.1")
NOW_MARK = "@" * 17
"""What the engine replaces by the time (perf_engine.c)."""
STAND_IN_S = 1_700_000_000.123457
"""A time whose text has as many digits as any of this century."""
USAGE = {"prompt_tokens": 512, "total_tokens": 528, "completion_tokens": 16, "prompt_tokens_details": None}


@dataclass(frozen=True, slots=True)
class Engine:
    """All workers of one role: one process."""

    role: Role
    port: int
    hosts: tuple[str, ...]
    pid: int

    @property
    def urls(self) -> list[str]:
        """One for each worker."""
        return [f"http://{host}:{self.port}" for host in self.hosts]


@dataclass(frozen=True, slots=True)
class Engines:
    """Both roles."""

    prefill: Engine
    decode: Engine

    @property
    def all(self) -> tuple[Engine, Engine]:
        """For whoever treats them alike."""
        return self.prefill, self.decode


@contextmanager
def running_engines(tools: Tools, directory: Path, *, workers: int, ranks: int) -> Iterator[Engines]:
    """`workers` of each role, with `ranks` DP ranks each, ready for requests."""
    with (
        _running(tools, directory, Role.PREFILL, workers, ranks) as prefill,
        _running(tools, directory, Role.DECODE, workers, ranks) as decode,
    ):
        yield Engines(prefill, decode)


@contextmanager
def _running(tools: Tools, directory: Path, role: Role, workers: int, ranks: int) -> Iterator[Engine]:
    port = free_port()
    chunks = CHUNKS if role is Role.DECODE else 1  # prefill makes one token
    pages = _write_pages(directory / role.value, role, port, ranks)
    answer, chunk = directory / role.value / "answer.json", directory / role.value / "chunk.txt"
    answer.write_text(json.dumps(_answer()))
    chunk.write_text(f"data: {json.dumps(_chunk())}\n\n")
    command = [tools.engine, str(port), str(FIRST_HOST), str(workers), str(chunks), str(answer), str(chunk)]
    with subprocess.Popen([*command, *pages], stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                raise OSError(f"the {role.value} engine ended with exit status {process.wait()}")
            yield Engine(role, port, tuple(str(FIRST_HOST + number) for number in range(workers)), process.pid)
        finally:
            process.send_signal(signal.SIGTERM)


def _write_pages(directory: Path, role: Role, port: int, ranks: int) -> list[str]:
    """What gateways ask engines for, as PATH=FILE."""
    directory.mkdir()
    gpu = GpuModel()
    config = EngineConfig(role=role, port=port, dp_size=ranks, model=MODEL)
    figures = [Figures(at_s=0.0, running_reqs=4, used_tokens=20_000 + 100 * rank) for rank in range(ranks)]
    loads = LoadsText(role, gpu, 1.0, STAND_IN_S)
    answer = loads.answer(figures, 0.0)
    metrics = MetricsText(role, ranks, MODEL, gpu, 1.0)
    server_info = info.server_info(config, port, BOOTSTRAP_PORT, [figure.used_tokens for figure in figures])
    texts = {
        "loads.txt": loads.prometheus(answer),
        "loads.json": json.dumps(answer),
        "core_loads.json": json.dumps(loads.answer(figures, 0.0, include="core")),
        "old_loads.json": json.dumps(loads.old_answer(figures)),
        "metrics.txt": metrics.write(figures),
        "server_info.json": json.dumps(server_info),
        "model_info.json": json.dumps(info.model_info(config)),
        "models.json": json.dumps(info.models(config, 0)),
        "health.txt": "",
    }
    for name, text in texts.items():
        (directory / name).write_text(text.replace(f"{STAND_IN_S:.6f}", NOW_MARK))
    files = {
        "/v1/loads?format=prometheus": "loads.txt",
        "/v1/loads?include=core": "core_loads.json",
        "/v1/loads": "loads.json",
        "/get_load": "old_loads.json",
        "/metrics": "metrics.txt",
        "/server_info": "server_info.json",
        "/get_server_info": "server_info.json",
        "/model_info": "model_info.json",
        "/get_model_info": "model_info.json",
        "/v1/models": "models.json",
        "/health": "health.txt",
        "/health_generate": "health.txt",
    }
    return [f"{path}={directory / name}" for path, name in files.items()]


def _answer() -> dict[str, object]:
    message = {"role": "assistant", "content": "tok " * 16, "reasoning_content": None, "tool_calls": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "length", "matched_stop": None}
    return {
        "id": "0123456789abcdef0123456789abcdef",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": MODEL,
        "choices": [choice],
        "usage": USAGE,
    }


def _chunk() -> dict[str, object]:
    delta = {"role": None, "content": "tok ", "reasoning_content": None, "tool_calls": None}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, "matched_stop": None}
    return {
        "id": "0123456789abcdef0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": MODEL,
        "choices": [choice],
        "usage": None,
    }
