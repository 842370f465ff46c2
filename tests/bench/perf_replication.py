"""One process of the service against several: throughput, what the others are told and what that costs, and how late.

    python tests/bench/perf_replication.py [cost] [direct] [gateway] [lag]

`cost`: CPU of a request's changes of the table, in the process that makes them and in one that hears of them.
`direct`: route streams from h2load straight to `extproc serve`, so that Python is the bottleneck; the prefill leg is
missing. `gateway`: the whole gateway under wrk. `lag`: from a change to its being known in the other process, under the
same load as `gateway`. What is compared runs at the same time and gets its load in turns: ratios count, not figures.
"""

import asyncio
import contextlib
import itertools
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import uvloop
from envoy_data_plane.envoy.config.core.v3 import HeaderMap, HeaderValue
from envoy_data_plane.envoy.service.ext_proc.v3 import HttpBody, HttpHeaders, ProcessingRequest
from perf_engines import BOOTSTRAP_PORT, Engines, running_engines
from perf_gateways import CHAT, Contender, Gateway, running
from perf_load import Cell, Rig, body_of, measure, write_bodies
from perf_native import make_tools
from perf_processes import family, usage

from extproc import envoy_config, wire
from extproc.config import Config, build
from extproc.demo.child import Child
from extproc.demo.stack import HOST, free_port
from extproc.envoy_process import EnvoyProcess
from extproc.load import LoadTable
from extproc.model import Role, Worker
from extproc.processes.figures import SummedRegistry
from extproc.processes.messages import Batch, batch_frame, decode
from extproc.processes.replica import Replica
from extproc.server import Service

ROUNDS = 5
SECONDS = 3
NUMBERS = (1, 2)
CONNECTIONS, STREAMS = 4, 16
"""To the service, altogether; calls at once on each."""
LAG_CELLS = (Cell("2KB", rate=100), Cell("2KB", 16), Cell("2KB", 64))


# cost


def cost(requests: int = 20_000, batch: int = 8) -> None:
    """`batch`: requests whose changes are told together, as under load."""
    workers = [Worker(f"{role[0]}:{n}", role, "", "x:1", dp_size=8) for role in Role for n in range(2)]

    def table() -> LoadTable:
        made = LoadTable(workers, time.monotonic)
        for worker in workers:
            made.worker_changed(worker, True)
        return made

    def go(mine: LoadTable) -> None:
        prefill, decode_state = mine.eligible(Role.PREFILL)[0], mine.eligible(Role.DECODE)[0]
        leases = []
        for n in range(batch):
            first = mine.charge(prefill, n % 8, 512)
            leases.append((first, mine.charge(decode_state, n % 8, 512, 128, after=first, max_output=1024)))
        for first, second in leases:
            mine.release(first)
            mine.release(second, False, judge=False)
            mine.judge(second, False)

    alone, told = table(), table()
    replica, other = Replica(1, told, blame=lambda *_: None), Replica(0, table(), blame=lambda *_: None)
    figures: dict[str, list[float]] = {"alone": [], "told": [], "sent": [], "heard": []}
    size = 0
    for _ in range(requests // batch):
        marks = [time.thread_time()]
        go(alone)
        marks.append(time.thread_time())
        go(told)
        marks.append(time.thread_time())
        framed = batch_frame(1, time.monotonic(), replica.take())
        marks.append(time.thread_time())
        message = decode(framed[4:])
        assert isinstance(message, Batch)
        other.apply(1, message.events)
        marks.append(time.thread_time())
        size += len(framed)
        for name, (begun, ended) in zip(figures, itertools.pairwise(marks), strict=True):
            figures[name].append((ended - begun) / batch * 1e6)
    median = {name: statistics.median(values) for name, values in figures.items()}
    print(f"cost of a request, us of CPU (medians; batches of {batch} requests):")
    print(f"  the table's changes alone {median['alone']:.1f}")
    print(f"  telling: {median['told'] - median['alone']:.1f} to note, {median['sent']:.1f} to encode")
    print(f"  hearing: {median['heard']:.1f} to decode and apply; {size / requests:.0f} bytes")


# direct


def stream_of_messages() -> bytes:
    """A route stream: a chat request of 2 KB, and the decode worker's answer."""
    body = body_of("2KB")

    def headers(pairs: dict[str, str]) -> HttpHeaders:
        values = [HeaderValue(key=name, raw_value=value.encode()) for name, value in pairs.items()]
        return HttpHeaders(headers=HeaderMap(headers=values))

    request = {":method": "POST", ":path": CHAT, "content-length": str(len(body)), "content-type": "application/json"}
    messages = (
        ProcessingRequest(request_headers=headers(request)),
        ProcessingRequest(request_body=HttpBody(body=body, end_of_stream=True)),
        ProcessingRequest(response_headers=headers({":status": "200"})),
    )
    return b"".join(b"\0" + len(bytes(m)).to_bytes(4, "big") + bytes(m) for m in messages)


def workers_of(engines: Engines) -> list[str]:
    prefill = [word for url in engines.prefill.urls for word in ("--prefill", url, str(BOOTSTRAP_PORT))]
    return prefill + [word for url in engines.decode.urls for word in ("--decode", url)]


@contextlib.contextmanager
def serving(engines: Engines, directory: Path, processes: int) -> Iterator[tuple[Child, list[str]]]:
    """`extproc serve` on unix sockets; its targets."""
    path, status = directory / f"{processes}.sock", free_port()
    flags = ("--grpc-uds", str(path), "--prometheus-port", str(status), "--processes", str(processes))
    child = Child("x", ("serve", *workers_of(engines), *flags, "--log-level", "error"), directory / f"{processes}.log")
    try:
        deadline_s = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://{HOST}:{status}/ready").status_code == 200:
                    break
            if time.monotonic() > deadline_s:
                raise child.failure("was not ready")
            time.sleep(0.05)
        paths = [str(path)] if processes == 1 else [f"{path}.{n}" for n in range(processes)]
        yield child, paths
    finally:
        child.kill()


def h2load(paths: Sequence[str], data: Path) -> float:
    """Streams a second, all together."""
    commands = [
        [
            *("h2load", "--duration", str(SECONDS), "--warm-up-time", "1", "-t", "1", "-d", str(data), "-n", "0"),
            *("-c", str(CONNECTIONS // len(paths)), "-m", str(STREAMS), "--base-uri", f"unix:{path}"),
            *("-H", "content-type: application/grpc", "-H", "te: trailers"),
            f"http://x{wire.METHOD}",
        ]
        for path in paths
    ]
    running_now = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    told = [process.communicate()[0] for process in running_now]
    return sum(float(re.search(r"finished in [^,]+, ([\d.]+) req/s", text)[1]) for text in told)


def direct(engines: Engines, directory: Path) -> None:
    data = directory / "stream.bin"
    data.write_bytes(stream_of_messages())
    with contextlib.ExitStack() as stack:
        services = {n: stack.enter_context(serving(engines, directory, n)) for n in NUMBERS}
        rates: dict[int, list[float]] = {n: [] for n in NUMBERS}
        cpu: dict[int, list[float]] = {n: [] for n in NUMBERS}
        for _ in range(ROUNDS):
            for n, (child, paths) in services.items():
                before = usage(family(child.pid))
                rate = h2load(paths, data)
                rates[n].append(rate)
                cpu[n].append(usage(family(child.pid)).since(before).total_s / (rate * (SECONDS + 1)) * 1e6)
    report("direct: route streams", rates, cpu)


def report(title: str, rates: dict[int, list[float]], cpu: dict[int, list[float]]) -> None:
    print(f"{title}, medians of {ROUNDS} rounds in turns")
    for n in NUMBERS:
        ratios = [many / one for many, one in zip(rates[n], rates[1], strict=True)]
        print(
            f"  {n} process{'es' if n > 1 else ''}: {statistics.median(rates[n]):.0f}/s,"
            f" Python {statistics.median(cpu[n]):.0f} us of CPU each,"
            f" ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


# gateway


def gateway(rig: Rig) -> None:
    with contextlib.ExitStack() as stack:
        contenders = {n: Contender(f"x{n}", "", "extproc", ("--processes", str(n))) for n in NUMBERS}
        gateways = {n: stack.enter_context(running(c, rig.engines, rig.directory)) for n, c in contenders.items()}
        for cell in (Cell("2KB", 16), Cell("2KB", 64), Cell("64KB", 16)):
            rates: dict[int, list[float]] = {n: [] for n in NUMBERS}
            cpu: dict[int, list[float]] = {n: [] for n in NUMBERS}
            p99: dict[int, list[float]] = {n: [] for n in NUMBERS}
            all_cpu: list[float] = []
            for _ in range(ROUNDS):
                for n, each in gateways.items():
                    measure(rig, each, cell, seconds=1)
                    figures = measure(rig, each, cell, seconds=SECONDS)
                    assert not figures.failed
                    rates[n].append(figures.requests_per_s)
                    cpu[n].append(figures.cpu["python"] * 1e3)
                    p99[n].append(figures.p99_us / 1e3)
                    all_cpu.append((figures.cpu_s + figures.engines_cpu + figures.generator_cpu) * 1e3)
            report(f"gateway: {cell.name}", rates, cpu)
            print(
                f"  p99 {statistics.median(p99[1]):.1f} ms with 1, {statistics.median(p99[2]):.1f} ms with 2;", end=""
            )
            print(f" CPU of all, load and engines too: {statistics.median(all_cpu):.0f} us a request")


# lag


class Recording(SummedRegistry):
    """Keeps every lag."""

    lags: list[float] = []  # noqa: RUF012 - one for the program

    @property
    def lag_s(self) -> float:  # type: ignore[override]
        return self.lags[-1] if self.lags else 0.0

    @lag_s.setter
    def lag_s(self, value: float) -> None:
        self.lags.append(value)


async def lag(rig: Rig) -> None:
    """The leader is this process, so that it can keep what it measures; the load is made by others."""
    engines = rig.engines
    workers = {
        "prefill": [{"url": url, "bootstrap_port": BOOTSTRAP_PORT} for url in engines.prefill.urls],
        "decode": [{"url": url} for url in engines.decode.urls],
    }
    flags = {"host": HOST, "port": free_port(), "prometheus_port": free_port(), "processes": 2, "log_level": "error"}
    config: Config = build(workers, flags)
    service = Service(config, grpc_target=f"unix:{rig.directory}/lag.sock")
    service._summed = Recording(service.telemetry.registry)
    async with service.running() as addresses:
        bootstrap = envoy_config.bootstrap(config, admin=f"{HOST}:0", grpc_target=addresses.grpc)
        async with EnvoyProcess(envoy_config.to_yaml(bootstrap)):
            here = Gateway(Contender("lag", "", "extproc"), config.port, None)
            for cell in LAG_CELLS:
                await asyncio.to_thread(measure, rig, here, cell, seconds=1)
                Recording.lags.clear()
                figures = await asyncio.to_thread(measure, rig, here, cell, seconds=4 * SECONDS)
                lags = sorted(Recording.lags)
                print(
                    f"lag: {cell.name} ({figures.requests_per_s:.0f}/s): median {lags[len(lags) // 2] * 1e3:.2f} ms,"
                    f" p99 {lags[len(lags) * 99 // 100] * 1e3:.2f} ms, max {lags[-1] * 1e3:.1f} ms,"
                    f" {len(lags) / figures.requests:.2f} batches a request"
                )


def main(words: Sequence[str]) -> None:
    """All, or those that are named."""
    chosen = words or ["cost", "direct", "gateway", "lag"]
    if "cost" in chosen:
        cost()
        cost(batch=1)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        if set(chosen) <= {"cost"}:
            return
        tools = make_tools(directory)
        write_bodies(directory)
        engines = stack.enter_context(running_engines(tools, directory, workers=2, ranks=8))
        rig = Rig(engines, tools, directory)
        if "direct" in chosen:
            direct(engines, directory)
        if "gateway" in chosen:
            gateway(rig)
        if "lag" in chosen:
            uvloop.run(lag(rig))


if __name__ == "__main__":
    main(sys.argv[1:])
