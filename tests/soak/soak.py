"""One soak run: engines, gateway, traffic with faults, and what is left of it."""

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from chaos_field import Field, running_field, volley
from soak_accounts import counted, final_statuses, problems, read_log
from soak_gateway import Gateway, running_gateway
from soak_report import Report
from soak_traffic import Sent, Traffic, fault_hits, set_engine_faults
from soak_watch import SAMPLES, Curve

from extproc.envoy_config.names import SERVICE_CLUSTER

ENGINE_FLAGS = ("--time-scale", "100")
"""A prompt takes milliseconds and a token 0.15 ms: what costs time is the gateway."""
WIDTH = 32
"""Requests at a time."""
WARM_UP = 200
"""Requests before the first census, so that what is made once is there."""

TELLING = ("_asyncio.Task", "extproc.service.Call", "extproc.load.Lease", "extproc.exchange.Exchange")
"""Types of which each request has some. At rest there are as many as before."""
SPARE = 4
"""More of them at the end than at the first census: Envoy opens an access log stream for each of its threads, with the
first entry that the thread has; and what was last at work can still be referred to from somewhere."""
ACCESS_LOG_STREAMS = (os.cpu_count() or 1) + 1
"""gRPC streams that Envoy keeps open to the service: one for each of its threads at most."""
SHOWN_KINDS = 6


async def soak(requests: int, seed: int, seen: Callable[[int], None] = lambda _: None) -> Report:
    """Run it. `seen` is told how many requests were answered."""
    with tempfile.TemporaryDirectory(prefix="extproc-soak-") as directory:
        async with (
            running_field(engine_flags=ENGINE_FLAGS) as field,
            running_gateway(field, Path(directory)) as gateway,
        ):
            return await _soak(field, gateway, requests, seed, seen)


async def _soak(field: Field, gateway: Gateway, requests: int, seed: int, seen: Callable[[int], None]) -> Report:
    curves = [Curve("service", gateway.service.pid), Curve("Envoy", gateway.envoy_pid)]
    sent: list[Sent] = []
    async with field.client() as client:
        traffic = Traffic(client, seed)
        await set_engine_faults(field)
        sent += await volley(WARM_UP, WIDTH, traffic.send)
        await field.left_over()
        before = await gateway.census()
        step = max(1, requests // SAMPLES)

        async def send(number: int) -> Sent:
            one = await traffic.send()
            seen(1)
            if number % step == 0:
                for curve in curves:
                    curve.look(number)
            return one

        started_s = time.monotonic()
        sent += await volley(requests, WIDTH, send)
        seconds = time.monotonic() - started_s
        for curve in curves:
            curve.look(requests)
    hits = await fault_hits(field)
    await field.set_faults(field.engines)  # lets go what hangs
    report = Report(requests, seconds, seed, fault_hits=hits, curves=curves, left_over=await field.left_over())
    after = await gateway.census()
    report.census = {
        name: {kind: census.get(kind, 0) for kind in TELLING} for name, census in (("before", before), ("after", after))
    }
    report.grown = dict((Counter(after) - Counter(before)).most_common(SHOWN_KINDS))
    report.active_in_envoy = await gateway.active_in_envoy()
    attempts, metrics = read_log(gateway.log), await counted(field)
    stayed = [one for one in sent if one.kind != "leaves"]
    report.clients = Counter(one.said for one in sent)
    report.statuses = {
        "clients": dict(Counter(one.status for one in stayed)),
        "service": dict(final_statuses(stayed, attempts)),
    }
    for (_, outcome, _), count in metrics.items():
        report.outcomes[outcome] = report.outcomes.get(outcome, 0) + count
    report.problems = [*problems(sent, attempts, metrics, hits), *_remains(report)]
    return report


def _remains(report: Report) -> list[str]:
    """What is left that should be gone, and what has grown."""
    found = [problem for curve in report.curves for problem in curve.problems()]
    if report.left_over:
        found.append(f"left over: {report.left_over}")
    for gauge, count in report.active_in_envoy.items():
        allowed = ACCESS_LOG_STREAMS if gauge.startswith(f"cluster.{SERVICE_CLUSTER}.") else 0
        if count > allowed:
            found.append(f"Envoy has {count} open: {gauge}")
    before, after = report.census["before"], report.census["after"]
    for kind in TELLING:
        if after[kind] > before[kind] + SPARE:
            found.append(f"{after[kind]} objects {kind} live at rest, {before[kind]} did before the run")
    return found
