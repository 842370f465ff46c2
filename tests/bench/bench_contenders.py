"""Who competes, and how each is started. Intervals are of the modelled time: with the engines they run faster.

Synchronous, as the processes' starters are.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from bench_process import end
from bench_workload import MODEL, Plan

from extproc.demo.stack import HOST, STOP_TIMEOUT_S, Stack, StackError, free_port

SMG_PYTHON = "SMG_PYTHON"
"""Environment variable: the Python interpreter of an environment that has smg."""
SMG_START_S = 60.0
SMG_FLAGS = (
    *("--pd-disaggregation", "--host", HOST, "--prometheus-host", HOST),
    # There is no model to fetch a tokenizer of, and nothing to ask on the network.
    *("--disable-tokenizer-autoload", "--log-level", "warn"),
)


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to choose the ranks."""

    name: str
    about: str
    smg: bool = False
    flags: tuple[str, ...] = ()
    scrape_interval_s: float = 10.0
    """Of the modelled time; 10 is the default of either gateway."""
    predicted_by: str = ""
    """The lab's name for it; empty: the lab has no model of it."""

    def interval_flag(self, time_scale: float) -> tuple[str, str]:
        """The scrape interval in real seconds. smg takes whole seconds, at least 1."""
        interval_s = self.scrape_interval_s / time_scale
        if self.smg:
            return "--load-monitor-interval", str(max(1, round(interval_s)))
        return "--worker-load-check-interval", f"{interval_s:g}"


CONTENDERS = (
    Contender("live", "extproc, as it comes: minimum_tokens by the live ledger", predicted_by="live"),
    Contender(
        "scraped-1s",
        "extproc, minimum_tokens by the existing gateway's rule, scraped every second",
        flags=("--load-model", "scraped"),
        scrape_interval_s=1.0,
        predicted_by="scraped",
    ),
    Contender(
        "scraped-10s",
        "the same, scraped every 10 s as by default",
        flags=("--load-model", "scraped"),
        predicted_by="scraped",
    ),
    Contender(
        "round-robin",
        "extproc, one rank after the other",
        flags=("--prefill-rank-policy", "round_robin", "--decode-rank-policy", "round_robin"),
        predicted_by="round_robin",
    ),
    Contender(
        "room",
        "extproc with the scheduler off: engines take room % dp_size",
        flags=("--no-dp-minimum-tokens-scheduler",),
        predicted_by="power_of_two+bootstrap_room+live",
    ),
    Contender(
        "smg",
        "smg, cache_aware and --dp-minimum-tokens-scheduler on whole workers",
        smg=True,
        flags=("--policy", "cache_aware", "--dp-minimum-tokens-scheduler"),
        predicted_by="scraped",
    ),
    Contender(
        "smg-dp-aware",
        "smg, round_robin and --dp-minimum-tokens-scheduler with --dp-aware",
        smg=True,
        flags=("--policy", "round_robin", "--dp-aware", "--dp-minimum-tokens-scheduler"),
    ),
    Contender(
        "smg-least-load",
        "smg, ranks as workers of their own (--dp-aware), least_load",
        smg=True,
        flags=("--policy", "least_load", "--dp-aware"),
    ),
)
BY_NAME = {contender.name: contender for contender in CONTENDERS}


def smg_python() -> str | None:
    """The interpreter that has smg; None: not installed."""
    return os.environ.get(SMG_PYTHON) or None


@dataclass(frozen=True, slots=True)
class Gateway:
    """A contender that runs."""

    url: str
    pid: int
    """Of the process whose children, if any, are the rest of it."""


@contextmanager
def running(contender: Contender, plan: Plan, log_dir: Path) -> Iterator[tuple[Stack, Gateway]]:
    """Fresh engines with the contender in front of them, ready for requests. Raises StackError."""
    flags = (*contender.interval_flag(plan.time_scale), *contender.flags)
    with Stack(
        prefill=plan.prefill.workers,
        decode=plan.decode.workers,
        dp_size=plan.decode.ranks,
        engine_flags=("--time-scale", f"{plan.time_scale:g}"),
        prefill_flags=("--dp-size", str(plan.prefill.ranks)),
        up_flags=() if contender.smg else flags,
        log_dir=log_dir,
    ) as stack:
        if not contender.smg:
            yield stack, Gateway(stack.url, stack.gateway.pid)
            return
        stack.gateway.process.stop(STOP_TIMEOUT_S)
        with _running_smg(stack, flags, log_dir / "smg.log") as gateway:
            yield stack, gateway


@contextmanager
def _running_smg(stack: Stack, flags: tuple[str, ...], log: Path) -> Iterator[Gateway]:
    python = smg_python()
    if python is None:
        raise StackError(f"{SMG_PYTHON} does not name a Python that has smg")
    port, metrics_port = free_port(), free_port()
    url = f"http://{HOST}:{port}"
    workers: list[str] = []
    for engine in stack.engines:
        workers += [f"--{engine.role}", engine.url, *([engine.bootstrap_port] if engine.bootstrap_port else [])]
    command = [python, "-m", "smg.launch_router", "--port", str(port), "--prometheus-port", str(metrics_port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *SMG_FLAGS, *workers, *flags],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_for_smg(process, url, log)
        yield Gateway(url, process.pid)
    finally:
        end(process, STOP_TIMEOUT_S)


def _wait_for_smg(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Until a request gets through."""
    deadline_s = time.monotonic() + SMG_START_S
    request = {"model": MODEL, "prompt": "ready?", "max_tokens": 1}
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.post(f"{url}/v1/completions", json=request, timeout=5.0, trust_env=False).status_code == 200:
                return
        if process.poll() is not None or time.monotonic() > deadline_s:
            said = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise StackError(f"smg let nothing through. Last lines of its log:\n{said}")
        time.sleep(0.2)
