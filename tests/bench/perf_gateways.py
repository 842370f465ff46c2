"""What is measured, and how each is started: this gateway in several settings, its floor, plain Envoy, and others.

All of them run at the same time, in front of the same engines; only one at a time gets requests.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from bench_process import end
from perf_engines import BOOTSTRAP_PORT, MODEL, Engine, Engines
from perf_processes import Usage, family, resident_bytes, usage

from extproc.child_process import tied_to_parent
from extproc.demo.stack import HOST, StackError, free_port
from extproc.envoy_process import find_binary

SMG_PYTHON = "SMG_PYTHON"
SGLANG_ROUTER_PYTHON = "SGLANG_ROUTER_PYTHON"
"""Environment variables: Python interpreters of environments that have the other gateways."""
START_S = 90.0
STOP_S = 20.0
POLL_S = 0.1
CHAT = "/v1/chat/completions"

QUIET = ("--log-level", "warn")
"""Every gateway: no line per request."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One line of the tables."""

    name: str
    about: str
    kind: str
    """extproc | floor | envoy | smg | sglang | direct"""
    flags: tuple[str, ...] = ()
    needs: str = ""
    """Environment variable that names its Python."""
    only: frozenset[str] = frozenset()
    """Names of the cells it takes part in; empty: all."""
    compiled: bool = False
    """Its core is (`perf_native.compile_core`)."""


COMPARED = frozenset({"2KB c1", "2KB c16"})
CACHE = frozenset({"64KB c16"})
FEW_THREADS = COMPARED | {"2KB c64", "SSE c16", "SSE c64"}
CONTENDERS = (
    Contender("direct", "no gateway: the decode engine alone", "direct"),
    Contender("envoy", "plain Envoy: round robin over decode, mirror to prefill", "envoy"),
    Contender("extproc", "this gateway as pip installs it", "extproc"),
    Contender("extproc-compiled", "the same with its core compiled, as in the images", "extproc", compiled=True),
    Contender(
        "extproc-compiled-1",
        "the same, compiled, with one Envoy thread",
        "extproc",
        ("--envoy-concurrency", "1"),
        only=FEW_THREADS,
        compiled=True,
    ),
    Contender(
        "extproc-grpcio", "this gateway with --transport grpcio", "extproc", ("--transport", "grpcio"), only=COMPARED
    ),
    Contender("floor", "the same with a no-op service, lean transport", "floor", ("lean",), only=COMPARED),
    Contender("floor-compiled", "that floor, compiled", "floor", ("lean",), only=COMPARED, compiled=True),
    Contender("floor-grpcio", "the same with a no-op service, grpcio", "floor", ("grpcio",), only=COMPARED),
    Contender(
        "extproc-cache", "this gateway, --policy cache_aware", "extproc", ("--policy", "cache_aware"), only=CACHE
    ),
    Contender(
        "extproc-cache-compiled",
        "the same, compiled",
        "extproc",
        ("--policy", "cache_aware"),
        only=CACHE,
        compiled=True,
    ),
    Contender(
        "smg",
        "smg, round_robin and min-token",
        "smg",
        ("--policy", "round_robin", "--dp-minimum-tokens-scheduler", "--disable-tokenizer-autoload"),
        SMG_PYTHON,
    ),
    Contender(
        "smg-cache",
        "smg, cache_aware and min-token",
        "smg",
        ("--policy", "cache_aware", "--dp-minimum-tokens-scheduler", "--disable-tokenizer-autoload"),
        SMG_PYTHON,
        only=CACHE,
    ),
    Contender(
        "sglang-router",
        "sglang-router, round_robin (it has no min-token)",
        "sglang",
        ("--policy", "round_robin"),
        SGLANG_ROUTER_PYTHON,
    ),
)
BY_NAME = {contender.name: contender for contender in CONTENDERS}


@dataclass(frozen=True, slots=True)
class Gateway:
    """A contender that runs."""

    contender: Contender
    port: int
    pid: int | None
    """Of the process whose children are the rest of it; None: there is none."""
    log: Path | None = None

    @property
    def name(self) -> str:
        """The contender's."""
        return self.contender.name

    def usage(self) -> Usage:
        """CPU time of all its processes so far."""
        return usage(family(self.pid)) if self.pid else Usage({})

    def resident_bytes(self) -> int:
        """RSS of all its processes."""
        return resident_bytes(family(self.pid)) if self.pid else 0


def available(names: Sequence[str]) -> list[Contender]:
    """Those of the named ones that are installed, in the order of `CONTENDERS`."""
    return [c for c in CONTENDERS if c.name in names and (not c.needs or os.environ.get(c.needs))]


@contextmanager
def running(contender: Contender, engines: Engines, directory: Path, compiled: Path | None = None) -> Iterator[Gateway]:
    """The gateway, once a request gets through. `compiled`: where its compiled core is, if it is to have one. Raises
    StackError."""
    if contender.kind == "direct":
        yield Gateway(contender, engines.decode.port, None)
        return
    port = free_port()
    command, environment = _command(contender, engines, port, directory)
    if contender.compiled:
        assert compiled is not None
        environment = {**environment, "PYTHONPATH": str(compiled)}
    log = directory / f"{contender.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            tied_to_parent(command),
            env={**os.environ, **environment},
            cwd=directory,  # `-m` looks there first, and not in a checkout
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_it_answers(contender, process, port, log)
        yield Gateway(contender, port, process.pid, log)
    finally:
        end(process, STOP_S)


def _command(contender: Contender, engines: Engines, port: int, directory: Path) -> tuple[list[str], Mapping[str, str]]:
    address = ("--host", HOST, "--port", str(port))
    metrics = ("--prometheus-host", HOST, "--prometheus-port", str(free_port()))
    # Per worker, as the routers want the bootstrap port behind its URL.
    workers = [w for url in engines.prefill.urls for w in ("--prefill", url, str(BOOTSTRAP_PORT))]
    workers += [w for url in engines.decode.urls for w in ("--decode", url)]
    if contender.kind == "extproc":
        drain = ("--shutdown-drain-delay-secs", "0")
        return [
            sys.executable,
            "-m",
            "extproc",
            "up",
            *workers,
            *address,
            *metrics,
            *QUIET,
            *drain,
            *contender.flags,
        ], {}
    if contender.kind == "floor":
        program = str(Path(__file__).with_name("perf_floor.py"))
        pair = engines.prefill.urls[0], engines.decode.urls[0]
        return [sys.executable, program, *contender.flags, str(port), *pair], {}
    if contender.kind == "envoy":
        config = directory / "envoy.json"
        config.write_text(json.dumps(mirror_bootstrap(port, engines)))
        return [str(find_binary()), "--config-path", str(config), "--disable-hot-restart", "--log-level", "error"], {}
    python = os.environ[contender.needs]
    module = f"{'smg' if contender.kind == 'smg' else 'sglang_router'}.launch_router"
    command = [python, "-m", module, "--pd-disaggregation", *workers, *address, *metrics, *QUIET, *contender.flags]
    return command, {"HF_HUB_OFFLINE": "1"}


def mirror_bootstrap(port: int, engines: Engines) -> dict[str, object]:
    """Plain Envoy: two legs, no service. What any gateway on Envoy has to pay for."""
    http = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
    router = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
    mirror = {"cluster": "prefill", "disable_shadow_host_suffix_append": True}
    route = {"cluster": "decode", "timeout": "0s", "request_mirror_policies": [mirror]}
    manager = {
        "@type": http,
        "stat_prefix": "public",
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {"@type": router}}],
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [_to(route)]}]},
    }
    listener = {
        "name": "public",
        "address": _address(HOST, port),
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }
    clusters = [_cluster("prefill", engines.prefill), _cluster("decode", engines.decode)]
    return {"static_resources": {"listeners": [listener], "clusters": clusters}}


def _to(route: dict[str, object]) -> dict[str, object]:
    return {"match": {"prefix": "/"}, "route": route}


def _cluster(name: str, engine: Engine) -> dict[str, object]:
    unlimited = {"max_connections": 1_000_000, "max_pending_requests": 1_000_000, "max_requests": 1_000_000}
    endpoints = [{"endpoint": {"address": _address(host, engine.port)}} for host in engine.hosts]
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "3s",
        "circuit_breakers": {"thresholds": [unlimited]},
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
    }


def _address(host: str, port: int) -> dict[str, object]:
    return {"socket_address": {"address": host, "port_value": port}}


def last_lines(log: Path) -> str:
    """What a gateway said last."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def _wait_until_it_answers(contender: Contender, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline_s = time.monotonic() + START_S
    request = {"model": MODEL, "messages": [{"role": "user", "content": "ready?"}], "max_tokens": 1}
    while True:
        with contextlib.suppress(httpx.HTTPError):
            answer = httpx.post(f"http://{HOST}:{port}{CHAT}", json=request, timeout=5.0, trust_env=False)
            if answer.status_code == 200:
                return
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise StackError(f"{contender.name} let nothing through. Last lines of its log:\n{last_lines(log)}")
        time.sleep(POLL_S)
