"""What runs beside requests: scraping a thousand workers, and what a prefix tree of a million prompts keeps.

As a program (`python perf_background.py PROMPTS`) it places so many different prompts by `cache_aware`, and says what
that did to its memory: a process of its own, as memory that Python has once taken says nothing.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from bench_process import end
from perf_decision import make_scheduler, release
from perf_engines import Engines
from perf_gateways import QUIET, START_S, STOP_S
from perf_load import NUMBER, body_of
from perf_processes import resident_bytes, usage

from extproc.child_process import tied_to_parent
from extproc.config import Config
from extproc.demo.stack import HOST, StackError, free_port
from extproc.parse import parse
from extproc.request import Endpoint

SETTLE_S = 3.0
"""After all workers are healthy: first scrapes are spread over a second."""
SAMPLES = re.compile(r'^extproc_scrape_seconds_count\{worker="[^"]+"\} (\S+)', re.MULTILINE)
FAILURES = re.compile(r"^extproc_scrape_failures_total\{.*\} (\S+)", re.MULTILINE)
BATCH = 64
MEMORY_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Scraping:
    """CPU of one core that a service without requests takes."""

    workers: int
    ranks: int
    scrapes_per_s: float
    failed: int
    core_share: float
    """With the health checks, at their default interval."""
    idle_core_share: float
    """The same service with scrapes an hour apart: health checks and the rest."""


@dataclass(frozen=True, slots=True)
class Memory:
    """RSS of a process that places prompts by `cache_aware`."""

    prompts: int
    before_bytes: int
    after_bytes: int
    half_way_bytes: int
    configured_bytes: int
    """`max_tree_size` of both roles together."""
    seconds: float


def scrape(engines: Engines, ranks: int, directory: Path, *, interval_s: float, seconds: float) -> Scraping:
    """Run a service that scrapes all workers of `engines`. Raises StackError."""
    workers = len(engines.prefill.urls) + len(engines.decode.urls)
    idle = _run(engines, directory, interval_s=3600.0, seconds=seconds)
    busy = _run(engines, directory, interval_s=interval_s, seconds=seconds)
    return Scraping(workers, ranks, busy[1] / seconds, busy[2], busy[0] / seconds, idle[0] / seconds)


def _run(engines: Engines, directory: Path, *, interval_s: float, seconds: float) -> tuple[float, float, int]:
    """CPU seconds, scrapes and failed ones during `seconds`."""
    config = directory / f"scrape-{interval_s:g}.yaml"
    keys = {
        "prefill": [{"url": url} for url in engines.prefill.urls],
        "decode": [{"url": url} for url in engines.decode.urls],
        "worker_load_check_interval": interval_s,
        "shutdown_drain_delay_secs": 0,
    }
    config.write_text(json.dumps(keys))  # JSON is YAML
    status = free_port()
    command = [sys.executable, "-m", "extproc", "serve", "--config", str(config), *QUIET]
    addresses = ("--grpc-uds", str(directory / "scrape.sock"), "--prometheus-host", HOST, "--prometheus-port")
    log = config.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            tied_to_parent([*command, *addresses, str(status)]),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_all_are_healthy(process, status, len(engines.prefill.urls) + len(engines.decode.urls), log)
        time.sleep(SETTLE_S)
        counted, used = _scrapes(status), usage([process.pid]).total_s
        time.sleep(seconds)
        used = usage([process.pid]).total_s - used
        after = _scrapes(status)
        return used, after[0] - counted[0], round(after[1] - counted[1])
    finally:
        end(process, STOP_S)


def _metrics(port: int) -> str:
    return httpx.get(f"http://{HOST}:{port}/metrics", timeout=30.0, trust_env=False).raise_for_status().text


def _scrapes(port: int) -> tuple[float, float]:
    text = _metrics(port)
    return sum(map(float, SAMPLES.findall(text))), sum(map(float, FAILURES.findall(text)))


def _wait_until_all_are_healthy(process: subprocess.Popen[bytes], port: int, workers: int, log: Path) -> None:
    deadline_s = time.monotonic() + START_S
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if len(re.findall(r"^extproc_worker_healthy\{.*\} 1\.0", _metrics(port), re.MULTILINE)) == workers:
                return
        if process.poll() is not None or time.monotonic() > deadline_s:
            said = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise StackError(f"not all of {workers} workers became healthy. Last lines of the service's log:\n{said}")
        time.sleep(0.5)


def remember(prompts: int) -> Memory:
    """Place prompts in a process of its own. Raises StackError."""
    command = [sys.executable, __file__, str(prompts)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=MEMORY_TIMEOUT_S)
    if done.returncode:
        raise StackError(f"perf_background.py failed: {done.stderr[-500:]}")
    return Memory(**json.loads(done.stdout))


def _place_prompts(prompts: int) -> dict[str, float]:
    scheduler, table = make_scheduler("cache_aware", 16)
    text, number = body_of("2KB"), NUMBER.encode()
    before, began_s = resident_bytes([os.getpid()]), time.monotonic()
    half_way = before
    for first in range(0, prompts, BATCH):
        # Different from the first word on: nothing is shared but the message's frame.
        bodies = [text.replace(number, b"%08d" % (first + i)) for i in range(min(BATCH, prompts - first))]
        release(table, [scheduler.place(parse(Endpoint.CHAT, body)) for body in bodies])
        if first <= prompts // 2:
            half_way = resident_bytes([os.getpid()])
    return {
        "prompts": prompts,
        "before_bytes": before,
        "after_bytes": resident_bytes([os.getpid()]),
        "half_way_bytes": half_way,
        "configured_bytes": 2 * Config().max_tree_size,
        "seconds": time.monotonic() - began_s,
    }


if __name__ == "__main__":
    print(json.dumps(_place_prompts(int(sys.argv[1]))))
